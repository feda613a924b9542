"""A sweep on GPUs that are not there: the product's driver, leading trials that sleep.

    python -m benchmarks.fake_sweep FOLDER --trials 1000 --slots 64 --seconds 60

The study, the board, Tune, the scheduler, the spool and the courier are those of `sweeps/run.py`.
The same command goes on where a killed one stopped. `timings.jsonl` in the sweep's folder says what
the driver did when.
"""

import argparse
import json
import logging
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from benchmarks.fake_trial import FakeJob, run_fake
from brstnet.config import Protocol, Training
from sweeps import tracking
from sweeps.board import Board, open_study
from sweeps.events import Events
from sweeps.pruning import pruner_of
from sweeps.run import courier, train
from sweeps.space import Asked, Sweep

NAME = "fake"


def make_plan(trials: int, slots: int) -> Sweep:
    """The sweep: TPE over four settings, ASHA and the paired test."""
    return Sweep(
        name=NAME,
        protocol=Protocol(held_out=("BC90006",), folds=5),
        training=Training(epochs=8, stopping="fixed"),
        trials=trials,
        concurrent_trials=slots,
        grace_folds=0.25,
        reduction_factor=3,
        paired_p=0.1,
        space={
            "backbone": ["efficientnet_b0", "resnet18", "vit_b32"],
            "genes": [250, 500, 1000],
            "aux_weight": {"low": 0.1, "high": 100.0, "log": True},
            "learning_rate": {"low": 0.0003, "high": 0.3, "log": True},
        },
    )


@dataclass
class Timings:
    """When the driver did what, and how long it took: a JSON line each."""

    file: Path

    def note(self, what: str, seconds: float = 0.0, trial: str = "") -> None:
        """What has just ended."""
        line = {"what": what, "at": time.time(), "seconds": seconds, "trial": trial}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(kw_only=True)
class TimedBoard(Board):
    """A board that notes how long its answers take."""

    timings: Timings

    def next(self) -> Asked | str | None:
        """The next trial; only those that were drawn are noted."""
        began = time.perf_counter()
        asked = super().next()
        if isinstance(asked, Asked):
            self.timings.note("next", time.perf_counter() - began, asked.name)
        return asked

    def report(self, name: str, note: dict[str, Any]) -> str:
        """A trial reports."""
        began = time.perf_counter()
        reason = super().report(name, note)
        self.timings.note("report", time.perf_counter() - began, name)
        return reason

    def end(self, name: str, error: str = "") -> dict[str, Any]:
        """A trial has ended."""
        began = time.perf_counter()
        outcome = super().end(name, error)
        self.timings.note("end", time.perf_counter() - began, name)
        return outcome


def start_ray(slots: int) -> None:
    """As `sweeps/cluster.py` does, with GPUs that are but a number."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_gpus=slots,
        num_cpus=slots,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def drive(out: Path, trials: int, slots: int, seconds: float) -> None:
    """Begin the sweep, or go on."""
    plan, folder = make_plan(trials, slots), out / NAME
    folder.mkdir(parents=True, exist_ok=True)
    timings = Timings(folder / "timings.jsonl")
    timings.note("begin")
    if not (folder / tracking.ID_FILE).is_file():
        tracking.write_text(folder / tracking.ID_FILE, uuid.uuid4().hex)
    uri = tracking.local_uri(out)
    experiment_id = tracking.experiment(tracking.connect(uri), out, uri)
    timings.note("mlflow")
    study = open_study(plan, folder)
    board = TimedBoard(sweep=plan, study=study, out=folder, concurrent=slots, timings=timings)
    timings.note("board")
    rungs = pruner_of(plan).rungs
    job = FakeJob(
        out=folder,
        session=uuid.uuid4().hex,
        together=min(slots, plan.count - len(board.searched)),
        folds=plan.protocol.folds,
        epochs=plan.training.epochs,
        rungs=rungs,
        seconds=seconds,
    )
    with courier(folder, uri, experiment_id):
        events = Events(folder)
        tags = {"brstnet.sweep": NAME, "brstnet.store": "0" * 16}
        tags |= {"brstnet.protocol": "{}", "brstnet.protocol_line": plan.protocol.line()}
        events.start("sweep", NAME, "sweep", tags)
        events.status("sweep", "RUNNING")
        start_ray(slots)
        timings.note("ray")
        trainable = tune.with_parameters(run_fake, job=job)
        train(board, events, tune.with_resources(trainable, {"CPU": 1, "GPU": 1}))
        timings.note("trained")
        events.status("sweep", "FINISHED")
        ray.shutdown()
    timings.note("told")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a whole trial, on average")
    args = parser.parse_args()
    drive(args.out.resolve(), args.trials, args.slots, args.seconds)


if __name__ == "__main__":
    main()
