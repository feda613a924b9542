"""Patches to the device: gather, turn, normalise. No DataLoader, no per-patch Python.

Shape letters: N spots, B batch, H and W pixels, C channels, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brstnet.data.store import Store
from brstnet.training.fitted import Fitted, targets

SHARE_OF_FREE_MEMORY = 0.6
"""Patches stay on the GPU if they take less of its free memory; the rest is for the model."""


@dataclass(frozen=True, kw_only=True)
class Spots:
    """The spots of some sections, ready to be drawn from.

    `maps` are the patches as they lie in the store, one uint8 (n, H, W, 3) a section, `first` the
    row at which each begins; `resident` is all of them on the device, if they fit. `rows` (M,)
    are the rows that may be drawn, `y_NG` the standardised targets of every row, `section_N` the
    number of the section of every row.
    """

    maps: Sequence[np.ndarray]
    first: np.ndarray
    resident: Tensor | None
    rows: np.ndarray
    y_NG: Tensor
    section_N: np.ndarray
    device: torch.device

    def patches(self, rows: Tensor) -> Tensor:
        """Patches of these rows (B,), uint8 (B, H, W, C) on the device."""
        if self.resident is not None:
            return self.resident[rows]
        index = rows.cpu().numpy()
        batch = np.empty((len(index), *self.maps[0].shape[1:]), np.uint8)
        section = np.searchsorted(self.first, index, side="right") - 1
        for number in np.unique(section):
            here = np.flatnonzero(section == number)
            batch[here] = self.maps[number][index[here] - self.first[number]]
        x_BHWC = torch.from_numpy(batch)
        if self.device.type == "cuda":
            return x_BHWC.pin_memory().to(self.device, non_blocking=True)
        return x_BHWC


def load_spots(
    store: Store,
    sections: Sequence[str],
    fitted: Fitted,
    device: torch.device,
    *,
    aux_target: str = "standardised",
    rows: np.ndarray | None = None,
) -> Spots:
    """Bring the spots of these sections to the device, with the targets that a fold defines.

    Args:
        store: the open store.
        sections: in the order of the rows.
        fitted: the fold's genes and statistics.
        device: where to train.
        aux_target: `log` leaves the auxiliary targets unstandardised (the authors' code).
        rows: bool (N,), which may be drawn; all by default.
    """
    spots = store.spots(sections)
    columns = store.genes.index.get_indexer(fitted.genes.index)
    counts = store.counts(sections)[:, columns]
    y_NG = targets(fitted, counts, spots["total_counts"].to_numpy(float))
    mean, std = target_scale(fitted, aux_target)
    maps = [store.patches(name) for name in sections]
    lengths = [len(m) for m in maps]
    return Spots(
        maps=maps,
        first=np.cumsum([0, *lengths[:-1]]),
        resident=_resident(maps, device),
        rows=np.arange(len(spots)) if rows is None else np.flatnonzero(rows),
        y_NG=torch.from_numpy((y_NG - mean) / std).to(device),
        section_N=np.repeat(np.arange(len(maps)), lengths),
        device=device,
    )


def target_scale(fitted: Fitted, aux_target: str) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of each target, (G,) float32: model output * scale + shift = log units."""
    mean = fitted.genes["mean"].to_numpy(np.float32, copy=True)
    std = fitted.genes["std"].to_numpy(np.float32, copy=True)
    if aux_target == "log":
        mean[fitted.main_genes :], std[fitted.main_genes :] = 0, 1
    return mean, std


def _resident(maps: Sequence[np.ndarray], device: torch.device) -> Tensor | None:
    """All patches on the GPU where they fit; on the CPU the page cache already shares them."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if sum(m.nbytes for m in maps) > SHARE_OF_FREE_MEMORY * free:
        return None
    whole = torch.empty((sum(map(len, maps)), *maps[0].shape[1:]), dtype=torch.uint8, device=device)
    start = 0
    for m in maps:
        whole[start : start + len(m)] = torch.from_numpy(np.array(m))
        start += len(m)
    return whole


def rng(*key: int) -> np.random.Generator:
    """A generator that follows from the key alone, such as (seed, epoch, step, rank)."""
    return np.random.default_rng(np.random.SeedSequence(key))


def epoch_plan(
    rows: np.ndarray, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows an epoch draws and how each is turned: two arrays (steps, B of this rank).

    Every row is drawn once, in an order that follows from (seed, epoch); the last batch is filled
    with the first rows of that order, so that every batch is full. A rank takes its slice of each
    global batch: the union over ranks is the batch that one process would have drawn.
    """
    generator = rng(seed, epoch)
    steps = -(-len(rows) // batch)
    order = np.resize(generator.permutation(rows), (steps, batch))
    symmetry = generator.integers(0, 8, (steps, batch))
    return order[:, rank::world], symmetry[:, rank::world]


def turn(x_BHWC: Tensor, symmetry_B: Tensor) -> Tensor:
    """Each patch in one of its 8 symmetries: bit 0 flips columns, bit 1 rows, bit 2 transposes.

    The paper's random flips and 90-degree rotation are uniform over these eight.
    """
    for bit, dims in ((1, (2,)), (2, (1,))):
        flip = (symmetry_B & bit).bool()[:, None, None, None]
        x_BHWC = torch.where(flip, x_BHWC.flip(dims), x_BHWC)
    transpose = (symmetry_B & 4).bool()[:, None, None, None]
    return torch.where(transpose, x_BHWC.transpose(1, 2), x_BHWC)


def to_input(x_BHWC: Tensor, fitted: Fitted, input_px: int | None) -> Tensor:
    """uint8 patches to the network's input: float32 (B, C, H, W), channels_last, standardised."""
    x_BCHW = x_BHWC.permute(0, 3, 1, 2).float()
    if input_px is not None and input_px != x_BCHW.shape[-1]:
        x_BCHW = F.interpolate(x_BCHW, size=(input_px, input_px), mode="area")
    mean = torch.tensor(fitted.image_mean, device=x_BHWC.device).view(1, 3, 1, 1)
    std = torch.tensor(fitted.image_std, device=x_BHWC.device).view(1, 3, 1, 1)
    x_BCHW = (x_BCHW / 255 - mean) / std
    return x_BCHW.contiguous(memory_format=torch.channels_last)
