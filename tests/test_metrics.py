"""Scores per gene against scipy, scikit-learn, longdouble and answers worked out by hand."""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    root_mean_squared_error,
)

from brstnet import metrics
from brstnet.metrics import Moments


def draw(n: int, genes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated pairs (n, genes)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, genes))
    return x, 0.5 * x + rng.normal(size=(n, genes))


def streamed(x: np.ndarray, y: np.ndarray, cuts: list[int]) -> Moments:
    """Moments of the pieces between the cuts, merged from left to right."""
    edges = [0, *sorted(cuts), len(x)]
    parts = [metrics.moments(x[a:b], y[a:b]) for a, b in pairwise(edges) if b > a]
    return reduce(metrics.merge, parts)


def exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation in extended precision, two passes."""
    x, y = x.astype(np.longdouble), y.astype(np.longdouble)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    assert a.n == b.n
    for name in ("mx", "my", "sxx", "syy", "sxy"):
        one, other = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * a.n)


@pytest.mark.parametrize("n", [2, 3, 100, 5000])
def test_pearson_is_scipys(n: int) -> None:
    x, y = draw(n, 7, seed=n)
    reference = [pearsonr(x[:, g], y[:, g]).statistic for g in range(7)]
    np.testing.assert_allclose(metrics.pearson(x, y), reference, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "mean", "sd"), [(30_000, 0, 1), (30_000, 10, 0.01), (400_000, 3, 1), (400_000, 1000, 0.1)]
)
def test_streaming_agrees_with_longdouble_to_1e_12(n: int, mean: float, sd: float) -> None:
    """Where raw sums in float64 are off by 1e-7, and in float32 by 0.4 (speed.md, section 4)."""
    x, y = draw(n, 2)
    x = mean + sd * x
    merged = streamed(x, y, list(range(512, n, 512)))
    assert np.abs(metrics.correlation(merged) - exact(x, y)).max() < 1e-12
    assert np.abs(metrics.pearson(x, y) - exact(x, y)).max() < 1e-12


def test_any_split_equals_the_whole() -> None:
    x, y = draw(500, 5)
    rng = np.random.default_rng(1)
    whole = metrics.moments(x, y)
    for pieces in (1, 2, 7, 60, 499):
        cuts = list(rng.choice(np.arange(1, 500), pieces, replace=False))
        assert_same(streamed(x, y, cuts), whole)


def test_merging_is_associative_and_nothing_is_neutral() -> None:
    x, y = draw(90, 4)
    a, b, c = (metrics.moments(x[i::3] + i, y[i::3]) for i in range(3))
    left = metrics.merge(metrics.merge(a, b), c)
    assert_same(left, metrics.merge(a, metrics.merge(b, c)))
    zero = np.zeros(4)
    nothing = Moments(0, zero, zero, zero, zero, zero)
    assert metrics.merge(nothing, a) is a
    assert metrics.merge(a, nothing) is a


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6 + 0.1, 1e-8])
def test_a_constant_column_is_nan_exactly_even_over_merged_batches(value: float) -> None:
    """The authors' float32 formula gives rounding noise, counted as positive half of the time."""
    varying = np.random.default_rng(0).normal(size=(1000, 3))
    constant = np.full_like(varying, value)
    for pred, true in ((constant, varying), (varying, constant), (constant, constant)):
        assert np.isnan(metrics.pearson(pred, true)).all()
        merged = streamed(pred, true, [1, 64, 65, 500, 993])
        assert np.isnan(metrics.correlation(merged)).all()
    assert metrics.moments(constant, varying).sxx.tolist() == [0, 0, 0]


def test_a_single_spot_has_no_correlation() -> None:
    assert np.isnan(metrics.pearson([[1.0, 2.0]], [[2.0, 1.0]])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_tensors_give_what_numpy_gives(dtype: torch.dtype) -> None:
    x, y = (torch.from_numpy(part).to(dtype) for part in draw(300, 4))
    merged = metrics.merge(metrics.moments(x[:77], y[:77]), metrics.moments(x[77:], y[77:]))
    assert isinstance(merged.sxy, torch.Tensor)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    reference = exact(x.numpy(), y.numpy()).astype(float)
    np.testing.assert_allclose(metrics.correlation(merged), reference, atol=tolerance)
    np.testing.assert_allclose(metrics.pearson(x, y), reference, atol=1e-12)


def test_a_perfect_line_is_one_and_never_more() -> None:
    x = np.random.default_rng(0).normal(size=(50, 100)) * 10.0 ** np.arange(-50, 50)
    assert np.abs(metrics.pearson(x, 3 * x)).max() <= 1
    np.testing.assert_allclose(metrics.pearson(x, 3 * x), 1)
    np.testing.assert_allclose(metrics.pearson(x, -x), -1)


def test_partial_pearson_is_the_correlation_of_what_lstsq_leaves() -> None:
    rng = np.random.default_rng(0)
    depth = rng.normal(8, 0.4, 400)
    pred, true = draw(400, 6)
    pred, true = pred + rng.normal(size=6) * depth[:, None], true + 2 * depth[:, None]
    design = np.column_stack([np.ones(400), depth])
    left = [side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in (pred, true)]
    got = metrics.partial_pearson(pred, true, depth)
    np.testing.assert_allclose(got, metrics.pearson(*left), atol=1e-10)
    assert np.abs(got - metrics.pearson(pred, true)).max() > 0.1


def test_partial_pearson_has_nothing_to_say_of_what_depth_explains() -> None:
    depth = np.random.default_rng(0).normal(8, 0.4, 200)
    true = draw(200, 1)[0]
    for pred in (3 * depth[:, None] + 1, -depth[:, None], np.ones((200, 1))):
        assert np.isnan(metrics.partial_pearson(pred, true, depth)).all()
        assert np.isnan(metrics.partial_pearson(true, pred, depth)).all()


def test_partial_pearson_given_a_constant_is_the_plain_correlation() -> None:
    pred, true = draw(60, 3)
    given = metrics.partial_pearson(pred, true, np.full(60, 7.3))
    np.testing.assert_allclose(given, metrics.pearson(pred, true), atol=1e-15)


def test_errors_are_means_over_the_spots() -> None:
    pred, true = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 0.0], [0.0, -2.0]])
    assert metrics.mean_absolute_error(pred, true).tolist() == [2, 1]
    assert metrics.root_mean_square_error(pred, true).tolist() == [np.sqrt(5), np.sqrt(2)]


@pytest.mark.parametrize(
    ("pred", "true"),
    [
        (np.ones((3, 2)), np.ones((3, 4))),
        (np.ones((3, 2)), np.ones((2, 2))),
        (np.ones(3), np.ones(3)),
        (np.ones((0, 2)), np.ones((0, 2))),
    ],
)
def test_shapes_that_do_not_fit_are_told(pred: np.ndarray, true: np.ndarray) -> None:
    for score in (metrics.pearson, metrics.mean_absolute_error, metrics.root_mean_square_error):
        with pytest.raises(ValueError, match=r"must both be \(spots, genes\)"):
            score(pred, true)
    with pytest.raises(ValueError, match=r"one value per spot \(3\), got 2"):
        metrics.partial_pearson(np.ones((3, 2)), np.ones((3, 2)), [1.0, 2.0])


def planted(r_G: list[float]) -> Moments:
    """Moments with these correlations; None of the sides is constant."""
    r = np.array(r_G)
    one = np.ones_like(r)
    return Moments(10, 0 * one, 0 * one, one, 4 * one, 2 * r)


def test_fold_score_is_the_median_over_genes_of_the_mean_over_patients() -> None:
    sections = [planted([0.1, 0.4, 0.9]), planted([0.3, 0.2, 0.5])]
    assert metrics.fold_score(sections, ["a", "b"]) == pytest.approx(0.3)


def test_a_patient_counts_once_however_many_sections() -> None:
    many, one = planted([0.8]), planted([0.0])
    assert metrics.fold_score([many, many, many, one], ["a", "a", "a", "b"]) == pytest.approx(0.4)
    assert metrics.fold_score([many, one, many, many], ["a", "b", "a", "a"]) == pytest.approx(0.4)


def test_a_constant_prediction_counts_as_zero_and_a_constant_truth_is_left_out() -> None:
    varying = draw(40, 3)[1]
    pred = varying.copy()  # correlates with the truth by 1, but:
    pred[:, 0] = 0.25  # the model knows nothing of gene 0
    true = varying.copy()
    true[:, 1] = 2.0  # gene 1 says nothing here
    section = metrics.moments(pred, true)
    assert metrics.fold_score([section], ["a"]) == pytest.approx(0.5)  # genes 0 and 2: 0 and 1
    whole = metrics.moments(varying, varying)
    both = metrics.fold_score([section, whole], ["a", "b"])
    assert both == pytest.approx(1)  # means over patients: 0.5, 1 (of b alone), 1


def test_fold_score_of_nothing_that_varies_is_nan() -> None:
    flat = metrics.moments(*[np.ones((5, 2))] * 2)
    assert np.isnan(metrics.fold_score([flat], ["a"]))


def test_genes_are_counted_above_the_papers_thresholds() -> None:
    pcc = [-0.2, 0.0, 0.05, 0.1, 0.2, 0.3, 0.31, 0.5, 0.51, float("nan")]
    assert metrics.counts_above(pcc) == {
        "genes_above_0": 7,
        "genes_above_0.1": 5,
        "genes_above_0.3": 3,
        "genes_above_0.5": 1,
    }


def test_nanmedian_leaves_out_what_is_not_known() -> None:
    assert metrics.nanmedian([1, float("nan"), 3, 10]) == 3
    assert np.isnan(metrics.nanmedian([float("nan")]))


# Rank, concordance, R2, per spot -----------------------------------------------------------------


def adversarial(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of 40 spots: plain, ties, huge offsets, tiny spreads, opposite, nearly constant."""
    rng = np.random.default_rng(seed)
    x, y = draw(40, 6, seed)
    x[:, 1], y[:, 1] = rng.integers(0, 3, 40), rng.integers(0, 4, 40)
    x[:, 2], y[:, 2] = x[:, 2] + 1e6, y[:, 2] - 1e6
    x[:, 3], y[:, 3] = 1e-7 * x[:, 3] + 1, 1e-7 * y[:, 3] + 1
    y[:, 4] = -x[:, 4]
    x[:, 5], y[:, 5] = np.eye(40)[3], np.eye(40)[7]
    return x, y


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys_ties_and_all(seed: int) -> None:
    x, y = adversarial(seed)
    reference = [spearmanr(x[:, g], y[:, g]).statistic for g in range(6)]
    np.testing.assert_allclose(metrics.spearman(x, y), reference, atol=1e-12)
    np.testing.assert_allclose(metrics.spearman(x**3, y), metrics.spearman(x, y), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_concordance_is_lins_formula_in_extended_precision(seed: int) -> None:
    x, y = adversarial(seed)
    a, b = x.astype(np.longdouble), y.astype(np.longdouble)
    cov = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    reference = 2 * cov / (a.var(0) + b.var(0) + (a.mean(0) - b.mean(0)) ** 2)
    got = metrics.concordance(x, y)
    np.testing.assert_allclose(got, reference.astype(float), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(metrics.concordance(x, x), 1)
    assert (np.abs(got) <= np.abs(metrics.pearson(x, y)) + 1e-12).all()


def test_r2_is_sklearns_where_the_baseline_is_the_mean_and_errors_are_sklearns() -> None:
    x, y = adversarial()
    reference = r2_score(y, x, multioutput="raw_values")
    np.testing.assert_allclose(metrics.r2_against(x, y, y.mean(axis=0)), reference, rtol=1e-6)
    other = np.full_like(y, 0.7)
    by_hand = 1 - mean_squared_error(y, x, multioutput="raw_values") / mean_squared_error(
        y, other, multioutput="raw_values"
    )
    np.testing.assert_allclose(metrics.r2_against(x, y, 0.7), by_hand, rtol=1e-9)
    assert metrics.r2_against(other, y, 0.7).tolist() == [0] * 6
    for ours, theirs in (
        (metrics.mean_absolute_error, mean_absolute_error),
        (metrics.root_mean_square_error, root_mean_squared_error),
    ):
        np.testing.assert_allclose(ours(x, y), theirs(y, x, multioutput="raw_values"), rtol=1e-12)


def test_the_correlation_of_a_spot_is_scipys_over_its_genes() -> None:
    x, y = draw(9, 30)
    reference = [pearsonr(one, other).statistic for one, other in zip(x, y, strict=True)]
    np.testing.assert_allclose(metrics.spot_pearson(x, y), reference, atol=1e-12)
    x[2], y[5] = 7, -1
    assert np.flatnonzero(np.isnan(metrics.spot_pearson(x, y))).tolist() == [2, 5]


def test_what_is_constant_has_no_rank_correlation_and_a_constant_prediction_no_concordance() -> (
    None
):
    varying, constant = draw(50, 2)[0], np.full((50, 2), 1e6 + 0.1)
    for pred, true in ((constant, varying), (varying, constant), (constant, constant)):
        assert np.isnan(metrics.spearman(pred, true)).all()
    assert metrics.concordance(constant, varying).tolist() == [0, 0]
    assert np.isnan(metrics.concordance(varying, constant)).all()
    assert np.isnan(metrics.r2_against(varying, constant, constant[0])).all()
    assert (metrics.r2_against(varying, constant, 0.0) < 1).all()


def test_one_spot_has_errors_but_no_correlation() -> None:
    pred, true = np.array([[1.0, 2.0]]), np.array([[3.0, 2.0]])
    for score in (metrics.spearman, metrics.concordance, metrics.pearson):
        assert np.isnan(score(pred, true)).all()
    assert metrics.r2_against(pred, true, 1.0).tolist() == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "score",
    [
        metrics.pearson,
        metrics.spearman,
        metrics.concordance,
        metrics.spot_pearson,
        metrics.mean_absolute_error,
        metrics.root_mean_square_error,
        lambda pred, true: metrics.r2_against(pred, true, 0.0),
        lambda pred, true: metrics.partial_pearson(pred, true, np.arange(4.0)),
    ],
)
def test_what_is_no_number_is_refused_by_name(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], value: float
) -> None:
    good, bad = draw(4, 3)
    bad[2, 1] = bad[3, 1] = value
    with pytest.raises(ValueError, match=r"truth must be finite, but 2 .* spot 2 and gene 1"):
        score(good, bad)
    with pytest.raises(ValueError, match=r"predictions must be finite"):
        score(bad, good)
