"""What one trial tells of itself: its run and a run for each fold, as events on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brstnet.config import Protocol, Training, plain
from brstnet.data.store import Store
from sweeps.events import Events
from sweeps.space import Asked


class TrialRecord:
    """One trial's runs. Kept by the process that trains it, or that leads those which do."""

    def __init__(self, folder: Path, sweep: str) -> None:
        self.events = Events(folder)
        self.name = folder.name
        self.tags = {"brstnet.sweep": sweep}

    def begin(self, asked: Asked, training: Training, store: Store, protocol: Protocol) -> None:
        """The trial's run: its settings and what it learns from; again RUNNING after a restart."""
        key = f"{self.name}/trial"
        self.tags["brstnet.protocol_line"] = protocol.line()
        tags = {**self.tags, "brstnet.trial": str(asked.number), "brstnet.seed": str(asked.seed)}
        name = f"trial {asked.number} {training.backbone}"
        name += f" seed {asked.seed}" if asked.seed else ""
        self.events.start(key, name, "trial", {**tags, "brstnet.state": "RUNNING"}, "sweep")
        self.events.log(key, params=plain(training))
        self.events.input(key, **describe_store(store), context=protocol.line())
        self.events.status(key, "RUNNING")

    def fold(self, number: int) -> None:
        """A fold's run below the trial's."""
        key = f"{self.name}/fold_{number}"
        tags = {**self.tags, "brstnet.fold": str(number)}
        self.events.start(key, f"fold {number}", "fold", tags, f"{self.name}/trial")
        self.events.status(key, "RUNNING")

    def epoch(self, fold: int, note: Mapping[str, float]) -> None:
        """One epoch's numbers."""
        metrics = {k: v for k, v in note.items() if k != "epoch"}
        self.events.log(f"{self.name}/fold_{fold}", metrics, step=int(note["epoch"]))

    def end_fold(self, fold: int, score: float, files: Path) -> None:
        """A fold's score and files, and its run's end."""
        key = f"{self.name}/fold_{fold}"
        self.events.log(key, {"fold_score": score})
        self.events.files(key, files)
        self.events.status(key, "FINISHED")

    def running(self, note: Mapping[str, Any]) -> None:
        """The trial's score so far, and its best and worst fold."""
        scores: list[float] = note["scores"]
        metrics = {name: note[name] for name in ("score", "folds_done", "cost_seconds")}
        metrics |= {f"score_fold_{number}": score for number, score in enumerate(scores)}
        metrics |= {"best_fold_score": max(scores), "worst_fold_score": min(scores)}
        self.events.log(f"{self.name}/trial", metrics, step=len(scores))


def describe_store(store: Store) -> dict[str, str]:
    """A store as an MLflow dataset."""
    profile = {"sections": len(store.sections), "patients": len(store.patients)}
    return {
        "name": store.name,
        "digest": store.digest,
        "source": json.dumps({"path": store.origin, "prepare": store.index["prepare"]}),
        "schema": json.dumps({"genes": store.index["genes"], "input_px": store.input_px}),
        "profile": json.dumps(profile),
    }
