"""What a check of the leak gate looks at, and what it finds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from brstnet.data.store import Store
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.folds import Fold

PASSED, NOTE, UNKNOWN, FAILED = "passed", "note", "unknown", "failed"
"""Seen to be right; true, but to be known; cannot be seen here; a leak."""
STATES = (PASSED, NOTE, UNKNOWN, FAILED)

Verdict = tuple[str, str]
"""State and why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: of a model, or of all together.

    Attributes:
        name: what is checked.
        of: which model, by its fold; "" of all.
        state: one of passed, note, unknown, failed.
        why: in words.
    """

    name: str
    of: str = ""
    state: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, the sections that judge it, and what of its own sections is in this store.

    Attributes:
        member: the model.
        store: the store that it is judged on.
        sections: to be judged.
        here: the names here of the sections it trained and validated on, by their names there.
        cross_validated: whether it is judged on its own validation.
    """

    member: Checkpoint
    store: Store
    sections: Sequence[str]
    here: Mapping[str, str]
    cross_validated: bool

    @property
    def missing(self) -> list[str]:
        """Training sections that this store does not have."""
        return [name for name in self.member.fold.train if name not in self.here]

    @property
    def fold(self) -> Fold:
        """The model's fold in this store's names, without what is not here."""
        fold, known = self.member.fold, self.here
        return Fold(
            number=fold.number,
            train=tuple(known[name] for name in fold.train if name in known),
            validation=tuple(known[name] for name in fold.validation if name in known),
            held_out=fold.held_out,
        )

    def patients(self, sections: Iterable[str]) -> list[str]:
        """Whose these sections of the store are."""
        return sorted({self.store.sections[name]["patient"] for name in sections})
