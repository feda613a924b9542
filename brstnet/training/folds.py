"""Who trains, who validates, who is held out: by patient, the same for every trial."""

from collections.abc import Sequence
from dataclasses import dataclass

from brstnet.config import Protocol
from brstnet.data.store import Store

ALL = -1
"""In place of a fold's number: all that are not held out train, and nobody validates (a refit)."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One split of a store's sections; a section stands in exactly one of the three."""

    number: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """What a message calls it."""
        return "the refit on all folds" if self.number == ALL else f"fold {self.number}"


def make_folds(store: Store, protocol: Protocol) -> list[Fold]:
    """The folds of a protocol: groups sorted by name go round in turn, as in the authors' code.

    Raises:
        ValueError: a held-out patient is unknown, or a fold would be empty.
    """
    held_out = tuple(store.of_patients(protocol.held_out))
    rest = [name for name in store.sections if name not in held_out]
    group_of = {name: store.sections[name][protocol.group] for name in rest}
    groups = sorted(set(group_of.values()))
    if len(groups) < protocol.folds:
        raise ValueError(
            f"{store.path}: {protocol.folds} folds need at least {protocol.folds} groups "
            f"(protocol.group: {protocol.group}), but only {len(groups)} are left "
            f"({', '.join(groups) or 'none'}) with {', '.join(protocol.held_out) or 'nobody'} "
            "held out: lower protocol.folds, or add patients"
        )
    folds = []
    for number in range(protocol.folds):
        taken = set(groups[number :: protocol.folds])
        folds.append(
            Fold(
                number=number,
                train=tuple(n for n in rest if group_of[n] not in taken),
                validation=tuple(n for n in rest if group_of[n] in taken),
                held_out=held_out,
            )
        )
    return folds


def everyone(store: Store, protocol: Protocol) -> Fold:
    """The sections of all folds as training sections; who is held out stays out.

    Raises:
        ValueError: a held-out patient is unknown, or the protocol's folds cannot be made.
    """
    first = make_folds(store, protocol)[0]
    used = {*first.train, *first.validation}
    train = tuple(name for name in store.sections if name in used)
    return Fold(number=ALL, train=train, validation=(), held_out=first.held_out)


def choose_fold(store: Store, protocol: Protocol, number: int) -> Fold:
    """The fold of this number, or everyone for `ALL`.

    Raises:
        ValueError: there is none, or the protocol's folds cannot be made.
    """
    if number == ALL:
        return everyone(store, protocol)
    return pick_fold(make_folds(store, protocol), number)


def pick_fold(folds: Sequence[Fold], number: int) -> Fold:
    """The fold of this number.

    Raises:
        ValueError: there is none.
    """
    if not 0 <= number < len(folds):
        raise ValueError(f"fold must be from 0 to {len(folds) - 1}, got {number}")
    return folds[number]
