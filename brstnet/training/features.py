"""A frozen backbone's features, computed once for each section and symmetry and kept.

They are derived from the store and kept there (`Store.derived`), a file a section.
"""

import functools
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import timm
import torch
from torch import nn

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
    side_px: int,
) -> np.ndarray:
    """Features of every spot of these sections in every symmetry, float32 (8, N, F).

    Args:
        store: the open store.
        sections: in the order of the rows.
        backbone: on the device, in evaluation mode.
        units: how patches are standardised for it.
        precision: of its forward pass.
        side_px: of the patches that it sees.
    """
    weights = _weights_hash(backbone)
    parts = []
    for name in sections:
        made_of = {
            "patches": store.sections[name]["files"]["patches.npy"],
            "side_px": side_px,
            "weights": weights,
            "mean": units.image_mean.flatten().tolist(),
            "std": units.image_std.flatten().tolist(),
            "precision": str(precision),
            "versions": [torch.__version__, timm.__version__],
        }
        patches = store.patches(name, side_px)
        make = functools.partial(compute, patches, backbone, units, precision)
        parts.append(store.derived(made_of, make))
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
