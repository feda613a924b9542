"""The leak gate of an evaluation: what a reviewer would ask, answered from what can be seen.

A model may have learnt from those it is judged on in many ways: they trained under another name, a
panel or a mean was taken over everybody, the stain target is theirs, the best of many models was
chosen by their scores. Each is a check. What the store and the files beside a checkpoint can show
is computed again; what they cannot is `unknown`, with what the checkpoint says of itself.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brstnet.data.store import Store
from brstnet.evaluation.leaks import selection
from brstnet.evaluation.leaks.checks import (
    FAILED,
    NOTE,
    PASSED,
    STATES,
    UNKNOWN,
    Check,
    Subject,
    Verdict,
)
from brstnet.evaluation.leaks.contents import Contents, colour_statistics, look
from brstnet.evaluation.predict import Ensemble, check_store
from brstnet.training import leaks
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.leaks import LeakError
from brstnet.training.model import colours


def judge_gate(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    *,
    chosen: Path | None = None,
    earlier: int | None = None,
    cross_validated: bool = False,
) -> list[Check]:
    """All checks of judging these models on these sections.

    Args:
        ensemble: the models.
        store: the store that they are judged on.
        sections: to be judged.
        chosen: folder with a champion.json; by default looked for beside the checkpoints.
        earlier: how many evaluations of the same patients are on record; None: there is no record.
        cross_validated: the sections are the models' own validation. They may have chosen epoch
            and configuration then, but trained nothing.

    Raises:
        LeakError: a check fails; the message holds every failure.
        ValueError: the store was prepared in another way than the models' own.
    """
    for member in ensemble.members:
        check_store(member, store)  # before patches are compared
    subjects = [
        _subject(m, store, sections, judged_by_own=cross_validated) for m in ensemble.members
    ]
    with store.read_once():
        contents = _look_at_all(subjects)
        checks = [check for subject in subjects for check in _of_member(subject, contents)]
    checks += selection.champions(subjects, chosen)
    if not cross_validated:  # validation patients were looked at by every trial, which that says
        checks.append(selection.looks(earlier))
    if failures := [c for c in checks if c.state == FAILED]:
        lines = [f"{c.name}{f' ({c.of})' if c.of else ''}: {c.why}" for c in failures]
        raise LeakError(f"{store.path}: these sections cannot judge it\n  " + "\n  ".join(lines))
    return checks


def check_unseen(ensemble: Ensemble, store: Store, sections: Sequence[str]) -> None:
    """The first check of the gate alone, where patches and statistics play no part.

    Raises:
        LeakError: a section's patient was in training or validation of a model.
    """
    for member in ensemble.members:
        state, why = _unseen(_subject(member, store, sections))
        if state == FAILED:
            raise LeakError(why)


def gate_line(checks: Sequence[Check]) -> str:
    """How many checks came to what, such as "leak gate: 37 passed, 5 note"."""
    counts = {state: sum(check.state == state for check in checks) for state in STATES}
    return "leak gate: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)


def gate_rows(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks for JSON or a table: name, of, state, why."""
    return [dataclasses.asdict(check) for check in checks]


def _subject(
    member: Checkpoint, store: Store, sections: Sequence[str], *, judged_by_own: bool = False
) -> Subject:
    return Subject(
        member=member,
        store=store,
        sections=sections,
        here=_sections_here(member, store),
        cross_validated=judged_by_own,
    )


def _sections_here(member: Checkpoint, store: Store) -> dict[str, str]:
    """Which section of the store is the one it used, by its patches: of that name if there is."""
    used = member.facts["store"]["sections"]
    by_hash = {e["files"]["patches.npy"]: n for n, e in store.sections.items()}
    by_name = {n: e["files"]["patches.npy"] for n, e in store.sections.items()}
    same = {name: name for name, sha in used.items() if by_name.get(name) == sha}
    return {name: by_hash[sha] for name, sha in used.items() if sha in by_hash} | same


def _look_at_all(subjects: Sequence[Subject]) -> dict[str, Contents]:
    """The contents of the judged sections, and of those that any model trained or validated on."""
    store, protocol = subjects[0].store, subjects[0].member.settings.protocol
    names = dict.fromkeys([*subjects[0].sections, *(n for c in subjects for n in c.here.values())])
    return {name: look(store, name, protocol) for name in names}


def _of_member(subject: Subject, contents: Mapping[str, Contents]) -> Iterator[Check]:
    """All checks of one model."""
    of = subject.member.fold.name
    for name, (state, why) in {
        "patients": _patients(subject),
        "copies": _copies(subject, contents),
        "folds": _folds(subject),
        "statistics": _told(leaks.check_statistics(subject.member.fold, subject.member.fitted)),
        **_fitted(subject),
        "image_statistics": _image_statistics(subject, contents),
        "stain_target": _stain_target(subject),
        "epoch": selection.epoch(subject),
    }.items():
        yield Check(name=name, of=of, state=state, why=why)


def _told(check: Mapping[str, Any]) -> Verdict:
    """A check of `brstnet.training.leaks`."""
    if not check["ok"]:
        return FAILED, check["why"]
    why = check["why"].removeprefix("NOTE: ")
    return (NOTE if why != check["why"] else PASSED), why


def _said(subject: Subject, name: str) -> Verdict:
    """What cannot be computed here: what the checkpoint says that was found before training."""
    checks = subject.member.facts.get("leak_report", {}).get("checks", {})
    said = checks.get(name, {}).get("why", "nothing")
    return UNKNOWN, (
        f"sections {', '.join(subject.missing[:3])} of its training are not in this store; said by "
        f"the checkpoint: {said}"
    )


# Who ---------------------------------------------------------------------------------------------


def _patients(subject: Subject) -> Verdict:
    """A patient has been seen whose name the checkpoint has, or who owns a section that it has.

    A section is known by its name and by its very patches.
    """
    return _own_validation(subject) if subject.cross_validated else _unseen(subject)


def _unseen(subject: Subject) -> Verdict:
    member, store = subject.member, subject.store
    used = member.facts["store"]["sections"]
    owned = [name for name in store.sections if name in used or name in subject.here.values()]
    seen = {*member.facts["patients"], *subject.patients(owned)}
    faults = [
        f"section {name} of patient {store.sections[name]['patient']} cannot judge {member.path}: "
        "that model was trained or chosen on the patient; judge it on held-out patients "
        f"({', '.join(member.settings.protocol.held_out) or 'this one has none'}), or each fold's "
        "model on its own validation sections (--cross_validated)"
        for name in subject.sections
        if store.sections[name]["patient"] in seen
    ]
    if faults:
        return FAILED, "; ".join(faults)
    if subject.missing:
        return PASSED, (
            f"no judged patient has the name of one who trained or validated; of its training "
            f"{', '.join(subject.missing[:3])} are not in this store: a patient renamed since, in "
            "another store, would not be seen"
        )
    return PASSED, "no judged patient trained or validated, by name or by the patches of a section"


def _own_validation(subject: Subject) -> Verdict:
    fold = subject.fold
    if trained := [name for name in subject.sections if name in fold.train]:
        return FAILED, f"sections {', '.join(trained)} trained {subject.member.path}"
    if strange := [name for name in subject.sections if name not in fold.validation]:
        return FAILED, f"sections {', '.join(strange)} are not the validation of {fold.name}"
    both = sorted({*subject.patients(fold.train)} & {*subject.patients(subject.sections)})
    if both and subject.member.settings.protocol.group == "patient":
        return FAILED, f"patients {', '.join(both)} trained {subject.member.path} too"
    within = f"; of patients {', '.join(both)} other sections trained" if both else ""
    return NOTE, f"judged on its own validation, which configurations are chosen by{within}"


def _copies(subject: Subject, contents: Mapping[str, Contents]) -> Verdict:
    """Whether spots of the judged sections are in a section it used, whatever that is called."""
    used = subject.fold.train if subject.cross_validated else tuple(subject.here.values())
    faults = []
    for name in subject.sections:
        for other in (o for o in dict.fromkeys(used) if o != name):
            for what in ("patches", "counts"):
                mine, its = getattr(contents[name], what), getattr(contents[other], what)
                if both := len(mine & its):
                    faults.append(f"{what} of {both} spots of section {name} are in {other}")
    if faults:
        return FAILED, "; ".join(faults)
    if not used:
        return UNKNOWN, "none of its sections is in this store: contents cannot be compared"
    lacking = (
        f"; {', '.join(subject.missing[:3])} are not here to compare" if subject.missing else ""
    )
    return PASSED, (
        f"no spot has the patch or the counts of one of {len(used)} sections that it used{lacking}"
    )


def _folds(subject: Subject) -> Verdict:
    """Whether training, validation and the held-out are apart, by the patients of this store."""
    protocol, fold = subject.member.settings.protocol, subject.fold
    if len(subject.here) < len(subject.member.facts["store"]["sections"]):
        return _said(subject, "groups")
    checks = [leaks.check_groups(subject.store, fold, protocol)]
    checks.append(leaks.check_held_out(subject.store, fold, protocol))
    why = "; ".join(check["why"] for check in checks)
    return _told({"ok": all(check["ok"] for check in checks), "why": why})


# What was fitted ---------------------------------------------------------------------------------


def _fitted(subject: Subject) -> dict[str, Verdict]:
    """Panel, filters and targets, from the raw counts of the training spots."""
    checks = {
        "panel": leaks.check_panel,
        "filters": leaks.check_filters,
        "targets": leaks.check_targets,
    }
    if subject.missing:
        return {name: _said(subject, name) for name in checks}
    protocol, fold = subject.member.settings.protocol, subject.fold
    known = subject.member.fitted.genes.index.isin(subject.store.genes.index)
    if not known.all():
        why = f"{(~known).sum()} of its {len(known)} genes are not in this store"
        return dict.fromkeys(checks, (UNKNOWN, why))
    return {
        name: _told(check(subject.store, fold, subject.member.fitted, protocol))
        for name, check in checks.items()
    }


def _image_statistics(subject: Subject, contents: Mapping[str, Contents]) -> Verdict:
    fitted, settings = subject.member.fitted, subject.member.settings
    mine = np.array([fitted.image_mean, fitted.image_std])
    if settings.training.image_statistics == "weights":
        if np.allclose(mine, colours(subject.member.model.backbone)):
            return PASSED, "those that the backbone's weights were trained with"
        return FAILED, "mean and deviation of the colours are not those of the backbone's weights"
    if subject.missing:
        return _said(subject, "statistics")
    levels_CL = np.sum([contents[name].levels_CL for name in subject.fold.train], axis=0)
    if not np.allclose(mine, colour_statistics(levels_CL), atol=1e-6):
        return FAILED, "mean and deviation of the colours are not the training spots'"
    return PASSED, f"mean and deviation of the colours are those of {fitted.spots} training spots"


def _stain_target(subject: Subject) -> Verdict:
    """Whose the stain target is that the model was trained with, by either store's names."""
    target = subject.member.facts["store"]["stain_target"]
    if target is None:
        return PASSED, "no stain normalisation"
    here = subject.store.index["stain_target"]
    owners = {target["patient"]}
    if target["section"] in subject.here:
        owners |= {*subject.patients([subject.here[target["section"]]])}
    if here is not None and here.get("stain_matrix") == target.get("stain_matrix"):
        owners.add(here["patient"])
    name = f"section {target['section']} of patient {' alias '.join(sorted(owners))}"
    judged, validated = (
        subject.patients(subject.sections),
        subject.patients(subject.fold.validation),
    )
    if owners & set(judged):
        if subject.cross_validated:
            return NOTE, f"the stain target, {name}, belongs to who is judged"
        return FAILED, (
            f"the stain target of its training is {name}, who is judged: prepare the store again "
            f"with --held_out '[{', '.join(judged)}]', and train again"
        )
    if owners & set(validated):
        return NOTE, f"the stain target, {name}, is of a validation patient"
    if here != target:
        return NOTE, f"trained with the stain target {name}; this store has another"
    return PASSED, f"the stain target is {name}, who is not judged"
