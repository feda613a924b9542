"""The ledger: each trial handed out once, whatever dies; the same points; the truth for Optuna."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from brstnet.config import Protocol, Training
from sweeps import board as boards
from sweeps.board import WAIT, Board, Budget, load_outcomes, make_sampler, open_study
from sweeps.pruning import read_ledger
from sweeps.space import Asked, Sweep

FOLDS = 2
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
    "aux_weight": {"low": 0.1, "high": 40.0, "log": True},
    "auxnet": [True, False],
    "genes": {"low": 250, "high": 900},
}


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces are checked in test_space: a tenth of a second each."""
    monkeypatch.setattr("sweeps.space.check_space", lambda _: None)


@pytest.fixture(autouse=True)
def _studies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a driver is kept in memory: a journal on disk waits for each line.

    Tests that ask for `on_disk` have the real one.
    """
    if "on_disk" not in request.fixturenames:
        at = functools.cache(lambda file: InMemoryStorage())
        monkeypatch.setattr(boards, "JournalFileBackend", str)
        monkeypatch.setattr(boards, "JournalStorage", at)


@pytest.fixture
def on_disk() -> None:
    """The study is in its database."""


class Killed(BaseException):
    """The driver dies here."""


def sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "name": "s",
        "trials": 4,
        "protocol": Protocol(folds=FOLDS),
        "pruning": "none",
        "space": SPACE,
    }
    return Sweep(**{**values, **changes})


def open_board(out: Path, plan: Sweep | None = None, **more: Any) -> Board:
    """As the driver does; what an earlier one had in memory is gone."""
    out.mkdir(exist_ok=True)
    plan = plan or sweep()
    return Board(sweep=plan, study=open_study(plan, out), out=out, **more)


def asked(board: Board) -> Asked:
    trial = board.next()
    assert isinstance(trial, Asked), trial
    return trial


def score_of(point: dict[str, Any]) -> float:
    """A planted landscape."""
    return 0.5 - abs(math.log10(point["learning_rate"]) + 2) / 5 + point["genes"] / 1e5


def note(score: float, done: float, **more: Any) -> dict[str, Any]:
    whole = int(done)
    return {
        "score": score,
        "folds_done": whole,
        "progress": float(done),
        "cost_seconds": 100.0 * done,
        "scores": [score] * whole,
        "sections": {f"S{fold}": score for fold in range(whole)},
        **more,
    }


def finish(board: Board, trial: Asked, score: float | None = None, **more: Any) -> dict[str, Any]:
    """The trial trains all its folds, unless it is stopped."""
    score = score_of(trial.point) if score is None else score
    for done in (0.5, 1, 2):
        if board.report(trial.name, note(score, done, **more)):
            break
    return board.end(trial.name)


def run_out(board: Board, most: int = 1000) -> list[Asked]:
    """One trial after the other until there are none, or so many."""
    trials: list[Asked] = []
    while len(trials) < most and isinstance(trial := board.next(), Asked):
        finish(board, trial)
        trials.append(trial)
    return trials


def states(board: Board) -> list[str]:
    return [t.state.name for t in board.study.get_trials(deepcopy=False)]


def check_whole(board: Board) -> None:
    """Folder and study tell the same of every trial, and none is there twice."""
    told = {t.number: t for t in board.study.get_trials(deepcopy=False)}
    kept = [o for o in load_outcomes(board.out) if not o["seed"]]
    assert [o["trial"] for o in kept] == list(range(board.sweep.count)) == sorted(told)
    for outcome in kept:
        trial = told[outcome["trial"]]
        assert trial.state == boards.STATES[outcome["state"]]
        assert trial.params == outcome["config"]
        if outcome["state"] == "COMPLETE":
            assert trial.value == outcome["score"]


# --- handing out


def test_trials_are_handed_out_once_and_no_more_at_once_than_allowed(tmp_path: Path) -> None:
    board = open_board(tmp_path, concurrent=2)
    first, second = asked(board), asked(board)
    assert first.number == 0
    assert first.point["learning_rate"] == Training().learning_rate
    assert first.point["aux_weight"] == Training().aux_weight
    assert second.number == 1
    assert board.next() == WAIT
    finish(board, second)
    third = asked(board)
    assert board.next() == WAIT
    finish(board, first)
    last = asked(board)
    assert [third.number, last.number] == [2, 3]
    finish(board, last)
    assert board.next() == WAIT  # nothing is left, but what runs may yet have to be repeated
    assert not board.done
    finish(board, third)
    assert board.next() is None
    assert board.done
    assert board.stopped_by == ""
    check_whole(board)
    assert open_board(tmp_path).next() is None


@pytest.mark.parametrize("search", ["tpe", "random", "cmaes"])
def test_a_driver_killed_after_each_trial_asks_what_an_undisturbed_one_asks(
    tmp_path: Path, search: str
) -> None:
    check_restarts(tmp_path, sweep(search=search, trials=12, points=["code"]))


@pytest.mark.usefixtures("on_disk")
def test_the_same_from_a_database_on_disk(tmp_path: Path) -> None:
    check_restarts(tmp_path, sweep(trials=5))


def check_restarts(tmp_path: Path, plan: Sweep) -> None:
    undisturbed = run_out(open_board(tmp_path / "a", plan))
    killed: list[Asked] = []
    while len(killed) < plan.trials:  # type: ignore[operator]
        board = open_board(tmp_path / "b", plan)  # thrown away with a trial handed out
        seen = asked(board)
        board.report(seen.name, note(0.1, 0.5))
        board = open_board(tmp_path / "b", plan)
        again = asked(board)
        assert again == seen
        finish(board, again)
        killed.append(again)
    assert killed == undisturbed
    assert open_board(tmp_path / "b", plan).next() is None
    check_whole(open_board(tmp_path / "b", plan))
    rates = [trial.point["learning_rate"] for trial in undisturbed]
    assert len(set(rates)) >= len(killed) - 1  # only the first two are given


def test_tpe_learns_from_what_it_was_told(tmp_path: Path) -> None:
    plan = sweep(trials=16, space={"learning_rate": SPACE["learning_rate"]})
    rates = []
    board = open_board(tmp_path, plan)
    while isinstance(trial := board.next(), Asked):
        rates.append(trial.point["learning_rate"])
        finish(board, trial, 1.0 if rates[-1] > 0.05 else 0.1)
    hits = [rate > 0.05 for rate in rates]
    assert sum(hits[8:]) > 2  # a tenth of the log range: random search hits once in ten


@pytest.mark.parametrize("concurrent", [2, 5])
def test_random_search_draws_the_same_whatever_runs_beside(tmp_path: Path, concurrent: int) -> None:
    plan = sweep(search="random", trials=9)
    alone = {t.number: t.point for t in run_out(open_board(tmp_path / "a", plan))}
    together: dict[int, dict[str, Any]] = {}
    board = open_board(tmp_path / "b", plan, concurrent=concurrent)
    while not board.done:
        running = []
        while isinstance(trial := board.next(), Asked):
            running.append(trial)
            together[trial.number] = trial.point
        for trial in reversed(running):
            finish(board, trial)
        board = open_board(tmp_path / "b", plan, concurrent=concurrent)
    assert together == alone
    check_whole(board)


# --- killed between two steps


@pytest.mark.parametrize("search", ["random", "tpe"])
@pytest.mark.parametrize("drawn", [0, 1, 2, 3])
def test_a_trial_drawn_in_part_is_drawn_to_its_end_as_it_would_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str, drawn: int
) -> None:
    plan = sweep(search=search, trials=8)
    undisturbed = run_out(open_board(tmp_path / "a", plan))
    left = {name: kill_after(drawn) for name in ("suggest_float", "suggest_int")}

    def dying(trial: optuna.Trial, space: dict[str, Any]) -> None:
        for name, wrap in left.items():
            monkeypatch.setattr(trial, name, wrap(getattr(trial, name)), raising=False)
        boards_suggest(trial, space)

    boards_suggest, seen = boards.suggest, []
    while len(seen) < 8:
        board = open_board(tmp_path / "b", plan)
        for wrap in left.values():
            wrap.count = 0  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(boards, "suggest", dying)
            with contextlib.suppress(Killed):
                board.next()
        trial = asked(board := open_board(tmp_path / "b", plan))
        finish(board, trial)
        seen.append(trial)
    assert seen == undisturbed
    check_whole(board)


def kill_after(count: int) -> Callable[[Callable], Callable]:
    """Wraps a method: so many calls, over all that it wraps, then death."""

    def wrap(method: Callable) -> Callable:
        def call(*words: Any, **more: Any) -> Any:
            if wrap.count >= count:  # type: ignore[attr-defined]
                raise Killed
            wrap.count += 1  # type: ignore[attr-defined]
            return method(*words, **more)

        return call

    wrap.count = 0  # type: ignore[attr-defined]
    return wrap


STEPS = {
    "before the outcome": (boards, "write_outcome"),
    "after the outcome, before Optuna": (Board, "_tell"),
    "in Optuna": (optuna.Study, "tell"),
    "after Optuna, before the pruner": (Board, "_tell_pruner"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("plan", [sweep(), sweep(pruning="asha", paired_p=None)], ids=["", "asha"])
def test_killed_between_the_steps_of_an_end_nothing_is_lost_or_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, plan: Sweep
) -> None:
    undisturbed = run_out(open_board(tmp_path / "a", plan))
    seen = []
    while not (board := open_board(tmp_path / "b", plan)).done:
        trial = asked(board)
        if step != "before the outcome" or trial.number == len(seen):
            seen.append(trial)
        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], die)
            with pytest.raises(Killed):
                finish(board, trial)
        if step == "before the outcome":
            board = open_board(tmp_path / "b", plan)
            again = asked(board)
            assert again == trial
            finish(board, again)
    assert seen == undisturbed
    check_whole(board)
    if plan.pruning == "asha":
        ledgers = [read_ledger(tmp_path / side / "rungs.jsonl") for side in "ab"]
        key = lambda line: json.dumps(line, sort_keys=True)  # noqa: E731
        assert sorted(map(key, ledgers[0])) == sorted(map(key, ledgers[1]))


def die(*_: Any, **__: Any) -> None:
    raise Killed


def test_killed_while_points_are_put_in_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sweep(points=["code", {"genes": 300}, {"genes": 400}], trials=6)
    whole = run_out(open_board(tmp_path / "a", plan))
    enqueue = optuna.Study.enqueue_trial
    with monkeypatch.context() as patch:
        left = kill_after(2)(enqueue)
        patch.setattr(optuna.Study, "enqueue_trial", lambda *w, **m: left(*w, **m))
        with pytest.raises(Killed):
            open_board(tmp_path / "b", plan)
    board = open_board(tmp_path / "b", plan)
    assert run_out(board) == whole
    check_whole(board)


def test_a_stop_that_was_decided_stays_though_tune_never_heard_of_it(tmp_path: Path) -> None:
    plan = sweep(pruning="asha", grace_folds=0.5, reduction_factor=2, trials=3)
    board = open_board(tmp_path, plan)
    finish(board, asked(board), 0.5)
    poor = asked(board)
    reason = board.report(poor.name, note(0.1, 0.5))
    assert "0.100" in reason
    board = open_board(tmp_path, plan)  # killed before the trial was stopped
    again = asked(board)
    assert again == poor
    assert board.report(again.name, note(0.9, 0.5)) == reason  # not judged anew
    outcome = board.end(again.name)
    assert (outcome["state"], outcome["reason"]) == ("PRUNED", reason)
    assert states(board) == ["COMPLETE", "PRUNED"]


# --- finalists


def test_finalists_are_repeated_when_the_search_has_ended_and_never_pruned(tmp_path: Path) -> None:
    plan = sweep(trials=4, finalists=2, seeds=3, pruning="asha", grace_folds=0.5, paired_p=None)
    board = open_board(tmp_path, plan, concurrent=2)
    trials: dict[int, Asked] = {}

    def begin() -> None:
        trial = asked(board)
        trials[trial.number] = trial
        assert board.report(trial.name, note(0.5, 0.5)) == ""

    def end(number: int, score: float) -> None:
        board.report(trials[number].name, note(score, 2))
        board.end(trials[number].name)

    begin()
    begin()
    end(0, 0.3)
    end(1, 0.5)
    begin()
    begin()
    end(3, math.nan)
    assert board.next() == WAIT  # trial 2 may yet be a finalist
    end(2, 0.4)
    repeats = [asked(board), asked(board)]
    assert [r.name for r in repeats] == ["0001-seed1", "0002-seed1"]
    assert repeats[0].point == trials[1].point
    judged = (tmp_path / "rungs.jsonl").read_text()
    assert board.report(repeats[0].name, note(-1.0, 0.5)) == ""  # a trial would be stopped here
    board.end(repeats[1].name, "its process died")

    board = open_board(tmp_path, plan)  # killed
    names = []
    while isinstance(trial := board.next(), Asked):
        names.append(trial.name)
        finish(board, trial, 0.1)
    assert names == ["0001-seed1", "0001-seed2", "0002-seed2"]  # a failed one is not tried again
    assert board.done
    assert len(board.study.trials) == 4  # Optuna hears of no repeat
    assert [o["trial"] for o in board.complete] == [1, 2, 0]  # by the search's own scores
    assert (tmp_path / "rungs.jsonl").read_text() == judged
    kept = {o["seed"]: o["state"] for o in load_outcomes(tmp_path) if o["trial"] == 2}
    assert kept == {0: "COMPLETE", 1: "FAILED", 2: "COMPLETE"}


# --- the budget


def test_a_budget_of_hours_stops_new_trials_and_goes_on_when_raised(tmp_path: Path) -> None:
    def started(hours: float) -> tuple[Board, list[Asked]]:
        budget = Budget(gpu_hours=hours)
        board = open_board(tmp_path, sweep(trials=10), budget=budget, trial_seconds=200.0)
        return board, run_out(board)

    each = 200 / 3600
    board, trials = started(2.5 * each)
    assert len(trials) == 2
    assert board.next() is None
    assert not board.done
    assert "GPU-hours leaves no room" in board.stopped_by
    assert board.spent_hours() == pytest.approx(2 * each)
    board, more = started(2.5 * each)
    assert more == []
    assert board.stopped_by
    board, more = started(4.01 * each)
    assert [t.number for t in more] == [2, 3]
    board, more = started(100.0)
    assert [t.number for t in more] == list(range(4, 10))
    assert board.done
    assert board.stopped_by == ""


def test_the_budget_counts_what_runs_and_waits_for_what_it_really_costs(tmp_path: Path) -> None:
    budget = Budget(gpu_hours=3 * 200 / 3600)
    board = open_board(tmp_path, sweep(trials=10), concurrent=8, budget=budget, trial_seconds=200.0)
    running = [asked(board) for _ in range(3)]
    assert board.next() == WAIT  # a fourth might not fit
    assert board.stopped_by == ""
    for trial in running:  # but these cost next to nothing
        board.end(trial.name, "wrong settings")
    assert isinstance(board.next(), Asked)


def test_costs_are_those_of_gpus_and_the_mean_of_trials_once_there_are_enough(
    tmp_path: Path,
) -> None:
    board = open_board(tmp_path, sweep(trials=8), trial_seconds=1e6, gpus_per_worker=0.5)
    for number in range(5):
        assert board.expected_trial_seconds() == 1e6
        finish(board, asked(board), cost_seconds=100.0 * (number + 1))
    assert board.expected_trial_seconds() == 300.0
    assert board.spent_hours() == pytest.approx(1500 * 0.5 / 3600)


def test_nothing_begins_that_would_not_end_before_the_deadline(tmp_path: Path) -> None:
    plan = sweep(workers_per_trial=2)
    now = datetime.now()
    for deadline in (now, now.astimezone()):
        for seconds, begins in ((3600.0, False), (1000.0, True)):
            budget = Budget(deadline=deadline + timedelta(seconds=600))
            out = tmp_path / f"{deadline.tzinfo is None}{begins}"
            board = open_board(out, plan, budget=budget, trial_seconds=seconds)  # of 2 workers
            assert isinstance(board.next(), Asked) == begins
            assert ("no other trial would end before" in board.stopped_by) != begins


def test_a_number_of_trials_stops_there_and_says_so(tmp_path: Path) -> None:
    board = open_board(tmp_path, budget=Budget(trials=2))
    assert [t.number for t in run_out(board)] == [0, 1]
    assert board.done
    assert board.stopped_by == "2 trials were asked for"
    board = open_board(tmp_path, budget=Budget(trials=9))
    assert [t.number for t in run_out(board)] == [2, 3]
    assert board.stopped_by == ""
    check_whole(board)


def test_a_trial_that_was_begun_is_finished_though_the_budget_is_spent(tmp_path: Path) -> None:
    first = asked(open_board(tmp_path))
    board = open_board(tmp_path, budget=Budget(gpu_hours=0.0, trials=1), trial_seconds=100.0)
    assert asked(board) == first


# --- what Optuna and the disk are told


@pytest.mark.usefixtures("on_disk")
def test_optuna_is_told_the_truth(tmp_path: Path) -> None:
    board = open_board(tmp_path, sweep(trials=5, pruning="asha", grace_folds=0.5), concurrent=5)
    whole, poor, blind, broken, mute = (asked(board) for _ in range(5))
    for done in (0.5, 1, 2):
        assert board.report(whole.name, note(0.4, done)) == ""
    board.end(whole.name)
    assert board.report(poor.name, note(0.1, 0.5))
    board.end(poor.name)
    fault = {"reason": "learning rate too high", "folds_done": FOLDS}
    assert board.report(blind.name, note(math.nan, 1, **fault)) == ""
    board.end(blind.name)
    board.report(broken.name, note(math.nan, FOLDS))
    board.end(broken.name)
    board.end(mute.name)  # ended without a word
    trials = board.study.trials
    assert [t.state for t in trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        *[TrialState.FAIL] * 3,
    ]
    assert trials[0].value == 0.4
    assert trials[0].intermediate_values == {500: 0.4, 1000: 0.4, 2000: 0.4}
    assert trials[1].intermediate_values == {500: 0.1}
    assert [t.user_attrs["cost_seconds"] for t in trials] == [200.0, 50.0, 100.0, 200.0, 0.0]
    outcomes = load_outcomes(tmp_path)
    assert "0.100" in outcomes[1]["reason"]
    assert outcomes[2]["reason"] == "learning rate too high"
    assert [o["score"] for o in outcomes] == [0.4, 0.1, None, None, None]
    assert board.complete == [board.outcomes["0000"]]


def test_two_objectives_are_told_and_the_searches_go_on(tmp_path: Path) -> None:
    plan = sweep(objective="score_and_cost", trials=8, pruning="asha", grace_folds=0.5)
    board = open_board(tmp_path, plan)
    while isinstance(trial := board.next(), Asked):
        score = 0.1 if trial.number == 3 else 0.5 + 0.01 * trial.number
        for done in (0.5, 1, 2):
            cost = {"cost_seconds": 10.0 * trial.number}
            if board.report(trial.name, note(score, done, **cost)):
                break
        board.end(trial.name)
    told = board.study.trials
    assert told[3].state == TrialState.PRUNED
    assert told[4].values == [pytest.approx(0.54), 40.0]
    assert {t.number for t in board.study.best_trials} == {0, 1, 2, 4, 5, 6, 7}
    check_states = open_board(tmp_path, plan)
    assert check_states.done


def refuse(token: str) -> float:
    raise ValueError(token)


@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_outcomes_are_strict_json_and_read_back_as_they_were(tmp_path: Path, score: float) -> None:
    board = open_board(tmp_path, sweep(protocol=Protocol(folds=3)))
    trial = asked(board)
    last = note(score, 2, scores=[0.25, score], sections={"A": 0.25, "B": math.nan})
    board.report(trial.name, last)
    outcome = board.end(trial.name)
    assert outcome["state"] == "PRUNED"
    text = (tmp_path / "trials" / trial.name / "outcome.json").read_text()
    said = json.loads(text, parse_constant=refuse)
    assert said["score"] is None
    assert said["scores"] == [0.25, None]
    assert said["sections"] == {"A": 0.25, "B": None}
    (read,) = load_outcomes(tmp_path)
    assert math.isnan(read["scores"][1])
    assert math.isnan(read["sections"]["B"])
    assert read["config"] == trial.point


def test_a_complete_trial_with_a_blind_section_is_what_others_are_tested_against_after_a_restart(
    tmp_path: Path,
) -> None:
    plan = sweep(pruning="asha", paired_p=0.2, trials=3, protocol=Protocol(folds=2))
    board = open_board(tmp_path, plan)
    sections = {"A": 0.5, "B": math.nan, "C": 0.5, "D": 0.4}
    trial = asked(board)
    for done in (1, 2):
        board.report(trial.name, note(0.5, done, sections=sections))
    board.end(trial.name)
    (tmp_path / "rungs.jsonl").unlink()  # as if killed before it was written
    board = open_board(tmp_path, plan)
    worse = asked(board)
    below = {"A": 0.3, "B": 0.9, "C": 0.2, "D": 0.1}
    assert "below trial 0" in board.report(worse.name, note(0.2, 1, sections=below))


def test_points_added_to_a_sweep_that_has_begun_come_next_and_only_once(tmp_path: Path) -> None:
    run_out(open_board(tmp_path, sweep(trials=3)))
    plan = sweep(trials=6, points=[{"genes": 333}])
    again = open_board(tmp_path, plan)
    assert asked(again).point["genes"] == 333
    trials = run_out(open_board(tmp_path, plan))
    assert [t.number for t in trials] == [3, 4, 5]
    assert [t.point["genes"] for t in trials].count(333) == 1


def test_a_thousand_trials_are_taken_up_in_seconds(tmp_path: Path) -> None:
    plan = sweep(trials=1000, search="random", space={"genes": {"low": 250, "high": 99999}})
    study = open_study(plan, tmp_path)
    distribution = optuna.distributions.IntDistribution(250, 99999)
    frozen = []
    for number in range(1000):
        config = {"genes": 250 + number}
        outcome = {"trial": number, "seed": 0, "state": "COMPLETE", "config": config}
        outcome |= {"score": 0.1, "scores": [0.1] * 2, "sections": {}, "cost_seconds": 1.0}
        boards.write_outcome(tmp_path / "trials" / f"{number:04d}", {**outcome, "reason": ""})
        if number:  # the first is the paper's point, in the study already
            given = {"params": config, "distributions": {"genes": distribution}}
            frozen.append(optuna.create_trial(value=0.1, **given))
    study.add_trials(frozen)
    began = time.monotonic()
    board = open_board(tmp_path, plan)
    assert board.next() is None
    assert time.monotonic() - began < 10


def test_each_trial_has_a_seed_of_its_own() -> None:
    space = {"learning_rate": SPACE["learning_rate"]}
    study = optuna.create_study()
    distribution = optuna.distributions.FloatDistribution(0, 1)

    def draw(*words: Any) -> float:
        sampler = make_sampler(sweep(search="random", space=space, seed=words[0]), *words[1:])
        return sampler.sample_independent(study, study.ask(), "x", distribution)

    drawn = [draw(0, 0), draw(0, 1), draw(1, 0), draw(0, 0, "a"), draw(0, 0, "b")]
    assert len(set(drawn)) == 5
    assert draw(0, 1) == drawn[1]
