"""A gene's map as OME-TIFF: what is painted, its levels, its scale, and who can read it."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import cv2
import matplotlib as mpl
import numpy as np
import openslide
import pytest
from PIL import Image

from brstnet.evaluation.slides import ome
from brstnet.evaluation.slides.ome import Discs, level_sizes, paint
from brstnet.evaluation.slides.overlay import Overlay
from brstnet.evaluation.slides.slide import Slide, open_slide

UM = 0.5
SIZE = (1301, 1100)  # width, height

needs_tifffile = pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None,
    reason="tifffile is not installed (the extra brstnet[ome])",
)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """Smooth colours, which JPEG keeps."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    image = np.stack([x // 9 + 60, y // 9 + 90, (x + y) // 18 + 80], axis=2).astype(np.uint8)
    file = tmp_path_factory.mktemp("slide") / "slide.png"
    Image.fromarray(image).save(file)
    return open_slide(file)


def whole(slide: Slide) -> np.ndarray:
    return slide.read(0, 0, *slide.size_px)


@pytest.fixture(scope="module")
def info() -> Overlay:
    """Three spots, in pixels of a thumbnail of a quarter; one lies where four tiles meet."""
    return Overlay(
        picture_HW3=np.zeros((275, 325, 3), np.uint8),
        xy_N2=np.array([[128.0, 128.0], [40.3, 60.7], [318.0, 20.0]]),
        diameter=20.0,
        value_N=np.array([1.0, 2.0, 9.0]),
        limits=(1.0, 3.0),
        bar=0.0,
        bar_um=None,
        symbol="GNAS <&>",
        title="GNAS, predicted; expected PCC 0.50",
        label="log units",
    )


# What is painted ---------------------------------------------------------------------------------


def test_discs_are_painted_where_the_spots_are(slide: Slide, info: Overlay) -> None:
    """Against the distance of each pixel's centre, and viridis by hand."""
    image, discs = whole(slide), ome.discs_of(info, 4)
    found = paint(image, 0, 0, discs)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]] + 0.5
    for (spot_x, spot_y), share in zip(4 * info.xy_N2, (0.0, 0.5, 1.0), strict=True):
        distance = np.hypot(x - spot_x, y - spot_y)
        colour = np.array(mpl.colormaps["viridis"](share)[:3]) * 255
        inner = distance <= 40
        expected = ome.OPACITY * colour + (1 - ome.OPACITY) * image[inner]
        assert np.abs(found[inner] - expected).max() <= 1
        ring = (distance > 40) & (distance < 60)
        assert (found[ring] == image[ring]).all()
    changed = (found != image).any(axis=2)
    cap = 40**2 * np.arccos(29 / 40) - 29 * np.sqrt(40**2 - 29**2)  # of the third, off the slide
    assert changed.sum() == pytest.approx(3 * np.pi * 40**2 - cap, rel=0.01)


def test_parts_are_painted_as_the_whole(slide: Slide, info: Overlay) -> None:
    discs = ome.discs_of(info, 4)
    image = paint(whole(slide), 0, 0, discs)
    for left, top, width, height in ((0, 0, 512, 512), (511, 489, 77, 60), (1200, 0, 101, 99)):
        part = paint(slide.read(left, top, width, height), left, top, discs)
        assert (part == image[top : top + height, left : left + width]).all()
    untouched = slide.read(900, 900, 50, 50)
    assert paint(untouched, 900, 900, discs) is untouched


def test_a_slide_is_not_changed_by_painting(slide: Slide, info: Overlay) -> None:
    before = whole(slide).copy()
    paint(whole(slide), 0, 0, ome.discs_of(info, 4))
    assert (whole(slide) == before).all()


def test_no_spot_and_one_spot_can_be_painted() -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    none = Discs(xy_N2=np.empty((0, 2)), rgb_N3=np.empty((0, 3), np.uint8), radius=3.0)
    assert paint(image, 0, 0, none) is image
    one = Discs(xy_N2=np.array([[4.5, 4.5]]), rgb_N3=np.full((1, 3), 255, np.uint8), radius=2.0)
    assert (paint(image, 0, 0, one)[4, 4] == 153).all()


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((1024, 3), [(1024, 3)]),
        ((4101, 900), [(4101, 900), (2050, 450), (1025, 225), (512, 112)]),
        ((5000, 1), [(5000, 1)]),
    ],
)
def test_levels_halve_until_they_are_small(
    size: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    assert level_sizes(size) == sizes


# What is written ---------------------------------------------------------------------------------


def tiff_of(slide: Slide, info: Overlay, folder: Path, um: float | None = UM) -> Path:
    ome.write(folder / "gene.ome.tif", info, slide, 4, um)
    return folder / "gene.ome.tif"


def decoded(tifffile: ModuleType, path: Path) -> list[np.ndarray]:
    """Each level, put together from its tiles' JPEGs by OpenCV."""
    content, images = path.read_bytes(), []
    with tifffile.TiffFile(path) as tiff:
        for level in tiff.series[0].levels:
            (page,) = level.pages
            height, width, _ = level.shape
            columns, image = -(-width // ome.TILE_PX), np.zeros((8192, 8192, 3), np.uint8)
            for number, (at, size) in enumerate(
                zip(page.dataoffsets, page.databytecounts, strict=True)
            ):
                tile = cv2.imdecode(np.frombuffer(content[at : at + size], np.uint8), 1)
                top, left = (ome.TILE_PX * n for n in divmod(number, columns))
                image[top : top + ome.TILE_PX, left : left + ome.TILE_PX] = tile[..., ::-1]
            images.append(image[:height, :width])
    return images


@needs_tifffile
def test_all_levels_hold_the_painted_slide(slide: Slide, info: Overlay, tmp_path: Path) -> None:
    import tifffile

    images = decoded(tifffile, tiff_of(slide, info, tmp_path))
    expected = paint(whole(slide), 0, 0, ome.discs_of(info, 4))
    assert len(images) == 2
    assert np.abs(images[0].astype(int) - expected).mean() < 1
    half = cv2.resize(expected[:, :1300], (650, 550), interpolation=cv2.INTER_AREA)
    assert np.abs(images[1].astype(int) - half).mean() < 1
    assert [p.name for p in tmp_path.iterdir()] == ["gene.ome.tif"]


@needs_tifffile
def test_the_gene_and_the_scale_stand_in_its_metadata(
    slide: Slide, info: Overlay, tmp_path: Path
) -> None:
    import tifffile

    coarse = dataclasses.replace(slide, zoom=2.0)
    with tifffile.TiffFile(tiff_of(coarse, info, tmp_path)) as tiff:
        assert tiff.is_ome
        assert tiff.is_bigtiff
        (series,) = tiff.series
        about = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
    assert series.axes == "YXS"
    pixels = about["Pixels"]
    assert pixels["Channel"]["Name"] == "GNAS <&>"
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeY"]) == (1.0, 1.0)
    assert pixels["PhysicalSizeXUnit"] == "\N{MICRO SIGN}m"
    assert (pixels["SizeX"], pixels["SizeY"], pixels["SizeC"]) == (*SIZE, 3)
    assert "viridis from 1 to 3" in about["Description"]
    with tifffile.TiffFile(tiff_of(slide, info, tmp_path, None)) as tiff:
        assert "PhysicalSize" not in tiff.ome_metadata


@needs_tifffile
def test_others_open_it(slide: Slide, info: Overlay, tmp_path: Path) -> None:
    """OpenSlide and libtiff (through Pillow), and `brstnet predict` itself."""
    path = tiff_of(slide, info, tmp_path)
    expected = paint(whole(slide), 0, 0, ome.discs_of(info, 4)).astype(int)
    with openslide.OpenSlide(path) as handle:
        region = np.asarray(handle.read_region((0, 0), 0, SIZE))[..., :3]
        assert float(handle.properties["openslide.mpp-x"]) == pytest.approx(UM)
    assert np.abs(region - expected).mean() < 1
    with Image.open(path) as image:
        assert np.abs(np.asarray(image.convert("RGB")) - expected).mean() < 1
    assert open_slide(path).um_per_px == pytest.approx(UM)


@needs_tifffile
def test_a_tile_is_read_at_a_time(slide: Slide, info: Overlay, tmp_path: Path) -> None:
    asked = []

    def read(left: int, top: int, width: int, height: int) -> np.ndarray:
        asked.append((left, top, width, height))
        return slide.read(left, top, width, height)

    tiff_of(dataclasses.replace(slide, read=read), info, tmp_path)
    assert len(asked) == 3 * 3  # each place once, though there are two levels
    assert max(width * height for *_, width, height in asked) <= ome.TILE_PX**2


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ome.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'brstnet[ome]'")):
        ome.require()
