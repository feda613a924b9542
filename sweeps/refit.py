"""The champion's configuration once more, on the patients of all folds; held-out ones stay out."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from brstnet.config import Settings, Training, build, read_yaml, to_yaml
from brstnet.data.mirror import open_store
from brstnet.training.folds import ALL
from brstnet.training.keep import FitResult, finished
from brstnet.training.train import OnEpoch, fit
from sweeps.choice import Candidate

SETTINGS = "settings.yaml"
"""What a trial's folder says of how it was trained."""


def refit_folder(sweep_folder: Path, trial: int) -> Path:
    """Where the refit of a trial lies; each has its own, for the champion may change."""
    return sweep_folder / "refit" / f"{trial:04d}"


def read_settings(folder: Path) -> Settings:
    """The settings that a trial's folder keeps."""
    return build(Settings, read_yaml(folder / SETTINGS), str(folder / SETTINGS))


def refit_settings(candidate: Candidate) -> Settings:
    """The candidate's settings with a fixed number of epochs, for nobody validates a refit.

    After early stopping that is the median, over folds and seeds, of the epochs that their models
    had; a cosine keeps the period that it had in the folds.

    Raises:
        ValueError: the schedule needs a validation loss, or a fold is not on disk.
    """
    settings = read_settings(candidate.folder)
    training = settings.training
    check_refit(training, f"trial {candidate.trial}")
    if training.stopping == "early":
        period = training.cosine_period or training.epochs
        training = dataclasses.replace(
            training,
            stopping="fixed",
            epochs=median_epochs(candidate, settings.protocol.folds),
            cosine_period=period if training.schedule == "cosine" else training.cosine_period,
        )
    return dataclasses.replace(settings, training=training)


def check_refit(training: Training, whose: str) -> None:
    """Refuse what cannot be trained again without a validation.

    A plateau of the training loss in place of the validation's would come later, or never: that
    would be another configuration than the one that was chosen.

    Raises:
        ValueError: the schedule needs a validation loss.
    """
    if training.schedule == "plateau":
        raise ValueError(
            f"{whose} cannot be refitted on all folds: training.schedule plateau lowers the "
            "learning rate by a validation loss, and nobody would validate; take schedule cosine "
            "or none, or no refit: the models of the folds stand for it"
        )


def median_epochs(candidate: Candidate, folds: int) -> int:
    """The median number of epochs that the models had which stand for the candidate's folds.

    Raises:
        ValueError: none of them is on disk.
    """
    places = [Path(o["folder"]) / f"fold_{n}" for o in candidate.outcomes for n in range(folds)]
    epochs = [done.epoch + 1 for place in places if (done := finished(place)) is not None]
    if not epochs:
        raise ValueError(f"{candidate.folder}: no finished fold says how many epochs are enough")
    return math.ceil(np.median(epochs))


def refit(
    store: str,
    settings: Settings,
    out: Path,
    device: torch.device,
    on_epoch: OnEpoch | None = None,
) -> FitResult:
    """Train on all folds' sections; the same call goes on where it was stopped.

    Args:
        store: where the patch store is.
        settings: what `refit_settings` gave.
        out: what `refit_folder` gave.
        device: where to train.
        on_epoch: called after each epoch with its numbers, among which score and validation loss
            are NaN.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_text(to_yaml(settings))
    result = fit(open_store(store), settings, ALL, out, device=device, on_epoch=on_epoch or _quiet)
    (result.folder / "optimizer.safetensors").unlink(missing_ok=True)  # it is not gone on from
    return result


def _quiet(_: Mapping[str, float]) -> None:
    """Nobody listens."""
