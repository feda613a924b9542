"""Tiled pyramidal TIFFs without a library, as OpenSlide reads them."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ASCII, SHORT, LONG, RATIONAL = 2, 3, 4, 5
TILE = 64


def write_tiled(
    path: Path,
    levels: Sequence[np.ndarray],
    per_cm: tuple[int, int] | None = None,
    description: str = "",
) -> Path:
    """Levels, uint8 (H, W, 3), as uncompressed tiles (TIFF 6.0, section 15), largest first.

    The resolution and the description are written to every level.
    """
    content = bytearray(b"II*\0\0\0\0\0")
    link = 4  # where the place of the next directory is noted
    for number, image in enumerate(levels):
        places = []
        for tile in _tiles(image):
            places.append(len(content))
            content += tile
        entries = _entries(image, places, content, reduced=number > 0, per_cm=per_cm)
        entries = sorted([*entries, *_described(description, content)], key=_tag)
        struct.pack_into("<I", content, link, len(content))
        content += struct.pack("<H", len(entries)) + b"".join(entries)
        link = len(content)
        content += bytes(4)
    path.write_bytes(content)
    return path


def _tiles(image: np.ndarray) -> list[bytes]:
    height, width, _ = image.shape
    padded = np.pad(image, ((0, -height % TILE), (0, -width % TILE), (0, 0)))
    return [
        padded[y : y + TILE, x : x + TILE].tobytes()
        for y in range(0, height, TILE)
        for x in range(0, width, TILE)
    ]


def aperio(levels: Sequence[np.ndarray], um_per_px: float, magnification: int) -> str:
    """What Aperio's scanners write into a slide's description (.svs)."""
    height, width, _ = levels[0].shape
    return (
        f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] "
        f"({TILE}x{TILE}) RAW|AppMag = {magnification}|MPP = {um_per_px}"
    )


def _described(text: str, content: bytearray) -> list[bytes]:
    """The entry of a description, if there is one."""
    if not text:
        return []
    entry = struct.pack("<HHII", 270, ASCII, len(text) + 1, len(content))
    content.extend(text.encode() + b"\0" * (1 + (len(text) + 1) % 2))
    return [entry]


def _tag(entry: bytes) -> int:
    tag: int = struct.unpack_from("<H", entry)[0]
    return tag


def _entries(
    image: np.ndarray,
    places: Sequence[int],
    content: bytearray,
    *,
    reduced: bool,
    per_cm: tuple[int, int] | None,
) -> list[bytes]:
    """A directory's entries, in the order of their tags; long values go to the end of the file."""

    def entry(tag: int, kind: int, values: Sequence[int]) -> bytes:
        pairs = kind == RATIONAL
        packed = struct.pack(f"<{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(packed) > 4:
            place = struct.pack("<I", len(content))
            content.extend(packed)
            packed = place
        return struct.pack("<HHI", tag, kind, len(values) // (1 + pairs)) + packed.ljust(4, b"\0")

    height, width, _ = image.shape
    entries = [
        entry(254, LONG, [int(reduced)]),
        entry(256, LONG, [width]),
        entry(257, LONG, [height]),
        entry(258, SHORT, [8, 8, 8]),
        entry(259, SHORT, [1]),
        entry(262, SHORT, [2]),
        entry(277, SHORT, [3]),
    ]
    if per_cm is not None:
        entries += [entry(282, RATIONAL, [per_cm[0], 1]), entry(283, RATIONAL, [per_cm[1], 1])]
    entries.append(entry(284, SHORT, [1]))
    if per_cm is not None:
        entries.append(entry(296, SHORT, [3]))
    return [
        *entries,
        entry(322, LONG, [TILE]),
        entry(323, LONG, [TILE]),
        entry(324, LONG, places),
        entry(325, LONG, [TILE * TILE * 3] * len(places)),
    ]
