"""Anybody's predictions by the same tables: planted ones, our own, and those that do not fit."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from trainings import train

from brstnet.__main__ import main
from brstnet.config import Protocol, Settings
from brstnet.data.store import Store
from brstnet.evaluation import controls
from brstnet.evaluation.controls import Wanted
from brstnet.evaluation.evaluate import Evaluation, evaluate
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.others import (
    File,
    from_checkpoints,
    in_standard_units,
    read_predictions,
    score,
)
from brstnet.evaluation.yardstick import Yardstick, judged_genes, measured, standardise
from brstnet.training.leaks import LeakError

pytestmark = pytest.mark.slow  # all of it, together

TRAIN, JUDGED = ["BC90001", "BC90002", "BC90003"], ["BC90004", "BC90005", "BC90006"]
PANEL = 100
QUICK = Judging(draws=60, thinnings=3)
QUIET = Wanted(progress=False)


def yardstick(store: Store, target: str = "log_normalised") -> Yardstick:
    protocol = Protocol(panel_size=PANEL, target=target)  # type: ignore[arg-type]
    return Yardstick.fitted_on(store, TRAIN, JUDGED, protocol)


def written(
    path: Path, x_NG: np.ndarray, spots: pd.DataFrame, genes: pd.DataFrame, **uns: Any
) -> Path:
    """A file of predictions as somebody else would write it."""
    obs = spots[["section", "spot"]].astype(str)
    obs.index = pd.Index([f"s{i}" for i in range(len(obs))])
    adata = anndata.AnnData(X=x_NG, obs=obs, var=pd.DataFrame(index=genes.index), uns=uns)
    adata.write_h5ad(path)
    return path


@dataclass(frozen=True)
class Scene:
    """What is measured, and a yardstick for it."""

    store: Store
    stick: Yardstick
    genes: pd.DataFrame
    spots: pd.DataFrame
    true_NG: np.ndarray

    @classmethod
    def of(cls, store: Store, target: str = "log_normalised") -> "Scene":
        stick, sections = yardstick(store, target), store.of_patients(JUDGED)
        genes = judged_genes(stick, store)
        true_NG = measured(stick, store, sections, genes)
        return cls(store, stick, genes, store.spots(sections), true_NG)

    def judge(self, path: Path, units: str | None = None, **options: Any) -> Evaluation:
        return score(
            File(path=path, units=units),
            self.store,
            JUDGED,
            path.parent / "out",
            self.stick,
            options=replace(QUICK, **options),
            fitting=QUIET,
        )


@pytest.fixture(scope="module")
def scene(demo_store: Store) -> Scene:
    return Scene.of(demo_store)


def of(found: Evaluation, name: str) -> dict[str, Any]:
    predictor: dict[str, Any] = found.summary["predictors"][name]
    return predictor


# What is planted is found -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_colour(scene: Scene, demo_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The colour ridge, handed in as if it were a model."""
    beside = controls.predict_controls(
        scene.stick,
        scene.store,
        scene.store.of_patients(JUDGED),
        scene.genes,
        standardise(scene.true_NG, scene.genes),
        QUIET,
    )
    path = tmp_path_factory.mktemp("colour") / "ridge.h5ad"
    x_NG = beside.predictions["colour_ridge"]
    written(path, x_NG, scene.spots, scene.genes, brstnet_units="standardised")
    listed = path.with_name("mine.txt")
    listed.write_text(f"# mine\n{scene.genes.index[3]}\n\n{scene.genes['symbol'].iloc[5]}  # two\n")
    return scene.judge(path, gene_groups=demo_raw / "truth.parquet", gene_list=listed)


def test_planted_genes_are_found_and_planted_zeros_at_chance(by_colour: Evaluation) -> None:
    groups = by_colour.summary["groups"]
    assert groups["planted"]["median_pcc"] > 0.4
    assert abs(groups["null"]["median_pcc"]) < 0.12
    null = by_colour.null.set_index(["score", "kind", "statistic"])
    assert null.loc[("pcc", "spots", "genes_above_0.3"), "p"] < 0.05
    assert null.loc[("pcc", "spots", "genes_above_0.3"), "null_p95"] < 0.3 * PANEL


def test_the_same_predictions_have_the_same_scores_under_any_name(by_colour: Evaluation) -> None:
    one, other = of(by_colour, "model"), of(by_colour, "colour_ridge")
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value == pytest.approx(other[key], abs=1e-5), key


def test_shuffled_labels_are_at_chance_and_the_oracle_sees_space(by_colour: Evaluation) -> None:
    shuffled = of(by_colour, "shuffled_ridge")
    assert abs(shuffled["median_pcc"]) < 0.15
    assert shuffled["median_r2"] < 0.02
    assert of(by_colour, "oracle_neighbour_mean")["median_pcc"] > shuffled["median_pcc"]
    assert of(by_colour, "tumour_mean")["median_pcc"] > shuffled["median_pcc"]


def test_the_training_mean_has_errors_but_no_pcc(by_colour: Evaluation) -> None:
    found = of(by_colour, "training_mean")
    assert found["genes_without_pcc"] == PANEL
    assert found["median_r2"] == 0
    assert found["aRMSE"] == pytest.approx(1, abs=0.2)
    assert 0.5 < found["median_spot_pcc_log"] < 1  # the genes' means alone
    rows = by_colour.scores[by_colour.scores["predictor"] == "training_mean"]
    assert rows.loc[rows["metric"] == "pcc", "value"].isna().all()
    assert rows.loc[rows["metric"] == "rmse", "value"].notna().all()


def test_every_panel_is_summed_up(by_colour: Evaluation) -> None:
    panels = by_colour.summary["panels"]
    assert {name: p["genes"] for name, p in panels.items()} == {"variable": 50, "listed": 2}
    for panel in panels.values():
        assert set(panel["median_pcc"]) == set(by_colour.summary["predictors"])
    assert by_colour.genes["variable"].sum() == 50
    assert by_colour.genes["panel"].sum() == PANEL


def test_subgroups_name_the_worst_patient(by_colour: Evaluation) -> None:
    table = by_colour.subgroups
    assert set(table["grouping"]) == {"subtype", "patient", "tissue"}
    patients = table[(table["grouping"] == "patient") & (table["predictor"] == "model")]
    lowest = patients.set_index("group")["median_pcc"]
    worst = by_colour.summary["worst_patient"]
    assert (worst["patient"], worst["patients"]) == (lowest.idxmin(), 3)
    assert worst["median_pcc"] == lowest.min()
    tissue = table[table["grouping"] == "tissue"].set_index(["group", "predictor"])
    assert tissue.loc[("normal", "tumour_mean"), "genes_without_pcc"] == PANEL
    assert (tissue["spots"] + 10 * tissue["sections_left_out"] >= 10).all()


def test_three_patients_give_no_interval_and_the_line_says_so(by_colour: Evaluation) -> None:
    interval = by_colour.summary["interval"]
    assert interval["pcc"]["line"].endswith(
        "(no interval: 3 patients, and fewer than 5 cannot give one)"
    )
    assert interval["pcc_minus_colour_ridge"]["value"] == pytest.approx(0, abs=1e-6)
    assert "too few for ST-Net's count" in interval["stnet"]["rule"]


def test_depth_alone_is_exposed(demo_store: Store, tmp_path: Path) -> None:
    """With raw counts a model of the library size scores, and has nothing beyond it."""
    scene = Scene.of(demo_store, "log_counts")
    depth = controls.depth_only(scene.genes, scene.spots["total_counts"].to_numpy(float))
    x_NG = depth + 0.02 * np.random.default_rng(0).normal(size=depth.shape)
    found = scene.judge(written(tmp_path / "d.h5ad", x_NG, scene.spots, scene.genes), "log_counts")
    assert of(found, "model")["median_pcc"] > 0.4
    assert abs(of(found, "model")["median_partial_pcc"]) < 0.1
    alone = of(found, "depth_only")
    assert alone["median_pcc"] > 0.4
    assert alone["genes_without_partial_pcc"] == PANEL


# Our own predictions ------------------------------------------------------------------------------


def test_our_own_predictions_score_the_same(
    demo_store: Store, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, patient = tmp_path / "model", JUDGED[-1:]
    train(demo_store, settings, model)
    device = torch.device("cpu")
    first = evaluate(
        [model], demo_store, patient, tmp_path / "a", device=device, options=QUICK, progress=False
    )
    words = ["score", tmp_path / "a" / "predictions.h5ad", demo_store.path, "--patients", *patient]
    words += ["--out", tmp_path / "b", "--checkpoints", model, "--draws", 60, "--thinnings", 3]
    assert main([str(w) for w in words]) == 0
    assert "labels shuffled, ridge" in capsys.readouterr().out
    again = pd.read_parquet(tmp_path / "b" / "scores.parquet")
    pd.testing.assert_frame_equal(first.scores, again, rtol=0, atol=1e-5)
    ours = again["predictor"] == "model"
    pd.testing.assert_frame_equal(first.scores[ours], again[ours], check_exact=True)
    for name in ("spots.parquet", "null.csv", "subgroups.csv", "genes.csv"):
        assert (tmp_path / "b" / name).is_file()
    facts = json.loads((tmp_path / "b" / "protocol.json").read_text())
    assert facts["predictions"]["units"] == "standardised"
    with pytest.raises(LeakError, match="cannot judge"):
        from_checkpoints([model], demo_store, ["BC90001"])


def test_another_scaling_is_brought_to_ours(scene: Scene, tmp_path: Path) -> None:
    """log_normalised to 10,000 counts: the truth itself, which must come out as the truth."""
    x_NG = np.log1p(np.expm1(scene.true_NG) * 1e4 / scene.stick.median_total)
    uns = {"brstnet_units": "log_normalised", "brstnet_median_total": 1e4}
    path = written(tmp_path / "p.h5ad", sparse.csr_matrix(x_NG), scene.spots, scene.genes, **uns)
    found = read_predictions(path, scene.store, scene.store.of_patients(JUDGED))
    scaled_NG = in_standard_units(found, scene.genes, scene.stick)
    np.testing.assert_allclose(scaled_NG, standardise(scene.true_NG, scene.genes), atol=1e-9)


def test_spots_may_come_in_any_order_and_there_may_be_more_of_them(
    scene: Scene, tmp_path: Path
) -> None:
    """Predictions of all three patients in another order; only one is judged."""
    order = np.random.default_rng(0).permutation(len(scene.spots))
    path = written(tmp_path / "p.h5ad", scene.true_NG[order], scene.spots.iloc[order], scene.genes)
    found = read_predictions(path, scene.store, ["BC90005_C1"], "log_normalised")
    mine = (scene.spots["section"] == "BC90005_C1").to_numpy()
    np.testing.assert_array_equal(found.values[scene.genes.index], scene.true_NG[mine])
    assert found.left_alone == (~mine).sum()


# What does not fit --------------------------------------------------------------------------------


def renamed_section(adata: anndata.AnnData) -> anndata.AnnData:
    adata.obs["section"] = adata.obs["section"].astype(str).replace("BC90004_C1", "BC1_C1")
    return adata


def with_strange_spot(adata: anndata.AnnData) -> anndata.AnnData:
    extra = adata[:1].copy()
    extra.obs["spot"] = "99x99"
    return anndata.concat([adata, extra])


def with_names(adata: anndata.AnnData, names: list[str]) -> anndata.AnnData:
    adata.var_names = names
    return adata


def with_values(adata: anndata.AnnData, x_NG: np.ndarray) -> anndata.AnnData:
    return anndata.AnnData(X=x_NG, obs=adata.obs, var=adata.var)


def with_nan(adata: anndata.AnnData) -> anndata.AnnData:
    adata.X[4, 2] = np.nan
    return adata


CHANGES: dict[str, Callable[[anndata.AnnData], anndata.AnnData]] = {
    "section": renamed_section,
    "missing": lambda a: a[3:].copy(),
    "duplicate": lambda a: anndata.concat([a, a[:2]]),
    "spot": with_strange_spot,
    "column": lambda a: anndata.AnnData(X=a.X, obs=a.obs.drop(columns="spot"), var=a.var),
    "genes": lambda a: with_names(a, [f"other{i}" for i in range(a.n_vars)]),
    "gene": lambda a: with_names(a, [*a.var_names[:-1], a.var_names[0]]),
    "nan": with_nan,
    "raw": lambda a: with_values(a, np.expm1(a.X) * 100),
    "far": lambda a: with_values(a, a.X + 6),
}
FAULTS = {
    "section": "1 sections are not in the store: BC1_C1; it has BC90001_C1",
    "missing": "3 of 71 spots to be judged have no prediction: BC90004_C1 ",
    "duplicate": "2 spots stand there more than once",
    "spot": "1 spots are none of section BC90004_C1 in the store: 99x99",
    "column": "obs must have the columns section and spot, and lacks spot",
    "genes": "none of its .* genes is in the store; its ids begin other0",
    "gene": "genes stand there more than once: ENSG",
    "nan": "1 predictions are NaN or infinite, the first of gene ENSG",
    "raw": "said to be log_normalised, but the highest value is .* are these raw counts",
    "far": "standard deviations from the training mean: are these another scaling",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FAULTS)
def test_files_that_do_not_fit_are_refused(scene: Scene, tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "p.h5ad", scene.true_NG, scene.spots, scene.genes)
    CHANGES[what](anndata.read_h5ad(path)).write_h5ad(path)
    with pytest.raises(ValueError, match=FAULTS[what]):
        scene.judge(path, "log_normalised")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "units", "told"),
    [
        (lambda s: standardise(s.true_NG, s.genes), "log_normalised", "are these standardised"),
        (lambda s: s.true_NG, "standardised", "no value is negative: are these log units"),
        (lambda s: s.true_NG, "log_counts", "the yardstick's target is log_normalised"),
        (lambda s: s.true_NG, "counts", "units must be stated as one of .*, got counts"),
        (lambda s: s.true_NG, None, "units must be stated as one of .*, got None"),
    ],
)
def test_wrong_units_are_told(
    scene: Scene,
    tmp_path: Path,
    make: Callable[[Scene], np.ndarray],
    units: str | None,
    told: str,
) -> None:
    path = written(tmp_path / "p.h5ad", make(scene), scene.spots, scene.genes)
    with pytest.raises(ValueError, match=told):
        scene.judge(path, units)


def test_who_is_judged_cannot_fit_the_yardstick(demo_store: Store) -> None:
    with pytest.raises(LeakError, match="BC90003 cannot be both judged and a training patient"):
        Yardstick.fitted_on(demo_store, TRAIN, ["BC90003"], Protocol(panel_size=PANEL))


def test_the_command_wants_one_yardstick(
    demo_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", tmp_path / "p", demo_store.path, "--patients", "B", "--out", tmp_path / "o"]
    assert main([str(w) for w in words]) == 2
    assert "give either --checkpoints or --training_patients" in capsys.readouterr().err
