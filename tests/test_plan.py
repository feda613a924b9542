"""The plan: what it says, what it costs in made-up speeds, and what it refuses."""

import dataclasses
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from brstnet.config import Prepare, Protocol, Training
from brstnet.data.prepare import prepare
from brstnet.data.store import Store
from sweeps import cluster as clusters
from sweeps import run
from sweeps.board import Budget
from sweeps.cluster import gpus_per_worker, slots
from sweeps.plan import SHOWN, check_budget, check_folds, describe, describe_estimate, estimate
from sweeps.probe import Speed, kinds
from sweeps.pruning import expected_share
from sweeps.space import Sweep

SWEEPS = Path(__file__).parents[1] / "sweeps"
HELD_OUT = ("BC90006",)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces are checked in test_space: a tenth of a second each."""
    monkeypatch.setattr("sweeps.space.check_space", lambda _: None)


def sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "name": "s",
        "trials": 27,
        "space": {"learning_rate": {"low": 1e-4, "high": 0.1, "log": True}, "genes": [250, 300]},
        "pruning": "none",
    }
    return Sweep(**{**values, **changes})


def on_demo(**changes: Any) -> Sweep:
    protocol = Protocol(
        **{"held_out": HELD_OUT, "folds": 2, "panel_size": 40, **changes.pop("protocol", {})}
    )
    training = Training(genes=60)
    return sweep(**{"protocol": protocol, "training": training, "space": {}, **changes})


# --- in words


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_is_described(path: Path) -> None:
    plan = run.parse([str(path)])[0]
    text = describe(plan, None)
    assert text.startswith(f"sweep {plan.name}: {plan.count} configurations x")
    assert all(f"\n  {name}: " in text for name in plan.space)
    assert "trial   0: " in text
    assert "(the paper's values of what is searched)" in text
    assert ("ASHA" in text) == (plan.pruning == "asha")


@pytest.mark.parametrize(
    ("trials", "shown", "ends"),
    [
        (5, 5, "trial   4: genes=250, aux_weight=4.0"),
        (SHOWN, SHOWN, "trial  29: genes=300, aux_weight=10.0"),
        (33, SHOWN, "and 3 more points"),
        (None, SHOWN, "and 10 more points"),
        (500, SHOWN, "and 10 more points"),
    ],
)
def test_no_more_points_are_told_than_there_will_be_trials(
    trials: int | None, shown: int, ends: str
) -> None:
    space = {"genes": [250, 300], "aux_weight": [*map(float, range(1, 20)), 40.0]}
    lines = describe(sweep(search="grid", space=space, trials=trials), None).splitlines()
    told = [line for line in lines if line.startswith("  trial ")]
    assert len(told) == shown
    assert "aux_weight=40.0 (the paper" in told[0]
    assert lines[-1].strip() == ends


def test_branches_and_what_the_search_draws_are_told() -> None:
    space = {
        "optimizer": ["sgd", "adamw"],
        "weight_decay": {"low": 1e-6, "high": 0.1, "log": True, "when": {"optimizer": "adamw"}},
        "auxnet": [True, False],
        "aux_weight": {"low": 1, "high": 40},
    }
    text = describe(sweep(space=space, trials=12, points=["code"]), None)
    assert "weight_decay: 1e-06 to 0.1, log scale (where optimizer is adamw)" in text
    assert "aux_weight: 1 to 40 (where auxnet is True)" in text
    assert "trials 2 to 11: drawn by tpe" in text


# --- what cannot be, before anything is launched


def test_the_plan_names_the_folds_and_refuses_a_leak(demo_store: Store) -> None:
    plan = on_demo(protocol={"folds": 5})
    check_folds(plan, {"": demo_store})
    assert "fold 4: validates on patient BC90005" in describe(plan, demo_store)
    target = demo_store.index["stain_target"]["patient"]
    with pytest.raises(ValueError, match=r"the stain target is section .* who is held out"):
        check_folds(on_demo(protocol={"held_out": (target,)}), {"": demo_store})


def test_the_most_genes_of_the_space_are_checked(demo_store: Store) -> None:
    there = demo_store.index["genes"]
    for space in ({"genes": [60, 5000]}, {"genes": {"low": 60, "high": 5000}}):
        with pytest.raises(ValueError, match=rf"5000|{there}"):
            check_folds(on_demo(space=space), {"": demo_store})


@pytest.fixture(scope="module")
def other_stores(
    demo_raw: Path,
    demo_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    hgnc_once: None,
) -> dict[str, Store]:
    """Of the same tissue: another window, and fewer spots."""
    base = Prepare(layout="stnet", window_px=64, input_px=32, held_out=HELD_OUT, stain="none")
    few = int(spots_of(demo_store)["total_counts"].quantile(0.1))
    made = {
        "narrow": dataclasses.replace(base, window_px=40),
        "fewer": dataclasses.replace(base, min_counts=few),
    }
    place = tmp_path_factory.mktemp("others")
    return {n: prepare(demo_raw, place / n, p, progress=False) for n, p in made.items()}


def spots_of(store: Store) -> pd.DataFrame:
    return store.spots(list(store.sections))


def test_stores_of_the_same_spots_agree_whatever_their_window(
    demo_store: Store, other_stores: dict[str, Store]
) -> None:
    plan = on_demo(
        protocol={"max_white_fraction": 1.0},
        space={"store": ["own", "narrow"]},
        stores={"own": str(demo_store.path), "narrow": "n"},
    )
    check_folds(plan, {"": demo_store, "own": demo_store, "narrow": other_stores["narrow"]})


def test_stores_that_would_be_scored_otherwise_are_refused(
    demo_store: Store, other_stores: dict[str, Store]
) -> None:
    assert len(spots_of(other_stores["fewer"])) < len(spots_of(demo_store))
    plan = on_demo(protocol={"max_white_fraction": 1.0})
    with pytest.raises(ValueError, match="store fewer has another validation spots in fold 0"):
        check_folds(plan, {"": demo_store, "fewer": other_stores["fewer"]})


def test_as_many_spots_are_not_the_same_spots(
    demo_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, spots = Store(demo_store.path), demo_store.spots
    monkeypatch.setattr(other, "spots", lambda s: spots(s).replace({"spot": {"5x6": "5x7"}}))
    plan = on_demo()
    check_folds(plan, {"": demo_store, "other": Store(demo_store.path)})
    with pytest.raises(ValueError, match="another validation spots"):
        check_folds(plan, {"": demo_store, "other": other})


def test_stores_whose_patches_differ_in_white_are_refused_unless_it_does_not_count(
    demo_store: Store, other_stores: dict[str, Store]
) -> None:
    """The same spots, but others are trained on."""
    narrow = other_stores["narrow"]
    both = [spots_of(store)["white_fraction"] for store in (demo_store, narrow)]
    share = float(both[0].median())
    assert ((both[0] > share) != (both[1] > share)).any()
    plan = on_demo(protocol={"max_white_fraction": share})
    with pytest.raises(ValueError, match=r"set protocol\.max_white_fraction to 1") as caught:
        check_folds(plan, {"": demo_store, "narrow": narrow})
    assert "gene panel" in str(caught.value) or "median total" in str(caught.value)


# --- what it costs


def speed(**changes: Any) -> Speed:
    values = {"point": {}, "setup_seconds": 10.0, "step_seconds": 0.5, "validation_seconds": 5.0}
    values |= {"steps": 20, "epochs": 4, "patches_per_second": 64.0, "model_mb": 100.0}
    return Speed(**{**values, **changes})


def test_the_arithmetic_of_an_estimate() -> None:
    assert speed().fold_seconds() == 10 + 4 * (20 * 0.5 + 5)  # 70
    plan = sweep(protocol=Protocol(folds=5), trials=27, workers_per_trial=2)
    slow, broken = speed(step_seconds=1.0), Speed(point={}, error="too many genes")
    expected = estimate(plan, [speed(), slow, broken], slots=3, gpus_per_worker=0.5)
    assert expected.trial_seconds == 5 * (70 + 110) / 2 * 2
    assert expected.hours(1.0) == pytest.approx(27 * 900 * 0.5 / 3600)
    assert expected.wall_seconds(1.0) == pytest.approx(27 * 450 / 3)
    assert expected.wall_seconds(1e-6) == 450  # one whole trial at least
    assert expected.disk_gb == pytest.approx(0.1 * (5 * 27 + 6 * 3))
    alone = estimate(plan, [speed()], slots=3, gpus_per_worker=0.0)
    assert alone.hours(1.0) == pytest.approx(27 * 700 / 3600)  # of workers


def test_finalists_repeats_are_whole_trials_and_pruned_ones_a_share() -> None:
    plan = sweep(pruning="asha", finalists=3, seeds=4, trials=27, protocol=Protocol(folds=5))
    expected = estimate(plan, [speed()], slots=1, gpus_per_worker=1.0)
    assert expected.repeats == 9
    assert expected.share == expected_share(5, plan.grace_folds, 3, 27)
    spent = (27 * expected.share + 9) * 350
    assert expected.hours(expected.share) == pytest.approx(spent / 3600)
    few = estimate(sweep(trials=2, finalists=3, seeds=4), [speed()], 1, 1.0)
    assert few.repeats == 6
    assert few.disk_gb == pytest.approx(0.1 * (5 * (2 + 6) + 6))


def test_where_no_kind_can_be_trained_there_is_no_estimate() -> None:
    faults = [Speed(point={}, error="no such store"), Speed(point={}, error="out of memory")]
    with pytest.raises(ValueError, match="no such store; out of memory"):
        estimate(sweep(), faults, 1, 0.0)


def test_the_table_tells_hours_money_and_what_cannot_be_trained() -> None:
    plan = sweep(pruning="asha", protocol=Protocol(folds=5))
    broken = Speed(point={"backbone": "vit_b16"}, error="224 px are needed\nand more")
    expected = estimate(plan, [speed(point={"backbone": "resnet18"}), broken], 2, 1.0)
    now = datetime(2026, 11, 23, 8, 0).astimezone()
    text = describe_estimate(expected, [speed(), broken], 3.0, now)
    assert "vit_b16" in text
    assert "cannot be trained: 224 px are needed" in text
    assert "and more" not in text
    whole = next(line for line in text.splitlines() if "without pruning" in line)
    hours = 27 * 350 / 3600
    assert f"{hours:.2f}" in whole
    assert f"{hours * 3:.2f} at 3 an hour" in whole
    assert f"{now + timedelta(seconds=27 * 350 / 2):%a %d %b %H:%M}" in whole
    assert f"({expected.share:.0%} spent)" in text
    assert "worker-hours" in describe_estimate(
        dataclasses.replace(expected, gpus_per_worker=0.0, share=1.0), [], None, now
    )


def test_a_budget_below_one_trial_is_refused_and_a_full_disk_is_warned_of() -> None:
    expected = estimate(sweep(workers_per_trial=2), [speed()], 2, 0.5)
    hours = expected.trial_seconds * 0.5 / 3600
    now = datetime.now().astimezone()
    assert check_budget(expected, Budget(), 1e6, now) == ""
    assert check_budget(expected, Budget(gpu_hours=hours * 1.01), 1e6, now) == ""
    with pytest.raises(ValueError, match="is below what one whole trial"):
        check_budget(expected, Budget(gpu_hours=hours * 0.99), 1e6, now)
    first = timedelta(seconds=expected.trial_seconds / 2)
    for zone in (None, now.tzinfo):  # as it is written on the command line, or with a zone
        late = (now + first + timedelta(minutes=2)).replace(tzinfo=zone)
        assert check_budget(expected, Budget(deadline=late), 1e6, now) == ""
        early = (now + first - timedelta(minutes=2)).replace(tzinfo=zone)
        with pytest.raises(ValueError, match="is before one whole trial is expected to end"):
            check_budget(expected, Budget(deadline=early), 1e6, now)
    assert "are free where --out is" in check_budget(expected, Budget(), 0.5, now)


# --- what fits the cluster


def test_slots_and_what_can_never_be_scheduled() -> None:
    plan = sweep(workers_per_trial=2, cpus_per_worker=2)
    assert slots(plan, {"CPU": 16, "GPU": 8}, 1.0) == 4
    assert slots(plan, {"CPU": 9}, 0.0) == 2
    assert slots(sweep(), {"CPU": 16, "GPU": 1}, 0.25) == 4
    with pytest.raises(ValueError, match=r"2 worker.s. of 2 CPU, 1 GPU each, but the cluster has"):
        slots(plan, {"CPU": 64, "GPU": 1}, 1.0)
    assert gpus_per_worker(sweep(), {"GPU": 2}) == 1.0
    assert gpus_per_worker(sweep(), {"CPU": 2}) == 0.0
    assert gpus_per_worker(sweep(gpus_per_worker=0.5), {}) == 0.5


def test_a_cluster_that_begins_without_workers_counts_what_it_may_grow_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(clusters, "STARTED_FROM", file)
    monkeypatch.setattr(clusters.ray, "cluster_resources", lambda: {"CPU": 0.0, "memory": 5.0})
    assert clusters.capacity("auto") == {"CPU": 0.0, "memory": 5.0}
    types = {
        "head": {"resources": {"CPU": 64}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 8},
    }
    config = {"max_workers": 6, "head_node_type": "head", "available_node_types": types}
    file.write_text(yaml.safe_dump(config))
    assert clusters.capacity("auto") == {"CPU": 24.0, "GPU": 6.0, "memory": 5.0}
    assert "GPU" not in clusters.capacity(None)  # Ray on this machine alone


# --- which kinds are measured


def test_kinds_are_every_backbone_and_what_else_is_few() -> None:
    backbones = ["resnet18", "resnet34", "resnet50"]
    space: dict[str, Any] = {
        "backbone": backbones,
        "learning_rate": {"low": 1e-4, "high": 0.1},
        "input_px": [None, 112],
        "batch_size": {"low": 8, "high": 64},
    }
    found = kinds(sweep(space=space))
    assert len(found) == 6
    assert {(k["backbone"], k["input_px"]) for k in found} == {
        (b, p) for b in backbones for p in (None, 112)
    }
    assert kinds(sweep(space={"learning_rate": {"low": 1e-4, "high": 0.1}})) == [{}]
    assert kinds(sweep(space={"batch_size": {"low": 8, "high": 64}})) == [{}]
    many = [f"resnet{n}" for n in (18, 34, 50, 101, 152, 26)] * 6
    found = kinds(sweep(space={"backbone": many, "frozen": [True, False]}))
    assert len(found) == 36  # each backbone, however many, and nothing beside
    assert all(set(k) == {"backbone"} for k in found)


def test_kinds_name_a_store_where_the_space_searches_it() -> None:
    stores = {f"s{n}": "x" for n in range(20)}
    space = {"backbone": ["resnet18", "resnet34"], "store": list(stores)}
    found = kinds(sweep(space=space, stores=stores))
    assert found == [{"backbone": b, "store": "s0"} for b in ("resnet18", "resnet34")]
    found = kinds(sweep(space={"store": ["s1", "s2"]}, stores=stores))
    assert found == [{"store": "s1"}, {"store": "s2"}]
