"""Who trains, who validates, who is held out: by patient, the same for every trial."""

from collections.abc import Sequence
from dataclasses import dataclass

from brstnet.config import Protocol
from brstnet.data.store import Store


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One split of a store's sections; a section stands in exactly one of the three."""

    number: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]


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


def pick_fold(folds: Sequence[Fold], number: int) -> Fold:
    """The fold of this number.

    Raises:
        ValueError: there is none.
    """
    if not 0 <= number < len(folds):
        raise ValueError(f"fold must be from 0 to {len(folds) - 1}, got {number}")
    return folds[number]
