"""Where to predict on a slide, and what the model sees there: colours, tissue, spots, patches.

Everything is as `brstnet prepare` does it to a whole slide, in parts: the stain is fitted on all
its colours, Otsu's threshold on all its brightness, each patch cut, recoloured and shrunk alike.

Shape letters: H W rows and columns, K distinct colours, N spots, B batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import cv2
import numpy as np
import pandas as pd

from brstnet.data import guarded, stain
from brstnet.data.patches import corners, crosses_border, resize
from brstnet.data.sections import read_table
from brstnet.evaluation.slides.slide import Slide

THUMBNAIL_PX = 1600
"""Longer side of the picture that figures are drawn on, at most."""

BLUR_PX = 2
"""How far the 5 x 5 Gaussian of the white filter reaches."""

LEAST_CONTRAST = 15
"""Grey levels between the means of light and dark: her2st's five slides have 94 to 117; white noise
of 4 levels has 4."""

MOST_SPOTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What one pass over a slide finds: its distinct colours, and a small picture of it.

    `code_K`, `rgb_K3` and `pixels_K` are as in `stain.count_colours`; a pixel of `thumbnail_HW3`
    spans `factor` pixels of the level that was read.
    """

    code_K: np.ndarray
    rgb_K3: np.ndarray
    pixels_K: np.ndarray
    thumbnail_HW3: np.ndarray
    factor: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """How a slide is brought to what the model knows.

    `table` maps a colour's number to the recoloured one (2^24,), None leaves colours as they are;
    `stain_matrix` (2, 3) are the slide's own stains; pixels brighter than `white` are background.
    """

    table: np.ndarray | None
    stain_matrix: np.ndarray | None
    white: int


def survey(slide: Slide) -> Survey:
    """Count a slide's colours and make its thumbnail.

    Raises:
        ValueError: it cannot be decoded, or light and dark are not far enough apart for tissue.
    """
    factor = max(1, -(-max(slide.size_px) // THUMBNAIL_PX))
    pixels = np.zeros(stain.N_CODES, np.int64)
    small = []
    for _, strip in slide.strips(multiple=factor):
        code_K, _, pixels_K = stain.count_colours(strip)
        pixels[code_K] += pixels_K
        size = (max(1, strip.shape[1] // factor), max(1, strip.shape[0] // factor))
        small.append(cv2.resize(strip, size, interpolation=cv2.INTER_AREA))
    code_K = np.flatnonzero(pixels)
    rgb_K3 = np.stack([code_K & 255, code_K >> 8 & 255, code_K >> 16], axis=1).astype(np.uint8)
    found = Survey(
        code_K=code_K,
        rgb_K3=rgb_K3,
        pixels_K=pixels[code_K],
        thumbnail_HW3=np.concatenate(small),
        factor=factor,
    )
    _check_contrast(slide, found)
    return found


def _check_contrast(slide: Slide, found: Survey) -> None:
    gray_K = cv2.cvtColor(found.rgb_K3[None], cv2.COLOR_RGB2GRAY)[0]
    histogram = np.bincount(gray_K, found.pixels_K, minlength=256)
    white, level = otsu(histogram), np.arange(256)
    means = [
        np.average(level[part], weights=histogram[part]) if histogram[part].any() else np.nan
        for part in (level <= white, level > white)
    ]
    if not means[1] - means[0] >= LEAST_CONTRAST:
        raise ValueError(
            f"{slide.path}: no tissue found: light and dark must be {LEAST_CONTRAST} grey levels "
            f"apart, are {np.nan_to_num(means[1] - means[0]):.1f}: is this the right file, and in "
            "focus?"
        )


def otsu(histogram: np.ndarray) -> int:
    """Otsu's threshold of a (256,) histogram: what is above it is light (Otsu 1979).

    The level that splits it with the greatest variance between both parts, as OpenCV finds it.
    """
    share = histogram / histogram.sum()
    dark = np.cumsum(share)
    level = np.cumsum(share * np.arange(256))
    light = 1 - dark
    both = (dark > np.finfo(np.float32).eps) & (light > np.finfo(np.float32).eps)
    between = np.zeros(256)
    apart = level[both] / dark[both] - (level[-1] - level[both]) / light[both]
    between[both] = dark[both] * light[both] * apart**2
    return int(np.argmax(between))


def fit_look(
    slide: Slide, found: Survey, target: stain.StainTarget | None, *, lightness: bool
) -> Look:
    """Fit the slide's stains and find how bright its background is, after the stains are changed.

    Raises:
        ValueError: there is no tissue, or a stain is missing or too like the other.
    """
    table = matrix = None
    if target is not None:
        try:
            rgb_K3, matrix = stain.normalise_colours(
                found.rgb_K3, found.pixels_K, target, lightness=lightness
            )
        except ValueError as error:
            raise ValueError(f"{slide.path}: the stain cannot be normalised: {error}") from error
        table = stain.colour_table(found.code_K, rgb_K3)
    histogram = np.zeros(256)
    for inner, strip in slide.strips(margin=BLUR_PX):
        gray = blurred_gray(recolour(strip, table))[inner]
        histogram += np.bincount(gray.ravel(), minlength=256)
    return Look(table=table, stain_matrix=matrix, white=otsu(histogram))


def recolour(image: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """A part of a slide with each colour replaced, if there is a table."""
    return image if table is None else stain.recolour(image, table)


def blurred_gray(image: np.ndarray) -> np.ndarray:
    """What the white filter looks at (`brstnet.data.patches.white_mask`), uint8 (H, W)."""
    gray: np.ndarray = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5), 0)
    return gray


def grid(slide: Slide, window_px: float, pitch_px: float) -> pd.DataFrame:
    """Spots at `pitch_px` in the middle of the slide, in pixels of its full resolution.

    Index COLUMNxROW; array_x, array_y, pixel_x, pixel_y.

    Raises:
        ValueError: the slide is smaller than a window, or would hold too many spots.
    """
    room = [side - window_px for side in slide.full_px]
    if min(room) < 0:
        raise ValueError(
            f"{slide.path}: {slide.full_px[0]} x {slide.full_px[1]} px are less than one window of "
            f"{window_px:.0f} px: check the microns per pixel"
        )
    columns, rows = (int(r // pitch_px) + 1 for r in room)
    if columns * rows > MOST_SPOTS:
        raise ValueError(
            f"{slide.path}: {columns} x {rows} spots at a pitch of {pitch_px:.1f} px, at most "
            f"{MOST_SPOTS} are taken: widen the pitch, or check the microns per pixel"
        )
    y, x = (a.ravel() for a in np.mgrid[:rows, :columns])
    left, top = (
        (side - (n - 1) * pitch_px) / 2
        for side, n in zip(slide.full_px, (columns, rows), strict=True)
    )
    values = {
        "array_x": x,
        "array_y": y,
        "pixel_x": left + x * pitch_px,
        "pixel_y": top + y * pitch_px,
    }
    return pd.DataFrame(values, index=[f"{i}x{j}" for i, j in zip(x, y, strict=True)])


def read_spots(path: Path) -> pd.DataFrame:
    """Spots from a .csv, .tsv, .parquet or .h5ad file, in the order of the file.

    pixel_x and pixel_y (or x and y; in .h5ad also obsm["spatial"]) are pixels of the full
    resolution; the index is the column `spot`, else that of the file, else the row's number.
    array_x and array_y are kept where they are there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table of spots; everything wrong is told at once.
    """
    table = _spot_file(path)
    names = next((n for n in (("pixel_x", "pixel_y"), ("x", "y")) if set(n) <= set(table)), None)
    if names is None:
        found = ", ".join(map(str, list(table.columns)[:20]))
        raise ValueError(
            f"{path}: needs the columns pixel_x and pixel_y, or x and y, in pixels of the slide; "
            f"has {found} (.csv is split at commas, .tsv at tabs)"
        )
    if "spot" in table:
        table = table.set_index("spot")
    xy_N2 = np.column_stack([pd.to_numeric(table[n], errors="coerce") for n in names]).astype(float)
    table.index = table.index.astype(str)
    lost = table.loc[~np.isfinite(xy_N2).all(axis=1), list(names)]
    faults = [
        f"spot {spot!r} has no position: {' and '.join(names)} are {x!r:.40} and {y!r:.40}"
        for spot, x, y in lost[:5].itertuples()
    ]
    faults += [f"duplicate spot id {s!r}" for s in table.index[table.index.duplicated()][:5]]
    if table.empty:
        faults = ["holds no spot"]
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    array = [n for n in ("array_x", "array_y") if n in table]
    return table[array].assign(pixel_x=xy_N2[:, 0], pixel_y=xy_N2[:, 1])


def _spot_file(path: Path) -> pd.DataFrame:
    kind = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    if kind in (".csv", ".csv.gz", ".tsv", ".tsv.gz"):
        return read_table(path, "," if ".csv" in kind else "\t")
    if kind == ".parquet":
        return guarded.read_table(path)
    if kind != ".h5ad":
        raise ValueError(f"{path}: spots must be .csv, .tsv, .parquet or .h5ad")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file")
    try:
        guarded.check_hdf5(path)
        adata = anndata.read_h5ad(path, backed="r")
        table = adata.obs.copy()
        if "pixel_x" not in table and "spatial" in adata.obsm:
            xy_N2 = np.asarray(adata.obsm["spatial"])[:, :2]
            table = table.assign(pixel_x=xy_N2[:, 0], pixel_y=xy_N2[:, 1])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as spots: {error}") from error
    return table


@dataclass(frozen=True, kw_only=True, eq=False)
class Patches:
    """Some spots as the model takes them.

    `rows_B` are their rows in the table of spots, `tissue_B` the share of each window that is not
    white, `x_BHWC` the patches, uint8.
    """

    rows_B: np.ndarray
    tissue_B: np.ndarray
    x_BHWC: np.ndarray


def inside(slide: Slide, spots: pd.DataFrame, window_px: float) -> np.ndarray:
    """Which spots' windows lie wholly on the slide, (N,) bool; `window_px` of full resolution."""
    corner_N2, side = _windows(slide, spots, window_px)
    return ~crosses_border(corner_N2, side, *slide.size_px)


def _windows(slide: Slide, spots: pd.DataFrame, window_px: float) -> tuple[np.ndarray, int]:
    """Left and top pixel of each window (N, 2) and their side, in the level that is read."""
    side = max(1, round(window_px / slide.zoom))
    return corners(spots[["pixel_x", "pixel_y"]] / slide.zoom, side), side


def cut_patches(
    slide: Slide,
    look: Look,
    spots: pd.DataFrame,
    window_px: float,
    input_px: int,
    least_tissue: float,
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Row, tissue fraction and patch uint8 (input_px, input_px, 3) of each spot with enough tissue.

    Windows must lie on the slide; `window_px` is of the full resolution.
    """
    corner_N2, side = _windows(slide, spots, window_px)
    width, height = slide.size_px
    for row, (left, top) in enumerate(corner_N2.tolist()):
        low_x, low_y = max(0, left - BLUR_PX), max(0, top - BLUR_PX)
        far_x, far_y = min(width, left + side + BLUR_PX), min(height, top + side + BLUR_PX)
        wide = recolour(slide.read(low_x, low_y, far_x - low_x, far_y - low_y), look.table)
        inner = np.s_[top - low_y : top - low_y + side, left - low_x : left - low_x + side]
        white = np.float32((blurred_gray(wide)[inner] > look.white).mean())
        if 1 - white >= least_tissue:
            yield row, float(1 - white), resize([wide[inner]], 1, input_px)[0]


def batches(cuts: Iterator[tuple[int, float, np.ndarray]], size: int) -> Iterator[Patches]:
    """So many patches at a time; nothing more is in memory."""
    held: list[tuple[int, float, np.ndarray]] = []
    for cut in cuts:
        held.append(cut)
        if len(held) == size:
            yield _stacked(held)
            held = []
    if held:
        yield _stacked(held)


def _stacked(held: list[tuple[int, float, np.ndarray]]) -> Patches:
    rows, tissue, patches = zip(*held, strict=True)
    return Patches(
        rows_B=np.array(rows), tissue_B=np.array(tissue, np.float32), x_BHWC=np.stack(patches)
    )
