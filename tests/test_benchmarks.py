"""The benchmarks run and print their tables; their figures are no test."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import arms, leaks
from benchmarks.sweep_overhead import Drive, Sample, drive_info
from brstnet.data.store import Store

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(module: str, *argv: str) -> list[list[str]]:
    """The cells of the table that a benchmark prints, its head first."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


@pytest.mark.drill
def test_the_step_is_measured_beside_its_limit_and_the_usual_loop(tmp_path: Path) -> None:
    quick = ["--rounds", "1", "--steps", "1", "--batch", "4", "--out", str(tmp_path / "out.jsonl")]
    head, row = run("train_step", "--backbones", "test_resnet", *quick)
    assert head[0] == "backbone"
    assert row[0] == "test_resnet"
    assert all(float(cell) > 0 for cell in row[2:5])
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1


@pytest.mark.drill
def test_a_new_slide_is_taken_apart_beside_its_limit(tmp_path: Path) -> None:
    tissue = np.random.default_rng(0).normal((170, 110, 170), 25, (500, 600, 3)).clip(0, 255)
    image = np.full((700, 900, 3), 245, np.uint8)
    image[100:600, 150:750] = tissue
    Image.fromarray(image).save(tmp_path / "slide.png")
    quick = ["--slide", str(tmp_path / "slide.png"), "--backbone", "test_resnet"]
    head, row = run("predict", *quick, "--device", "cpu")
    seconds = dict(zip(head, map(float, row), strict=True))
    own = [name for name in head if "limit" not in name and name != "in all"]
    assert own == ["read", "colours", "stain and tissue", "patches", "network", "write, 4 maps"]
    assert seconds["in all"] == pytest.approx(sum(seconds[name] for name in own), abs=0.05)
    limit = seconds["limit (decode + forward)"]
    assert seconds["limit / in all"] == pytest.approx(limit / seconds["in all"], abs=0.03)


@pytest.mark.drill
def test_scaling_compares_workers_that_share_with_workers_apart() -> None:
    quick = ["--rounds", "1", "--steps", "1", "--batch", "4", "--backbone", "test_resnet"]
    head, *rows = run("scaling", *quick)
    assert head[:2] == ["scaling", "workers"]
    assert [(r[0], r[1], r[2]) for r in rows] == [
        (kind, str(n), str(4 * n if kind == "weak" else 4))
        for n in (1, 2)
        for kind in ("apart", "weak", "strong")
    ]


def test_a_slot_is_busy_while_its_trial_trains(tmp_path: Path) -> None:
    busy = {"0000": [(12, 14, 1), (14, 16, 1)], "0001": [(13, 15, 2)], "0002": [(17, 30, 1)]}
    for name, lines in busy.items():
        (tmp_path / "fake" / "trials" / name).mkdir(parents=True)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / "fake" / "trials" / name / "busy.jsonl").write_text(text)
    notes = [("ray", 11), ("next", 12), ("next", 12), ("report", 14), ("end", 16), ("next", 17)]
    lines = [{"what": what, "at": at, "seconds": 0.5, "trial": ""} for what, at in notes]
    (tmp_path / "fake" / "timings.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drive = Drive(out=tmp_path, trials=3, slots=2, seconds=1.0, began=10.0)
    drive.samples = [Sample(at=at, gb=1.0, cpu=at / 10, pending=0, ended=0) for at in (13, 15, 17)]
    info = drive_info(drive)
    assert info["from the command until all of them train"] == "3 s"
    (share,) = (value for name, value in info.items() if "slots busy" in name)
    assert share == "**62.5%**"  # 3 s of one slot and 2 s of the other, of 4 s each
    assert info["idle from one trial to the next, mean / 99 %"] == "1.00 / 1.00 s"
    assert info["driver's CPU"].startswith("10% of one")


@pytest.mark.drill
def test_a_sweep_of_sleepers_survives_its_driver() -> None:
    small = ["--trials", "20", "--slots", "2", "--seconds", "8"]
    cells = run("sweep_overhead", "--parts", "fake", "restore", *small)
    found = {row[0]: row[1] for row in cells}
    assert found["runs / top-level runs"].endswith("/ 1")  # that none is lost it checks itself
    assert found["slots with a process"] == "2 of 2"


@pytest.mark.drill
def test_a_real_sweep_is_taken_apart() -> None:
    head, *rows = run("sweep_overhead", "--parts", "overhead", "--real_trials", "2")
    seconds = {row[0]: float(row[1].strip("*")) for row in rows}
    assert head[1] == "s/trial"
    assert 0 < seconds["training steps"] < seconds["wall, first begin to last end"]


@pytest.mark.drill
def test_what_writers_wait_for_and_what_an_outage_loses() -> None:
    head, *rows = run("writers", "--target", "sqlite", "outage", "--writers", "2", "--quick", "0.3")
    assert head[0] == "way"
    assert [row[0] for row in rows] == ["spool", "spool", "direct"]
    assert all(float(row[4]) > 0 for row in rows)


@pytest.fixture(scope="module")
def tissue(demo_store: Store) -> arms.Tissue:
    """The demo store as three patients of two sections."""
    found = arms.Tissue.of(demo_store)
    patients = {f"BC9000{n}": f"P{(n - 1) // 2}" for n in range(1, 7)}
    spots = found.spots.assign(patient=found.spots["patient"].map(patients).to_numpy(str))
    return dataclasses.replace(found, spots=spots)


def plan_of(store: Store, parts: tuple[str, ...] = ("split",)) -> leaks.Plan:
    return leaks.Plan(
        store=store.path,
        stains={},
        group="patient",
        parts=parts,
        panel=20,
        configurations=2,
        network=arms.Network(steps=2),
    )


Call = tuple[np.ndarray, np.ndarray, arms.Target]


class Noting(leaks.Plan):
    """A plan whose only predictor notes what it is given."""

    calls: list[Call]

    @property
    def predictors(self) -> Mapping[str, leaks.Predictor]:
        def note(
            tissue: arms.Tissue, train: np.ndarray, judged: np.ndarray, target: arms.Target
        ) -> np.ndarray:
            Noting.calls.append((train, judged, target))
            return arms.by_depth(tissue, train, judged, target)

        return {"note": note}


def test_arms_differ_in_the_leak_alone(tissue: arms.Tissue) -> None:
    Noting.calls = []
    usual = plan_of(tissue.store)
    plan = Noting(**{f.name: getattr(usual, f.name) for f in dataclasses.fields(usual)})
    part = leaks.parts_of(tissue, "patient")[1]
    rows = list(leaks.split(tissue, part, plan))
    patient, section, spots, by_section, spots_by_section = Noting.calls
    judged = patient[1]
    assert all(np.array_equal(judged, call[1]) for call in Noting.calls)
    assert all(set(call[0]).isdisjoint(judged) for call in Noting.calls)
    assert all(call[2] is patient[2] for call in (section, spots))
    assert len(patient[0]) == len(section[0]) == len(spots[0])
    assert len(by_section[0]) == len(spots_by_section[0]) > len(patient[0])
    (name,) = set(tissue.section_N[judged])
    assert "P1" not in tissue.patient_N[patient[0]]
    for by in (section, by_section):
        assert "P1" in tissue.patient_N[by[0]]
        assert name not in tissue.section_N[by[0]]
    for by in (spots, spots_by_section):
        assert name in tissue.section_N[by[0]]
    assert {(r["leak"], r["predictor"]) for r in rows} == {
        (leak, predictor)
        for leak in ("sections", "spots, by patient", "spots, by section")
        for predictor in ("note", "memory")
    }


def test_lists_of_genes_differ_and_the_predictions_do_not(tissue: arms.Tissue) -> None:
    Noting.calls = []
    usual = plan_of(tissue.store)
    plan = Noting(**{f.name: getattr(usual, f.name) for f in dataclasses.fields(usual)})
    for part in leaks.parts_of(tissue, "patient"):
        rows = {(r["leak"], r["arm"]): r for r in leaks.genes(tissue, part, plan)}
        assert rows["best genes", "leaky"]["pcc"] >= rows["best genes", "honest"]["pcc"]
        assert rows["best genes", "leaky"]["genes"] == 20 // leaks.BEST
        assert rows["panel", "leaky"]["genes"] == rows["panel", "honest"]["genes"] == 20
    assert len(Noting.calls) == 3
    for train, judged, _ in Noting.calls:
        assert set(tissue.patient_N[train]).isdisjoint(tissue.patient_N[judged])


def test_the_memory_knows_its_neighbours_alone(tissue: arms.Tissue) -> None:
    target = arms.Target.fitted_on(tissue, np.arange(len(tissue.spots)), np.arange(5))
    y_NG = target.measure(tissue, np.arange(len(tissue.spots)))
    here = np.flatnonzero(tissue.section_N == "BC90003_C1")
    judged, train = here[:1], np.setdiff1d(np.arange(len(tissue.spots)), here[:1])
    at = tissue.spots[["array_x", "array_y"]].to_numpy(float)
    order = here[1:][np.argsort(((at[here[1:]] - at[here[0]]) ** 2).sum(1), kind="stable")]
    found = arms.by_memory(tissue, train, judged, target)
    np.testing.assert_allclose(found[0], y_NG[order[: arms.NEAREST]].mean(axis=0))
    others = np.flatnonzero(tissue.patient_N != "P1")  # of nobody near: by position elsewhere
    assert not np.allclose(arms.by_memory(tissue, others, judged, target), found)


def test_a_small_store_holds_the_spots_and_the_genes_it_was_given(
    tissue: arms.Tissue, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    train = np.sort(rng.choice(100, 40, replace=False))
    judged = np.arange(110, 125)
    target = arms.Target.fitted_on(tissue, train, np.array([7, 3, 11]))
    store = arms.write_store(tissue, tmp_path, {"train": train, arms.JUDGED: judged}, target, 16)
    assert store.verify() == []
    sections = [n for n, e in store.sections.items() if e["patient"] != arms.JUDGED]
    for rows, names in ((train, sections), (judged, store.of_patients([arms.JUDGED]))):
        assert (store.counts(names) != tissue.counts[rows][:, target.columns]).nnz == 0
        assert store.spots(names)["total_counts"].tolist() == tissue.total_N[rows].tolist()
        assert store.spots(names)["array_x"].tolist() == tissue.spots["array_x"][rows].tolist()
    mine = np.concatenate([store.patches(n) for n in sections])
    every = np.concatenate([tissue.store.patches(s, 16) for s in tissue.store.sections])
    np.testing.assert_array_equal(mine, every[train])


def test_statistics_of_all_are_those_of_all(tissue: arms.Tissue, tmp_path: Path) -> None:
    allowed = np.flatnonzero(tissue.allowed_N)
    train, judged = allowed[:50], allowed[50:90]
    target = arms.Target.fitted_on(tissue, train, tissue.top_genes(train, 20))
    store = arms.write_store(tissue, tmp_path, {"train": train, arms.JUDGED: judged}, target, 32)
    settings = arms.Network().settings(20, len(train), target.kind)
    task, _ = arms.prepare_task(store, settings, arms.ALL, arms.CPU)
    leaky = arms.leaky_statistics(task, store)
    names = tissue.store.genes.index[target.columns]
    np.testing.assert_allclose(task.fitted.genes.loc[names, "mean"], target.mean_G)
    everyone = arms.Target.fitted_on(tissue, allowed[:90], target.columns)
    np.testing.assert_allclose(leaky.fitted.genes.loc[names, "mean"], everyone.mean_G)
    np.testing.assert_array_equal(leaky.train.rows, task.train.rows)


def test_a_choice_is_honest_if_the_validation_makes_it() -> None:
    tried = [
        {arms.VALIDATION: {"pcc": mine}, arms.JUDGED: {"pcc": its}}
        for mine, its in ((0.3, 0.1), (0.5, 0.2), (0.4, 0.6))
    ]
    assert leaks.chosen(tried) == ({"pcc": 0.2}, {"pcc": 0.6})


@pytest.mark.drill
def test_what_leaks_are_worth_is_told_side_by_side(tmp_path: Path) -> None:
    small = ["--spots", "24", "--steps", "3", "--panel", "40", "--configurations", "2"]
    parts = ["--parts", "champion", "protocol", "--jobs", "1"]
    out = tmp_path / "arms.jsonl"
    head, *rows = run("leaks", "--demo", *small, *parts, "--out", str(out))
    assert head[:3] == ["leak", "predictor", "folds"]
    found = {(row[0], row[1]): row for row in rows}
    assert {leak for leak, _ in found} == {
        *("champion of 30", "champion of 2", "epoch", "log_counts", "pooled"),
        *("smoothed prediction", "smoothed"),
    }
    assert float(found["log_counts", "depth"][4]) < 0.2  # normalised: depth says nothing
    assert float(found["log_counts", "depth"][5]) > 0.3
    for chosen_by_judged in (("champion of 30", "ridge"), ("epoch", "network")):
        assert float(found[chosen_by_judged][6].split(" ")[0]) >= 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 * sum(int(row[2]) for row in rows)
