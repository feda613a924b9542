"""Small trainings for the tests: changed, stopped, and compared bit for bit."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from brstnet.config import Settings, Training
from brstnet.data.store import Store
from brstnet.training.keep import FitResult
from brstnet.training.train import fit

CPU = torch.device("cpu")


class Stop(Exception):
    """Raised by a callback, to end a training."""


def quiet(note: Mapping[str, float]) -> None:
    """A callback that does nothing."""


def train(store: Store, settings: Settings, out: Path, **more: Any) -> FitResult:
    """Fold 0 on the CPU."""
    result: FitResult = fit(store, settings, 0, out, **{"device": CPU, "on_epoch": quiet, **more})
    return result


def stop_after(epoch: int) -> Callable[[Mapping[str, float]], None]:
    """A callback that ends the training after an epoch."""

    def on_epoch(note: Mapping[str, float]) -> None:
        if note["epoch"] == epoch:
            raise Stop

    return on_epoch


def stop_at(step: int) -> Callable[[int], None]:
    """A callback that ends the training after so many steps of this call."""
    done = 0

    def on_step(_: int) -> None:
        nonlocal done
        done += 1
        if done == step:
            raise Stop

    return on_step


def with_training(settings: Settings, **changes: Any) -> Settings:
    """The settings with another training."""
    training: Training = dataclasses.replace(settings.training, **changes)
    return dataclasses.replace(settings, training=training)


def weights(folder: Path, name: str = "model") -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    loaded: dict[str, Tensor] = safetensors.torch.load_file(folder / f"{name}.safetensors")
    return loaded


def same_bits(a: Path, b: Path, *names: str) -> bool:
    """Whether two checkpoints hold the same tensors: by default the model's."""
    pairs = [(weights(a, name), weights(b, name)) for name in names or ("model",)]
    return all(
        one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        for one, other in pairs
    )


def history(folder: Path) -> list[dict[str, float]]:
    """The epochs of a checkpoint, without what a clock or the machine says."""
    measured = {"seconds", "seconds_left", "patches_per_second", "step_share", "memory_gb"}
    notes = json.loads((folder / "progress.json").read_text())["history"]
    return [{k: v for k, v in note.items() if k not in measured} for note in notes]
