"""Stain normalisation against StainTools, SPAMS, numpy, a planted answer and itself."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from brstnet.data import stain
from brstnet.data.stain import Float, StainTarget, UInt8

IMAGES = Path(__file__).parents[2] / "shared" / "data" / "her2st" / "images"
PLANTED_STAINS = np.array([[0.65, 0.70, 0.29], [0.27, 0.82, 0.50]])


def read_crop(section: str, size_px: int = 2048) -> UInt8:
    """The middle of a slide, in RGB, as it lies in the file."""
    path = IMAGES / f"{section}.jpg"
    if not path.exists():
        pytest.skip(f"no her2st slide {path}")
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert bgr is not None, path
    top, left = ((length - size_px) // 2 for length in bgr.shape[:2])
    return np.ascontiguousarray(bgr[top : top + size_px, left : left + size_px, ::-1])


@pytest.fixture(scope="module")
def source() -> UInt8:
    return read_crop("C2")


@pytest.fixture(scope="module")
def target() -> StainTarget:
    return stain.fit_target(read_crop("B4"), method="vahadane")


@pytest.fixture(scope="module")
def source_matrix(source: UInt8) -> Float:
    return stain.fit_target(source, method="vahadane").stain_matrix


@pytest.fixture(scope="module")
def standardised(source: UInt8) -> UInt8:
    staintools = pytest.importorskip("staintools")
    return staintools.LuminosityStandardizer.standardize(source)


@pytest.fixture
def stained() -> UInt8:
    """A white image with a stripe of tissue in planted stains, most of it in one stain alone."""
    rng = np.random.default_rng(0)
    concentrations = rng.uniform(0.3, 2.0, (100, 200, 2))
    concentrations[:40, :, 0] = 0
    concentrations[40:80, :, 1] = 0
    image = np.full((300, 200, 3), 255, np.uint8)
    image[:100] = 255 * np.exp(-concentrations @ PLANTED_STAINS)
    return image


def angles_deg(first: Float, second: Float) -> Float:
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1)
    return np.degrees(np.arccos(np.clip(cosines / np.linalg.norm(second, axis=1), -1, 1)))


def spams_objective(spams: Any, od_N3: Float, matrix: Float) -> float:
    codes = spams.lasso(
        X=np.asfortranarray(od_N3.T),
        D=np.asfortranarray(matrix.T),
        lambda1=stain.DICTIONARY_PENALTY,
        mode=2,
        pos=True,
        numThreads=1,
    )
    conc_N2 = codes.toarray().T
    residual_N3 = od_N3 - conc_N2 @ matrix
    loss_N = 0.5 * (residual_N3**2).sum(1) + stain.DICTIONARY_PENALTY * conc_N2.sum(1)
    return float(loss_N.mean())


def recolour_standardised(image: UInt8) -> UInt8:
    code_K, rgb_K3, pixels_K = stain.count_colours(image)
    rgb_K3 = stain.standardise_lightness(rgb_K3, pixels_K)
    return stain.recolour(image, stain.colour_table(code_K, rgb_K3))


# Against StainTools and SPAMS, on real tissue


def test_lightness_is_that_of_staintools(source: UInt8, standardised: UInt8) -> None:
    np.testing.assert_array_equal(recolour_standardised(source), standardised)


def test_same_stains_give_the_bytes_of_staintools(
    source: UInt8, standardised: UInt8, target: StainTarget, source_matrix: Float
) -> None:
    normaliser = pytest.importorskip("staintools").StainNormalizer("vahadane")
    normaliser.extractor = SimpleNamespace(get_stain_matrix=lambda _: source_matrix)
    normaliser.stain_matrix_target = target.stain_matrix
    normaliser.maxC_target = target.max_concentrations
    expected = normaliser.transform(standardised.copy())
    np.testing.assert_array_equal(stain.normalise(source, target), expected)
    given = stain.normalise(source, target, source_matrix=source_matrix)
    np.testing.assert_array_equal(given, expected)
    as_it_is = stain.normalise(source, target, source_matrix=source_matrix, lightness=False)
    np.testing.assert_array_equal(as_it_is, normaliser.transform(source.copy()))
    assert not np.array_equal(as_it_is, expected)


@pytest.mark.slow
@pytest.mark.parametrize("lightness", [True, False])
def test_a_slide_and_its_colours_alone_give_the_same_bytes(
    source: UInt8, target: StainTarget, lightness: bool
) -> None:
    """Against the steps one after the other, without a table of codes."""
    pixels_N3 = source.reshape(-1, 3)
    rgb_K3, inverse_N, pixels_K = np.unique(
        pixels_N3[:, ::-1], axis=0, return_inverse=True, return_counts=True
    )
    rgb_K3 = np.ascontiguousarray(rgb_K3[:, ::-1])  # by blue, then green, then red, as codes are
    light_K3 = stain.standardise_lightness(rgb_K3, pixels_K) if lightness else rgb_K3
    od_K3, tissue_K = stain.optical_density(light_K3), stain.tissue_mask(light_K3)
    with threadpool_limits(limits=1, user_api="blas"):
        matrix = stain.learn_stain_matrix(od_K3[tissue_K], pixels_K[tissue_K])
    conc_K2 = stain.sparse_code(od_K3, matrix, stain.CONCENTRATION_PENALTY)
    maxima = [np.percentile(np.repeat(c, pixels_K), 99) for c in conc_K2.T]
    conc_K2 = conc_K2 * (target.max_concentrations / maxima)
    new_K3 = (255 * np.exp(-conc_K2 @ target.stain_matrix)).astype(np.uint8)
    whole = stain.normalise(source, target, lightness=lightness)
    np.testing.assert_array_equal(whole.reshape(-1, 3), new_K3[inverse_N.ravel()])
    alone, stains = stain.normalise_colours(rgb_K3, pixels_K, target, lightness=lightness)
    np.testing.assert_array_equal(alone, new_K3)
    np.testing.assert_array_equal(stains, matrix)


def test_target_concentrations_are_those_of_staintools() -> None:
    staintools = pytest.importorskip("staintools")
    crop = read_crop("B4", 1024)
    target = stain.fit_target(crop, method="vahadane")
    normaliser = staintools.StainNormalizer("vahadane")
    normaliser.extractor = SimpleNamespace(get_stain_matrix=lambda _: target.stain_matrix)
    normaliser.fit(staintools.LuminosityStandardizer.standardize(crop))
    np.testing.assert_allclose(target.max_concentrations, normaliser.maxC_target[0], rtol=1e-7)


def test_stains_are_no_worse_than_those_of_spams(standardised: UInt8, source_matrix: Float) -> None:
    """SPAMS with 5000 batches, where StainTools gets through 25 to 70 in its second."""
    spams = pytest.importorskip("spams")
    tissue_N3 = standardised.reshape(-1, 3)[stain.tissue_mask(standardised.reshape(-1, 3))]
    od_N3 = stain.optical_density(tissue_N3)
    dictionary = spams.trainDL(
        X=np.asfortranarray(od_N3.T),
        K=2,
        lambda1=stain.DICTIONARY_PENALTY,
        mode=2,
        modeD=0,
        posAlpha=True,
        posD=True,
        verbose=False,
        iter=5000,
        numThreads=1,
    ).T
    theirs = dictionary[np.argsort(-dictionary[:, 0])]
    ours, best = (spams_objective(spams, od_N3, m) for m in (source_matrix, theirs))
    assert ours <= best
    assert best - ours < 1e-5
    assert angles_deg(source_matrix, theirs).max() < 0.3  # measured: 0.02 and 0.06


def test_fit_is_deterministic(source: UInt8, source_matrix: Float) -> None:
    again = stain.fit_target(source.copy(), method="vahadane").stain_matrix
    np.testing.assert_array_equal(again, source_matrix)


def test_staintools_method_runs_the_library(
    source: UInt8, target: StainTarget, source_matrix: Float, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = pytest.importorskip("staintools").StainNormalizer("vahadane").extractor
    crop = source[512:1024, 512:1024]  # also: not contiguous
    before = crop.copy()
    # Its own stains depend on the machine's load, so the library is given ours.
    monkeypatch.setattr(extractor, "get_stain_matrix", staticmethod(lambda _: source_matrix))
    theirs = StainTarget.from_json(target.to_json() | {"method": "staintools"})
    expected = stain.normalise(crop, target, source_matrix=source_matrix)
    np.testing.assert_array_equal(stain.normalise(crop, theirs), expected)
    fitted = stain.fit_target(crop, method="staintools")
    assert fitted.method == "staintools"
    np.testing.assert_array_equal(fitted.stain_matrix, source_matrix)
    np.testing.assert_array_equal(crop, before)  # the library writes into what it is given


@pytest.mark.parametrize(("stains", "fault"), [(np.ones((2, 3)), "apart"), (None, "its tissue")])
def test_staintools_method_refuses_what_the_library_lets_pass(
    stains: Float | None, fault: str, stained: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = pytest.importorskip("staintools").StainNormalizer("vahadane").extractor
    target = StainTarget(
        method="staintools", stain_matrix=PLANTED_STAINS, max_concentrations=np.ones(2)
    )
    image = np.full((2000, 200, 3), 255, np.uint8)
    image[30:50, :10] = stained[30:50, :10]
    given = PLANTED_STAINS if stains is None else stains
    monkeypatch.setattr(extractor, "get_stain_matrix", staticmethod(lambda _: given))
    with pytest.raises(ValueError, match=fault):
        stain.normalise(image, target)


def test_sparse_code_is_that_of_spams() -> None:
    spams = pytest.importorskip("spams")
    rng = np.random.default_rng(0)
    for penalty in (0.01, 0.1, 0.5):
        matrix = stain._unit_rows(rng.uniform(0, 1, (2, 3)))
        od_N3 = rng.gamma(1.0, 0.5, (20_000, 3))
        x, d = np.asfortranarray(od_N3.T), np.asfortranarray(matrix.T)
        expected = spams.lasso(X=x, D=d, lambda1=penalty, mode=2, pos=True, numThreads=1)
        conc_N2 = stain.sparse_code(od_N3, matrix, penalty)
        np.testing.assert_allclose(conc_N2, expected.toarray().T, rtol=0, atol=1e-7)
        assert {(bool(h), bool(e)) for h, e in conc_N2 > 0} >= {(True, False), (False, True)}


# Against numpy, a planted answer and itself


@pytest.mark.parametrize("percent", [0, 1, 37.3, 50, 95, 99, 100])
@pytest.mark.parametrize("n_values", [1, 2, 7, 1000])
def test_weighted_percentile_is_that_of_the_repeats(n_values: int, percent: float) -> None:
    rng = np.random.default_rng(n_values)
    for _ in range(20):
        value, weight = rng.normal(size=n_values).round(2), rng.integers(1, 50, n_values)
        expected = np.percentile(np.repeat(value, weight), percent)
        assert stain.weighted_percentile(value, weight, percent) == expected


def test_counts_every_colour(stained: UInt8) -> None:
    code_K, rgb_K3, pixels_K = stain.count_colours(stained)
    expected, counts = np.unique(stained.reshape(-1, 3), axis=0, return_counts=True)
    order = np.lexsort(rgb_K3.T[::-1])
    np.testing.assert_array_equal(rgb_K3[order], expected)
    np.testing.assert_array_equal(pixels_K[order], counts)
    np.testing.assert_array_equal(code_K, rgb_K3.astype(int) @ [1, 256, 65536])


def test_finds_planted_stains(stained: UInt8) -> None:
    target = stain.fit_target(stained, method="vahadane")
    assert angles_deg(target.stain_matrix, PLANTED_STAINS).max() < 1.5
    np.testing.assert_allclose(np.linalg.norm(target.stain_matrix, axis=1), 1)


def test_tiles_and_writing_in_place_change_nothing(
    stained: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = stain.fit_target(stained, method="vahadane")
    kept = stained.copy()
    expected = stain.normalise(stained, target)
    np.testing.assert_array_equal(stained, kept)
    monkeypatch.setattr(stain, "TILE_PX", 7 * stained.shape[1])
    assert stain.normalise(stained, target, out=stained) is stained
    np.testing.assert_array_equal(stained, expected)


def test_normalised_image_has_the_target_stains(stained: UInt8) -> None:
    target = StainTarget(
        method="vahadane",
        stain_matrix=stain._unit_rows(stain.REFERENCE_STAINS),
        max_concentrations=np.array([1.5, 1.0]),
    )
    refitted = stain.fit_target(stain.normalise(stained, target), method="vahadane")
    assert angles_deg(refitted.stain_matrix, target.stain_matrix).max() < 1.5
    np.testing.assert_allclose(refitted.max_concentrations, [1.5, 1.0], rtol=0.05)


def test_target_survives_json_exactly(stained: UInt8) -> None:
    target = stain.fit_target(stained, method="vahadane")
    again = StainTarget.from_json(json.loads(json.dumps(target.to_json())))
    assert again.method == target.method
    np.testing.assert_array_equal(again.stain_matrix, target.stain_matrix)
    np.testing.assert_array_equal(again.max_concentrations, target.max_concentrations)


# What must fail


@pytest.mark.parametrize(
    "image",
    [
        None,
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["none", "float", "grey", "rgba", "empty"],
)
def test_refuses_what_is_no_image(image: Any, stained: UInt8) -> None:
    target = stain.fit_target(stained, method="vahadane")
    with pytest.raises(ValueError, match="must be a uint8 RGB array"):
        stain.normalise(image, target)
    with pytest.raises(ValueError, match="must be a uint8 RGB array"):
        stain.fit_target(image, method="vahadane")


@pytest.mark.parametrize("method", ["vahadane", "staintools"])
def test_refuses_an_image_without_tissue(method: str, stained: UInt8) -> None:
    if method == "staintools":
        pytest.importorskip("staintools")
    white = np.full((64, 64, 3), 250, np.uint8)
    with pytest.raises(ValueError, match="must hold tissue"):
        stain.fit_target(white, method=method)
    fields = stain.fit_target(stained, method="vahadane").to_json()
    with pytest.raises(ValueError, match="must hold tissue"):
        stain.normalise(white, StainTarget.from_json(fields | {"method": method}))


def test_refuses_a_black_image() -> None:
    with pytest.raises(ValueError, match="must have light"):
        stain.fit_target(np.zeros((64, 64, 3), np.uint8), method="vahadane")


def test_refuses_a_speck_of_tissue(stained: UInt8) -> None:
    image = np.full((2000, 200, 3), 255, np.uint8)
    image[30:50, :10] = stained[30:50, :10]
    with pytest.raises(ValueError, match="crop the image to its tissue"):
        stain.fit_target(image, method="vahadane")


def test_refuses_a_single_stain(stained: UInt8) -> None:
    stained[:100] = (150, 80, 160)
    with pytest.raises(ValueError, match=r"must be 2.0 degrees apart"):
        stain.fit_target(stained, method="vahadane")
    stained[:100] = (200, 60, 60)
    with pytest.raises(ValueError, match="must show two stains"):
        stain.fit_target(stained, method="vahadane")


def test_refuses_stains_that_did_not_converge(stained: UInt8) -> None:
    _, rgb_K3, pixels_K = stain.count_colours(stained[:100])
    with pytest.raises(ValueError, match="after 3 iterations"):
        stain.learn_stain_matrix(stain.optical_density(rgb_K3), pixels_K, max_iterations=3)


def test_refuses_stains_that_cannot_be_told_apart(stained: UInt8) -> None:
    """The target that StainTools returned, without a warning, in one of four runs on B4."""
    alike = np.array([[0.406, 0.841, 0.358], [0.399, 0.848, 0.348]])
    with pytest.raises(ValueError, match=r"got 0\.\d+: use an image with more tissue"):
        StainTarget(method="vahadane", stain_matrix=alike, max_concentrations=np.ones(2))
    target = stain.fit_target(stained, method="vahadane")
    with pytest.raises(ValueError, match="degrees apart"):
        stain.normalise(stained, target, source_matrix=alike)


def test_refuses_an_unknown_method_and_a_wrong_output(stained: UInt8) -> None:
    with pytest.raises(ValueError, match="got 'macenko'"):
        stain.fit_target(stained, method="macenko")
    target = stain.fit_target(stained, method="vahadane")
    with pytest.raises(ValueError, match="out must be uint8"):
        stain.normalise(stained, target, out=stained[:10])


def test_says_how_to_install_staintools(stained: UInt8, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "staintools", None)
    with pytest.raises(ImportError, match=r"pip install brstnet\[staintools\]"):
        stain.fit_target(stained, method="staintools")
