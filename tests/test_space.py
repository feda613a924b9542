"""A sweep's settings and space: what is refused, what is drawn where, which points come first."""

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest

from brstnet.config import Protocol, Training, plain, preset
from sweeps import run
from sweeps.space import (
    NUMBERS,
    Asked,
    Sweep,
    choices,
    drawing_order,
    first_points,
    suggest,
    within,
)

SWEEPS = Path(__file__).parents[1] / "sweeps"
RATE = {"low": 1e-4, "high": 0.1, "log": True}
OPTIMIZERS = {
    "weight_decay": {"low": 1e-6, "high": 0.1, "log": True, "when": {"optimizer": "adamw"}},
    "momentum": [0.0, 0.9],
    "optimizer": ["sgd", "adamw"],
}


def read_sweep(path: Path) -> Sweep:
    return run.parse([str(path)])[0]


def sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "name": "s",
        "trials": 4,
        "space": {"learning_rate": RATE, "genes": [250, 300]},
    }
    return Sweep(**{**values, **changes})


def draws(space: dict[str, Any], count: int, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [suggest(study.ask(), space) for _ in range(count)]


# --- the sweeps that are shipped


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_begin_with_the_papers_setting_and_draw_what_can_be_trained(
    path: Path,
) -> None:
    plan = read_sweep(path)
    first = first_points(plan)[0]
    assert first == within(dataclasses.asdict(Training()), plan.space)
    assert set(first) >= {n for n in plan.space if n in ("backbone", "learning_rate")}
    for point in draws(plan.space, 4):
        assert set(point) <= set(plan.space)
        trained = plain(plan.settings(point).training)
        assert {n: v for n, v in point.items() if n != "store"}.items() <= trained.items()


def test_paper_grid_is_twenty_configurations_on_five_folds(capsys: pytest.CaptureFixture) -> None:
    assert run.main([str(SWEEPS / "paper.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "20 configurations x 5 folds = 100 trainings" in said
    assert "held out BC23903" in said
    points = first_points(read_sweep(SWEEPS / "paper.yaml"))
    assert len(points) == len({tuple(p.items()) for p in points}) == 20
    assert len({p["backbone"] for p in points}) == 10


def test_settings_are_overridden_by_their_own_name() -> None:
    plan, options = run.parse(
        [str(SWEEPS / "demo.yaml"), "--store", "S", "--trials", "2", "--training.epochs", "1"]
    )
    assert (plan.name, plan.trials, plan.training.epochs) == ("demo", 2, 1)
    assert plan.protocol == read_sweep(SWEEPS / "demo.yaml").protocol
    assert options.store == "S"


def test_misspelt_setting_of_a_sweep_names_the_valid_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.yaml").write_text("trails: 3\n")
    assert run.main([str(tmp_path / "a.yaml"), "--dry-run"]) == 2
    assert "did you mean trials?" in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"lerning_rate": [1]}}, "valid names: .*learning_rate"),
        ({"space": {"target": ["log_counts"]}}, "protocol: the same for all trials"),
        ({"space": {"stopping": ["early", "fixed"]}}, "best epoch"),
        ({"space": {"seed": [0, 1]}}, "luckiest seed"),
        ({"space": {"genes": []}}, "list of choices"),
        ({"space": {"genes": {"choices": []}}}, "list of choices"),
        ({"space": {"genes": {"choices": [250], "low": 1, "high": 2}}}, "list of choices"),
        ({"space": {"learning_rate": {"low": 1, "high": 0.1}}}, "low must be below high"),
        ({"space": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, "above 0 if log"),
        ({"space": {"learning_rate": {"low": -1, "high": 0.1}}}, "learning_rate must be above 0"),
        ({"space": {"genes": {"low": 250.5, "high": 300}}}, "genes"),
        ({"space": {"views": {"low": 1, "high": 8}}}, "views is no number"),
        ({"space": {"store": {"low": 0, "high": 1}}}, "store is no number"),
        ({"space": {"store": ["wide"]}, "stores": {"narrow": "n"}}, r"\['wide'\] must be among"),
        ({"space": {"backbone": ["efficientnet_b9"]}}, "efficientnet_b0"),
        ({"space": {"auxnet": [True, False], "genes": [100]}}, "without AuxNet"),
        ({"points": [{"epochs": 3}]}, "not in the space"),
        ({"points": [{"genes": 260}]}, "genes 260 is not in space.genes"),
        ({"points": [{"learning_rate": 0.5}]}, "learning_rate 0.5 is not in space.learning_rate"),
        ({"points": ["papre"]}, "preset must be one of"),
        ({"trials": None}, "trials must be given"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"concurrent_trials": 0}, "concurrent_trials must be at least 1"),
        ({"gpus_per_worker": -1.0}, "gpus_per_worker must not be negative"),
        ({"search": "grid"}, "a grid needs a list"),
        ({"search": "grid", "space": {"genes": {"choices": [250, 300]}}}, "no branches"),
        ({"search": "cmaes", "space": {"genes": [250, 300]}}, "cmaes needs a range"),
        ({"search": "cmaes", "objective": "score_and_cost"}, "cmaes knows one objective"),
        ({"name": "a/b"}, "usable as a folder"),
        ({"grace_folds": 6}, "not exceed protocol.folds"),
        ({"grace_folds": 0}, "above 0"),
        ({"reduction_factor": 1}, "reduction_factor must be at least 2"),
        ({"paired_p": 1.0}, "between 0 and 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**changes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"genes": {"choices": [250], "when": {"optimizer": "sgd"}}},
            "other settings of the space",
        ),
        ({"genes": {"choices": [250], "when": {"genes": 250}}}, "circle"),
        (
            {
                "genes": {"choices": [250], "when": {"dropout": 0.1}},
                "dropout": {"choices": [0.1], "when": {"genes": 250}},
            },
            "circle: genes needs .*dropout.*, dropout needs .*genes",
        ),
        # momentum needs optimizer by itself, so that this closes a circle nobody wrote whole
        (
            {"momentum": [0.9], "optimizer": {"choices": ["sgd"], "when": {"momentum": 0.9}}},
            "circle",
        ),
        (
            {"optimizer": ["sgd"], "weight_decay": {**RATE, "when": {"optimizer": "adamw"}}},
            r"optimizer is \['adamw'\] can never hold",
        ),
        (
            {
                "dropout": {"low": 0, "high": 0.5},
                "genes": {"choices": [250], "when": {"dropout": 0}},
            },
            "a range",
        ),
        ({"optimizer": ["sgd"], "weight_decay": {**RATE, "when": "sgd"}}, "when must be"),
    ],
)
def test_conditions_that_cannot_hold_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(space=space)


def test_a_choice_is_only_checked_on_the_branch_where_it_is_drawn() -> None:
    space = {"auxnet": [True, False], "genes": {"choices": [100, 250], "when": {"auxnet": True}}}
    plan = sweep(space=space)  # 100 genes are too few without AuxNet
    for point in draws(space, 20):
        plan.settings(point)


# --- what is drawn


def test_each_branch_draws_what_does_something_there() -> None:
    space = {
        "aux_weight": {"low": 0.1, "high": 40.0, "log": True},
        "auxnet": [True, False],
        "genes": {"low": 250, "high": 300},
        "dropout": {"low": 0, "high": 0.5, "when": {"aux_target": "log"}},
        "aux_target": ["standardised", "log"],
        **OPTIMIZERS,
    }
    order = drawing_order(space)
    assert sorted(order) == sorted(space)
    assert order.index("auxnet") < order.index("aux_target") < order.index("dropout")
    points = draws(space, 60)
    for point in points:
        assert ("aux_weight" in point) == ("aux_target" in point) == point["auxnet"]
        assert ("dropout" in point) == (point.get("aux_target") == "log")
        assert ("momentum" in point) == (point["optimizer"] == "sgd")
        assert ("weight_decay" in point) == (point["optimizer"] == "adamw")
        assert 250 <= point["genes"] <= 300
        assert list(point) == [name for name in space if name in point]
    assert {len(p) for p in points} == {4, 6, 7}  # every branch was met
    alone = draws({"aux_weight": {"low": 0.1, "high": 40.0}}, 5)
    assert all("aux_weight" in point for point in alone)  # no auxnet in the space: no branch


def test_a_range_is_of_the_settings_own_numbers_however_its_ends_are_written() -> None:
    space = {"aux_weight": {"low": 1, "high": 40}, "genes": {"low": 250, "high": 900}}
    sweep(space=space)
    for point in draws(space, 10):
        assert isinstance(point["genes"], int)
        assert isinstance(point["aux_weight"], float)
        assert point["aux_weight"] % 1
    assert NUMBERS["backbone_learning_rate"] is False  # float or null
    assert NUMBERS["target_rank"] is True
    assert "auxnet" not in NUMBERS  # a bool is an int in Python, and no number here


def test_when_takes_one_value_or_a_list() -> None:
    for when, met in (("log", {"log"}), (["log", "standardised"], {"log", "standardised"})):
        space = {
            "dropout": {"choices": [0.1, 0.2], "when": {"aux_target": when}},
            "aux_target": ["log", "standardised"],
        }
        assert {p["aux_target"] for p in draws(space, 20) if "dropout" in p} == met


# --- which points come first


def test_words_stand_for_presets_as_far_as_the_space_reaches() -> None:
    space = {
        "backbone": ["resnet18", "efficientnet_b0"],
        "aux_weight": {"low": 0.1, "high": 40.0},
        "schedule": ["plateau", "cosine"],
        "learning_rate": {"low": 0.01, "high": 0.1},  # the paper's 0.001 is outside
    }
    plan = sweep(space=space, points=["code", "paper", {"backbone": "resnet18"}], trials=9)
    first, code, own = first_points(plan)  # `paper` is the very first already: not twice
    assert first == {"backbone": "efficientnet_b0", "aux_weight": 40.0, "schedule": "plateau"}
    said = {k.removeprefix("training."): v for k, v in preset("code", "training").items()}
    assert code["aux_weight"] == said["aux_weight"] == 1.0
    assert code["schedule"] == "cosine"
    assert own == {"backbone": "resnet18"}


def test_the_champions_point_is_what_of_it_the_space_reaches() -> None:
    space = {
        "genes": [250, 300],
        "dropout": {"low": 0.0, "high": 0.5},
        "optimizer": ["sgd", "adamw"],
        "weight_decay": {"low": 1e-6, "high": 0.1, "when": {"optimizer": "adamw"}},
        "momentum": [0.5, 0.9],
        "input_px": [None, 112],
    }
    plan = sweep(space=space, points=["champion"])
    assert len(first_points(plan)) == 1  # there is none yet
    champion = {
        **dataclasses.asdict(Training()),
        "genes": 777,  # not a choice here
        "dropout": 0.25,
        "optimizer": "adamw",
        "weight_decay": 1e-3,
        "momentum": 0.9,  # is there, but does nothing with AdamW
    }
    assert first_points(plan, champion)[1] == {
        "dropout": 0.25,
        "optimizer": "adamw",
        "weight_decay": 1e-3,
        "input_px": None,
    }


def test_a_grid_is_its_combinations_however_many_are_asked_for() -> None:
    space = {"genes": [250, 300], "aux_weight": [1.0, 40.0], "auxnet": [True, False]}
    plan = sweep(search="grid", space=space, trials=None, points=[{"genes": 300}])
    points = first_points(plan)
    assert plan.count == len(points) == 8
    assert points[0] == {"genes": 250, "aux_weight": 40.0, "auxnet": True}  # the paper's first
    assert sweep(search="grid", space=space, trials=3).count == 3
    assert sweep(search="grid", space=space, trials=50).count == 8


def test_stores_are_searched_by_name_and_are_no_training_setting() -> None:
    plan = sweep(
        space={"store": ["narrow", "wide"], "genes": [250, 300]},
        stores={"narrow": "n", "wide": "w"},
    )
    assert first_points(plan) == [{"genes": 250}]  # the paper has no say in it
    assert plan.settings({"store": "wide", "genes": 300}).training.genes == 300
    assert {p["store"] for p in draws(plan.space, 20)} == {"narrow", "wide"}


# --- what must stay


def test_identity_is_what_makes_trials_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.space.check_space", lambda _: None)  # a tenth of a second each
    plan = sweep()
    same = [
        {"trials": 40},
        {"points": ["best"]},
        {"concurrent_trials": 3},
        {"cpus_per_worker": 2},
        {"gpus_per_worker": 0.5},
        {"finalists": 5},
        {"seeds": 3},
        {"champion_rule": "best"},
        {"refit": True},
    ]
    other = [
        {"space": {"genes": [250, 300]}},
        {"protocol": Protocol(folds=4)},
        {"training": Training(epochs=3)},
        {"search": "random"},
        {"objective": "score_and_cost"},
        {"pruning": "none"},
        {"grace_folds": 1},
        {"reduction_factor": 2},
        {"paired_p": None},
        {"workers_per_trial": 2},
        {"stores": {"a": "b"}},
        {"seed": 1},
        {"name": "t"},
    ]
    assert all(sweep(**change).identity() == plan.identity() for change in same)
    assert all(sweep(**change).identity() != plan.identity() for change in other)
    named = {f.name for f in dataclasses.fields(Sweep)} - {"preset"}
    assert {name for change in [*same, *other] for name in change} == named  # none forgotten


def test_names_of_trials_sort_and_tell_repeats_apart() -> None:
    names = [Asked(number=7, point={}, seed=s).name for s in (0, 2)]
    assert names == ["0007", "0007-seed2"]
    assert choices({"low": 1, "high": 2}) is None
    assert choices({"choices": [1], "when": {"a": 1}}) == [1]
