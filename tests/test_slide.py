"""Slides of all formats read in parts, their scale, and the tissue, spots and patches on them."""

import struct
import zlib
from pathlib import Path

import anndata
import cv2
import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image
from tiled_tiff import TILE, aperio, write_tiled

from brstnet.data import stain
from brstnet.data.patches import corners, cut, white_fraction, white_mask
from brstnet.evaluation.slides import slide as slides
from brstnet.evaluation.slides import tissue
from brstnet.evaluation.slides.slide import open_slide

SIZE = (300, 260)  # width, height


@pytest.fixture(scope="module")
def pixels(demo_raw: Path) -> np.ndarray:
    """A part of a demo slide with tissue and glass, uint8 (260, 300, 3)."""
    image = np.asarray(Image.open(sorted(demo_raw.glob("HE_*.jpg"))[0]))
    return np.ascontiguousarray(image[: SIZE[1], : SIZE[0]])


def tiled(path: Path, image: np.ndarray, per_cm: tuple[int, int] | None = None) -> Path:
    """A tiled pyramidal TIFF of two levels, which OpenSlide reads in parts."""
    half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return write_tiled(path, [image, half], per_cm)


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 20 rows of a slide 300 pixels wide are read at a time."""
    monkeypatch.setattr(slides, "STRIP_PX", 6000)


# Formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "A.TIFF"])
def test_plain_images_are_read_as_they_are(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    slide = open_slide(tmp_path / name)
    assert (slide.full_px, slide.zoom, slide.um_per_px) == (SIZE, 1, None)
    assert (slide.read(0, 0, *SIZE) == pixels).all()
    assert (slide.read(7, 11, 30, 20) == pixels[11:31, 7:37]).all()


def test_a_tiled_tiff_is_read_in_parts(pixels: np.ndarray, tmp_path: Path) -> None:
    slide = open_slide(tiled(tmp_path / "a.tif", pixels))
    assert slide.full_px == SIZE
    assert [round(level.zoom) for level in slide.levels] == [1, 2]
    assert (slide.read(7, 11, 130, 120) == pixels[11:131, 7:137]).all()
    coarse = slide.for_scale(2.3)
    assert (coarse.size_px, coarse.full_px, coarse.zoom) == ((150, 130), SIZE, 2)
    assert slide.for_scale(1.9).size_px == SIZE
    assert slide.for_scale(0.5).size_px == SIZE


def test_an_aperio_slide_says_its_scale_in_its_description(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    """As .svs files do: no resolution tag, levels of the scanner's own factors."""
    large = pixels.repeat(4, axis=0).repeat(4, axis=1)
    levels = [large, pixels]
    path = write_tiled(tmp_path / "a.svs", levels, description=aperio(levels, 0.2523, 40))
    with openslide.OpenSlide(path) as handle:
        assert handle.properties["openslide.vendor"] == "aperio"
        assert handle.properties["openslide.objective-power"] == "40"
    slide = open_slide(path)
    assert slide.um_per_px == pytest.approx(0.2523)
    assert [level.zoom for level in slide.levels] == [1, 4]
    assert slide.for_scale(0.69 / 0.2523).size_px == slide.full_px  # 2.7: the coarse one is too
    coarse = slide.for_scale(1.01 / 0.2523)
    assert (coarse.read(7, 11, 130, 120) == pixels[11:131, 7:137]).all()


def test_what_was_not_scanned_is_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 10, 20, 30, 255
    assert slides.on_white(rgba).tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3] * 2]


@pytest.mark.parametrize("dpi", [72, 300, 25400 / 0.04])
def test_a_printers_resolution_is_none(dpi: float, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png", dpi=(dpi, dpi))
    assert open_slide(tmp_path / "a.png").um_per_px is None


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_microscopes_resolution_is_read(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / name, dpi=(50800, 50800))
    assert open_slide(tmp_path / name).um_per_px == pytest.approx(0.5, rel=1e-3)


def test_a_tiled_tiffs_resolution_is_read(pixels: np.ndarray, tmp_path: Path) -> None:
    path = tiled(tmp_path / "a.tif", pixels, (20000, 20000))
    assert open_slide(path).um_per_px == pytest.approx(0.5, rel=1e-3)
    path = tiled(tmp_path / "b.tif", pixels, (20000, 10000))
    with pytest.raises(ValueError, match=r"b.tif: pixels must be square, .*0\.5 x 1\.0 um"):
        open_slide(path)


# Broken and hostile files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.svs", "a.ndpi", "a.mrxs"])
@pytest.mark.parametrize("content", [b"", b"no image", b"II*\0" + b"\xff" * 200])
def test_what_is_no_image_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: not a readable slide"):
        open_slide(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_grey_image_is_refused(name: str, kind: type, pixels: np.ndarray, tmp_path: Path) -> None:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(kind)
    Image.fromarray(grey).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: is grey .*, and must be in colour"):
        open_slide(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_a_channel_are_read_as_8(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint16)
    cv2.imwrite(str(tmp_path / name), (pixels.astype(np.uint16) * 256 + noise)[..., ::-1])
    assert (open_slide(tmp_path / name).read(0, 0, *SIZE) == pixels).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_what_is_clear_is_white(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    rgba = np.dstack([pixels, np.full(SIZE[::-1], 255, np.uint8)])
    rgba[:50, :, :] = 0
    Image.fromarray(rgba).save(tmp_path / name)
    found = open_slide(tmp_path / name).read(0, 0, *SIZE)
    assert (found[:50] == 255).all()
    assert (found[50:] == pixels[50:]).all()


def test_a_folder_is_no_slide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; name a slide's file"):
        open_slide(tmp_path)


def test_a_missing_slide_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.svs: no such slide"):
        open_slide(tmp_path / "gone.svs")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_half_a_file_is_refused(name: str, pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.fromarray(pixels).save(path, **({"compression": "tiff_lzw"} if name == "a.tif" else {}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}: (truncated|the slide cannot|not a readable)"):
        open_slide(path)


def test_a_tiled_tiff_that_is_cut_off_is_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    whole = tiled(tmp_path / "whole.tif", pixels).read_bytes()
    for share in (0.2, 0.6):
        path = tmp_path / f"cut{share}.tif"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=rf"cut{share}.tif: not a readable slide"):
            open_slide(path)


def test_a_tile_that_is_not_in_the_file_is_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    """Header and directories are whole: only reading the tile shows it."""
    place = struct.pack("<I", 8 + 24 * 3 * TILE**2)  # the last of 25
    whole = tiled(tmp_path / "whole.tif", pixels).read_bytes()
    assert whole.count(place) == 1
    (tmp_path / "a.tif").write_bytes(whole.replace(place, b"\xff\xff\xff\x7f"))
    with pytest.raises(ValueError, match=r"a.tif: the slide cannot be decoded at .*again"):
        tissue.survey(open_slide(tmp_path / "a.tif"))


def test_an_image_that_claims_more_than_fits_is_refused_unread(tmp_path: Path) -> None:
    """A PNG of some bytes, 60,000 px square by its header: 10.8 GB once decoded."""
    path = tmp_path / "bomb.png"
    Image.new("RGB", (1, 1)).save(path)
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    crc = struct.pack(">I", zlib.crc32(header))
    path.write_bytes(content[:12] + header + crc + content[33:])
    with pytest.raises(ValueError, match=r"bomb.png: 60000 x 60000 px need 10.8 GB .*pyramid"):
        open_slide(path)


def test_a_tiff_that_claims_too_much_is_refused(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slides, "MOST_PX", 1000)
    with pytest.raises(ValueError, match=r"a.tif: claims 300 x 260 px"):
        open_slide(tiled(tmp_path / "a.tif", pixels))


# In parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "multiple"), [(0, 1), (2, 1), (2, 7)])
def test_strips_give_every_row_once(
    margin: int, multiple: int, pixels: np.ndarray, tmp_path: Path, small_strips: None
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    parts = list(open_slide(tmp_path / "a.png").strips(margin=margin, multiple=multiple))
    assert len(parts) > 5
    assert max(strip.shape[0] for _, strip in parts) <= 20 + 2 * margin
    assert (np.concatenate([strip[inner] for inner, strip in parts]) == pixels).all()


def test_a_slide_is_seen_in_parts_as_prepare_sees_it_whole(
    pixels: np.ndarray, tmp_path: Path, small_strips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colours, threshold, white fractions and patches, bit for bit, with 20 rows at a time."""
    target = stain.fit_target(pixels[::-1, :200], method="vahadane")
    whole = stain.normalise(pixels, target)
    slide = open_slide(tiled(tmp_path / "a.tif", pixels))
    read_px = []
    monkeypatch.setattr(slides, "on_white", lambda a: (read_px.append(a.size // 4), a[..., :3])[1])
    look = tissue.fit_look(slide, tissue.survey(slide), target, lightness=True)
    assert (tissue.recolour(pixels, look.table) == whole).all()
    spots = tissue.grid(slide, 40, 23)
    patches = tissue.cut_patches(slide, look, spots, 40, 32, 0.0)
    rows, tissues, images = zip(*patches, strict=True)
    corner_N2 = corners(spots, 40)
    assert list(rows) == list(range(len(spots)))
    assert (np.stack(images) == cut(whole, corner_N2, 40, 32)).all()
    white = white_fraction(white_mask(whole), corner_N2, 40)
    assert np.allclose(1 - white, tissues, atol=1e-7)
    assert 0 < white.mean() < 1
    assert max(read_px) <= 300 * 24


def test_without_a_target_colours_stay(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    found = tissue.survey(slide)
    look = tissue.fit_look(slide, found, None, lightness=True)
    assert look.table is None
    gray = tissue.blurred_gray(pixels)
    assert look.white == cv2.threshold(gray, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]
    assert found.pixels_K.sum() == pixels[..., 0].size


@pytest.mark.parametrize("seed", range(20))
def test_otsu_is_opencvs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dark, light = rng.normal(80, 15, 3000), rng.normal(160 + seed, 10, rng.integers(10, 9000))
    values = np.clip(np.concatenate([dark, light]), 0, 255).astype(np.uint8)
    expected = cv2.threshold(values, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]
    assert tissue.otsu(np.bincount(values, minlength=256)) == expected


@pytest.mark.parametrize("level", [0, 128, 255])
def test_one_colour_and_noise_are_no_tissue(level: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(level, 4, (*SIZE, 3))
    for name, image in (("flat", np.full((*SIZE, 3), level)), ("noise", noise.clip(0, 255))):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match=rf"{name}.png: no tissue found: light and dark"):
            tissue.survey(open_slide(tmp_path / f"{name}.png"))


# Spots -------------------------------------------------------------------------------------------


@pytest.fixture
def slide(pixels: np.ndarray, tmp_path: Path) -> slides.Slide:
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    return open_slide(tmp_path / "slide.png")


def test_a_grid_lies_on_the_slide_in_its_middle(slide: slides.Slide) -> None:
    spots = tissue.grid(slide, 40, 50.5)
    assert tissue.inside(slide, spots, 40).all()
    assert len(spots) == 6 * 5
    assert spots.index[1] == "1x0"
    assert np.allclose(np.diff(spots["pixel_x"][:6]), 50.5)
    assert spots[["pixel_x", "pixel_y"]].mean().tolist() == [150, 130]
    with pytest.raises(ValueError, match="300 x 260 px are less than one window of 261 px"):
        tissue.grid(slide, 261, 50)
    with pytest.raises(ValueError, match=r"spots at a pitch of 0\.0 px, at most"):
        tissue.grid(slide, 40, 0.01)


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet", "h5ad", "h5ad obsm"])
def test_spots_come_from_any_table(kind: str, tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"x": [10.5, 30.0], "y": [20.0, 40.25], "array_x": [3, 4], "array_y": [5, 6], "note": "a"},
        index=pd.Index(["3x5", "4x6"], name="spot"),
    )
    file = tmp_path / f"spots.{kind.split()[0]}"
    if "sv" in kind:
        table.to_csv(file, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        table.to_parquet(file)
    else:
        obs = table.drop(columns=["x", "y"]) if "obsm" in kind else table
        spatial = table[["x", "y"]].to_numpy()
        anndata.AnnData(np.zeros((2, 1)), obs=obs, obsm={"spatial": spatial}).write_h5ad(file)
    spots = tissue.read_spots(file)
    assert spots.index.tolist() == ["3x5", "4x6"]
    assert spots.columns.tolist() == ["array_x", "array_y", "pixel_x", "pixel_y"]
    assert spots.to_numpy().tolist() == [[3, 5, 10.5, 20.0], [4, 6, 30.0, 40.25]]


def test_everything_wrong_with_spots_is_told(tmp_path: Path) -> None:
    file = tmp_path / "spots.csv"
    file.write_text("spot,x,y\na,1,2\nb,,3\na,inf,4\n")
    with pytest.raises(ValueError, match="'b' has no position: x and y are nan and 3") as caught:
        tissue.read_spots(file)
    assert "spot 'a' has no position: x and y are inf and 4" in str(caught.value)
    assert "duplicate spot id 'a'" in str(caught.value)
    for text, message in (("spot,x,y\n", "no spot"), ("a,b\n1,2\n", "columns pixel_x and pixel_y")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            tissue.read_spots(file)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.h5ad"])
def test_spots_that_are_missing_or_broken_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        tissue.read_spots(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x00\xff\xfe\x00nothing")
    with pytest.raises(ValueError, match=name):
        tissue.read_spots(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.xlsx: spots must be"):
        tissue.read_spots(tmp_path / "a.xlsx")


def test_batches_hold_what_was_cut() -> None:
    cuts = ((n, n / 10, np.full((2, 2, 3), n, np.uint8)) for n in range(5))
    found = list(tissue.batches(cuts, 2))
    assert [b.rows_B.tolist() for b in found] == [[0, 1], [2, 3], [4]]
    assert found[1].x_BHWC[:, 0, 0, 0].tolist() == [2, 3]
    assert np.allclose(found[2].tissue_B, [0.4])
