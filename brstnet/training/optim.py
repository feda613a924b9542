"""What moves the weights: optimiser, learning rate, moving average."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from brstnet.config import Training
from brstnet.training.model import BrSTNet

Schedule = ReduceLROnPlateau | CosineAnnealingLR


def make_optimizer(model: BrSTNet, training: Training) -> Optimizer:
    """SGD or AdamW over the model's parameters, backbone and heads at their own rates.

    The update is fused (on the CPU measured twice as fast as the plain one). On a GPU the rate is a
    tensor there, so that a recorded step reads what it is now.
    """
    cuda = next(model.parameters()).device.type == "cuda"
    backbone: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (backbone if name.startswith("backbone.") else heads).append(parameter)
    slow = training.backbone_learning_rate
    peaks = (training.learning_rate if slow is None else slow, training.learning_rate)
    groups: list[dict[str, Any]] = []
    for parameters, peak in zip((backbone, heads), peaks, strict=True):
        for decay, part in _by_decay(parameters, training).items():
            groups.append({"params": part, "weight_decay": decay, "peak": peak, "lr": peak})
    if training.optimizer == "adamw":
        optimizer: Optimizer = AdamW(groups, fused=True, capturable=cuda)
    else:
        optimizer = SGD(groups, lr=training.learning_rate, momentum=training.momentum, fused=True)
    if cuda:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return optimizer


def _by_decay(
    parameters: list[nn.Parameter], training: Training
) -> dict[float, list[nn.Parameter]]:
    """Parameters by their weight decay: with AdamW vectors (biases, norms) have none."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        spared = training.optimizer == "adamw" and parameter.ndim < 2
        parts.setdefault(0.0 if spared else training.weight_decay, []).append(parameter)
    return parts


class Rate:
    """The learning rate of a run: torch's schedule from epoch to epoch, a warm-up step by step.

    The schedule moves the rate of an optimiser of its own, in plain floats; every group of the real
    one gets the same share of its own peak.
    """

    def __init__(self, training: Training, steps: int) -> None:
        self.training = training
        self.warmup_steps = training.warmup_epochs * steps
        self._own = SGD([torch.zeros(1)], lr=training.learning_rate)
        self.schedule = make_schedule(self._own, training)

    @property
    def now(self) -> float:
        """The schedule's rate in this epoch, without the warm-up."""
        return float(self._own.param_groups[0]["lr"])

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Give every group its rate for a step, counted from the beginning of the run."""
        share = self.now / self.training.learning_rate
        if step < self.warmup_steps:
            share *= (step + 1) / self.warmup_steps
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["peak"] * share)
            else:
                group["lr"] = group["peak"] * share

    def after_epoch(self, validation_loss: float) -> None:
        """Move the schedule on."""
        self._own.step()  # torch warns where a schedule steps before its optimiser
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(validation_loss)
        elif self.schedule is not None:
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        """What `restore` needs, plain."""
        return {} if self.schedule is None else self.schedule.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state` was taken."""
        if self.schedule is not None and state:  # empty within the first epoch
            self.schedule.load_state_dict(state)
            self._own.param_groups[0]["lr"] = state["_last_lr"][0]


def make_schedule(optimizer: Optimizer, training: Training) -> Schedule | None:
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


def make_average(model: BrSTNet, training: Training) -> ModelEmaV3 | None:
    """The moving average of the weights, if one is asked for."""
    if not training.ema_decay:
        return None
    return ModelEmaV3(model, decay=training.ema_decay, use_warmup=True)
