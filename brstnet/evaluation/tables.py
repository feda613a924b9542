"""Scores as tables: tidy, per gene, and the summary that a paper quotes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brstnet import metrics

SCORES = {
    "pcc": "Pearson correlation of prediction and measurement over the section's spots",
    "partial_pcc": "the same given the log of the spot's total count",
    "pcc_depth_only": "of a predictor that knows only the spot's total count",
    "pcc_colour_ridge": "of a ridge on 53 colour and texture statistics of the patch",
    "partial_pcc_colour_ridge": "the ridge's, given the log of the spot's total count",
    "mae": "mean absolute error, in training standard deviations of the gene",
    "rmse": "root mean square error, in training standard deviations of the gene",
}


def section_scores(
    pred_NG: np.ndarray,
    true_NG: np.ndarray,
    controls: Mapping[str, np.ndarray],
    log_total_N: np.ndarray,
) -> dict[str, np.ndarray]:
    """All scores of one section, (G,) each; predictions and truth in standardised units.

    Args:
        pred_NG: the model's predictions.
        true_NG: what was measured.
        controls: predictions of the controls, by name (depth_only, colour_ridge).
        log_total_N: log of each spot's total count.
    """
    scores = {
        "pcc": metrics.pearson(pred_NG, true_NG),
        "partial_pcc": metrics.partial_pearson(pred_NG, true_NG, log_total_N),
        "mae": metrics.mean_absolute_error(pred_NG, true_NG),
        "rmse": metrics.root_mean_square_error(pred_NG, true_NG),
    }
    scores |= {f"pcc_{name}": metrics.pearson(c, true_NG) for name, c in controls.items()}
    if "colour_ridge" in controls:
        ridge = controls["colour_ridge"]
        scores["partial_pcc_colour_ridge"] = metrics.partial_pearson(ridge, true_NG, log_total_N)
    return scores


def tidy(
    scores: Mapping[str, np.ndarray], genes: pd.Index, patient: str, section: str, n: int
) -> pd.DataFrame:
    """One row per gene and metric: gene, patient, section, metric, value, n (spots)."""
    wide = pd.DataFrame(dict(scores), index=genes.rename("gene"))
    long = wide.reset_index().melt("gene", var_name="metric", value_name="value")
    return long.assign(patient=patient, section=section, n=n)[
        ["gene", "patient", "section", "metric", "value", "n"]
    ]


def gene_table(scores: pd.DataFrame, symbols: pd.Series) -> pd.DataFrame:
    """One row per gene: the median over sections of every metric, best PCC first."""
    wide = scores.groupby(["gene", "metric"])["value"].median().unstack()
    wide = wide.reindex(symbols.index).rename_axis(columns=None)
    wide.insert(0, "symbol", symbols)
    return wide.sort_values("pcc", ascending=False, kind="stable")


def median_over_genes(genes: pd.DataFrame, name: str) -> float:
    """Median of a metric over the genes; a gene that is predicted constant counts as 0.

    Left out, as in `metrics.fold_score`, it would be rewarded. That its truth varies is known from
    the depth control, which is defined then.
    """
    silent = genes[name].isna() & genes["pcc_depth_only"].notna()
    return metrics.nanmedian(genes[name].mask(silent, 0.0))


def summarise(genes: pd.DataFrame) -> dict[str, Any]:
    """The figures of the paper's Tables 1 and 2 and Figs 2 and 3, and the controls beside them."""
    summary: dict[str, Any] = {
        "genes": len(genes),
        "genes_without_pcc": int(genes["pcc"].isna().sum()),
        "median_pcc": median_over_genes(genes, "pcc"),
        **metrics.counts_above(genes["pcc"]),
        "aMAE": float(genes["mae"].mean()),
        "aRMSE": float(genes["rmse"].mean()),
    }
    for name in ("partial_pcc", "pcc_depth_only", "pcc_colour_ridge", "partial_pcc_colour_ridge"):
        if name in genes:
            summary[f"median_{name}"] = median_over_genes(genes, name)
    for control in ("depth_only", "colour_ridge"):
        if f"pcc_{control}" in genes:
            above = metrics.counts_above(genes[f"pcc_{control}"])
            summary |= {f"{control}_{key}": n for key, n in above.items()}
    return summary


def read_groups(path: Path) -> pd.DataFrame:
    """Named gene groups: columns gene, group and maybe ceiling.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no parquet file, or lacks a column.
    """
    groups = pd.read_parquet(path)
    if lacking := {"gene", "group"} - set(groups):
        raise ValueError(
            f"{path}: must have the columns gene and group, and may have ceiling; it lacks "
            f"{', '.join(sorted(lacking))}"
        )
    return groups


def summarise_groups(genes: pd.DataFrame, groups: pd.DataFrame) -> dict[str, Any]:
    """Median PCC of named gene groups, and its share of a known ceiling where one is given.

    Args:
        genes: from `gene_table`.
        groups: columns gene, group and, if known, ceiling (the best PCC that noise allows).
    """
    joined = genes.join(groups.set_index("gene"), how="inner", rsuffix="_group")
    found = {}
    for name, part in joined.groupby("group"):
        pcc = metrics.nanmedian(part["pcc"])
        found[str(name)] = {"genes": len(part), "median_pcc": pcc}
        if "ceiling" in part and part["ceiling"].notna().any():
            ceiling = metrics.nanmedian(part["ceiling"])
            found[str(name)] |= {"ceiling": ceiling, "share_of_ceiling": pcc / ceiling}
    return found


def describe_summary(summary: Mapping[str, Any]) -> str:
    """The scores of an evaluation in a few lines, the controls beside them."""
    lines = [summary["protocol"]]
    row = "  {:<18} {:>10} {:>12} {:>6} {:>6} {:>6} {:>6}"
    names = ("", "median PCC", "given total", "> 0", "> 0.1", "> 0.3", "> 0.5")
    lines.append(row.format(*names))
    kinds = (
        ("model", "", ""),
        ("colour ridge", "_colour_ridge", ""),
        ("total count only", "_depth_only", "-"),
    )
    for name, end, partial in kinds:
        key = f"median_pcc{end}"
        if key in summary:
            given = partial or f"{summary[f'median_partial_pcc{end}']:.3f}"
            start = f"{end.removeprefix('_')}_" if end else ""
            above = [summary[f"{start}genes_above_{t}"] for t in ("0", "0.1", "0.3", "0.5")]
            lines.append(row.format(name, f"{summary[key]:.3f}", given, *above))
    lines.append(
        f"  {summary['genes']} genes; aMAE {summary['aMAE']:.3f}, aRMSE {summary['aRMSE']:.3f} "
        "(training standard deviations)"
    )
    if summary["genes_without_pcc"]:
        lines.append(
            f"  {summary['genes_without_pcc']} genes have no PCC of their own; they count as 0"
        )
    if "median_pcc_colour_ridge" not in summary:
        lines.append(
            "  colour ridge: not available, as the training sections are not in this store"
        )
    for group, found in summary.get("groups", {}).items():
        share = (
            f", {100 * found['share_of_ceiling']:.0f} % of the ceiling {found['ceiling']:.3f}"
            if "ceiling" in found
            else ""
        )
        lines.append(
            f"  {group}: {found['genes']} genes, median PCC {found['median_pcc']:.3f}{share}"
        )
    return "\n".join(lines)
