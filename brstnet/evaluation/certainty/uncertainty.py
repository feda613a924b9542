"""How far a score can be believed: intervals and tests over patients.

The unit is the patient: all sections and spots of a patient go together, since what differs from
patient to patient (tumour, staining, tissue quality) is shared by all their spots. What chance
alone gives is in `null`.

Shape letters: G genes, S sections, P patients. A NaN score is one that is not
defined (the truth is constant): it is left out, and counted. A prediction that is constant must
come in as 0, as in `metrics.fold_score`: left out, it would be rewarded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import comb
from typing import Literal

import numpy as np
from scipy import stats

Statistic = Callable[[np.ndarray], np.ndarray]
"""Tables of scores (..., G, P) to one number each (...), so that many draws are taken at once."""

MIN_UNITS = 5
"""Fewer patients give no interval. (With 3, a nominal 95 % percentile interval holds the truth
about 3 times in 4: tests/test_uncertainty.py.)"""
EXHAUSTIVE = 12
"""Up to so many patients all 2^P exchanges of two models are tried, rather than a sample."""
STNET_POSITIVE, STNET_PATIENTS = 20, 23
"""ST-Net counts genes with a positive correlation in so many held-out patients (He et al. 2020)."""
CHUNK = 2**21
"""Numbers of a resampled table that are held at once (16 MiB)."""


# Statistics of a table of genes and patients ------------------------------------------------------


def patient_table(values_S: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Scores per section (..., S) to scores per patient (..., P): the mean of a patient's sections.

    Patients come in the order in which they first appear in `patients` (one a section). NaN where a
    gene is defined in none of the patient's sections.
    """
    who = np.asarray(patients)
    names = dict.fromkeys(patients)
    return np.stack([nanmean(values_S[..., who == name]) for name in names], axis=-1)


def median_of_means(scores: np.ndarray) -> np.ndarray:
    """Median over genes of the mean over patients, (..., G, P) to (...): the score of a fold."""
    return _nanmedian(nanmean(scores))


def mean_of_medians(scores: np.ndarray) -> np.ndarray:
    """Mean over patients of the median over genes, (..., G, P) to (...)."""
    return nanmean(_nanmedian(np.swapaxes(scores, -1, -2)))


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left, and no warning."""
    known = ~np.isnan(values)
    if known.all() and values.shape[-1]:
        return np.asarray(values.mean(axis=-1))
    n = known.sum(axis=-1)
    total = np.where(known, values, 0).sum(axis=-1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def _nanmedian(values: np.ndarray) -> np.ndarray:
    """Median over the last axis without NaN; NaN where nothing is left, and no warning."""
    if values.shape[-1] and not np.isnan(values).any():
        return np.asarray(np.median(values, axis=-1))
    ordered = np.sort(values, axis=-1)  # NaN goes last
    n = (~np.isnan(values)).sum(axis=-1, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(n - 1, 0) // 2, axis=-1)
    high = np.take_along_axis(ordered, np.minimum(n // 2, values.shape[-1] - 1), axis=-1)
    return np.where(n > 0, (low + high) / 2, np.nan)[..., 0]


# Bootstrap over patients --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How to resample.

    Attributes:
        level: nominal coverage, such as 0.95.
        method: `percentile` (Efron and Tibshirani 1993, ch. 13); `expanded`, the same with levels
            that make up for few units as Student's t does (Hesterberg 2015, Am. Stat. 69:371,
            section 5.3): percentile intervals are too narrow by about sqrt((n-1)/n) and by t
            against z; or `bca`, corrected for bias and skewness (Efron 1987, JASA 82:171).
            Measured coverage of a nominal 95 %, 23 normal patients (skewed ones): percentile .95
            (.91), expanded .96 (.92), bca .93 (.87); 8 patients: .87 (.84), .93 (.90), .85 (.83).
        draws: resamples.
        seed: of the resampling; the same seed gives the same interval.
    """

    level: float = 0.95
    method: Literal["percentile", "expanded", "bca"] = "expanded"
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a ValueError that says which setting cannot be."""
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")
        if self.method not in ("percentile", "expanded", "bca"):
            raise ValueError(f"method must be percentile, expanded or bca, got {self.method}")
        if self.draws < 100:
            raise ValueError(f"draws must be at least 100, got {self.draws}")


USUAL = Bootstrap()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the interval that it was given, NaN to NaN with the reason where there is none.

    Attributes:
        value: the statistic of the whole table.
        low: lower end.
        high: upper end.
        unit: what was resampled.
        units: how many there are.
        how: level, method, draws and seed.
        genes_undefined: genes without any score.
        why: the reason why there is no interval; empty where there is one.
    """

    value: float
    low: float
    high: float
    unit: str
    units: int
    how: Bootstrap
    genes_undefined: int
    why: str = ""

    def line(self) -> str:
        """In words, for a table or a figure."""
        if self.why:
            return f"{self.value:.3f} ({self.why})"
        interval = f"{100 * self.how.level:g} % interval {self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({interval} over {several(self.units, self.unit)})"


def bootstrap_patients(
    scores_GP: np.ndarray, statistic: Statistic = median_of_means, how: Bootstrap = USUAL
) -> Interval:
    """Interval of any statistic of a table of genes and patients, patients resampled whole.

    With fewer than 5 patients there is none, and the result says so.

    Args:
        scores_GP: from `patient_table`; NaN where a gene is not defined.
        statistic: what to know about the table, such as `median_of_means`.
        how: level, method, draws, seed.
    """
    return _bootstrap(scores_GP, statistic, how, "patient")


def bootstrap_sections_of_one_patient(
    scores_GS: np.ndarray, statistic: Statistic = median_of_means, how: Bootstrap = USUAL
) -> Interval:
    """How much a score depends on which sections of this one patient were cut, (G, S).

    It says nothing about another patient: never to be given as the uncertainty of a model.
    """
    return _bootstrap(scores_GS, statistic, how, "section of one patient")


def _bootstrap(scores_GP: np.ndarray, statistic: Statistic, how: Bootstrap, unit: str) -> Interval:
    scores_GP = _table(scores_GP)
    units = scores_GP.shape[1]
    value = float(statistic(scores_GP))
    low = high = np.nan
    why = _too_few(units, unit)
    if not why:
        draws_D = resample(scores_GP, statistic, how)
        left_out = _jackknife(scores_GP, statistic) if how.method == "bca" else np.zeros(units)
        low, high = _ends(draws_D, value, left_out, how)
    return Interval(
        value=value,
        low=low,
        high=high,
        unit=unit,
        units=units,
        how=how,
        genes_undefined=int(np.isnan(scores_GP).all(axis=1).sum()),
        why=why,
    )


def _table(scores_GP: np.ndarray) -> np.ndarray:
    table = np.asarray(scores_GP, np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores must be (genes, patients), at least one each, got {table.shape}")
    return table


def _too_few(units: int, unit: str) -> str:
    if units >= MIN_UNITS:
        return ""
    few = several(units, unit)
    return f"no interval: {few}, and fewer than {MIN_UNITS} cannot give one"


def several(units: int, unit: str) -> str:
    """Such as "1 patient" and "3 sections of one patient"."""
    what, *rest = unit.split(" ", 1)
    return " ".join([f"{units} {what}{'' if units == 1 else 's'}", *rest])


def resample(scores_GP: np.ndarray, statistic: Statistic, how: Bootstrap) -> np.ndarray:
    """The statistic of `how.draws` tables of as many patients, drawn with replacement, (D,)."""
    patients = scores_GP.shape[1]
    rows_DP = np.random.default_rng(how.seed).integers(patients, size=(how.draws, patients))
    scores_PG = np.ascontiguousarray(scores_GP.T)
    parts = [statistic(np.swapaxes(scores_PG[r], 1, 2)) for r in _chunks(rows_DP, scores_GP.size)]
    return np.concatenate(parts)


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    step = max(1, CHUNK // size)
    return (rows[i : i + step] for i in range(0, len(rows), step))


def _jackknife(scores_GP: np.ndarray, statistic: Statistic) -> np.ndarray:
    """The statistic without each of the patients in turn, (P,)."""
    left_out = [statistic(np.delete(scores_GP, p, axis=1)) for p in range(scores_GP.shape[1])]
    return np.array(left_out, np.float64)


def _ends(
    draws_D: np.ndarray, value: float, left_out_P: np.ndarray, how: Bootstrap
) -> tuple[float, float]:
    """Both ends of the interval; NaN if the statistic is not defined on most draws."""
    known = draws_D[np.isfinite(draws_D)]
    if len(known) * 2 < len(draws_D) or not np.isfinite(value):
        return np.nan, np.nan
    tail, n = (1 - how.level) / 2, len(left_out_P)
    if how.method == "expanded":
        tail = float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(tail, n - 1)))
    tails = np.array([tail, 1 - tail])
    if how.method == "bca":
        tails = _bca_tails(tails, known, value, left_out_P)
    low, high = np.quantile(known, tails)
    return float(low), float(high)


def _bca_tails(
    tails: np.ndarray, draws_D: np.ndarray, value: float, left_out_P: np.ndarray
) -> np.ndarray:
    """Corrected levels (Efron and Tibshirani 1993, eqs 14.10, 14.14, 14.15).

    Draws equal to the value count by half. A bias beyond all draws is taken as one draw's. Without
    spread among the left-out values there is no skewness to correct.
    """
    below = ((draws_D < value).sum() + 0.5 * (draws_D == value).sum()) / len(draws_D)
    bias = stats.norm.ppf(np.clip(below, 1 / (len(draws_D) + 1), 1 - 1 / (len(draws_D) + 1)))
    apart = np.nanmean(left_out_P) - left_out_P[np.isfinite(left_out_P)]
    spread = (apart**2).sum() ** 1.5
    skew = (apart**3).sum() / (6 * spread) if spread > 0 else 0.0
    z = bias + stats.norm.ppf(tails)
    corrected: np.ndarray = stats.norm.cdf(bias + z / (1 - skew * z))
    return corrected


# Two models on the same patients ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Model a less model b.

    Attributes:
        interval: the difference and its interval, patients resampled for both models at once.
        p: two-sided, of the exchange test: how often models that are exchanged in a random set of
            patients differ as much (Fisher 1935; exact for any number of patients, however few).
        smallest_p: the least that so many patients could give.
        scores_dropped: (gene, patient) pairs that only one of the models has.
    """

    interval: Interval
    p: float
    smallest_p: float
    scores_dropped: int


def paired_bootstrap(
    a_GP: np.ndarray,
    b_GP: np.ndarray,
    statistic: Statistic = median_of_means,
    how: Bootstrap = USUAL,
) -> Difference:
    """How much better model a is than model b, on the same genes and the same patients.

    The p is not read off the bootstrap: with some 20 patients that is too small (measured: 8 %
    below 5 % with 12 patients), while the exchange test keeps its size. A score that only one of
    the two has is dropped from both, and counted.

    Raises:
        ValueError: the tables differ in shape.
    """
    a_GP, b_GP = _table(a_GP), _table(b_GP)
    if a_GP.shape != b_GP.shape:
        raise ValueError(
            f"both models need the same genes and patients, got {a_GP.shape} and {b_GP.shape}"
        )
    unpaired = np.isnan(a_GP) != np.isnan(b_GP)
    a_GP, b_GP = (np.where(unpaired, np.nan, side) for side in (a_GP, b_GP))
    genes = len(a_GP)

    def difference(both: np.ndarray) -> np.ndarray:
        return statistic(both[..., :genes, :]) - statistic(both[..., genes:, :])

    both = np.concatenate([a_GP, b_GP])
    interval = _bootstrap(both, difference, how, "patient")
    patients = a_GP.shape[1]
    return Difference(
        interval=interval,
        p=_exchange_p(a_GP, b_GP, difference, how),
        smallest_p=max(2.0 / 2**patients, 1 / (how.draws + 1) if patients > EXHAUSTIVE else 0.0),
        scores_dropped=int(unpaired.sum()),
    )


def _exchange_p(a_GP: np.ndarray, b_GP: np.ndarray, difference: Statistic, how: Bootstrap) -> float:
    """Share of exchanges that differ as much; +1 above and below where they are a sample."""
    patients, observed = a_GP.shape[1], difference(np.concatenate([a_GP, b_GP]))
    if not np.isfinite(observed):
        return float("nan")
    exact = patients <= EXHAUSTIVE
    rng = np.random.default_rng([how.seed, 1])
    exchanged_DP = (
        np.array(list(product((False, True), repeat=patients)))
        if exact
        else rng.random((how.draws, patients)) < 0.5
    )
    drawn = [
        difference(np.concatenate([np.where(e, b_GP, a_GP), np.where(e, a_GP, b_GP)], axis=1))
        for e in (c[:, None, :] for c in _chunks(exchanged_DP, 2 * a_GP.size))
    ]
    as_far = int((np.abs(np.concatenate(drawn)) >= abs(observed) - 1e-12).sum())
    return as_far / len(exchanged_DP) if exact else (1 + as_far) / (1 + len(exchanged_DP))


# Tests per gene over patients ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GeneTests:
    """A one-sided test per gene that its correlation is above 0 in patients, (G,) each.

    Attributes:
        test: sign or wilcoxon.
        positive_G: patients with a positive score.
        patients_G: patients with a score; a score of 0 counts here, and is not positive.
        p_G: of the test; NaN where no patient has a score.
        holm_G: adjusted so that the chance of any false gene is bounded (Holm 1979).
        bh_G: adjusted so that the share of false genes is bounded (Benjamini and Hochberg 1995;
            holds under the positive dependence that genes have).
    """

    test: str
    positive_G: np.ndarray
    patients_G: np.ndarray
    p_G: np.ndarray
    holm_G: np.ndarray
    bh_G: np.ndarray

    @property
    def genes_undefined(self) -> int:
        """Genes that no patient has a score of."""
        return int(np.isnan(self.p_G).sum())

    def found(self, alpha: float = 0.05) -> dict[str, int]:
        """How many genes are significant, by the way of adjustment."""
        by_name = {"holm": self.holm_G, "bh": self.bh_G, "unadjusted": self.p_G}
        return {name: int((p <= alpha).sum()) for name, p in by_name.items()}


def gene_tests(scores_GP: np.ndarray, test: Literal["sign", "wilcoxon"] = "sign") -> GeneTests:
    """Is a gene's correlation above 0 in patients? One-sided, with Holm and Benjamini-Hochberg.

    Args:
        scores_GP: from `patient_table`.
        test: the exact binomial sign test (as ST-Net's), or Wilcoxon's signed rank test, which has
            more power and assumes scores that are symmetric about their median (exact up to 50
            patients without ties or zeros; zeros by Pratt's way).

    Raises:
        ValueError: another test is named.
    """
    if test not in ("sign", "wilcoxon"):
        raise ValueError(f"test must be sign or wilcoxon, got {test}")
    scores_GP = _table(scores_GP)
    known_G, positive_G = (~np.isnan(scores_GP)).sum(axis=1), (scores_GP > 0).sum(axis=1)
    p_G = stats.binom.sf(positive_G - 1, known_G, 0.5)
    if test == "wilcoxon":
        p_G = np.array([_wilcoxon(row[~np.isnan(row)]) for row in scores_GP])
    p_G = np.where(known_G > 0, p_G, np.nan)
    return GeneTests(
        test=test,
        positive_G=positive_G,
        patients_G=known_G,
        p_G=p_G,
        holm_G=holm(p_G),
        bh_G=benjamini_hochberg(p_G),
    )


def _wilcoxon(scores_P: np.ndarray) -> float:
    if not np.any(scores_P):
        return 1.0 if len(scores_P) else float("nan")
    return float(stats.wilcoxon(scores_P, zero_method="pratt", alternative="greater").pvalue)


def holm(p_G: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (1979), (G,); NaN stays NaN and is no test."""
    adjusted = np.full(len(p_G), np.nan)
    known = np.flatnonzero(~np.isnan(p_G))
    order = known[np.argsort(p_G[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_G[order] * factors), 1.0)
    return adjusted


def benjamini_hochberg(p_G: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's adjustment (1995), (G,); NaN stays NaN and is no test."""
    adjusted = np.full(len(p_G), np.nan)
    known = ~np.isnan(p_G)
    if known.any():
        adjusted[known] = stats.false_discovery_control(p_G[known], method="bh")
    return adjusted


@dataclass(frozen=True, kw_only=True)
class StnetCount:
    """ST-Net's statistic: genes with a positive correlation in nearly all held-out patients.

    Attributes:
        genes: how many genes pass.
        passed_G: which do.
        required_G: patients that must be positive, given how many have a score; 0 where there are
            too few patients for any number of them to do.
        line: the rule in words.
    """

    genes: int
    passed_G: np.ndarray
    required_G: np.ndarray
    line: str


def stnet_count(scores_GP: np.ndarray) -> StnetCount:
    """Genes that are positive in >= 20 of 23 patients (He et al. 2020, Nat. Biomed. Eng. 4:827).

    With another number of patients the number that must be positive is the least with no larger
    chance under a fair coin than that of 20 of 23, which is exactly 2^-12: 21 of 24, 12 of 12, and
    below 12 patients none. The paper's own count holds for 23 only; the line says which it is.
    """
    scores_GP = _table(scores_GP)
    known_G = (~np.isnan(scores_GP)).sum(axis=1)
    required_G = np.array([stnet_required(int(n)) or 0 for n in known_G])
    passed_G = (required_G > 0) & ((scores_GP > 0).sum(axis=1) >= required_G)
    patients = scores_GP.shape[1]
    required = stnet_required(patients)
    rule = f"positive in >= {required} of {patients} patients"
    if patients != STNET_PATIENTS:
        rule += f" (as unlikely by chance as ST-Net's >= {STNET_POSITIVE} of {STNET_PATIENTS})"
    if required is None:
        rule = f"{patients} patients are too few for ST-Net's count: it needs at least 12"
    return StnetCount(
        genes=int(passed_G.sum()), passed_G=passed_G, required_G=required_G, line=rule
    )


def stnet_required(patients: int) -> int | None:
    """Least number of positive patients with P(at least so many) <= P(>= 20 of 23); else None.

    In whole numbers, since 12 of 12 meets 2^-12 exactly.
    """
    allowed = sum(comb(STNET_PATIENTS, k) for k in range(STNET_POSITIVE, STNET_PATIENTS + 1))
    tail, required = 0, None
    for positive in range(patients, -1, -1):
        tail += comb(patients, positive)
        if tail << STNET_PATIENTS > allowed << patients:
            break
        required = positive
    return required
