"""From a store to batches on the device: whole in its memory where they fit, else from the maps.

Shape letters: N spots, B batch, S steps, V views (symmetries), C channels, H and W pixels, G genes,
F features.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from brstnet.config import Training
from brstnet.data.store import Store
from brstnet.training.fitted import Fitted, target_scale
from brstnet.training.jitter import draw_jitter, jitter
from brstnet.training.model import Outputs

SHARE_OF_FREE_MEMORY = 0.6
"""Patches stay on the GPU if they take less of its free memory; the rest is for the model."""

AHEAD = 2
"""Batches that are gathered from the maps while the device is busy with one."""

FLIPS = {1: 1, 2: 0, 3: -1}
"""OpenCV's code of a flip of columns, of rows, of both."""

Sent = tuple[Tensor, torch.cuda.Event | None]
"""A batch on its way to the device, and the event that says it is there."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some spots on the device, as raw as they are stored.

    `x` are patches, uint8 (B, H, W, C), or cached features, float32 (B, F); `symmetry_B` says how
    each patch is turned, `jitter_B43` what becomes of its stains (None: nothing); `counts_BG` are
    raw counts, in the order of the model's outputs, `scale_B` what they are multiplied by before
    the logarithm, `depth_B` the standardised log of the spots' totals.
    """

    x: Tensor
    symmetry_B: Tensor | None
    jitter_B43: Tensor | None
    counts_BG: Tensor
    scale_B: Tensor
    depth_B: Tensor


class Plan(NamedTuple):
    """What an epoch draws: rows (steps, B of this rank), how each is turned, and its stains' map.

    Where patches stay as they lie, or their stains do, there is None.
    """

    rows_SB: np.ndarray
    symmetry_SB: np.ndarray | None = None
    jitter_SB43: np.ndarray | None = None

    def part(self, first: int, end: int | None = None) -> "Plan":
        """The steps from `first` to before `end`."""
        rows_SB, *how = self
        return Plan(rows_SB[first:end], *(None if p is None else p[first:end] for p in how))


@dataclass(frozen=True, kw_only=True)
class Spots:
    """The spots of some sections, ready to be drawn from.

    `maps` are the patches as they lie in the store, one uint8 (n, H, W, 3) a section, `first` the
    row at which each begins; `resident` is all of them on the device, if they fit. Where a frozen
    backbone has seen them all, `features_VNF` takes their place. `rows` (M,) are the rows that may
    be drawn; of every row `counts_NG`, `scale_N` and `depth_N` are what a batch has of them, and
    `section_N` is the number of its section.
    """

    maps: Sequence[np.ndarray]
    first: np.ndarray
    resident: Tensor | None
    features_VNF: Tensor | None = None
    rows: np.ndarray
    counts_NG: Tensor
    scale_N: Tensor
    depth_N: Tensor
    section_N: np.ndarray
    device: torch.device

    def patches(self, rows: Tensor) -> Tensor:
        """Patches of these rows (B,), uint8 (B, H, W, C) on the device."""
        if self.resident is not None:
            return self.resident[rows]
        return self._gathered(rows.cpu().numpy()).to(self.device, non_blocking=True)

    def batch(
        self, rows_B: Tensor, symmetry_B: Tensor | None = None, jitter_B43: Tensor | None = None
    ) -> Batch:
        """The spots of these rows; all three lie on the device."""
        if self.features_VNF is None:
            return self._with_counts(self.patches(rows_B), rows_B, symmetry_B, jitter_B43)
        view = torch.zeros_like(rows_B) if symmetry_B is None else symmetry_B
        return self._with_counts(self.features_VNF[view, rows_B], rows_B)

    def _with_counts(
        self,
        x: Tensor,
        rows_B: Tensor,
        symmetry_B: Tensor | None = None,
        jitter_B43: Tensor | None = None,
    ) -> Batch:
        return Batch(
            x=x,
            symmetry_B=symmetry_B,
            jitter_B43=jitter_B43,
            counts_BG=self.counts_NG[rows_B],
            scale_B=self.scale_N[rows_B],
            depth_B=self.depth_N[rows_B],
        )

    def feed(self, plan: Plan) -> Iterator[Batch]:
        """A batch for each step of a plan.

        What lies on the device is picked there. Else a thread gathers from the maps and sends ahead
        of the step, so that neither disk nor copy holds it up.
        """
        rows_SB, drawn = plan.rows_SB, self._drawn(plan)
        if self.resident is not None or self.features_VNF is not None:
            yield from (self.batch(*one) for one in drawn)
            return
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        waiting: deque[Future[Sent]] = deque()
        with ThreadPoolExecutor(1, "gather") as pool:
            for step in range(len(rows_SB) + AHEAD):
                if step < len(rows_SB):
                    waiting.append(pool.submit(self._send, rows_SB[step], stream))
                if step >= AHEAD:
                    sent = waiting.popleft().result()
                    yield self._with_counts(_arrived(*sent), *drawn[step - AHEAD])

    def _drawn(self, plan: Plan) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """What each step of a plan draws, on the device: rows, symmetries, maps of the stains."""
        rows = torch.from_numpy(plan.rows_SB).to(self.device).unbind()
        turns, jitters = (
            [None] * len(rows) if p is None else torch.from_numpy(p).to(self.device).unbind()
            for p in (plan.symmetry_SB, plan.jitter_SB43)
        )
        return list(zip(rows, turns, jitters, strict=True))

    def _send(self, rows: np.ndarray, stream: torch.cuda.Stream | None) -> Sent:
        batch = self._gathered(rows)
        if stream is None:
            return batch, None
        with torch.cuda.stream(stream):
            return batch.to(self.device, non_blocking=True), stream.record_event()

    def _gathered(self, rows: np.ndarray) -> Tensor:
        """Patches of these rows from the maps, in memory that a GPU can read by itself."""
        shape = (len(rows), *self.maps[0].shape[1:])
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        section = np.searchsorted(self.first, rows, side="right") - 1
        for number in np.unique(section):
            here = np.flatnonzero(section == number)
            batch.numpy()[here] = self.maps[number][rows[here] - self.first[number]]
        return batch


def _arrived(x: Tensor, event: torch.cuda.Event | None) -> Tensor:
    """A batch that was sent on another stream, safe to use on this one."""
    if event is not None:
        here = torch.cuda.current_stream(x.device)
        here.wait_event(event)
        x.record_stream(here)
    return x


def load_spots(
    store: Store,
    sections: Sequence[str],
    fitted: Fitted,
    device: torch.device,
    side_px: int | None = None,
    *,
    rows: np.ndarray | None = None,
) -> Spots:
    """Bring the spots of these sections to the device, with the counts of the fold's genes.

    Args:
        store: the open store.
        sections: in the order of the rows.
        fitted: the fold's genes and statistics.
        device: where to train.
        side_px: patches are shrunk to this side; by default they stay as they are stored.
        rows: bool (N,), which may be drawn; all by default.
    """
    spots = store.spots(sections)
    columns = store.genes.index.get_indexer(fitted.genes.index)
    counts = store.counts(sections)[:, columns]
    small = counts.max() <= np.iinfo(np.int16).max if counts.nnz else True
    totals = spots["total_counts"].to_numpy(float)
    scale, depth = fitted.count_scale(totals), fitted.depth(totals)
    maps = [store.patches(name, side_px) for name in sections]
    lengths = [len(m) for m in maps]
    return Spots(
        maps=maps,
        first=np.cumsum([0, *lengths[:-1]]),
        resident=_resident(maps, device),
        rows=np.arange(len(spots)) if rows is None else np.flatnonzero(rows),
        counts_NG=torch.from_numpy(
            counts.astype(np.int16 if small else np.int32).toarray()  # a quarter of float64's room
        ).to(device),
        scale_N=torch.from_numpy(scale.astype(np.float32)).to(device),
        depth_N=torch.from_numpy(depth.astype(np.float32)).to(device),
        section_N=np.repeat(np.arange(len(maps)), lengths),
        device=device,
    )


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
    rows: np.ndarray,
    batch: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    augmentation: str = "symmetries",
) -> Plan:
    """Which rows an epoch draws, and what each patch goes through (`Training.augmentation`).

    Every row is drawn once, in an order that follows from (seed, epoch); the last batch is filled
    with the first rows of that order, so that every batch is full. A rank takes its slice of each
    global batch: the union over ranks is the batch that one process would have drawn. Order and
    symmetries are the same with and without colour.
    """
    generator = rng(seed, epoch)
    steps = -(-len(rows) // batch)
    order = np.resize(generator.permutation(rows), (steps, batch))
    symmetry = generator.integers(0, 8, (steps, batch))
    here = np.s_[:, rank::world]
    if augmentation == "none":
        return Plan(order[here])
    if augmentation == "symmetries":
        return Plan(order[here], symmetry[here])
    return Plan(order[here], symmetry[here], draw_jitter(generator, (steps, batch))[here])


@dataclass(frozen=True, kw_only=True)
class Units:
    """From raw bytes and counts to what network and loss are made for, on the device.

    Constants of a fold: image mean and deviation of each channel (1, C, 1, 1) in levels of 0..255,
    target mean and deviation of each output (G,) in log units. Where depth is a nuisance,
    `depth_slope_G` is how each standardised target follows the depth head's output, and
    `depth_scale` that output's deviation: the root mean square over the main genes of what depth
    does to them, so that its error counts as it will in their predictions. `components_GK` (main
    genes, rank) span what is learnt of the main targets; None stands for all of it.
    """

    image_mean: Tensor
    image_std: Tensor
    target_mean_G: Tensor
    target_std_G: Tensor
    depth_slope_G: Tensor | None
    depth_scale: float
    components_GK: Tensor | None = None

    @classmethod
    def of(cls, fitted: Fitted, training: Training, device: torch.device) -> Self:
        """The units of a fold."""
        mean, std = target_scale(fitted, training.aux_target)
        slope = fitted.genes["depth_slope"].to_numpy(np.float32) * fitted.depth_std / std
        scale = float(np.sqrt(np.mean(slope[: fitted.main_genes] ** 2))) or 1.0
        nuisance = training.depth == "nuisance"
        return cls(
            image_mean=torch.tensor(fitted.image_mean, device=device).view(1, 3, 1, 1) * 255,
            image_std=torch.tensor(fitted.image_std, device=device).view(1, 3, 1, 1) * 255,
            target_mean_G=torch.from_numpy(mean).to(device),
            target_std_G=torch.from_numpy(std).to(device),
            depth_slope_G=torch.from_numpy(slope / scale).to(device) if nuisance else None,
            depth_scale=scale,
        )

    def input(self, batch: Batch) -> Tensor:
        """What the network takes: standardised patches (B, C, H, W), or features as they are."""
        if batch.x.dtype != torch.uint8:
            return batch.x
        x_BHWC = batch.x if batch.symmetry_B is None else turn(batch.x, batch.symmetry_B)
        return self.image(x_BHWC if batch.jitter_B43 is None else jitter(x_BHWC, batch.jitter_B43))

    def image(self, x_BHWC: Tensor) -> Tensor:
        """Patches (B, H, W, C) in 0..255 as float32 (B, C, H, W), channels_last, standardised."""
        x_BCHW = x_BHWC.permute(0, 3, 1, 2).float()
        x_BCHW = (x_BCHW - self.image_mean) / self.image_std
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def target(self, batch: Batch) -> Tensor:
        """Standardised targets, float32 (B, G)."""
        y_BG = torch.log1p(batch.counts_BG * batch.scale_B[:, None])
        return (y_BG - self.target_mean_G) / self.target_std_G

    def goal(self, batch: Batch) -> Tensor:
        """What the outputs learn, (B, G): the targets; or (B, G + 1): their rest, and the depth."""
        y_BG = self.target(batch)
        depth_B1 = batch.depth_B[:, None] * self.depth_scale
        if self.depth_slope_G is not None:
            y_BG = y_BG - depth_B1 * self.depth_slope_G
        if self.components_GK is not None:
            main, aux = y_BG.tensor_split([len(self.components_GK)], dim=1)
            y_BG = torch.cat([main @ self.components_GK @ self.components_GK.T, aux], dim=1)
        return y_BG if self.depth_slope_G is None else torch.cat([y_BG, depth_B1], dim=1)

    def of_rank(self, rank: int, main_genes: int, train: Spots) -> Self:
        """The same, with the main targets brought down to `rank` components of the training's.

        Raises:
            ValueError: there are fewer components than that.
        """
        most = min(main_genes, len(train.rows))
        if rank > most:
            raise ValueError(
                f"training.target_rank is {rank}, but {main_genes} main genes of {len(train.rows)} "
                f"training spots have at most {most} components: lower it, or set it to null"
            )
        covariance = torch.zeros(main_genes, main_genes, dtype=torch.float64)
        for rows in torch.from_numpy(train.rows).to(train.device).split(4096):
            y_BG = self.goal(train.batch(rows))[:, :main_genes].double().cpu()
            covariance += y_BG.T @ y_BG  # about their means, but for what min_counts leaves out
        components = torch.linalg.eigh(covariance).eigenvectors[:, -rank:]
        return replace(self, components_GK=components.float().to(train.device))

    def whole(self, outputs: Outputs) -> Tensor:
        """Predicted standardised targets (B, G) of what the heads gave."""
        main, aux, depth_B1 = outputs
        pred_BG = main if aux is None else torch.cat([main, aux], dim=1)
        if depth_B1 is None or self.depth_slope_G is None:
            return pred_BG
        return pred_BG + depth_B1 * self.depth_slope_G


def turn(x_BHWC: Tensor, symmetry_B: Tensor) -> Tensor:
    """Each patch in one of its 8 symmetries: bit 0 flips columns, bit 1 rows, bit 2 transposes.

    The paper's random flips and 90-degree rotation are uniform over these eight. On the CPU OpenCV
    moves three bytes at a time, in a fiftieth of the time that PyTorch's strided copies take.
    """
    if x_BHWC.device.type == "cpu" and x_BHWC.dtype == torch.uint8:
        return _turn_with_opencv(x_BHWC.numpy(), symmetry_B.tolist())
    for bit, dims in ((1, (2,)), (2, (1,))):
        flip = (symmetry_B & bit).bool()[:, None, None, None]
        x_BHWC = torch.where(flip, x_BHWC.flip(dims), x_BHWC)
    transpose = (symmetry_B & 4).bool()[:, None, None, None]
    return torch.where(transpose, x_BHWC.transpose(1, 2), x_BHWC)


def _turn_with_opencv(x_BHWC: np.ndarray, symmetry_B: Sequence[int]) -> Tensor:
    turned = np.empty_like(x_BHWC)
    for patch, symmetry, out in zip(x_BHWC, symmetry_B, turned, strict=True):
        flip = FLIPS.get(symmetry & 3)
        flipped = patch if flip is None else cv2.flip(patch, flip)
        out[...] = cv2.transpose(flipped) if symmetry & 4 else flipped
    return torch.from_numpy(turned)
