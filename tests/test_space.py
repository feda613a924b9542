"""The sweep's settings and space, the plan, and what Optuna is told: without a cluster."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from brstnet.config import Protocol, Training
from brstnet.data.store import Store
from sweeps import run
from sweeps.plan import check_folds, describe, slots
from sweeps.search import make_scheduler, make_search, state_of
from sweeps.space import NUMBER, Sweep, first_points, suggest

SWEEPS = Path(__file__).parents[1] / "sweeps"


def read_sweep(path: Path) -> Sweep:
    return run.parse([str(path)])[0]


def sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "name": "s",
        "trials": 4,
        "space": {"learning_rate": {"low": 1e-4, "high": 0.1, "log": True}, "genes": [250, 300]},
    }
    return Sweep(**{**values, **changes})


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_are_valid_and_begin_with_the_papers_setting(path: Path) -> None:
    plan = read_sweep(path)
    first = first_points(plan)[0]
    assert set(first) == set(plan.space)
    assert all(first[name] == getattr(Training(), name) for name in plan.space)


def test_paper_grid_is_twenty_configurations_on_five_folds(capsys: pytest.CaptureFixture) -> None:
    assert run.main([str(SWEEPS / "paper.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "20 configurations x 5 folds = 100 trainings" in said
    assert "held out BC23903" in said
    points = first_points(read_sweep(SWEEPS / "paper.yaml"))
    assert len(points) == len({tuple(p.items()) for p in points}) == 20
    assert len({p["backbone"] for p in points}) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"lerning_rate": [1]}}, "valid names: .*learning_rate"),
        ({"space": {"target": ["log_counts"]}}, "protocol: the same for all trials"),
        ({"space": {"genes": []}}, "list of choices"),
        ({"space": {"learning_rate": {"low": 1, "high": 0.1}}}, "low must be below high"),
        ({"space": {"learning_rate": {"low": -1, "high": 0.1}}}, "learning_rate must be above 0"),
        ({"space": {"backbone": ["efficientnet_b9"]}}, "efficientnet_b0"),
        ({"space": {"auxnet": [True, False], "genes": [100]}}, "without AuxNet"),
        ({"points": [{"epochs": 3}]}, "not in the space"),
        ({"trials": None}, "trials must be given"),
        ({"search": "grid"}, "a grid needs a list"),
        ({"name": "a/b"}, "usable as a folder"),
        ({"space": {"stopping": ["early", "fixed"]}}, "best epoch"),
        ({"space": {"seed": [0, 1]}}, "luckiest seed"),
        ({"grace_folds": 6}, "must not exceed protocol.folds"),
        ({"reduction_factor": 1}, "reduction_factor must be at least 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**changes)


def test_settings_are_overridden_by_their_own_name() -> None:
    plan, options = run.parse(
        [str(SWEEPS / "demo.yaml"), "--store", "S", "--trials", "2", "--training.epochs", "1"]
    )
    assert (plan.name, plan.trials, plan.training.epochs) == ("demo", 2, 1)
    assert plan.protocol == read_sweep(SWEEPS / "demo.yaml").protocol
    assert options.store == Path("S")


def test_misspelt_setting_of_a_sweep_names_the_valid_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.yaml").write_text("trails: 3\n")
    assert run.main([str(tmp_path / "a.yaml"), "--dry-run"]) == 2
    assert "did you mean trials?" in capsys.readouterr().err


def test_suggest_draws_inside_the_space_and_skips_auxnets_weight_without_it() -> None:
    space = {
        "aux_weight": {"low": 0.1, "high": 40.0, "log": True},
        "auxnet": [True, False],
        "genes": {"low": 250, "high": 300},
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(20):
        trial = study.ask()
        assert suggest(trial, space) == {NUMBER: number}
        assert ("aux_weight" in trial.params) == trial.params["auxnet"]
        assert 250 <= trial.params["genes"] <= 300
        assert 0.1 <= trial.params.get("aux_weight", 1) <= 40


def test_stopped_trials_are_told_as_pruned_with_their_last_value(tmp_path: Path) -> None:
    search = make_search(sweep(protocol=Protocol(folds=3)), tmp_path)
    first = search.suggest("a")
    assert first[NUMBER] == 0
    assert first["learning_rate"] == Training().learning_rate
    assert first["genes"] == Training().genes
    for trial_id in "bcd":
        search.suggest(trial_id)
    search.on_trial_result("a", {"score": 0.3, "folds_done": 1})
    search.on_trial_complete("a", {"score": 0.2, "folds_done": 3})
    search.on_trial_complete("b", {"score": 0.1, "folds_done": 2})
    search.on_trial_complete("c", {"score": float("nan"), "folds_done": 3, "reason": "NaN"})
    search.on_trial_complete("d", None, error=True)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert study.trials[0].value == 0.2
    assert study.trials[0].intermediate_values == {1: 0.3, 3: 0.2}
    assert study.trials[1].intermediate_values == {2: 0.1}


def test_asha_remembers_the_trials_that_ended_before_a_restart(tmp_path: Path) -> None:
    for number, scores in enumerate(([0.2, 0.4, 0.6], [0.1])):
        folder = tmp_path / "trials" / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps({"scores": scores}))
    scheduler = make_scheduler(sweep(protocol=Protocol(folds=3)), tmp_path)
    new = SimpleNamespace(trial_id="new", status="RUNNING", trainable_name="t")
    scheduler.on_trial_add(None, new)
    rungs = {milestone: dict(recorded) for milestone, recorded in scheduler._brackets[0]._rungs}
    assert rungs == {2: {"0000": pytest.approx(0.3)}, 1: {"0000": 0.2, "0001": 0.1}}
    poor = {"score": 0.05, "folds_done": 1, "training_iteration": 1}
    assert scheduler.on_trial_result(None, new, poor) == scheduler.STOP


def test_state_of_a_trial() -> None:
    assert state_of({"score": 0.1, "folds_done": 5}, 5) == TrialState.COMPLETE
    assert state_of({"score": 0.1, "folds_done": 4}, 5) == TrialState.PRUNED
    assert state_of({"score": 0.1, "folds_done": 5}, 5, error=True) == TrialState.FAIL


def test_slots_and_what_can_never_be_scheduled() -> None:
    plan = sweep(workers_per_trial=2, cpus_per_worker=2)
    assert slots(plan, {"CPU": 16, "GPU": 8}, 1.0) == 4
    assert slots(plan, {"CPU": 9}, 0.0) == 2
    with pytest.raises(ValueError, match=r"2 worker.s. of 2 CPU, 1 GPU each, but the cluster has"):
        slots(plan, {"CPU": 64, "GPU": 1}, 1.0)


def test_plan_names_the_folds_and_refuses_a_leak(demo_store: Store) -> None:
    protocol = Protocol(held_out=("BC90006",), folds=5, panel_size=40)
    plan = sweep(protocol=protocol, training=Training(genes=60), space={})
    check_folds(plan, demo_store)
    assert "fold 4: validates on patient BC90005" in describe(plan, demo_store)
    target = demo_store.index["stain_target"]["patient"]
    leaky = Protocol(held_out=(target,), folds=3, panel_size=40)
    with pytest.raises(ValueError, match=r"the stain target is section .* who is held out"):
        check_folds(sweep(protocol=leaky, training=Training(genes=60), space={}), demo_store)
