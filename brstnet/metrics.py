"""Scores per gene. Arrays are (spots, genes), numpy or torch; NaN where a score is not defined.

What comes out of a score is defined or NaN, never infinite; what goes in must be finite.

Shape letters: N spots, G genes, S sections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

THRESHOLDS = (0.0, 0.1, 0.3, 0.5)
"""Genes are counted above these correlations (paper, Figs 2 and 3)."""


@dataclass(frozen=True)
class Moments:
    """Sums that a correlation needs, (G,) each, for `n` spots; to be merged over batches and ranks.

    `sxx`, `syy`, `sxy` are sums of products of deviations from the means `mx`, `my`.
    """

    n: float
    mx: Any
    my: Any
    sxx: Any
    syy: Any
    sxy: Any


def moments(x_NG: Any, y_NG: Any) -> Moments:
    """Moments of one batch, in two passes.

    Deviations are taken from the first row before anything else: a constant column then has a sum
    of squares of exactly 0, whatever its value.
    """
    x, y = x_NG - x_NG[:1], y_NG - y_NG[:1]
    mx, my = x.mean(0), y.mean(0)
    x, y = x - mx, y - my
    sums = ((x * x).sum(0), (y * y).sum(0), (x * y).sum(0))
    return Moments(len(x_NG), x_NG[0] + mx, y_NG[0] + my, *sums)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint sets together (Chan, Golub and LeVeque 1983)."""
    n = a.n + b.n
    if not a.n or not b.n:
        return b if b.n else a
    dx, dy, w = b.mx - a.mx, b.my - a.my, a.n * b.n / n
    return Moments(
        n,
        a.mx + dx * (b.n / n),
        a.my + dy * (b.n / n),
        a.sxx + b.sxx + dx * dx * w,
        a.syy + b.syy + dy * dy * w,
        a.sxy + b.sxy + dx * dy * w,
    )


def correlation(m: Moments) -> np.ndarray:
    """Pearson correlation (G,), float64, NaN where either side is constant."""
    sxx, syy, sxy = (np.asarray(part, np.float64) for part in (m.sxx, m.syy, m.sxy))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = sxy / (np.sqrt(sxx) * np.sqrt(syy))
    return np.where((sxx > 0) & (syy > 0), np.clip(r, -1, 1), np.nan)


def _pair(pred: Any, true: Any) -> tuple[np.ndarray, np.ndarray]:
    pred, true = np.asarray(pred, np.float64), np.asarray(true, np.float64)
    if pred.shape != true.shape or pred.ndim != 2 or not len(pred):
        raise ValueError(
            "predictions and truth must both be (spots, genes), with at least one spot, "
            f"got {pred.shape} and {true.shape}"
        )
    for name, side in (("predictions", pred), ("truth", true)):
        if not np.isfinite(side).all():
            row, column = np.argwhere(~np.isfinite(side))[0]
            raise ValueError(
                f"{name} must be finite, but {int((~np.isfinite(side)).sum())} values are not, the "
                f"first ({side[row, column]}) of spot {row} and gene {column}, counted from 0"
            )
    return pred, true


def pearson(pred: Any, true: Any) -> np.ndarray:
    """Pearson correlation per gene, (N, G) and (N, G) to (G,) float64; NaN where one is constant.

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or a value is not finite.
    """
    return correlation(moments(*_pair(pred, true)))


def spot_pearson(pred: Any, true: Any) -> np.ndarray:
    """Pearson correlation per spot over the genes, (N, G) and (N, G) to (N,) float64.

    In standardised units it asks which genes are high here for what they are elsewhere; in log
    units the genes' means alone give a high value (the training mean's is its control).

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or a value is not finite.
    """
    pred, true = _pair(pred, true)
    return correlation(moments(pred.T, true.T))


def spearman(pred: Any, true: Any) -> np.ndarray:
    """Spearman's rank correlation per gene, (G,): Pearson's of the ranks, ties at their mean.

    NaN where one side is constant.

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or a value is not finite.
    """
    ranks = (stats.rankdata(side, axis=0) for side in _pair(pred, true))
    return correlation(moments(*ranks))


def concordance(pred: Any, true: Any) -> np.ndarray:
    """Lin's concordance correlation per gene, (G,): 2 sxy / (sxx + syy + (mx - my)^2).

    Population moments (Lin 1989, Biometrics 45:255, with
    1/n). It is the PCC times how well means and spreads agree: 1 only on the diagonal. 0 where the
    prediction is constant; NaN where the truth is, of which it says nothing.

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or a value is not finite.
    """
    m = moments(*_pair(pred, true))
    apart = m.sxx + m.syy + m.n * (m.mx - m.my) ** 2
    return np.where(m.syy > 0, 2 * m.sxy / np.where(m.syy > 0, apart, 1), np.nan)


def r2_against(pred: Any, true: Any, baseline_G: Any) -> np.ndarray:
    """1 - SSE of the prediction / SSE of a baseline that is fixed beforehand, (G,).

    With the training mean as the baseline it is the out-of-sample R2 (Campbell and Thompson 2008,
    Rev. Financ. Stud. 21:1509, eq. 1): above 0 is better than the training mean. (R2 against the
    mean of the spots that are judged would compare with a predictor that has seen them.) NaN where
    the baseline is exact.

    Args:
        pred: (N, G).
        true: (N, G).
        baseline_G: one value a gene, in the same units; 0 in standardised units.

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or a value is not finite.
    """
    pred, true = _pair(pred, true)
    baseline_G = np.broadcast_to(np.asarray(baseline_G, np.float64), true.shape[1:])
    mine, its = ((true - pred) ** 2).sum(axis=0), ((true - baseline_G) ** 2).sum(axis=0)
    return np.where(its > 0, 1 - mine / np.where(its > 0, its, 1), np.nan)


def partial_pearson(pred: Any, true: Any, given: Any) -> np.ndarray:
    """Correlation per gene (G,) of what is left once `given` (N,) is regressed out of both sides.

    The depth control: with `given` the log of the spots' total counts it says what a model knows
    beyond the library size. NaN where either side is constant or wholly explained by `given`; a
    `given` that is constant explains nothing, and leaves the plain correlation.

    Raises:
        ValueError: the shapes differ or are not two-dimensional, or a value is not finite.
    """
    pred, true = _pair(pred, true)
    given = np.asarray(given, np.float64).ravel()
    if len(given) != len(pred):
        raise ValueError(f"given must have one value per spot ({len(pred)}), got {len(given)}")
    given = np.broadcast_to(given[:, None], pred.shape)
    r_pt = pearson(pred, true)
    r_pz, r_tz = (np.nan_to_num(pearson(side, given)) for side in (pred, true))
    left = (1 - r_pz**2) * (1 - r_tz**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        partial = (r_pt - r_pz * r_tz) / np.sqrt(left)
    return np.where(left > 1e-12, np.clip(partial, -1, 1), np.nan)


def residual(y_NG: np.ndarray, given_N: np.ndarray) -> np.ndarray:
    """What is left of each column (N, G) once `given_N` is regressed out; 0 where nothing is.

    Correlated, two residuals give the partial correlation. Deviations are taken from the first row
    first, so that a constant leaves exactly 0.
    """
    y_NG, given_N = y_NG - y_NG[:1], given_N - given_N[0]
    y_NG, given_N = y_NG - y_NG.mean(axis=0), given_N - given_N.mean()
    spread = float(given_N @ given_N)
    if spread == 0:
        return y_NG
    left = y_NG - np.outer(given_N, given_N @ y_NG / spread)
    nothing = (left**2).sum(axis=0) <= 1e-12 * (y_NG**2).sum(axis=0)
    return np.where(nothing, 0.0, left)


def mean_absolute_error(pred: Any, true: Any) -> np.ndarray:
    """Mean absolute error per gene, (G,)."""
    pred, true = _pair(pred, true)
    error: np.ndarray = np.abs(pred - true).mean(axis=0)
    return error


def root_mean_square_error(pred: Any, true: Any) -> np.ndarray:
    """Root mean square error per gene, (G,)."""
    pred, true = _pair(pred, true)
    error: np.ndarray = np.sqrt(((pred - true) ** 2).mean(axis=0))
    return error


def fold_score(sections: Sequence[Moments], patients: Sequence[str]) -> float:
    """The score of a fold: median over genes of the mean over patients of the section PCC.

    Args:
        sections: moments of the panel's genes, predictions as x, truth as y, one per section.
        patients: the patient of each section. A patient counts once, however many sections.

    A gene whose truth is constant on a section says nothing there and is left out. A constant
    prediction is a model that knows nothing, and counts as 0: left out, it would be rewarded.
    NaN if no gene varies anywhere.
    """
    per_section = [_scored(m) for m in sections]
    by_patient = {
        patient: [r for r, who in zip(per_section, patients, strict=True) if who == patient]
        for patient in dict.fromkeys(patients)
    }
    per_patient = [_nanmean(np.stack(rs)) for rs in by_patient.values()]
    return nanmedian(_nanmean(np.stack(per_patient)))


def _scored(m: Moments) -> np.ndarray:
    r = correlation(m)
    silent = (np.asarray(m.sxx) == 0) & (np.asarray(m.syy) > 0)
    return np.where(silent, 0.0, r)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where nothing is left, and no warning."""
    known = np.isfinite(values)
    n = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def nanmedian(values: Any) -> float:
    """Median of what is not NaN; NaN of nothing."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def counts_above(pcc: Any) -> Mapping[str, int]:
    """How many genes lie above each of the paper's thresholds; NaN lies above none."""
    pcc = np.asarray(pcc, np.float64)
    return {f"genes_above_{t:g}": int((pcc > t).sum()) for t in THRESHOLDS}
