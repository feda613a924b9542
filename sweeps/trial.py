"""One trial: one configuration, all folds one after the other, the same order in every trial."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray import tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from brstnet.config import Settings, to_yaml
from brstnet.data.store import Store
from brstnet.evaluation import plots, validation
from brstnet.launch import pick_device
from brstnet.training import distributed
from brstnet.training.checkpoint import read_facts
from brstnet.training.keep import FitResult
from brstnet.training.train import fit
from sweeps.space import NUMBER, Sweep
from sweeps.tracking import TrialTracker

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all trials of a sweep share: where things are, and how they are tracked."""

    sweep: Sweep
    store: Path
    out: Path
    tracking_uri: str
    experiment_id: str
    sweep_run: str
    gpus_per_worker: float

    def folder(self, number: int) -> Path:
        """Where a trial keeps its folds and run ids; the same after a restart."""
        return self.out / "trials" / f"{number:04d}"


def run_trial(config: Mapping[str, Any], job: Job) -> None:
    """What Tune calls: train in this actor, or lead a worker group that does."""
    point = {name: value for name, value in config.items() if name != NUMBER}
    if job.sweep.workers_per_trial == 1:
        train_folds(config[NUMBER], point, job, tune.report)
    else:
        train_in_workers(config[NUMBER], point, job)


def train_in_workers(number: int, point: dict[str, Any], job: Job) -> None:
    """Train the trial in a Ray Train worker group, which reports through this actor to Tune."""
    sweep = job.sweep
    resources = {"CPU": sweep.cpus_per_worker, "GPU": job.gpus_per_worker}
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"number": number, "point": point, "job": job},
        torch_config=TorchConfig(backend="nccl" if job.gpus_per_worker >= 1 else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=sweep.workers_per_trial,
            use_gpu=job.gpus_per_worker > 0,
            resources_per_worker={k: v for k, v in resources.items() if v},
        ),
        run_config=ray.train.RunConfig(
            name=job.folder(number).name,
            storage_path=str(job.out / "train"),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()


def worker_loop(loop_config: dict[str, Any]) -> None:
    """What each worker of a group runs."""
    train_folds(**loop_config, report=ray.train.report)


def train_folds(number: int, point: dict[str, Any], job: Job, report: Report) -> None:
    """Train all folds in order and report the running mean of their scores after each.

    What is finished on disk is not repeated. Settings that cannot be trained end the trial as
    failed, with the reason; they do not end the sweep, and are not tried again.
    """
    folder = job.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(job.sweep.cpus_per_worker)
    scores: list[float] = []
    seconds = 0.0
    try:
        settings = job.sweep.settings(point)
        (folder / "settings.yaml").write_text(to_yaml(settings))
        store = Store(job.store)
        tracker = start_tracker(job, number, settings, store)
        for fold in range(settings.protocol.folds):
            result = train_fold(store, settings, fold, folder, tracker)
            scores.append(result.score)
            seconds += result.seconds
            note = running(scores, seconds * job.sweep.workers_per_trial)
            if tracker is not None:
                tracker.running(note)
            report(note)
    except (ValueError, FloatingPointError, FileNotFoundError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            if distributed.world().size > 1:
                raise  # the others wait in a collective: the whole group must end
            torch.cuda.empty_cache()  # the actor goes on with other trials
        note = running([*scores, float("nan")], seconds)
        report({**note, "folds_done": job.sweep.protocol.folds, "reason": str(error)})


def start_tracker(job: Job, number: int, settings: Settings, store: Store) -> TrialTracker | None:
    """The trial's runs in MLflow, kept by the leading worker alone."""
    if not distributed.world().leads:
        return None
    tracker = TrialTracker(
        job.tracking_uri, job.experiment_id, job.sweep.name, job.sweep_run, job.folder(number)
    )
    tracker.trial(number, settings.training, store, settings.protocol)
    return tracker


def train_fold(
    store: Store, settings: Settings, fold: int, folder: Path, tracker: TrialTracker | None
) -> FitResult:
    """Train one fold and log it; a fold that was finished before is neither repeated nor logged."""
    out = folder / f"fold_{fold}"
    logged = out / "logged"
    if tracker is not None and not logged.exists():
        tracker.fold(fold)

    def on_epoch(note: Mapping[str, float]) -> None:
        if tracker is not None:
            tracker.epoch(fold, note)

    result = fit(store, settings, fold, out, device=worker_device(), on_epoch=on_epoch)
    if tracker is not None and not logged.exists():
        with tempfile.TemporaryDirectory() as scratch:
            files = Path(scratch)
            validation.gene_table(result.folder).to_csv(files / "genes.csv", index=False)
            plots.save(validation.gene_map(result.folder, store), files / "gene_map.png")
            report = read_facts(result.folder)["leak_report"]
            (files / "leak_report.json").write_text(json.dumps(report, indent=1))
            tracker.end_fold(fold, result.score, files)
        # A finished fold is never gone on from: its momentum would be a third of a sweep's disk.
        (out / "last" / "optimizer.safetensors").unlink(missing_ok=True)
        logged.touch()
    return result


def worker_device() -> torch.device:
    """The device that Ray Train gave this worker, or the first there is."""
    if distributed.world().size > 1:
        return ray.train.torch.get_device()
    return pick_device()


def running(scores: list[float], seconds: float) -> dict[str, Any]:
    """What a trial reports: the mean score of its folds so far, its own counter, and its cost."""
    by_fold = {f"score_fold_{number}": score for number, score in enumerate(scores)}
    return {
        "score": float(np.mean(scores)),
        "folds_done": len(scores),
        "cost_seconds": seconds,
        **by_fold,
    }
