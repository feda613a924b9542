"""The paper's Figs 2, 3 and 4 drawn; for Fig. 4 `map_info` makes what `plot_map` draws."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.spatial import cKDTree

from brstnet import metrics
from brstnet.evaluation.controls import tissue
from brstnet.evaluation.paper import printed
from brstnet.evaluation.paper.models import DEPTH
from brstnet.evaluation.paper.picture import Picture
from brstnet.evaluation.paper.tables import DEPTH_LABEL, NO_PCC
from brstnet.evaluation.scores import MODEL

BIN_COLOURS = {
    "<= 0": "#b3b3b3",
    "0 - 0.1": "#cfe1f2",
    "0.1 - 0.3": "#93c4df",
    "0.3 - 0.5": "#4a97c9",
    "> 0.5": "#1664ab",
    NO_PCC: "#f2efe6",
}
LABELS = {"tumour": "black", "normal": "white", "": "#9a9a9a"}
"""Colours of Fig. 4 b: the paper's, grey where tissue is neither or nobody says."""


def plot_figure_2(info: pd.DataFrame, title: str) -> Figure:
    """Draw `paper_tables.figure_2_info`: a stacked bar a model, what the paper prints hatched."""
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(info)), layout="constrained")
    axes = figure.subplots()
    names = [*printed.bins(), *([NO_PCC] if info[NO_PCC].fillna(0).any() else [])]
    left = np.zeros(len(info))
    for name in names:
        width = info[name].fillna(0).to_numpy(float)
        _draw_bin(axes, info, name, left, width)
        left += width
    for place, note in enumerate(info["note"]):
        axes.text(2, place, textwrap.shorten(note, 90), va="center", fontsize=7.5, color="gray")
    papers = np.where(info["whose"] == "printed", ", as printed", "")
    axes.set_yticks(range(len(info)), info["model"] + papers)
    axes.set(ylim=(len(info) - 0.4, -0.6), xlabel="genes of the panel")
    figure.suptitle(textwrap.fill(title, 130), fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=8,
        title="median PCC over sections",
        title_fontsize=8,
    )
    return figure


def _draw_bin(
    axes: Any, info: pd.DataFrame, name: str, left: np.ndarray, width: np.ndarray
) -> None:
    """One bin's part of every bar, with its count where there is room."""
    colour = BIN_COLOURS[name]
    bars = axes.barh(range(len(info)), width, left=left, color=colour, edgecolor="white")
    bars.set_label(name)
    dark = name in ("0.3 - 0.5", "> 0.5")
    for place, bar in enumerate(bars):
        theirs = info["whose"].iloc[place] == "printed"
        if theirs:
            bar.set(hatch="////", alpha=0.5)
        if width[place] >= 0.035 * info["genes"].max():
            axes.text(
                left[place] + width[place] / 2,
                place,
                f"{width[place]:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark and not theirs else "#222222",
                path_effects=[withStroke(linewidth=2.5, foreground="white")] if theirs else [],
            )


def plot_figure_3(info: pd.DataFrame, model: str, title: str) -> Figure:
    """Draw `paper_tables.figure_3_info`: the model filled, the control as an outline."""
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    edges = [*info["left"], info["left"].iloc[-1] + info["width"].iloc[-1]]
    known = {MODEL: f"{model}: {int(info[MODEL].sum())} genes above 0"}
    known[DEPTH] = f"{DEPTH_LABEL}: {int(info[DEPTH].sum())}"
    axes.stairs(info[MODEL], edges, fill=True, color="#2b6cb0", alpha=0.6, label=known[MODEL])
    axes.stairs(info[DEPTH], edges, color="#666666", linewidth=1.4, label=known[DEPTH])
    for threshold in metrics.THRESHOLDS[1:]:
        axes.axvline(threshold, color="black", linewidth=0.6, linestyle=":")
    bins = printed.bins()
    text = (
        f"the paper prints, for {printed.NAMES[printed.BEST]} + AuxNet:\n"
        f"{printed.ABOVE_0} above 0, of which {bins['0.1 - 0.3']} in 0.1 to 0.3,\n"
        f"{bins['0.3 - 0.5']} in 0.3 to 0.5, {bins['> 0.5']} above 0.5"
    )
    axes.plot([], [], " ", label=text)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    used = info.loc[(info[MODEL] > 0) | (info[DEPTH] > 0), "left"]
    last = (used.max() if len(used) else 0) + 2 * info["width"].iloc[0]
    axes.set_xlim(0, float(np.clip(last, 0.6, 1)))
    axes.set(xlabel="PCC on the held-out patient (median over sections)", ylabel="genes")
    axes.set_title(textwrap.fill(title, 95), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Map:
    """What Fig. 4 shows of a gene on a section; lengths are slide pixels.

    Attributes:
        picture: of the slide.
        xy_N2: the spots' centres.
        diameter: of a drawn spot.
        kind_N: tumour, normal or "" (neither, or nobody says); None where there are no labels.
        measured_N: standardised.
        predicted_N: the same.
        pcc: over the section's spots, a constant prediction as 0.
        symbol: of the gene.
        section: its name.
    """

    picture: Picture
    xy_N2: np.ndarray
    diameter: float
    kind_N: np.ndarray | None
    measured_N: np.ndarray
    predicted_N: np.ndarray
    pcc: float
    symbol: str
    section: str


def map_info(adata: anndata.AnnData, section: str, gene: str, picture: Picture) -> Map:
    """One gene on one section: `adata` as `paper.judge` made it."""
    part = adata[(adata.obs["section"] == section).to_numpy()]
    column = part.var_names.get_loc(gene)
    predicted_N = np.asarray(part.X[:, column], float)
    measured_N = np.asarray(part.layers["measured"][:, column], float)
    kind_N = tissue(part.obs["label"]) if "label" in part.obs else np.full(len(part), "")
    xy_N2 = np.asarray(part.obsm["spatial"], float)
    pcc = metrics.pearson(predicted_N[:, None], measured_N[:, None])[0]
    return Map(
        picture=picture,
        xy_N2=xy_N2,
        diameter=0.62 * pitch(xy_N2),
        kind_N=kind_N if (kind_N != "").any() else None,
        measured_N=measured_N,
        predicted_N=predicted_N,
        pcc=float(pcc) if np.isfinite(pcc) else 0.0,
        symbol=str(part.var["symbol"][gene]),
        section=section,
    )


def pitch(xy_N2: np.ndarray) -> float:
    """Median distance from a spot to the nearest other, in slide pixels."""
    if len(xy_N2) < 2:
        return 1.0
    return float(np.median(cKDTree(xy_N2).query(xy_N2, k=2)[0][:, 1]))


def plot_map(info: Map, title: str) -> Figure:
    """Draw `map_info`, panels (a) to (e) as in the paper."""
    low, high = info.xy_N2.min(axis=0) - info.diameter, info.xy_N2.max(axis=0) + info.diameter
    ratio = (high[1] - low[1]) / (high[0] - low[0])
    figure = Figure(figsize=(15, min(1.5 + 2.75 * ratio, 8)), layout="constrained")
    panels, bars = figure.subplots(2, 5, height_ratios=(1, 0.035))
    names = (
        "(a) H&E",
        "(b) tumour black, normal white, else grey",
        f"(c) {info.symbol}, measured",
        f"(d) {info.symbol}, predicted, PCC {info.pcc:.2f}",
        "(e) predicted over the slide",
    )
    for panel, name in zip(panels, names, strict=True):
        panel.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), xticks=[], yticks=[])
        panel.set_aspect("equal")
        panel.set_title(name, fontsize=9)
    for panel in (panels[0], panels[4]):
        panel.imshow(info.picture.image_HW3, extent=info.picture.extent)
        panel.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]))
    _draw_labels(panels[1], info)
    for empty in bars[:2]:
        empty.set_visible(False)
    shown = ((info.measured_N, 1.0), (info.predicted_N, 1.0), (info.predicted_N, 0.65))
    for panel, bar, (values_N, alpha) in zip(panels[2:], bars[2:], shown, strict=True):
        spots = _draw_values(panel, info, values_N, alpha)
        figure.colorbar(spots, cax=bar, orientation="horizontal", extend="both")
        bar.tick_params(labelsize=7)
    figure.suptitle("\n".join(textwrap.fill(part, 170) for part in title.split("\n")), fontsize=9)
    return figure


def _draw_labels(panel: Any, info: Map) -> None:
    panel.set_facecolor("#e8e8e8")
    if info.kind_N is None:
        panel.text(0.5, 0.5, "no labels", transform=panel.transAxes, ha="center", fontsize=12)
        return
    panel.add_collection(_spots(panel, info, facecolors=[LABELS[kind] for kind in info.kind_N]))


def _draw_values(panel: Any, info: Map, values_N: np.ndarray, alpha: float) -> EllipseCollection:
    """Spots coloured from the 2nd to the 98th percentile: predictions vary less than counts."""
    low, high = (float(v) for v in np.percentile(values_N, (2, 98)))
    spots = _spots(panel, info, array=values_N, cmap="viridis", alpha=alpha)
    spots.set_clim(low, high if high > low else low + 1e-6)
    panel.add_collection(spots)
    return spots


def _spots(panel: Any, info: Map, **look: Any) -> EllipseCollection:
    return EllipseCollection(
        info.diameter,
        info.diameter,
        0,
        units="xy",
        offsets=info.xy_N2,
        offset_transform=panel.transData,
        **look,
    )


def section_of(sections: Mapping[str, Any], wanted: str = printed.MAP_SECTION) -> str:
    """The section whose own name is `wanted`, as in BC23903_C2, else the first."""
    named = [name for name in sections if name.rpartition("_")[2] == wanted]
    return named[0] if named else next(iter(sections))
