"""The spread of an ensemble: what predictions give of it, and what it is worth."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from trainings import CPU, with_training

from brstnet.data.store import Store
from brstnet.evaluation import predict as prediction
from brstnet.evaluation.certainty import spread
from brstnet.evaluation.predict import (
    Ensemble,
    How,
    load_ensemble,
    predict,
    predict_ensemble,
    predict_mean,
)
from brstnet.training.batches import Units
from brstnet.training.checkpoint import Checkpoint

SECTION = "BC90006_C1"


# Predictions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(briefly_trained: Path) -> Ensemble:
    """Both models; the second is shown smaller patches."""
    both = load_ensemble([briefly_trained], CPU)
    one, two = both.members
    small = dataclasses.replace(two, settings=with_training(two.settings, input_px=24))
    return dataclasses.replace(both, members=[one, small])


def symmetries_by_hand(member: Checkpoint, store: Store) -> np.ndarray:
    """Predictions of a patch in its 8 symmetries, (8, N, G) in log units, turned by numpy."""
    training = member.settings.training
    x_NHWC = np.array(store.patches(SECTION, training.input_px))
    units = Units.of(member.fitted, training, CPU)
    genes = member.fitted.genes
    found = []
    for quarter in range(4):
        for flip in (False, True):
            turned = np.rot90(x_NHWC, quarter, axes=(1, 2))
            turned = turned[:, :, ::-1] if flip else turned
            with torch.inference_mode():
                image = units.image(torch.from_numpy(turned.copy()))
                output = units.whole(member.model(image)).numpy()
            found.append(output * genes["std"].to_numpy() + genes["mean"].to_numpy())
    return np.stack(found)


def test_the_mean_is_bit_for_bit_what_one_model_after_the_other_gives(
    ensemble: Ensemble, demo_store: Store
) -> None:
    """The batches go through all models together: the numbers must not tell."""
    sections = [SECTION, *list(demo_store.sections)[:3]]  # more spots than a batch takes
    total = np.zeros(())
    for member in ensemble.members:
        total = total + predict(member, demo_store, sections)[ensemble.genes.index].to_numpy()
    expected = (total / len(ensemble.members)).astype(np.float32)
    mean = predict_mean(ensemble, demo_store, sections, progress=False)
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, expected)
    with_spread = predict_ensemble(
        ensemble, demo_store, sections, How(spread=True, symmetries=True), progress=False
    )
    np.testing.assert_array_equal(with_spread.mean_NG, expected)


def test_nothing_but_the_mean_is_held_unless_asked(ensemble: Ensemble, demo_store: Store) -> None:
    found = predict_ensemble(ensemble, demo_store, [SECTION], progress=False)
    assert found.member_spread_NG is None
    assert found.symmetry_spread_NG is None


def test_the_members_spread_is_their_standard_deviation(
    ensemble: Ensemble, demo_store: Store
) -> None:
    found = predict_ensemble(ensemble, demo_store, [SECTION], How(spread=True), progress=False)
    each = [predict(m, demo_store, [SECTION])[ensemble.genes.index] for m in ensemble.members]
    assert found.member_spread_NG is not None
    assert found.member_spread_NG.dtype == np.float32
    expected = np.std(np.stack(each).astype(float), axis=0, ddof=1)
    np.testing.assert_allclose(found.member_spread_NG, expected, rtol=1e-5, atol=1e-7)
    assert expected.min() > 0


def test_the_symmetries_spread_is_the_mean_over_members_of_their_deviation(
    ensemble: Ensemble, demo_store: Store
) -> None:
    how = How(symmetries=True)
    found = predict_ensemble(ensemble, demo_store, [SECTION], how, progress=False)
    deviations = []
    for member in ensemble.members:
        columns = member.fitted.genes.index.get_indexer(ensemble.genes.index)
        deviations.append(symmetries_by_hand(member, demo_store).std(axis=0)[:, columns])
    assert found.symmetry_spread_NG is not None
    np.testing.assert_allclose(found.symmetry_spread_NG, np.mean(deviations, axis=0), atol=2e-5)
    assert np.median(found.symmetry_spread_NG) > 1e-3


def test_eight_views_are_averaged_when_asked_whatever_training_did(
    ensemble: Ensemble, demo_store: Store
) -> None:
    member = ensemble.members[0]
    by_hand = symmetries_by_hand(member, demo_store)
    plain = predict(member, demo_store, [SECTION]).to_numpy()
    eight = predict(member, demo_store, [SECTION], How(views=8)).to_numpy()
    np.testing.assert_allclose(plain, by_hand[0], atol=2e-5)
    np.testing.assert_allclose(eight, by_hand.mean(axis=0), atol=2e-5)
    assert np.abs(plain - eight).max() > 1e-3
    trained_on_eight = dataclasses.replace(member, settings=with_training(member.settings, views=8))
    by_default = predict(trained_on_eight, demo_store, [SECTION]).to_numpy()
    np.testing.assert_array_equal(by_default, eight)
    one = predict(trained_on_eight, demo_store, [SECTION], How(views=1)).to_numpy()
    np.testing.assert_array_equal(one, plain)


def test_one_model_has_no_spread_over_models(briefly_trained: Path, demo_store: Store) -> None:
    alone = load_ensemble([briefly_trained / "fold_1"], CPU)
    how = How(spread=True, symmetries=True)
    found = predict_ensemble(alone, demo_store, [SECTION], how, progress=False)
    assert found.member_spread_NG is None
    assert found.symmetry_spread_NG is not None


def test_only_the_genes_asked_for_are_kept_in_their_order(
    ensemble: Ensemble, demo_store: Store
) -> None:
    how = How(spread=True, symmetries=True)
    whole = predict_ensemble(ensemble, demo_store, [SECTION], how, progress=False)
    genes = ensemble.genes.index[[7, 2, 11]]
    some = predict_ensemble(ensemble, demo_store, [SECTION], how, genes=genes, progress=False)
    for name in ("mean_NG", "member_spread_NG", "symmetry_spread_NG"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[:, [7, 2, 11]])


@pytest.mark.parametrize("views", [0, 2, 9, -1])
def test_other_numbers_of_views_are_refused(views: int) -> None:
    with pytest.raises(ValueError, match=f"views must be 1 or 8, .* got {views}"):
        How(views=views)


def test_models_that_agree_have_no_spread() -> None:
    same = np.full((3, 2), 0.1, np.float32)
    found = prediction.together([(same, same * 0)] * 3, spread=True)
    assert found.member_spread_NG is not None
    assert (found.member_spread_NG == 0).all()
    np.testing.assert_array_equal(found.mean_NG, same)


# What a spread is worth --------------------------------------------------------------------------


def calibrated(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Errors of exactly the spread that is said."""
    rng = np.random.default_rng(seed)
    sd = rng.uniform(0.2, 2, n)
    return rng.normal(size=n) * sd, sd


def test_reliability_is_the_root_mean_square_of_both_in_bins_of_equal_count() -> None:
    error, sd = calibrated(1000)
    table = spread.reliability(error, sd, bins=7)
    frame = pd.DataFrame({"error2": error**2, "sd2": sd**2})
    expected = np.sqrt(frame.groupby(pd.qcut(sd, 7, labels=False)).mean())
    np.testing.assert_allclose(table["predicted_sd"], expected["sd2"], rtol=0.01)
    np.testing.assert_allclose(table["rmse"], expected["error2"], rtol=0.05)
    assert table["n"].sum() == 1000
    assert set(table["n"]) == {142, 143}
    by_hand = spread.reliability(np.array([3.0, 0, 4, 1]), np.array([1.0, 2, 2, 1]), bins=2)
    np.testing.assert_allclose(by_hand["predicted_sd"], [1, 2])
    np.testing.assert_allclose(by_hand["rmse"], [5**0.5, 8**0.5])


def test_there_are_no_more_bins_than_spots() -> None:
    assert len(spread.reliability(np.ones(3), np.ones(3))) == 3


def test_ence_is_none_when_calibrated_and_two_when_errors_are_thrice_the_spread() -> None:
    error, sd = calibrated(50_000)
    assert spread.ence(spread.reliability(error, sd)) < 0.02
    signs = np.sign(error)
    assert spread.ence(spread.reliability(3 * signs * sd, sd)) == pytest.approx(2)
    assert spread.ence(spread.reliability(signs * sd / 2, sd)) == pytest.approx(0.5)


def test_without_any_spread_ence_is_not_defined() -> None:
    error, sd = calibrated(100)
    found = spread.scores(error, sd * 0)
    assert np.isnan(found["ence"])
    assert np.isnan(found["spearman"])
    assert found["held_90"] == 0


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.99])
def test_a_calibrated_spread_holds_what_it_claims(level: float) -> None:
    error, sd = calibrated(50_000)
    assert spread.held(error, sd, level) == pytest.approx(level, abs=0.006)


def test_noise_in_the_measurement_makes_the_spread_hold_too_little() -> None:
    """The spread of models that are right about the mean, beside a measurement of it."""
    rng = np.random.default_rng(1)
    sd = rng.uniform(0.2, 1, 20_000)
    error = rng.normal(size=20_000) * sd - rng.normal(size=20_000)
    assert spread.held(error, sd, 0.9) < 0.7
    assert spread.scores(error, sd)["spearman"] > 0.1


def curve_by_hand(error: np.ndarray, sd: np.ndarray, steps: int) -> np.ndarray:
    order = np.argsort(-sd)
    found = []
    for step in range(steps):
        kept = order[len(error) - max(len(error) * (steps - step) // steps, 1) :]
        found.append(np.sqrt(np.mean(error[kept] ** 2)))
    return np.array(found) / found[0]


def test_the_sparsification_curve_leaves_out_those_of_largest_spread() -> None:
    error, sd = calibrated(997)
    expected = curve_by_hand(error, sd, 50)
    np.testing.assert_allclose(spread.sparsification(error, sd), expected, rtol=1e-12)
    assert expected[-1] < 0.5


def test_the_sparsification_error_lies_between_the_oracle_and_chance() -> None:
    error, sd = calibrated(20_000)
    assert spread.sparsification_error(error, np.abs(error))[0] == 0
    mine, chance = spread.sparsification_error(error, sd)
    assert 0.2 * chance < mine < 0.8 * chance
    constant, of_chance = spread.sparsification_error(error, np.ones_like(sd))
    assert constant == pytest.approx(of_chance)
    random = np.random.default_rng(5).uniform(size=len(error))
    assert spread.sparsification_error(error, random)[0] == pytest.approx(of_chance, rel=0.05)
    assert spread.sparsification_error(error, -np.abs(error))[0] > 1.2 * of_chance


def test_spots_of_equal_spread_have_no_order() -> None:
    error, sd = calibrated(500)
    sd = sd.round(0)
    other = np.random.default_rng(2).permutation(500)
    one, two = spread.sparsification(error, sd), spread.sparsification(error[other], sd[other])
    np.testing.assert_allclose(one, two, rtol=1e-12)


def test_no_error_has_no_curve() -> None:
    assert np.isnan(spread.sparsification(np.zeros(10), np.arange(10.0))).all()


# Tables ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def errors() -> spread.Errors:
    """Two patients, three sections, five genes, of which the last is always predicted alike."""
    rng = np.random.default_rng(0)
    section = np.repeat(["A1", "A2", "B1"], [60, 40, 50])
    sd_NG = rng.uniform(0.1, 1, (150, 5))
    sd_NG[:, 4] = 0.3
    spots = pd.DataFrame({"section": section, "patient": [name[0] for name in section]})
    return spread.Errors(
        spots=spots,
        genes=pd.Index(list("vwxyz")),
        error_NG=rng.normal(size=(150, 5)) * sd_NG,
        spreads={spread.MEMBERS: sd_NG, spread.SYMMETRIES: sd_NG / 2},
    )


def test_the_table_has_every_spread_section_and_gene(errors: spread.Errors) -> None:
    table = spread.spread_table(errors)
    assert list(table) == spread.COLUMNS
    assert len(table) == 2 * 4 * (5 + len(spread.METRICS))
    assert set(table["metric"]) == set(spread.METRICS)
    patients = dict(zip(table["section"], table["patient"], strict=True))
    assert patients == {"A1": "A", "A2": "A", "B1": "B", "": ""}
    mine = table[(table["spread"] == spread.MEMBERS) & (table["section"] == "A2")]
    rows = (errors.spots["section"] == "A2").to_numpy()
    for column, gene in enumerate("vwxy"):
        found = mine[mine["gene"] == gene]
        sd, error = errors.spreads[spread.MEMBERS][rows, column], errors.error_NG[rows, column]
        assert found["value"].item() == pytest.approx(stats.spearmanr(sd, np.abs(error))[0])
        assert found["n"].item() == 40
    assert np.isnan(mine[mine["gene"] == "z"]["value"].item())
    whole = mine[mine["gene"] == ""].set_index("metric")
    expected = spread.scores(
        errors.error_NG[rows].ravel(), errors.spreads[spread.MEMBERS][rows].ravel()
    )
    assert whole["value"].to_dict() == expected
    assert (whole["n"] == 200).all()


def test_half_the_spread_is_worth_the_same_and_holds_less(errors: spread.Errors) -> None:
    found = spread.summarise(spread.spread_table(errors))
    one, half = found[spread.MEMBERS], found[spread.SYMMETRIES]
    for same in ("spearman", "ause", "rmse", "median_gene_spearman"):
        assert one[same] == pytest.approx(half[same])
    assert half["predicted_sd"] == pytest.approx(one["predicted_sd"] / 2)
    assert half["held_90"] < one["held_90"] - 0.2
    first, second = spread.describe(found)
    assert "spread over the models: errors are 1.0 times as large" in first
    assert "spread over the 8 symmetries: errors are 2.0 times as large" in second
    assert f"holds {100 * half['held_90']:.0f} %" in second


def test_a_spread_of_nothing_is_said_so(errors: spread.Errors) -> None:
    none = dataclasses.replace(errors, spreads={spread.MEMBERS: errors.error_NG * 0})
    (line,) = spread.describe(spread.summarise(spread.spread_table(none)))
    assert "endlessly many times" in line


def test_without_a_spread_the_tables_are_empty(errors: spread.Errors) -> None:
    none = dataclasses.replace(errors, spreads={})
    table = spread.spread_table(none)
    assert list(table) == spread.COLUMNS
    assert table.empty
    assert spread.calibration_table(none).empty
    assert spread.summarise(table) == {}


def test_the_calibration_table_counts_every_pair_once(errors: spread.Errors) -> None:
    table = spread.calibration_table(errors, bins=4)
    n = table.groupby(["spread", "section"])["n"].sum()
    assert n[spread.MEMBERS].to_dict() == {"": 750, "A1": 300, "A2": 200, "B1": 250}
    assert (table.groupby(["spread", "section"]).size() == 4).all()
    ascending = table.groupby(["spread", "section"])["predicted_sd"].is_monotonic_increasing
    assert ascending.all()


def test_the_figure_draws_the_table_and_a_diagonal(errors: spread.Errors) -> None:
    info = spread.reliability_info(spread.calibration_table(errors))
    figure = spread.plot_reliability(info, "a title")
    (axes,) = figure.axes
    assert len(axes.lines) == 2 * 4 + 1
    drawn = {line.get_label(): line for line in axes.lines}
    line = drawn["spread over the models"]
    mine = info[(info["spread"] == spread.MEMBERS) & (info["section"] == "")]
    np.testing.assert_array_equal(line.get_xdata(), mine["predicted_sd"])
    np.testing.assert_array_equal(line.get_ydata(), mine["rmse"])
    x, y = drawn["calibrated"].get_data()
    np.testing.assert_array_equal(x, y)
    assert axes.get_title() == "a title"


def test_the_figure_leaves_out_bins_without_spread_and_may_be_empty(errors: spread.Errors) -> None:
    none = dataclasses.replace(errors, spreads={spread.MEMBERS: errors.error_NG * 0})
    info = spread.reliability_info(spread.calibration_table(none))
    assert info.empty
    assert len(spread.plot_reliability(info).axes[0].lines) == 1


def test_of_one_section_the_figure_shows_one_line(errors: spread.Errors) -> None:
    rows = (errors.spots["section"] == "B1").to_numpy()
    one = dataclasses.replace(
        errors,
        spots=errors.spots[rows],
        error_NG=errors.error_NG[rows],
        spreads={name: each[rows] for name, each in errors.spreads.items()},
    )
    calibration = spread.calibration_table(one)
    assert set(calibration["patient"]) == {"B"}
    assert set(spread.reliability_info(calibration)["section"]) == {""}
