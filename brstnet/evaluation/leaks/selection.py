"""How a model came to be the one that is judged: its epoch, its configuration, earlier looks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brstnet.config import fingerprint, read_yaml
from brstnet.data.guarded import inside, read_json
from brstnet.data.store import sha256
from brstnet.evaluation.leaks.checks import FAILED, NOTE, PASSED, UNKNOWN, Check, Subject, Verdict
from brstnet.training.folds import ALL

CHAMPION, SWEEP = "champion.json", "sweep.yaml"
"""What a sweep leaves beside the models of its champion."""

MOST_YAML = 1 << 20
"""Bytes of a sweep's settings."""


def epoch(subject: Subject) -> Verdict:
    """Whether a score on validation sections has chosen the epoch."""
    member, training = subject.member, subject.member.settings.training
    fold, number = member.fold, int(member.facts["scores"]["epoch"])
    if fold.number == ALL or not fold.validation:
        return PASSED, f"epoch {number}: nobody validated, no score could choose it"
    who = f"validation sections {', '.join(fold.validation)}"
    plateau = "; they lowered the learning rate too" if training.schedule == "plateau" else ""
    if training.stopping == "early":
        return NOTE, f"epoch {number} has the best score on {who}: chosen on them{plateau}"
    if number + 1 < training.epochs:
        return NOTE, f"epoch {number} of {training.epochs} that were fixed: maybe chosen on {who}"
    if plateau:
        return NOTE, f"the last of {training.epochs} epochs; {who} lowered the learning rate"
    return PASSED, f"the last of {training.epochs} epochs, fixed beforehand"


def champions(subjects: Sequence[Subject], chosen: Path | None) -> list[Check]:
    """How these models were chosen among others: a check for each folder that says it."""
    folders: dict[Path | None, list[Subject]] = {}
    for subject in subjects:
        folders.setdefault(chosen or _folder_of(subject.member.path), []).append(subject)
    checks = []
    for folder, its in folders.items():
        state, why = _champion(folder, its)
        of = ", ".join(subject.member.fold.name for subject in its) if len(folders) > 1 else ""
        checks.append(Check(name="champion", of=of, state=state, why=why))
    return checks


def _folder_of(path: Path) -> Path | None:
    """The folder with the champion.json of a checkpoint: itself, or one of the two around it."""
    around = (path, *path.resolve().parents[:2])
    return next((folder for folder in around if (folder / CHAMPION).is_file()), None)


def _champion(folder: Path | None, subjects: Sequence[Subject]) -> Verdict:
    if folder is None:
        return UNKNOWN, f"no {CHAMPION} beside the checkpoints: how many were tried, and on whom?"
    try:
        note = read_json(inside(folder, CHAMPION))
        held_out = _held_out_of_sweep(folder)
        if (fault := _fault_of_note(note, folder, subjects)) is not None:
            return UNKNOWN, f"{folder / CHAMPION}: {fault}"
        return _choice(note, held_out, subjects)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        return UNKNOWN, f"{folder / CHAMPION}: cannot be read: {type(error).__name__}: {error}"


def _fault_of_note(
    note: Mapping[str, Any], folder: Path, subjects: Sequence[Subject]
) -> str | None:
    """Why a champion.json says nothing of these models: its hash is over theirs."""
    if note.get("format") != "brstnet-champion":
        return "is no champion's"
    models = sorted(path.parent for path in folder.glob("*/checkpoint.json"))
    models += [path.parent for path in folder.glob("refit/model/checkpoint.json")]
    hashes = {
        path.relative_to(folder).as_posix(): sha256(inside(path, "checkpoint.json"))
        for path in models
    }
    if fingerprint([note["sweep"], note["trial"], hashes]) != note["content"]:
        return "its hash is not that of the checkpoints beside it: of other models, or changed"
    known = {path.resolve() for path in models}
    if other := [c.member.path for c in subjects if c.member.path.resolve() not in known]:
        return f"says nothing of {', '.join(map(str, other[:3]))}"
    return None


def _held_out_of_sweep(folder: Path) -> set[str] | None:
    """The patients that the sweep held out; None where it is not told."""
    if not (file := inside(folder, SWEEP)).is_file():
        return None
    if (size := file.stat().st_size) > MOST_YAML:
        raise ValueError(f"{file}: {size} bytes, at most {MOST_YAML} are read")
    return {str(patient) for patient in read_yaml(file)["protocol"]["held_out"]}


def _choice(
    note: Mapping[str, Any], held_out: set[str] | None, subjects: Sequence[Subject]
) -> Verdict:
    """What champion.json says of the search, and whether the judged patients were in it."""
    subject, scored = subjects[0], set(note["sections"])
    judged = subject.patients(subject.sections)
    owned = [n for n in subject.store.sections if n in scored] + [
        here for c in subjects for here in c.here.values()
    ]
    tried = sum(int(number) for number in note["searched"].values())
    search = (
        f"sweep {note['sweep']} tried {tried} configurations on {len(scored)} sections of "
        f"{', '.join(subject.patients(dict.fromkeys(owned))) or 'patients who are not here'} and "
        f"took trial {note['trial']} by the rule {note['rule']}"
    )
    if all(c.cross_validated for c in subjects):
        return NOTE, f"{search}: of so many scores the best is a little too high"
    if met := sorted(set(judged) & {*subject.patients(owned)}):
        return FAILED, f"{search}; {', '.join(met)}, who is judged, was in it"
    if held_out is None:
        return UNKNOWN, f"{search}; no {SWEEP} beside it says who was held out"
    if strange := sorted(set(judged) - held_out):
        if note["store"] == subject.store.digest:
            return FAILED, f"{search}; {', '.join(strange)} was not held out"
        return NOTE, f"{search}; {', '.join(strange)} was not held out, but its store was another"
    return PASSED, f"{search}; {', '.join(judged)} was held out"


def looks(earlier: int | None) -> Check:
    """How often the judged patients were looked at before."""
    state, why = PASSED, "no earlier evaluation of these patients is on record"
    if earlier is None:
        state, why = UNKNOWN, "no record of earlier evaluations: how often were they looked at?"
    elif earlier:
        state = NOTE
        why = (
            f"{earlier} earlier evaluations of these patients are on record: who is looked at many "
            "times, and chosen by, is no longer held out"
        )
    return Check(name="earlier", state=state, why=why)
