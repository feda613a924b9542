"""What a person sees, and what is told of a trial's end, in every state a sweep can be in."""

import dataclasses
import fcntl
import json
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from rich.console import Console

from brstnet.config import Protocol
from sweeps import progress as shown
from sweeps import tracking
from sweeps.board import Board, Budget, open_study
from sweeps.courier import STATUS
from sweeps.events import FILE, Events, read
from sweeps.nodes import FILE as NODES
from sweeps.nodes import Nodes
from sweeps.progress import (
    SweepProgress,
    View,
    close_runs,
    draw,
    drop_if_free,
    headline,
    row,
    tell_ends,
    tracking_line,
)
from sweeps.search import BoardScheduler, BoardSearch, last_error
from sweeps.space import Asked, Sweep
from sweeps.trial import begin_attempt


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces are checked in test_space: a tenth of a second each."""
    monkeypatch.setattr("sweeps.space.check_space", lambda _: None)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    plan = Sweep(
        name="s",
        trials=5,
        protocol=Protocol(folds=2),
        grace_folds=0.5,
        paired_p=None,
        space={
            "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
            "epochs": [10, 200],
            "weights": [None, "timm"],
        },
    )
    return Board(sweep=plan, study=open_study(plan, tmp_path), out=tmp_path, concurrent=3)


def begin(board: Board) -> Asked:
    trial = board.next()
    assert isinstance(trial, Asked)
    (board.out / "trials" / trial.name).mkdir(parents=True, exist_ok=True)
    return trial


def note(score: float, done: float, **more: Any) -> dict[str, Any]:
    standing = {"score": score, "folds_done": int(done), "progress": float(done), "scores": []}
    return {**standing, "cost_seconds": 3600.0, "sections": {}, **more}


def tunes(asked: Asked, status: str = "RUNNING", error: Exception | None = None) -> Trial:
    config = dataclasses.asdict(asked)
    return SimpleNamespace(config=config, status=status, get_error=lambda: error)  # type: ignore[return-value]


def text_of(board: Board, now: float | None = None) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(draw(board, 0.0, now or time.time()))
    return console.export_text()


# --- what a person sees


def test_a_sweep_is_drawn_in_every_state(board: Board) -> None:
    assert "no trial complete; 0 complete, 0 pruned, 0 failed, 0 running, of 5" in text_of(board)
    first, second, third = begin(board), begin(board), begin(board)
    text = text_of(board)
    assert "3 running" in text
    assert "learning_rate=0.001, epochs=200, weights=None" in text
    board.report(first.name, note(math.nan, 0.5))
    events = Events(board.out / "trials" / first.name)
    events.start("0000/trial", "t", "trial", {}, "sweep")
    assert row(board, first.name, board.running[first.name], time.time())[2:5] == ["-", "-", "-"]
    events.log("0000/fold_1", {"score": 0.5}, step=99)
    began = board.running[first.name].began
    cells = row(board, first.name, board.running[first.name], began + 300)
    assert cells[2:] == ["2 of 2", "100 of 200", "-", "0:05:00", "0:01:40"]
    board.report(first.name, note(0.25, 1))
    board.report(first.name, note(0.5, 2))
    board.end(first.name)
    board.report(second.name, note(0.1, 0.5))
    board.end(second.name)
    board.end(third.name, "CUDA\nout of memory [red]")
    text = text_of(board)
    assert "best 0.5000 (trial 0); 1 complete, 1 pruned, 1 failed, 0 running" in text
    assert "2.00 hours spent" in text


def test_the_epochs_of_a_trial_are_its_own(board: Board) -> None:
    trial = begin(board)
    running = board.running[trial.name]
    trial.point["epochs"] = 10
    Events(board.out / "trials" / trial.name).log("0000/fold_0", {"score": 0.5}, step=4)
    cells = row(board, trial.name, running, running.began + 30)
    assert cells[3] == "5 of 10"
    assert cells[6] == "0:01:30"


def test_the_time_that_is_left_counts_trials_slots_and_workers(board: Board) -> None:
    board.trial_seconds, board.concurrent = 7200.0, 2
    assert "about 5:00:00 left" in headline(board, time.time())
    board.budget = Budget(gpu_hours=3.0, trials=1)
    text = headline(board, time.time())
    assert "about 1:00:00 left" in text
    assert "0.00 of 3 hours spent" in text
    board.concurrent = 0
    headline(board, time.time())


def test_whether_mlflow_has_all_is_one_line(tmp_path: Path) -> None:
    def say(**said: Any) -> str:
        tracking.write_json(tmp_path / STATUS, {"pending": 0, "refused": 0, "error": "", **said})
        return tracking_line(tmp_path)

    assert tracking_line(tmp_path) == "MLflow: 0 events on their way"
    assert say(pending=7) == "MLflow: 7 events on their way"
    away = say(pending=7, error="Max retries exceeded\nTraceback ...")
    assert away == "MLflow: away (Max retries exceeded), 7 events wait on disk"
    assert say(refused=2).endswith(", 2 refused: refused.jsonl")
    assert "away" in say(error="\nTraceback")


def test_without_a_terminal_there_is_a_line_an_event(
    board: Board, capsys: pytest.CaptureFixture
) -> None:
    view = View(board)
    view.console = Console(file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    view.refresh()
    view.reported("0000", note(0.25, 0.5))  # within a fold: nothing
    view.reported("0000", note(0.25, 1))
    view.reported("0000", note(math.nan, 2, reason="no"))
    for reason in ("", "Traceback\n  ...\nValueError: no [bold]", " \n"):
        view.ended("0000", {"state": "FAILED", "reason": reason})
    view.close()
    assert capsys.readouterr().err.splitlines() == [
        "trial 0000: 1 of 2 folds, mean score 0.2500",
        "trial 0000: FAILED",
        "trial 0000: FAILED: ValueError: no [bold]",
        "trial 0000: FAILED",
    ]


def test_on_a_terminal_the_table_lives_and_lines_stay(board: Board) -> None:
    begin(board)
    view = View(board)
    view.console = Console(force_terminal=True, width=160, record=True)
    view.refresh()
    view.refresh()
    view.ended("0007", {"state": "PRUNED", "reason": "below the best [third]"})
    view.close()
    view.close()
    text = view.console.export_text()
    assert "trial 0007: PRUNED: below the best [third]" in text
    assert "sweep s: no trial complete" in text


# --- what is told of an end


def told(folder: Path) -> list[tuple[str, str, Any]]:
    events = read(folder / FILE)[0]
    return [(e["do"], e["run"], e.get("status") or e.get("tags") or e.get("step")) for e in events]


def test_the_end_of_a_trial_is_told_with_its_reason_and_ends_its_runs(board: Board) -> None:
    events = Events(board.out)
    progress = SweepProgress(board, events)
    first, second = begin(board), begin(board)
    out = board.out / "trials" / first.name
    for fold in (0, 1):
        (out / f"fold_{fold}").mkdir()
    (out / "fold_0" / "told").touch()
    board.report(first.name, note(0.5, 1, reason="", scores=[0.5]))
    board.report(first.name, note(0.4, 2, scores=[0.5, 0.3]))
    progress.on_trial_complete(1, [], tunes(first))
    lines = told(board.out)
    assert [line[:2] for line in lines] == [
        ("start", "0000/trial"),
        ("log", "0000/trial"),
        ("status", "0000/fold_1"),
        ("status", "0000/trial"),
        ("log", "sweep"),
    ]
    assert lines[1][2] == {"brstnet.state": "COMPLETE"}
    assert lines[3][2] == "FINISHED"
    metrics = read(board.out / FILE)[0][-1]["metrics"]
    assert metrics == {
        "trials_complete": 1,
        "trials_pruned": 0,
        "trials_failed": 0,
        "cost_hours": 1.0,
        "best_score": 0.4,
        "best_trial": 0,
    }
    progress.on_trial_error(1, [], tunes(second, "PENDING"))  # it is tried again
    assert second.name in board.running
    progress.on_trial_error(1, [], tunes(second, "ERROR", RuntimeError("x" * 9000 + "the end")))
    ended = read(board.out / FILE)[0][-3:]
    assert ended[0]["tags"]["brstnet.state"] == "FAILED"
    assert ended[0]["tags"]["brstnet.reason"].endswith("the end")
    assert len(ended[0]["tags"]["brstnet.reason"]) == 2000
    assert ended[1]["status"] == "FAILED"


def test_ends_that_a_killed_driver_did_not_tell_are_told_once(board: Board) -> None:
    for score in (0.5, 0.1):
        trial = begin(board)
        board.report(trial.name, note(score, 0.5))
        board.end(trial.name)  # killed here
    events = Events(board.out)
    tell_ends(events, board)
    lines = told(board.out)
    assert ("status", "0001/trial", "FINISHED") in lines
    states = [line[2]["brstnet.state"] for line in lines if line[0] == "log" and line[1] != "sweep"]
    assert states == ["PRUNED", "PRUNED"]
    tell_ends(Events(board.out), board)
    assert told(board.out) == lines


def test_a_stopped_sweep_marks_its_running_trials_each_time(board: Board) -> None:
    begin(board)
    for _ in range(2):
        close_runs(Events(board.out), board.out / "trials" / "0000", "KILLED")
    assert told(board.out) == [("status", "0000/trial", "KILLED")] * 2


def test_weights_of_stopped_trials_go_when_their_process_has_left(board: Board) -> None:
    first, second = begin(board), begin(board)
    for trial, score in ((first, 0.5), (second, 0.1)):
        best = board.out / "trials" / trial.name / "fold_0" / "best"
        best.mkdir(parents=True)
        (best / "model.safetensors").touch()
        (best / "checkpoint.json").touch()
        board.report(trial.name, note(score, 0.5))
    folder = board.out / "trials" / second.name
    progress = SweepProgress(board, Events(board.out))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        progress.on_trial_complete(1, [], tunes(second))
        progress.on_step_end(1, [])
        assert list(folder.rglob("*.safetensors"))
        assert not drop_if_free(folder)
    # The driver is killed meanwhile; the next one knows.
    again = Board(sweep=board.sweep, study=board.study, out=board.out)
    SweepProgress(again, Events(board.out)).on_step_end(1, [])
    assert not list(folder.rglob("*.safetensors"))
    assert list(folder.rglob("checkpoint.json"))
    assert list((board.out / "trials" / first.name).rglob("*.safetensors"))


# --- how Tune is led


def test_the_searcher_hands_out_waits_and_ends(board: Board) -> None:
    search, scheduler = BoardSearch(board), BoardScheduler(board)
    board.concurrent = 1
    for number in range(5):
        config = search.suggest(f"t{number}")
        asked = Asked(**config)
        assert asked.number == number
        assert search.suggest("later") is None
        (board.out / "trials" / asked.name).mkdir(parents=True)
        flat = {**note(0.5 - number / 10, 0.5), "sections/A": 0.25, "config/number": number}
        del flat["sections"]
        decision = scheduler.on_trial_result(None, tunes(asked), flat)
        assert board.running[asked.name].note["sections"] == {"A": 0.25}
        assert decision == ("CONTINUE" if number == 0 else "STOP")
        board.end(asked.name)
    assert search.suggest("last") == "FINISHED"
    assert json.loads((board.out / "trials/0004/outcome.json").read_text())["state"] == "PRUNED"


# --- machines and storage that fail


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that the driver sends itself."""
    sent: list[int] = []
    monkeypatch.setattr(shown.os, "kill", lambda _, number: sent.append(number))
    return sent


def nodes_of_ray(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    there = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in names]
    monkeypatch.setattr("sweeps.nodes.ray.nodes", lambda: there)


def tunes_own(asked: Asked, said: Path, status: str = "PENDING") -> Any:
    """A trial of Tune's that keeps the resources it is given; and the file of its failures."""
    trial = tunes(asked, status)
    trial.error_file, trial.resources = str(said), []
    trial.update_resources = trial.resources.append
    return trial


def test_storage_that_is_full_stops_the_sweep_the_way_a_person_does(
    board: Board, signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = SweepProgress(board, Events(board.out))
    monkeypatch.setattr(shown, "LOOK_SECONDS", 0.0)
    progress.on_step_end(1, [])
    assert (board.halted, signals) == ("", [])
    monkeypatch.setattr(shown, "storage_full", lambda _: "no room is left")
    progress.on_step_end(2, [])
    assert (board.halted, signals) == ("no room is left", [signal.SIGINT])
    progress.close()  # Tune has ended: nobody would catch another
    assert signals == [signal.SIGINT]


def test_a_machine_to_avoid_is_named_once(
    board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shown, "LOOK_SECONDS", 0.0)
    progress = SweepProgress(board, Events(board.out))
    progress.view.console = Console(file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    place = {"node": "a", "host": "gpu-7"}
    Nodes(board.out).failed("0000", place, "no GPU", broken=True)
    for step in (1, 2):
        progress.on_step_end(step, [])
    said = capsys.readouterr().err
    assert said.count("gpu-7: avoided from now on") == 1
    tags = [e["tags"] for e in read(board.out / FILE)[0]]
    assert tags == [{"brstnet.avoided": "gpu-7"}]
    again = SweepProgress(board, Events(board.out))
    again.on_step_end(3, [])
    assert "avoided" not in capsys.readouterr().err


def test_a_report_of_what_was_finished_before_blames_no_machine(board: Board) -> None:
    progress, trial = SweepProgress(board, Events(board.out)), begin(board)
    folder = board.out / "trials" / trial.name
    Nodes(board.out).failed(trial.name, {"node": "a", "host": "a"}, "died", broken=False)
    last = folder / "fold_0" / "last"
    last.mkdir(parents=True)
    (last / "progress.json").write_text(json.dumps({"epoch": 9, "step": 0}))
    begin_attempt(folder, "1")
    progress.on_trial_result(1, [], tunes(trial), note(0.5, 1))  # the fold of the last try
    assert "went_on" not in (board.out / NODES).read_text()
    (last / "progress.json").write_text(json.dumps({"epoch": 10, "step": 0}))
    progress.on_trial_result(2, [], tunes(trial), note(0.5, 1.5))
    assert "went_on" in (board.out / NODES).read_text()


def test_the_last_of_a_trial_s_failures_is_what_counts(board: Board, tmp_path: Path) -> None:
    said = tmp_path / "error.txt"
    trial = tunes_own(begin(board), said)
    assert last_error(trial) == ""
    said.write_text("Failure # 1 (occurred at x)\nBrokenNodeError: a\n")
    assert "BrokenNodeError" in last_error(trial)
    with said.open("a") as file:
        file.write("Failure # 2 (occurred at y)\nRuntimeError: b\n")
    assert "BrokenNodeError" not in last_error(trial)


def test_a_trial_that_failed_at_once_is_sent_elsewhere_and_waits_in_one_queue(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_of_ray(monkeypatch, "a", "b")
    scheduler, asked = BoardScheduler(board, {"CPU": 1.0}), begin(board)
    folder, said = board.out / "trials" / asked.name, tmp_path / "error.txt"
    (folder / "node_0.json").write_text(json.dumps({"node": "z", "host": "of an earlier start"}))
    trial = tunes_own(asked, said)
    scheduler.on_trial_add(None, trial)
    assert not (folder / "node_0.json").exists()
    (folder / "node_0.json").write_text(json.dumps({"node": "a", "host": "a"}))
    said.write_text("Failure # 1 (occurred at x)\nRuntimeError: no\n")
    scheduler.on_trial_error(None, trial)
    elsewhere = PlacementGroupFactory(
        [{"CPU": 1.0}], bundle_label_selector=[{"ray.io/node-id": "!in(a)"}]
    )
    assert trial.resources == [PlacementGroupFactory([{"CPU": 1.0}]), elsewhere]
    Nodes(board.out).failed("9", {"node": "b", "host": "b"}, "no GPU", broken=True)
    scheduler.on_trial_add(None, trial)  # by Tune, which has queued it by what it was given
    assert len(trial.resources) == 2
    assert board.halted == ""


def test_a_broken_machine_that_is_the_only_one_ends_the_sweep(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_of_ray(monkeypatch, "a")
    scheduler, asked = BoardScheduler(board, {"CPU": 1.0}), begin(board)
    trial = tunes_own(asked, tmp_path / "error.txt")
    scheduler.on_trial_add(None, trial)
    place = board.out / "trials" / asked.name / "node_0.json"
    place.write_text(json.dumps({"node": "a", "host": "a"}))
    (tmp_path / "error.txt").write_text("Failure # 1 (x)\nBrokenNodeError: a: the GPU\n")
    scheduler.on_trial_error(None, trial)
    assert "no other machine is left for trial 0000: BrokenNodeError: a: the GPU" in board.halted


def test_a_trial_whose_other_machines_have_gone_does_not_wait_for_ever(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_of_ray(monkeypatch, "a", "b")
    monkeypatch.setattr("sweeps.search.LOOK_SECONDS", -1.0)
    monkeypatch.setattr("sweeps.search.STRANDED_SECONDS", 0.1)
    scheduler, asked = BoardScheduler(board, {"CPU": 1.0}), begin(board)
    Nodes(board.out).failed(asked.name, {"node": "a", "host": "a"}, "died", broken=False)
    trial = tunes_own(asked, tmp_path / "error.txt")
    scheduler.on_trial_add(None, trial)
    controller = SimpleNamespace(get_trials=lambda: [trial])
    assert scheduler.choose_trial_to_run(controller) is trial
    nodes_of_ray(monkeypatch, "a")
    scheduler.choose_trial_to_run(controller)
    assert board.halted == ""  # an autoscaler may bring another
    time.sleep(0.15)
    scheduler.choose_trial_to_run(controller)
    assert "trial 0000: no machine has been left" in board.halted
