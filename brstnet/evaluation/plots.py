"""Figures: `..._info` makes a table, `plot_...` draws it and computes nothing."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from brstnet.metrics import THRESHOLDS

NAMES = {"pcc": "model", "pcc_colour_ridge": "colour ridge", "pcc_depth_only": "total count only"}
COLOURS = {"pcc": "#2b6cb0", "pcc_colour_ridge": "#dd8452", "pcc_depth_only": "#8c8c8c"}
MAPPED_GENES = 4


def histogram_info(genes: pd.DataFrame, width: float = 0.05) -> pd.DataFrame:
    """How many genes have which correlation (paper, Fig. 3): left edge, a column a predictor."""
    edges = np.arange(-1, 1 + width, width).round(10)
    columns = [name for name in NAMES if name in genes]
    counts = {name: np.histogram(genes[name].dropna(), edges)[0] for name in columns}
    info = pd.DataFrame({"left": edges[:-1], "width": width, **counts})
    used = np.flatnonzero(info[columns].sum(axis=1))
    return info.iloc[used[0] : used[-1] + 1] if len(used) else info


def plot_histogram(info: pd.DataFrame, title: str) -> Figure:
    """Draw `histogram_info`: the model filled, the controls as outlines."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in (column for column in NAMES if column in info):
        edges = [*info["left"], info["left"].iloc[-1] + info["width"].iloc[-1]]
        filled = name == "pcc"
        axes.stairs(
            info[name],
            edges,
            label=NAMES[name],
            color=COLOURS[name],
            fill=filled,
            alpha=0.55 if filled else 1,
            linewidth=1.6,
        )
    for threshold in THRESHOLDS:
        axes.axvline(threshold, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("a gene's PCC (median over the judged sections)")
    axes.set_ylabel("genes")
    axes.set_title(textwrap.fill(title, 84), fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def map_info(adata: anndata.AnnData, section: str, genes: Sequence[str]) -> pd.DataFrame:
    """Measured and predicted standardised expression at every spot of a section (paper, Fig. 4)."""
    part = adata[adata.obs["section"] == section]
    x, y = part.obsm["spatial"].T
    tables = []
    for gene in genes:
        column = part.var_names.get_loc(gene)
        values = {"measured": part.layers["measured"][:, column], "predicted": part.X[:, column]}
        tables.append(pd.DataFrame({"gene": gene, "x": x, "y": y, **values}))
    return pd.concat(tables, ignore_index=True)


def plot_map(info: pd.DataFrame, titles: dict[str, str], heading: str) -> Figure:
    """Draw `map_info`: a row of measurements above a row of predictions, one column a gene.

    Each panel has its own colour range (2nd to 98th percentile), as predictions vary less.
    """
    genes = list(dict.fromkeys(info["gene"]))
    figure = Figure(figsize=(3 * len(genes), 6.2), layout="constrained")
    axes = figure.subplots(2, len(genes), squeeze=False)
    for column, gene in enumerate(genes):
        part = info[info["gene"] == gene]
        for row, what in enumerate(("measured", "predicted")):
            panel = axes[row, column]
            low, high = np.percentile(part[what], (2, 98))
            size = 9000 / max(len(part), 60)
            dots = panel.scatter(
                part["x"], part["y"], c=part[what], s=size, vmin=low, vmax=high, cmap="viridis"
            )
            panel.set(aspect="equal", xticks=[], yticks=[])
            panel.margins(0.06)
            panel.invert_yaxis()
            panel.set_title(titles[gene] if row == 0 else "", fontsize=9)
            figure.colorbar(dots, ax=panel, shrink=0.7)
        axes[0, 0].set_ylabel("measured")
        axes[1, 0].set_ylabel("predicted")
    figure.suptitle(textwrap.fill(heading, 44 * len(genes)), fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_all(
    genes: pd.DataFrame, folds: Sequence[anndata.AnnData], heading: str, folder: Path
) -> None:
    """The histogram, and the best-predicted genes mapped over every section.

    Args:
        genes: from `tables.gene_table`, best first.
        folds: predictions of each fold, or of all models.
        heading: above each figure.
        folder: to draw into.
    """
    save(plot_histogram(histogram_info(genes), heading), folder / "pcc_histogram.png")
    for adata in folds:
        best = list(genes.index[genes.index.isin(adata.var_names)][:MAPPED_GENES])
        titles = {g: f"{genes['symbol'][g]}\nmedian PCC {genes['pcc'][g]:.2f}" for g in best}
        for section in dict.fromkeys(adata.obs["section"]):
            info = map_info(adata, section, best)
            save(plot_map(info, titles, f"{section}; {heading}"), folder / f"genes_{section}.png")
