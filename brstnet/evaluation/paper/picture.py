"""A slide as a picture of bounded size: from the slide itself, or put together from its patches."""

from dataclasses import dataclass

import cv2
import numpy as np

from brstnet.data.patches import corners
from brstnet.data.store import Store
from brstnet.evaluation.slides.slide import Slide

LONGER_PX = 1200
"""Longer side of a picture, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture and where on the slide it lies.

    Attributes:
        image_HW3: uint8 RGB.
        extent: left, right, bottom and top of the picture in slide pixels, as matplotlib has them.
        origin: what it was made of, in words.
    """

    image_HW3: np.ndarray
    extent: tuple[float, float, float, float]
    origin: str


def of_slide(slide: Slide) -> Picture:
    """The whole slide, shrunk by area, a strip at a time.

    Raises:
        ValueError: it cannot be decoded.
    """
    width, height = slide.full_px
    level = slide.for_scale(max(width, height) / LONGER_PX)
    factor = max(1, -(-max(level.size_px) // LONGER_PX))
    parts = []
    for _, strip in level.strips(multiple=factor):
        size = (max(1, strip.shape[1] // factor), max(1, strip.shape[0] // factor))
        parts.append(cv2.resize(strip, size, interpolation=cv2.INTER_AREA))
    return Picture(
        image_HW3=np.concatenate(parts),
        extent=(0, width, height, 0),
        origin="the slide itself",
    )


def of_patches(store: Store, section: str) -> Picture:
    """The store's patches of a section at their places, white where none was kept.

    What a patch does not cover is not in the store: between spots, and where spots were left out.
    """
    window = int(store.index["prepare"]["window_px"])
    patches = store.patches(section)
    corners_N2 = corners(store.spots([section]), window)
    left, top = (int(v) for v in corners_N2.min(axis=0))
    width, height = (int(v) + window for v in corners_N2.max(axis=0) - (left, top))
    zoom = max(max(width, height) / LONGER_PX, window / store.input_px)
    side = max(1, round(window / zoom))
    shape = (round(height / zoom) + side, round(width / zoom) + side, 3)
    image = np.full(shape, 255, np.uint8)
    for patch, (x, y) in zip(patches, np.rint((corners_N2 - (left, top)) / zoom), strict=True):
        small = cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA)
        image[int(y) : int(y) + side, int(x) : int(x) + side] = small
    right, bottom = left + shape[1] * zoom, top + shape[0] * zoom
    return Picture(
        image_HW3=image,
        extent=(left, right, bottom, top),
        origin="the store's patches at their places, stain-normalised: the store holds no slides",
    )
