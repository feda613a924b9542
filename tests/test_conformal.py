"""Intervals for a new patient: what they promise, what they hold, and what they refuse to say."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from trainings import CPU

from brstnet.data.store import Store
from brstnet.evaluation.certainty import confidence, conformal, out_of_fold, spread
from brstnet.evaluation.certainty.conformal import (
    CONSTANT,
    SCALED,
    Residuals,
    intervals,
    left_out_coverage,
    patient_quantiles,
    read,
)
from brstnet.evaluation.predict import Ensemble, How, load_ensemble, predict, predict_ensemble
from brstnet.evaluation.yardstick import judged_genes, measured

HELD_OUT, SECTION = "BC90006", "BC90006_C1"


# Quantiles ---------------------------------------------------------------------------------------


def column(*values: float) -> np.ndarray:
    return np.array(values, float)[:, None]


def quantile(score_N1: np.ndarray, patients: Sequence[str], level: float) -> float:
    return float(patient_quantiles(score_N1, np.array(patients), [level])[0, 0])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.1, 1.0),
        (1 / 6, 1.0),
        (0.17, 2.0),
        (1 / 3, 2.0),
        (0.34, 10.0),
        (0.5, 20.0),
        (0.51, 30.0),
        (2 / 3, 40.0),
        (0.67, np.inf),
        (0.9, np.inf),
    ],
)
def test_a_quantile_by_hand(level: float, expected: float) -> None:
    """Each spot of A weighs 1/6, of B 1/12, and the patient to come a third."""
    scores = column(30, 2, 10, 1, 40, 20)
    assert quantile(scores, ["B", "A", "B", "A", "B", "B"], level) == expected


def test_one_spot_a_patient_is_split_conformal_prediction() -> None:
    """Which takes the ceil((K + 1) level)-th smallest score of K (Lei et al. 2018)."""
    rng = np.random.default_rng(0)
    for patients in (3, 7, 19, 20, 39):
        scores = rng.normal(size=(patients, 3)) ** 2
        for level in (0.25, 0.5, 0.8, 0.9, 0.95):
            found = patient_quantiles(scores, np.arange(patients).astype(str), [level])[0]
            rank = int(np.ceil(round((patients + 1) * level, 9)))
            ranked = np.vstack([np.sort(scores, axis=0), np.full((1, 3), np.inf)])
            np.testing.assert_array_equal(found, ranked[rank - 1])


def test_patients_weigh_alike_however_many_their_spots() -> None:
    rng = np.random.default_rng(1)
    scores, patients = rng.gamma(2, size=(60, 40)), np.repeat(["A", "B", "C"], [10, 20, 30])
    levels = (0.3, 0.5, 0.7)
    once = patient_quantiles(scores, patients, levels)
    many = np.concatenate([scores, *[scores[:10]] * 9])
    again = patient_quantiles(many, np.concatenate([patients, ["A"] * 90]), levels)
    np.testing.assert_array_equal(once, again)


def test_a_quantile_is_the_smallest_score_that_reaches_the_level() -> None:
    """Against the definition, gene by gene."""
    rng = np.random.default_rng(2)
    patients = rng.choice(["A", "B", "C", "D", "E"], 83)
    scores = rng.normal(size=(83, 140)).round(1) ** 2  # with ties; genes in two helpings
    for level in (0.2, 0.5, 0.8):
        found = patient_quantiles(scores, patients, [level])[0]
        for gene in range(140):
            shares = [
                np.mean(scores[patients == name, gene][:, None] <= scores[:, gene][None, :], axis=0)
                for name in "ABCDE"
            ]
            mass = np.sum(shares, axis=0) / 6
            assert found[gene] == scores[mass >= level - 1e-9, gene].min()


@pytest.mark.parametrize("patients", [1, 2, 4, 9, 10, 99])
def test_more_than_k_of_k_plus_1_is_never_promised(patients: int) -> None:
    rng = np.random.default_rng(patients)
    whose = np.repeat(np.arange(patients).astype(str), rng.integers(3, 40, patients))
    scores = rng.normal(size=(len(whose), 2)) ** 2
    most = patients / (patients + 1)
    np.testing.assert_array_equal(patient_quantiles(scores, whose, [most])[0], scores.max(axis=0))
    assert np.isinf(patient_quantiles(scores, whose, [most + 1e-6])).all()


# Simulation --------------------------------------------------------------------------------------

SPREAD = np.array([0.3, 1.0, 2.0])


def simulated(patients: int, genes: int, seed: int, *, effect: float = 1.0) -> Residuals:
    """Errors with an effect a patient and gene; each gene is one repetition of the experiment.

    Patients have 5 to 60 spots. Noise is of three sizes, and the spread says which.
    """
    rng = np.random.default_rng(seed)
    whose = np.repeat([f"P{i}" for i in range(patients)], rng.integers(5, 60, patients))
    number = pd.factorize(whose)[0]
    sd_NG = rng.choice(SPREAD, size=(len(whose), genes))
    bias_NG = effect * rng.normal(size=(patients, genes))[number]
    error_NG = np.abs(bias_NG + sd_NG * rng.normal(size=sd_NG.shape))
    return Residuals(
        genes=pd.Index([f"g{i}" for i in range(genes)]),
        error_NG=error_NG.astype(np.float32),
        spread_NG=sd_NG.astype(np.float32),
        patient_N=whose,
        seen=False,
        target="log_normalised",
    )


def held(residuals: Residuals, width_G: np.ndarray) -> float:
    """Share of spots, patients alike, over all genes."""
    inside = pd.DataFrame(residuals.error_NG <= width_G).groupby(residuals.patient_N).mean()
    return float(inside.to_numpy().mean())


@pytest.mark.parametrize(("patients", "level"), [(4, 0.8), (9, 0.8), (9, 0.9), (19, 0.5)])
def test_a_new_patient_is_held_as_promised_and_not_by_all_spots_as_one(
    patients: int, level: float
) -> None:
    """3,000 experiments with 5 new patients each, whose effects are larger than the noise."""
    known, new = (simulated(n, 3000, n, effect=3) for n in (patients, 5))
    promised = patient_quantiles(known.error_NG, known.patient_N, [level])[0]
    pooled = np.quantile(known.error_NG, level, axis=0)
    assert held(new, promised) > level - 0.01
    assert held(new, promised) < level + 1 / (patients + 1) + 0.01
    assert held(new, pooled) < held(new, promised)
    if level > 0.5:
        assert held(new, pooled) < level - 0.01


def test_without_patient_effects_little_is_lost() -> None:
    known, new = simulated(19, 1000, 3, effect=0), simulated(1, 1000, 4, effect=0)
    promised = patient_quantiles(known.error_NG, known.patient_N, [0.8])[0]
    assert 0.79 < held(new, promised) < 0.87


def test_scaled_intervals_are_narrower_where_the_spread_knows_the_noise() -> None:
    known, new = (simulated(n, 500, seed, effect=0) for n, seed in ((19, 5), (40, 6)))
    found = new.coverage(intervals(known, [0.8]))
    by_kind = found.groupby("kind")[["held", "half_width"]].mean()
    assert by_kind["held"].between(0.79, 0.87).all()
    assert by_kind["half_width"][SCALED] < 0.93 * by_kind["half_width"][CONSTANT]


def test_intervals_of_all_but_one_patient_hold_of_that_one_what_they_promise() -> None:
    known = simulated(10, 500, 7)
    found = left_out_coverage(known, [0.8])
    assert set(found["patient"]) == set(known.patient_N)
    assert found.loc[found["kind"] == CONSTANT, "held"].mean() > 0.79
    without = intervals(known.of(known.patient_N != "P3"), [0.8])
    third = known.of(known.patient_N == "P3").coverage(without)
    pd.testing.assert_frame_equal(found[found["patient"] == "P3"].reset_index(drop=True), third)


# Intervals ---------------------------------------------------------------------------------------


def small(**changes: Any) -> Residuals:
    """Two patients, three spots each, two genes; the second is always right."""
    residuals = Residuals(
        genes=pd.Index(["x", "y"]),
        error_NG=np.array([[1, 0], [2, 0], [3, 0], [10, 0], [20, 0], [30, 0]], np.float32),
        spread_NG=None,
        patient_N=np.repeat(["A", "B"], 3),
        seen=False,
        target="log_normalised",
    )
    return dataclasses.replace(residuals, **changes)


def test_a_table_of_intervals_by_hand() -> None:
    table = intervals(small(), (0.5, 0.6, 0.9)).table
    assert list(table) == list(conformal.WRITTEN)
    assert table["gene"].tolist() == ["x", "y"] * 3
    assert table["level"].tolist() == [0.5, 0.5, 0.6, 0.6, 0.9, 0.9]
    found = table.set_index(["gene", "level"])["half_width"]
    assert found["x", 0.5] == 20  # 5 of 9 lie at or below it, 4 of 9 below
    assert found["x", 0.6] == 30
    assert (found["y", 0.5], found["y", 0.6]) == (0, 0)
    assert np.isinf(found["x", 0.9])
    assert np.isinf(found["y", 0.9])
    assert (table["patients"] == 2).all()
    assert (table["spots"] == 6).all()
    assert table["scaled_half_width"].isna().all()


def test_coverage_by_hand() -> None:
    found = intervals(small(), (0.5, 0.9))
    spots = pd.DataFrame({"patient": ["C", "C", "D"]})
    pred = np.array([[0.0, 5], [0, 5], [0, 5]])
    true = np.array([[20.0, 5], [-21, 6], [-3, 5]])
    table = found.coverage(pred, true, spots, pd.Index(["x", "y"]))
    half = table[table["level"] == 0.5].set_index(["gene", "patient"])
    assert half["held"].to_dict() == {
        ("x", "C"): 0.5,
        ("y", "C"): 0.5,
        ("x", "D"): 1,
        ("y", "D"): 1,
    }
    assert half["half_width"].to_dict()["x", "D"] == 20
    assert half["n"].to_dict()["x", "C"] == 2
    assert (table["kind"] == CONSTANT).all()
    endless = table[table["level"] == 0.9]
    assert endless["held"].isna().all()
    assert np.isinf(endless["half_width"]).all()
    swapped = found.coverage(pred[:, ::-1], true[:, ::-1], spots, pd.Index(["y", "x"]))
    by = ["gene", "patient", "level"]
    pd.testing.assert_frame_equal(
        swapped.sort_values(by, ignore_index=True), table.sort_values(by, ignore_index=True)
    )


def test_one_patient_promises_half_and_says_so() -> None:
    one = intervals(small(patient_N=np.repeat("A", 6)), (0.5, 0.8, 0.9))
    np.testing.assert_array_equal(one.half_width(0.5, pd.Index(["x"])), [30])
    assert np.isinf(one.half_width(0.8, pd.Index(["x", "y"]))).all()
    assert one.patients == 1
    first, second = one.notes()
    assert "no interval at 80 %, 90 %: 1 patient can promise 50 %" in first
    assert "approximate" in second
    assert left_out_coverage(small(patient_N=np.repeat("A", 6))).empty


def test_patients_that_models_have_met_are_told() -> None:
    assert any("too narrow" in note for note in intervals(small(seen=True)).notes())
    assert not any("too narrow" in note for note in intervals(small()).notes())


def test_a_gene_without_error_has_an_interval_of_nothing_that_holds_it() -> None:
    found = intervals(small(spread_NG=np.zeros((6, 2), np.float32)), (0.5,))
    table = small(spread_NG=np.zeros((6, 2), np.float32)).coverage(found)
    mine = table[table["gene"] == "y"]
    assert (mine["half_width"] == 0).all()
    assert (mine["held"] == 1).all()


def test_where_there_is_no_spread_the_scaled_interval_is_the_constant_one() -> None:
    none = small(spread_NG=np.zeros((6, 2), np.float32))
    table = none.coverage(intervals(none, (0.5, 0.9)))
    one, other = (table[table["kind"] == kind]["half_width"] for kind in (CONSTANT, SCALED))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("level", [0.0, 1.0, 90])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(ValueError, match="levels must be above 0 and below 1"):
        intervals(small(), [0.5, level])


def test_a_gene_or_level_that_is_not_there_is_named() -> None:
    found = intervals(small(), (0.5, 0.8))
    with pytest.raises(ValueError, match=r"1 genes .* level 0.5, such as z; .* levels 0.5, 0.8"):
        found.half_width(0.5, pd.Index(["x", "z"]))
    with pytest.raises(ValueError, match=r"no interval at level 0\.7"):
        found.half_width(0.7, pd.Index(["x"]))


# Files -------------------------------------------------------------------------------------------


def written(tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame] | None = None) -> Path:
    file = tmp_path / "intervals.parquet"
    intervals(small(), (0.5, 0.6, 0.9)).write(file)
    if change is not None:
        change(pd.read_parquet(file)).to_parquet(file, index=False)
    return file


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    found = read(file, "log_normalised")
    pd.testing.assert_frame_equal(found.table, intervals(small(), (0.5, 0.6, 0.9)).table)
    assert found.levels == [0.5, 0.6, 0.9]


def test_five_columns_are_enough(tmp_path: Path) -> None:
    found = read(written(tmp_path, lambda t: t[list(conformal.NEEDED)]), "log_counts")
    np.testing.assert_array_equal(found.half_width(0.5, pd.Index(["y", "x"])), [0, 20])
    assert np.isnan(found.half_width(0.5, pd.Index(["x"]), SCALED)).all()
    assert not found.seen


def put(name: str, value: object, row: int = 1) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        values = table[name].tolist()
        values[row] = value
        return table.assign(**{name: values})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns=["level", "spots"]), "lacks level, spots"),
        (lambda t: t[:0], "holds no interval"),
        (put("level", 1.5), "level must be above 0 and below 1, but row 1 .*'y', level 1.5"),
        (put("half_width", -1.0), "half_width must be 0 or more, or inf, but row 1"),
        (put("half_width", float("nan")), "half_width must be 0 or more, or inf, but row 1"),
        (put("scaled_half_width", -2.0), "scaled_half_width must be 0 or more"),
        (put("patients", 0), "patients and spots must be 1 or more"),
        (put("gene", "x"), "a gene has one interval at a level, but row 1"),
        (put("half_width", 4.0, 5), r"inf above the level K / \(K \+ 1\) .* row 5"),
        (put("scaled_half_width", 4.0, 4), r"inf above the level K / \(K \+ 1\) .* row 4"),
        (lambda t: t.assign(level="0.5"), "level must be numbers"),
        (lambda t: t.assign(gene=7), "gene must be text"),
        (lambda t: t.assign(seen=1.0), "seen must be true or false"),
        (lambda t: t.assign(target="log_counts"), "intervals of log_counts, but log_normalised"),
    ],
)
def test_other_tables_are_refused(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    file = written(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        read(file, "log_normalised")
    assert str(file) in str(caught.value)


def test_no_file_and_no_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"intervals\.parquet: missing"):
        read(tmp_path / "intervals.parquet")
    (tmp_path / "intervals.parquet").write_text("no table")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        read(tmp_path / "intervals.parquet")


# Models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(briefly_trained: Path) -> Ensemble:
    """Two models; five patients, one section each, calibrate."""
    return load_ensemble([briefly_trained], CPU)


def test_errors_are_those_of_the_model_that_was_validated_there(
    ensemble: Ensemble, demo_store: Store
) -> None:
    found = out_of_fold.cross_validation_errors(ensemble, demo_store, how=How(symmetries=True))
    assert set(found.patient_N) == set(demo_store.patients) - {HELD_OUT}
    assert not found.seen
    assert found.error_NG.dtype == np.float32
    assert found.spread_NG is not None
    assert found.spread_NG.shape == found.error_NG.shape
    table = ensemble.genes
    for member in ensemble.members:
        for section in member.fold.validation:
            rows = found.patient_N == demo_store.sections[section]["patient"]
            pred = predict(member, demo_store, [section])[table.index].to_numpy()
            true = measured(ensemble, demo_store, [section], table)
            np.testing.assert_allclose(found.error_NG[rows], np.abs(pred - true), atol=1e-5)
            alone = dataclasses.replace(ensemble, members=[member])
            how = How(symmetries=True)
            turned = predict_ensemble(alone, demo_store, [section], how, progress=False)
            np.testing.assert_array_equal(found.spread_NG[rows], turned.symmetry_spread_NG)


def test_models_are_calibrated(ensemble: Ensemble, demo_store: Store) -> None:
    genes = ensemble.genes.index[[4, 1]]
    found = out_of_fold.calibrate(ensemble, demo_store, genes, (0.5, 0.8, 0.9))
    assert found.patients == 5
    assert found.table["gene"].unique().tolist() == list(genes)
    half, most, beyond = (found.half_width(level, genes) for level in (0.5, 0.8, 0.9))
    assert (half > 0).all()
    assert (most > half).all()
    assert np.isinf(beyond).all()
    assert "5 patients can promise 83 %" in found.notes()[0]


def test_a_gene_that_nobody_measured_cannot_be_calibrated(
    ensemble: Ensemble, demo_store: Store
) -> None:
    with pytest.raises(ValueError, match=r"1 genes are not both .* the first nonsense"):
        out_of_fold.calibrate(ensemble, demo_store, pd.Index([ensemble.genes.index[0], "nonsense"]))


def with_index(store: Store, change: Callable[[dict[str, Any]], None]) -> Store:
    """The store as if each of its sections were described otherwise."""
    other = copy.copy(store)
    other.__dict__.pop("sections", None)
    other.__dict__.pop("patients", None)
    other.index = copy.deepcopy(store.index)
    for entry in other.index["sections"]:
        change(entry)
    return other


def test_sections_with_other_patches_do_not_calibrate(
    ensemble: Ensemble, demo_store: Store
) -> None:
    first = ensemble.members[0].fold.validation[0]

    def change(entry: dict[str, Any]) -> None:
        if entry["section"] == first:
            entry["files"]["patches.npy"] = "0" * 64

    before = out_of_fold.validated_by(ensemble, demo_store)
    after = out_of_fold.validated_by(ensemble, with_index(demo_store, change))
    assert set(before) - set(after) == {first}
    assert SECTION not in before
    stranger = with_index(demo_store, lambda entry: entry["files"].update({"patches.npy": "0"}))
    with pytest.raises(ValueError, match="no section, patch by patch, that one of the 2 models"):
        out_of_fold.calibrate(ensemble, stranger)


def test_a_patient_on_both_sides_counts_once_and_is_told(
    ensemble: Ensemble, demo_store: Store
) -> None:
    def change(entry: dict[str, Any]) -> None:
        if entry["patient"] != HELD_OUT:
            entry["patient"] = "the only one"

    found = out_of_fold.calibrate(ensemble, with_index(demo_store, change), levels=(0.5, 0.8))
    assert found.patients == 1
    assert found.seen
    assert np.isinf(found.half_width(0.8, ensemble.genes.index)).all()


# All of it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(ensemble: Ensemble, demo_store: Store) -> confidence.Confidence:
    return believed(ensemble, demo_store, How(spread=True, symmetries=True))


def believed(ensemble: Ensemble, store: Store, how: How) -> confidence.Confidence:
    genes = judged_genes(ensemble, store)
    predictions = predict_ensemble(ensemble, store, [SECTION], how, progress=False)
    return confidence.believe(ensemble, store, [SECTION], genes, predictions, how)


def test_intervals_are_judged_on_the_held_out_and_the_left_out(
    found: confidence.Confidence, ensemble: Ensemble, demo_store: Store
) -> None:
    table = found.coverage
    patients = table.groupby("judged")["patient"].unique().map(set).to_dict()
    assert patients == {"held_out": {HELD_OUT}, "left_out": set(demo_store.patients) - {HELD_OUT}}
    genes = judged_genes(ensemble, demo_store)
    assert set(table["gene"]) == set(genes.index)
    assert found.intervals is not None
    assert set(found.intervals.table["gene"]) == set(ensemble.genes.index)
    true = measured(ensemble, demo_store, [SECTION], genes)
    mean = predict_ensemble(ensemble, demo_store, [SECTION], genes=genes.index, progress=False)
    inside = np.abs(mean.mean_NG - true) <= found.intervals.half_width(0.8, genes.index)
    mine = table[(table["judged"] == "held_out") & (table["level"] == 0.8)]
    constant = mine[mine["kind"] == CONSTANT].set_index("gene")["held"].reindex(genes.index)
    np.testing.assert_allclose(constant, inside.mean(axis=0))
    panel = genes["panel"].to_numpy()
    (one,) = (
        each
        for each in found.summary["intervals"]
        if (each["judged"], each["kind"], each["level"]) == ("held_out", CONSTANT, 0.8)
    )
    assert one["held"] == pytest.approx(inside[:, panel].mean())
    widths = found.intervals.half_width(0.8, genes.index[panel])
    assert one["half_width"] == pytest.approx(np.median(widths))
    expected = np.median(widths / genes["std"][panel])
    assert one["half_width_sd"] == pytest.approx(expected)


def test_the_spread_is_held_against_the_errors(
    found: confidence.Confidence, ensemble: Ensemble, demo_store: Store
) -> None:
    genes = judged_genes(ensemble, demo_store)
    how = How(spread=True)
    seen = predict_ensemble(ensemble, demo_store, [SECTION], how, genes=genes.index, progress=False)
    true = measured(ensemble, demo_store, [SECTION], genes)
    assert seen.member_spread_NG is not None
    std = genes["std"].to_numpy()
    expected = spread.scores(
        ((seen.mean_NG - true) / std).ravel(), (seen.member_spread_NG / std).ravel()
    )
    members = found.summary["spread"][spread.MEMBERS]
    for name, value in expected.items():
        assert members[name] == pytest.approx(value)
    assert set(found.summary["spread"]) == {spread.MEMBERS, spread.SYMMETRIES}


def test_the_lines_say_what_was_found(found: confidence.Confidence) -> None:
    text = "\n".join(found.summary["lines"])
    assert "spread over the models: errors are" in text
    assert "50 % intervals for a new patient: median half-width" in text
    assert text.count("% on 1 held-out, ") == 2
    assert text.count("% on 5 left-out (worst: BC9000") == 2  # four patients promise 80 %
    assert "scaled by the spread over symmetries, 80 % intervals have" in text
    assert "90 % intervals" not in text
    assert "no interval at 90 %: 5 patients can promise 83 %" in text


def test_patients_that_calibrated_are_judged_left_out_alone(
    ensemble: Ensemble, demo_store: Store
) -> None:
    section = ensemble.members[0].fold.validation[0]
    genes = judged_genes(ensemble, demo_store)
    for sections, held_out in (([section], set()), ([section, SECTION], {HELD_OUT})):
        seen = predict_ensemble(ensemble, demo_store, sections, progress=False)
        told = confidence.believe(ensemble, demo_store, sections, genes, seen)
        judged = told.coverage[told.coverage["judged"] == "held_out"]
        assert set(judged["patient"]) == held_out
        assert told.scores.empty


def test_everything_is_written_and_what_is_old_removed(
    found: confidence.Confidence, ensemble: Ensemble, demo_store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    confidence.write(found, out, "a heading")
    assert {str(p.relative_to(out)) for p in out.rglob("*.*")} == set(confidence.FILES)
    assert found.intervals is not None
    again = read(out / "intervals.parquet", ensemble.target)
    pd.testing.assert_frame_equal(again.table, found.intervals.table)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "spread.parquet"), found.scores)
    other = with_index(demo_store, lambda entry: entry["files"].update({"patches.npy": "0"}))
    alone = dataclasses.replace(ensemble, members=ensemble.members[:1])
    nothing = believed(alone, other, How(spread=True))
    assert nothing.intervals is None
    assert nothing.summary["lines"] == [confidence.NO_INTERVALS]
    confidence.write(nothing, out)
    assert not list(out.rglob("*.*"))
