"""What stays the same over a run (Task), and what changes with every step and epoch (Run)."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from brstnet.config import Settings, Training
from brstnet.data.store import Store
from brstnet.training import checkpoint, distributed
from brstnet.training.batches import Plan, Spots, Units, epoch_plan, load_spots
from brstnet.training.features import load_features
from brstnet.training.fitted import Fitted, drawn_rows, fit_statistics
from brstnet.training.folds import ALL, Fold, choose_fold
from brstnet.training.leaks import leak_gate
from brstnet.training.model import (
    BrSTNet,
    Seen,
    architecture,
    build_backbone,
    choose_precision,
    colours,
    fit_to,
    with_heads,
)
from brstnet.training.optim import Rate
from brstnet.training.step import Learn


@dataclass(frozen=True, kw_only=True)
class Task:
    """What stays the same over all epochs of one fold of one configuration.

    `backbone` is frozen and not in the model that trains, or None; `validation` is None where
    nobody validates.
    """

    settings: Settings
    fold: Fold
    fitted: Fitted
    units: Units
    train: Spots
    validation: Spots | None
    patients: tuple[str, ...]
    device: torch.device
    precision: torch.dtype
    here: distributed.World
    backbone: nn.Module | None
    facts: dict[str, Any]

    @property
    def training(self) -> Training:
        """How to train."""
        return self.settings.training

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.train.rows) // self.training.batch_size)

    def plan(self, epoch: int) -> Plan:
        """What this worker draws in an epoch."""
        asked, here, rows = self.training, self.here, self.train.rows
        how = asked.batch_size, asked.seed, epoch, here.rank, here.size, asked.augmentation
        return epoch_plan(rows, *how)


@dataclass(kw_only=True)
class Progress:
    """Where a run is; saved with every checkpoint that training can go on from.

    `epoch` is the last whole one; `step` steps of the next are done, whose losses sum to
    `loss_sum`, in `part_seconds`.
    """

    epoch: int = -1
    step: int = 0
    loss_sum: float = 0.0
    part_seconds: float = 0.0
    best_score: float = -math.inf
    best_epoch: int = -1
    best_loss: float = math.inf
    epochs_without_gain: int = 0
    seconds: float = 0.0
    schedule: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(kw_only=True)
class Run:
    """One fold in training.

    `model` is what learns, `network` the same as one of several workers, `learn` takes a step.
    """

    task: Task
    out: Path
    model: BrSTNet
    network: nn.Module
    optimizer: Optimizer
    rate: Rate
    average: ModelEmaV3 | None
    learn: Learn
    engine: str
    micro_batch: int
    progress: Progress
    saver: checkpoint.Saver

    @property
    def judged(self) -> BrSTNet:
        """The model that is validated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.module


def prepare_task(
    store: Store, settings: Settings, number: int, device: torch.device
) -> tuple[Task, BrSTNet]:
    """Fit the fold's statistics, pass the leak gate, bring the spots to the device, make the model.

    Raises:
        ValueError: the fold is empty, the batch does not divide over the workers, there is a leak,
            or the settings need a validation where there is none.
    """
    _check(store, settings.training, distributed.world())
    if number == ALL:
        _check_unvalidated(settings.training)
    fold = choose_fold(store, settings.protocol, number)
    with store.read_once():
        task, model = _assemble(store, settings, fold, device)
    return freeze(task, model, store) if settings.training.frozen else (task, model)


def _assemble(
    store: Store, settings: Settings, fold: Fold, device: torch.device
) -> tuple[Task, BrSTNet]:
    training, here = settings.training, distributed.world()
    fitted = fit_statistics(store, fold, settings)
    report = leak_gate(store, fold, fitted, settings.protocol)
    torch.manual_seed(training.seed)
    side_px = training.input_px or store.input_px
    backbone = build_backbone(training, side_px)
    if training.image_statistics == "weights":
        mean, std = colours(backbone)
        fitted = replace(fitted, image_mean=mean, image_std=std)
    precision = choose_precision(training, device)
    allowed = drawn_rows(store, fold, settings)
    model = with_heads(backbone, training, fitted).to(device)
    fit_to(model, device, precision)
    train = load_spots(store, fold.train, fitted, device, side_px, rows=allowed)
    validation = None
    if fold.validation:
        validation = load_spots(store, fold.validation, fitted, device, side_px)
    units = Units.of(fitted, training, device)
    if training.target_rank is not None:
        units = units.of_rank(training.target_rank, fitted.main_genes, train)
    task = Task(
        settings=settings,
        fold=fold,
        fitted=fitted,
        units=units,
        train=train,
        validation=validation,
        patients=tuple(store.sections[name]["patient"] for name in fold.validation),
        device=device,
        precision=precision,
        here=here,
        backbone=None,
        facts={
            **checkpoint.describe(settings, fold, fitted, store, report),
            "architecture": architecture(backbone),
            "machine": checkpoint.machine(device, precision, here.size),
        },
    )
    return task, model


def _check(store: Store, training: Training, here: distributed.World) -> None:
    if (training.input_px or 0) > store.input_px:
        raise ValueError(
            f"training.input_px ({training.input_px}) is above the store's patches "
            f"({store.input_px} px), which hold no more detail: prepare the store with a larger one"
        )
    if training.batch_size % here.size:
        raise ValueError(
            f"training.batch_size ({training.batch_size}) is the batch of all workers "
            f"together and must be a multiple of their number ({here.size})"
        )


def _check_unvalidated(training: Training) -> None:
    """Refuse what looks at a validation loss, rather than let it look at another loss unasked."""
    if training.stopping == "early" or training.schedule == "plateau":
        raise ValueError(
            "on all folds nobody validates, so that there is no validation loss to stop or to "
            "lower the learning rate by: training.stopping must be fixed and training.schedule "
            f"cosine or none, got {training.stopping} and {training.schedule}"
        )


def freeze(task: Task, model: BrSTNet, store: Store) -> tuple[Task, BrSTNet]:
    """Let the backbone see every patch once; from then on its features alone are trained on."""
    side_px = task.training.input_px or store.input_px
    backbone, fold = model.backbone.eval().requires_grad_(False), task.fold  # noqa: FBT003
    seen = {
        name: load_features(store, sections, backbone, task.units, task.precision, side_px)
        for name, sections in (("train", fold.train), ("validation", fold.validation))
        if sections
    }
    spots = {
        name: replace(
            getattr(task, name),
            resident=None,
            features_VNF=torch.from_numpy(features).to(task.device),
        )
        for name, features in seen.items()
    }
    features: int = backbone.num_features  # type: ignore[assignment]
    model.backbone = Seen(features)
    return replace(task, backbone=backbone.cpu(), **spots), model
