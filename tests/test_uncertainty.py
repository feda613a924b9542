"""Intervals and tests, by simulation: coverage, size and power; and against scipy and hand.

All seeds are fixed: a rate is compared with its nominal value within three standard errors.
"""

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats

from brstnet import metrics
from brstnet.evaluation.certainty import null, uncertainty
from brstnet.evaluation.certainty.uncertainty import (
    Bootstrap,
    benjamini_hochberg,
    bootstrap_patients,
    bootstrap_sections_of_one_patient,
    gene_tests,
    holm,
    mean_of_medians,
    median_of_means,
    paired_bootstrap,
    patient_table,
    stnet_count,
    stnet_required,
)

TRUTH = 0.25


def error(rate: float, runs: int) -> float:
    """Three standard errors of a rate over so many runs."""
    return 3 * float(np.sqrt(rate * (1 - rate) / runs))


def drawn_table(rng: np.random.Generator, patients: int, genes: int = 15) -> np.ndarray:
    """Scores (G, P) whose median over genes of the mean is TRUTH; patients shift all genes."""
    mean = TRUTH + np.linspace(-0.15, 0.15, genes)[:, None]
    return mean + rng.normal(0, 0.12, patients) + rng.normal(0, 0.06, (genes, patients))


def covered(patients: int, method: Any, level: float, runs: int) -> float:
    """How often the interval holds the truth."""
    rng, hits = np.random.default_rng(1), 0
    for run in range(runs):
        how = Bootstrap(level=level, method=method, draws=400, seed=run)
        found = bootstrap_patients(drawn_table(rng, patients), how=how)
        hits += found.low <= TRUTH <= found.high
    return hits / runs


# The table and its statistics --------------------------------------------------------------------


def test_statistics_are_numpys_and_know_nan() -> None:
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(5, 9, 4))
    np.testing.assert_allclose(
        median_of_means(tables), np.median(tables.mean(axis=-1), axis=-1), atol=1e-15
    )
    tables[rng.random(tables.shape) < 0.3] = np.nan
    tables[:, 3] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.nanmedian(np.nanmean(tables, axis=-1), axis=-1)
        other = np.nanmean(np.nanmedian(tables, axis=-2), axis=-1)
    np.testing.assert_allclose(median_of_means(tables), expected, atol=1e-15)
    np.testing.assert_allclose(mean_of_medians(tables), other, atol=1e-15)
    assert np.isnan(median_of_means(np.full((3, 2), np.nan)))


def test_the_table_is_the_mean_of_a_patients_sections() -> None:
    values = np.array([[0.1, 0.3, 0.5], [np.nan, 0.2, np.nan]])
    expected = [[0.2, 0.5], [0.2, np.nan]]
    np.testing.assert_allclose(patient_table(values, ["b", "b", "a"]), expected)


def test_value_is_the_score_of_a_fold() -> None:
    rng = np.random.default_rng(2)
    sections = [rng.normal(size=(2, 20, 7)) for _ in range(5)]
    sections[1][0, :, 2], sections[3][1, :, 4] = 3.0, 1.0  # silent prediction, constant truth
    patients = ["a", "a", "b", "c", "c"]
    moments = [metrics.moments(pred, true) for pred, true in sections]
    values = np.stack([null.scored(*s) for s in sections], axis=1)
    value = bootstrap_patients(patient_table(values, patients)).value
    assert value == pytest.approx(metrics.fold_score(moments, patients), abs=1e-12)


# Bootstrap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize(("method", "patients"), [("expanded", 22), ("percentile", 60)])
def test_coverage_is_nominal(method: str, patients: int, level: float) -> None:
    """The percentile interval needs many patients for it, the expanded one as many as the paper."""
    runs = 300
    assert covered(patients, method, level, runs) == pytest.approx(level, abs=error(level, runs))


def test_coverage_of_bca_with_many_patients() -> None:
    runs = 200
    assert covered(60, "bca", 0.9, runs) == pytest.approx(0.9, abs=error(0.9, runs))


def test_with_few_patients_expanded_covers_more_than_percentile() -> None:
    """At 8 patients measured .93 against .87 of a nominal .95."""
    assert covered(8, "expanded", 0.95, 300) > covered(8, "percentile", 0.95, 300) + 0.03


def test_three_patients_would_give_a_false_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "MIN_UNITS", 2)
    for method in ("percentile", "expanded", "bca"):
        assert covered(3, method, 0.95, 200) < 0.85


@pytest.mark.parametrize("patients", [1, 2, 4])
def test_so_few_patients_give_none(patients: int) -> None:
    found = bootstrap_patients(np.full((3, patients), 0.2))
    assert found.value == pytest.approx(0.2)
    assert np.isnan(found.low)
    assert np.isnan(found.high)
    assert found.why.startswith(f"no interval: {patients} patient")
    assert found.why in found.line()


def test_sections_of_one_patient_go_by_another_name() -> None:
    table = drawn_table(np.random.default_rng(0), 6)
    found = bootstrap_sections_of_one_patient(table)
    assert found.unit == "section of one patient"
    assert found.line().endswith("over 6 sections of one patient)")
    assert found.low < found.value < found.high
    assert bootstrap_sections_of_one_patient(table[:, :3]).why


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_ends_are_scipys(method: Any) -> None:
    """For the mean of one gene; resamples differ, so within their noise."""
    scores = np.random.default_rng(3).exponential(size=(1, 25))
    how = Bootstrap(method=method, draws=20_000)
    found = bootstrap_patients(scores, how=how)
    theirs = stats.bootstrap(
        (scores[0],), np.mean, method=method, n_resamples=20_000, rng=np.random.default_rng(9)
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.015)
    assert found.high == pytest.approx(theirs.high, abs=0.015)


def test_the_same_seed_gives_the_same_interval_in_chunks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = drawn_table(np.random.default_rng(0), 9)
    once = bootstrap_patients(table)
    assert bootstrap_patients(table) == once
    assert bootstrap_patients(table, how=Bootstrap(seed=1)) != once
    monkeypatch.setattr(uncertainty, "CHUNK", 500)
    assert bootstrap_patients(table) == once


def test_any_statistic_and_undefined_genes() -> None:
    table = drawn_table(np.random.default_rng(0), 9)
    table[2] = np.nan
    table[4, 3:] = np.nan
    found = bootstrap_patients(table, lambda t: (np.nanmean(t, axis=(-1, -2)) > 0.2).astype(float))
    assert found.genes_undefined == 1
    assert found.value in (0.0, 1.0)
    nothing = bootstrap_patients(np.full((2, 6), np.nan))
    assert nothing.genes_undefined == 2
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


@pytest.mark.parametrize(
    ("wrong", "said"), [({"level": 1.0}, "level"), ({"method": "t"}, "bca"), ({"draws": 9}, "100")]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bootstrap(**wrong)


# Two models --------------------------------------------------------------------------------------


def drawn_pair(
    rng: np.random.Generator, patients: int, gain: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two models (G, P): patients are shared, and each model has its own luck with a patient."""
    shared = rng.normal(TRUTH, 0.12, patients)
    a, b = (
        shared + rng.normal(0, 0.05, patients) + rng.normal(0, 0.06, (12, patients))
        for _ in range(2)
    )
    return a + gain, b


def test_under_the_null_p_is_uniform_and_the_interval_holds_zero() -> None:
    rng, runs = np.random.default_rng(2), 300
    found = [
        paired_bootstrap(*drawn_pair(rng, 22), how=Bootstrap(draws=300, seed=run))
        for run in range(runs)
    ]
    p = np.array([f.p for f in found])
    for alpha in (0.05, 0.1, 0.25, 0.5):
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=error(alpha, runs) + 1 / 300)
    holds = np.mean([f.interval.low <= 0 <= f.interval.high for f in found])
    assert holds == pytest.approx(0.95, abs=error(0.95, runs))


def test_six_patients_are_exchanged_exhaustively() -> None:
    rng, runs = np.random.default_rng(2), 250
    p = np.array([paired_bootstrap(*drawn_pair(rng, 6)).p for _ in range(runs)])
    np.testing.assert_allclose(p * 64, np.rint(p * 64), atol=1e-9)
    for alpha in (2 / 64, 4 / 64, 0.25, 0.5):
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=error(alpha, runs))


def test_pairing_finds_what_two_intervals_would_not() -> None:
    a, b = drawn_pair(np.random.default_rng(0), 12, gain=0.1)
    found = paired_bootstrap(a, b)
    assert found.p < 0.01
    assert 0 < found.interval.low < 0.1 < found.interval.high
    assert bootstrap_patients(a).low < bootstrap_patients(b).high
    other = paired_bootstrap(b, a)
    assert other.p == found.p
    assert other.interval.value == -found.interval.value


def test_three_patients_have_a_p_but_no_interval() -> None:
    a, b = drawn_pair(np.random.default_rng(0), 3, gain=1.0)
    found = paired_bootstrap(a, b)
    assert found.p == found.smallest_p == 0.25
    assert found.interval.why


def test_scores_of_one_model_alone_are_dropped_and_counted() -> None:
    a, b = drawn_pair(np.random.default_rng(0), 8)
    a[0], b[1, 2] = np.nan, np.nan
    found = paired_bootstrap(a, b)
    assert found.scores_dropped == 9
    b[0], a[1, 2] = np.nan, np.nan
    assert found.interval.value == median_of_means(a) - median_of_means(b)
    with pytest.raises(ValueError, match="same genes and patients"):
        paired_bootstrap(a, b[:5])


# Tests per gene ----------------------------------------------------------------------------------


def test_holm_and_bh_by_hand_and_by_scipy() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, np.nan, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, np.nan, 0.04, 0.04, 0.02])
    many = np.random.default_rng(0).random(200) ** 3
    np.testing.assert_allclose(benjamini_hochberg(many), stats.false_discovery_control(many))
    by_hand = [max(min(1, (200 - (many < q).sum()) * q) for q in many if q <= one) for one in many]
    np.testing.assert_allclose(holm(many), by_hand)
    assert np.isnan(holm(np.array([np.nan]))).all()
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()


def test_sign_test_is_scipys_binomial_test() -> None:
    table = np.random.default_rng(0).normal(0.2, 1, (30, 23))
    table[0, 4:], table[1], table[2, :5] = np.nan, np.nan, 0.0
    found = gene_tests(table)
    for row, k, n, p in zip(table, found.positive_G, found.patients_G, found.p_G, strict=True):
        if n:
            theirs = stats.binomtest(int((row > 0).sum()), int(n), alternative="greater").pvalue
            assert p == pytest.approx(theirs)
            assert k == (row > 0).sum()
    assert found.genes_undefined == 1
    assert np.isnan([found.p_G[1], found.holm_G[1], found.bh_G[1]]).all()
    assert found.patients_G[2] == 23  # a silent prediction counts, and is not positive


@pytest.mark.parametrize("test", ["sign", "wilcoxon"])
def test_size_and_power(test: Any) -> None:
    """The sign test's size is the attainable one, P(>= 16 of 23)."""
    rng, genes = np.random.default_rng(0), 800
    size = float(stats.binom.sf(15, 23, 0.5)) if test == "sign" else 0.05
    null = gene_tests(rng.normal(size=(genes, 23)), test)
    assert (null.p_G <= 0.05).mean() == pytest.approx(size, abs=error(size, genes))
    table = rng.normal(size=(60, 23))
    table[:20] += 1.5
    found = gene_tests(table, test)
    assert (found.holm_G[:20] <= 0.05).mean() > 0.7
    assert (found.holm_G[20:] <= 0.05).mean() <= 0.05
    assert found.found()["holm"] <= found.found()["bh"] <= found.found()["unadjusted"]


def test_wilcoxon_with_zeros_and_nothing() -> None:
    table = np.array([[0.0] * 6, [np.nan] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    np.testing.assert_allclose(gene_tests(table, "wilcoxon").p_G, [1.0, np.nan, 1 / 64])
    with pytest.raises(ValueError, match="sign or wilcoxon"):
        gene_tests(table, "t")  # type: ignore[arg-type]


def test_stnets_number_and_its_tail_for_others() -> None:
    assert stnet_required(23) == 20
    assert stnet_required(12) == 12
    assert stnet_required(11) is None
    tail = stats.binom.sf(19, 23, 0.5)
    for patients in range(13, 60):
        required = stnet_required(patients)
        assert required is not None
        assert stats.binom.sf(required - 1, patients, 0.5) <= tail * (1 + 1e-12)
        assert stats.binom.sf(required - 2, patients, 0.5) > tail
    table = np.ones((3, 23))
    table[0, :3], table[1, :4] = -1, -1
    found = stnet_count(table)
    assert found.passed_G.tolist() == [True, False, True]
    assert (found.genes, found.line) == (2, "positive in >= 20 of 23 patients")


def test_stnets_count_says_what_it_was_made_of() -> None:
    assert "as unlikely by chance as ST-Net's >= 20 of 23" in stnet_count(np.ones((2, 22))).line
    few = stnet_count(np.ones((2, 8)))
    assert few.genes == 0
    assert "too few" in few.line
    table = np.ones((2, 23))
    table[1, :13] = np.nan  # 10 patients are left for this gene
    assert stnet_count(table).required_G.tolist() == [20, 0]
