"""Step, epoch, fit: from a store and a fold to a trained model.

Shape letters: B batch, C channels, H and W pixels, G genes.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from brstnet import metrics
from brstnet.config import Settings, Training, plain
from brstnet.data.store import Store
from brstnet.training import checkpoint, distributed
from brstnet.training.batches import Spots, epoch_plan, load_spots, rng, to_input, turn
from brstnet.training.fitted import Fitted, fit_statistics, training_rows
from brstnet.training.folds import Fold, make_folds, pick_fold
from brstnet.training.leaks import leak_gate
from brstnet.training.model import BrSTNet, build_model, choose_precision

EVAL_BATCH = 64
"""Patches a forward pass takes when nothing is learned."""

ORIGIN = ("settings", "fold", "store")
"""What a run must share with a checkpoint to go on from it."""

Schedule = ReduceLROnPlateau | CosineAnnealingLR
OnEpoch = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What stays the same over all epochs of one fold of one configuration."""

    settings: Settings
    fold: Fold
    fitted: Fitted
    train: Spots
    validation: Spots
    patients: tuple[str, ...]
    device: torch.device
    precision: torch.dtype
    here: distributed.World
    facts: dict[str, Any]

    @property
    def training(self) -> Training:
        """How to train."""
        return self.settings.training


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fold came to: the checkpoint that stands for it, and its score on the validation."""

    folder: Path
    score: float
    epoch: int
    epochs: int
    seconds: float


@dataclass(kw_only=True)
class Progress:
    """Where a run is; saved with every checkpoint that training can go on from."""

    epoch: int = -1
    best_score: float = -math.inf
    best_epoch: int = -1
    best_loss: float = math.inf
    epochs_without_gain: int = 0
    seconds: float = 0.0
    schedule: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(kw_only=True)
class Run:
    """One fold in training: what changes from epoch to epoch."""

    task: Task
    out: Path
    model: BrSTNet
    network: nn.Module
    optimizer: torch.optim.SGD
    schedule: Schedule | None
    progress: Progress


def loss_parts(model: nn.Module, x_BCHW: Tensor, y_BG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass: mean squared error of main and auxiliary genes, and all predictions (B, G).

    The paper calls its loss cross-entropy, which is undefined for real-valued targets; the authors'
    code uses the mean squared error.
    """
    main, aux = model(x_BCHW)
    split = main.shape[1]
    main_loss = F.mse_loss(main.float(), y_BG[:, :split])
    if aux is None:
        return main_loss, torch.zeros_like(main_loss), main
    return main_loss, F.mse_loss(aux.float(), y_BG[:, split:]), torch.cat([main, aux], dim=1)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_BCHW: Tensor,
    y_BG: Tensor,
    aux_weight: float,
    precision: torch.dtype,
) -> Tensor:
    """Forward, loss = main + aux_weight * auxiliary (paper, Methods), backward, update."""
    with torch.autocast(x_BCHW.device.type, precision, enabled=precision != torch.float32):
        main_loss, aux_loss, _ = loss_parts(model, x_BCHW, y_BG)
        loss = main_loss + aux_weight * aux_loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
) -> float:
    """One pass over the training spots; the mean loss. Nothing waits for the device inside."""
    model.train()
    spots, seed, here = task.train, task.training.seed, task.here
    plan = epoch_plan(spots.rows, task.training.batch_size, seed, epoch, here.rank, here.size)
    rows_SB, symmetry_SB = (torch.from_numpy(part).to(task.device) for part in plan)
    total = torch.zeros((), device=task.device)
    for step, (rows_B, symmetry_B) in enumerate(zip(rows_SB, symmetry_SB, strict=True)):
        torch.manual_seed(int(rng(seed, epoch, step, here.rank).integers(2**63)))  # dropout
        x_BHWC = turn(spots.patches(rows_B), symmetry_B)
        x_BCHW = to_input(x_BHWC, task.fitted, task.training.input_px)
        total += train_step(
            model, optimizer, x_BCHW, spots.y_NG[rows_B], task.training.aux_weight, task.precision
        )
    return float(distributed.total(total, here) / (len(rows_SB) * here.size))


@torch.inference_mode()
def validate(task: Task, model: nn.Module) -> tuple[float, list[metrics.Moments]]:
    """Loss on the validation spots, and the panel's moments per section, over all workers.

    Metrics stream: no prediction outlives its batch.
    """
    model.eval()
    spots, panel = task.validation, np.flatnonzero(task.fitted.genes["panel"])
    panel_G = torch.from_numpy(panel).to(task.device)
    zero_G = torch.zeros(len(panel), dtype=torch.float64, device=task.device)
    loss, sections = torch.zeros((), dtype=torch.float64, device=task.device), []
    for number in range(len(spots.maps)):
        part = metrics.Moments(0, zero_G, zero_G, zero_G, zero_G, zero_G)
        rows = spots.rows[spots.section_N[spots.rows] == number][task.here.rank :: task.here.size]
        for start in range(0, len(rows), EVAL_BATCH):  # a small section may have none for this rank
            rows_B = torch.from_numpy(rows[start : start + EVAL_BATCH]).to(task.device)
            x_BCHW = to_input(spots.patches(rows_B), task.fitted, task.training.input_px)
            with torch.autocast(
                task.device.type, task.precision, enabled=task.precision != torch.float32
            ):
                main, aux, pred_BG = loss_parts(model, x_BCHW, spots.y_NG[rows_B])
            loss += (main + task.training.aux_weight * aux) * len(rows_B)
            true_BG = spots.y_NG[rows_B][:, panel_G].double()
            part = metrics.merge(part, metrics.moments(pred_BG[:, panel_G].double(), true_BG))
        sections.append(distributed.merge_everywhere(part, task.here))
    mean_loss = float(distributed.total(loss, task.here)) / len(spots.rows)
    return mean_loss, [_on_host(m) for m in sections]


def _on_host(m: metrics.Moments) -> metrics.Moments:
    return metrics.Moments(m.n, *(v.cpu().numpy() for v in (m.mx, m.my, m.sxx, m.syy, m.sxy)))


def make_schedule(optimizer: torch.optim.Optimizer, training: Training) -> Schedule | None:
    """The learning rate's schedule, stepped once an epoch."""
    if training.schedule == "plateau":
        return ReduceLROnPlateau(
            optimizer,
            factor=training.plateau_factor,
            patience=training.plateau_patience,
            min_lr=training.min_learning_rate,
        )
    if training.schedule == "cosine":
        period = training.cosine_period or training.epochs
        return CosineAnnealingLR(optimizer, period, eta_min=training.min_learning_rate)
    return None


def prepare_task(store: Store, settings: Settings, number: int, device: torch.device) -> Task:
    """Fit the fold's statistics, pass the leak gate, bring the spots to the device.

    Raises:
        ValueError: the fold is empty, the batch does not divide over the workers, there is a leak.
    """
    here = distributed.world()
    if (settings.training.input_px or 0) > store.input_px:
        raise ValueError(
            f"training.input_px ({settings.training.input_px}) is above the store's patches "
            f"({store.input_px} px), which hold no more detail: prepare the store with a larger one"
        )
    if settings.training.batch_size % here.size:
        raise ValueError(
            f"training.batch_size ({settings.training.batch_size}) is the batch of all workers "
            f"together and must be a multiple of their number ({here.size})"
        )
    fold = pick_fold(make_folds(store, settings.protocol), number)
    fitted = fit_statistics(store, fold, settings)
    report = leak_gate(store, fold, fitted, settings.protocol)
    precision = choose_precision(settings.training, device)
    rows = training_rows(store.spots(fold.train), settings.protocol)
    aux_target = settings.training.aux_target
    return Task(
        settings=settings,
        fold=fold,
        fitted=fitted,
        train=load_spots(store, fold.train, fitted, device, aux_target=aux_target, rows=rows),
        validation=load_spots(store, fold.validation, fitted, device, aux_target=aux_target),
        patients=tuple(store.sections[name]["patient"] for name in fold.validation),
        device=device,
        precision=precision,
        here=here,
        facts={
            **checkpoint.describe(settings, fold, fitted, store, report),
            "machine": checkpoint.machine(device, precision, here.size),
        },
    )


def fit(
    store: Store,
    settings: Settings,
    fold: int,
    out: Path,
    *,
    device: torch.device,
    on_epoch: OnEpoch,
) -> FitResult:
    """Train one fold of one configuration; what `out` holds of an earlier try is gone on from.

    With early stopping the fold is represented by the epoch with the best score on its validation
    sections; with a fixed number of epochs by the last, and nothing is chosen on the validation.

    Args:
        store: the open store.
        settings: protocol and training.
        fold: number of the fold.
        out: folder for `best/`, `last/` and `result.json`.
        device: where to train.
        on_epoch: called by the leading worker after each epoch with its numbers; it stops the
            training by raising, and the epoch is on disk by then.

    Raises:
        ValueError: settings and store do not fit, there is a leak, or `out` is another run's.
        FloatingPointError: the loss is not finite.
    """
    if (done := finished(out)) is not None:
        facts = checkpoint.read_facts(done.folder)
        made = (facts["settings"], facts["fold"]["number"], facts["store"]["digest"])
        check_same(done.folder, made, (plain(settings), fold, store.digest))
        return done
    task = prepare_task(store, settings, fold, device)
    run = start(task, out, settings.training.input_px or store.input_px)
    while not ended(run.progress, settings.training):
        run_epoch(run)
        if task.here.leads:
            on_epoch(run.progress.history[-1])
    return conclude(run)


def start(task: Task, out: Path, input_px: int) -> Run:
    """A run at its beginning, or where its last checkpoint left it."""
    model = build_model(task.training, task.fitted, input_px).to(task.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=task.training.learning_rate,
        momentum=task.training.momentum,
        weight_decay=task.training.weight_decay,
        fused=task.device.type in ("cpu", "cuda"),  # measured: twice as fast as the plain update
    )
    run = Run(
        task=task,
        out=out,
        model=model,
        network=distributed.wrap(model, task.here, task.device),
        optimizer=optimizer,
        schedule=make_schedule(optimizer, task.training),
        progress=Progress(),
    )
    resume(run)
    return run


def resume(run: Run) -> None:
    """Go on from `last/`, if there is one.

    Raises:
        ValueError: it was made with other settings or from another store.
    """
    distributed.barrier(run.task.here)
    if run.task.here.leads:
        checkpoint.settle(run.out / "best")
        checkpoint.settle(run.out / "last")
    distributed.barrier(run.task.here)
    last = run.out / "last"
    if not last.exists():
        return
    facts, asked = checkpoint.read_facts(last), json.loads(json.dumps(run.task.facts))
    check_same(last, [facts[key] for key in ORIGIN], [asked[key] for key in ORIGIN])
    run.model.load_state_dict(safetensors.torch.load_file(last / "model.safetensors"))
    checkpoint.restore_optimizer(last, run.optimizer)
    run.progress = Progress(**json.loads((last / "progress.json").read_text()))
    if run.schedule is not None:
        run.schedule.load_state_dict(run.progress.schedule)
        run.optimizer.param_groups[0]["lr"] = run.progress.schedule["_last_lr"][0]


def check_same(folder: Path, made: Sequence[object], asked: Sequence[object]) -> None:
    """Refuse to take up what another run has left.

    Args:
        folder: the checkpoint that is there.
        made: settings, fold and store that it was made with.
        asked: those of this run.

    Raises:
        ValueError: one of them differs.
    """
    for key, then, now in zip(ORIGIN, made, asked, strict=True):
        if then != now:
            raise ValueError(
                f"{folder}: made with another {key}; choose another folder or remove it"
            )


def run_epoch(run: Run) -> None:
    """Train, validate, note the outcome, save.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    task, progress = run.task, run.progress
    began, epoch = time.monotonic(), progress.epoch + 1
    learning_rate = run.optimizer.param_groups[0]["lr"]
    train_loss = train_epoch(task, run.network, run.optimizer, epoch)
    if not math.isfinite(train_loss):
        raise FloatingPointError(
            f"the training loss of fold {task.fold.number} is {train_loss} in epoch {epoch}: lower "
            f"training.learning_rate ({task.training.learning_rate}) or training.aux_weight "
            f"({task.training.aux_weight})"
        )
    trained = time.monotonic() - began
    distributed.share_buffers(run.model, task.here)
    loss, sections = validate(task, run.model)
    score = metrics.fold_score(sections, task.patients)
    step_schedule(run, loss)
    note = {"train_loss": train_loss, "validation_loss": loss, "score": score}
    note |= {"learning_rate": learning_rate, "patches_per_second": len(task.train.rows) / trained}
    record(progress, {"epoch": epoch, **note}, time.monotonic() - began, run.schedule)
    if task.here.leads:
        save(run, sections)


def step_schedule(run: Run, validation_loss: float) -> None:
    """Move the learning rate on after an epoch."""
    if isinstance(run.schedule, ReduceLROnPlateau):
        run.schedule.step(validation_loss)
    elif run.schedule is not None:
        run.schedule.step()


def record(
    progress: Progress, note: dict[str, float], seconds: float, schedule: Schedule | None
) -> None:
    """Take an epoch's numbers into the run's progress."""
    progress.epoch = int(note["epoch"])
    progress.seconds += seconds
    progress.history.append({**note, "seconds": seconds})
    progress.schedule = {} if schedule is None else schedule.state_dict()
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


def save(run: Run, sections: list[metrics.Moments]) -> None:
    """Write `best/` if this epoch is the best, then `last/`, from which training can go on."""
    task, progress = run.task, run.progress
    facts = {**task.facts, "scores": progress.history[-1]}
    table = validation_table(task, sections)
    if progress.best_epoch == progress.epoch:
        checkpoint.save(run.out / "best", run.model, task.fitted.genes, facts, table)
    checkpoint.save(
        run.out / "last",
        run.model,
        task.fitted.genes,
        facts,
        table,
        optimizer=run.optimizer,
        progress=dataclasses.asdict(progress),
    )


def validation_table(task: Task, sections: list[metrics.Moments]) -> pd.DataFrame:
    """The panel's correlations: a row per gene and validation section."""
    panel = task.fitted.genes[task.fitted.genes["panel"]]
    parts = [
        pd.DataFrame(
            {
                "gene": panel.index,
                "symbol": panel["symbol"].to_numpy(),
                "section": section,
                "patient": patient,
                "pcc": metrics.correlation(moments),
                "n": int(moments.n),
            }
        )
        for section, patient, moments in zip(
            task.fold.validation, task.patients, sections, strict=True
        )
    ]
    return pd.concat(parts, ignore_index=True)


def conclude(run: Run) -> FitResult:
    """Say which checkpoint stands for the fold; from here on the fold is finished."""
    progress, training = run.progress, run.task.training
    early = training.stopping == "early"
    chosen = progress.best_epoch if early else progress.epoch
    values = {
        "checkpoint": "best" if early else "last",
        "score": progress.history[chosen]["score"],
        "epoch": chosen,
        "epochs": progress.epoch + 1,
        "seconds": progress.seconds,
    }
    if run.task.here.leads:
        scratch = run.out / "result.json.tmp"
        scratch.write_text(json.dumps(values))
        scratch.rename(run.out / "result.json")
    distributed.barrier(run.task.here)
    result = finished(run.out)
    assert result is not None
    return result


def finished(out: Path) -> FitResult | None:
    """The result of a fold that is finished, or None."""
    file = out / "result.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    return FitResult(folder=out / values.pop("checkpoint"), **values)
