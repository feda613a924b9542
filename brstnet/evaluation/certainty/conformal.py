"""Intervals that hold for a patient nobody has seen, from errors grouped by patient.

Spots of a patient are alike, so that a quantile over all spots is too narrow for the next patient.
Hierarchical conformal prediction (Dunn, Wasserman and Ramdas 2023, JASA 118:2491, who pose it; Lee,
Barber and Willett, arXiv:2306.06342, whose weights these are) takes whole patients as exchangeable:
of K patients, each spot of the k-th weighs 1 / ((K + 1) N_k), the patient to come 1 / (K + 1), at
infinity. A gene's half-width at a level is the smallest error at which the weights reach the level.
A spot of a new patient then lies within it with at least that probability, over patients. K
patients can promise K / (K + 1) at most: beyond, the half-width is infinite, and just there it is
the largest error of all, so that with few patients an interval holds more than it promises.

That holds exactly for a model that was fitted without any of the K patients. Here it is only
approximate, for what is at hand are cross-validation's errors:

- each fold's model is asked about its own validation sections, and the half-width is put around the
  mean of all folds' models. That is near CV+ (Barber, Candes, Ramdas and Tibshirani 2021, Annals of
  Statistics 49:486), which promises 1 - 2 alpha in the worst case, but not the same;
- those patients chose epochs and settings, so that their errors are somewhat too small;
- where folds are by section, the models have trained on other sections of the very patients: the
  errors are those of known patients, and say too little of a new one (`seen`).

Half-widths are in log units of the target. The scaled kind is a multiple of a spot's deviation over
the 8 symmetries (errors divided by a local scale: Lei, G'Sell, Rinaldo, Tibshirani and Wasserman
2018, JASA 113:1094). The deviation over members cannot serve: on the spots that calibrate, all
members but one have trained.

Shape letters: N spots, G genes, L levels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from brstnet.data import guarded
from brstnet.evaluation.certainty.spread import LEVELS

SMALLEST_SPREAD = 1e-6
"""Log units; a spread below counts as this much, so that the scaled kind is always defined."""

GENES_AT_ONCE = 128
"""Genes whose errors are sorted at a time: 60 MB for 30,000 spots."""

EXACT = 1e-9
"""Rounding of a sum of weights; a spot weighs more."""

CONSTANT, SCALED = "constant", "scaled"

NEEDED = {
    "gene": "the gene's id",
    "level": "the share that is promised",
    "half_width": "log units around the prediction, inf where nothing can be promised",
    "patients": "that calibrated",
    "spots": "that calibrated",
}
"""Columns that a file of intervals must have."""

WRITTEN = {
    **NEEDED,
    "scaled_half_width": "the same as a multiple of the spread over symmetries; NaN if not asked",
    "seen": "whether models had trained on other sections of the patients that calibrated",
    "target": "log_normalised or log_counts",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """Errors on spots that the predicting model has not trained on, in log units.

    Attributes:
        genes: ids, (G,).
        error_NG: absolute errors, float32.
        spread_NG: the same model's deviation over the 8 symmetries, if it was asked for.
        patient_N: whose each spot is.
        seen: whether a model had trained on other sections of a spot's patient.
        target: log_normalised or log_counts.
    """

    genes: pd.Index
    error_NG: np.ndarray
    spread_NG: np.ndarray | None
    patient_N: np.ndarray
    seen: bool
    target: str

    def of(self, rows: np.ndarray) -> Self:
        """Some of the spots."""
        spread_NG = None if self.spread_NG is None else self.spread_NG[rows]
        return dataclasses.replace(
            self,
            error_NG=self.error_NG[rows],
            spread_NG=spread_NG,
            patient_N=self.patient_N[rows],
        )

    def of_genes(self, genes: pd.Index) -> Self:
        """Some of the genes, in this order."""
        columns = self.genes.get_indexer(genes)
        spread_NG = None if self.spread_NG is None else self.spread_NG[:, columns]
        return dataclasses.replace(
            self, genes=genes, error_NG=self.error_NG[:, columns], spread_NG=spread_NG
        )

    def coverage(self, intervals: "Intervals") -> pd.DataFrame:
        """What these intervals hold of these spots: a row per gene, patient, level and kind.

        Columns gene, patient, level, kind (constant or scaled), held, half_width (mean over spots),
        n. Where nothing is promised `held` is NaN: an endless interval holds everything.
        """
        parts = []
        for patient in dict.fromkeys(self.patient_N):
            mine = self.of(self.patient_N == patient)
            for level in intervals.levels:
                for kind, width_NG in mine._widths(intervals, level):
                    held = (mine.error_NG <= width_NG).mean(axis=0)
                    width = np.broadcast_to(width_NG, mine.error_NG.shape).mean(axis=0)
                    part = pd.DataFrame({"gene": self.genes, "patient": patient, "level": level})
                    parts.append(
                        part.assign(
                            kind=kind,
                            held=np.where(np.isfinite(width), held, np.nan),
                            half_width=width,
                            n=len(mine.patient_N),
                        )
                    )
        return pd.concat(parts, ignore_index=True)

    def _widths(self, intervals: "Intervals", level: float) -> Iterator[tuple[str, np.ndarray]]:
        yield CONSTANT, intervals.half_width(level, self.genes)[None, :]
        scaled_G = intervals.half_width(level, self.genes, SCALED)
        if self.spread_NG is not None and not np.isnan(scaled_G).all():
            yield SCALED, scaled_G * np.maximum(self.spread_NG, SMALLEST_SPREAD)


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervals:
    """Half-widths of a gene's intervals at some levels: a row each, columns WRITTEN."""

    table: pd.DataFrame

    @property
    def levels(self) -> list[float]:
        """The levels, ascending."""
        return sorted(self.table["level"].unique().tolist())

    @property
    def patients(self) -> int:
        """How many patients calibrated them."""
        return int(self.table["patients"].min())

    @property
    def seen(self) -> bool:
        """Whether the models had trained on other sections of those patients."""
        return bool(self.table["seen"].any())

    def half_width(self, level: float, genes: pd.Index, kind: str = CONSTANT) -> np.ndarray:
        """Half-widths (G,) of these genes at a level: log units, or multiples of the spread.

        Raises:
            ValueError: the level or a gene is not there.
        """
        part = self.table[self.table["level"] == level].set_index("gene")
        if lacking := [str(gene) for gene in genes if gene not in part.index]:
            known, genes_here = ", ".join(map(str, self.levels)), self.table["gene"].nunique()
            raise ValueError(
                f"{len(lacking)} genes have no interval at level {level:g}, such as {lacking[0]}; "
                f"there are {genes_here} genes at the levels {known}"
            )
        column = "half_width" if kind == CONSTANT else "scaled_half_width"
        return part[column].reindex(genes).to_numpy(float)

    def coverage(
        self,
        pred_NG: np.ndarray,
        true_NG: np.ndarray,
        spots: pd.DataFrame,
        genes: pd.Index,
        spread_NG: np.ndarray | None = None,
    ) -> pd.DataFrame:
        """What the intervals hold of a measurement, as `Residuals.coverage`.

        Args:
            pred_NG: predictions in log units.
            true_NG: what was measured, in the same.
            spots: a row a spot, with the column patient.
            genes: of the columns.
            spread_NG: deviation over the 8 symmetries in log units, for the scaled kind.
        """
        judged = Residuals(
            genes=genes,
            error_NG=np.abs(pred_NG - true_NG),
            spread_NG=spread_NG,
            patient_N=spots["patient"].to_numpy(str),
            seen=self.seen,
            target=str(self.table["target"].iloc[0]),
        )
        return judged.coverage(self)

    def notes(self) -> list[str]:
        """What must be known of them."""
        notes = []
        most = self.patients / (self.patients + 1)
        who = "1 patient" if self.patients == 1 else f"{self.patients} patients"
        if beyond := [f"{100 * level:.0f} %" for level in self.levels if level > most + EXACT]:
            notes.append(
                f"no interval at {', '.join(beyond)}: {who} can promise "
                f"{100 * most:.0f} % of a new one's spots at most"
            )
        if self.seen:
            notes.append(
                "intervals come from folds by section, of patients whose other sections the models "
                "have trained on: they may be too narrow for a new patient"
            )
        notes.append(
            f"intervals come from cross-validation's errors on {who} and stand around the mean of "
            "the folds: approximate, as those patients also chose epochs and settings"
        )
        return notes

    def write(self, path: Path) -> None:
        """Write them as parquet, whole or not at all."""
        scratch = path.with_name(path.name + ".tmp")
        self.table[list(WRITTEN)].to_parquet(scratch, index=False)
        scratch.rename(path)


def intervals(residuals: Residuals, levels: Sequence[float] = LEVELS) -> Intervals:
    """The half-widths that these errors give.

    Raises:
        ValueError: a level is not between 0 and 1.
    """
    if wrong := [level for level in levels if not 0 < level < 1]:
        raise ValueError(f"levels must be above 0 and below 1, such as 0.9, got {wrong[0]}")
    width_LG = patient_quantiles(residuals.error_NG, residuals.patient_N, levels)
    scaled_LG = np.full_like(width_LG, np.nan)
    if residuals.spread_NG is not None:
        scores_NG = residuals.error_NG / np.maximum(residuals.spread_NG, SMALLEST_SPREAD)
        scaled_LG = patient_quantiles(scores_NG, residuals.patient_N, levels)
    table = pd.DataFrame({
        "gene": np.tile(residuals.genes.to_numpy(str), len(levels)),
        "level": np.repeat(np.asarray(levels, float), len(residuals.genes)),
        "half_width": width_LG.ravel(),
        "patients": len(np.unique(residuals.patient_N)),
        "spots": len(residuals.patient_N),
        "scaled_half_width": scaled_LG.ravel(),
        "seen": residuals.seen,
        "target": residuals.target,
    })  # fmt: skip
    return Intervals(table=table[list(WRITTEN)])


def patient_quantiles(
    score_NG: np.ndarray, patient_N: np.ndarray, levels: Sequence[float]
) -> np.ndarray:
    """Quantiles (L, G) of scores for the next patient: every patient weighs alike, the next too.

    inf{q: sum over k, i of [score_ki <= q] / ((K + 1) N_k) >= level} (Lee, Barber and Willett,
    arXiv:2306.06342), which is infinite above K / (K + 1).
    """
    _, whose_N, size_K = np.unique(patient_N, return_inverse=True, return_counts=True)
    weight_N = 1 / ((len(size_K) + 1) * size_K[whose_N])
    found = np.full((len(levels), score_NG.shape[1]), np.inf)
    for start in range(0, score_NG.shape[1], GENES_AT_ONCE):
        part = score_NG[:, start : start + GENES_AT_ONCE]
        order = np.argsort(part, axis=0)
        reached = np.cumsum(weight_N[order], axis=0)
        for number, level in enumerate(levels):
            below = (reached < level - EXACT).sum(axis=0)
            there = np.flatnonzero(below < len(part))
            found[number, start + there] = part[order[below[there], there], there]
    return found


def left_out_coverage(residuals: Residuals, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """What intervals of all patients but one hold of that one, for each: `Residuals.coverage`.

    Empty where there is one patient alone. K - 1 patients promise (K - 1) / K at most.
    """
    parts = [
        residuals.of(mine).coverage(intervals(residuals.of(~mine), levels))
        for patient in dict.fromkeys(residuals.patient_N)
        if not (mine := residuals.patient_N == patient).all()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def read(path: Path, target: str | None = None) -> Intervals:
    """Intervals that somebody has written, checked; all faults at once.

    Args:
        path: parquet with the columns NEEDED, and maybe the rest of WRITTEN.
        target: what is predicted, log_normalised or log_counts; intervals of another are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table of intervals, or promises what its patients cannot.
    """
    table = guarded.read_table(path)
    if lacking := [name for name in NEEDED if name not in table]:
        raise ValueError(
            f"{path}: must have the columns {', '.join(NEEDED)}, and lacks {', '.join(lacking)}: "
            "it is written by brstnet evaluate, as intervals.parquet"
        )
    defaults: dict[str, Any] = {"scaled_half_width": np.nan, "seen": False, "target": ""}
    table = table.assign(**{k: v for k, v in defaults.items() if k not in table})[list(WRITTEN)]
    if faults := _kind_faults(table) or _faults(table, target):
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    return Intervals(table=table.reset_index(drop=True))


def _kind_faults(table: pd.DataFrame) -> list[str]:
    """Columns of the wrong kind; with them nothing else can be asked."""
    numbers = ("level", "half_width", "patients", "spots", "scaled_half_width")
    faults = [
        f"{name} must be numbers, is {table[name].dtype}"
        for name in numbers
        if not pd.api.types.is_numeric_dtype(table[name]) or table[name].dtype == bool
    ]
    faults += [
        f"{name} must be text"
        for name in ("gene", "target")
        if not all(isinstance(value, str) for value in table[name])
    ]
    if table["seen"].dtype != bool:
        faults.append(f"seen must be true or false, is {table['seen'].dtype}")
    return faults if len(table) else ["holds no interval"]


def _faults(table: pd.DataFrame, target: str | None) -> list[str]:
    level, width, scaled = table["level"], table["half_width"], table["scaled_half_width"]
    beyond = level > table["patients"] / (table["patients"] + 1) + EXACT
    faults = {
        "level must be above 0 and below 1": ~level.between(0, 1, inclusive="neither"),
        "half_width must be 0 or more, or inf": ~(width >= 0),
        "scaled_half_width must be 0 or more, or inf, or NaN": scaled < 0,
        "patients and spots must be 1 or more": ~((table[["patients", "spots"]] >= 1).all(axis=1)),
        "a gene has one interval at a level": table.duplicated(["gene", "level"]),
        "half_width must be inf above the level K / (K + 1) of K patients": beyond
        & (np.isfinite(width) | np.isfinite(scaled)),
    }
    found = [
        f"{rule}, but row {int(np.flatnonzero(broken)[0])} (from 0) is gene "
        f"{table['gene'][np.flatnonzero(broken)[0]]!r:.80}, level "
        f"{level[np.flatnonzero(broken)[0]]:g}, half_width {width[np.flatnonzero(broken)[0]]:g}"
        for rule, broken in faults.items()
        if broken.any()
    ]
    if other := sorted(set(table["target"]) - {target, ""} if target else set()):
        found.append(
            f"these are intervals of {other[0]:.80}, but {target} is predicted: calibrate them "
            "with the models that predict"
        )
    return found
