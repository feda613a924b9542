"""The stains' jitter: against deconvolution by hand, one stain at a time."""

import numpy as np
import pytest
import torch

from brstnet.training.jitter import HED, SIGMA, draw_jitter, jitter, stain_map


def patches(n: int = 4, side: int = 6) -> torch.Tensor:
    """Noise that holds both ends, uint8 (n, side, side, 3)."""
    x = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    x[0, 0, 0], x[0, 0, 1] = 0, 255
    return torch.from_numpy(x)


def maps(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(stain_map(a, b))


def tissue(stains: np.ndarray) -> torch.Tensor:
    """Pixels (n, 3 stains) in levels as they would be seen, uint8 (1, n, 1, 3)."""
    levels = 256 * np.exp(-stains @ HED) - 1
    return torch.from_numpy(levels.round().astype(np.uint8))[None, :, None]


def test_without_jitter_patches_stay_as_they_are() -> None:
    x_BHWC = patches()
    zero = np.zeros((4, 3))
    got = jitter(x_BHWC, maps(zero, zero))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x_BHWC.float(), atol=2e-3, rtol=0)


def test_there_and_back_is_deconvolution_by_hand() -> None:
    """Pixel by pixel in float64: solve for the stains, change them, mix them again."""
    x_BHWC, rng = patches(), np.random.default_rng(1)
    a, b = rng.uniform(-0.3, 0.3, (2, 4, 3))
    got = jitter(x_BHWC, maps(a, b)).numpy()
    for patch, out, scale, shift in zip(x_BHWC.numpy(), got, a, b, strict=True):
        for pixel, found in zip(patch.reshape(-1, 3), out.reshape(-1, 3), strict=True):
            stains = np.linalg.solve(HED.T, -np.log((pixel.astype(float) + 1) / 256))
            levels = 256 * np.exp(-((1 + scale) * stains + shift) @ HED) - 1
            np.testing.assert_allclose(found, levels.clip(0, 255), atol=0.02)


@pytest.mark.parametrize("stain", [0, 1, 2])
def test_a_stain_is_made_stronger_alone(stain: int) -> None:
    """On pixels of one stain its own factor is one of optical density, the others do nothing."""
    amounts = np.zeros((20, 3))
    amounts[:, stain] = np.linspace(0, 1.5, 20)
    x_BHWC = tissue(amounts)
    a = np.full((1, 3), 0.2)
    a[0, stain] = 0
    same = jitter(x_BHWC, maps(a, np.zeros((1, 3))))
    torch.testing.assert_close(same, x_BHWC.float(), atol=0.6, rtol=0)  # levels were rounded
    alone = jitter(x_BHWC, maps(0.2 - a, np.zeros((1, 3))))
    torch.testing.assert_close(alone, tissue(amounts * 1.2).float(), atol=1.1, rtol=0)


def test_each_patch_goes_through_its_own_map() -> None:
    x_BHWC = patches()[:1].repeat(4, 1, 1, 1)
    drawn = torch.from_numpy(draw_jitter(np.random.default_rng(0), (4,)))
    got = jitter(x_BHWC, drawn)
    assert len({one.numpy().tobytes() for one in got}) == 4
    for number in range(4):
        alone = jitter(x_BHWC[:1], drawn[number : number + 1])
        torch.testing.assert_close(got[number : number + 1], alone, atol=1e-3, rtol=0)


def test_over_many_draws_colours_are_kept_and_differ_by_a_few_levels() -> None:
    """On pink tissue: the mean within a level, the deviation below that of HED-light's ends."""
    x_BHWC = tissue(np.array([[0.3, 0.4, 0.05]])).repeat(4000, 1, 1, 1)
    drawn = torch.from_numpy(draw_jitter(np.random.default_rng(0), (4000,)))
    got = jitter(x_BHWC, drawn).numpy().reshape(-1, 3)
    pixel = x_BHWC[0].flatten().numpy().astype(float)
    np.testing.assert_allclose(got.mean(axis=0), pixel, atol=1)
    assert (got.std(axis=0) > 2).all()
    assert (got.std(axis=0) < 12).all()


def test_draws_are_uniform_and_follow_from_the_generator() -> None:
    drawn = draw_jitter(np.random.default_rng(5), (3000, 2))
    assert drawn.shape == (3000, 2, 4, 3)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, draw_jitter(np.random.default_rng(5), (3000, 2)))
    a = np.diagonal(HED @ drawn[..., :3, :] @ np.linalg.inv(HED), axis1=-2, axis2=-1) - 1
    b = drawn[..., 3, :] @ np.linalg.inv(HED)
    for found in (a, b):
        assert np.abs(found).max() <= SIGMA + 1e-5
        np.testing.assert_allclose(found.mean(axis=(0, 1)), 0, atol=0.002)
        np.testing.assert_allclose(found.std(axis=(0, 1)), SIGMA / np.sqrt(3), rtol=0.03)
    together = np.corrcoef(a.reshape(-1, 3).T, b.reshape(-1, 3).T)
    np.testing.assert_allclose(together, np.eye(6), atol=0.05)
