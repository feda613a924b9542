"""A gene's map as a pyramidal OME-TIFF, at the resolution that the model saw: QuPath, napari.

Each file is an RGB picture: the slide, and its spots as coloured discs, half as wide as their
pitch, through which the tissue is seen. Values are in predictions.h5ad; their colours' limits stand
in the file's description. Tiles are JPEG, as scanners' are, and what opens those opens this.

tifffile belongs to the extra `ome`: nothing imports it unless asked.
"""

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np

from brstnet.evaluation.slides.overlay import Overlay
from brstnet.evaluation.slides.slide import Slide

TILE_PX = 512
SMALLEST_PX = 1024
"""The pyramid ends at the first level whose longer side is no longer than this."""

QUALITY = 90
OPACITY = 0.6

Tiles = Callable[[int, int, int, int], np.ndarray]
"""Left, top, width, height: uint8 (height, width, 3) RGB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Discs:
    """Spots to be painted, in pixels of the level that is read; `xy_N2` by rising y."""

    xy_N2: np.ndarray
    rgb_N3: np.ndarray
    radius: float


def require() -> None:
    """Say what to install, before any work is done.

    Raises:
        ImportError: tifffile or imagecodecs, which makes its JPEG tiles, is not installed.
    """
    lacking = [n for n in ("tifffile", "imagecodecs") if importlib.util.find_spec(n) is None]
    if lacking:
        raise ImportError(
            f"OME-TIFFs need {' and '.join(lacking)}, not installed here: pip install "
            "'brstnet[ome]' -c constraints.txt (or leave --ome_tiff away: predictions.h5ad and the "
            "maps need nothing more)"
        )


def write(path: Path, info: Overlay, slide: Slide, factor: int, um_per_px: float | None) -> None:
    """Write a gene's map over the slide, as many times halved as its size asks for.

    A tile is in memory at a time; what waits to be halved again lies beside `path`, on disk.

    Args:
        path: file to make.
        info: the map, in pixels of the slide's thumbnail.
        slide: at the level to write.
        factor: pixels of that level in one of the thumbnail.
        um_per_px: of the slide's full resolution, if it is known.
    """
    require()
    import tifffile

    discs = discs_of(info, factor)
    sizes = level_sizes(slide.size_px)

    def painted(left: int, top: int, width: int, height: int) -> np.ndarray:
        return paint(slide.read(left, top, width, height), left, top, discs)

    with (
        tempfile.TemporaryDirectory(prefix=".halved-", dir=path.parent) as scratch,
        tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff,
    ):
        read: Tiles = painted
        for number, size in enumerate(sizes):
            smaller = sizes[number + 1] if number + 1 < len(sizes) else None
            halved = None if smaller is None else _on_disk(Path(scratch), smaller)
            tiff.write(
                _encoded(read, size, halved),
                shape=(size[1], size[0], 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(1, 1),
                compression="jpeg",
                subfiletype=int(number > 0),
                subifds=0 if number else len(sizes) - 1,
                **(_about(info, slide, um_per_px) if number == 0 else {"metadata": None}),
            )
            read = _reader(halved)


def _about(info: Overlay, slide: Slide, um_per_px: float | None) -> dict[str, object]:
    """What a viewer shows: the gene as the channel's name, what was drawn, the scale."""
    low, high = info.limits
    about: dict[str, object] = {
        "axes": "YXS",
        "Name": f"{info.symbol} on {slide.path.name}",
        "Description": f"{info.title}\n{info.label}; viridis from {low:.4g} to {high:.4g}",
        "Channel": {"Name": info.symbol},
    }
    if um_per_px is None:
        return {"metadata": about}
    um = um_per_px * slide.zoom
    about |= {f"PhysicalSize{axis}": um for axis in "XY"}
    about |= {f"PhysicalSize{axis}Unit": "\N{MICRO SIGN}m" for axis in "XY"}
    return {"metadata": about, "resolution": (1e4 / um, 1e4 / um), "resolutionunit": "CENTIMETER"}


def level_sizes(size_px: tuple[int, int]) -> list[tuple[int, int]]:
    """Width and height of each level, each half of the one before; an odd last row is dropped."""
    sizes = [size_px]
    while max(sizes[-1]) > SMALLEST_PX and min(sizes[-1]) > 1:
        width, height = sizes[-1]
        sizes.append((width // 2, height // 2))
    return sizes


def discs_of(info: Overlay, factor: int) -> Discs:
    """The map's spots in pixels of the level that its thumbnail was made of."""
    low, high = info.limits
    order = np.argsort(info.xy_N2[:, 1], kind="stable")
    share_N = np.clip((info.value_N[order] - low) / (high - low), 0, 1)
    return Discs(
        xy_N2=info.xy_N2[order] * factor,
        rgb_N3=mpl.colormaps["viridis"](share_N, bytes=True)[:, :3],
        radius=info.diameter * factor / 2,
    )


def paint(image: np.ndarray, left: int, top: int, discs: Discs) -> np.ndarray:
    """A part of the slide, uint8 (H, W, 3), with the discs that reach into it.

    A pixel is painted where its centre lies in a disc.
    """
    height, width = image.shape[:2]
    reach = discs.radius + 1
    x_N, y_N = discs.xy_N2.T
    first, end = np.searchsorted(y_N, [top - reach, top + height + reach])
    near = np.flatnonzero((x_N[first:end] > left - reach) & (x_N[first:end] < left + width + reach))
    if not near.size:
        return image
    painted = image.copy()
    for row in near + first:
        x, y = discs.xy_N2[row].tolist()
        low_x, low_y = max(left, math.floor(x - reach)), max(top, math.floor(y - reach))
        far_x = min(left + width, math.ceil(x + reach))
        far_y = min(top + height, math.ceil(y + reach))
        rows, columns = np.ogrid[low_y:far_y, low_x:far_x]
        inside_HW = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= discs.radius**2
        part_HW3 = painted[low_y - top : far_y - top, low_x - left : far_x - left]
        mixed = OPACITY * discs.rgb_N3[row] + (1 - OPACITY) * part_HW3[inside_HW]
        part_HW3[inside_HW] = np.rint(mixed)
    return painted


def _encoded(read: Tiles, size: tuple[int, int], halved: np.ndarray | None) -> Iterator[bytes]:
    """The tiles of a level as JPEG, row by row; each is put into `halved` on its way."""
    width, height = size
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            wide, high = min(TILE_PX, width - left), min(TILE_PX, height - top)
            tile = read(left, top, wide, high)
            if halved is not None:
                _halve(tile, halved, left // 2, top // 2)
            yield _jpeg(tile)


def _halve(tile: np.ndarray, halved: np.ndarray, left: int, top: int) -> None:
    """Put a tile into the next level: each pixel the mean of four."""
    height, width = (side // 2 for side in tile.shape[:2])
    if height and width:
        even = tile[: 2 * height, : 2 * width]
        small = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
        halved[top : top + height, left : left + width] = small


def _jpeg(tile: np.ndarray) -> bytes:
    """A whole tile: what lies beyond the slide repeats its border."""
    below, beside = (TILE_PX - side for side in tile.shape[:2])
    whole = cv2.copyMakeBorder(tile, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    how = [
        *(cv2.IMWRITE_JPEG_QUALITY, QUALITY),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ]
    _, content = cv2.imencode(".jpg", cv2.cvtColor(whole, cv2.COLOR_RGB2BGR), how)
    return content.tobytes()


def _on_disk(folder: Path, size: tuple[int, int]) -> np.ndarray:
    file = folder / f"{size[0]}x{size[1]}"
    return np.memmap(file, np.uint8, "w+", shape=(size[1], size[0], 3))


def _reader(image: np.ndarray | None) -> Tiles:
    def read(left: int, top: int, width: int, height: int) -> np.ndarray:
        assert image is not None
        return np.asarray(image[top : top + height, left : left + width])

    return read
