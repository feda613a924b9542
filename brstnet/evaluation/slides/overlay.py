"""A gene's predictions drawn over the slide: `..._info` computes, `plot_...` draws."""

import math
import textwrap
from dataclasses import dataclass
from pathlib import PurePath

import anndata
import numpy as np
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from brstnet.data.guarded import plain_name
from brstnet.evaluation.slides.slide import Slide
from brstnet.evaluation.slides.tissue import Survey

ROUND = (1, 2, 5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """What a map of one gene shows; lengths are pixels of the picture.

    `limits` are the 2nd and 98th percentile of the values; `bar_um` the length that the scale bar
    stands for, None where the slide's scale is unknown.
    """

    picture_HW3: np.ndarray
    xy_N2: np.ndarray
    diameter: float
    value_N: np.ndarray
    limits: tuple[float, float]
    bar: float
    bar_um: float | None
    symbol: str
    title: str
    label: str


def overlay_info(
    adata: anndata.AnnData, gene: str, found: Survey, slide: Slide, um_per_px: float | None
) -> Overlay:
    """A gene's predictions at the places of the spots on the slide's thumbnail."""
    about = adata.uns["brstnet"]
    scale = found.factor * slide.zoom  # pixels of the full resolution in one of the picture
    value_N = adata.X[:, adata.var_names.get_loc(gene)]
    low, high = (float(v) for v in np.percentile(value_N, (2, 98)))
    pcc, symbol = float(adata.var["expected_pcc"][gene]), adata.var["symbol"][gene]
    expected = "never measured" if math.isnan(pcc) else f"{pcc:.2f}"
    bar, bar_um = 0.0, None
    if um_per_px is not None:
        bar_um = round_length(slide.full_px[0] * um_per_px / 5)
        bar = bar_um / um_per_px / scale
    heading = f"{about['slide']}; {about['protocol_line']}"
    name = symbol if symbol == gene else f"{symbol} ({gene})"
    return Overlay(
        picture_HW3=found.thumbnail_HW3,
        xy_N2=adata.obsm["spatial"] / scale,
        diameter=float(about["pitch_px"]) / 2 / scale,
        value_N=value_N,
        limits=(low, high if high > low else low + 1e-6),
        bar=bar,
        bar_um=bar_um,
        symbol=str(symbol),
        title=f"{name}, predicted; expected PCC {expected}\n{heading}",
        label=str(about["units"]),
    )


def round_length(um: float) -> float:
    """The largest of 1, 2, 5, 10, ... microns that is no longer than this."""
    power = 10.0 ** math.floor(math.log10(um))
    return max(step * power for step in ROUND if step * power <= um)


def plot_overlay(info: Overlay) -> Figure:
    """Draw `overlay_info`: the slide, its spots coloured by value, a scale bar and a colour bar."""
    height, width = info.picture_HW3.shape[:2]
    figure = Figure(figsize=(8, 1.2 + 6.6 * height / width), layout="constrained")
    axes = figure.subplots()
    axes.imshow(info.picture_HW3, extent=(0, width, height, 0))
    spots = EllipseCollection(
        info.diameter,
        info.diameter,
        0,
        units="xy",
        offsets=info.xy_N2,
        offset_transform=axes.transData,
        array=info.value_N,
        cmap="viridis",
        alpha=0.85,
    )
    spots.set_clim(*info.limits)
    axes.add_collection(spots)
    if info.bar_um is not None:
        _scale_bar(axes, info.bar, info.bar_um, width, height)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title("\n".join(textwrap.fill(t, 95) for t in info.title.split("\n")), fontsize=9)
    figure.colorbar(spots, ax=axes, shrink=0.8, extend="both", label=info.label)
    return figure


def _scale_bar(axes: object, length: float, um: float, width: int, height: int) -> None:
    left, y = 0.04 * width, 0.96 * height
    axes.plot([left, left + length], [y, y], color="black", linewidth=3)  # type: ignore[attr-defined]
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} \N{GREEK SMALL LETTER MU}m"
    axes.text(left + length / 2, y - 0.012 * height, text, ha="center", va="bottom", fontsize=9)  # type: ignore[attr-defined]


def file_name(adata: anndata.AnnData, gene: str, ending: str = ".png") -> str:
    """What a gene's map is called: by its symbol, or by its id where that is no file's name."""
    symbol = str(adata.var["symbol"][gene])
    unique = (adata.var["symbol"] == symbol).sum() == 1
    name = symbol if unique and plain_name(symbol) else gene
    safe = name if plain_name(name) else f"number_{adata.var_names.get_loc(gene)}"
    return PurePath(f"gene_{safe}{ending}").name
