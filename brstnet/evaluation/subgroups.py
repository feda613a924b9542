"""The same scores for parts of what was judged: a subtype, a patient, tumour or normal tissue.

Scores within tumour and within normal spots say what a model knows beyond telling the two apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from brstnet.evaluation.controls import tissue
from brstnet.evaluation.scores import MODEL, TRUTH, Judged, score_table
from brstnet.evaluation.tables import members, predictor_summary, within

MIN_SPOTS = 10
"""A section with fewer spots of a kind of tissue is left out there, and counted."""
KEYS = (
    "genes",
    "genes_without_pcc",
    "median_pcc",
    "median_partial_pcc",
    "median_spearman",
    "median_r2",
    "aMAE",
    "aRMSE",
    "genes_above_0",
    "genes_above_0.3",
)


def subgroup_table(
    judged: Sequence[Judged],
    scores: pd.DataFrame,
    genes: pd.DataFrame,
    subtypes: Mapping[str, str | None],
) -> pd.DataFrame:
    """A row per grouping (subtype, patient, tissue), group and predictor, over the fold's panel.

    Columns: grouping, group, predictor, patients, sections, sections_left_out, spots, and KEYS.

    Args:
        judged: of each fold predictions and truth; spots have labels where the store does.
        scores: their table.
        genes: index gene; fold, panel.
        subtypes: of each section, where it is known.
    """
    panel, scores = members(genes, "panel"), within(scores, genes, "panel")
    spots = pd.concat([one.spots for one in judged], ignore_index=True)
    spots["subtype"] = spots["section"].map(dict(subtypes))
    parts = []
    for grouping in ("subtype", "patient"):
        for group, here in spots.dropna(subset=[grouping]).groupby(grouping, observed=True):
            mine = scores[scores["section"].isin(here["section"])]
            parts.append(_rows(mine, here, panel).assign(grouping=grouping, group=str(group)))
    for kind in ("tumour", "normal"):
        chosen = [_enough(one.spots, _kind(one.spots) == kind) for one in judged]
        pairs = [(o, rows) for o, (rows, _) in zip(judged, chosen, strict=True) if rows.any()]
        if pairs:
            mine = pd.concat([score_table(_part(*pair)) for pair in pairs])
            mine = within(mine[mine["section"] != ""], genes, "panel")
            here = pd.concat([one.spots[rows] for one, rows in pairs])
            found = _rows(mine, here, panel, sum(left_out for _, left_out in chosen))
            parts.append(found.assign(grouping="tissue", group=kind))
    table = pd.concat(parts, ignore_index=True)
    first = ["grouping", "group", "predictor"]
    return table[[*first, *(c for c in table if c not in first)]]


def _kind(spots: pd.DataFrame) -> np.ndarray:
    return tissue(spots["label"]) if "label" in spots else np.full(len(spots), "")


def _rows(
    scores: pd.DataFrame, spots: pd.DataFrame, panel: Sequence[str] | pd.Index, left_out: int = 0
) -> pd.DataFrame:
    """A row a predictor of the scores of some spots."""
    rows = []
    for predictor in (p for p in dict.fromkeys(scores["predictor"]) if p != TRUTH):
        found = predictor_summary(scores, predictor, panel)
        rows.append({"predictor": predictor, **{key: found[key] for key in KEYS}})
    table = pd.DataFrame(rows)
    table.insert(1, "patients", spots["patient"].nunique())
    table.insert(2, "sections", spots["section"].nunique())
    table.insert(3, "sections_left_out", left_out)
    table.insert(4, "spots", len(spots))
    return table


def _enough(spots: pd.DataFrame, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of sections that have enough of them, and how many sections have too few, but some."""
    found = spots["section"][rows].value_counts()
    few = found.index[found < MIN_SPOTS]
    return rows & ~spots["section"].isin(few).to_numpy(), len(few)


def _part(judged: Judged, rows: np.ndarray) -> Judged:
    return replace(
        judged,
        spots=judged.spots[rows].reset_index(drop=True),
        true_NG=judged.true_NG[rows],
        predictions={name: pred[rows] for name, pred in judged.predictions.items()},
    )


def worst_patient(subgroups: pd.DataFrame) -> dict[str, Any]:
    """Whose median PCC is lowest, by name, among how many."""
    mine = subgroups[(subgroups["grouping"] == "patient") & (subgroups["predictor"] == MODEL)]
    mine = mine.sort_values("median_pcc", kind="stable", na_position="last")
    worst = mine.iloc[0]
    return {
        "patient": str(worst["group"]),
        "median_pcc": float(worst["median_pcc"]),
        "patients": len(mine),
    }
