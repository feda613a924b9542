"""Two evaluations side by side: paired by patient, on the same truth, or not at all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from brstnet.__main__ import main
from brstnet.evaluation.compare import Comparison, Side, compare, read_side
from brstnet.evaluation.scores import MODEL, Where, tidy_rows

GENES = pd.Index([f"g{i}" for i in range(12)])
PATIENTS = "abcdefgh"


def folder(path: Path, better: float = 0.0, *, seed: int = 0, **protocol: Any) -> Path:
    """An evaluation's folder: 8 patients of two sections, whose PCC is `better` than a base."""
    base, noise = np.random.default_rng(1), np.random.default_rng(seed)
    parts = []
    for patient in PATIENTS:
        of_patient = 0.3 + 0.2 * base.normal()
        for section in "12":
            pcc = of_patient + 0.1 * base.normal(size=12)
            for name, plus in ((MODEL, better), ("colour_ridge", -0.1)):
                mine = pcc + plus + 0.01 * noise.normal(size=12)
                found = {"pcc": mine, "partial_pcc": mine / 2, "ccc": mine / 2}
                parts.append(
                    tidy_rows(found, GENES, Where(patient + section, patient, "0", name, 40))
                )
    path.mkdir()
    pd.concat(parts).to_parquet(path / "scores.parquet")
    panels = pd.DataFrame({"fold": "0", "gene": GENES, "symbol": GENES.str.upper()})
    panels = panels.assign(panel=True, variable=False, listed=False)
    panels.to_parquet(path / "panels.parquet")
    facts = {"line": "judged", "store": "s1", "protocol": {"target": "log_counts"}, **protocol}
    (path / "protocol.json").write_text(json.dumps(facts))
    return path


def compared(*places: Path | str) -> Comparison:
    return compare([read_side(str(place)) for place in places])


def row(found: Comparison, metric: str = "pcc", which: int = 0) -> dict[str, Any]:
    mine = found.overall[found.overall["metric"] == metric]
    return {str(k): v for k, v in mine.iloc[which].items()}


def test_a_small_lasting_difference_is_found_though_patients_differ_much(tmp_path: Path) -> None:
    found = compared(folder(tmp_path / "a"), folder(tmp_path / "b", 0.03, seed=2))
    overall = row(found)
    assert overall["difference"] == pytest.approx(0.03, abs=0.01)
    assert 0 < overall["low"] < 0.03 < overall["high"]
    assert overall["p"] == overall["smallest_p"] == 2 / 2**8
    assert overall["patients"] == 8
    assert (found.patients["b"] > found.patients["a"]).all()


def test_no_difference_is_none(tmp_path: Path) -> None:
    found = compared(folder(tmp_path / "a", seed=3), folder(tmp_path / "b", seed=4))
    assert row(found)["low"] < 0 < row(found)["high"]
    assert row(found)["p"] > 0.05
    same = compared(tmp_path / "a", tmp_path / "a")
    assert row(same)["difference"] == 0
    assert row(same)["p"] == 1
    assert list(same.patients) == ["a", "a (2)"]


def test_values_are_medians_over_genes_of_patients_means(tmp_path: Path) -> None:
    found = compared(folder(tmp_path / "a"), folder(tmp_path / "b", 0.1, seed=5))
    scores = pd.read_parquet(tmp_path / "b" / "scores.parquet")
    scores = scores[(scores["predictor"] == MODEL) & (scores["metric"] == "pcc")]
    by_patient = scores.groupby(["gene", "patient"])["value"].mean().unstack()
    assert row(found)["this"] == pytest.approx(by_patient.mean(axis=1).median())
    assert found.patients["b"].to_dict() == pytest.approx(by_patient.median().to_dict())


def test_genes_are_tested_over_patients_two_sided(tmp_path: Path) -> None:
    found = compared(folder(tmp_path / "a"), folder(tmp_path / "b", 0.1, seed=5)).genes
    assert (found["better"] == 8).all()
    assert found["p"].tolist() == pytest.approx([stats.binomtest(8, 8).pvalue] * 12)
    assert found["p_holm"].tolist() == pytest.approx([min(1, 12 * 2 / 2**8)] * 12)
    assert found["p_bh"].tolist() == pytest.approx([2 / 2**8] * 12)
    assert set(found["symbol"]) == set(GENES.str.upper())
    worse = compared(tmp_path / "b", tmp_path / "a").genes
    assert worse["p"].tolist() == pytest.approx(found["p"].tolist())
    assert (worse["worse"] == 8).all()


def test_a_control_can_be_a_side_and_p_is_adjusted_over_the_sides(tmp_path: Path) -> None:
    a = folder(tmp_path / "a")
    found = compared(a, f"{a}@colour_ridge", folder(tmp_path / "b", 0.03, seed=2))
    assert row(found)["name"] == "a, colour ridge"
    assert row(found)["difference"] == pytest.approx(-0.1, abs=0.01)
    assert [row(found, which=i)["p_holm"] for i in (0, 1)] == [4 / 2**8] * 2
    with pytest.raises(ValueError, match="there is no oracle in it, but model, colour_ridge"):
        read_side(f"{a}@oracle")


def with_scores(side: Side, scores: pd.DataFrame) -> Side:
    return dataclasses.replace(side, scores=scores, name="other")


def test_only_the_same_truth_is_compared(tmp_path: Path) -> None:
    side = read_side(str(folder(tmp_path / "a")))
    fewer = with_scores(side, side.scores.assign(n=39))
    with pytest.raises(
        ValueError, match="section a1 was judged on 40 spots by a and on 39 by other"
    ):
        compare([side, fewer])
    others = with_scores(side, side.scores.assign(section=side.scores["section"] + "x"))
    with pytest.raises(ValueError, match="no section was judged by both"):
        compare([side, others])
    folder(tmp_path / "b", protocol={"target": "log_normalised"})
    with pytest.raises(ValueError, match="on log_counts and b on log_normalised"):
        compared(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="at least two evaluations, got 1"):
        compare([side])


def test_what_one_side_lacks_is_left_out_of_both_and_told(tmp_path: Path) -> None:
    side = read_side(str(folder(tmp_path / "a")))
    part = with_scores(side, side.scores[side.scores["section"] != "h2"])
    found = compare([side, part])
    assert row(found)["difference"] == 0  # h2 counts in neither
    assert found.notes == ("1 sections were judged by one alone, and are left out",)
    folder(tmp_path / "b", store="s2")
    assert "stores of different content" in compared(tmp_path / "a", tmp_path / "b").notes[0]


def test_few_patients_give_no_interval_but_a_p(tmp_path: Path) -> None:
    side = read_side(str(folder(tmp_path / "a")))
    sides = [
        with_scores(s, s.scores[s.scores["patient"].isin(["a", "b", "c"])])
        for s in (side, read_side(str(folder(tmp_path / "b", 0.1, seed=2))))
    ]
    found = row(compare(sides))
    assert np.isnan(found["low"])
    assert found["interval"] == "(no interval: 3 patients)"
    assert found["genes_higher"] == found["genes"] == 12
    assert found["p"] == 2 / 2**3


def test_the_command_writes_tables_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", 0.03, seed=2)
    out = tmp_path / "out"
    assert main(["compare", str(a), str(b), f"{b}@colour_ridge", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "b, colour ridge" in printed
    assert "+0.03" in printed
    names = {"comparison.csv", "patients.csv", "genes.csv", "protocol.json", "comparison.png"}
    assert names == {path.name for path in out.iterdir()}
    assert len(pd.read_csv(out / "genes.csv")) == 24
    assert len(json.loads((out / "protocol.json").read_text())["sides"]) == 3


def test_faults_are_told_with_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = folder(tmp_path / "a")
    assert main(["compare", str(a), str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
    assert "none: must be the folder that `brstnet evaluate`" in capsys.readouterr().err
    scores = pd.read_parquet(a / "scores.parquet")
    scores.drop(columns="fold").to_parquet(a / "scores.parquet")
    with pytest.raises(ValueError, match="its tables lack fold"):
        read_side(str(a))
