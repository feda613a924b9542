"""What chance gives: against brute force, and by simulation: size and power of both kinds of null.

All seeds are fixed: a rate is compared with its nominal value within three standard errors.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import ndimage, stats

from brstnet.evaluation.certainty import null
from brstnet.evaluation.certainty.null import Section, permutation_null

ROWS = 14
DISC_N2 = np.argwhere(np.hypot(*(np.indices((ROWS, ROWS)) - 6.5)) < 6.9)


def error(rate: float, runs: int) -> float:
    """Three standard errors of a rate over so many runs."""
    return 3 * float(np.sqrt(rate * (1 - rate) / runs))


def maps(rng: np.random.Generator, genes: int, smooth: float) -> np.ndarray:
    """Genes (N, G) made of three patterns on a disc, with autocorrelation over `smooth` spots."""
    noise = rng.normal(size=(ROWS + 12, ROWS + 12, 3))
    field = ndimage.gaussian_filter(noise, (smooth, smooth, 0))[6:-6, 6:-6]
    patterns: np.ndarray = field[tuple(DISC_N2.T)] / field.std()
    return patterns @ rng.normal(size=(3, genes)) + 0.3 * rng.normal(size=(len(DISC_N2), genes))


def unrelated(
    rng: np.random.Generator, sections: int = 2, genes: int = 8, smooth: float = 0
) -> list[Section]:
    """Sections whose predictions know nothing; each of another patient."""
    return [
        Section(
            patient=str(s),
            pred_NG=maps(rng, genes, smooth),
            true_NG=maps(rng, genes, smooth),
            array_N2=DISC_N2 + 3,
        )
        for s in range(sections)
    ]


def awkward() -> list[Section]:
    """Three sections of two patients, with constant genes on either side."""
    sections = unrelated(np.random.default_rng(4), sections=3, genes=6)
    for s in sections:
        s.true_NG[:, 0] = 2.5
        s.pred_NG[:, 1] = -0.1
    sections[0].true_NG[:, 2] = 0.0
    return [
        Section(patient=who, pred_NG=s.pred_NG, true_NG=s.true_NG, array_N2=s.array_N2)
        for who, s in zip("aab", sections, strict=True)
    ]


def brute_force(
    sections: list[Section], moved: Callable[[int, int], tuple[np.ndarray, np.ndarray]], draws: int
) -> list[tuple[float, int]]:
    """Median PCC and genes above 0 by plain loops; `moved` gives spots, and the truth's on them."""
    answers = []
    for d in range(draws):
        pcc = np.zeros((6, len(sections)))
        for s, section in enumerate(sections):
            to, source = moved(s, d)
            for g in range(6):
                x, y = section.pred_NG[to, g], section.true_NG[source, g]
                if np.ptp(y) == 0:
                    pcc[g, s] = np.nan
                else:
                    pcc[g, s] = 0 if np.ptp(x) == 0 else stats.pearsonr(x, y).statistic
        by_gene = []
        for row in pcc:
            means = [np.mean(v[~np.isnan(v)]) for v in (row[:2], row[2:]) if not np.isnan(v).all()]
            by_gene.append(np.mean(means) if means else np.nan)
        answers.append((float(np.nanmedian(by_gene)), int(np.sum(np.array(by_gene) > 0))))
    return answers


def test_spots_null_is_the_brute_force_loop() -> None:
    sections, draws = awkward(), 8
    generators = np.random.default_rng(7).spawn(3)
    orders = [[g.permutation(len(DISC_N2)) for _ in range(draws)] for g in generators]
    found = permutation_null(sections, draws=draws, seed=7)
    everywhere = np.arange(len(DISC_N2))
    expected = brute_force(sections, lambda s, d: (everywhere, orders[s][d]), draws)
    np.testing.assert_allclose(found.drawn["median_pcc"], [m for m, _ in expected], atol=1e-12)
    assert found.drawn["genes_above_0"].tolist() == [n for _, n in expected]
    observed = brute_force(sections, lambda s, d: (everywhere, everywhere), 1)[0]
    assert found.observed["median_pcc"] == pytest.approx(observed[0], abs=1e-12)
    assert found.observed["genes_above_0"] == observed[1]
    assert found.genes_undefined == 1


def usable_steps() -> list[dict[int, int]]:
    """For every mirror and step that counts: which spot's truth comes to lie on which spot."""
    spot = {tuple(at): i for i, at in enumerate(DISC_N2 - DISC_N2.min(axis=0))}
    height, width = DISC_N2.max(axis=0) - DISC_N2.min(axis=0) + 1
    usable = []
    for mirror, a, b in np.ndindex(4, height, width):
        lies_on = {}
        for (row, column), i in spot.items():
            r = height - 1 - row if mirror >= 2 else row
            c = width - 1 - column if mirror % 2 else column
            if (on := spot.get(((r + a) % height, (c + b) % width))) is not None:
                lies_on[on] = i
        if len(lies_on) >= 0.4 * len(spot) and (mirror, a, b) != (0, 0, 0):
            usable.append(lies_on)
    return usable


def test_torus_null_is_the_brute_force_loop() -> None:
    sections, draws, usable = awkward(), 8, usable_steps()
    generators = np.random.default_rng(7).spawn(3)
    chosen = [g.integers(len(usable), size=draws) for g in generators]

    def moved(s: int, d: int) -> tuple[np.ndarray, np.ndarray]:
        lies_on = usable[chosen[s][d]]
        return np.array(list(lies_on)), np.array(list(lies_on.values()))

    found = permutation_null(sections, "torus", draws=draws, seed=7)
    expected = brute_force(sections, moved, draws)
    np.testing.assert_allclose(found.drawn["median_pcc"], [m for m, _ in expected], atol=1e-12)
    assert found.drawn["genes_above_0"].tolist() == [n for _, n in expected]


@pytest.mark.parametrize("kind", ["spots", "torus"])
def test_the_same_seed_gives_the_same_null_in_chunks_too(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = awkward()
    once = permutation_null(sections, kind, draws=20, seed=3).drawn["median_pcc"]
    other = permutation_null(sections, kind, draws=20, seed=4).drawn["median_pcc"]
    assert (other != once).any()
    monkeypatch.setattr(null, "CHUNK", 60)
    again = permutation_null(sections, kind, draws=20, seed=3).drawn["median_pcc"]
    np.testing.assert_allclose(again, once, atol=1e-14)


@functools.cache
def sizes(kind: Any, smooth: float, runs: int = 100) -> dict[float, float]:
    """How often the p of the median lies at or below alpha, where predictions know nothing."""
    rng = np.random.default_rng(5)
    p = np.array(
        [
            permutation_null(unrelated(rng, smooth=smooth), kind, draws=99, seed=r).p("median_pcc")
            for r in range(runs)
        ]
    )
    return {alpha: float((p <= alpha).mean()) for alpha in (0.05, 0.1, 0.25, 0.5)}


@pytest.mark.parametrize("kind", ["spots", "torus"])
def test_p_is_uniform_without_autocorrelation(kind: Any) -> None:
    for alpha, rate in sizes(kind, 0).items():
        slack = 0.03 if kind == "torus" else 0  # a little wide: fewer spots
        assert rate == pytest.approx(alpha, abs=error(alpha, 100) + slack), alpha


def test_with_autocorrelation_only_the_torus_keeps_its_size() -> None:
    spots, torus = sizes("spots", 1.2), sizes("torus", 1.2)
    assert spots[0.05] > 0.15
    for alpha, rate in torus.items():
        assert rate < alpha + error(alpha, 100), alpha


@pytest.mark.parametrize("kind", ["spots", "torus"])
def test_a_planted_effect_is_found(kind: Any) -> None:
    rng = np.random.default_rng(0)
    sections = [
        Section(
            patient=s.patient,
            pred_NG=s.true_NG + 2 * rng.normal(size=s.true_NG.shape),
            true_NG=s.true_NG,
            array_N2=s.array_N2,
        )
        for s in unrelated(rng, smooth=1)
    ]
    found = permutation_null(sections, kind, draws=199)
    assert found.p("median_pcc") == pytest.approx(1 / 200)
    table = found.table()
    assert table.loc["median_pcc", "observed"] > table.loc["median_pcc", "null_p99"]
    assert table["kind"].eq(kind).all()


def test_dependent_genes_make_many_positive_genes_a_matter_of_chance() -> None:
    """As with raw counts: all genes follow one pattern, so all or none of them are positive."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(150, 1))
    true = pattern + 0.2 * rng.normal(size=(150, 100))
    pred = rng.normal(size=(150, 1)) + 0.05 * rng.normal(size=(150, 100))
    found = permutation_null([Section(patient="a", pred_NG=pred, true_NG=true)])
    assert found.table().loc["genes_above_0", "null_p95"] > 95
    apart = [Section(patient="a", pred_NG=pred, true_NG=rng.normal(size=(150, 100)))]
    assert permutation_null(apart).table().loc["genes_above_0", "null_p95"] < 75


def test_what_a_null_needs() -> None:
    section = unrelated(np.random.default_rng(0), sections=1)[0]
    with pytest.raises(ValueError, match="at least one section"):
        permutation_null([])
    with pytest.raises(ValueError, match="spots or torus"):
        permutation_null([section], "genes")  # type: ignore[arg-type]

    def at(array_N2: np.ndarray | None) -> Section:
        return Section(
            patient="a", pred_NG=section.pred_NG, true_NG=section.true_NG, array_N2=array_N2
        )

    with pytest.raises(ValueError, match="give array_N2"):
        permutation_null([at(None)], "torus")
    with pytest.raises(ValueError, match="same array position"):
        permutation_null([at(np.zeros_like(DISC_N2))], "torus")
    scattered = np.arange(len(DISC_N2))[:, None] ** np.array([1, 2]) % 1009
    with pytest.raises(ValueError, match="use the spots null"):
        permutation_null([at(scattered)], "torus")
