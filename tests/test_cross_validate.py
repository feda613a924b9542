"""Each fold's model on its own validation sections: every patient judged once, nothing leaked."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr

from brstnet.data.store import Store
from brstnet.evaluation import tables
from brstnet.evaluation.evaluate import Evaluation, cross_validate, evaluate
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.predict import load_ensemble, predict
from brstnet.evaluation.scores import MODEL
from brstnet.training.leaks import LeakError

pytestmark = pytest.mark.slow  # all of it, together

CPU = torch.device("cpu")


def quiet(note: Mapping[str, float]) -> None:
    """A callback that does nothing."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validated")


@pytest.fixture(scope="module")
def found(trained: Path, demo_store: Store, out: Path) -> Evaluation:
    few = Judging(draws=20, thinnings=2)
    return cross_validate([trained], demo_store, out, device=CPU, options=few, progress=False)


def test_every_patient_of_the_folds_is_judged_once(found: Evaluation, demo_store: Store) -> None:
    mine = found.scores[(found.scores["metric"] == "pcc") & (found.scores["predictor"] == MODEL)]
    folds = mine.groupby("section")["fold"].unique()
    held_out = set(demo_store.of_patients(["BC90006"]))
    assert set(folds.index) == set(demo_store.sections) - held_out
    assert all(len(which) == 1 for which in folds)
    assert sorted({str(which[0]) for which in folds}) == ["0", "1"]
    assert sorted(found.summary["interval"]["patients"]) == demo_store.patients[:-1]
    line = found.protocol["line"]
    assert "cross-validated: each of 2 folds by its own model" in line
    assert "settings may have been chosen" in line


def test_a_score_is_that_of_the_folds_own_model_on_its_own_panel(
    found: Evaluation, trained: Path, demo_store: Store
) -> None:
    for number in range(2):
        member = load_ensemble([trained / f"fold_{number}"], CPU).members[0]
        panel = member.fitted.genes.index[member.fitted.genes["panel"]]
        section = member.fold.validation[0]
        said = pd.read_parquet(member.path / "validation.parquet")
        said = said[said["section"] == section].set_index("gene")["pcc"]
        mine = tables.within(found.scores, found.panels, "panel")
        mine = tables.section_table(mine, MODEL, "pcc", panel)
        patient = demo_store.sections[section]["patient"]
        column = mine[(patient, section)]
        assert column.notna().sum() == len(panel)
        np.testing.assert_allclose(column, said[panel].fillna(0), atol=0.02)  # bfloat16, maybe
        gene = column.idxmax()
        predicted = predict(member, demo_store, [section])[gene]
        counts = demo_store.counts([section])[:, demo_store.genes.index.get_loc(gene)]
        totals = demo_store.spots([section])["total_counts"].to_numpy(float)
        true = np.log1p(counts.toarray()[:, 0] * member.fitted.median_total / totals)
        assert column[gene] == pytest.approx(pearsonr(predicted, true).statistic, abs=1e-4)


def test_panels_differ_by_fold_and_stay_apart(found: Evaluation) -> None:
    panels = found.panels[found.panels["panel"]]
    by_fold = {fold: set(part.index) for fold, part in panels.groupby("fold")}
    assert by_fold["0"] != by_fold["1"], "the demo's folds have one panel: the test shows nothing"
    only = by_fold["0"] - by_fold["1"]
    mine = tables.within(found.scores, found.panels, "panel")
    assert set(mine[mine["gene"].isin(only)]["fold"]) == {"0"}
    assert found.summary["genes"] == len(by_fold["0"] | by_fold["1"])


def test_controls_are_fitted_on_the_folds_own_training_sections(
    found: Evaluation, trained: Path
) -> None:
    ridge = found.protocol["controls"]["colour_ridge"]
    for number in range(2):
        facts = json.loads((trained / f"fold_{number}/best/checkpoint.json").read_text())
        assert ridge[f"fold {number}"]["sections"] == facts["fold"]["train"]


def test_all_is_written_a_file_of_predictions_a_fold(found: Evaluation, out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert {"predictions_fold_0.h5ad", "predictions_fold_1.h5ad", "intervals.parquet"} <= names
    assert "predictions.h5ad" not in names
    sections = {
        section
        for number in range(2)
        for section in anndata.read_h5ad(out / f"predictions_fold_{number}.h5ad").obs["section"]
    }
    assert sections == set(found.scores["section"]) - {""}
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert {f"genes_{section}.png" for section in sections} <= drawn


def test_another_evaluation_in_the_same_folder_leaves_nothing_of_this(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    few = Judging(draws=5, thinnings=1)
    (tmp_path / "predictions_fold_7.h5ad").write_text("old")
    evaluate(
        [trained],
        demo_store,
        ["BC90006"],
        tmp_path,
        device=CPU,
        options=few,
        progress=False,
    )
    assert [p.name for p in tmp_path.glob("*.h5ad")] == ["predictions.h5ad"]


def test_who_cannot_be_cross_validated_is_told_why(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    refit = shutil.copytree(trained / "fold_0" / "best", tmp_path / "refit")
    facts = json.loads((refit / "checkpoint.json").read_text())
    facts["fold"] |= {"number": -1, "validation": []}
    (refit / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="nobody validated this model"):
        cross_validate([refit], demo_store, tmp_path / "out", device=CPU, progress=False)
    facts = json.loads((trained / "fold_0" / "best" / "checkpoint.json").read_text())
    first = facts["fold"]["train"][0]
    facts["store"]["sections"][first] = "0" * 64
    (refit / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"trained on other sections than are here .*{first}"):
        cross_validate([refit], demo_store, tmp_path / "out", device=CPU, progress=False)


def test_the_leak_gate_is_passed_again(trained: Path, demo_store: Store, tmp_path: Path) -> None:
    """A panel that is not that of the training sections is seen, whatever the checkpoint says."""
    leaky = shutil.copytree(trained / "fold_0" / "best", tmp_path / "leaky")
    genes = pd.read_parquet(leaky / "genes.parquet")
    genes["mean_count"] *= 1.01
    genes.to_parquet(leaky / "genes.parquet")
    with pytest.raises(LeakError, match=r"panel \(fold 0\): mean counts"):
        cross_validate([leaky], demo_store, tmp_path / "out", device=CPU, progress=False)
