"""What training costs, measured before a sweep is launched: a few steps of each kind of trial."""

import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from brstnet.config import Settings
from brstnet.data.mirror import open_store
from brstnet.data.store import Store
from brstnet.launch import pick_device
from brstnet.training.epoch import EVAL_BATCH, train_epoch, validate
from brstnet.training.task import Run, prepare_task
from brstnet.training.train import start
from sweeps.nodes import NODE_ID, BrokenNodeError, check_gpu, room_elsewhere
from sweeps.space import Sweep, choices, drawing_order, first_points, is_drawn

COSTLY = ("backbone", "store", "input_px", "frozen", "batch_size")
"""What makes a trial's epoch take longer; the first is always told apart, the others while few."""

KINDS = 24
"""At most so many kinds of trial are measured."""

STEPS = 4
"""Steps that are timed, after one that is not."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one kind of trial costs one worker."""

    point: dict[str, Any]
    setup_seconds: float = 0.0
    step_seconds: float = 0.0
    validation_seconds: float = 0.0
    steps: int = 0
    epochs: int = 0
    patches_per_second: float = 0.0
    model_mb: float = 0.0
    error: str = ""

    def fold_seconds(self) -> float:
        """Seconds that a fold of all epochs takes."""
        each = self.steps * self.step_seconds + self.validation_seconds
        return self.setup_seconds + self.epochs * each


class Enough(Exception):
    """Enough steps were timed."""


def kinds(sweep: Sweep) -> list[dict[str, Any]]:
    """The points of the space whose cost differs: every backbone, and as many more as are few."""
    lists = {name: choices(sweep.space[name]) for name in COSTLY if name in sweep.space}
    told_apart: dict[str, list[Any]] = {}
    for name, values in lists.items():
        if values and len(values) * _product(told_apart) <= (KINDS if told_apart else len(values)):
            told_apart[name] = values
    points = [
        dict(zip(told_apart, p, strict=True)) for p in itertools.product(*told_apart.values())
    ]
    if "store" in sweep.space and "store" not in told_apart:
        points = [{**point, "store": lists["store"][0]} for point in points]  # type: ignore[index]
    return points


def _product(lists: dict[str, list[Any]]) -> int:
    return int(np.prod([len(values) for values in lists.values()]))


def typical(sweep: Sweep) -> dict[str, Any]:
    """A point that the space reaches: the paper's values, and the first choice of what it lacks."""
    point = dict(first_points(sweep)[0])
    for name in drawing_order(sweep.space):
        if name not in point and is_drawn(name, sweep.space, point):
            listed, values = choices(sweep.space[name]), sweep.space[name]
            point[name] = listed[0] if listed is not None else values["low"]
    return point


def probe(
    sweep: Sweep, stores: dict[str, str], gpus_per_worker: float, points: Sequence[dict[str, Any]]
) -> list[Speed]:
    """Measure kinds of trials on the cluster's workers, as many at once as fit.

    A kind that cannot be trained on one machine is tried on another, if there is one: that one may
    be broken.
    """
    bundle = {"CPU": float(sweep.cpus_per_worker), "GPU": gpus_per_worker}
    task = ray.remote(num_cpus=sweep.cpus_per_worker, num_gpus=gpus_per_worker, max_retries=1)(
        _probe_here
    )
    asked = [(sweep, stores[p.get("store", "")], p, gpus_per_worker) for p in points]
    found = ray.get([task.remote(*words) for words in asked])
    again = {
        i: task.options(label_selector={NODE_ID: f"!in({node})"}).remote(*asked[i])
        for i, (speed, node) in enumerate(found)
        if speed.error and room_elsewhere({k: v for k, v in bundle.items() if v}, {node})
    }
    return [ray.get(again[i])[0] if i in again else speed for i, (speed, _) in enumerate(found)]


def _probe_here(*words: Any) -> tuple[Speed, str]:
    """What `_probe` measures, and the id of the node."""
    return _probe(*words), ray.get_runtime_context().get_node_id()


def _probe(sweep: Sweep, store: str, point: dict[str, Any], gpus: float = 0.0) -> Speed:
    torch.set_num_threads(sweep.cpus_per_worker)
    try:
        check_gpu(gpus)
        settings = sweep.settings({**typical(sweep), **point})
        share = max(2, settings.training.batch_size // sweep.workers_per_trial)
        training = replace(settings.training, batch_size=share)
        speed = measure(open_store(store), replace(settings, training=training), point)
        # A step takes a share of every worker, and each validates its part.
        return replace(
            speed,
            steps=math.ceil(speed.steps * share / settings.training.batch_size),
            validation_seconds=speed.validation_seconds / sweep.workers_per_trial,
        )
    except (ValueError, OSError, BrokenNodeError, torch.OutOfMemoryError) as error:
        return Speed(point=point, error=str(error))


def measure(store: Store, settings: Settings, point: dict[str, Any]) -> Speed:
    """Set up the first fold, take a few steps, validate one batch; nothing is kept."""
    device, began = pick_device(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        task, model = prepare_task(store, settings, 0, device)
        run = start(task, model, Path(scratch) / "run")
        setup = time.perf_counter() - began
        step = _seconds_a_step(run)
    assert task.validation is not None
    rows = task.validation.rows[:EVAL_BATCH]
    views = None if settings.training.stopping == "early" else 1  # but in the last epoch
    began = time.perf_counter()
    validate(replace(task, validation=replace(task.validation, rows=rows)), run.judged, views)
    validation = (time.perf_counter() - began) * len(task.validation.rows) / len(rows)
    size = sum(t.numel() * t.element_size() for t in run.judged.state_dict().values())
    return Speed(
        point=point,
        setup_seconds=setup,
        step_seconds=step,
        validation_seconds=validation,
        steps=task.steps,
        epochs=settings.training.epochs,
        patches_per_second=settings.training.batch_size / step,
        model_mb=size / 1e6,
    )


def _seconds_a_step(run: Run) -> float:
    """Median over steps of a real epoch; reading the sum of losses waits for the GPU."""
    times: list[float] = []

    def after_step(step: int, total: Tensor) -> None:
        float(total)
        times.append(time.perf_counter())
        if len(times) > STEPS:
            raise Enough

    began = time.perf_counter()
    try:
        train_epoch(run, after_step)
    except Enough:
        return float(np.median(np.diff(times)))
    return (time.perf_counter() - began) / len(times)  # an epoch of very few steps
