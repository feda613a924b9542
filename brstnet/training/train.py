"""Fit: from a store and a fold to a trained model, whatever stops it on the way."""

import dataclasses
import gc
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from brstnet import metrics
from brstnet.config import Settings, Training, plain
from brstnet.data.store import Store
from brstnet.training import checkpoint, distributed
from brstnet.training.epoch import train_epoch, validate
from brstnet.training.keep import (
    FitResult,
    check_same,
    conclude,
    finished,
    halve,
    micro_batch,
    resume,
    save,
    save_position,
)
from brstnet.training.model import BrSTNet
from brstnet.training.optim import Rate, make_average, make_optimizer
from brstnet.training.step import choose_engine, compiled, eager, recorded
from brstnet.training.task import Progress, Run, Task, prepare_task

SAVE_SECONDS = 300.0
"""Within an epoch the position is saved this often: what a lost machine costs at most."""

LEAVING = "BRSTNET_LEAVING"
"""Variable with the path of a file: while it is there, this machine is about to go."""

LEAVING_SECONDS = 5.0
"""The position is then saved this often, until the end."""

OnEpoch = Callable[[Mapping[str, float]], None]
OnStep = Callable[[int], None]


def fit(
    store: Store,
    settings: Settings,
    fold: int,
    out: Path,
    *,
    device: torch.device,
    on_epoch: OnEpoch,
    on_step: OnStep | None = None,
) -> FitResult:
    """Train one fold of one configuration; what `out` holds of an earlier try is gone on from.

    With early stopping the fold is represented by the epoch with the best score on its validation
    sections; with a fixed number of epochs by the last, and nothing is chosen on the validation.

    A batch that does not fit the device's memory is taken in halves: training goes on from where it
    was last saved, and later runs in `out` begin with what did fit.

    Args:
        store: the open store.
        settings: protocol and training.
        fold: number of the fold; `folds.ALL` trains on all of them, with no validation: the score
            and the validation loss are NaN, and the last epoch stands for it.
        out: folder for `best/`, `last/`, `position/` (within an epoch) and `result.json`.
        device: where to train.
        on_epoch: called by every worker after each epoch with its numbers, equal in all but the
            times; it stops the training by raising, and the epoch is on disk when `fit` is left.
        on_step: called by every worker after each step with the patches seen so far in all epochs;
            where it raises, the position is saved, and the same call goes on at the next step.

    Raises:
        ValueError: settings and store do not fit, there is a leak, or `out` is another run's.
        FloatingPointError: the loss is not finite.
        torch.OutOfMemoryError: not even one patch fits, or one of several workers ran out: then a
            new try takes smaller parts.
    """
    if (done := finished(out)) is not None:
        facts = checkpoint.read_facts(done.folder)
        made = (facts["settings"], facts["fold"]["number"], facts["store"]["digest"])
        check_same(done.folder, made, (plain(settings), fold, store.digest))
        return done
    while True:
        taken = micro_batch(out, settings.training, distributed.world())
        try:
            # Nothing of the run has a name here: where memory runs out all of it must go.
            return _to_the_end(
                start(*prepare_task(store, settings, fold, device), out), on_epoch, on_step
            )
        except (RuntimeError, MemoryError) as error:
            if not _ran_out(error):
                raise
            halve(out, taken, settings.training.batch_size, error)
        gc.collect()  # what the failed step held, its traceback included
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _to_the_end(run: Run, on_epoch: OnEpoch, on_step: OnStep | None) -> FitResult:
    """Epoch after epoch until the stopping rule says so; what was begun to be saved is on disk."""
    try:
        while not ended(run.progress, run.task.training):
            run_epoch(run, on_step)
            on_epoch(run.progress.history[-1])
    finally:
        run.saver.wait()
    return conclude(run)


def _ran_out(error: RuntimeError | MemoryError) -> bool:
    """Whether memory ran out; on the CPU torch says so in words alone."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)


def start(task: Task, model: BrSTNet, out: Path) -> Run:
    """A run at its beginning, or where its last checkpoint left it."""
    training, here, device = task.training, task.here, task.device
    if training.sync_batchnorm:
        distributed.synchronise(model, here, device)
    optimizer = make_optimizer(model, training)
    micro, engine = micro_batch(out, training, here), choose_engine(training, device, here.size)
    network = distributed.wrap(model, here, device)
    if engine == "compile":
        network = compiled(network, device)
    run = Run(
        task=task,
        out=out,
        model=model,
        network=network,
        optimizer=optimizer,
        rate=Rate(training, task.steps),
        average=make_average(model, training),
        learn=eager(network, optimizer, task.units, training, task.precision, micro),
        engine=engine,
        micro_batch=micro,
        progress=Progress(),
        saver=checkpoint.Saver(),
    )
    resume(run)
    if engine == "graph":
        record(run)
    return run


def record(run: Run) -> None:
    """Let the run's steps be one CUDA graph, if that gives what eager steps give."""
    task = run.task
    (batch,) = task.train.feed(task.plan(0).part(0, 1))
    run.network.train()
    run.rate.set(run.optimizer, 1 + int(run.rate.warmup_steps))
    must = task.training.engine == "graph"
    run.learn, run.engine = recorded(run.learn, run.model, run.optimizer, batch, must=must)


def run_epoch(run: Run, on_step: OnStep | None = None) -> None:
    """Train, validate, note the outcome, save.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    task, progress = run.task, run.progress
    began, epoch, steps = time.monotonic(), progress.epoch + 1, task.steps - progress.step
    rate = run.rate.now
    train_loss, clock = train_epoch(run, _after_step(run, on_step))
    if not math.isfinite(train_loss):
        raise FloatingPointError(
            f"the training loss of {task.fold.name} is {train_loss} in epoch {epoch}: lower "
            f"training.learning_rate ({task.training.learning_rate}) or training.aux_weight "
            f"({task.training.aux_weight})"
        )
    trained, in_steps = clock.read()
    distributed.share_buffers(run.judged, task.here)
    counts = task.training.stopping == "early" or epoch + 1 == task.training.epochs
    loss, sections = validate(task, run.judged, None if counts else 1)
    score = metrics.fold_score(sections, task.patients) if sections else math.nan
    run.rate.after_epoch(loss)
    note = {"train_loss": train_loss, "validation_loss": loss, "score": score}
    note |= {
        "learning_rate": rate,
        "patches_per_second": steps * task.training.batch_size / trained,
        "step_share": in_steps / trained,
        "memory_gb": peak_memory_gb(task.device),
        "micro_batch": float(run.micro_batch),
    }
    seconds = progress.part_seconds + time.monotonic() - began
    note_epoch(progress, {"epoch": epoch, **note}, seconds, run.rate)
    left = task.training.epochs - progress.epoch - 1
    progress.history[-1]["seconds_left"] = left * seconds
    if task.here.leads:
        save(run, sections)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on the device, or on the CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _after_step(run: Run, on_step: OnStep | None) -> Callable[[int, Tensor], None]:
    """What is done between steps: save the position when it is due, or when training is stopped."""
    task, progress = run.task, run.progress
    began = saved = looked = time.monotonic()
    every, machine = SAVE_SECONDS, Path(os.environ.get(LEAVING, "/tmp/brstnet-leaving"))
    told = run.out / "leaving"  # by a worker whose machine goes, to the one that saves
    before, size = progress.part_seconds, task.training.batch_size
    spots = len(task.train.rows)

    def save_here(step: int, total: Tensor) -> None:
        if task.here.leads:
            seconds = before + time.monotonic() - began
            here = dataclasses.replace(
                progress, step=step, loss_sum=float(total), part_seconds=seconds
            )
            save_position(run, here)

    def after_step(step: int, total: Tensor) -> None:
        nonlocal saved, looked, every
        now = time.monotonic()
        if now - looked >= 1:
            looked = now
            if machine.exists() and not told.exists():
                told.parent.mkdir(parents=True, exist_ok=True)
                told.touch()
            if told.exists():
                every = min(SAVE_SECONDS, LEAVING_SECONDS)
        if step < task.steps and now - saved >= every:
            save_here(step, total)
            saved = time.monotonic()
        if on_step is None:
            return
        try:
            on_step((progress.epoch + 1) * spots + min(step * size, spots))
        except BaseException:
            save_here(step, total)
            raise

    return after_step


def note_epoch(progress: Progress, note: dict[str, float], seconds: float, rate: Rate) -> None:
    """Take an epoch's numbers into the run's progress."""
    progress.epoch = int(note["epoch"])
    progress.step, progress.loss_sum, progress.part_seconds = 0, 0.0, 0.0
    progress.seconds += seconds
    progress.history.append({**note, "seconds": seconds})
    progress.schedule = rate.state()
    if note["score"] > progress.best_score or progress.best_epoch < 0:
        progress.best_score = note["score"] if math.isfinite(note["score"]) else -math.inf
        progress.best_epoch = progress.epoch
    if note["validation_loss"] < progress.best_loss:
        progress.best_loss, progress.epochs_without_gain = note["validation_loss"], 0
    else:
        progress.epochs_without_gain += 1


def ended(progress: Progress, training: Training) -> bool:
    """Whether the stopping rule says that this was the last epoch."""
    if progress.epoch + 1 >= training.epochs:
        return True
    return training.stopping == "early" and progress.epochs_without_gain >= training.patience
