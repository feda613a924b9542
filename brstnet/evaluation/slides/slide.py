"""A slide without counts: opened whatever its format, read in parts, its microns per pixel.

A plain image (JPEG, PNG, BMP, a TIFF without tiles) is held in memory; what OpenSlide reads (SVS,
NDPI, MRXS, tiled TIFF and others) never is. Coordinates of spots are pixels of the full resolution.

Tiled TIFFs are tested, plain and as Aperio's .svs with its scale in the description. NDPI, MRXS and
the rest are not, as only their scanners write them: what is said of them is OpenSlide's word.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from brstnet.data.patches import PLAIN, open_image, slide_size

HELD_BYTES = 4 << 30
"""Most bytes of pixels of a plain image: 37,000 px square."""

MOST_PX = 1 << 37
"""Pixels that a slide may claim: 370,000 px square, four times the largest scans."""

STRIP_PX = 1 << 24
"""Pixels read at a time: 50 MB."""

PLAUSIBLE_UM_PER_PX = (0.05, 10.0)
"""A resolution tag outside is a printer's (72 dpi is 353 um) and not a microscope's."""

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
"""Pillow's modes without colour."""

Read = Callable[[int, int, int, int], np.ndarray]
"""Left, top, width, height in pixels of the level that is read: uint8 (height, width, 3) RGB."""


@dataclass(frozen=True, kw_only=True)
class Slide:
    """An open slide, at one of its levels.

    Attributes:
        path: the file.
        full_px: width and height at full resolution.
        um_per_px: of the full resolution, as the file says; None if it does not.
        size_px: width and height of the level that is read.
        zoom: pixels of the full resolution that one pixel of this level spans.
        read: reads a part of this level.
        levels: this slide at each level that the file has; none where it is held in memory.
    """

    path: Path
    full_px: tuple[int, int]
    um_per_px: float | None
    size_px: tuple[int, int]
    zoom: float
    read: Read
    levels: "tuple[Slide, ...]" = ()

    def for_scale(self, scale: float) -> "Slide":
        """The coarsest level that is no coarser than `scale` pixels of the full resolution."""
        fine = [level for level in self.levels if level.zoom <= scale * 1.01]
        return replace(max(fine, key=lambda s: s.zoom), levels=self.levels) if fine else self

    def strips(self, *, margin: int = 0, multiple: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
        """The slide from top to bottom, in parts of its whole width.

        Args:
            margin: rows read on both sides, where there are any; the slice leaves them out.
            multiple: each part's height is one of this, but for the last.
        """
        width, height = self.size_px
        rows = max(1, STRIP_PX // width // multiple) * multiple
        for top in range(0, height, rows):
            low, high = max(0, top - margin), min(height, top + rows + margin)
            inner = slice(top - low, min(height, top + rows) - low)
            yield inner, self.read(0, low, width, high - low)


def open_slide(path: Path) -> Slide:
    """A slide at full resolution.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no image, is damaged, or claims more pixels than can be.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a slide's file (of MIRAX the .mrxs beside it)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such slide")
    if path.suffix.lower() in PLAIN:
        return _held(path, _header(path))
    try:
        return _in_parts(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise ValueError(f"{path}: {_unreadable(error)}") from error
    return _held(path, _header(path))  # a TIFF without tiles


def _unreadable(error: Exception) -> str:
    return (
        f"not a readable slide ({error or type(error).__name__}); it must be whole, and a JPEG, "
        "PNG, BMP or TIFF, or of a format that OpenSlide reads"
    )


def _header(path: Path) -> tuple[int, int, float | None]:
    """Width, height and microns per pixel of a plain image."""
    if path.suffix.lower() in PLAIN:
        slide_size(path)  # a JPEG that is cut off
    try:
        with open_image(path) as image:
            size, mode, um = image.size, image.mode, plausible(_um_of_dpi(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {_unreadable(error)}") from error
    if mode in GREY:
        raise ValueError(
            f"{path}: is grey (Pillow calls it {mode}), and must be in colour, by which "
            "haematoxylin and eosin are told apart"
        )
    return *size, um


def _um_of_dpi(image: Image.Image) -> float | None:
    dots = image.info.get("dpi")
    return 25400 / float(dots[0]) if dots and float(dots[0]) > 0 else None


def plausible(um_per_px: float | None) -> float | None:
    """Microns per pixel that a microscope can have; None for anything else."""
    low, high = PLAUSIBLE_UM_PER_PX
    return um_per_px if um_per_px is not None and low <= um_per_px <= high else None


def _held(path: Path, header: tuple[int, int, float | None]) -> Slide:
    """A plain image, decoded."""
    width, height, um_per_px = header
    if 3 * width * height > HELD_BYTES:
        raise ValueError(
            f"{path}: {width} x {height} px need {3 * width * height / 1e9:.1f} GB in memory, at "
            f"most {HELD_BYTES / 1e9:.1f} GB are taken: save it as a tiled pyramidal TIFF (vips "
            "tiffsave --tile --pyramid), which is read in parts"
        )
    image = _decoded(path)

    def read(left: int, top: int, width: int, height: int) -> np.ndarray:
        return image[top : top + height, left : left + width]

    size = (image.shape[1], image.shape[0])
    return Slide(path=path, full_px=size, um_per_px=um_per_px, size_px=size, zoom=1.0, read=read)


def _decoded(path: Path) -> np.ndarray:
    """RGB of a plain image as stored; white where it is clear, the upper 8 of 16 bits a channel."""
    try:
        with open_image(path) as image:
            if image.has_transparency_data:
                return on_white(np.array(image.convert("RGBA")))
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}: the slide cannot be decoded ({error}); fetch the file again"
        ) from error


def _in_parts(path: Path) -> Slide:
    """What OpenSlide reads: nothing is held but the part asked for."""
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise
    except openslide.OpenSlideError as error:
        raise ValueError(f"{path}: {_unreadable(error)}") from error
    full = handle.dimensions
    if math.prod(full) > MOST_PX:
        raise ValueError(f"{path}: claims {full[0]} x {full[1]} px, more than any slide has")
    um = _um_of_properties(path, handle)
    levels = tuple(
        Slide(
            path=path,
            full_px=full,
            um_per_px=um,
            size_px=handle.level_dimensions[number],
            zoom=float(handle.level_downsamples[number]),
            read=_reader(path, handle, number),
        )
        for number in range(handle.level_count)
    )
    return replace(levels[0], levels=levels)


def _um_of_properties(path: Path, handle: openslide.OpenSlide) -> float | None:
    names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    try:
        x, y = (float(handle.properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    if plausible(x) is None or plausible(y) is None:
        return None
    if abs(x / y - 1) > 0.02:
        raise ValueError(
            f"{path}: pixels must be square, the file says {x} x {y} um: mend its mpp properties"
        )
    return math.sqrt(x * y)


def _reader(path: Path, handle: openslide.OpenSlide, level: int) -> Read:
    zoom = handle.level_downsamples[level]

    def read(left: int, top: int, width: int, height: int) -> np.ndarray:
        corner = (round(left * zoom), round(top * zoom))
        try:
            region = handle.read_region(corner, level, (width, height))
        except openslide.OpenSlideError as error:
            raise ValueError(
                f"{path}: the slide cannot be decoded at {corner} ({error}); fetch the file again"
            ) from error
        return on_white(np.asarray(region))

    return read


def on_white(rgba_HW4: np.ndarray) -> np.ndarray:
    """RGB of a region, white where nothing was scanned (MRXS and others leave that transparent)."""
    rgb_HW3 = np.ascontiguousarray(rgba_HW4[..., :3])
    empty_HW = rgba_HW4[..., 3] == 0
    if empty_HW.any():
        rgb_HW3[empty_HW] = 255
    return rgb_HW3
