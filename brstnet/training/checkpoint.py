"""A checkpoint is a folder that stands alone: the model and everything that was fitted with it.

    checkpoint.json       format, settings, fold, statistics, store, scores, versions, leak report
    model.safetensors     all weights and buffers
    genes.parquet         the genes in output order, their roles and statistics
    validation.parquet    the panel's correlation per gene and validation section
    optimizer.safetensors and progress.json   only in a checkpoint that training goes on from

Nothing in it is pickled.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import timm
import torch
from torch import nn

from brstnet import __version__
from brstnet.config import Settings, build, plain
from brstnet.data.store import Store
from brstnet.training.fitted import Fitted
from brstnet.training.folds import Fold
from brstnet.training.model import BrSTNet, build_model

FORMAT = "brstnet-checkpoint"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: the model in evaluation mode, and what it was fitted with."""

    path: Path
    model: BrSTNet
    settings: Settings
    fold: Fold
    fitted: Fitted
    facts: dict[str, Any]


def describe(
    settings: Settings, fold: Fold, fitted: Fitted, store: Store, leak_report: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says of its origin; the same in every epoch of a run."""
    used = (*fold.train, *fold.validation)
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": {
            "brstnet": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
        "settings": plain(settings),
        "fold": plain(fold),
        "patients": sorted({store.sections[name]["patient"] for name in used}),
        "fitted": fitted.facts(),
        "store": {
            "digest": store.digest,
            "prepare": store.index["prepare"],
            "stain_target": store.index["stain_target"],
            "sections": {name: store.sections[name]["files"]["patches.npy"] for name in used},
        },
        "leak_report": dict(leak_report),
    }


def save(
    path: Path,
    model: nn.Module,
    genes: pd.DataFrame,
    facts: Mapping[str, Any],
    validation: pd.DataFrame | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint beside its place, then put it there: a reader never sees half of one."""
    scratch = path.with_name(path.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    safetensors.torch.save_file(_tensors(model.state_dict()), scratch / "model.safetensors")
    genes.to_parquet(scratch / "genes.parquet")
    if validation is not None:
        validation.to_parquet(scratch / "validation.parquet")
    if optimizer is not None:
        state = _optimizer_tensors(optimizer)
        safetensors.torch.save_file(state, scratch / "optimizer.safetensors")
    if progress is not None:
        (scratch / "progress.json").write_text(json.dumps(progress))
    (scratch / "checkpoint.json").write_text(json.dumps(facts, indent=1))
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """SGD's momentum, by the number of the parameter."""
    state = optimizer.state_dict()["state"]
    buffers = {
        str(i): s["momentum_buffer"]
        for i, s in state.items()
        if s.get("momentum_buffer") is not None
    }
    return _tensors(buffers)


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved momentum back into an optimiser over the same parameters.

    The file has no memory layout; each buffer gets its parameter's again, as the fused update walks
    through memory without looking at strides.
    """
    buffers = safetensors.torch.load_file(path / "optimizer.safetensors")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {
        int(i): {"momentum_buffer": torch.empty_like(parameters[int(i)]).copy_(value)}
        for i, value in buffers.items()
    }
    optimizer.load_state_dict(state)


def settle(path: Path) -> bool:
    """Whether there is a checkpoint at `path`; one that was being replaced is put back first."""
    old = path.with_name(path.name + ".old")
    if not path.exists() and old.exists():
        old.rename(path)
    return (path / "checkpoint.json").is_file()


def read_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: it is something else, or of a newer format.
    """
    file = path / "checkpoint.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint here (it would have a checkpoint.json)")
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise ValueError(f"{file}: format is {facts.get('format')!r}, must be {FORMAT!r}")
    if facts["version"] > VERSION:
        raise ValueError(
            f"{file}: format version {facts['version']} is newer than this brstnet reads "
            f"({VERSION}): update brstnet"
        )
    return facts


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """The model of a checkpoint and everything fitted with it.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: it is something else, or of a newer format.
    """
    path = Path(path)
    facts = read_facts(path)
    settings = build(Settings, facts["settings"], str(path / "checkpoint.json"))
    fitted = _fitted(path, facts["fitted"])
    training = settings.training
    scratch = Settings(protocol=settings.protocol, training=_without_weights(settings))
    input_px = training.input_px or int(facts["store"]["prepare"]["input_px"])
    model = build_model(scratch.training, fitted, input_px)
    model.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))
    return Checkpoint(
        path=path,
        model=model.to(device).eval(),
        settings=settings,
        fold=_fold(facts["fold"]),
        fitted=fitted,
        facts=facts,
    )


def _without_weights(settings: Settings) -> Any:
    """The architecture alone: its weights come from the checkpoint, not from where they began."""
    return settings.training.__class__(**{**vars(settings.training), "weights": None})


def _fold(facts: Mapping[str, Any]) -> Fold:
    return Fold(
        number=facts["number"],
        train=tuple(facts["train"]),
        validation=tuple(facts["validation"]),
        held_out=tuple(facts["held_out"]),
    )


def _fitted(path: Path, facts: Mapping[str, Any]) -> Fitted:
    return Fitted(
        genes=pd.read_parquet(path / "genes.parquet"),
        target=facts["target"],
        median_total=facts["median_total"],
        image_mean=_three(facts["image_mean"]),
        image_std=_three(facts["image_std"]),
        sections=tuple(facts["sections"]),
        spots=facts["spots"],
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def machine(device: torch.device, precision: torch.dtype, workers: int) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(precision).removeprefix("torch."),
        "layout": "channels_last",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "workers": workers,
    }
