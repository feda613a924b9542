"""What stands for the champion, in one folder: models, settings, card."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from brstnet.config import fingerprint, plain
from brstnet.data.store import sha256
from brstnet.training.checkpoint import read_facts
from brstnet.training.keep import finished
from sweeps.card import Subject, section_table, write_card
from sweeps.choice import Choice
from sweeps.refit import SETTINGS, read_settings, refit_folder

FOLDER = "champion"
NOTE = "champion.json"
CARD = "README.md"
SWEEP = "sweep.yaml"
TOLD = (SWEEP, CARD, NOTE)
"""What is told about the models, and may change without them."""

WHOLE = ("checkpoint.json", "model.safetensors")
"""What a checkpoint is not without; of trials that were stopped the weights are removed."""

LEFT_OUT = ("optimizer.safetensors", "progress.json")
"""What only a training that goes on needs."""


def gather(
    folder: Path, choice: Choice, *, store: str = "STORE", sweep_store: str | None = None
) -> Path:
    """Put what stands for the chosen trial into `champion/`, and return it.

    fold_0, fold_1, ...      the checkpoints of the search's own training (seed 0's, if repeated)
    refit/model              the refit's, if there is one: a folder deeper, where an ensemble of
                             all that is in `champion/` does not find it
    settings.yaml, sweep.yaml, champion.json, README.md

    It is made beside its place and renamed: no crash leaves half a champion. Models that are there
    already are left alone; what is told about them (`TOLD`) is always new.

    Raises:
        ValueError: checkpoints are missing.
    """
    place = folder / FOLDER
    models = models_of(folder, choice)
    hashes = {name: sha256(path / "checkpoint.json") for name, path in models.items()}
    content = fingerprint([folder.name, choice.chosen.trial, hashes])
    if not _holds(place, content):
        _stage(folder, models, choice, content)
    if (folder / SWEEP).is_file():
        write_whole(place / SWEEP, (folder / SWEEP).read_text(encoding="utf-8"))
    subject = _subject(folder, choice, store, sweep_store or store)
    write_whole(place / CARD, write_card(subject))
    write_whole(place / NOTE, json.dumps(_facts(subject, content), indent=1))
    return place


def models_of(folder: Path, choice: Choice) -> dict[str, Path]:
    """Where the chosen trial's checkpoints lie, by the name they get in `champion/`.

    Raises:
        ValueError: one of the folds has none.
    """
    trial = choice.chosen.folder
    if not (trial / SETTINGS).is_file():
        raise ValueError(f"{trial / SETTINGS}: missing; bring it back, or choose another trial")
    folds = [f"fold_{n}" for n in range(read_settings(trial).protocol.folds)]
    done = {name: finished(trial / name) for name in folds}
    found = {name: result.folder for name, result in done.items() if result is not None}
    there = {n: path for n, path in found.items() if all((path / f).is_file() for f in WHOLE)}
    if missing := [name for name in folds if name not in there]:
        raise ValueError(
            f"{trial}: no checkpoint of {', '.join(missing)} is here; bring the folder back from "
            "where the trial was trained, or promote another trial"
        )
    refit = finished(refit_folder(folder, choice.chosen.trial))
    return there if refit is None else {**there, "refit/model": refit.folder}


def _holds(place: Path, content: str) -> bool:
    note = place / NOTE
    return note.is_file() and json.loads(note.read_text()).get("content") == content


def _stage(folder: Path, models: dict[str, Path], choice: Choice, content: str) -> None:
    place, scratch, old = (folder / f"{FOLDER}{end}" for end in ("", ".tmp", ".old"))
    shutil.rmtree(scratch, ignore_errors=True)
    for name, path in models.items():
        shutil.copytree(path, scratch / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copyfile(choice.chosen.folder / SETTINGS, scratch / SETTINGS)
    if "refit/model" in models:
        refit = refit_folder(folder, choice.chosen.trial)
        shutil.copyfile(refit / SETTINGS, scratch / "refit" / SETTINGS)
    (scratch / NOTE).write_text(json.dumps({"content": content}))
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    scratch.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _subject(folder: Path, choice: Choice, store: str, sweep_store: str) -> Subject:
    place = folder / FOLDER
    settings = read_settings(place)
    folds = [place / f"fold_{n}" for n in range(settings.protocol.folds)]
    refit = place / "refit" / "model"
    return Subject(
        sweep=folder.name,
        choice=choice,
        settings=settings,
        facts=read_facts(folds[0]),
        sections=section_table(folds, choice.chosen),
        refit=read_facts(refit) if refit.is_dir() else None,
        folder=place,
        out=folder.parent,
        store=store,
        sweep_store=sweep_store,
    )


def _facts(subject: Subject, content: str) -> dict[str, Any]:
    """champion.json: the card's facts for programs."""
    chosen, protocol = subject.choice.chosen, subject.settings.protocol
    return {
        "format": "brstnet-champion",
        "version": 1,
        "content": content,
        "sweep": subject.sweep,
        "trial": chosen.trial,
        "seed": chosen.seed,
        "config": chosen.outcomes[0]["config"],
        "protocol": protocol.line(),
        "score": chosen.score,
        "scores": list(chosen.folds),
        "sections": {
            section: None if math.isnan(pcc) else pcc
            for section, pcc in subject.sections.set_index("section")["pcc"].items()
        },
        "seeds": [int(o["seed"]) for o in chosen.outcomes],
        "settings": plain(subject.settings),
        "refit": subject.refit is not None,
        "rule": subject.choice.rule,
        "chosen": subject.choice.reason,
        "searched": dict(subject.choice.searched),
        "store": subject.facts["store"]["digest"],
    }


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.rename(path)
