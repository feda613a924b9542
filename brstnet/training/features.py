"""A frozen backbone's features, computed once for each section and symmetry and kept.

They lie in the store's folder, in `features/`, one file a section: float32 (8, N, F), the file's
name a hash of everything that they follow from. Who may not write there computes them anew.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from brstnet.config import fingerprint
from brstnet.data.store import Store
from brstnet.training.batches import Units, turn
from brstnet.training.model import architecture

VIEWS = 8
"""The symmetries of a square patch: what training draws from."""

FEATURE_BATCH = 32
"""Patches in a forward pass, each in all its symmetries one after the other."""


def load_features(
    store: Store,
    sections: Sequence[str],
    backbone: nn.Module,
    units: Units,
    precision: torch.dtype,
    *,
    keep: bool,
) -> np.ndarray:
    """Features of every spot of these sections in every symmetry, float32 (8, N, F).

    Args:
        store: the open store.
        sections: in the order of the rows.
        backbone: on the device, in evaluation mode.
        units: how patches are standardised for it.
        precision: of its forward pass.
        keep: write down what is computed.
    """
    weights = _weights_hash(backbone)
    parts = []
    for name in sections:
        made_of = {
            "patches": store.sections[name]["files"]["patches.npy"],
            "weights": weights,
            "mean": units.image_mean.flatten().tolist(),
            "std": units.image_std.flatten().tolist(),
            "input_px": units.input_px,
            "precision": str(precision),
            "versions": [torch.__version__, timm.__version__],
        }
        file = store.path / "features" / f"{fingerprint(made_of)}.npy"
        if not file.is_file():
            found = compute(store.patches(name), backbone, units, precision)
            if keep:
                _write(file, found)
            parts.append(found)
        else:
            parts.append(np.load(file))
    return np.concatenate(parts, axis=1)


def _weights_hash(backbone: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps(architecture(backbone), sort_keys=True).encode())
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def compute(
    patches: np.ndarray, backbone: nn.Module, units: Units, precision: torch.dtype
) -> np.ndarray:
    """Features of patches (N, H, W, 3) in the 8 symmetries of `turn`, float32 (8, N, F)."""
    device = units.image_mean.device
    features: int = backbone.num_features  # type: ignore[assignment]
    found = np.empty((VIEWS, len(patches), features), np.float32)
    for start in range(0, len(patches), FEATURE_BATCH):
        x_BHWC = torch.from_numpy(np.array(patches[start : start + FEATURE_BATCH])).to(device)
        for view in range(VIEWS):
            turned = turn(x_BHWC, torch.full((len(x_BHWC),), view, device=device))
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                feature_BF = backbone(units.image(turned))
            found[view, start : start + len(x_BHWC)] = feature_BF.float().cpu().numpy()
    return found


def _write(file: Path, features_VNF: np.ndarray) -> None:
    scratch = file.with_name(f"{file.stem}.{os.getpid()}.tmp.npy")
    try:
        file.parent.mkdir(exist_ok=True)
        np.save(scratch, features_VNF)
        scratch.rename(file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        warnings.warn(
            f"{file.parent}: features cannot be kept here ({error.strerror}): the next run must "
            "compute them again",
            stacklevel=2,
        )
