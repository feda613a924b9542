"""How sure an ensemble is of its predictions, and how sure one may be: tables, figure, lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brstnet.data.store import Store
from brstnet.evaluation import plots
from brstnet.evaluation.certainty import conformal, out_of_fold, spread
from brstnet.evaluation.certainty.conformal import CONSTANT, SCALED, Intervals, Residuals
from brstnet.evaluation.predict import PLAIN, Ensemble, How, Predictions
from brstnet.evaluation.yardstick import measured

HELD_OUT, LEFT_OUT = "held_out", "left_out"
FILES = (
    "spread.parquet",
    "calibration.csv",
    "intervals.parquet",
    "coverage.parquet",
    "figures/reliability.png",
)
NO_INTERVALS = (
    "no intervals for a new patient: this store has no section, patch by patch, that one of the "
    "models was validated on"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Confidence:
    """What was found.

    Attributes:
        scores: of the spread (`spread.spread_table`); empty where there is no spread.
        calibration: of the spread (`spread.calibration_table`); likewise.
        intervals: for a new patient, of every gene that is predicted and measured; None where no
            validation section is at hand, which the lines say.
        coverage: what the intervals hold of the judged patients, and of each patient that
            calibrated when it is left out: column `judged` says held_out or left_out.
        summary: the figures to quote, and `lines` for people.
    """

    scores: pd.DataFrame
    calibration: pd.DataFrame
    intervals: Intervals | None
    coverage: pd.DataFrame
    summary: dict[str, Any]


def believe(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    genes: pd.DataFrame,
    predictions: Predictions,
    how: How = PLAIN,
) -> Confidence:
    """Hold spread and intervals of an ensemble against what was measured.

    The intervals cost one more prediction of the validation sections, made as `how` says; scaled
    ones are there if it asks for symmetries.

    Args:
        ensemble: the models.
        store: has the judged sections, and the models' validation sections if there are to be
            intervals.
        sections: that are judged.
        genes: that are judged: index gene; mean, std, panel.
        predictions: of the ensemble's genes on these sections, in its order.
        how: they were made.
    """
    columns = ensemble.genes.index.get_indexer(genes.index)
    outcome = Outcome(
        spots=store.spots(sections),
        genes=genes,
        pred_NG=predictions.mean_NG[:, columns],
        true_NG=measured(ensemble, store, sections, genes),
        spreads={
            name: each[:, columns]
            for name, each in (
                (spread.MEMBERS, predictions.member_spread_NG),
                (spread.SYMMETRIES, predictions.symmetry_spread_NG),
            )
            if each is not None
        },
    )
    errors = outcome.errors()
    scores, calibration = spread.spread_table(errors), spread.calibration_table(errors)
    found, coverage = None, pd.DataFrame()
    if out_of_fold.validated_by(ensemble, store):
        residuals = out_of_fold.cross_validation_errors(ensemble, store, how=how)
        found = conformal.intervals(residuals)
        coverage = _coverage(outcome, residuals, found)
    summary: dict[str, Any] = {
        "spread": spread.summarise(scores),
        "intervals": [] if found is None else summarise(coverage, genes),
        "notes": [NO_INTERVALS] if found is None else found.notes(),
    }
    return Confidence(
        scores=scores,
        calibration=calibration,
        intervals=found,
        coverage=coverage,
        summary=summary | {"lines": describe(summary)},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Predictions of the judged genes beside the truth, in log units, and their spreads."""

    spots: pd.DataFrame
    genes: pd.DataFrame
    pred_NG: np.ndarray
    true_NG: np.ndarray
    spreads: Mapping[str, np.ndarray]

    def errors(self) -> spread.Errors:
        """The errors in standardised units."""
        std_G = self.genes["std"].to_numpy()
        return spread.Errors(
            spots=self.spots,
            genes=self.genes.index,
            error_NG=(self.pred_NG - self.true_NG) / std_G,
            spreads={name: each / std_G for name, each in self.spreads.items()},
        )


def _coverage(outcome: Outcome, residuals: Residuals, found: Intervals) -> pd.DataFrame:
    """What intervals hold of the judged patients, and of each that calibrated, left out.

    A patient that calibrated is judged left out alone: the intervals know too much of it.
    """
    genes, symmetries = outcome.genes.index, outcome.spreads.get(spread.SYMMETRIES)
    rows = ~outcome.spots["patient"].isin(residuals.patient_N).to_numpy()
    parts = [
        conformal.left_out_coverage(residuals.of_genes(genes), found.levels).assign(judged=LEFT_OUT)
    ]
    if rows.any():
        held_out = found.coverage(
            outcome.pred_NG[rows],
            outcome.true_NG[rows],
            outcome.spots[rows],
            genes,
            None if symmetries is None else symmetries[rows],
        )
        parts.insert(0, held_out.assign(judged=HELD_OUT))
    there = [part for part in parts if len(part)]
    return pd.concat(there, ignore_index=True) if there else pd.DataFrame()


def summarise(coverage: pd.DataFrame, genes: pd.DataFrame) -> list[dict[str, Any]]:
    """What the panel's intervals hold: one a level, kind, and way of judging.

    `half_width` is the median over genes of the mean over patients, in log units, `half_width_sd`
    the same in the genes' training standard deviations; `held` the mean over genes and patients,
    `worst` the mean over genes of the patient `worst_patient`. `promised` is whether there is an
    interval at all; without, the rest is NaN.

    Args:
        coverage: from `Confidence`.
        genes: index gene; std, panel.
    """
    if coverage.empty:
        return []
    panel = genes[genes["panel"].to_numpy(bool)]
    shown = coverage[coverage["gene"].isin(panel.index)]
    found = []
    for (judged, kind, _), part in shown.groupby(["judged", "kind", "level"], sort=False):
        width = part.groupby("gene")["half_width"].mean()
        held = part.groupby("patient")["held"].mean()
        promised = bool(np.isfinite(width).all())
        found.append({
            "judged": str(judged),
            "kind": str(kind),
            "level": float(part["level"].iloc[0]),
            "promised": promised,
            "patients": len(held),
            "half_width": float(width.median()) if promised else float("nan"),
            "half_width_sd": float((width / panel["std"]).median()) if promised else float("nan"),
            "held": float(held.mean()),
            "worst": float(held.min()),
            "worst_patient": str(held.idxmin()) if promised else "",
        })  # fmt: skip
    return found


def describe(summary: Mapping[str, Any]) -> list[str]:
    """Lines for people: each spread, each level of the intervals, and what must be known."""
    there = [one for one in summary["intervals"] if one["promised"]]
    constant = [one for one in there if one["kind"] == CONSTANT]
    lines = []
    for level in dict.fromkeys(one["level"] for one in constant):
        same = [one for one in constant if one["level"] == level]
        lines.append(
            f"{100 * level:.0f} % intervals for a new patient: median half-width "
            f"{same[0]['half_width']:.2f} log units ({same[0]['half_width_sd']:.1f} training SDs); "
            f"held {', '.join(_held(one) for one in same)}"
        )
    scaled = [one for one in there if one["kind"] == SCALED]
    if scaled:
        first = scaled[0]["judged"]
        one = max((s for s in scaled if s["judged"] == first), key=lambda s: float(s["level"]))
        (other,) = (c for c in constant if (c["judged"], c["level"]) == (first, one["level"]))
        lines.append(
            f"scaled by the spread over symmetries, {100 * one['level']:.0f} % intervals have "
            f"{one['half_width']:.2f} instead of {other['half_width']:.2f} log units, and held "
            f"{_held(one)}"
        )
    return [*spread.describe(summary["spread"]), *lines, *summary["notes"]]


def _held(one: Mapping[str, Any]) -> str:
    who = "held-out" if one["judged"] == HELD_OUT else "left-out"
    held = f"{100 * one['held']:.0f} % on {one['patients']} {who}"
    if one["patients"] == 1:
        return held
    return f"{held} (worst: {one['worst_patient']}, {100 * one['worst']:.0f} %)"


def write(found: Confidence | None, out: Path, heading: str = "") -> None:
    """Write spread.parquet, calibration.csv, intervals.parquet, coverage.parquet, the figure.

    What does not exist is not written, and what an earlier run has left of it is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    if found is None:
        return
    if len(found.scores):
        found.scores.to_parquet(out / "spread.parquet")
        found.calibration.to_csv(out / "calibration.csv", index=False)
        info = spread.reliability_info(found.calibration)
        plots.save(spread.plot_reliability(info, heading), out / "figures" / "reliability.png")
    if found.intervals is not None:
        found.intervals.write(out / "intervals.parquet")
        found.coverage.to_parquet(out / "coverage.parquet")
