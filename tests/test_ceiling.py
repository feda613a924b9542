"""The noise ceiling: planted ones are found, and what cannot be judged is named.

Counts are Poisson with log-normal rates. Their ceiling in any units is known from a large sample:
the correlation of the target with its mean given rate and depth, whose square is the correlation of
two independent measurements of the same rates.
"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from brstnet import metrics
from brstnet.evaluation.certainty import ceiling
from brstnet.evaluation.certainty.ceiling import (
    ceiling_of,
    chance_limit,
    noise_ceiling,
    shallow_sections,
    share_of_ceiling,
    spearman_brown,
    thin,
)
from brstnet.evaluation.scores import TRUTH, Where, tidy_rows
from brstnet.training.fitted import transform

OTHERS = 4000
"""Counts of a median spot that are not of the genes drawn."""


def in_units(target: str, median_total: float = OTHERS) -> ceiling.ToUnits:
    return partial(transform, target=target, median_total=median_total)


def drawn(
    rng: np.random.Generator,
    mean: float,
    sigma: float,
    *,
    depth_sd: float = 0.0,
    shape: tuple[int, int] = (300, 80),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rates relative to the gene's mean (N, G), counts (N, G), and totals (N,)."""
    depth = np.exp(rng.normal(0, depth_sd, (shape[0], 1)))
    rates = np.exp(rng.normal(0, sigma, shape) - sigma**2 / 2)
    counts = rng.poisson(mean * rates * depth)
    return rates, counts, counts.sum(axis=1) + rng.poisson(OTHERS * depth[:, 0])


def planted(
    mean: float, sigma: float, target: str, depth_sd: float = 0.0
) -> tuple[float, float, float]:
    """The ceiling, the partial one, and the correlation with the log rate, from 400,000 spots."""
    rng = np.random.default_rng(99)
    depth = np.exp(rng.normal(0, depth_sd, 400_000))
    rates = np.exp(rng.normal(0, sigma, 400_000) - sigma**2 / 2)
    twice = rng.poisson((mean * rates * depth)[:, None], (400_000, 2))
    units = in_units(target)(sparse.csr_matrix(twice), OTHERS * depth).toarray()
    same = units[:, :1], units[:, 1:]
    plain = metrics.pearson(*same)[0]
    given = metrics.partial_pearson(*same, np.log(depth))[0]
    return np.sqrt(plain), np.sqrt(given), metrics.pearson(units[:, :1], np.log(rates)[:, None])[0]


# Planted ceilings --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["log_counts", "log_normalised"])
@pytest.mark.parametrize(("mean", "sigma"), [(1, 0.7), (3, 0.3), (3, 0.7), (10, 0.3), (50, 0.7)])
def test_a_planted_ceiling_is_found(mean: float, sigma: float, target: str) -> None:
    """Within 0.03, where ceilings reach from 0.44 to 0.97."""
    found, truth = [], planted(mean, sigma, target)
    for seed in range(3):
        _, counts, totals = drawn(np.random.default_rng(seed), mean, sigma)
        one = noise_ceiling(sparse.csr_matrix(counts), totals, in_units(target), thinnings=5)
        found.append((one.plain.median_ceiling, one.partial.median_ceiling))
    np.testing.assert_allclose(np.mean(found, axis=0), truth[:2], atol=0.03)
    if mean >= 10:  # the log rate itself is then as good a prediction as any
        np.testing.assert_allclose(np.mean(found, axis=0), truth[2], atol=0.03)


@pytest.mark.parametrize("target", ["log_counts", "log_normalised"])
@pytest.mark.parametrize(("mean", "sigma"), [(3, 0.7), (10, 0.7), (50, 0.3)])
def test_a_planted_ceiling_is_found_where_depth_varies(
    mean: float, sigma: float, target: str
) -> None:
    found, truth = [], planted(mean, sigma, target, 0.5)
    for seed in range(3):
        _, counts, totals = drawn(np.random.default_rng(seed), mean, sigma, depth_sd=0.5)
        one = noise_ceiling(sparse.csr_matrix(counts), totals, in_units(target), thinnings=5)
        found.append((one.plain.median_ceiling, one.partial.median_ceiling))
    np.testing.assert_allclose(np.mean(found, axis=0), truth[:2], atol=0.04)


def test_a_perfect_prediction_reaches_its_share() -> None:
    rng = np.random.default_rng(0)
    rates, counts, totals = drawn(rng, 10, 0.5)
    found = noise_ceiling(sparse.csr_matrix(counts), totals, in_units("log_normalised"))
    true = in_units("log_normalised")(sparse.csr_matrix(counts), totals).toarray()
    perfect = share_of_ceiling(metrics.pearson(np.log(rates), true), found.plain)
    assert perfect.genes == 80
    assert perfect.share == pytest.approx(1, abs=0.03)
    noisy = np.log(rates) + rng.normal(0, 0.5, rates.shape)  # correlation with log rate: sqrt(1/2)
    half = share_of_ceiling(metrics.pearson(noisy, true), found.plain)
    assert half.share == pytest.approx(np.sqrt(0.5), abs=0.04)
    np.testing.assert_allclose(np.nanmedian(half.share_G), half.share, atol=0.03)


def test_library_size_is_the_ceiling_of_raw_counts_but_not_of_the_partial_one() -> None:
    """Genes without signal of their own, in spots of varying depth."""
    _, counts, totals = drawn(np.random.default_rng(0), 8, 0, depth_sd=0.6)
    raw = noise_ceiling(sparse.csr_matrix(counts), totals, in_units("log_counts"))
    assert raw.plain.median_ceiling > 0.8
    assert raw.partial.median_ceiling < 0.3
    assert not raw.plain.too_shallow
    assert raw.partial.too_shallow
    assert shallow_sections({"A1": raw}) == []
    assert len(shallow_sections({"A1": raw}, partial=True)) == 1


# The pieces --------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Averaged first: the root of the mean, not the mean of the roots; NaN is not zero."""
    r_KG = np.array([[0.2, -0.2, 0.5, np.nan], [0.4, 0.1, np.nan, np.nan], [0.6, 0.0, 0.5, 0.3]])
    found = ceiling_of(r_KG, spots=101)
    np.testing.assert_allclose(found.half_G, [0.4, -0.1 / 3, 0.5, np.nan])
    np.testing.assert_allclose(found.spread_G[[0, 2]], [0.2, 0])
    np.testing.assert_allclose(
        found.ceiling_G, [np.sqrt(0.8 / 1.4), np.nan, np.sqrt(1 / 1.5), np.nan]
    )
    assert found.counts == {"genes": 4, "judged": 2, "negative": 1, "undefined": 1}
    assert found.median_ceiling == pytest.approx(np.sqrt(0.8 / 1.4))  # of 0, this and a higher one
    np.testing.assert_allclose(spearman_brown(np.array([0, 1, 0.5, -0.1])), [0, 1, 2 / 3, np.nan])


def test_halves_add_up_and_are_binomial() -> None:
    rng = np.random.default_rng(0)
    counts = np.full((4000, 2), 10)
    counts[:, 1] = 0
    a, b, total_a, total_b = thin(sparse.csr_matrix(counts), np.full(4000, 25), rng)
    assert ((a + b).toarray() == counts).all()
    assert (total_a + total_b == 25).all()
    assert (total_a >= a.toarray().sum(axis=1)).all()
    for values, n in ((a.toarray()[:, 0], 10), (total_a, 25)):
        expected = stats.binom.pmf(np.arange(n + 1), n, 0.5)
        seen = np.bincount(values, minlength=n + 1) / 4000
        assert np.abs(seen - expected).max() < 0.03


def test_halves_of_poisson_counts_are_independent_given_the_rate() -> None:
    counts = np.random.default_rng(0).poisson(5, (20_000, 3))
    a, b, *_ = thin(sparse.csr_matrix(counts), counts.sum(axis=1), np.random.default_rng(1))
    r = metrics.pearson(a.toarray(), b.toarray())
    assert np.abs(r).max() < 3 / np.sqrt(20_000)


def test_each_half_is_put_into_units_by_its_own_total() -> None:
    _, counts, totals = drawn(np.random.default_rng(0), 5, 0.5, shape=(40, 3))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def spy(half_NG: sparse.csr_matrix, total_N: np.ndarray) -> Any:
        seen.append((half_NG.toarray(), total_N))
        return half_NG.toarray() / total_N[:, None]

    found = noise_ceiling(sparse.csr_matrix(counts), totals, spy, thinnings=1)
    (a, total_a), (b, total_b) = seen
    assert (a + b == counts).all()
    assert (total_a + total_b == totals).all()
    r = metrics.pearson(a / total_a[:, None], b / total_b[:, None])
    np.testing.assert_allclose(found.plain.half_G, r)
    sides = [
        y - np.polynomial.Polynomial.fit(np.log1p(t), y, 1)(np.log1p(t))
        for y, t in ((a[:, 1] / total_a, total_a), (b[:, 1] / total_b, total_b))
    ]
    assert found.partial.half_G[1] == pytest.approx(stats.pearsonr(*sides).statistic)


def test_deterministic_and_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, counts, totals = drawn(np.random.default_rng(0), 5, 0.5, shape=(40, 7))
    args = sparse.csr_matrix(counts), totals, in_units("log_normalised")
    once = noise_ceiling(*args).scores()
    assert (noise_ceiling(*args, seed=1).plain.half_G != once["half_pcc"]).all()
    monkeypatch.setattr(ceiling, "GENES_AT_ONCE", 3)
    for name, values in noise_ceiling(*args).scores().items():
        np.testing.assert_allclose(values, once[name], rtol=1e-12)


# What cannot be judged ---------------------------------------------------------------------------


@pytest.mark.parametrize("thinnings", [1, 10])
@pytest.mark.parametrize("mean", [0.5, 5])
def test_chance_is_one_in_twenty(mean: float, thinnings: int) -> None:
    """Genes that nothing drives agree beyond the limit about as often as it says."""
    _, counts, totals = drawn(np.random.default_rng(0), mean, 0, shape=(200, 600))
    found = noise_ceiling(
        sparse.csr_matrix(counts), totals, in_units("log_normalised"), thinnings=thinnings
    )
    assert found.plain.judged_G.mean() == pytest.approx(0.05, abs=0.03)
    spread = np.sqrt((1 + 1 / thinnings) / 2 / 199)
    assert found.plain.half_G.std() == pytest.approx(spread, rel=0.1)
    assert chance_limit(200, thinnings) == pytest.approx(1.645 * spread, rel=1e-3)


def test_a_shallow_section_is_named_and_a_deep_one_is_not() -> None:
    """The same tissue, once with a fiftieth of the counts; and most genes follow nothing."""
    rng = np.random.default_rng(0)
    rates, _, _ = drawn(rng, 1, 0.6, shape=(200, 60))
    rates[:, 22:] = 1
    found = {}
    for name, mean in (("deep", 10), ("shallow", 0.2)):
        counts = rng.poisson(mean * rates)
        totals = counts.sum(axis=1) + rng.poisson(40 * mean, 200)
        median = float(np.median(totals))
        units = in_units("log_normalised", median)
        found[name] = noise_ceiling(sparse.csr_matrix(counts), totals, units)
    assert found["deep"].plain.too_shallow == ""
    named = shallow_sections(found)
    assert len(named) == 1
    assert named[0].startswith("shallow: too shallow to judge (")
    assert "of 60 genes" in named[0]
    assert found["shallow"].median_gene_count == pytest.approx(0.2, abs=0.03)


def test_constant_rare_and_absent_genes_are_nan_and_counted() -> None:
    _, counts, totals = drawn(np.random.default_rng(0), 10, 0.7, shape=(60, 5))
    counts[:, 0] = 0
    counts[:, 1], counts[7, 1] = 0, 40  # one spot: its halves agree on it, and on nothing else
    totals = totals + 40
    found = noise_ceiling(sparse.csr_matrix(counts), totals, in_units("log_counts"))
    assert np.isnan(found.plain.ceiling_G[:2]).all()
    assert np.isnan(found.partial.ceiling_G[:2]).all()
    assert found.plain.counts == {"genes": 5, "judged": 3, "negative": 0, "undefined": 2}
    same = noise_ceiling(sparse.csr_matrix(np.full((60, 1), 7)), totals, in_units("log_counts"))
    assert np.isnan(same.plain.ceiling_G).all()
    share = share_of_ceiling(np.array([0.1, np.nan, 0.3, 0.4, np.nan]), found.plain)
    assert np.isnan(share.share_G[[0, 1, 4]]).all()
    assert share.genes == 2
    nothing = noise_ceiling(sparse.csr_matrix((60, 2)), totals, in_units("log_counts"))
    assert nothing.plain.too_shallow
    assert np.isnan(share_of_ceiling(np.zeros(2), nothing.plain).share)


def test_empty_and_nearly_empty_spots_do_no_harm() -> None:
    _, counts, totals = drawn(np.random.default_rng(0), 10, 0.7, shape=(60, 5))
    few = counts.copy()
    few[:10], few[3, 2] = 0, 1
    totals[:10] = few[:10].sum(axis=1)
    units = in_units("log_normalised")
    found = noise_ceiling(sparse.csr_matrix(few), totals, units, thinnings=20)
    rest = noise_ceiling(sparse.csr_matrix(counts[10:]), totals[10:], units, thinnings=20)
    np.testing.assert_allclose(found.plain.half_G, rest.plain.half_G, atol=0.06)
    two = noise_ceiling(sparse.csr_matrix(counts[:2]), np.full(2, 900), units)
    assert np.isnan(two.plain.half_G).all()


def test_what_cannot_be_thinned_is_refused() -> None:
    units = in_units("log_counts")
    with pytest.raises(ValueError, match="only raw counts"):
        noise_ceiling(sparse.csr_matrix([[0.5, 1.0]]), np.array([9]), units)
    with pytest.raises(ValueError, match="only raw counts"):
        noise_ceiling(sparse.csr_matrix([[-1, 1]]), np.array([9]), units)
    with pytest.raises(ValueError, match="1 spots have a total below"):
        noise_ceiling(sparse.csr_matrix([[5, 5], [1, 1]]), np.array([9, 9]), units)
    with pytest.raises(ValueError, match="one total a spot"):
        noise_ceiling(sparse.csr_matrix([[5, 5]]), np.array([9, 9]), units)


def test_scores_go_into_the_tidy_table() -> None:
    _, counts, totals = drawn(np.random.default_rng(0), 10, 0.7, shape=(60, 3))
    scores = noise_ceiling(sparse.csr_matrix(counts), totals, in_units("log_counts")).scores()
    tidy = tidy_rows(scores, pd.Index(["a", "b", "c"]), Where("P1_A", "P1", "", TRUTH, 60))
    assert set(tidy["metric"]) == {"ceiling", "ceiling_partial", "half_pcc", "half_partial_pcc"}
    assert len(tidy) == 12
