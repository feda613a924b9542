"""One trial: one configuration, all folds one after the other, the same order in every trial."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray.train.torch
import torch

from brstnet.config import Settings, to_yaml
from brstnet.data.mirror import open_store
from brstnet.data.store import Store
from brstnet.evaluation import validation
from brstnet.launch import pick_device
from brstnet.training import distributed
from brstnet.training.checkpoint import read_facts, settle
from brstnet.training.keep import FitResult, read_progress
from brstnet.training.train import fit
from sweeps.nodes import BrokenNodeError, check_gpu, note_place
from sweeps.pruning import Pruner, pruner_of
from sweeps.record import TrialRecord
from sweeps.space import Asked, Sweep

ATTEMPTS = 3
"""A trial that died so often at the same place, under one driver, has a fault of its own."""

LOCK_SECONDS = 300.0
"""How long a trial waits for a process that was cut off from Ray and still trains in its folder."""

OWN_FAULT = (ValueError, FloatingPointError, FileNotFoundError, torch.OutOfMemoryError)
"""What another try would meet again."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all trials of a sweep share: what is asked, where things are, who drives.

    `stores` has the address of the sweep's store under "", and others by their names in the space.
    """

    sweep: Sweep
    stores: dict[str, str]
    out: Path
    gpus_per_worker: float
    session: str

    def folder(self, asked: Asked) -> Path:
        """Where a trial keeps its folds; the same after a restart."""
        return self.out / "trials" / asked.name

    @property
    def bundle(self) -> dict[str, float]:
        """What a worker takes of a node."""
        wanted = {"CPU": self.sweep.cpus_per_worker, "GPU": self.gpus_per_worker}
        return {name: float(amount) for name, amount in wanted.items() if amount}

    def store(self, point: Mapping[str, Any]) -> str:
        """Where the store is that a point of the space trains on."""
        return self.stores[point.get("store", "")]


def train_folds(asked: Asked, job: Job, report: Report) -> None:
    """Train all folds in order and report the running mean of their scores after each.

    What is finished on disk is not repeated. Settings that cannot be trained end the trial as
    failed, with the reason; they do not end the sweep, and are not tried again.
    """
    folder = job.folder(asked)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(job.sweep.cpus_per_worker)
    state = Standing(folder, job.sweep.workers_per_trial)
    with claimed(folder):
        note_place(folder, distributed.world().rank)
        try:
            # All give up, or none: who went on alone would wait for the others for ever.
            reason = distributed.of_leader(begin_attempt(folder, job.session), distributed.world())
            if not reason:
                check_gpu(job.gpus_per_worker)
                _train_folds(asked, job, state, report)
        except OWN_FAULT as error:
            if isinstance(error, torch.OutOfMemoryError):
                if distributed.world().size > 1:
                    raise  # the others wait in a collective: the whole group must end
                torch.cuda.empty_cache()  # the actor goes on with other trials
            reason = str(error) or type(error).__name__
        except BrokenNodeError:
            (folder / "attempts.json").unlink(missing_ok=True)  # a try that the trial did not have
            raise
        except Exception as error:
            note_error(folder, error)
            raise
    if reason:
        folds = job.sweep.protocol.folds
        report({**state.note(), "score": float("nan"), "folds_done": folds, "reason": reason})


def _train_folds(asked: Asked, job: Job, state: "Standing", report: Report) -> None:
    sweep, folder = job.sweep, state.folder
    settings = sweep.settings({**asked.point, "seed": sweep.training.seed + asked.seed})
    (folder / "settings.yaml").write_text(to_yaml(settings))
    store = open_store(job.store(asked.point))
    record = None
    if distributed.world().leads:
        record = TrialRecord(folder, sweep.name)
        record.begin(asked, settings.training, store, settings.protocol)
    rungs = None if asked.seed or sweep.pruning == "none" else pruner_of(sweep)
    for fold in range(settings.protocol.folds):
        on_epoch = _watch(state, fold, settings, record, rungs, report)
        result = train_fold(store, settings, fold, folder, record, on_epoch)
        state.finish(result)
        if record is not None:
            record.running(state.note())
        report(state.note())


def _watch(
    state: "Standing",
    fold: int,
    settings: Settings,
    record: TrialRecord | None,
    rungs: Pruner | None,
    report: Report,
) -> Callable[[Mapping[str, float]], None]:
    """What is done after each epoch: tell of it, and at a rung inside the fold ask to go on."""
    before, seen = float(fold), np.nan
    early = settings.training.stopping == "early"

    def on_epoch(note: Mapping[str, float]) -> None:
        nonlocal before, seen
        seen = np.fmax(seen, note["score"]) if early else note["score"]
        done = fold + (note["epoch"] + 1) / settings.training.epochs
        state.spend()
        if record is not None:
            record.epoch(fold, note)
        if rungs is not None and done < fold + 1 and rungs.due(before, done):
            report(state.note(done, seen))
        before = done

    return on_epoch


def train_fold(
    store: Store,
    settings: Settings,
    fold: int,
    folder: Path,
    record: TrialRecord | None,
    on_epoch: Callable[[Mapping[str, float]], None],
) -> FitResult:
    """Train one fold and tell of it; a fold that was finished before is neither repeated nor told.

    Epochs that are on disk are gone through again first: a process may have been killed when they
    were saved, but not yet told, or not yet judged at a rung.
    """
    out = folder / f"fold_{fold}"
    told = out / "told"
    if record is not None and not told.exists():
        record.fold(fold)
    for note in saved_epochs(out):
        on_epoch(note)
    result = fit(store, settings, fold, out, device=worker_device(), on_epoch=on_epoch)
    if record is not None and not told.exists():
        record.end_fold(fold, result.score, describe_fold(result, out / "report"))
        # A finished fold is never gone on from: its momentum would be a third of a sweep's disk.
        (out / "last" / "optimizer.safetensors").unlink(missing_ok=True)
        told.touch()
    return result


def saved_epochs(out: Path) -> list[dict[str, float]]:
    """The numbers of a fold's epochs that are on disk, the same for all workers."""
    here, last = distributed.world(), out / "last"
    if here.leads:
        settle(last)
    distributed.barrier(here)
    return read_progress(last).history if (last / "progress.json").is_file() else []


def describe_fold(result: FitResult, folder: Path) -> Path:
    """A fold's table of genes and its leak report, as files for people."""
    folder.mkdir(exist_ok=True)
    validation.gene_table(result.folder).to_csv(folder / "genes.csv", index=False)
    report = read_facts(result.folder)["leak_report"]
    (folder / "leak_report.json").write_text(json.dumps(report, indent=1))
    return folder


def worker_device() -> torch.device:
    """The device that Ray Train gave this worker, or the first there is."""
    if distributed.world().size > 1:
        return ray.train.torch.get_device()
    return pick_device()


class Standing:
    """How far a trial is, and what it has cost: seconds of all its workers, over all its starts."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.scores: list[float] = []
        self.sections: dict[str, float] = {}
        self._file = folder / "cost.json"
        self._before = json.loads(self._file.read_text()) if self._file.is_file() else 0.0
        self._began = time.monotonic()

    def spend(self) -> float:
        """Seconds that the trial's slot has been taken so far, kept on disk."""
        seconds: float = self._before + time.monotonic() - self._began
        if distributed.world().leads:
            keep(self._file, seconds)
        return seconds * self.workers

    def finish(self, result: FitResult) -> None:
        """A fold is finished."""
        self.scores.append(result.score)
        table = pd.read_parquet(result.folder / "validation.parquet")
        for section, part in table.groupby("section", sort=False):
            pcc = part["pcc"].fillna(0)  # a prediction that is constant knows nothing
            self.sections[str(section)] = float(pcc.median())

    def note(self, done: float | None = None, score: float | None = None) -> dict[str, Any]:
        """What is reported: the mean score of the folds so far, and within a fold this one's too.

        Args:
            done: folds done with the fraction of the one in training; by default whole folds.
            score: of the fold in training.
        """
        so_far = self.scores if score is None else [*self.scores, score]
        return {
            "score": float(np.mean(so_far)) if so_far else float("nan"),
            "folds_done": len(self.scores),
            "progress": float(len(self.scores)) if done is None else done,
            "cost_seconds": self.spend(),
            "scores": list(self.scores),
            "sections": dict(self.sections),
        }


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the trial's folder: a process that Ray has lost sight of may still be training there.

    Raises:
        TimeoutError: it is held for longer than LOCK_SECONDS.
    """
    if not distributed.world().leads:
        yield
        return
    deadline = time.monotonic() + LOCK_SECONDS
    with (folder / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{folder}: another process still trains here after {LOCK_SECONDS:g} s"
                    ) from error
                time.sleep(0.2)
            else:
                break
        yield


def begin_attempt(folder: Path, session: str) -> str:
    """Count a start at this place; where there were too many, the reason to give the trial up.

    A machine that dies costs a start at ever new places. Something that kills the process in the
    same epoch each time, memory above all, would otherwise be tried for ever.
    """
    if not distributed.world().leads:
        return ""
    file = folder / "attempts.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    place = [session, places(folder)]
    count = before["count"] + 1 if before.get("place") == place else 1
    error = before.get("error", "") if count > 1 else ""
    keep(file, {"place": place, "count": count, "error": error})
    if count <= ATTEMPTS:
        return ""
    died = error or "its process was killed, as happens when memory runs out"
    return f"tried {ATTEMPTS} times at the same place without getting on: {died}"


def got_nowhere(folder: Path) -> bool:
    """Whether the trial is where its last attempt began."""
    file = folder / "attempts.json"
    begun: list[list[Any]] = json.loads(file.read_text())["place"][1] if file.is_file() else []
    return begun == places(folder)


def places(folder: Path) -> list[list[Any]]:
    """How far each fold is on disk: name, epoch, step; of those of which something is."""
    found = (_saved(out) for out in sorted(folder.glob("fold_*")))
    return [list(place) for place in found if place is not None]


def note_error(folder: Path, error: Exception) -> None:
    """Keep what ended an attempt, for the reason that is given if it was the last."""
    file = folder / "attempts.json"
    if distributed.world().leads and file.is_file():
        text = f"{type(error).__name__}: {error}"[-2000:]
        keep(file, {**json.loads(file.read_text()), "error": text})


def keep(file: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(value))
    scratch.rename(file)


def _saved(out: Path) -> tuple[str, int, int] | None:
    for name in ("position", "last"):
        if (out / name / "progress.json").is_file():
            progress = read_progress(out / name)
            return out.name, progress.epoch, progress.step
    return None


def drop_models(folder: Path) -> None:
    """Remove what a trial that was stopped could only waste: its weights. Its numbers stay."""
    for out in folder.glob("fold_*"):
        for file in out.rglob("*.safetensors"):
            file.unlink()
        shutil.rmtree(out / "position", ignore_errors=True)
