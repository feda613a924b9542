"""Scores summed up: per gene, per predictor, and the figures that a paper quotes.

Where scores are summed up a constant prediction counts as 0, as in `metrics.fold_score`: left out,
a model that knows nothing would be rewarded. A gene whose truth is constant on a section says
nothing there, and is left out there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from brstnet import metrics
from brstnet.evaluation.scores import CORRELATIONS, MODEL, TRUTH

NAMES = {
    MODEL: "model",
    "encoder_ridge": "frozen encoder, ridge",
    "colour_ridge": "colour ridge",
    "tumour_mean": "tumour/normal mean",
    "depth_only": "total count only",
    "training_mean": "training mean",
    "shuffled_ridge": "labels shuffled, ridge",
    "oracle_neighbour_mean": "oracle: neighbours",
}
"""What predictors are called in print, in the order of the printed table."""
PANELS = {
    "variable": "most variable genes by the target's standard deviation, in log units, on the "
    "training spots",
    "listed": "genes of the user's list",
}


def within(scores: pd.DataFrame, genes: pd.DataFrame, panel: str) -> pd.DataFrame:
    """The scores of a panel's genes, in each fold of its own, and those that are of no gene.

    Args:
        scores: the tidy table.
        genes: index gene; fold, and a column of this panel's name that says who is in it.
        panel: panel, variable or listed.
    """
    mine = genes[genes[panel].to_numpy(bool)]
    pairs = pd.MultiIndex.from_arrays([mine["fold"], mine.index])
    inside = pd.MultiIndex.from_frame(scores[["fold", "gene"]]).isin(pairs)
    return scores[inside | (scores["gene"] == "").to_numpy()]


def members(genes: pd.DataFrame, panel: str) -> pd.Index:
    """The genes that are in this panel in any fold, each once."""
    return genes.index[genes[panel].to_numpy(bool)].unique()


def values(scores: pd.DataFrame, predictor: str, genes: Sequence[str] | pd.Index) -> pd.DataFrame:
    """One predictor's scores: a row per section and gene, a column per metric.

    A correlation that is missing because the prediction alone is constant is 0 (Lin's concordance
    is 0 there, and NaN where the truth is constant). Index fold, patient, section, gene.
    """
    mine = scores[(scores["predictor"] == predictor) & scores["gene"].isin(list(genes))]
    index = ["fold", "patient", "section", "gene", "metric"]
    wide = mine.set_index(index)["value"].unstack("metric").rename_axis(columns=None)
    for name in wide.columns.intersection(list(CORRELATIONS)):
        ccc = wide["ccc_pooled" if name.endswith("_pooled") else "ccc"]
        wide[name] = wide[name].mask(wide[name].isna() & ccc.notna(), 0.0)
    return wide


def section_table(
    scores: pd.DataFrame, predictor: str, metric: str, genes: Sequence[str] | pd.Index
) -> pd.DataFrame:
    """One metric of one predictor: a row per gene, a column per (patient, section)."""
    column = values(scores, predictor, genes)[metric].droplevel("fold")
    column = column[column.index.get_level_values("section") != ""]
    return column.unstack(["patient", "section"]).reindex(list(genes))


def gene_table(scores: pd.DataFrame, genes: pd.DataFrame) -> pd.DataFrame:
    """One row per gene: the median over sections of every metric, best PCC first.

    The model's metrics by their names, the controls' `pcc_NAME` and `partial_pcc_NAME`, and the
    ceilings. What is constant is NaN here.

    Args:
        scores: the tidy table.
        genes: index gene; symbol, and the columns that say which panel a gene is in. Of several
            folds: a row a fold and gene; a gene is in a panel here if it is in any fold's.
    """
    how = {"symbol": "first", "panel": "any", "variable": "any", "listed": "any"}
    genes = genes.groupby(level=0, sort=False).agg({c: how[c] for c in how if c in genes})
    parts = [genes]
    for predictor, mine in scores.groupby("predictor", sort=False, observed=True):
        wide = mine.groupby(["gene", "metric"], observed=True)["value"].median().unstack()
        if predictor not in (MODEL, TRUTH):
            wide = wide.reindex(columns=["pcc", "partial_pcc"]).add_suffix(f"_{predictor}")
        parts.append(wide.reindex(genes.index))
    table = pd.concat(parts, axis=1).rename_axis("gene").rename_axis(columns=None)
    return table.sort_values("pcc", ascending=False, kind="stable")


def predictor_summary(
    scores: pd.DataFrame, predictor: str, genes: Sequence[str] | pd.Index
) -> dict[str, Any]:
    """The figures of one predictor over these genes, the same keys for each.

    `median_` is the median over genes of the median over sections, unless the name says more:
    `_section_mean` of the mean over sections; `_patient_median` of the median over patients of the
    mean of a patient's sections; `_pooled` of all sections' spots as one. `aMAE` and `aRMSE` are
    means over genes of the median over sections (paper, Table 2).
    """
    wide = values(scores, predictor, genes)
    own = scores[(scores["predictor"] == predictor) & scores["gene"].isin(list(genes))]
    by_gene = wide.groupby("gene").median()
    sections = wide.loc[wide.index.get_level_values("section") != ""]
    mean = sections.groupby("gene").mean()
    patients = sections.groupby(["gene", "patient"], observed=True).mean().groupby("gene").median()

    def median(name: str, table: pd.DataFrame = by_gene) -> float:
        return metrics.nanmedian(table[name]) if name in table else float("nan")

    def average(name: str) -> float:
        return float(by_gene[name].mean()) if name in by_gene else float("nan")

    return {
        "genes": len(genes),
        "genes_without_pcc": _undefined(own, "pcc", len(genes)),
        "genes_without_partial_pcc": _undefined(own, "partial_pcc", len(genes)),
        "median_pcc": median("pcc"),
        **metrics.counts_above(by_gene.get("pcc", [])),
        "median_partial_pcc": median("partial_pcc"),
        "median_pcc_section_mean": median("pcc", mean),
        "median_pcc_patient_median": median("pcc", patients),
        **{
            f"median_{name}": median(name)
            for name in (
                "pcc_pooled",
                "partial_pcc_pooled",
                "pcc_smoothed",
                "pcc_smoothed_prediction",
                "spearman",
                "ccc",
                "r2",
            )
        },
        "aMAE": average("mae"),
        "aRMSE": average("rmse"),
        "aMAE_log": average("mae_log"),
        "aRMSE_log": average("rmse_log"),
        **{f"median_{name}": _spot_median(scores, predictor, name) for name in SPOT_NAMES},
        **_shares(scores, predictor, wide),
    }


SPOT_NAMES = ("spot_pcc", "spot_pcc_log")


def _undefined(own: pd.DataFrame, metric: str, genes: int) -> int:
    """Genes that have no value of this metric on any section."""
    known = own[(own["metric"] == metric) & own["value"].notna()]
    return genes - known["gene"].nunique()


def _spot_median(scores: pd.DataFrame, predictor: str, metric: str) -> float:
    mine = scores[(scores["predictor"] == predictor) & (scores["metric"] == metric)]
    return metrics.nanmedian(mine["value"])


def _shares(scores: pd.DataFrame, predictor: str, wide: pd.DataFrame) -> dict[str, float]:
    """Median PCC over median ceiling, of the genes and sections that can be judged."""
    if "share_of_ceiling" not in wide:
        return {}
    truth = values(scores, TRUTH, wide.index.unique("gene"))
    found = {}
    for share, pcc, ceiling in (
        ("share_of_ceiling", "pcc", "ceiling"),
        ("share_of_ceiling_partial", "partial_pcc", "ceiling_partial"),
    ):
        judged = wide.index[wide[share].notna()]
        top = metrics.nanmedian(truth[ceiling].reindex(judged)) if len(judged) else float("nan")
        found[share] = metrics.nanmedian(wide[pcc].reindex(judged)) / top
    return found


def summarise(scores: pd.DataFrame, genes: pd.DataFrame) -> dict[str, Any]:
    """The figures of the paper's Tables 1 and 2 and Figs 2 and 3, and the controls beside them.

    Args:
        scores: the tidy table.
        genes: index gene; fold; panel, and maybe variable and listed, say who is in which panel.
    """
    panel, mine = members(genes, "panel"), within(scores, genes, "panel")
    names = [p for p in dict.fromkeys(scores["predictor"]) if p != TRUTH]
    every = {name: predictor_summary(mine, name, panel) for name in names}
    summary = {**every[MODEL]}
    for name in names[1:]:
        summary[f"median_pcc_{name}"] = every[name]["median_pcc"]
        summary[f"median_partial_pcc_{name}"] = every[name]["median_partial_pcc"]
        above = metrics.counts_above([])
        summary |= {f"{name}_{key}": every[name][key] for key in above}
    summary["predictors"] = every
    summary["panels"] = {
        name: _panel(within(scores, genes, name), members(genes, name), names, what)
        for name, what in PANELS.items()
        if name in genes and genes[name].any()
    }
    summary["median_pcc_by_section"] = section_medians(mine, MODEL, "pcc", panel)
    return summary


def section_medians(
    scores: pd.DataFrame, predictor: str, metric: str, genes: Sequence[str] | pd.Index
) -> dict[str, float]:
    """The median over genes of one metric of one predictor, on each section."""
    table = section_table(scores, predictor, metric, genes)
    sections = table.columns.get_level_values("section")
    return {
        str(section): metrics.nanmedian(column)
        for section, column in zip(sections, table.to_numpy().T, strict=True)
    }


def _panel(
    scores: pd.DataFrame, genes: pd.Index, predictors: Sequence[str], what: str
) -> dict[str, Any]:
    found = {name: predictor_summary(scores, name, genes) for name in predictors}
    keys = ("median_pcc", "median_partial_pcc", "median_r2", "aRMSE")
    medians = {key: {name: each[key] for name, each in found.items()} for key in keys}
    return {"genes": len(genes), "what": what, **medians}


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
    genes = genes.drop(columns="ceiling", errors="ignore")  # the estimate: here is the truth
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
    row = "  {:<22} {:>10} {:>12} {:>7} {:>6} {:>6} {:>6} {:>6}"
    names = ("", "median PCC", "given total", "R2", "> 0", "> 0.1", "> 0.3", "> 0.5")
    lines = [summary["protocol"], row.format(*names)]
    every = summary["predictors"]
    for name in sorted(every, key=_place):
        lines.append(row.format(NAMES.get(name, name), *_cells(every[name])))  # noqa: PERF401
    lines.append(
        f"  {summary['genes']} genes; aMAE {summary['aMAE']:.3f}, aRMSE {summary['aRMSE']:.3f} "
        "(training standard deviations)"
    )
    if summary["genes_without_pcc"]:
        lines.append(
            f"  {summary['genes_without_pcc']} genes have no PCC of their own; they count as 0"
        )
    lines += [f"  {NAMES.get(k, k)}: {why}" for k, why in summary.get("not_available", {}).items()]
    lines += [f"  {line}" for line in summary.get("lines", ())]
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


def _place(predictor: str) -> int:
    order = list(NAMES)
    return order.index(predictor) if predictor in order else len(order)


def _cells(found: Mapping[str, Any]) -> list[str]:
    """One predictor's cells; a dash where no gene has the score."""
    genes, silent = found["genes"], found["genes_without_pcc"]
    pcc = "-" if silent == genes else f"{found['median_pcc']:.3f}"
    alone = found["genes_without_partial_pcc"] == genes
    partial = "-" if alone else f"{found['median_partial_pcc']:.3f}"
    above = [str(found[f"genes_above_{t}"]) for t in ("0", "0.1", "0.3", "0.5")]
    return [pcc, partial, f"{found['median_r2']:.3f}", *(["-"] * 4 if silent == genes else above)]
