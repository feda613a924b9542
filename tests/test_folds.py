"""Who trains and who validates, what is fitted on whom, and the gate that looks for leaks."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from brstnet.config import Protocol, Settings
from brstnet.data.store import Store
from brstnet.training.fitted import (
    AUX,
    MAIN,
    Fitted,
    column_mean_std,
    fit_statistics,
    image_statistics,
    target_scale,
    training_rows,
    transform,
)
from brstnet.training.folds import ALL, Fold, choose_fold, everyone, make_folds, pick_fold
from brstnet.training.leaks import LeakError, leak_gate

HELD_OUT = "BC90006"


def listed(sections: dict[str, str]) -> Store:
    """A store that has nothing but an index: patient by section."""
    store = Store.__new__(Store)
    store.path = Path("listed")
    store.index = {"sections": [{"section": s, "patient": p} for s, p in sections.items()]}
    return store


class Changed(Store):
    """A store in which the counts, totals and patches of some sections are something else."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        super().__init__(store.path)
        self.names = set(names)

    def counts(self, sections: Sequence[str]) -> sparse.csr_matrix:
        counts = super().counts(sections)
        rng = np.random.default_rng(0)
        here = super().spots(sections)["section"].isin(self.names).to_numpy()
        other = rng.integers(0, 500, counts.shape)
        return sparse.csr_matrix(np.where(here[:, None], other, counts.toarray()))

    def spots(self, sections: Sequence[str]) -> pd.DataFrame:
        spots = super().spots(sections)
        here = spots["section"].isin(self.names)
        spots.loc[here, "total_counts"] *= 3
        spots.loc[here, "white_fraction"] = 0.0
        return spots

    def patches(self, section: str) -> np.ndarray:
        patches = super().patches(section)
        return 255 - patches if section in self.names else patches


def regrouped(store: Store, patient_of: dict[str, str]) -> Store:
    """The same store, some sections said to be of other patients."""
    other = Store(store.path)
    other.index = copy.deepcopy(store.index)
    for entry in other.index["sections"]:
        entry["patient"] = patient_of.get(entry["section"], entry["patient"])
    return other


def with_protocol(settings: Settings, **changes: object) -> Settings:
    protocol = dataclasses.replace(settings.protocol, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(settings, protocol=protocol)


@pytest.fixture
def fold(demo_store: Store, settings: Settings) -> Fold:
    return make_folds(demo_store, settings.protocol)[0]


@pytest.fixture
def fitted(demo_store: Store, fold: Fold, settings: Settings) -> Fitted:
    return fit_statistics(demo_store, fold, settings)


# Folds -------------------------------------------------------------------------------------------


def test_sorted_patients_go_round_in_turn_with_all_their_sections() -> None:
    store = listed({"s1": "C", "s2": "A", "s3": "E", "s4": "B", "s5": "D", "s6": "A", "s7": "X"})
    folds = make_folds(store, Protocol(held_out=("X",), folds=2))
    patients = [{store.sections[s]["patient"] for s in f.validation} for f in folds]
    assert patients == [{"A", "C", "E"}, {"B", "D"}]  # sorted(patients)[f::2]
    assert folds[0].validation == ("s1", "s2", "s3", "s6")
    assert folds[0].train == ("s4", "s5")
    assert all(f.held_out == ("s7",) for f in folds)
    assert [f.number for f in folds] == [0, 1]


def test_the_papers_folds() -> None:
    """22 patients in 5 folds, sorted(patients)[f::5], BC23903 held out."""
    patients = [f"BC{n}" for n in range(23881, 23904)]
    store = listed({f"{p}_{s}": p for p in reversed(patients) for s in "abc"})
    folds = make_folds(store, Protocol(held_out=("BC23903",)))
    for number, fold in enumerate(folds):
        validating = {s[:7] for s in fold.validation}
        assert validating == set(sorted(patients[:-1])[number::5])
        assert {s[:7] for s in fold.train} == set(patients[:-1]) - validating
    assert sorted(len(f.validation) for f in folds) == [12, 12, 12, 15, 15]


@pytest.mark.parametrize("group", ["patient", "section"])
def test_every_section_validates_once_and_no_group_is_on_both_sides(group: str) -> None:
    rng = np.random.default_rng(0)
    store = listed({f"s{i:02}": f"p{rng.integers(9)}" for i in range(40)})
    held_out = store.patients[0]
    folds = make_folds(store, Protocol(held_out=(held_out,), folds=4, group=group))  # type: ignore[arg-type]
    validating = [name for fold in folds for name in fold.validation]
    assert sorted(validating) == sorted(set(store.sections) - set(store.of_patients([held_out])))
    for fold in folds:
        sides = [
            {store.sections[n][group] for n in side}
            for side in (fold.train, fold.validation, fold.held_out)
        ]
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]
        assert len(fold.train) + len(fold.validation) + len(fold.held_out) == 40


def test_a_fold_that_would_be_empty_and_an_unknown_patient_are_refused() -> None:
    store = listed({"s1": "A", "s2": "B", "s3": "C", "s4": "C"})
    with pytest.raises(ValueError, match=r"3 folds need at least 3 groups .* only 2 are left"):
        make_folds(store, Protocol(held_out=("C",), folds=3))
    with pytest.raises(ValueError, match="no patient Z; it has A, B, C"):
        make_folds(store, Protocol(held_out=("Z",), folds=2))
    assert len(make_folds(store, Protocol(folds=4, group="section"))) == 4
    folds = make_folds(store, Protocol(folds=3))
    for number in (-1, 3):
        with pytest.raises(ValueError, match="fold must be from 0 to 2"):
            pick_fold(folds, number)


def test_everyone_trains_but_the_held_out() -> None:
    store = listed({"s1": "A", "s2": "B", "s3": "C", "s4": "A", "s5": "D"})
    protocol = Protocol(held_out=("B",), folds=2)
    fold = everyone(store, protocol)
    assert fold == Fold(number=ALL, train=("s1", "s3", "s4", "s5"), validation=(), held_out=("s2",))
    assert choose_fold(store, protocol, ALL) == fold
    assert choose_fold(store, protocol, 1) == make_folds(store, protocol)[1]
    assert [f.name for f in (fold, make_folds(store, protocol)[1])] == [
        "the refit on all folds",
        "fold 1",
    ]
    with pytest.raises(ValueError, match="fold must be from 0 to 1"):
        choose_fold(store, protocol, -2)
    with pytest.raises(ValueError, match="4 folds need at least 4 groups"):
        everyone(store, Protocol(held_out=("B",), folds=4))


# What a fold fits --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["log_normalised", "log_counts"])
def test_statistics_are_those_of_a_dense_computation_on_training_spots(
    demo_store: Store, settings: Settings, target: str
) -> None:
    settings = with_protocol(settings, target=target, min_gene_fraction=0.2)
    fold = make_folds(demo_store, settings.protocol)[1]
    fitted = fit_statistics(demo_store, fold, settings)
    spots = demo_store.spots(fold.train)
    rows = spots["white_fraction"].to_numpy() <= 0.5
    assert 0 < rows.sum() < len(rows)
    counts = demo_store.counts(fold.train).toarray()[rows].astype(float)
    totals = spots["total_counts"].to_numpy(float)[rows]
    kept = np.flatnonzero(((counts > 0).mean(axis=0) >= 0.2) & (counts.std(axis=0) > 0))
    ranked = kept[np.argsort(-counts.mean(axis=0)[kept], kind="stable")]
    assert list(fitted.genes.index) == list(demo_store.genes.index[ranked])
    assert len(ranked) < len(demo_store.genes)
    scaled = counts * np.median(totals) / totals[:, None] if target != "log_counts" else counts
    units = np.log1p(scaled[:, ranked])
    lines = np.array([np.polyfit(np.log1p(totals), gene, 1) for gene in units.T])
    reference = {
        "mean_count": counts[:, ranked].mean(axis=0),
        "mean": units.mean(axis=0),
        "std": units.std(axis=0),
        "depth_slope": lines[:, 0],
        "depth_intercept": lines[:, 1],
    }
    for name, values in reference.items():
        np.testing.assert_allclose(fitted.genes[name], values, rtol=1e-8, atol=1e-8, err_msg=name)
    assert fitted.median_total == np.median(totals)
    assert fitted.spots == rows.sum()
    assert fitted.sections == fold.train


def test_roles_and_panel_follow_the_rank_by_mean_count(fitted: Fitted, settings: Settings) -> None:
    genes = fitted.genes
    assert genes["mean_count"].is_monotonic_decreasing
    assert genes["role"].tolist() == [MAIN] * 60 + [AUX] * (len(genes) - 60)
    assert genes["panel"].tolist() == [True] * 40 + [False] * (len(genes) - 40)
    assert fitted.main_genes == settings.training.genes
    assert fitted.aux_genes == len(genes) - 60 > 0


def test_without_auxnet_only_the_main_genes_are_fitted(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    training = dataclasses.replace(settings.training, auxnet=False)
    alone = fit_statistics(demo_store, fold, dataclasses.replace(settings, training=training))
    assert alone.aux_genes == 0
    pd.testing.assert_frame_equal(alone.genes, fitted.genes[:60])


def test_ties_by_mean_count_keep_the_order_of_the_store(
    demo_store: Store, fold: Fold, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Genes 10, 30, 31 lead with one mean; all others tie behind, gene 5 never changes."""
    n, genes = len(demo_store.spots(fold.train)), len(demo_store.genes)
    counts = np.ones((n, genes))
    counts[::2] = 3
    counts[:, [10, 30, 31]] += 100
    counts[:, 5] = 50
    monkeypatch.setattr(Store, "counts", lambda *_: sparse.csr_matrix(counts))
    settings = with_protocol(settings, max_white_fraction=1.0)
    fitted = fit_statistics(demo_store, fold, settings)
    rest = [g for g in range(genes) if g not in (5, 10, 30, 31)]
    assert list(fitted.genes.index) == list(demo_store.genes.index[[10, 30, 31, *rest]])


@pytest.mark.parametrize("side", ["validation", "held_out"])
def test_nothing_fitted_depends_on_validation_or_held_out_sections(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings, side: str
) -> None:
    again = fit_statistics(Changed(demo_store, getattr(fold, side)), fold, settings)
    pd.testing.assert_frame_equal(again.genes, fitted.genes, check_exact=True)
    assert again.facts() == fitted.facts()


def test_everything_fitted_depends_on_a_training_section(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    again = fit_statistics(Changed(demo_store, fold.train[:1]), fold, settings)
    assert list(again.genes.index) != list(fitted.genes.index)
    for name in ("mean_count", "mean", "std", "depth_slope", "depth_intercept"):
        both = again.genes[name].align(fitted.genes[name], join="inner")
        assert not np.allclose(*both), name
    for name in ("median_total", "image_mean", "image_std", "spots"):
        assert getattr(again, name) != getattr(fitted, name), name


def test_gene_filter_by_the_share_of_training_spots(
    demo_store: Store, fold: Fold, settings: Settings
) -> None:
    rows = training_rows(demo_store.spots(fold.train), settings.protocol)
    counts = demo_store.counts(fold.train)[rows].toarray()
    share = pd.Series((counts > 0).sum(axis=0) / rows.sum(), index=demo_store.genes.index)
    varies = counts.max(axis=0) > counts.min(axis=0)
    sizes = []
    for fraction in (0.0, 0.1, 0.5, 1.0):
        one = with_protocol(settings, min_gene_fraction=fraction)
        found = set(fit_statistics(demo_store, fold, one).genes.index)
        assert found == set(share.index[(share >= fraction) & varies])
        sizes.append(len(found))
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


def test_too_few_genes_or_only_white_spots_are_told(
    demo_store: Store, fold: Fold, settings: Settings
) -> None:
    many = with_protocol(settings, panel_size=149)
    with pytest.raises(ValueError, match=r"protocol.panel_size is 149, but only \d+ genes pass"):
        fit_statistics(demo_store, fold, many)
    few = dataclasses.replace(settings.training, genes=149)
    with pytest.raises(ValueError, match=r"training\.genes is 149, but only"):
        fit_statistics(demo_store, fold, dataclasses.replace(settings, training=few))
    white = with_protocol(settings, max_white_fraction=0.001)
    with pytest.raises(ValueError, match=r"raise protocol\.max_white_fraction"):
        fit_statistics(demo_store, fold, white)


def test_white_filter_keeps_a_spot_exactly_at_the_limit() -> None:
    spots = pd.DataFrame({"white_fraction": [0.0, 0.5, 0.500001, 1.0]})
    assert training_rows(spots, Protocol()).tolist() == [True, True, False, False]


def test_image_statistics_are_numpys_over_the_training_pixels(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    rows = training_rows(demo_store.spots(fold.train), settings.protocol)
    whole = np.concatenate([demo_store.patches(name) for name in fold.train])[rows] / 255
    np.testing.assert_allclose(fitted.image_mean, whole.mean(axis=(0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(fitted.image_std, whole.std(axis=(0, 1, 2)), atol=1e-10)


def test_a_single_colour_does_not_divide_by_zero(
    demo_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "patches", lambda *_: np.full((3, 8, 8, 3), 51, np.uint8))
    mean, std = image_statistics(demo_store, ["one"], np.ones(3, bool))
    assert mean == pytest.approx((0.2, 0.2, 0.2))
    assert std == pytest.approx((1 / 255,) * 3)


def test_column_mean_std_is_numpys_with_empty_columns_anywhere() -> None:
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.4, (50, 12)) * rng.normal(5, 2, (50, 12))
    dense[:, [0, 5, 6, 11]] = 0
    for values in (dense, np.zeros((4, 3)), 1e6 + rng.normal(size=(50, 2))):
        mean, std = column_mean_std(sparse.csr_matrix(values))
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-9, atol=1e-12)


# Targets -----------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    counts = sparse.csr_matrix([[3, 0, 9], [0, 7, 1]], dtype=np.int32)
    totals = np.array([100.0, 400.0])
    raw = transform(counts, totals, "log_counts", 200).toarray()
    np.testing.assert_allclose(raw, np.log([[4, 1, 10], [1, 8, 2]]))
    normalised = transform(counts, totals, "log_normalised", 200).toarray()
    np.testing.assert_allclose(normalised, np.log([[7, 1, 19], [1, 4.5, 1.5]]))
    assert counts.toarray().tolist() == [[3, 0, 9], [0, 7, 1]]  # raw counts stay raw


def test_targets_use_the_training_median_for_everyone(fitted: Fitted) -> None:
    totals = np.array([2.0, 0.5, 1.0]) * fitted.median_total
    np.testing.assert_allclose(fitted.count_scale(totals), [0.5, 2, 1])
    as_counted = dataclasses.replace(fitted, target="log_counts")
    assert as_counted.count_scale(totals).tolist() == [1, 1, 1]


def test_output_times_scale_plus_shift_is_log_units(fitted: Fitted) -> None:
    before, main = fitted.genes.copy(), fitted.main_genes
    shift, scale = target_scale(fitted, "standardised")
    np.testing.assert_array_equal(shift, fitted.genes["mean"].astype(np.float32))
    np.testing.assert_array_equal(scale, fitted.genes["std"].astype(np.float32))
    in_log = target_scale(fitted, "log")
    np.testing.assert_array_equal(in_log[0], [*shift[:main], *[0] * fitted.aux_genes])
    np.testing.assert_array_equal(in_log[1], [*scale[:main], *[1] * fitted.aux_genes])
    assert fitted.genes.equals(before)


# The leak gate -----------------------------------------------------------------------------------


def test_an_honest_fold_passes_and_the_report_says_what_was_checked(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    report = leak_gate(demo_store, fold, fitted, settings.protocol)
    checks = {"groups", "held_out", "statistics", "panel", "targets", "stain_target"}
    assert set(report["checks"]) == checks
    assert all(check["ok"] for check in report["checks"].values())
    assert report["checks"]["groups"]["why"] == "no patient on both sides"
    assert report["train"] == list(fold.train)
    assert report["held_out"] == ["BC90006_C1"]
    assert report["protocol"] == settings.protocol.line()


def gate_fails(match: str, store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> None:
    with pytest.raises(LeakError, match=match):
        leak_gate(store, fold, fitted, protocol)


def test_statistics_of_a_validation_section_are_a_leak(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    planted = dataclasses.replace(fitted, sections=(*fold.train, fold.validation[0]))
    gate_fails(f"statistics: .*{fold.validation[0]}", demo_store, fold, planted, settings.protocol)


def test_a_held_out_patient_in_training_is_a_leak(
    demo_store: Store, fold: Fold, settings: Settings
) -> None:
    planted = dataclasses.replace(fold, train=(*fold.train, *fold.held_out))
    fitted = fit_statistics(demo_store, planted, settings)
    gate_fails(f"held_out: .*{HELD_OUT}", demo_store, planted, fitted, settings.protocol)


def test_a_held_out_patient_in_validation_is_a_leak(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    planted = dataclasses.replace(fold, validation=(*fold.validation, *fold.held_out))
    gate_fails(f"held_out: .*{HELD_OUT}", demo_store, planted, fitted, settings.protocol)


def test_a_patient_on_both_sides_is_a_leak(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    twin = regrouped(
        demo_store, {fold.validation[0]: demo_store.sections[fold.train[0]]["patient"]}
    )
    gate_fails("groups: .* train and validate", twin, fold, fitted, settings.protocol)


def test_a_fold_without_validation_does_not_pass(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    empty = dataclasses.replace(fold, validation=())
    gate_fails("groups: ", demo_store, empty, fitted, settings.protocol)


def test_a_refit_passes_without_validation_but_not_with_the_held_out(
    demo_store: Store, settings: Settings
) -> None:
    honest = everyone(demo_store, settings.protocol)
    fitted = fit_statistics(demo_store, honest, settings)
    report = leak_gate(demo_store, honest, fitted, settings.protocol)
    assert report["checks"]["groups"]["why"].startswith("all train and nobody validates")
    assert report["validation"] == []
    leaky = dataclasses.replace(honest, train=(*honest.train, *honest.held_out))
    other = fit_statistics(demo_store, leaky, settings)
    gate_fails(
        f"(?s)refit on all.*held_out: .*{HELD_OUT}", demo_store, leaky, other, settings.protocol
    )
    both = dataclasses.replace(honest, validation=honest.train[:1])
    gate_fails("groups: .* train and validate", demo_store, both, fitted, settings.protocol)


def test_a_panel_with_the_means_of_other_data_is_a_leak(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    everyone = dataclasses.replace(fold, train=tuple(demo_store.sections))
    leaked = fit_statistics(demo_store, everyone, settings)
    planted = dataclasses.replace(leaked, sections=fold.train)  # it lies about where it is from
    gate_fails("panel: ", demo_store, fold, planted, settings.protocol)


def test_targets_scaled_by_other_data_are_a_leak(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    genes = fitted.genes.assign(std=fitted.genes["std"] * 1.01)
    for planted in (
        dataclasses.replace(fitted, median_total=fitted.median_total + 1),
        dataclasses.replace(fitted, genes=genes),
    ):
        with pytest.raises(LeakError, match="targets are not the training spots"):
            leak_gate(demo_store, fold, planted, settings.protocol)


def test_a_panel_of_other_genes_is_a_leak(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    swapped = fitted.genes.copy()
    swapped.iloc[[0, -1], swapped.columns.get_loc("panel")] = [False, True]
    planted = dataclasses.replace(fitted, genes=swapped)
    with pytest.raises(LeakError, match="the panel is not the training spots' top"):
        leak_gate(demo_store, fold, planted, settings.protocol)


def test_a_stain_target_of_a_held_out_patient_is_a_leak(
    demo_store: Store, settings: Settings
) -> None:
    patient = demo_store.index["stain_target"]["patient"]
    other = with_protocol(settings, held_out=(patient,))
    fold = make_folds(demo_store, other.protocol)[0]
    fitted = fit_statistics(demo_store, fold, other)
    gate_fails(f"stain_target: .*{patient}", demo_store, fold, fitted, other.protocol)


def test_all_failures_are_told_at_once(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    planted = dataclasses.replace(fitted, sections=fold.validation)
    both = dataclasses.replace(fold, train=(*fold.train, *fold.held_out))
    gate_fails(
        r"(?s)held_out: .*statistics: .*panel: ", demo_store, both, planted, settings.protocol
    )


def test_a_stain_target_in_validation_is_noted(demo_store: Store, settings: Settings) -> None:
    target = demo_store.index["stain_target"]["section"]
    notes = []
    for fold in make_folds(demo_store, settings.protocol):
        fitted = fit_statistics(demo_store, fold, settings)
        check = leak_gate(demo_store, fold, fitted, settings.protocol)["checks"]["stain_target"]
        assert check["why"].startswith("NOTE") == (target in fold.validation)
        notes.append(check["why"])
    assert any(why.startswith("NOTE") for why in notes)


def test_grouping_by_section_is_said_in_the_report(demo_store: Store, settings: Settings) -> None:
    twins = regrouped(demo_store, {"BC90002_C1": "BC90001"})
    settings = with_protocol(settings, group="section", folds=2)
    fold = make_folds(twins, settings.protocol)[0]
    fitted = fit_statistics(twins, fold, settings)
    report = leak_gate(twins, fold, fitted, settings.protocol)
    assert "patients ['BC90001'] are, by group: section" in report["checks"]["groups"]["why"]
    assert "sections of one patient on both sides" in report["protocol"]
