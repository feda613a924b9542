"""Everything that a fold learns from its training spots before the first step, and nothing else.

Gene filter, panel, target and image statistics are fitted here on the fold's training sections,
stored in the checkpoint, and applied to everyone else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from brstnet.config import Protocol, Settings
from brstnet.data.store import Store
from brstnet.training.folds import Fold

MAIN, AUX = "main", "aux"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What was fitted, and on which sections.

    `genes` has a row per predicted gene, in the order of the model's outputs (main head, then
    AuxNet's): index gene id; symbol; role (main or aux); panel (is it scored?); mean_count (raw, on
    the training spots); mean, std (of the target); depth_slope, depth_intercept (target as a linear
    function of the log of the spot's total counts, its depth: the depth control's predictor).
    `depth_mean` and `depth_std` are those of the training spots' depth.
    """

    genes: pd.DataFrame
    target: str
    median_total: float
    depth_mean: float = 0.0
    depth_std: float = 1.0
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    sections: tuple[str, ...]
    spots: int

    @property
    def main_genes(self) -> int:
        """Genes of the main head."""
        return int((self.genes["role"] == MAIN).sum())

    @property
    def aux_genes(self) -> int:
        """Genes of AuxNet; 0 without it."""
        return int((self.genes["role"] == AUX).sum())

    def count_scale(self, totals: np.ndarray) -> np.ndarray:
        """What raw counts are multiplied by before the logarithm, (N,): 1 for log_counts."""
        return count_scale(totals, self.target, self.median_total)

    def depth(self, totals: np.ndarray) -> np.ndarray:
        """Depth of spots with these totals (N,), standardised as on the training spots."""
        depth: np.ndarray = (np.log1p(totals) - self.depth_mean) / self.depth_std
        return depth

    def facts(self) -> dict[str, Any]:
        """Everything but the gene table, for JSON."""
        return {
            "target": self.target,
            "median_total": self.median_total,
            "depth_mean": self.depth_mean,
            "depth_std": self.depth_std,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "sections": list(self.sections),
            "spots": self.spots,
        }


def training_rows(spots: pd.DataFrame, protocol: Protocol) -> np.ndarray:
    """Which spots may train: those whose patch is not too white, (N,) bool."""
    rows: np.ndarray = (spots["white_fraction"] <= protocol.max_white_fraction).to_numpy()
    return rows


def drawn_rows(store: Store, fold: Fold, settings: Settings) -> np.ndarray:
    """Which of a fold's training spots batches are drawn from, (N,) bool.

    Those of `training_rows` with at least `training.min_counts` counts. What a `Fitted` holds does
    not follow from this choice: gene filter, panel, median total, target, depth and image
    statistics are those of all `training_rows`, so that trials which differ in it are scored on the
    same targets in the same units, and share a frozen backbone's features. The mean of the targets
    drawn is then a little off zero, which the heads' biases learn. The components of
    `training.target_rank` alone are those of the spots drawn: what is learnt, not what is scored.

    Raises:
        ValueError: fewer than two spots are left.
    """
    spots, least = store.spots(fold.train), settings.training.min_counts
    allowed = training_rows(spots, settings.protocol)
    rows: np.ndarray = allowed & (spots["total_counts"] >= least).to_numpy()
    if rows.sum() < 2:
        richest = int(spots["total_counts"][allowed].max())
        raise ValueError(
            f"{store.path}: {fold.name} has {rows.sum()} training spots with at least "
            f"{least} counts, but at least 2 are needed: lower training.min_counts (the richest "
            f"spot has {richest})"
        )
    return rows


def count_scale(totals: np.ndarray, target: str, median_total: float) -> np.ndarray:
    """Factor (N,) that brings each spot's total to the training median; 1 for log_counts."""
    scale: np.ndarray = (
        median_total / totals if target == "log_normalised" else np.ones(len(totals))
    )
    return scale


def transform(
    counts: sparse.csr_matrix, totals: np.ndarray, target: str, median_total: float
) -> sparse.csr_matrix:
    """Raw counts to target units, CSR (N, G) float64: log1p(count), scaled to the median or not.

    Args:
        counts: raw, (N, G).
        totals: each spot's total over all genes, (N,).
        target: log_normalised or log_counts.
        median_total: of the training spots.
    """
    scale = count_scale(totals, target, median_total)
    scaled = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    scaled.data *= np.repeat(scale, np.diff(scaled.indptr))
    return scaled.log1p()


def target_scale(fitted: Fitted, aux_target: str) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of each target, (G,) float32: model output * scale + shift = log units.

    `aux_target: log` leaves the auxiliary targets unstandardised (the authors' code).
    """
    mean = fitted.genes["mean"].to_numpy(np.float32, copy=True)
    std = fitted.genes["std"].to_numpy(np.float32, copy=True)
    if aux_target == "log":
        mean[fitted.main_genes :], std[fitted.main_genes :] = 0, 1
    return mean, std


def fit_statistics(store: Store, fold: Fold, settings: Settings, *, images: bool = True) -> Fitted:
    """Fit a fold's statistics on its training sections.

    Args:
        store: the open store.
        fold: whose training sections.
        settings: the protocol's filters, and which genes.
        images: whether the colours' are needed too; no patch is read without.

    Raises:
        ValueError: no spot or too few genes are left to train on.
    """
    protocol = settings.protocol
    spots = store.spots(fold.train)
    rows = training_rows(spots, protocol)
    if not rows.any():
        raise ValueError(
            f"{store.path}: fold {fold.number} has no training spot with a white fraction of at "
            f"most {protocol.max_white_fraction}: raise protocol.max_white_fraction"
        )
    counts, totals = store.counts(fold.train)[rows], spots["total_counts"].to_numpy(float)[rows]
    columns = ranked_genes(counts, protocol)
    _check_enough(store, columns, settings)
    if not settings.training.auxnet:
        columns = columns[: settings.training.genes]
    median_total = float(np.median(totals))
    units = transform(counts[:, columns], totals, protocol.target, median_total)
    mean, std = column_mean_std(units)
    slope, intercept = _depth_fit(units, mean, totals)
    order = np.arange(len(columns))
    genes = store.genes.iloc[columns].assign(
        role=np.where(order < settings.training.genes, MAIN, AUX),
        panel=order < protocol.panel_size,
        mean_count=column_mean(counts[:, columns]),
        mean=mean,
        std=std,
        depth_slope=slope,
        depth_intercept=intercept,
    )
    image_mean, image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if images:
        image_mean, image_std = image_statistics(store, fold.train, rows)
    depth = np.log1p(totals)
    return Fitted(
        genes=genes,
        target=protocol.target,
        median_total=median_total,
        depth_mean=float(depth.mean()),
        depth_std=float(depth.std()) or 1.0,
        image_mean=image_mean,
        image_std=image_std,
        sections=fold.train,
        spots=int(rows.sum()),
    )


def ranked_genes(counts: sparse.csr_matrix, protocol: Protocol) -> np.ndarray:
    """Columns of the genes that pass the filter, by falling mean count, ties in store order.

    Genes that never change on the training spots cannot be standardised, nor learned: they go too.
    """
    mean, expressed = column_mean(counts), column_mean(counts > 0)
    highest = counts.max(axis=0).toarray().ravel()
    varies = highest > counts.min(axis=0).toarray().ravel()
    passing = np.flatnonzero((mean > 0) & (expressed >= protocol.min_gene_fraction) & varies)
    return passing[np.argsort(-mean[passing], kind="stable")]


def _check_enough(store: Store, columns: np.ndarray, settings: Settings) -> None:
    for name, wanted in (
        ("protocol.panel_size", settings.protocol.panel_size),
        ("training.genes", settings.training.genes),
    ):
        if len(columns) < wanted:
            raise ValueError(
                f"{store.path}: {name} is {wanted}, but only {len(columns)} genes pass the filter "
                "on the training spots: lower it, or lower protocol.min_gene_fraction"
            )


def column_mean(counts: sparse.csr_matrix) -> np.ndarray:
    """Mean of each column of whole numbers, (G,).

    Summed before it is divided: scipy's own mean rounds each entry, which parts ties and misses a
    fraction that is met exactly.
    """
    mean: np.ndarray = np.asarray(counts.sum(axis=0)).ravel() / counts.shape[0]
    return mean


def column_mean_std(values: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (population) of each column, in two passes; (G,) each."""
    n = values.shape[0]
    mean = np.asarray(values.mean(axis=0)).ravel()
    columns = values.tocsc()
    stored = np.diff(columns.indptr)
    apart = columns.data - np.repeat(mean, stored)
    squares = np.add.reduceat(np.append(apart**2, 0.0), columns.indptr[:-1]) * (stored > 0)
    return mean, np.sqrt((squares + (n - stored) * mean**2) / n)


def _depth_fit(
    units: sparse.csr_matrix, mean: np.ndarray, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of each gene's target on log1p(total): slope and intercept, (G,) each."""
    depth = np.log1p(totals)
    centred = depth - depth.mean()
    spread = float(centred @ centred)
    slope = (units.T @ centred) / spread if spread > 0 else np.zeros(units.shape[1])
    return slope, mean - slope * depth.mean()


def image_statistics(
    store: Store, sections: Sequence[str], rows: np.ndarray
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each colour channel in 0..1 over the training patches' pixels.

    Exact, from a histogram a channel. (The authors' code averages the deviations within patches,
    which is 7 to 11 % smaller.)
    """
    histogram = np.zeros((3, 256))
    start = 0
    for name in sections:
        patches = store.patches(name)
        for i in np.flatnonzero(rows[start : start + len(patches)]):
            for channel in range(3):
                pixels = patches[i, :, :, channel].ravel()
                histogram[channel] += np.bincount(pixels, minlength=256)
        start += len(patches)
    level = np.arange(256) / 255
    weight = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weight @ level
    std = np.sqrt(weight @ level**2 - mean**2).clip(1 / 255)
    red, green, blue = (float(m) for m in mean)
    return (red, green, blue), (float(std[0]), float(std[1]), float(std[2]))
