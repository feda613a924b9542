"""Slides to pixels: read a slide, find what is white on it, cut a patch round each spot."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import openslide
import pandas as pd
from PIL import Image, UnidentifiedImageError

PLAIN = {".jpg", ".jpeg", ".png", ".bmp"}


def open_image(path: Path) -> Image.Image:
    """A plain image file, opened but not decoded, without Pillow's limit on size."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a slide is 92 megapixels
    try:
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def slide_size(path: Path) -> tuple[int, int]:
    """Width and height of a slide in pixels, from its header.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no image, or a JPEG that is cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file")
    try:
        if path.suffix.lower() in PLAIN:
            with open_image(path) as image:
                size, kind = image.size, image.format
        else:
            with openslide.OpenSlide(path) as slide:
                size, kind = slide.dimensions, None
    except (UnidentifiedImageError, OSError, openslide.OpenSlideError) as error:
        raise ValueError(f"{path}: not a readable slide: {error}") from error
    if kind == "JPEG" and not _has_end(path.read_bytes()):
        raise ValueError(f"{path}: truncated JPEG, its end is missing; fetch the file again")
    return size


def _has_end(jpeg: bytes) -> bool:
    """Whether an end marker follows the last scan; no scan can hold a marker (T.81, B.1.1.5)."""
    return jpeg.rfind(b"\xff\xd9") > jpeg.rfind(b"\xff\xda")


def read_slide(path: Path) -> np.ndarray:
    """A whole slide at full resolution, uint8 (H, W, 3) RGB, as stored (EXIF turns are ignored).

    Raises:
        ValueError: the file is truncated, damaged or no image.
    """
    try:
        if path.suffix.lower() in PLAIN:
            with open_image(path) as image:
                return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        with openslide.OpenSlide(path) as slide:
            region = slide.read_region((0, 0), 0, slide.dimensions)
            return np.asarray(region)[..., :3]
    except (UnidentifiedImageError, OSError, SyntaxError, openslide.OpenSlideError) as error:
        raise ValueError(
            f"{path}: the slide cannot be decoded ({error}); fetch the file again"
        ) from error


def white_mask(image: np.ndarray) -> np.ndarray:
    """Where a slide is white: uint8 (H, W), 1 for background.

    Otsu's threshold on the whole slide, after a 5x5 Gaussian, as in the paper's code. Per patch, or
    on a thumbnail, it finds something else (Otsu splits tissue from tissue).
    """
    gray = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5), 0)
    return cv2.threshold(gray, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]


def corners(spots: pd.DataFrame, window_px: int) -> np.ndarray:
    """Left and top pixel of the window round each spot, (N, 2)."""
    centre = np.rint(spots[["pixel_x", "pixel_y"]].to_numpy(float)).astype(np.int64)
    return centre - window_px // 2


def crosses_border(corners_N2: np.ndarray, window_px: int, width: int, height: int) -> np.ndarray:
    """Which windows are not wholly on the slide, (N,) bool."""
    far = corners_N2 + window_px
    return (corners_N2 < 0).any(axis=1) | (far[:, 0] > width) | (far[:, 1] > height)


def cut(image: np.ndarray, corners_N2: np.ndarray, window_px: int, input_px: int) -> np.ndarray:
    """Windows of a slide as patches, uint8 (N, input_px, input_px, 3).

    Shrunk by area (each pixel the mean of what it covers), enlarged by cubic interpolation.
    """
    windows = (image[y : y + window_px, x : x + window_px] for x, y in corners_N2)
    return resize(windows, len(corners_N2), input_px)


def resize(windows: Iterable[np.ndarray], n: int, side_px: int) -> np.ndarray:
    """So many square windows as patches of another side, uint8 (n, side_px, side_px, 3)."""
    patches = np.empty((n, side_px, side_px, 3), np.uint8)
    for patch, window in zip(patches, windows, strict=True):
        if len(window) == side_px:
            patch[...] = window
            continue
        how = cv2.INTER_AREA if side_px < len(window) else cv2.INTER_CUBIC
        cv2.resize(window, (side_px, side_px), dst=patch, interpolation=how)
    return patches


def white_fraction(mask: np.ndarray, corners_N2: np.ndarray, window_px: int) -> np.ndarray:
    """Share of each window that is white, (N,) float32."""
    shares = [mask[y : y + window_px, x : x + window_px].mean() for x, y in corners_N2]
    return np.array(shares, np.float32)
