"""Is a spread worth anything as uncertainty? It is held against the errors that were made.

The spread is the standard deviation of predictions over models, or over the symmetries of a patch.
It knows nothing of the noise in the measurement, so that errors must be expected to be larger than
it says, and intervals made of it to hold less than they claim; what is to be found out is whether
it is larger where the errors are. All in standardised units, so that genes can be put together.

Shape letters: N spots, G genes.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from brstnet import metrics

LEVELS = (0.5, 0.8, 0.9)
"""Shares of the truths that intervals are meant to hold."""

BINS = 10
"""Of equal count, in the table of reliability."""

STEPS = 50
"""Shares that are left out, from none to all but one in so many."""

MEMBERS, SYMMETRIES = "members", "symmetries"
NAMES = {MEMBERS: "over the models", SYMMETRIES: "over the 8 symmetries"}
COLOURS = {MEMBERS: "#2b6cb0", SYMMETRIES: "#dd8452"}
COLUMNS = ["spread", "gene", "section", "patient", "metric", "value", "n"]
METRICS = {
    "spearman": "Spearman's rank correlation of spread and absolute error, over a gene's spots; "
    "without a gene over all spots and genes",
    "rmse": "root mean square error",
    "predicted_sd": "root mean square spread",
    "ence": "expected normalised calibration error over bins of equal count (Levi et al. 2022)",
    "ause": "area between the sparsification curves of spread and error (Ilg et al. 2018)",
    "ause_of_chance": "the same of a spread that says nothing",
    **{
        f"held_{100 * level:.0f}": "share of truths within so many spreads of the mean as hold "
        f"{level:.0%} of a normal distribution"
        for level in LEVELS
    },
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """Errors of predictions beside what was thought of them, in standardised units.

    Attributes:
        spots: a row a spot: section, patient.
        genes: ids.
        error_NG: prediction - truth.
        spreads: (N, G) by name, such as MEMBERS.
    """

    spots: pd.DataFrame
    genes: pd.Index
    error_NG: np.ndarray
    spreads: Mapping[str, np.ndarray]

    def parts(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Name, patient and rows (N,) of each section; of all together, "" where it is several."""
        patients = self.spots["patient"].astype(str)
        for name in dict.fromkeys(self.spots["section"]):
            rows = (self.spots["section"] == name).to_numpy()
            yield str(name), patients[rows].iloc[0], rows
        whose = patients.iloc[0] if patients.nunique() == 1 else ""
        yield "", whose, np.ones(len(self.spots), bool)


def spread_table(errors: Errors) -> pd.DataFrame:
    """All of METRICS for each spread and section, and for all sections as one: tidy, COLUMNS.

    A row without a gene is over all spots and genes. NaN is what is not defined.
    """
    parts = []
    for name, spread_NG in errors.spreads.items():
        for section, patient, rows in errors.parts():
            error, spread = errors.error_NG[rows], spread_NG[rows]
            by_gene = metrics.spearman(spread, np.abs(error))
            table = pd.DataFrame({"gene": errors.genes, "metric": "spearman", "value": by_gene})
            whole = scores(error.ravel(), spread.ravel())
            over_all = pd.DataFrame({"gene": "", "metric": list(whole), "value": whole.values()})
            n = {"n": [len(error)] * len(table) + [error.size] * len(over_all)}
            both = pd.concat([table, over_all], ignore_index=True).assign(**n)
            parts.append(both.assign(spread=name, section=section, patient=patient))
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)


def calibration_table(errors: Errors, bins: int = BINS) -> pd.DataFrame:
    """`reliability` for each spread and section, and for all sections as one.

    Columns spread, section, patient, bin, predicted_sd, rmse, n.
    """
    parts = [
        reliability(errors.error_NG[rows].ravel(), spread_NG[rows].ravel(), bins).assign(
            spread=name, section=section, patient=patient
        )
        for name, spread_NG in errors.spreads.items()
        for section, patient, rows in errors.parts()
    ]
    first = ["spread", "section", "patient", "bin", "predicted_sd", "rmse", "n"]
    return pd.concat(parts, ignore_index=True)[first] if parts else pd.DataFrame(columns=first)


def scores(error_n: np.ndarray, spread_n: np.ndarray) -> dict[str, float]:
    """METRICS of errors beside spreads, (n,) each."""
    rank = metrics.spearman(spread_n[:, None], np.abs(error_n)[:, None])
    ause, of_chance = sparsification_error(error_n, spread_n)
    return {
        "spearman": float(rank[0]),
        "rmse": _root_mean_square(error_n),
        "predicted_sd": _root_mean_square(spread_n),
        "ence": ence(reliability(error_n, spread_n)),
        "ause": ause,
        "ause_of_chance": of_chance,
        **{f"held_{100 * level:.0f}": held(error_n, spread_n, level) for level in LEVELS},
    }


def reliability(error_n: np.ndarray, spread_n: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """What was thought and what came, in bins of equal count by spread: predicted_sd, rmse, n.

    `predicted_sd` is the root of the mean variance in the bin, which is what its root mean square
    error must be if the spread is right (Levi et al. 2022, Sensors 22:5540).
    """
    order = np.argsort(spread_n, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return pd.DataFrame({
        "bin": np.arange(len(parts)),
        "predicted_sd": [_root_mean_square(spread_n[part]) for part in parts],
        "rmse": [_root_mean_square(error_n[part]) for part in parts],
        "n": [len(part) for part in parts],
    })  # fmt: skip


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def ence(table: pd.DataFrame) -> float:
    """Expected normalised calibration error of a `reliability` (Levi et al. 2022).

    The mean over bins of |predicted_sd - rmse| / predicted_sd: 0 is calibrated, and 2 says errors
    three times the spread. NaN where a bin has no spread at all.
    """
    sd, rmse = table["predicted_sd"].to_numpy(), table["rmse"].to_numpy()
    return float(np.mean(np.abs(sd - rmse) / sd)) if (sd > 0).all() else float("nan")


def held(error_n: np.ndarray, spread_n: np.ndarray, level: float) -> float:
    """The share of truths within as many spreads of the prediction as hold `level` of a normal."""
    z = stats.norm.ppf((1 + level) / 2)
    return float(np.mean(np.abs(error_n) <= z * spread_n))


def sparsification(error_n: np.ndarray, spread_n: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Root mean square error of what is left when those of largest spread are left out, (steps,).

    0, 1 / steps, 2 / steps, ... are left out; values are shares of the error of all. Spots of equal
    spread have the mean of their squared errors, as no order of theirs is the right one. NaN if
    there is no error.
    """
    order = np.argsort(spread_n, kind="stable")
    square, sorted_spread = np.square(error_n[order], dtype=np.float64), spread_n[order]
    first = np.flatnonzero(np.r_[True, sorted_spread[1:] != sorted_spread[:-1]])
    size = np.diff(np.r_[first, len(order)])
    square = np.repeat(np.add.reduceat(square, first) / size, size)
    left = np.maximum(len(order) * np.arange(steps, 0, -1) // steps, 1)
    rest = np.sqrt(np.cumsum(square)[left - 1] / left)
    return rest / rest[0] if rest[0] > 0 else np.full(steps, np.nan)


def sparsification_error(error_n: np.ndarray, spread_n: np.ndarray) -> tuple[float, float]:
    """Area between the curve of the spread and that of the errors themselves, and that of chance.

    The area under the sparsification error (Ilg et al. 2018, ECCV, "Uncertainty estimates and
    multi-hypotheses networks for optical flow"): 0 is a spread that ranks as the errors do. A
    spread that says nothing leaves the error as it is, whatever is left out.
    """
    oracle = sparsification(error_n, np.abs(error_n))
    mine = sparsification(error_n, spread_n)
    return float(np.mean(mine - oracle)), float(np.mean(1 - oracle))


def summarise(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The figures over all sections of each spread, and the rank correlation in the median gene.

    `median_gene_spearman` is the median over genes and sections: no difference between genes, or
    between sections, is in it.
    """
    found = {}
    for name, part in table.groupby("spread", sort=False):
        over_all = part[(part["gene"] == "") & (part["section"] == "")]
        single = part[(part["gene"] != "") & (part["section"] != "")]
        found[str(name)] = {
            **dict(zip(over_all["metric"], over_all["value"].astype(float), strict=True)),
            "median_gene_spearman": metrics.nanmedian(single["value"]),
        }
    return found


def describe(summary: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line a spread, for people."""
    return [
        f"spread {NAMES.get(name, name)}: errors are {_times(one['rmse'], one['predicted_sd'])} as "
        f"large; rank correlation with them {one['spearman']:.2f}, in the median gene "
        f"{one['median_gene_spearman']:.2f}; what it calls 90 % holds {100 * one['held_90']:.0f} %"
        for name, one in summary.items()
    ]


def _times(error: float, spread: float) -> str:
    return f"{error / spread:.1f} times" if spread > 0 else "endlessly many times"


def reliability_info(calibration: pd.DataFrame) -> pd.DataFrame:
    """What the figure shows: a row per spread, section ("" for all as one) and bin.

    A bin without any spread, or without any error, has no place on axes of decades.
    """
    columns = ["spread", "section", "bin", "predicted_sd", "rmse", "n"]
    several = calibration.loc[calibration["section"] != "", "section"].nunique() > 1
    shown = calibration if several else calibration[calibration["section"] == ""]
    shown = shown[(shown["predicted_sd"] > 0) & (shown["rmse"] > 0)]
    return shown[columns].reset_index(drop=True)


def plot_reliability(info: pd.DataFrame, title: str = "") -> Figure:
    """Draw `reliability_info`: errors over what the spread predicts, sections thin, a diagonal.

    Axes of decades, as errors are often many times the spread.
    """
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    for (name, section), part in info.groupby(["spread", "section"], sort=False):
        whole = section == ""
        axes.plot(
            part["predicted_sd"],
            part["rmse"],
            color=COLOURS.get(str(name), "#555555"),
            marker="o" if whole else None,
            markersize=4,
            linewidth=1.6 if whole else 0.7,
            alpha=1 if whole else 0.45,
            label=f"spread {NAMES.get(str(name), name)}" if whole else None,
        )
    ends = info[["predicted_sd", "rmse"]].to_numpy()
    low, high = (0.7 * ends.min(), 1.4 * ends.max()) if len(info) else (0.1, 10)
    axes.plot([low, high], [low, high], color="black", linestyle=":", label="calibrated")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("spread: predicted standard deviation (training SDs)")
    axes.set_ylabel("root mean square error (training SDs)")
    axes.set_title(textwrap.fill(title, 80), fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
