"""A checkpoint is a folder that stands alone: the model and everything that was fitted with it.

    checkpoint.json       format, settings, fold, statistics, store, scores, versions, leak report
    model.safetensors     all weights and buffers (of the moving average, where there is one)
    backbone.safetensors  a frozen backbone's, which are not in the model's then
    genes.parquet         the genes in output order, their roles and statistics
    validation.parquet    the panel's correlation per gene and validation section
    optimizer.safetensors and progress.json   only in a checkpoint that training goes on from

Nothing in it is pickled.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from brstnet import __version__
from brstnet.config import Settings, build, plain
from brstnet.data.guarded import inside, read_json, read_table
from brstnet.data.store import Store
from brstnet.training.fitted import Fitted
from brstnet.training.folds import Fold
from brstnet.training.model import SOURCES, BrSTNet, build_backbone, create, with_heads

FORMAT = "brstnet-checkpoint"
VERSION = 1

NEVER = ("checkpoint", "pretrained", "cache", "model_cfg", "feature_cfg", "features_only", "kwargs")
"""How arguments of timm begin that say where to read something, and no network's shape."""


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
    """What a checkpoint says of its origin; the same in every epoch of a run.

    The microns per pixel stand beside `store`, not in it: a run that goes on must have been made
    from the same `store`, and older checkpoints do not say them.
    """
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
        "um_per_px": store.um_per_px(used),
        "leak_report": dict(leak_report),
    }


class Saver:
    """Writes in a thread of its own, one thing after the other: training waits for a copy alone."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "saver")
        self._writing: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Write this next; what went wrong with the last is raised here."""
        self.wait()
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Until all is on disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint is written from; tensors on the host, and no longer changing.

    `weights` are the model's, `facts` what `describe` gave and scores, `validation` the panel's
    correlations; `state` (see `training_state`) and `progress` are there where training can go on;
    `backbone` is a frozen backbone's file, to be linked into the checkpoint.
    """

    weights: Mapping[str, Tensor]
    genes: pd.DataFrame
    facts: Mapping[str, Any]
    validation: pd.DataFrame | None = None
    state: Mapping[str, Tensor] | None = None
    progress: Mapping[str, Any] | None = None
    backbone: Path | None = None


def save(path: Path, contents: Contents) -> None:
    """Write a checkpoint beside its place, then put it there: a reader never sees half of one."""
    scratch = path.with_name(path.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    safetensors.torch.save_file(dict(contents.weights), scratch / "model.safetensors")
    contents.genes.to_parquet(scratch / "genes.parquet")
    if contents.validation is not None:
        contents.validation.to_parquet(scratch / "validation.parquet")
    if contents.state is not None:
        safetensors.torch.save_file(dict(contents.state), scratch / "optimizer.safetensors")
    if contents.progress is not None:
        (scratch / "progress.json").write_text(json.dumps(contents.progress))
    if contents.backbone is not None:
        _link(contents.backbone, scratch / "backbone.safetensors")
    (scratch / "checkpoint.json").write_text(json.dumps(contents.facts, indent=1))
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk knows no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in the host's memory that further training does not change."""
    return {n: torch.empty(v.shape, dtype=v.dtype).copy_(v.detach()) for n, v in tensors.items()}


def training_state(optimizer: torch.optim.Optimizer, moving: nn.Module | None) -> dict[str, Tensor]:
    """What training goes on from, beside the model, on the host.

    The optimiser's tensors are named by their parameter's number; `moving` are the weights that
    learn where the checkpoint's own are their moving average.
    """
    state = {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    if moving is not None:
        state |= {f"weights.{name}": value for name, value in moving.state_dict().items()}
    return on_host(state)


def restore_state(
    path: Path, optimizer: torch.optim.Optimizer, moving: nn.Module | None = None
) -> None:
    """Put what `training_state` has kept back into an optimiser over the same parameters.

    The file has no memory layout; each tensor gets its parameter's again, as the fused update walks
    through memory without looking at strides.
    """
    tensors = read_tensors(path, "optimizer.safetensors")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    restored: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if number == "weights":
            weights[name] = value
            continue
        own = parameters[int(number)]
        like = torch.empty_like(own).copy_(value) if value.shape == own.shape else value
        restored.setdefault(int(number), {})[name] = like
    state = optimizer.state_dict()
    state["state"] = restored
    optimizer.load_state_dict(state)
    if moving is not None:
        moving.load_state_dict(weights)


def settle(path: Path) -> bool:
    """Whether there is a checkpoint at `path`; one that was being replaced is put back first."""
    old = path.with_name(path.name + ".old")
    if not path.exists() and old.exists():
        old.rename(path)
    for left in (old, path.with_name(path.name + ".tmp")):
        shutil.rmtree(left, ignore_errors=True)
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
    facts = read_json(inside(path, file.name))
    if facts.get("format") != FORMAT:
        raise ValueError(f"{file}: format is {facts.get('format')!r}, must be {FORMAT!r}")
    if not isinstance(facts.get("version"), int) or facts["version"] > VERSION:
        raise ValueError(
            f"{file}: format version {facts.get('version')} is newer than this brstnet reads "
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
    try:
        settings = build(Settings, facts["settings"], str(path / "checkpoint.json"))
        fitted, fold = _fitted(path, facts["fitted"]), _fold(facts["fold"])
        model = _model(path, facts, settings, fitted)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: damaged, or made by something else: {type(error).__name__} {error}"
        ) from error
    return Checkpoint(
        path=path,
        model=model.to(device).eval(),
        settings=settings,
        fold=fold,
        fitted=fitted,
        facts=facts,
    )


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors in a file of a checkpoint, which is never unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or lies elsewhere.
    """
    file = inside(path, name)
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error


def _model(path: Path, facts: Mapping[str, Any], settings: Settings, fitted: Fitted) -> BrSTNet:
    """The network with its weights, which are read first: nothing is made larger than they are."""
    weights = read_tensors(path, "model.safetensors")
    if (path / "backbone.safetensors").is_file():
        frozen = read_tensors(path, "backbone.safetensors")
        weights |= {f"backbone.{name}": value for name, value in frozen.items()}
    if (genes := len(fitted.genes)) > (numbers := sum(v.numel() for v in weights.values())):
        raise ValueError(f"{path}: {genes} genes, but only {numbers} weights")
    model = with_heads(_backbone(path, facts, settings), settings.training, fitted)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the network: {error}") from error
    return model


def _backbone(path: Path, facts: Mapping[str, Any], settings: Settings) -> nn.Module:
    """The architecture alone: its weights come from the checkpoint, not from where they began.

    Raises:
        ValueError: it names anything but a network of timm's and its shape: files, addresses.
    """
    if (made := facts.get("architecture")) is not None:
        name, args = made["name"], made["args"]
        if not (isinstance(name, str) and timm.is_model(name.split(".")[0])) or ":" in name:
            raise ValueError(f"{path}: architecture {name!r:.200} is no network of timm's")
        if wrong := [key for key in args if key.startswith(NEVER) or "://" in str(args[key])]:
            raise ValueError(
                f"{path}: architecture {name} has {wrong[0]}={args[wrong[0]]!r:.200}: a checkpoint "
                "stands alone, and reads no other file"
            )
        return create(name, args)
    if settings.training.backbone.startswith(SOURCES):
        raise ValueError(
            f"{path}: no architecture, but the backbone {settings.training.backbone}: a checkpoint "
            "stands alone, and reads no other file"
        )
    training = dataclasses.replace(settings.training, weights=None)  # made before 0.2
    return build_backbone(training, training.input_px or facts["store"]["prepare"]["input_px"])


def _fold(facts: Mapping[str, Any]) -> Fold:
    return Fold(
        number=facts["number"],
        train=tuple(facts["train"]),
        validation=tuple(facts["validation"]),
        held_out=tuple(facts["held_out"]),
    )


def _fitted(path: Path, facts: Mapping[str, Any]) -> Fitted:
    return Fitted(
        genes=read_table(inside(path, "genes.parquet")),
        target=facts["target"],
        median_total=facts["median_total"],
        depth_mean=facts.get("depth_mean", 0.0),
        depth_std=facts.get("depth_std", 1.0),
        image_mean=_three(facts["image_mean"]),
        image_std=_three(facts["image_std"]),
        sections=tuple(facts["sections"]),
        spots=facts["spots"],
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def machine(device: torch.device, precision: torch.dtype, workers: int) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings.

    TensorFloat-32 is left as PyTorch has it: on in convolutions that are float32, off in products.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(precision).removeprefix("torch."),
        "layout": "channels_last",
        "tf32": {
            "convolution": torch.backends.cudnn.allow_tf32,
            "product": torch.backends.cuda.matmul.allow_tf32,
        },
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "workers": workers,
    }
