"""Models judged on held-out patients: the numbers, the controls beside them, and who is refused."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata
import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from brstnet import metrics
from brstnet.config import Settings, plain
from brstnet.data.store import Store
from brstnet.evaluation import controls, plots, tables, validation
from brstnet.evaluation.evaluate import Evaluation, evaluate
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.predict import find_checkpoints, load_ensemble, predict, predict_mean
from brstnet.evaluation.scores import (
    COLUMNS,
    GENE_METRICS,
    METRICS,
    MODEL,
    SHARES,
    TRUTH,
    Where,
    gene_scores,
    tidy_rows,
)
from brstnet.evaluation.yardstick import measured, scored_genes, standardise
from brstnet.training import checkpoint
from brstnet.training.batches import Units, load_spots
from brstnet.training.fitted import training_rows
from brstnet.training.leaks import LeakError
from brstnet.training.train import fit

CPU = torch.device("cpu")
HELD_OUT, SECTION = "BC90006", "BC90006_C1"
PANEL = 40
CONTROLS = {
    "depth_only",
    "training_mean",
    "oracle_neighbour_mean",
    "tumour_mean",
    "colour_ridge",
    "shuffled_ridge",
}


def quiet(note: Mapping[str, float]) -> None:
    """A callback that does nothing."""


def panel_of(genes: pd.DataFrame) -> pd.Index:
    return genes.index[genes["panel"].to_numpy(bool)]


@dataclasses.dataclass(frozen=True)
class Judged:
    """An evaluation and the folder it was written to."""

    found: Evaluation
    out: Path

    @property
    def model(self) -> pd.DataFrame:
        """The model's own scores of the panel's genes."""
        scores, genes = self.found.scores, self.found.genes
        return scores[(scores["predictor"] == MODEL) & scores["gene"].isin(panel_of(genes))]

    @property
    def adata(self) -> anndata.AnnData:
        return anndata.read_h5ad(self.out / "predictions.h5ad")


@pytest.fixture(scope="module")
def judged(
    trained: Path, demo_raw: Path, demo_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Judged:
    """Both folds' mean on the held-out patient."""
    out = tmp_path_factory.mktemp("judged") / "deep" / "out"
    found = evaluate(
        [trained],
        demo_store,
        [HELD_OUT],
        out,
        device=CPU,
        options=Judging(gene_groups=demo_raw / "truth.parquet"),
        progress=False,
    )
    return Judged(found, out)


def judge(trained: Path, store: Store, out: Path, patient: str = HELD_OUT) -> Evaluation:
    return evaluate([trained], store, [patient], out, device=CPU, progress=False)


def edited_copy(store: Store, folder: Path, sections: dict[str, tuple[str, str]]) -> Store:
    """A store on disk with only these sections: old name to (new name, new patient)."""
    folder.mkdir()
    index = copy.deepcopy(store.index)
    kept = [entry for entry in index["sections"] if entry["section"] in sections]
    for entry in kept:
        old = entry["section"]
        entry["section"], entry["patient"] = sections[old]
        shutil.copytree(store.path / old, folder / entry["section"])
    index["sections"] = kept
    shutil.copy(store.path / "genes.parquet", folder)
    (folder / "index.json").write_text(json.dumps(index))
    return Store(folder)


# Who is refused ----------------------------------------------------------------------------------


def test_patients_that_trained_or_validated_are_refused(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    for patient in demo_store.patients[:-1]:  # over two folds each trained once, validated once
        for number in range(2):
            with pytest.raises(LeakError, match=f"patient {patient} cannot judge .*{HELD_OUT}"):
                judge(trained / f"fold_{number}", demo_store, tmp_path / "out", patient)
    assert not (tmp_path / "out").exists()


def test_they_are_refused_by_content_under_another_name(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    renamed = edited_copy(demo_store, tmp_path / "renamed", {"BC90003_C1": ("X7_A", "X7")})
    with pytest.raises(LeakError, match="section X7_A of patient X7 cannot judge"):
        judge(trained, renamed, tmp_path / "out", "X7")


def test_another_section_of_theirs_is_refused_by_the_patients_name(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    """In a store that has none of the sections that were trained on."""
    other = edited_copy(demo_store, tmp_path / "other", {SECTION: ("BC90002_C9", "BC90002")})
    with pytest.raises(LeakError, match="section BC90002_C9 of patient BC90002 cannot judge"):
        judge(trained, other, tmp_path / "out", "BC90002")


def test_another_section_of_a_renamed_patient_is_refused(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    sections = {"BC90003_C1": ("X7_A", "X7"), SECTION: ("X7_B", "X7")}
    other = edited_copy(demo_store, tmp_path / "other", sections)
    with pytest.raises(LeakError, match="patient X7 cannot judge"):
        judge(trained, other, tmp_path / "out", "X7")


def test_an_unknown_patient_is_refused(trained: Path, demo_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no patient BC1; it has"):
        judge(trained, demo_store, tmp_path, "BC1")


@pytest.mark.parametrize(("key", "other"), [("window_px", 96), ("input_px", 48), ("stain", "none")])
def test_a_store_that_was_prepared_otherwise_is_refused(
    trained: Path, demo_store: Store, tmp_path: Path, key: str, other: object
) -> None:
    store = Store(demo_store.path)
    store.index["prepare"][key] = other
    with pytest.raises(ValueError, match=rf"prepared with {key} {other}, but .* --{key}"):
        judge(trained, store, tmp_path)


# The numbers -------------------------------------------------------------------------------------


def test_scores_are_tidy(judged: Judged, demo_store: Store) -> None:
    scores, genes = judged.found.scores, judged.found.genes
    assert list(scores) == COLUMNS
    assert set(scores["metric"]) == set(METRICS)
    assert set(scores["predictor"]) == {*CONTROLS, MODEL, TRUTH}
    assert not scores.duplicated(["gene", "section", "predictor", "metric"]).any()
    assert scores["patient"].unique().tolist() == [HELD_OUT]
    assert scores["section"].unique().tolist() == [SECTION, ""]
    assert scores["fold"].unique().tolist() == ["0,1"]
    per_gene = scores[scores["gene"] != ""]
    assert per_gene["n"].unique().tolist() == [demo_store.sections[SECTION]["spots_kept"]]
    assert set(per_gene["gene"]) == set(genes.index)
    rows = len(GENE_METRICS) * 2 + len(SHARES)
    each = per_gene[per_gene["predictor"] != TRUTH].groupby(["gene", "predictor"]).size()
    assert each.unique().tolist() == [rows]
    assert scores["metric"].str.endswith("_pooled").eq(scores["section"] == "").all()


def test_scores_are_those_of_the_predictions_by_scipy_and_lstsq(judged: Judged) -> None:
    adata = judged.adata
    pred, true = adata.X.astype(float), adata.layers["measured"].astype(float)
    std = adata.var["std"].to_numpy()
    depth = np.log1p(adata.obs["total_counts"].to_numpy(float))
    design = np.column_stack([np.ones(len(depth)), depth])
    left_pred, left_true = (
        side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in (pred, true)
    )
    scores = judged.found.scores
    mine, other_N = (scores[scores["predictor"] == name] for name in (MODEL, "depth_only"))
    wide = mine.pivot_table(index="gene", columns="metric", values="value")
    alone = other_N[other_N["metric"] == "pcc"].set_index("gene")["value"]
    for column, gene in enumerate(adata.var_names):
        one, other = pred[:, column], true[:, column]
        reference = {
            "pcc": pearsonr(one, other).statistic,
            "partial_pcc": pearsonr(left_pred[:, column], left_true[:, column]).statistic,
            "mae": np.abs(one - other).mean(),
            "rmse": np.sqrt(((one - other) ** 2).mean()),
            "mae_log": np.abs(one - other).mean() * std[column],
            "spearman": spearmanr(one, other).statistic,
            "r2": 1 - ((one - other) ** 2).sum() / (other**2).sum(),
            "pcc_pooled": pearsonr(one, other).statistic,  # one section
        }
        for name, value in reference.items():
            assert wide.loc[gene, name] == pytest.approx(value, abs=2e-5), (gene, name)
        by_depth = pearsonr(depth, other).statistic
        assert abs(alone[gene]) == pytest.approx(abs(by_depth), abs=2e-5)


def test_the_summary_follows_from_the_written_scores(judged: Judged, demo_raw: Path) -> None:
    scores = pd.read_parquet(judged.out / "scores.parquet")
    summary = json.loads((judged.out / "summary.json").read_text())
    scores = scores[scores["gene"].isin(panel_of(judged.found.genes))]
    by_gene = {
        predictor: {m: p.groupby("gene")["value"].median() for m, p in part.groupby("metric")}
        for predictor, part in scores.groupby("predictor")
    }
    ours, depth, ridge = (by_gene[name] for name in (MODEL, "depth_only", "colour_ridge"))
    pcc = ours["pcc"]
    expected = {
        "genes": PANEL,
        "genes_without_pcc": 0,
        "median_pcc": pcc.median(),
        "genes_above_0": (pcc > 0).sum(),
        "genes_above_0.1": (pcc > 0.1).sum(),
        "genes_above_0.3": (pcc > 0.3).sum(),
        "genes_above_0.5": (pcc > 0.5).sum(),
        "aMAE": ours["mae"].mean(),
        "aRMSE": ours["rmse"].mean(),
        "median_partial_pcc": ours["partial_pcc"].median(),
        "median_pcc_depth_only": depth["pcc"].median(),
        "median_pcc_colour_ridge": ridge["pcc"].median(),
        "median_partial_pcc_colour_ridge": ridge["partial_pcc"].median(),
        "depth_only_genes_above_0": (depth["pcc"] > 0).sum(),
        "colour_ridge_genes_above_0.3": (ridge["pcc"] > 0.3).sum(),
    }
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, abs=1e-9), name
    assert summary["median_pcc_by_section"] == {SECTION: pytest.approx(pcc.median())}
    truth = pd.read_parquet(demo_raw / "truth.parquet").set_index("gene")
    assert set(summary["groups"]) == {"planted", "null"}
    for group, found in summary["groups"].items():
        mine = pcc.index[truth.loc[pcc.index, "group"] == group]
        assert found["genes"] == len(mine)
        assert found["median_pcc"] == pytest.approx(pcc[mine].median())
    planted = summary["groups"]["planted"]
    ceiling = truth.loc[[g for g in pcc.index if truth.loc[g, "group"] == "planted"], "ceiling"]
    assert planted["ceiling"] == pytest.approx(ceiling.median())
    assert planted["share_of_ceiling"] == pytest.approx(planted["median_pcc"] / ceiling.median())
    assert "ceiling" not in summary["groups"]["null"]


def test_every_file_is_written_and_says_its_protocol(judged: Judged, settings: Settings) -> None:
    written = {str(p.relative_to(judged.out)) for p in judged.out.rglob("*") if p.is_file()}
    assert written == {
        "scores.parquet",
        "scores.csv",
        "panels.parquet",
        "leaks.json",
        "spread.parquet",
        "calibration.csv",
        "intervals.parquet",
        "coverage.parquet",
        "figures/reliability.png",
        "spots.parquet",
        "subgroups.csv",
        "null.csv",
        "genes.csv",
        "summary.json",
        "report.html",
        "protocol.json",
        "predictions.h5ad",
        "figures/pcc_histogram.png",
        f"figures/genes_{SECTION}.png",
    }
    for figure in (judged.out / "figures").iterdir():
        assert figure.read_bytes().startswith(b"\x89PNG")
    csv = pd.read_csv(judged.out / "scores.csv", na_values="", keep_default_na=True)
    csv[["gene", "section"]] = csv[["gene", "section"]].fillna("")
    pd.testing.assert_frame_equal(csv, pd.read_parquet(judged.out / "scores.parquet"))
    protocol = json.loads((judged.out / "protocol.json").read_text())
    assert protocol["protocol"] == plain(settings.protocol)
    assert protocol["patients"] == [HELD_OUT]
    assert protocol["panel_genes_not_scored"] == 0
    assert [model["fold"] for model in protocol["models"]] == [0, 1]
    assert protocol["same_stain_target"]
    assert "mean of 2 models" in protocol["line"]
    assert json.loads((judged.out / "summary.json").read_text())["protocol"] == protocol["line"]
    assert json.loads(judged.adata.uns["brstnet_protocol"]) == protocol


# Predictions -------------------------------------------------------------------------------------


def test_a_prediction_is_the_networks_output_in_log_units(trained: Path, demo_store: Store) -> None:
    member = checkpoint.load(trained / "fold_0" / "last")
    member = dataclasses.replace(member, settings=in_float32(member.settings))
    predicted = predict(member, demo_store, [SECTION])
    x_BHWC = torch.from_numpy(np.array(demo_store.patches(SECTION)))
    with torch.inference_mode():
        x_BCHW = Units.of(member.fitted, member.settings.training, CPU).image(x_BHWC)
        main, aux, _ = member.model(x_BCHW)
        output = torch.cat([main, aux], dim=1).numpy()
    genes = member.fitted.genes
    expected = output * genes["std"].to_numpy() + genes["mean"].to_numpy()
    assert list(predicted.columns) == list(genes.index)
    np.testing.assert_allclose(predicted, expected, atol=1e-4)


def in_float32(settings: Settings) -> Settings:
    training = dataclasses.replace(settings.training, precision="float32")
    return dataclasses.replace(settings, training=training)


def test_unstandardised_auxiliary_outputs_are_log_units_already(
    trained: Path, demo_store: Store
) -> None:
    member = checkpoint.load(trained / "fold_0" / "last")
    training = dataclasses.replace(member.settings.training, aux_target="log")
    other = dataclasses.replace(
        member, settings=dataclasses.replace(member.settings, training=training)
    )
    one, two = (predict(m, demo_store, [SECTION]) for m in (member, other))
    main = member.fitted.main_genes
    np.testing.assert_array_equal(one.iloc[:, :main], two.iloc[:, :main])
    genes = member.fitted.genes.iloc[main:]
    expected = two.iloc[:, main:] * genes["std"].to_numpy() + genes["mean"].to_numpy()
    np.testing.assert_allclose(one.iloc[:, main:], expected, atol=1e-4)


def test_the_mean_of_models_is_the_mean_of_their_predictions(
    trained: Path, demo_store: Store, judged: Judged
) -> None:
    ensemble = load_ensemble([trained], CPU)
    both = [predict(member, demo_store, [SECTION]) for member in ensemble.members]
    assert not np.allclose(*(p[ensemble.genes.index[0]] for p in both))
    expected = (both[0][ensemble.genes.index] + both[1][ensemble.genes.index]) / 2
    mean = predict_mean(ensemble, demo_store, [SECTION], progress=False)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    panel = ensemble.genes[ensemble.genes["panel"]]
    scaled = (mean[:, :PANEL] - panel["mean"].to_numpy()) / panel["std"].to_numpy()
    assert judged.adata.var_names[:PANEL].tolist() == panel.index.tolist()
    np.testing.assert_allclose(judged.adata.X[:, :PANEL], scaled, rtol=1e-4, atol=1e-4)


def test_an_ensemble_predicts_the_genes_that_all_its_members_do(
    trained: Path, demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """The second model has no AuxNet, so it has fewer."""
    training = dataclasses.replace(settings.training, auxnet=False, epochs=1)
    alone = dataclasses.replace(settings, training=training)
    fit(demo_store, alone, 1, tmp_path / "alone", device=CPU, on_epoch=quiet)
    ensemble = load_ensemble([trained / "fold_0", tmp_path / "alone"], CPU)
    one, two = (member.fitted for member in ensemble.members)
    assert set(ensemble.genes.index) == set(one.genes.index) & set(two.genes.index)
    assert set(ensemble.genes.index) != set(one.genes.index)
    assert ensemble.genes["mean_count"].is_monotonic_decreasing
    assert ensemble.genes["panel"].tolist() == [True] * PANEL + [False] * (
        len(ensemble.genes) - PANEL
    )
    for name in ("mean_count", "mean", "std", "depth_slope", "depth_intercept"):
        mean = (one.genes[name] + two.genes[name]).loc[ensemble.genes.index] / 2
        np.testing.assert_allclose(ensemble.genes[name], mean)
    assert ensemble.median_total == (one.median_total + two.median_total) / 2
    both = [predict(m, demo_store, [SECTION])[ensemble.genes.index] for m in ensemble.members]
    mean = predict_mean(ensemble, demo_store, [SECTION], progress=False)
    np.testing.assert_allclose(mean, (both[0] + both[1]) / 2, rtol=1e-6)


def test_an_ensemble_of_one_is_judged_on_its_own_panel(trained: Path) -> None:
    ensemble = load_ensemble([trained / "fold_1"], CPU)
    fitted = ensemble.members[0].fitted
    assert list(ensemble.genes.index) == list(fitted.genes.index)
    np.testing.assert_array_equal(ensemble.genes["panel"], fitted.genes["panel"])
    np.testing.assert_array_equal(ensemble.genes["std"], fitted.genes["std"])


def test_checkpoints_are_found_as_folder_fold_or_folder_of_folds(trained: Path) -> None:
    last = [trained / f"fold_{number}" / "last" for number in range(2)]
    assert find_checkpoints(trained / "fold_1" / "best") == [trained / "fold_1" / "best"]
    assert find_checkpoints(trained / "fold_1") == [last[1]]
    assert find_checkpoints(trained) == last
    for nothing in (trained / "no", trained.parent / "nor this"):
        with pytest.raises(FileNotFoundError, match="no checkpoint here"):
            find_checkpoints(nothing)


def test_models_of_different_protocols_are_not_averaged(
    trained: Path, demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(trained / "fold_0" / "last", tmp_path / "other")
    file = tmp_path / "other" / "checkpoint.json"
    facts = json.loads(file.read_text())
    facts["settings"]["protocol"]["target"] = "log_counts"
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="have different protocols"):
        load_ensemble([trained, tmp_path / "other"], CPU)


def test_what_was_measured_is_on_the_training_scale(trained: Path, demo_store: Store) -> None:
    ensemble = load_ensemble([trained / "fold_0"], CPU)
    member = ensemble.members[0]
    genes = scored_genes(ensemble, demo_store)
    for sections in ([SECTION], list(member.fold.validation)):
        ours = standardise(measured(ensemble, demo_store, sections, genes), genes)
        spots = load_spots(demo_store, sections, member.fitted, CPU)
        units = Units.of(member.fitted, member.settings.training, CPU)
        theirs = units.target(spots.batch(torch.arange(len(ours))))
        np.testing.assert_allclose(ours, theirs[:, :PANEL], atol=1e-4)


# A store that lacks genes ------------------------------------------------------------------------


def without_genes(store: Store, folder: Path, lacking: list[str]) -> Store:
    """The held-out section alone, in a store that has never heard of these genes."""
    other = edited_copy(store, folder, {SECTION: (SECTION, HELD_OUT)})
    file = folder / SECTION / "spots.h5ad"
    adata = anndata.read_h5ad(file)
    adata[:, ~adata.var_names.isin(lacking)].copy().write_h5ad(file)
    genes = store.genes[~store.genes.index.isin(lacking)]
    genes.to_parquet(folder / "genes.parquet")
    index = {**other.index, "genes": len(genes)}
    (folder / "index.json").write_text(json.dumps(index))
    return Store(other.path)


def test_panel_genes_that_the_store_lacks_are_reported_and_the_rest_judged(
    trained: Path, demo_store: Store, judged: Judged, tmp_path: Path
) -> None:
    lacking = list(judged.adata.var_names[[0, 7, 39]])
    store = without_genes(demo_store, tmp_path / "store", lacking)
    found = judge(trained, store, tmp_path / "out")
    assert found.protocol["panel_genes_not_scored"] == 3
    assert found.summary["genes"] == PANEL - 3
    assert "not available" in found.protocol["controls"]["colour_ridge"]
    assert "median_pcc_colour_ridge" not in found.summary
    assert found.summary["not_available"]["colour_ridge"].startswith("not available")
    here, whole = found.scores, judged.model
    here = here[(here["predictor"] == MODEL) & here["gene"].isin(panel_of(found.genes))]
    keys = ["gene", "section", "metric"]
    expected = whole[~whole["gene"].isin(lacking)]
    one, other = (
        t[~t["metric"].isin(SHARES)].sort_values(keys, ignore_index=True) for t in (here, expected)
    )
    pd.testing.assert_frame_equal(one, other)


def test_a_store_with_none_of_the_genes_is_refused(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    ensemble = load_ensemble([trained], CPU)
    store = without_genes(demo_store, tmp_path / "store", list(ensemble.genes.index[:PANEL]))
    with pytest.raises(ValueError, match="none of the model's 40 genes is in this store"):
        judge(trained, store, tmp_path / "out")


# Controls ----------------------------------------------------------------------------------------


def planted_ridge(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of five sections, with targets that are linear in them but for noise."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(150, 20)) * rng.uniform(0.1, 100, 20) + 5
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    y_NG = scaled @ rng.normal(size=(20, 6)) + noise * rng.normal(size=(150, 6))
    return features, y_NG, np.repeat(list("abcde"), 30)


@pytest.mark.parametrize("noise", [0.1, 20.0])
def test_the_colour_ridge_is_sklearns_with_the_alpha_that_leaving_sections_out_picks(
    noise: float,
) -> None:
    features, y_NG, section_N = planted_ridge(noise)

    def predicted(alpha: float, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(features[train])
        model = Ridge(alpha).fit(scaler.transform(features[train]), y_NG[train])
        found: np.ndarray = model.predict(scaler.transform(features[test]))
        return found

    scores = {}
    for alpha in 10.0 ** np.arange(-1, 6):
        by_section = []
        for section in "abcde":
            out = section_N == section
            pred = predicted(alpha, ~out, out)
            pcc = [pearsonr(p, y).statistic for p, y in zip(pred.T, y_NG[out].T, strict=True)]
            by_section.append(np.median(pcc))
        scores[alpha] = np.mean(by_section)
    best = max(scores, key=lambda alpha: scores[alpha])
    ridge = controls.fit_colour_ridge(features, y_NG, section_N)
    assert ridge.alpha == best
    assert ridge.cross_validated == pytest.approx(scores, abs=1e-9)
    everyone = np.ones(150, bool)
    np.testing.assert_allclose(ridge.predict(features), predicted(best, everyone, everyone))


def test_more_noise_asks_for_more_ridge() -> None:
    little, much = (controls.fit_colour_ridge(*planted_ridge(noise)).alpha for noise in (0.1, 20))
    assert little < much


def test_the_ridge_needs_two_sections() -> None:
    features, y_NG, _ = planted_ridge(0.1)
    with pytest.raises(ValueError, match="at least 2 sections, got 1"):
        controls.fit_colour_ridge(features, y_NG, np.array(["a"] * 150))


def test_the_ridge_of_an_evaluation_is_fitted_on_the_models_spots_alone(
    trained: Path, demo_store: Store, judged: Judged, settings: Settings
) -> None:
    facts = judged.found.protocol["controls"]["colour_ridge"]
    train = [name for name in demo_store.sections if name != SECTION]
    assert facts["sections"] == train
    ensemble = load_ensemble([trained], CPU)
    genes = scored_genes(ensemble, demo_store)
    rows = training_rows(demo_store.spots(train), settings.protocol)
    assert facts["spots"] == rows.sum()
    x = controls.colour_features(demo_store, train, progress=False)[rows]
    y = standardise(measured(ensemble, demo_store, train, genes), genes)[rows]
    scaler = StandardScaler().fit(x)
    model = Ridge(facts["alpha"]).fit(scaler.transform(x), y)
    here = controls.colour_features(demo_store, [SECTION], progress=False)
    pred = model.predict(scaler.transform(here))
    expected = metrics.pearson(pred, judged.adata.layers["measured"][:, :PANEL])
    ours = judged.found.genes["pcc_colour_ridge"][genes.index]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_53_colour_statistics_of_a_plain_and_of_a_striped_patch() -> None:
    plain_patch = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    statistics = controls.colour_statistics(plain_patch)
    assert statistics.shape == (53,)
    assert np.isfinite(statistics).all()
    np.testing.assert_allclose(statistics[:3], [200, 100, 50], rtol=1e-6)
    np.testing.assert_allclose(statistics[8:16], 0, atol=1e-5)  # no spread in any channel
    np.testing.assert_allclose(statistics[16:40].reshape(3, 8), [statistics[:8]] * 3, rtol=1e-5)
    np.testing.assert_allclose(statistics[40:46], 0, atol=1e-5)  # no texture at any scale
    assert statistics[46:50].tolist() == [0, 1, 0, 0]  # grey 124: 64..128
    np.testing.assert_allclose(statistics[50:], 0, atol=1e-5)
    striped = plain_patch.copy()
    striped[:, :8] = 255
    assert (controls.colour_statistics(striped)[40:46] > 1).all()


def test_features_do_not_depend_on_how_a_patch_is_turned(demo_store: Store) -> None:
    """A ridge on them needs no augmentation."""
    patch = np.array(demo_store.patches(SECTION)[3])
    for turned in (np.rot90(patch), np.fliplr(patch)):
        np.testing.assert_allclose(
            controls.colour_statistics(np.ascontiguousarray(turned)),
            controls.colour_statistics(patch),
            rtol=1e-3,
            atol=1e-3,
        )


def test_features_are_a_row_per_spot_in_the_order_of_the_sections(demo_store: Store) -> None:
    names = ["BC90002_C1", SECTION]
    features = controls.colour_features(demo_store, names, progress=False)
    assert features.shape == (len(demo_store.spots(names)), 53)
    first = len(demo_store.patches(names[0]))
    expected = controls.colour_statistics(np.array(demo_store.patches(SECTION)[2]))
    np.testing.assert_array_equal(features[first + 2], expected)


def test_depth_only_is_the_line_fitted_on_training_spots() -> None:
    genes = pd.DataFrame({"depth_slope": [2.0, 0.0], "depth_intercept": [1.0, -3.0]})
    line = controls.depth_only(genes, np.array([0.0, np.e - 1]))
    np.testing.assert_allclose(line, [[1, -3], [3, -3]])


# Tables ------------------------------------------------------------------------------------------


def tidy(scores: dict[str, np.ndarray], section: str, predictor: str = MODEL) -> pd.DataFrame:
    genes = pd.Index([f"g{i + 1}" for i in range(len(next(iter(scores.values()))))])
    return tidy_rows(scores, genes, Where(section, "p", "0", predictor, 9))


def test_scores_of_planted_predictions() -> None:
    rng = np.random.default_rng(0)
    true, depth = rng.normal(size=(30, 4)), rng.normal(size=30)
    scores = gene_scores(true + 1, true, depth, np.array([1.0, 2.0, 3.0, 4.0]))
    for name in ("pcc", "partial_pcc", "spearman", "mae", "rmse"):
        np.testing.assert_allclose(scores[name], 1)
    for name in ("mae_log", "rmse_log"):
        np.testing.assert_allclose(scores[name], [1, 2, 3, 4])
    np.testing.assert_allclose(scores["r2"], 1 - 30 / (true**2).sum(axis=0))
    assert (scores["ccc"] < 1).all()
    assert not [name for name in scores if "smoothed" in name]


def test_the_table_of_genes_is_the_median_over_sections_best_first() -> None:
    parts = [
        tidy({"pcc": np.array(pcc), "mae": np.ones(3)}, section)
        for section, pcc in (("a", [0.1, 0.5, np.nan]), ("b", [0.2, 0.7, 0.9]), ("c", [0.9, 0, 1]))
    ]
    genes = pd.DataFrame({"symbol": ["S1", "S2", "S3"]}, index=pd.Index(["g1", "g2", "g3"]))
    table = tables.gene_table(pd.concat(parts), genes)
    assert table.index.tolist() == ["g3", "g2", "g1"]
    assert table["pcc"].tolist() == pytest.approx([0.95, 0.5, 0.2])
    assert table["symbol"].tolist() == ["S3", "S2", "S1"]


def test_a_model_that_knows_nothing_still_gets_a_table_and_a_summary() -> None:
    """Constant predictions have no correlation with anything, and count as 0."""
    true = np.random.default_rng(0).normal(size=(30, 4))
    true[:, 3] = 1.5  # of which nothing can be said
    flat = np.zeros((30, 4))
    scores = gene_scores(flat, true, np.arange(30.0), np.ones(4))
    scores = pd.concat([tidy(scores, "s"), tidy(scores, "s", "training_mean")])
    names = pd.Index([f"g{i}" for i in range(1, 5)])
    genes = pd.DataFrame({"symbol": names, "panel": True, "fold": "0"}, index=names)
    table = tables.gene_table(scores, genes)
    assert table["pcc"].isna().all()
    summary = tables.summarise(scores, genes)
    assert summary["genes_without_pcc"] == 4
    assert summary["median_pcc"] == 0
    assert summary["genes_above_0"] == 0
    assert summary["training_mean_genes_above_0"] == 0
    assert summary["median_r2"] == 0
    printed = tables.describe_summary({"protocol": "here", **summary})
    assert "4 genes have no PCC of their own; they count as 0" in printed
    plots.plot_histogram(plots.histogram_info(table), "nothing")


def test_summaries_say_how_sections_and_patients_are_brought_together() -> None:
    """Gene 1: 0.1 and 0.3 of a, 0.8 of b, 0 of c, where its prediction is constant."""
    parts = []
    for patient, section, pcc in (
        ("a", "a1", 0.1),
        ("a", "a2", 0.3),
        ("b", "b", 0.8),
        ("c", "c", np.nan),
    ):
        scores = {"pcc": np.array([pcc, np.nan]), "ccc": np.array([0.0, np.nan])}
        where = Where(section, patient, "", MODEL, 9)
        parts.append(tidy_rows(scores, pd.Index(["g1", "g2"]), where))
    found = tables.predictor_summary(pd.concat(parts), MODEL, ["g1", "g2"])
    assert found["median_pcc"] == pytest.approx(0.2)
    assert found["median_pcc_section_mean"] == pytest.approx(0.3)
    assert found["median_pcc_patient_median"] == pytest.approx(0.2)
    assert found["genes_without_pcc"] == 1
    assert found["genes"] == 2


def test_gene_groups_are_summed_up_apart(tmp_path: Path) -> None:
    genes = pd.DataFrame(
        {"pcc": [0.4, 0.2, 0.1, np.nan]}, index=pd.Index(list("abcd"), name="gene")
    )
    groups = pd.DataFrame(
        {
            "gene": list("abcx"),
            "group": ["up", "up", "down", "up"],
            "ceiling": [0.8, 0.4, np.nan, 1],
        }
    )
    found = tables.summarise_groups(genes, groups)
    assert found["down"] == {"genes": 1, "median_pcc": pytest.approx(0.1)}
    assert found["up"] == {
        "genes": 2,
        "median_pcc": pytest.approx(0.3),
        "ceiling": pytest.approx(0.6),
        "share_of_ceiling": pytest.approx(0.5),
    }


def test_gene_groups_that_lack_a_column_are_refused_before_anything_is_predicted(
    trained: Path, demo_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("brstnet.evaluation.cases.predict_ensemble", never)
    file = tmp_path / "groups.parquet"
    pd.DataFrame({"symbol": ["A"], "group": ["up"]}).to_parquet(file)
    for groups, error, why in (
        (file, ValueError, "must have the columns gene and group, .* it lacks gene"),
        (tmp_path / "none.parquet", FileNotFoundError, "none.parquet"),
    ):
        with pytest.raises(error, match=why):
            evaluate(
                [trained],
                demo_store,
                [HELD_OUT],
                tmp_path / "out",
                device=CPU,
                options=Judging(gene_groups=groups),
                progress=False,
            )


# Figures and export ------------------------------------------------------------------------------


def test_the_histogram_counts_every_gene_once() -> None:
    pcc = np.array([-0.31, -0.02, 0.0, 0.049, 0.05, 0.33, 1.0, np.nan])
    genes = pd.DataFrame({"pcc": pcc, "pcc_depth_only": np.full(8, 0.12)})
    info = plots.histogram_info(genes)
    assert list(info) == ["left", "width", "pcc", "pcc_depth_only"]
    assert info["pcc"].sum() == 7
    filled = info[info["pcc"] > 0].set_index("left")["pcc"].to_dict()
    assert filled == {-0.35: 1, -0.05: 1, 0.0: 2, 0.05: 1, 0.3: 1, 0.95: 1}
    assert info.set_index("left")["pcc_depth_only"][0.1] == 8
    assert isinstance(plots.plot_histogram(info, "title"), matplotlib.figure.Figure)


def test_the_map_holds_what_the_exported_predictions_do(judged: Judged) -> None:
    adata = judged.adata
    names = list(adata.var_names[[5, 1]])
    info = plots.map_info(adata, SECTION, names)
    assert list(info) == ["gene", "x", "y", "measured", "predicted"]
    assert info["gene"].tolist() == [names[0]] * len(adata) + [names[1]] * len(adata)
    second = info[info["gene"] == names[1]]
    np.testing.assert_array_equal(second["predicted"], adata.X[:, 1])
    np.testing.assert_array_equal(second["measured"], adata.layers["measured"][:, 1])
    np.testing.assert_array_equal(second[["x", "y"]], adata.obsm["spatial"])
    figure = plots.plot_map(info, dict.fromkeys(names, "title"), "heading")
    assert len(figure.axes) == 4 + 4  # two genes measured and predicted, each with a colour bar


def test_exported_predictions_know_where_they_are_from(judged: Judged, demo_store: Store) -> None:
    adata, spots = judged.adata, demo_store.spots([SECTION])
    assert adata.shape == (len(spots), len(judged.found.genes))
    assert adata.obs_names.tolist() == [f"{SECTION}_{spot}" for spot in spots["spot"]]
    np.testing.assert_array_equal(adata.obs["total_counts"], spots["total_counts"])
    np.testing.assert_array_equal(adata.obsm["spatial"], spots[["pixel_x", "pixel_y"]])
    assert adata.obs["patient"].unique().tolist() == [HELD_OUT]
    assert list(adata.var) == ["symbol", "mean", "std"]


# A fold on its own validation --------------------------------------------------------------------


def test_the_validation_table_has_a_row_per_gene_and_a_column_per_section(trained: Path) -> None:
    folder = trained / "fold_0" / "last"
    table = validation.gene_table(folder)
    fold = checkpoint.load(folder).fold
    assert list(table) == ["gene", "symbol", *fold.validation, "mean"]
    assert len(table) == PANEL
    assert table["mean"].is_monotonic_decreasing
    np.testing.assert_allclose(table["mean"], table[list(fold.validation)].mean(axis=1))
    raw = pd.read_parquet(folder / "validation.parquet").set_index(["gene", "section"])["pcc"]
    for section in fold.validation:
        assert table[section].tolist() == [raw[gene, section] for gene in table["gene"]]


def test_a_gene_without_any_correlation_keeps_its_row(trained: Path, tmp_path: Path) -> None:
    raw = pd.read_parquet(trained / "fold_0" / "last" / "validation.parquet")
    silent = raw["gene"].iloc[0]
    raw.loc[raw["gene"] == silent, "pcc"] = np.nan
    raw.to_parquet(tmp_path / "validation.parquet")
    table = validation.gene_table(tmp_path)
    assert len(table) == PANEL
    assert table["gene"].iloc[-1] == silent
    assert np.isnan(table["mean"].iloc[-1])


def test_the_stored_validation_scores_are_those_of_the_stored_model(
    trained: Path, demo_store: Store
) -> None:
    """Predicted again from disk, in the same precision."""
    ensemble = load_ensemble([trained / "fold_0"], CPU)
    member = ensemble.members[0]
    stored = pd.read_parquet(trained / "fold_0" / "last" / "validation.parquet")
    genes = scored_genes(ensemble, demo_store)
    for section in member.fold.validation:
        pred = predict(member, demo_store, [section])[genes.index]
        pcc = metrics.pearson(pred, measured(ensemble, demo_store, [section], genes))
        here = stored[stored["section"] == section].set_index("gene")["pcc"]
        np.testing.assert_allclose(pcc, here[genes.index], atol=1e-4)


def test_the_map_of_a_fold_shows_its_best_genes(trained: Path, demo_store: Store) -> None:
    folder = trained / "fold_1" / "last"
    figure = validation.gene_map(folder, demo_store, torch.device("cpu"))
    section = checkpoint.load(folder).fold.validation[0]
    stored = pd.read_parquet(folder / "validation.parquet")
    best = stored[stored["section"] == section].nlargest(plots.MAPPED_GENES, "pcc")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"{r.symbol}\nPCC {r.pcc:.2f}" for r in best.itertuples()]


# Several sections a patient ----------------------------------------------------------------------


def test_several_sections_are_scored_apart_and_the_median_taken(
    trained: Path, demo_store: Store, judged: Judged, tmp_path: Path
) -> None:
    """The held-out section twice under two names, and half of it under a third."""
    names = {"C1": slice(None), "C2": slice(None), "C3": slice(0, 12)}
    one = edited_copy(demo_store, tmp_path / "store", {SECTION: (f"{HELD_OUT}_C1", HELD_OUT)})
    index = json.loads((one.path / "index.json").read_text())
    entry = index["sections"][0]
    for name, part in list(names.items())[1:]:
        folder = one.path / f"{HELD_OUT}_{name}"
        shutil.copytree(one.path / SECTION, folder)
        np.save(folder / "patches.npy", np.array(one.patches(SECTION)[part]))
        anndata.read_h5ad(folder / "spots.h5ad")[part].copy().write_h5ad(folder / "spots.h5ad")
        kept = len(np.load(folder / "patches.npy", mmap_mode="r"))
        index["sections"].append({**entry, "section": folder.name, "spots_kept": kept})
    (one.path / "index.json").write_text(json.dumps(index))
    found = judge(trained, Store(one.path), tmp_path / "out")
    mine = found.scores[found.scores["predictor"] == MODEL]
    pcc = mine[mine["metric"] == "pcc"].pivot_table(index="gene", columns="section", values="value")
    pcc = pcc.loc[panel_of(found.genes)]
    whole = judged.found.genes["pcc"][pcc.index]
    for name in ("C1", "C2"):
        np.testing.assert_allclose(pcc[f"{HELD_OUT}_{name}"], whole, atol=1e-3)
    median = pcc.median(axis=1)
    np.testing.assert_allclose(found.genes["pcc"][pcc.index], median)
    assert found.summary["median_pcc"] == pytest.approx(median.median())
    assert found.summary["median_pcc_section_mean"] == pytest.approx(pcc.mean(axis=1).median())
    assert set(found.summary["median_pcc_by_section"]) == set(pcc)
    genes = found.scores[found.scores["gene"] != ""]
    assert genes.groupby("section")["n"].first().tolist() == [60, 24, 24, 12]
    figures = {p.name for p in (tmp_path / "out" / "figures").iterdir()}
    drawn = {"pcc_histogram.png", "reliability.png", *(f"genes_{name}.png" for name in pcc)}
    assert figures == drawn
