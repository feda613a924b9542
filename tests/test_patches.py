"""Slides to pixels, against PIL, numpy and masks drawn by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from brstnet.data import patches
from brstnet.data.patches import (
    corners,
    crosses_border,
    cut,
    read_slide,
    slide_size,
    white_fraction,
    white_mask,
)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Noise, 120 x 200 px: no two windows are alike."""
    return np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)


def save(image: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(image).save(path, **options)
    return path


# --- reading


@pytest.mark.parametrize("name", ["slide.jpg", "slide.JPEG", "slide.png", "slide.bmp"])
def test_read_slide_is_pil(image: np.ndarray, tmp_path: Path, name: str) -> None:
    path = save(image, tmp_path / name)
    with Image.open(path) as opened:
        expected = np.array(opened)
    np.testing.assert_array_equal(read_slide(path), expected)
    assert slide_size(path) == (200, 120)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_read_slide_is_rgb_whatever_the_file_holds(
    image: np.ndarray, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "slide.png"
    Image.fromarray(image).convert(mode).save(path)
    with Image.open(path) as opened:
        expected = np.array(opened.convert("RGB"))
    np.testing.assert_array_equal(read_slide(path), expected)


def test_a_turn_in_the_exif_is_ignored(image: np.ndarray, tmp_path: Path) -> None:
    """Spot positions are those of the pixels as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    turned = save(image, tmp_path / "turned.jpg", exif=exif)
    np.testing.assert_array_equal(read_slide(turned), read_slide(save(image, tmp_path / "as.jpg")))
    assert slide_size(turned) == (200, 120)


def test_a_slide_beyond_pillows_limit_is_read(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(image, tmp_path / "slide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    np.testing.assert_array_equal(read_slide(path), image)
    assert slide_size(path) == (200, 120)
    assert Image.MAX_IMAGE_PIXELS == 1000, "the limit is put back"
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match="not a readable slide"):
        slide_size(tmp_path / "no.png")
    assert Image.MAX_IMAGE_PIXELS == 1000, "the limit is put back after an error too"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_jpeg_is_refused_before_it_is_decoded(
    image: np.ndarray, tmp_path: Path, share: float, progressive: bool
) -> None:
    whole = save(image, tmp_path / "whole.jpg", progressive=progressive).read_bytes()
    path = tmp_path / "slide.jpg"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{path}: .*(truncated|not a readable slide)"):
        slide_size(path)
    with pytest.raises(ValueError, match=rf"{path}: the slide cannot be decoded.*fetch the file"):
        read_slide(path)


def test_a_jpeg_with_a_thumbnail_or_a_tail_is_no_truncated_one(
    image: np.ndarray, tmp_path: Path
) -> None:
    """A thumbnail has an end of its own; scanners and cameras write on behind the end."""
    thumbnail = save(image[:16, :16], tmp_path / "thumbnail.jpg").read_bytes()
    with_thumbnail = {"comment": thumbnail, "quality": 90}
    path = save(image, tmp_path / "slide.jpg", **with_thumbnail)
    assert slide_size(path) == (200, 120)
    content = path.read_bytes()
    path.write_bytes(content + bytes(5000))
    assert slide_size(path) == (200, 120)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated JPEG"):
        slide_size(path)


@pytest.mark.parametrize("name", ["slide.jpg", "slide.png", "slide.tif", "slide.svs"])
def test_what_is_no_image_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"{path}: missing file"):
        slide_size(path)
    path.write_text("no image")
    with pytest.raises(ValueError, match=f"{path}: not a readable slide"):
        slide_size(path)
    with pytest.raises(ValueError, match=f"{path}: the slide cannot be decoded"):
        read_slide(path)


def test_real_slide_has_its_end(her2st_raw: Path) -> None:
    for path in (her2st_raw / "images").glob("*.jpg"):
        with patches.open_image(path) as opened:
            assert slide_size(path) == opened.size


# --- cutting


@pytest.mark.parametrize("window_px", [16, 17, 32])
def test_cut_is_pils_crop(image: np.ndarray, window_px: int) -> None:
    corners_N2 = np.array([[0, 0], [3, 50], [200 - window_px, 120 - window_px]])
    crops = [
        np.array(Image.fromarray(image).crop((x, y, x + window_px, y + window_px)))
        for x, y in corners_N2
    ]
    np.testing.assert_array_equal(cut(image, corners_N2, window_px, window_px), crops)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_shrinking_takes_the_mean_of_each_block(image: np.ndarray, factor: int) -> None:
    side = 16
    window = side * factor
    corners_N2 = np.array([[1, 2], [70, 30]])
    patch_NHWC = cut(image, corners_N2, window, side)
    assert patch_NHWC.dtype == np.uint8
    for patch, (x, y) in zip(patch_NHWC, corners_N2, strict=True):
        blocks = image[y : y + window, x : x + window].reshape(side, factor, side, factor, 3)
        assert np.abs(patch - blocks.mean(axis=(1, 3))).max() <= 0.5 + 1e-4


def test_shrinking_by_no_whole_number_keeps_the_mean(image: np.ndarray) -> None:
    window = cut(image, np.array([[0, 0]]), 100, 100)
    shrunk = cut(image, np.array([[0, 0]]), 100, 64)
    np.testing.assert_allclose(shrunk.mean((1, 2)), window.mean((1, 2)), atol=0.3)


def test_enlarging_goes_through_the_pixels() -> None:
    """A ramp stays that ramp: cubic interpolation is exact on it, away from the border."""
    ramp = np.repeat(np.arange(16, dtype=np.uint8)[None, :, None] * 12, 16, axis=0)
    patch = cut(np.repeat(ramp, 3, axis=2), np.array([[0, 0]]), 16, 48)[0]
    centre = (np.arange(48) + 0.5) / 3 - 0.5
    assert np.abs(patch[:, 6:-6, 0] - 12 * centre[6:-6]).max() <= 1


def test_cut_of_nothing(image: np.ndarray) -> None:
    assert cut(image, np.empty((0, 2), int), 32, 16).shape == (0, 16, 16, 3)


# --- windows


def test_corners_centre_the_window_on_the_nearest_pixel() -> None:
    spots = pd.DataFrame({"pixel_x": [100.4, 100.6], "pixel_y": [50.0, 49.51]})
    assert corners(spots, 32).tolist() == [[84, 34], [85, 34]]
    assert corners(spots, 33).tolist() == [[84, 34], [85, 34]]


@pytest.mark.parametrize(
    ("corner", "crosses"),
    [
        ((0, 0), False),
        ((-1, 5), True),
        ((5, -1), True),
        ((168, 88), False),
        ((169, 88), True),
        ((168, 89), True),
    ],
)
def test_border_rule(image: np.ndarray, corner: tuple[int, int], crosses: bool) -> None:
    """A window crosses the border exactly when its slice of the slide is not a full window."""
    height, width = image.shape[:2]
    assert crosses_border(np.array([corner]), 32, width, height).tolist() == [crosses]
    if min(corner) >= 0:
        x, y = corner
        assert (image[y : y + 32, x : x + 32].shape != (32, 32, 3)) == crosses


# --- white


def test_white_fraction_of_a_mask_drawn_by_hand() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40:] = 1  # 24 of the 32 columns of the second window
    mask[0, 0] = 1
    shares = white_fraction(mask, np.array([[0, 0], [32, 8], [8, 8]]), 32)
    np.testing.assert_allclose(shares, [1 / 1024, 24 / 32, 0])
    assert shares.dtype == np.float32


def test_white_mask_is_otsus_on_the_blurred_slide() -> None:
    """Tissue and glass, drawn by hand, and Otsu's threshold worked out with numpy."""
    rng = np.random.default_rng(1)
    drawn = np.zeros((90, 120), np.uint8)
    drawn[:, 80:] = 1
    drawn[30:50, 20:50] = 1  # a hole in the tissue
    gray = np.where(drawn, 235, 120) + rng.integers(-15, 16, drawn.shape)
    slide = np.repeat(gray[..., None], 3, axis=2).astype(np.uint8)
    found = white_mask(slide)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[35:45, 25:45], 1)
    inside = np.array(Image.fromarray(drawn).filter(ImageFilter.MinFilter(7)))
    outside = np.array(Image.fromarray(drawn).filter(ImageFilter.MaxFilter(7)))
    np.testing.assert_array_equal(found[inside == 1], 1)
    np.testing.assert_array_equal(found[outside == 0], 0)
    assert found.mean() == pytest.approx(drawn.mean(), abs=0.02)


def test_white_mask_threshold_is_that_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    gray = np.random.default_rng(2).integers(0, 200, (50, 70), dtype=np.uint8)
    gray[:, 40:] += 55
    monkeypatch.setattr(patches.cv2, "GaussianBlur", lambda image, *_: image)
    mask = white_mask(np.repeat(gray[..., None], 3, axis=2))
    between = [gray_variance(gray, threshold) for threshold in range(255)]
    np.testing.assert_array_equal(mask, gray > int(np.argmax(between)))


def gray_variance(gray: np.ndarray, threshold: int) -> float:
    """Otsu's variance between the two classes (Otsu 1979, eq. 14)."""
    low, high = gray[gray <= threshold], gray[gray > threshold]
    if not (low.size and high.size):
        return 0.0
    return low.size * high.size / gray.size**2 * (low.mean() - high.mean()) ** 2
