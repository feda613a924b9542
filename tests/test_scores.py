"""The tidy table by hand: neighbours on the array, smoothing, pooling, and panels of genes."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from scipy.stats import binomtest, pearsonr

from brstnet import metrics
from brstnet.config import Protocol
from brstnet.data.store import Store
from brstnet.evaluation import controls, subgroups
from brstnet.evaluation.certainty import belief
from brstnet.evaluation.scores import (
    MODEL,
    Judged,
    Where,
    array_average,
    score_table,
    spot_table,
    tidy_rows,
)
from brstnet.evaluation.yardstick import (
    Yardstick,
    judged_genes,
    measured,
    read_gene_list,
    standardise,
)

GENES = pd.Index(["g1", "g2", "g3"], name="gene")


def judged(seed: int = 0) -> Judged:
    """Two patients with a 5 x 5 array each; a prediction that knows a little, and the mean."""
    rng = np.random.default_rng(seed)
    y, x = (a.ravel() for a in np.mgrid[:5, :5])
    spots = pd.DataFrame(
        {
            "section": np.repeat(["a1", "b1"], 25),
            "patient": np.repeat(["a", "b"], 25),
            "spot": [f"{i}x{j}" for i, j in zip(x, y, strict=True)] * 2,
            "array_x": np.tile(x, 2),
            "array_y": np.tile(y, 2),
            "total_counts": rng.integers(1000, 9000, 50),
            "label": np.tile(np.where(np.arange(25) < 12, "tumor", "non"), 2),
        }
    )
    true = rng.normal(size=(50, 3))
    pred = 0.5 * true + rng.normal(size=(50, 3))
    genes = pd.DataFrame(
        {"symbol": GENES, "mean": [1.0, 2.0, 3.0], "std": [1.0, 0.5, 2.0], "panel": True}, GENES
    )
    both = {MODEL: pred, "training_mean": np.zeros_like(pred)}
    return Judged(spots=spots, genes=genes, true_NG=true, predictions=both, fold="0")


def value(scores: pd.DataFrame, gene: str, section: str, metric: str) -> float:
    where = {"gene": gene, "section": section, "metric": metric, "predictor": MODEL}
    rows = scores[np.logical_and.reduce([scores[k] == v for k, v in where.items()])]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_neighbours_are_those_of_the_same_section_on_the_array() -> None:
    spots = judged().spots.iloc[[0, 1, 5, 6, 24, 25, 26]]  # a corner and a lone spot; two of b
    smooth, beside = (array_average(spots, itself=itself).toarray() for itself in (True, False))
    corner = np.zeros((7, 7))
    corner[:4, :4] = 1 / 4
    corner[4, 4] = 1
    corner[5:, 5:] = 1 / 2
    np.testing.assert_allclose(smooth, corner)
    np.fill_diagonal(corner, 0)
    corner[:4] *= 4 / 3
    corner[5:] *= 2
    np.testing.assert_allclose(beside, corner)
    assert not beside[4].any()


def test_smoothed_scores_are_scipys_of_three_by_three_means() -> None:
    case = judged()
    scores, here = score_table(case), slice(0, 25)

    def smoothed(values: np.ndarray) -> np.ndarray:
        grid = values[here, 1].reshape(5, 5)
        around = [
            [grid[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean() for j in range(5)]
            for i in range(5)
        ]
        return np.array(around).ravel()

    pred, true = smoothed(case.predictions[MODEL]), smoothed(case.true_NG)
    both = pearsonr(pred, true).statistic
    alone = pearsonr(pred, case.true_NG[here, 1]).statistic
    assert value(scores, "g2", "a1", "pcc_smoothed") == pytest.approx(both)
    assert value(scores, "g2", "a1", "pcc_smoothed_prediction") == pytest.approx(alone)


def test_pooled_scores_are_over_all_spots_and_belong_to_no_patient() -> None:
    case = judged()
    scores = score_table(case)
    pooled = scores[scores["section"] == ""]
    assert pooled["patient"].unique().tolist() == [""]
    assert pooled["n"].unique().tolist() == [50]
    expected = metrics.pearson(case.predictions[MODEL], case.true_NG)
    for gene, pcc in zip(GENES, expected, strict=True):
        assert value(scores, gene, "", "pcc_pooled") == pytest.approx(pcc)


def test_a_spots_correlation_is_over_the_panel_in_both_units() -> None:
    case = judged()
    table = spot_table(case)
    mine = table[table["predictor"] == MODEL]
    pred, true = case.predictions[MODEL][7], case.true_NG[7]
    assert mine["spot_pcc"].iloc[7] == pytest.approx(pearsonr(pred, true).statistic)
    mean, std = case.genes["mean"].to_numpy(), case.genes["std"].to_numpy()
    by_scipy = pearsonr(pred * std + mean, true * std + mean).statistic
    assert mine["spot_pcc_log"].iloc[7] == pytest.approx(by_scipy)
    median = mine["spot_pcc"][:25].median()
    assert value(score_table(case), "", "a1", "spot_pcc") == pytest.approx(median)
    assert table[table["predictor"] == "training_mean"]["spot_pcc"].isna().all()


def test_tissue_is_scored_apart_and_small_parts_are_left_out_and_counted() -> None:
    case = judged()
    case.spots.loc[case.spots.index[26:36], "label"] = "undetermined"  # b has 2 tumour spots left
    genes = case.genes.assign(fold=case.fold)
    subtypes = {"a1": "TNBC", "b1": None}
    table = subgroups.subgroup_table([case], score_table(case), genes, subtypes)
    rows = table[table["predictor"] == MODEL].set_index(["grouping", "group"])
    assert rows.loc[("tissue", "tumour"), "spots"] == 12
    assert rows.loc[("tissue", "tumour"), "sections_left_out"] == 1
    assert rows.loc[("tissue", "normal"), "spots"] == 26
    assert [g for k, g in rows.index if k == "subtype"] == ["TNBC"]
    tumour = slice(0, 12)
    pcc = metrics.pearson(case.predictions[MODEL][tumour], case.true_NG[tumour])
    assert rows.loc[("tissue", "tumour"), "median_pcc"] == pytest.approx(np.median(pcc))


def test_labels_of_both_layouts_are_read() -> None:
    labels = pd.Series(["tumor", "non", "", "invasive cancer", "Cancer in situ", "undetermined"])
    assert controls.tissue(labels).tolist() == ["tumour", "normal", "", "tumour", "tumour", ""]


def test_shuffling_stays_within_sections_and_moves_all_genes_together() -> None:
    section_N = np.array(list("aabbbcccc") * 5)
    order = controls.shuffled_within(section_N, 0)
    assert sorted(order) == list(range(45))
    assert (section_N[order] == section_N).all()
    assert (order != np.arange(45)).any()
    np.testing.assert_array_equal(order, controls.shuffled_within(section_N, 0))


def test_the_null_of_the_partial_score_is_drawn_without_depth() -> None:
    case = judged()
    depth = case.log_total_N
    case.predictions[MODEL][:] = depth[:, None] * np.array([1.0, 2.0, -1.0])
    table, why = belief.nulls([case], draws=20)
    partial = table[table["score"] == "partial_pcc"]
    assert (partial.loc[partial["statistic"] == "median_pcc", "observed"] == 0).all()
    assert all("shifts of this section" in line for line in why)
    left = metrics.residual(case.true_NG, depth)
    np.testing.assert_allclose(metrics.pearson(left, np.tile(depth[:, None], 3)), 0, atol=1e-12)


def test_a_gene_list_is_read_and_faults_are_told(tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("ERBB2  # a symbol\n\nENSG00000141736\n")
    assert read_gene_list(path) == ["ERBB2", "ENSG00000141736"]
    for text, told in (("# none\n", "names no gene"), ("A\nB\nA\n", "genes twice: A")):
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            read_gene_list(path)


def own_store(store: Store, tmp_path: Path) -> Store:
    """A copy: an encoder's features are kept beside the patches."""
    return Store(shutil.copytree(store.path, tmp_path / "store"))


def test_an_encoders_features_are_the_mean_over_the_patchs_symmetries(
    demo_store: Store, tmp_path: Path
) -> None:
    own = own_store(demo_store, tmp_path)
    backbone = timm.create_model("test_resnet", num_classes=0).eval()
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    encoder = controls.Encoder(name="test_resnet", weights=str(tmp_path / "w.pth"))
    features = controls.encoder_features(encoder, own, ["BC90006_C1"])
    patches = torch.from_numpy(np.array(own.patches("BC90006_C1"))) / 255
    config = backbone.pretrained_cfg
    x_BCHW = (patches - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    x_BCHW = x_BCHW.permute(0, 3, 1, 2)
    with torch.inference_mode():
        turned = [torch.rot90(x, k, (2, 3)) for x in (x_BCHW, x_BCHW.flip(2)) for k in range(4)]
        expected = torch.stack([backbone(x) for x in turned]).mean(0).numpy()
    assert np.abs(features - expected).max() < 0.02 * np.abs(expected).max()  # bfloat16, maybe


def test_an_encoder_that_cannot_be_had_is_told(demo_store: Store, tmp_path: Path) -> None:
    own = own_store(demo_store, tmp_path)
    protocol = Protocol(panel_size=20)
    stick = Yardstick.fitted_on(own, ["BC90001", "BC90002"], ["BC90006"], protocol)
    genes, sections = judged_genes(stick, own), ["BC90006_C1"]
    true_NG = standardise(measured(stick, own, sections, genes), genes)
    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), weights)
    for encoder in (
        controls.Encoder(name=f"local-dir:{tmp_path}/none"),
        controls.Encoder(name="test_resnet", weights=str(weights)),
    ):
        asked = controls.Wanted(encoder=encoder, progress=False)
        found = controls.predict_controls(stick, own, sections, genes, true_NG, asked)
        there = encoder.weights != "timm"
        assert ("encoder_ridge" in found.predictions) == there
        assert ("encoder_ridge" in found.not_available) != there
        if there:
            assert found.predictions["encoder_ridge"].shape == true_NG.shape
            assert found.facts["encoder_ridge"]["encoder"] == "test_resnet"


def test_six_patients_give_intervals_and_a_paired_difference() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for patient in "abcdef":
        rows = {"ccc": np.full(8, 0.1)}
        for name, mean in ((MODEL, 0.4), ("colour_ridge", 0.1)):
            pcc = mean + 0.05 * rng.normal(size=8)
            where = Where(f"{patient}1", patient, "0", name, 30)
            index = pd.Index([f"g{i}" for i in range(8)])
            parts.append(tidy_rows({"pcc": pcc, "partial_pcc": pcc, **rows}, index, where))
    found = belief.intervals(pd.concat(parts), [f"g{i}" for i in range(8)])
    assert found["patients"] == list("abcdef")
    assert found["pcc"]["low"] < 0.4 < found["pcc"]["high"]
    difference = found["pcc_minus_colour_ridge"]
    assert 0.2 < difference["low"] < 0.3 < difference["high"] < 0.4
    assert difference["p"] == difference["smallest_p"] == 2 / 2**6
    assert "95 % interval" in found["pcc"]["line"]
    assert found["sign_test"]["genes"]["unadjusted"] == 8
    tests = belief.gene_tests(pd.concat(parts), [f"g{i}" for i in range(8)])
    assert tests["patients_positive"].tolist() == tests["patients"].tolist() == [6] * 8
    assert tests["p_sign"].tolist() == pytest.approx(
        [binomtest(6, 6, alternative="greater").pvalue] * 8
    )
    assert tests["p_holm"].tolist() == pytest.approx([8 / 2**6] * 8)
    assert tests["p_bh"].tolist() == pytest.approx([1 / 2**6] * 8)
