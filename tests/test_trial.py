"""One trial, run without Ray: what it reports and leaves, and how it goes on after any death."""

import contextlib
import dataclasses
import fcntl
import json
import math
import multiprocessing
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from trainings import with_training

from brstnet.config import Settings, build, read_yaml
from brstnet.data.store import Store
from brstnet.metrics import nanmedian
from brstnet.training import train
from brstnet.training.keep import finished, read_progress
from sweeps import trial as trials
from sweeps.events import FILE, read
from sweeps.nodes import BrokenNodeError
from sweeps.space import Asked, Sweep
from sweeps.trial import (
    ATTEMPTS,
    Job,
    Standing,
    begin_attempt,
    claimed,
    drop_models,
    got_nowhere,
    note_error,
    train_folds,
)

CLOCK = ("cost_seconds",)


def job_of(store: Store, settings: Settings, out: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {"grace_folds": 0.5, "paired_p": None, "space": {"genes": [60, 70]}}
    plan = Sweep(
        name="s",
        trials=3,
        protocol=settings.protocol,
        training=settings.training,
        **{**values, **changes},
    )
    stores = {"": store.path, "other": store.path}
    return Job(sweep=plan, stores=stores, out=out, gpus_per_worker=0.0, session="1")


def run(job: Job, asked: Asked, stop_at: int | None = None) -> list[dict[str, Any]]:
    """All reports; where told to, the trial is stopped at one, as Tune does it."""
    reports: list[dict[str, Any]] = []

    def report(note: dict[str, Any]) -> None:
        reports.append(json.loads(json.dumps(note)))  # as it is: nothing changes it later
        if len(reports) == stop_at:
            raise SystemExit

    with contextlib.suppress(SystemExit):
        train_folds(asked, job, report)
    return reports


def without_clock(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in note.items() if k not in CLOCK} for note in reports]


def events_of(job: Job, asked: Asked) -> list[dict[str, Any]]:
    return read(job.folder(asked) / FILE)[0]


def logs(events: list[dict[str, Any]]) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(e["run"], e["step"], tuple(sorted(e["metrics"]))) for e in events if e["do"] == "log"]


FIRST = Asked(number=0, point={"genes": 60})


@pytest.fixture(scope="module")
def whole(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, list[dict[str, Any]]]:
    """A trial of two folds that nothing disturbed."""
    job = job_of(demo_store, settings, tmp_path_factory.mktemp("whole"))
    return job, run(job, FIRST)


def test_reports_at_rungs_within_folds_and_at_their_ends(
    whole: tuple[Job, list[dict[str, Any]]],
) -> None:
    job, reports = whole
    assert [note["progress"] for note in reports] == [0.5, 1.0, 1.5, 2.0]  # rungs 0.5 and 1.5
    assert [note["folds_done"] for note in reports] == [0, 1, 1, 2]
    results = [finished(job.folder(FIRST) / f"fold_{n}") for n in range(2)]
    assert all(result is not None for result in results)
    first, second = (result.score for result in results if result is not None)
    histories = [
        [epoch["score"] for epoch in read_progress(job.folder(FIRST) / f"fold_{n}/last").history]
        for n in range(2)
    ]
    expected = [
        histories[0][0],
        first,
        (first + histories[1][0]) / 2,
        (first + second) / 2,
    ]
    assert [note["score"] for note in reports] == pytest.approx(expected, abs=1e-12)
    assert [note["scores"] for note in reports] == [[], [first], [first], [first, second]]
    costs = [note["cost_seconds"] for note in reports]
    assert costs == sorted(costs)
    assert costs[0] > 0
    tables = [pd.read_parquet(r.folder / "validation.parquet") for r in results if r]
    sections = {name: nanmedian(part["pcc"]) for t in tables for name, part in t.groupby("section")}
    assert reports[-1]["sections"] == pytest.approx(sections)
    assert set(reports[1]["sections"]) == set(tables[0]["section"])
    assert "reason" not in reports[-1]


def test_what_is_told_and_left(whole: tuple[Job, list[dict[str, Any]]], demo_store: Store) -> None:
    job, reports = whole
    folder, events = job.folder(FIRST), events_of(job, FIRST)
    assert [(e["do"], e["run"]) for e in events[:4]] == [
        ("start", "0000/trial"),
        ("log", "0000/trial"),
        ("input", "0000/trial"),
        ("status", "0000/trial"),
    ]
    assert events[1]["params"]["genes"] == "60"
    assert events[2]["digest"] == demo_store.digest
    for fold in range(2):
        mine = [e for e in events if e["run"] == f"0000/fold_{fold}"]
        assert [e["do"] for e in mine] == ["start", "status", *["log"] * 3, "files", "status"]
        assert [e["step"] for e in mine[2:4]] == [0, 1]
        assert {"train_loss", "score", "learning_rate"} <= set(mine[2]["metrics"])
        assert mine[4]["metrics"] == {"fold_score": reports[-1]["scores"][fold]}
        assert mine[6]["status"] == "FINISHED"
        files = folder / mine[5]["path"]
        assert {f.name for f in files.iterdir()} == {"genes.csv", "leak_report.json"}
        assert (folder / f"fold_{fold}" / "told").exists()
        assert not (folder / f"fold_{fold}" / "last" / "optimizer.safetensors").exists()
        assert (folder / f"fold_{fold}" / "last" / "model.safetensors").exists()
    standing = [e for e in events if e["run"] == "0000/trial" and e["do"] == "log"][1:]
    assert [e["step"] for e in standing] == [1, 2]
    last = standing[-1]["metrics"]
    assert last["worst_fold_score"] <= last["score"] <= last["best_fold_score"]
    assert [last[f"score_fold_{n}"] for n in range(2)] == reports[-1]["scores"]
    made = build(Settings, read_yaml(folder / "settings.yaml"), "")
    assert made == job.sweep.settings({"genes": 60})


def test_run_again_it_repeats_nothing_and_reports_the_same(
    whole: tuple[Job, list[dict[str, Any]]],
) -> None:
    job, reports = whole
    folder = job.folder(FIRST)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("fold_*/**/*") if p.is_file()}
    told = events_of(job, FIRST)
    cost = json.loads((folder / "cost.json").read_text())
    again = run(job, FIRST)
    assert without_clock(again) == without_clock(reports)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    new = events_of(job, FIRST)[len(told) :]
    assert logs(new) == []
    assert {e["do"] for e in new} <= {"status"}  # it is running again
    assert cost < json.loads((folder / "cost.json").read_text()) < cost + 60
    assert again[0]["cost_seconds"] >= cost


@pytest.mark.parametrize("stops", [(1,), (2,), (1, 2, 3)])
def test_stopped_and_gone_on_it_comes_to_the_same_bits(
    whole: tuple[Job, list[dict[str, Any]]],
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    stops: tuple[int, ...],
) -> None:
    """Stopped at a report within a fold, at a fold's end, and at each one after the other."""
    _, reports = whole
    job = job_of(demo_store, settings, tmp_path)
    costs = []
    for stop in stops:
        part = run(job, FIRST, stop_at=stop)
        assert without_clock(part) == without_clock(reports[:stop])
        costs.append(json.loads((job.folder(FIRST) / "cost.json").read_text()))
    rest = run(job, FIRST)
    assert without_clock(rest) == without_clock(reports)  # bit for bit
    assert rest[-1]["cost_seconds"] > costs[-1]
    assert costs == sorted(costs)
    assert logs(events_of(job, FIRST)) == logs(events_of(whole[0], FIRST))
    ends = [e for e in events_of(job, FIRST) if e.get("status") == "FINISHED"]
    assert [e["run"] for e in ends] == ["0000/fold_0", "0000/fold_1"]


@pytest.mark.parametrize("step", ["describe_fold", "record", "told"])
def test_killed_when_a_fold_has_ended_but_is_not_told(
    whole: tuple[Job, list[dict[str, Any]]],
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    job = job_of(demo_store, settings, tmp_path)

    def die(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        if step == "describe_fold":
            patch.setattr(trials, "describe_fold", die)
        elif step == "record":
            patch.setattr(trials.TrialRecord, "end_fold", die)
        else:
            patch.setattr(Path, "touch", die)
        run(job, FIRST)
    assert not (job.folder(FIRST) / "fold_0" / "told").exists()
    assert finished(job.folder(FIRST) / "fold_0") is not None
    assert without_clock(run(job, FIRST)) == without_clock(whole[1])
    assert logs(events_of(job, FIRST)) == logs(events_of(whole[0], FIRST))
    statuses = [e["status"] for e in events_of(job, FIRST) if e["run"].endswith("fold_0")
                and e["do"] == "status"]  # fmt: skip
    assert statuses[-1] == "FINISHED"


def test_early_stopping_reports_the_best_epoch_so_far_also_after_a_restart(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = with_training(settings, stopping="early", epochs=4, patience=4)
    scores = iter([0.5, 0.1, math.nan, 0.3] * 4)
    monkeypatch.setattr(train.metrics, "fold_score", lambda *_: next(scores))
    job = job_of(demo_store, early, tmp_path, grace_folds=0.25, reduction_factor=2)
    undisturbed = run(job, FIRST)
    within = [n["score"] for n in undisturbed if n["progress"] < 1]
    assert within == [0.5, 0.5]  # at 1/4 and 2/4 of the first fold
    scores = iter([0.5, 0.1, math.nan, 0.3] * 4)
    job = job_of(demo_store, early, tmp_path / "b", grace_folds=0.25, reduction_factor=2)
    run(job, FIRST, stop_at=1)
    rest = run(job, FIRST)
    assert [n["score"] for n in rest if n["progress"] < 1] == [0.5, 0.5]


def test_a_score_that_is_no_number_stays_one_at_a_rung(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.metrics, "fold_score", lambda *_: math.nan)
    early = with_training(settings, stopping="early")
    (first, *_) = run(job_of(demo_store, early, tmp_path), FIRST, stop_at=1)
    assert math.isnan(first["score"])  # not minus infinity, which JSON cannot say


def test_a_repeat_has_another_seed_and_is_never_at_a_rung(
    whole: tuple[Job, list[dict[str, Any]]], demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    job = job_of(demo_store, settings, tmp_path)
    repeat = dataclasses.replace(FIRST, seed=2)
    reports = run(job, repeat)
    assert [note["progress"] for note in reports] == [1.0, 2.0]
    assert reports[-1]["scores"] != whole[1][-1]["scores"]
    made = build(Settings, read_yaml(job.folder(repeat) / "settings.yaml"), "")
    assert made.training.seed == settings.training.seed + 2
    start = events_of(job, repeat)[0]
    assert (start["run"], start["tags"]["brstnet.seed"]) == ("0000-seed2/trial", "2")
    unpruned = job_of(demo_store, settings, tmp_path / "b", pruning="none")
    assert [note["progress"] for note in run(unpruned, FIRST, stop_at=1)] == [1.0]


# --- trials that cannot be trained


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"genes": 99999}, "99999"),
        ({"learning_rate": 1e30}, "loss"),
        ({"frozen": True, "augmentation": "colour"}, "augmentation"),
    ],
)
def test_settings_at_fault_end_the_trial_with_the_reason(
    demo_store: Store, settings: Settings, tmp_path: Path, point: dict[str, Any], message: str
) -> None:
    asked = Asked(number=0, point=point)
    reports = run(job_of(demo_store, settings, tmp_path), asked)
    last = reports[-1]
    assert message in last["reason"]
    assert math.isnan(last["score"])
    assert last["folds_done"] == 2  # so that nothing takes it for stopped
    assert last["cost_seconds"] > 0


def test_a_fault_without_words_is_still_a_reason(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, reason in (
        (ValueError(), "ValueError"),
        (torch.OutOfMemoryError("CUDA"), "CUDA"),
        (FloatingPointError("nan"), "nan"),
    ):
        monkeypatch.setattr(trials, "_train_folds", raiser(error))
        (only,) = run(job_of(demo_store, settings, tmp_path), FIRST)
        assert only["reason"] == reason


def raiser(error: BaseException) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def test_what_kills_a_process_each_time_is_given_up_with_what_it_said(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(demo_store, settings, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "_train_folds", raiser(RuntimeError("the disk is full")))
        for _ in range(ATTEMPTS):
            with pytest.raises(RuntimeError, match="the disk is full"):
                run(job, FIRST)
        (only,) = run(job, FIRST)
    expected = "tried 3 times at the same place without getting on: RuntimeError: the disk is full"
    assert only["reason"] == expected
    other = dataclasses.replace(job, session="2")  # somebody has cleared the disk and starts anew
    assert run(other, FIRST, stop_at=1)[0]["progress"] == 0.5


def test_attempts_are_counted_at_a_place(tmp_path: Path) -> None:
    def place(epoch: int, step: int = 0, name: str = "last") -> None:
        out = tmp_path / "fold_0" / name
        out.mkdir(parents=True, exist_ok=True)
        progress = {"epoch": epoch, "step": step}
        (out / "progress.json").write_text(json.dumps(progress))

    for epoch in range(6):  # it gets on each time
        place(epoch)
        assert begin_attempt(tmp_path, "1") == ""
    place(5, 7, "position")
    assert begin_attempt(tmp_path, "1") == ""
    note_error(tmp_path, RuntimeError("by chance"))
    place(5, 9, "position")  # it has got on by two steps: that error is not this place's
    assert [begin_attempt(tmp_path, "1") for _ in range(ATTEMPTS)] == [""] * ATTEMPTS
    reason = begin_attempt(tmp_path, "1")
    assert "its process was killed, as happens when memory runs out" in reason
    assert "by chance" not in reason
    assert begin_attempt(tmp_path, "1") != ""
    assert begin_attempt(tmp_path, "2") == ""


def test_a_machine_that_cannot_train_costs_a_trial_no_try(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(demo_store, settings, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "check_gpu", raiser(BrokenNodeError("vm: the GPU does not work")))
        for _ in range(ATTEMPTS + 2):
            with pytest.raises(BrokenNodeError, match="the GPU does not work"):
                run(job, FIRST)
    assert run(job, FIRST, stop_at=1)[0]["progress"] == 0.5


def test_a_try_that_saved_nothing_got_nowhere(tmp_path: Path) -> None:
    assert got_nowhere(tmp_path)  # it died before its first line
    begin_attempt(tmp_path, "1")
    assert got_nowhere(tmp_path)
    out = tmp_path / "fold_0"
    out.mkdir()  # for a frozen backbone's file, or a notice that the machine goes
    assert got_nowhere(tmp_path)
    (out / "last").mkdir()
    (out / "last" / "progress.json").write_text(json.dumps({"epoch": 0, "step": 0}))
    assert not got_nowhere(tmp_path)
    begin_attempt(tmp_path, "1")
    assert got_nowhere(tmp_path)


# --- two processes and one folder


def hold(folder: Path, seconds: float, ready: Any) -> None:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready.set()
        time.sleep(seconds)


@contextlib.contextmanager
def held(folder: Path, seconds: float) -> Iterator[None]:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder, seconds, ready))
    process.start()
    assert ready.wait(60)
    yield
    process.kill()
    process.join()


def test_a_folder_that_another_process_trains_in_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path, 1.0):
        began = time.monotonic()
        with claimed(tmp_path):
            assert time.monotonic() - began > 0.7
    with claimed(tmp_path):  # left again
        pass


def test_a_folder_that_is_never_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "LOCK_SECONDS", 0.3)
    with (
        held(tmp_path, 60.0),
        pytest.raises(TimeoutError, match="another process still trains here"),
        claimed(tmp_path),
    ):
        pass
    with claimed(tmp_path):  # the kernel takes a killed process's lock away
        pass


# --- what is kept


def test_costs_add_up_over_starts_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(trials.time, "monotonic", lambda: now)
    first = Standing(tmp_path, workers=1)
    now = 10.0
    assert first.spend() == 10.0
    second = Standing(tmp_path, workers=4)
    now = 15.0
    assert second.spend() == 60.0
    assert json.loads((tmp_path / "cost.json").read_text()) == 15.0
    note = second.note()
    assert math.isnan(note["score"])
    assert note["progress"] == note["folds_done"] == 0


def test_of_a_stopped_trial_the_weights_go_and_the_numbers_stay(
    whole: tuple[Job, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = tmp_path / "0000"
    shutil.copytree(whole[0].folder(FIRST), folder)
    position = folder / "fold_1" / "position"
    shutil.copytree(folder / "fold_1" / "last", position)
    (folder / "fold_1" / "backbone.safetensors").touch()  # of a frozen one
    before = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    drop_models(folder)
    after = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert not list(folder.rglob("*.safetensors"))
    assert not position.exists()
    gone = {p for p in before - after if "position" not in p.parts}
    assert {p.suffix for p in gone} == {".safetensors"}
    assert {"events.jsonl", "cost.json", "settings.yaml"} <= {p.name for p in after}
    drop_models(folder)


def test_the_store_of_a_point(whole: tuple[Job, list[dict[str, Any]]]) -> None:
    job = dataclasses.replace(whole[0], stores={"": Path("own"), "wide": Path("w")})
    assert job.store({"genes": 60}) == Path("own")
    assert job.store({"store": "wide"}) == Path("w")


# --- several workers


def give_up(rank: int, port: int, folder: Path, job: Job) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    reports: list[dict[str, Any]] = []
    train_folds(FIRST, job, reports.append)
    (folder / f"reports_{rank}.json").write_text(json.dumps(reports))


@pytest.mark.slow
def test_workers_give_a_trial_up_together(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """The leading one counts the attempts; another that trained on alone would wait for ever."""
    job = job_of(demo_store, settings, tmp_path, workers_per_trial=2)
    job.folder(FIRST).mkdir(parents=True)
    for _ in range(ATTEMPTS):
        begin_attempt(job.folder(FIRST), job.session)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=give_up, args=(rank, port, tmp_path, job)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        if worker.is_alive():
            worker.kill()
        assert worker.exitcode == 0
    for rank in range(2):
        (only,) = json.loads((tmp_path / f"reports_{rank}.json").read_text())
        assert "tried 3 times" in only["reason"]
