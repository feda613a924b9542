"""A trial that trains nothing: what a real one writes and reports, and sleep in place of steps.

Nothing heavy is imported here: sixty-four processes of it fit a small machine.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from sweeps.events import Events

METRICS = 10
"""Numbers of an epoch."""


@dataclass(frozen=True, kw_only=True)
class FakeJob:
    """What all trials share. `rungs` are where a trial reports inside a fold.

    The first `together` processes begin at the same moment: a small machine takes minutes to start
    sixty-four of them, and what is measured is not that.
    """

    out: Path
    session: str
    together: int
    folds: int
    epochs: int
    rungs: tuple[float, ...]
    seconds: float
    """A whole trial's, on average; one trial's are log-normal around it."""


@dataclass(frozen=True, kw_only=True)
class Nature:
    """How long a configuration takes and how good it is."""

    seconds: float
    score_F: np.ndarray
    section_FS: np.ndarray

    @classmethod
    def of(cls, number: int, point: Mapping[str, Any], job: FakeJob) -> "Nature":
        """A smooth surface over the space, an effect of each fold, and noise."""
        rng = np.random.default_rng([7, number])
        rate, weight = np.log10(point["learning_rate"]), np.log10(point["aux_weight"])
        quality = 0.3 - 0.04 * (rate + 1.5) ** 2 - 0.02 * (weight - 0.5) ** 2
        fold_F = np.random.default_rng(8).normal(0, 0.03, job.folds)
        score_F = quality + fold_F + rng.normal(0, 0.01, job.folds)
        return cls(
            seconds=job.seconds * float(rng.lognormal(-0.125, 0.5)),
            score_F=score_F,
            section_FS=score_F[:, None] + rng.normal(0, 0.02, (job.folds, 3)),
        )


class Sleeper:
    """Sleeps, and notes from when to when: the time that a slot was busy with training."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "busy.jsonl"

    def sleep(self, seconds: float) -> None:
        """As long as an epoch takes."""
        began = time.time()
        time.sleep(seconds)
        with self.file.open("a") as file:
            file.write(json.dumps([began, time.time(), os.getpid()]) + "\n")


def run_fake(config: Mapping[str, Any], job: FakeJob) -> None:
    """What Tune calls. Folds that were finished before a restart are not repeated."""
    number, point = config["number"], config["point"]
    wait_for_all(job)
    folder = job.out / "trials" / f"{number:04d}"
    nature, began = Nature.of(number, point, job), time.monotonic()
    events, sleeper = Events(folder), Sleeper(folder)
    begin(events, folder.name, number, point)
    scores: list[float] = []
    sections: dict[str, float] = {}

    def note(progress: float, score: list[float]) -> dict[str, Any]:
        return {
            "score": float(np.mean(score)),
            "folds_done": len(scores),
            "progress": progress,
            "cost_seconds": time.monotonic() - began,
            "scores": list(scores),
            "sections": dict(sections),
        }

    for fold, final in enumerate(nature.score_F.tolist()):
        told = folder / f"fold_{fold}" / "told"
        if not told.exists():
            key = f"{folder.name}/fold_{fold}"
            events.start(key, f"fold {fold}", "fold", {}, f"{folder.name}/trial")
            events.status(key, "RUNNING")
            for epoch in range(job.epochs):
                sleeper.sleep(nature.seconds / (job.folds * job.epochs))
                share = (epoch + 1) / job.epochs
                score = final * (1 - 0.5 * (1 - share) ** 2)
                events.log(key, numbers(epoch, score), step=epoch)
                before, done = fold + epoch / job.epochs, fold + share
                if share < 1 and any(before < rung - 1e-9 <= done for rung in job.rungs):
                    tune.report(note(done, [*scores, score]))
            end_fold(events, key, final, told)
        scores.append(final)
        sections |= {f"section {fold}-{n}": v for n, v in enumerate(nature.section_FS[fold])}
        standing = note(fold + 1.0, scores)
        metrics = {name: standing[name] for name in ("score", "folds_done", "cost_seconds")}
        metrics |= {f"score_fold_{n}": value for n, value in enumerate(scores)}
        events.log(f"{folder.name}/trial", metrics, step=len(scores))
        tune.report(standing)


def wait_for_all(job: FakeJob) -> None:
    """Wait until so many processes are there; afterwards nobody waits."""
    up = job.out / f"up-{job.session}"
    up.mkdir(exist_ok=True)
    (up / str(os.getpid())).touch()
    while len(list(up.iterdir())) < job.together:
        time.sleep(0.5)


def begin(events: Events, name: str, number: int, point: Mapping[str, Any]) -> None:
    """The trial's run, as `sweeps/record.py` begins it."""
    key = f"{name}/trial"
    tags = {"brstnet.sweep": "fake", "brstnet.trial": str(number), "brstnet.seed": "0"}
    events.start(key, f"trial {number}", "trial", {**tags, "brstnet.state": "RUNNING"}, "sweep")
    events.log(key, params={**point, **{f"setting_{n}": n for n in range(25)}})
    dataset = {"name": "fake", "digest": "0" * 16, "source": "{}", "profile": "{}"}
    schema = json.dumps({"genes": [f"ENSG{n:011d}" for n in range(250)]})
    events.input(key, **dataset, schema=schema, context="no tissue")
    events.status(key, "RUNNING")


def numbers(epoch: int, score: float) -> dict[str, float]:
    """As many metrics as a real epoch has."""
    return {"score": score, **{f"metric_{n}": epoch + n / 10 for n in range(1, METRICS)}}


def end_fold(events: Events, key: str, score: float, told: Path) -> None:
    """A fold's score and a file, and its run's end."""
    events.log(key, {"fold_score": score})
    report = told.parent / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / "genes.csv").write_text("gene,pcc\n" * 250)
    events.files(key, report)
    events.status(key, "FINISHED")
    told.touch()
