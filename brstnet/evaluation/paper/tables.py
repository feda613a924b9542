"""The paper's Tables 1, 2 and 3 and Figs 2 and 3 as tables, its printed values beside ours.

A model that is missing is a row with the reason. Where scores are summed up a constant prediction
counts as 0, as everywhere.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from brstnet import metrics
from brstnet.evaluation.paper import printed
from brstnet.evaluation.paper.models import DEPTH, Model
from brstnet.evaluation.scores import MODEL
from brstnet.evaluation.tables import predictor_summary

DEPTH_LABEL = "total count only (control)"
NO_PCC = "no PCC"
TOP = 10
BIN_WIDTH = 0.05


def best_of(models: Sequence[Model]) -> Model:
    """The model with the highest cross-validated score, with AuxNet if any has it.

    Raises:
        ValueError: all are missing.
    """
    there = [model for model in models if not model.missing]
    if not there:
        reasons = "; ".join(sorted({model.missing for model in models}))
        raise ValueError(f"no model of the sweep can be judged: {reasons}")
    with_auxnet = [model for model in there if model.auxnet]
    return max(with_auxnet or there, key=lambda model: model.score)


def table_1_info(models: Sequence[Model], best: Model) -> pd.DataFrame:
    """Median PCC of the best model's top ten genes, then of the paper's others, by each model.

    Columns: gene, symbol, rank (among the panel's genes by the best model's PCC; NaN for a gene
    outside), papers (is it one of the paper's ten?), backbone, auxnet, model, pcc, printed, note.
    The control's rows have the backbone DEPTH.
    """
    rows = _rows_1(best)
    shown = printed.table_1()
    parts = []
    for model in models:
        pcc = pd.Series(dtype=float) if model.missing else model.pcc()
        part = rows.assign(backbone=model.backbone, auxnet=model.auxnet, model=model.label)
        part["pcc"] = pcc.reindex(rows["gene"]).to_numpy(float)
        known = model.auxnet and model.backbone in shown
        column = shown[model.backbone] if known else pd.Series(dtype=float)
        part["printed"] = column.reindex(rows["symbol"]).to_numpy(float)
        part["note"] = np.where(part["pcc"].isna(), model.missing or "not predicted", "")
        parts.append(part)
    control = best.pcc(DEPTH).reindex(rows["gene"]).to_numpy(float)
    about = rows.assign(backbone=DEPTH, auxnet=False, model=DEPTH_LABEL)
    parts.append(about.assign(pcc=control, printed=np.nan, note=""))
    return pd.concat(parts, ignore_index=True)


def _rows_1(best: Model) -> pd.DataFrame:
    """The genes of Table 1: ours, best first, then the paper's in its order."""
    pcc = best.pcc()[best.panel].sort_values(ascending=False, kind="stable")
    ranks = pd.Series(np.arange(1, len(pcc) + 1), pcc.index)
    symbols = best.genes["symbol"]
    by_symbol = {s: gene for gene, s in symbols[best.genes["papers"].to_numpy(bool)].items()}
    top = [(gene, symbols[gene]) for gene in pcc.index[:TOP]]
    papers = [(by_symbol.get(symbol, ""), symbol) for symbol in printed.table_1().index]
    rows = pd.DataFrame([*top, *(pair for pair in papers if pair not in top)])
    rows.columns = pd.Index(["gene", "symbol"])
    rows["rank"] = ranks.reindex(rows["gene"]).to_numpy(float)
    rows["papers"] = rows["symbol"].isin(printed.table_1().index)
    return rows


def common_genes(models: Sequence[Model]) -> pd.Index:
    """The panel's genes that every model here predicts: what errors can be compared on."""
    panels = [model.panel for model in models if not model.missing]
    common = panels[0]
    for panel in panels[1:]:
        common = common[common.isin(panel)]
    return common


def table_2_info(models: Sequence[Model], best: Model) -> pd.DataFrame:
    """Errors (aMAE, aRMSE) on training spots and on the held-out patient, a row a model.

    Columns: backbone, auxnet, model, printed.ERRORS, printed_ERRORS, note. All rows are over the
    same genes (`common_genes`).
    """
    genes, shown = common_genes(models), printed.table_2()
    rows = []
    for model in models:
        ours = {} if model.missing else _errors(model, genes)
        theirs = {f"printed_{e}": shown[e].get(model.key, np.nan) for e in printed.ERRORS}
        note = model.missing
        if not note and model.training is None:
            note = "training errors were not asked for"
        rows.append({**_about(model), **ours, **theirs, "note": note})
    control = predictor_summary(best.test, DEPTH, genes)
    about = {"backbone": DEPTH, "auxnet": False, "model": DEPTH_LABEL, "note": ""}
    rows.append({**about, "test_aMAE": control["aMAE"], "test_aRMSE": control["aRMSE"]})
    names = [name for error in printed.ERRORS for name in (error, f"printed_{error}")]
    return pd.DataFrame(rows).reindex(columns=["backbone", "auxnet", "model", *names, "note"])


def _about(model: Model) -> dict[str, object]:
    return {"backbone": model.backbone, "auxnet": model.auxnet, "model": model.label}


def _errors(model: Model, genes: pd.Index) -> dict[str, float]:
    """The four numbers of a row of Table 2."""
    test = predictor_summary(model.test, MODEL, genes)
    found = {"test_aMAE": test["aMAE"], "test_aRMSE": test["aRMSE"]}
    if model.training is not None:
        mine = model.training[model.training["gene"].isin(genes)]
        by_gene = mine.groupby(["fold", "metric", "gene"], observed=True)["value"].median()
        mean = by_gene.groupby(["fold", "metric"]).mean().groupby("metric").mean()
        found |= {"training_aMAE": float(mean["mae"]), "training_aRMSE": float(mean["rmse"])}
    return found


def table_3_info(models: Sequence[Model]) -> pd.DataFrame:
    """Training time of all folds, and divided by EfficientNet-b0's of the same column.

    Columns: backbone, auxnet, model, seconds, relative, printed_seconds, printed_relative, note.
    """
    times, theirs = {model.key: model.seconds for model in models}, printed.table_3()
    rows = []
    for model in models:
        first = (printed.BEST, model.auxnet)
        rows.append(
            {
                **_about(model),
                "seconds": model.seconds,
                "relative": model.seconds / times.get(first, float("nan")),
                "printed_seconds": theirs.get(model.key, float("nan")),
                "printed_relative": theirs.get(model.key, float("nan")) / theirs[first],
                "note": model.missing,
            }
        )
    return pd.DataFrame(rows)


def clock(seconds: float) -> str:
    """Seconds as the paper has them, h:mm:ss; nothing for NaN."""
    if not np.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


# The figures' data -------------------------------------------------------------------------------


def bin_counts(pcc: pd.Series) -> dict[str, int]:
    """How many genes lie in each bin of Fig. 2; a PCC that is exactly a limit is below it."""
    edges = (-np.inf, *metrics.THRESHOLDS, np.inf)
    cut = pd.cut(pcc, edges, labels=list(printed.bins()))
    counts = {str(name): int((cut == name).sum()) for name in printed.bins()}
    return {**counts, NO_PCC: int(pcc.isna().sum())}


def figure_2_info(models: Sequence[Model], best: Model) -> pd.DataFrame:
    """Genes of the panel by PCC, a row a bar: our models, the control, and what the paper prints.

    Columns: backbone, auxnet, model, whose (ours or printed), the bins, NO_PCC, genes, note.
    """
    rows: list[dict[str, object]] = []
    for model in models:
        counts = {} if model.missing else bin_counts(model.pcc()[model.panel])
        rows.append({**_about(model), "whose": "ours", **counts, "note": model.missing})
        if model.key == (printed.BEST, True):
            rows.append({**_about(model), "whose": "printed", **printed.bins(), "note": ""})
    about = {"backbone": DEPTH, "auxnet": best.auxnet, "model": DEPTH_LABEL, "whose": "ours"}
    rows.append({**about, **bin_counts(best.pcc(DEPTH)[best.panel]), "note": ""})
    names = [*printed.bins(), NO_PCC]
    table = pd.DataFrame(rows).reindex(
        columns=["backbone", "auxnet", "model", "whose", *names, "note"]
    )
    table.insert(len(table.columns) - 1, "genes", table[names].sum(axis=1, min_count=1))
    return table


def figure_3_info(best: Model) -> pd.DataFrame:
    """Histogram of the best model's positive PCCs, and of the control's: left, width, counts."""
    edges = np.arange(0, 1 + BIN_WIDTH, BIN_WIDTH).round(10)
    counts = {name: _positive(best.pcc(name)[best.panel], edges) for name in (MODEL, DEPTH)}
    return pd.DataFrame({"left": edges[:-1], "width": BIN_WIDTH, **counts})


def _positive(pcc: pd.Series, edges: np.ndarray) -> np.ndarray:
    return np.histogram(pcc[pcc > 0], edges)[0]
