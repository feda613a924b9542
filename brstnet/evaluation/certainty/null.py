"""What chance alone gives: prediction and truth put out of step, all genes together.

Genes are so dependent that a number of positive genes says nothing by itself; the permutation null
keeps them together and says what number chance gives.

Shape letters: N spots, G genes, D draws. NaN: a gene whose truth is constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from brstnet import metrics
from brstnet.evaluation.certainty.uncertainty import CHUNK, nanmean, patient_table

OVERLAP = 0.4
"""A shift of the grid is used if so large a share of the spots falls on spots."""
MIN_SHIFTS = 50
"""Fewer usable shifts make no distribution."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Prediction and truth of one section, in any units.

    For the partial PCC give both without what the log total explains; for the torus null give
    `array_N2`, the spots' whole-numbered rows and columns on the array. Sections that were not
    judged on the same genes (each fold has its own panel) say which, in `genes`.
    """

    patient: str
    pred_NG: np.ndarray
    true_NG: np.ndarray
    array_N2: np.ndarray | None = None
    genes: pd.Index | None = None


@dataclass(frozen=True, kw_only=True)
class Null:
    """What was seen beside what chance gives.

    Attributes:
        kind: spots or torus.
        observed: median_pcc and genes_above_0, _0.1, _0.3, _0.5.
        drawn: the same for each draw, (D,) each.
        genes_undefined: genes whose truth is constant in every section.
    """

    kind: str
    observed: dict[str, float]
    drawn: dict[str, np.ndarray]
    genes_undefined: int

    def p(self, name: str) -> float:
        """One-sided p: (1 + draws at least as high) / (1 + draws) (Phipson and Smyth 2010)."""
        drawn = self.drawn[name]
        return float((1 + (drawn >= self.observed[name]).sum()) / (1 + len(drawn)))

    def table(self) -> pd.DataFrame:
        """A row per statistic: observed, the null's mean, sd and quantiles, p, kind, draws."""
        quantiles = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
        rows = {
            name: {
                "observed": seen,
                "null_mean": float(self.drawn[name].mean()),
                "null_sd": float(self.drawn[name].std()),
                **{
                    f"null_{q}": float(np.quantile(self.drawn[name], at))
                    for q, at in quantiles.items()
                },
                "p": self.p(name),
                "kind": self.kind,
                "draws": len(self.drawn[name]),
            }
            for name, seen in self.observed.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("statistic")


def permutation_null(
    sections: Sequence[Section],
    kind: Literal["spots", "torus"] = "spots",
    *,
    draws: int = 200,
    seed: int = 0,
) -> Null:
    """Median PCC and number of genes above thresholds, with truth and prediction put out of step.

    Within a section all genes are moved together, so that their dependence stays: what breaks is
    only the tie between prediction and truth. Each draw goes through everything that a score does:
    PCC per section, mean over a patient's sections, mean over patients, then median and counts.

    `spots` permutes the spots of a section freely. Neighbouring spots are alike, in truth and in
    prediction, and a free permutation makes them independent: its null is then too narrow, and its
    p too small (measured on smooth maps that know nothing of each other: p <= .05 for the median in
    19 to 33 % of cases). It tells that prediction and truth are tied at all, to anything.

    `torus` moves the truth as a whole: the section's grid is mirrored or not along either axis
    (both: half a turn) and shifted by a random step, leaving on one side and coming in on the
    other; spots that do not fall on a spot are left out (random shifts: Lotwick and Silverman 1982,
    JRSS B 44:406). The autocorrelation stays but at the seam, so its null is the fair one for maps
    (on the same maps: 2 to 7 %). It is a little wide, since it has fewer spots than the observed
    value (at least 40 %) and since short steps are drawn too, and it is rough where the tissue is
    small beside its patterns, as then only few steps are independent. Quote both; believe the
    larger p.

    Args:
        sections: all that the score is made of.
        kind: what is moved.
        draws: how many; p cannot be below 1 / (draws + 1).
        seed: the same seed gives the same draws. Memory does not grow with draws.

    Raises:
        ValueError: no section, another kind, or `torus` with positions missing, doubled or too
            scattered.
    """
    if not sections:
        raise ValueError("a null needs at least one section")
    if kind not in ("spots", "torus"):
        raise ValueError(f"kind must be spots or torus, got {kind}")
    generators = np.random.default_rng(seed).spawn(len(sections))
    mover = _Shuffled if kind == "spots" else _Shifted
    moved = [mover(s, g) for s, g in zip(sections, generators, strict=True)]
    patients = [s.patient for s in sections]

    places = _places(sections)
    observed_G = _per_gene([scored(s.pred_NG, s.true_NG) for s in sections], places, patients)
    step = max(1, CHUNK // (len(sections) * len(observed_G)))
    each = [
        _statistics(pcc_G)
        for start in range(0, draws, step)
        for pcc_G in _per_gene([m.draw(min(step, draws - start)) for m in moved], places, patients)
    ]
    return Null(
        kind=kind,
        observed=_statistics(observed_G),
        drawn={name: np.array([e[name] for e in each]) for name in each[0]},
        genes_undefined=int(np.isnan(observed_G).sum()),
    )


def _places(sections: Sequence[Section]) -> list[np.ndarray]:
    """For each section the columns of its genes among those of all sections."""
    known = [s.genes for s in sections if s.genes is not None]
    if not known:
        return [np.arange(s.true_NG.shape[1]) for s in sections]
    if len(known) < len(sections):
        raise ValueError("either all sections say which their genes are, or none does")
    union = pd.Index(dict.fromkeys(gene for genes in known for gene in genes))
    return [union.get_indexer(genes) for genes in known]


def _per_gene(
    sections: Sequence[np.ndarray], places: Sequence[np.ndarray], patients: Sequence[str]
) -> np.ndarray:
    """Scores of S sections (..., G of each) to the mean over patients of their means, (..., G)."""
    genes = 1 + max(int(at.max()) for at in places)
    table = np.full((*sections[0].shape[:-1], genes, len(sections)), np.nan)
    for s, (scores, at) in enumerate(zip(sections, places, strict=True)):
        table[..., at, s] = scores
    return nanmean(patient_table(table, patients))


def _statistics(pcc_G: np.ndarray) -> dict[str, float]:
    return {"median_pcc": metrics.nanmedian(pcc_G), **metrics.counts_above(pcc_G)}


def scored(pred_NG: np.ndarray, true_NG: np.ndarray) -> np.ndarray:
    """PCC (G,): NaN where the truth is constant, 0 where only the prediction is."""
    m = metrics.moments(np.asarray(pred_NG, np.float64), np.asarray(true_NG, np.float64))
    return np.where((m.sxx == 0) & (m.syy > 0), 0.0, metrics.correlation(m))


class _Shuffled:
    """A section whose spots are permuted: standardised once, then a product for each draw."""

    def __init__(self, section: Section, rng: np.random.Generator) -> None:
        self.pred_NG, self.true_NG = _unit(section.pred_NG), _unit(section.true_NG)
        self.undefined_G = ~self.true_NG.any(axis=0)
        self.rng = rng

    def draw(self, draws: int) -> np.ndarray:
        """PCC (D, G), each row under one permutation of the spots, the same for all genes."""
        order_DN = [self.rng.permutation(len(self.true_NG)) for _ in range(draws)]
        pcc_DG = np.stack([_products(self.pred_NG, self.true_NG[o]) for o in order_DN])
        return np.where(self.undefined_G, np.nan, pcc_DG)


def _products(x_NG: np.ndarray, y_NG: np.ndarray) -> np.ndarray:
    summed: np.ndarray = np.einsum("ng,ng->g", x_NG, y_NG)
    return summed


def _unit(values_NG: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and length 1; constant ones are exactly 0."""
    values_NG = np.asarray(values_NG, np.float64)
    centred = values_NG - values_NG[:1]
    centred -= centred.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    varies = (values_NG != values_NG[:1]).any(axis=0) & (length > 0)
    return np.where(varies, centred / np.where(varies, length, 1.0), 0.0)


class _Shifted:
    """A section whose truth is mirrored and shifted on a torus of the array's own size."""

    def __init__(self, section: Section, rng: np.random.Generator) -> None:
        if section.array_N2 is None:
            raise ValueError("the torus null needs the spots' array positions: give array_N2")
        self.rng = rng
        self.at_N2 = _whole_positions(section.array_N2)
        grid = np.full(self.at_N2.max(axis=0) + 1, -1)
        grid[tuple(self.at_N2.T)] = np.arange(len(self.at_N2))
        self.mirrored = [grid[::a, ::b] for a in (1, -1) for b in (1, -1)]
        self.steps_E3 = _usable_steps(self.mirrored, len(self.at_N2))
        pred_NG, true_NG = _unit(section.pred_NG), _unit(section.true_NG)
        self.pred, self.true = (pred_NG, pred_NG**2), (true_NG, true_NG**2)

    def draw(self, draws: int) -> np.ndarray:
        """PCC (D, G), each row under one random step, over the spots that fall on spots."""
        steps_D3 = self.steps_E3[self.rng.integers(len(self.steps_E3), size=draws)]
        source_DN = np.stack([self._source(*step) for step in steps_D3])
        to_DN, from_DN = source_DN >= 0, np.zeros(source_DN.shape, bool)
        for source, used in zip(source_DN, from_DN, strict=True):
            used[source[source >= 0]] = True
        n_D1 = to_DN.sum(axis=1, keepdims=True)
        mean_p, var_p = _mean_and_variance(self.pred, to_DN, n_D1)
        mean_t, var_t = _mean_and_variance(self.true, from_DN, n_D1)
        (pred_NG, _), (true_NG, _) = self.pred, self.true
        shared = [
            _products(pred_NG[to], true_NG[source[to]])
            for to, source in zip(to_DN, source_DN, strict=True)
        ]
        known = (var_p > 0) & (var_t > 0)
        length = np.sqrt(np.where(known, var_p * var_t, 1.0))
        pcc_DG = (np.stack(shared) / n_D1 - mean_p * mean_t) / length
        return np.where(known, np.clip(pcc_DG, -1, 1), np.where(var_t > 0, 0.0, np.nan))

    def _source(self, mirror: int, rows: int, columns: int) -> np.ndarray:
        """Which spot comes to lie on each spot, (N,); -1 for none."""
        moved = np.roll(self.mirrored[mirror], (rows, columns), axis=(0, 1))
        source: np.ndarray = moved[tuple(self.at_N2.T)]
        return source


def _mean_and_variance(
    values_and_squares: tuple[np.ndarray, np.ndarray], use_DN: np.ndarray, n_D1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Over the spots in use, (D, G) each. Columns have length 1, so rounding is 0 at 1e-14 / n."""
    mean, square = (use_DN.astype(np.float64) @ v / n_D1 for v in values_and_squares)
    variance = square - mean**2
    return mean, np.where(variance > 1e-14 / n_D1, variance, 0.0)


def _whole_positions(array_N2: np.ndarray) -> np.ndarray:
    """Rows and columns from 0, whole numbers."""
    at_N2 = np.rint(np.asarray(array_N2, np.float64)).astype(np.int64)
    if len(np.unique(at_N2, axis=0)) < len(at_N2):
        raise ValueError("two spots have the same array position: positions must be whole numbers")
    first: np.ndarray = at_N2.min(axis=0)
    return at_N2 - first


def _usable_steps(mirrored: Sequence[np.ndarray], spots: int) -> np.ndarray:
    """(mirror, row step, column step) that put enough spots on spots, (E, 3); not the identity.

    How many do is the correlation of the two outlines on the torus, by FFT.
    """
    outline = np.fft.fft2(mirrored[0] >= 0)
    shared = [np.fft.ifft2(outline * np.fft.fft2(m >= 0).conj()).real for m in mirrored]
    enough = np.rint(np.stack(shared)) >= OVERLAP * spots
    enough[0, 0, 0] = False
    if enough.sum() < MIN_SHIFTS:
        raise ValueError(
            f"only {enough.sum()} shifts of this section put {100 * OVERLAP:g} % of its {spots} "
            f"spots on spots, and {MIN_SHIFTS} are needed: use the spots null"
        )
    return np.argwhere(enough)
