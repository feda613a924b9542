"""Fit: against planted histories and truths, and against itself, however often it is stopped."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from scipy import sparse
from torch import Tensor
from trainings import (
    CPU,
    Stop,
    history,
    quiet,
    same_bits,
    stop_after,
    stop_at,
    train,
    weights,
    with_training,
)

from brstnet import metrics
from brstnet.config import Protocol, Settings, Training
from brstnet.data.store import Store
from brstnet.launch import ALLOCATOR
from brstnet.training import checkpoint
from brstnet.training import train as training
from brstnet.training.epoch import validate
from brstnet.training.folds import ALL
from brstnet.training.keep import FitResult, finished, read_progress
from brstnet.training.leaks import LeakError
from brstnet.training.model import build_model
from brstnet.training.optim import Rate
from brstnet.training.step import train_step
from brstnet.training.task import Progress, prepare_task
from brstnet.training.train import ended, fit, note_epoch

HELD_OUT = "BC90006"

# Stopping ----------------------------------------------------------------------------------------


def planted(losses: list[float], scores: list[float], training: Training) -> tuple[Progress, int]:
    """The progress of a run with these outcomes, and how many epochs the rule let it have."""
    progress = Progress()
    for epoch, (loss, score) in enumerate(zip(losses, scores, strict=True)):
        if ended(progress, training):
            break
        note_epoch(
            progress,
            {"epoch": epoch, "validation_loss": loss, "score": score},
            2.0,
            Rate(training, 1),
        )
    return progress, len(progress.history)


def test_early_stopping_ends_after_patience_epochs_without_a_lower_loss() -> None:
    training = Training(stopping="early", patience=3, epochs=100)
    losses = [5, 4, 4.5, 4, 3.9, 4, 4, 3.9, 1, 0]
    progress, epochs = planted(losses, [0.1] * 10, training)
    assert epochs == 8  # epoch 4 is the best; 5, 6, 7 are no lower (equal is not lower)
    assert progress.best_loss == 3.9
    assert progress.seconds == 16


def test_early_stopping_takes_no_more_than_the_epochs_allowed() -> None:
    losses = [float(10 - i) for i in range(10)]
    assert planted(losses, [0.0] * 10, Training(stopping="early", epochs=4))[1] == 4


def test_a_fixed_number_of_epochs_is_run_whatever_the_loss() -> None:
    training = Training(stopping="fixed", patience=1, epochs=6)
    assert planted([1.0 + i for i in range(9)], [0.0] * 9, training)[1] == 6


def test_the_best_epoch_is_the_first_with_the_highest_score_that_is_a_number() -> None:
    nan, training = float("nan"), Training(stopping="fixed", epochs=9)
    progress, _ = planted([1.0] * 6, [nan, 0.1, nan, 0.3, 0.3, 0.2], training)
    assert (progress.best_epoch, progress.best_score) == (3, 0.3)
    progress, _ = planted([1.0] * 3, [nan] * 3, training)
    assert progress.best_epoch == 0


def test_progress_comes_back_from_json() -> None:
    fresh = Progress()
    again = Progress(**json.loads(json.dumps(dataclasses.asdict(fresh))))
    assert again == fresh
    assert again.best_loss == math.inf


# A fit -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> FitResult:
    """The usual settings trained to the end; not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    return train(demo_store, settings, out)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    demo_store: Store, settings: Settings, whole: FitResult, tmp_path: Path
) -> None:
    notes: list[dict[str, float]] = []
    torch.manual_seed(12345)
    np.random.default_rng().random()
    again = train(demo_store, settings, tmp_path / "again", on_epoch=notes.append)
    other = with_training(settings, seed=1)
    third = train(demo_store, other, tmp_path / "other")
    assert same_bits(again.folder, whole.folder)
    assert not same_bits(third.folder, whole.folder)
    assert again.score == whole.score
    assert [note["epoch"] for note in notes] == [0, 1]
    assert notes[0]["seconds_left"] > notes[1]["seconds_left"] == 0
    assert all(0 < note["step_share"] <= 1 for note in notes)
    assert set(notes[0]) == {
        "epoch",
        "train_loss",
        "validation_loss",
        "score",
        "learning_rate",
        "patches_per_second",
        "step_share",
        "memory_gb",
        "micro_batch",
        "seconds",
        "seconds_left",
    }


def test_a_loss_that_is_not_finite_is_told_with_what_to_lower(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    wild = with_training(settings, learning_rate=1e30)
    with pytest.raises(
        FloatingPointError, match=r"fold 0 is (nan|inf) in epoch \d: lower training"
    ):
        train(demo_store, wild, tmp_path)
    assert not (tmp_path / "last").exists()


def test_a_leak_ends_it_before_the_first_step(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    patient = demo_store.index["stain_target"]["patient"]
    leaky = dataclasses.replace(
        settings, protocol=dataclasses.replace(settings.protocol, held_out=(patient,))
    )
    with pytest.raises(LeakError, match="the stain target is"):
        train(demo_store, leaky, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stopping", ["early", "fixed"])
def test_early_stopping_stands_for_the_best_epoch_and_fixed_for_the_last(
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    stopping: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted scores: the best is epoch 1; planted losses: nothing is gained after epoch 2."""
    scores = iter([0.1, 0.5, 0.2, 0.3, 0.4, 0.1])
    losses = iter([3.0, 2.0, 1.0, 1.0, 1.5, 1.2])
    monkeypatch.setattr(metrics, "fold_score", lambda *_: next(scores))
    true_validate = validate
    monkeypatch.setattr(
        "brstnet.training.train.validate", lambda *a: (next(losses), true_validate(*a)[1])
    )
    settings = with_training(settings, stopping=stopping, patience=2, epochs=6)
    result = train(demo_store, settings, tmp_path)
    if stopping == "early":
        assert (result.folder.name, result.epoch, result.epochs, result.score) == (
            "best",
            1,
            5,
            0.5,
        )
    else:
        assert (result.folder.name, result.epoch, result.epochs, result.score) == (
            "last",
            5,
            6,
            0.1,
        )
    assert checkpoint.read_facts(result.folder)["scores"]["epoch"] == result.epoch
    assert checkpoint.read_facts(result.folder)["scores"]["score"] == result.score


def test_planted_genes_are_learned_and_null_genes_are_not(
    demo_raw: Path, demo_store: Store, tmp_path: Path
) -> None:
    """Seen with this and two other folds: planted 0.64 to 0.69, null -0.04 to 0.02."""
    settings = Settings(
        protocol=Protocol(held_out=(HELD_OUT,), panel_size=100, max_white_fraction=1.0),
        training=Training(
            backbone="test_resnet",
            genes=100,
            epochs=8,
            batch_size=8,
            learning_rate=0.05,
            aux_weight=1.0,
            schedule="cosine",
            stopping="fixed",
        ),
    )
    result = train(demo_store, settings, tmp_path)
    table = pd.read_parquet(result.folder / "validation.parquet")
    truth = pd.read_parquet(demo_raw / "truth.parquet").set_index("gene")
    scored = table.join(truth, on="gene", rsuffix="_truth")
    median = scored[scored["block"] == "high"].groupby("group")["pcc"].median()
    assert median["planted"] > 0.4
    assert abs(median["null"]) < 0.2


# On all folds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"stopping": "early"}, {"schedule": "plateau"}])
def test_without_validation_nothing_may_look_at_its_loss(
    demo_store: Store, settings: Settings, tmp_path: Path, wrong: dict[str, str]
) -> None:
    asked = with_training(settings, **wrong)
    with pytest.raises(ValueError, match=r"nobody validates, .* must be fixed .* cosine or none"):
        fit(demo_store, asked, ALL, tmp_path, device=CPU, on_epoch=quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes", [{"ema_decay": 0.7, "views": 8}, {"frozen": True}], ids=["average", "frozen"]
)
def test_a_fit_on_all_folds_goes_on_where_it_stopped_and_ends_without_a_score(
    demo_store: Store, settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = with_training(settings, **changes)
    shutil.copytree(demo_store.path, tmp_path / "store")  # a frozen backbone's features stay in it
    store = Store(tmp_path / "store")
    notes: list[Mapping[str, float]] = []
    alike = {"device": CPU, "on_epoch": quiet}
    with pytest.raises(Stop):
        fit(store, settings, ALL, tmp_path / "a", **{**alike, "on_epoch": stop_after(0)})
    result = fit(store, settings, ALL, tmp_path / "a", **{**alike, "on_epoch": notes.append})
    whole = fit(store, settings, ALL, tmp_path / "b", **alike)
    assert same_bits(result.folder, whole.folder)
    assert (result.folder.name, result.epoch, result.epochs) == ("last", 1, 2)
    assert math.isnan(result.score)
    assert math.isnan(finished(tmp_path / "a").score)  # type: ignore[union-attr]
    assert [note["epoch"] for note in notes] == [1]
    assert math.isnan(notes[0]["validation_loss"])
    assert math.isfinite(notes[0]["train_loss"])
    assert not (tmp_path / "a" / "best").exists()
    facts = json.loads((result.folder / "checkpoint.json").read_text(), parse_constant=pytest.fail)
    assert facts["scores"]["score"] is None
    member = checkpoint.load(result.folder)
    assert member.fold.number == ALL
    assert HELD_OUT not in facts["patients"]
    assert len(facts["patients"]) == 5
    with pytest.raises(ValueError, match="made with another fold"):
        fit(store, settings, 0, tmp_path / "a", **alike)


# Resuming ----------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "plateau": {"backbone": "test_resnet", "schedule": "plateau", "plateau_patience": 1},
    "averaged": {
        "backbone": "test_vit",
        "optimizer": "adamw",
        "learning_rate": 0.003,
        "backbone_learning_rate": 0.001,
        "ema_decay": 0.7,
        "warmup_epochs": 1,
        "augmentation": "colour",
    },
    "without momentum": {
        "backbone": "test_efficientnet",
        "momentum": 0.0,
        "schedule": "plateau",
        "stopping": "early",
        "patience": 2,
        "micro_batch": 10,
    },
}
"""3x3 convolutions, BatchNorm, attention, jitter; both optimisers, schedules, stopping rules."""

EPOCHS, STEPS = 3, 3


def resumed(settings: Settings, name: str) -> Settings:
    """Three epochs of three steps, with dropout and, where there can be, stochastic depth."""
    drops = {"dropout": 0.2, "drop_path": 0.2}
    values = {"epochs": EPOCHS, "batch_size": 16, **drops, **RESUMED[name]}
    return with_training(settings, **values)


@pytest.fixture(scope="module")
def uninterrupted(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Each of the trainings to its end in one go; not to be changed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name in RESUMED:
        train(demo_store, resumed(settings, name), folder / name)
    return folder


def assert_same(one: Path, other: Path) -> None:
    """Weights, moving average, optimiser, history and result, bit for bit."""
    assert same_bits(one / "last", other / "last", "model", "optimizer")
    assert same_bits(one / "best", other / "best")
    assert history(one / "last") == history(other / "last")
    results = [finished(folder) for folder in (one, other)]
    assert results[0] is not None
    assert results[1] is not None
    for field in ("score", "epoch", "epochs"):
        assert getattr(results[0], field) == getattr(results[1], field)
    tables = [pd.read_parquet(f / "last" / "validation.parquet") for f in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    names = {p.name for p in one.iterdir()}
    assert names == {"best", "last", "result.json"}
    assert names == {p.name for p in other.iterdir()}


@pytest.mark.parametrize(
    "name", ["plateau", "averaged", pytest.param("without momentum", marks=pytest.mark.slow)]
)
def test_stopped_after_every_single_step_it_gives_the_same_bits(
    demo_store: Store, settings: Settings, tmp_path: Path, uninterrupted: Path, name: str
) -> None:
    asked = resumed(settings, name)
    patches = []
    stopped: set[int] = set()

    def on_step(seen: int) -> None:
        patches.append(seen)
        if seen not in stopped:
            stopped.add(seen)
            raise Stop

    for _ in range(EPOCHS * STEPS + 1):
        try:
            train(demo_store, asked, tmp_path / "a", on_step=on_step)
        except Stop:
            continue
    assert_same(tmp_path / "a", uninterrupted / name)
    epochs = len(history(tmp_path / "a" / "last"))
    assert len(stopped) == epochs * STEPS
    spots = max(patches) // epochs
    assert sorted(stopped) == [
        e * spots + min(16 * s, spots) for e in range(epochs) for s in range(1, STEPS + 1)
    ]


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 1, 2 * STEPS])
def test_it_goes_on_at_the_next_step(
    demo_store: Store, settings: Settings, tmp_path: Path, step: int
) -> None:
    """No step is done twice: not in the first epoch, nor after the last step of one."""
    asked = with_training(resumed(settings, "without momentum"), epochs=2)
    with pytest.raises(Stop):
        train(demo_store, asked, tmp_path, on_step=stop_at(step))
    rest: list[int] = []
    train(demo_store, asked, tmp_path, on_step=rest.append)
    assert len(rest) == 2 * STEPS - step


def test_a_stop_before_anything_was_saved_begins_anew(
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: FitResult,
) -> None:
    """Killed by an error within the first step, and within one of the second epoch."""
    for broken in (0, 8):
        steps = iter(range(100))

        def breaks(*args: Any, broken: int = broken, steps: Any = steps) -> Tensor:
            if next(steps) == broken:
                raise KeyboardInterrupt
            return train_step(*args)

        out = tmp_path / str(broken)
        with monkeypatch.context() as patch:
            patch.setattr("brstnet.training.step.train_step", breaks)
            with pytest.raises(KeyboardInterrupt):
                train(demo_store, settings, out)
        assert (out / "last").exists() == (broken == 8)
        assert same_bits(train(demo_store, settings, out).folder, whole.folder)


def test_a_position_is_saved_when_it_is_due_and_gone_after_its_epoch(
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Path,
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    asked = resumed(settings, "averaged")
    saved: list[Path] = []
    true_save = checkpoint.save

    def save(path: Path, contents: checkpoint.Contents) -> None:
        true_save(path, contents)
        saved.append(path)

    monkeypatch.setattr(checkpoint, "save", save)
    train(demo_store, asked, tmp_path / "a")
    names = [path.name for path in saved]
    assert names.count("last") == EPOCHS
    assert names[:2] == ["position", "position"]
    assert_same(tmp_path / "a", uninterrupted / "averaged")
    saved.clear()
    monkeypatch.setattr(training, "SAVE_SECONDS", 1000.0)
    train(demo_store, asked, tmp_path / "b")
    assert {path.name for path in saved} == {"best", "last"}


def go_on_until_saved(out: Path) -> Callable[[int], None]:
    """Steps of a quarter of a second, and an end as soon as a position was saved by itself."""

    def on_step(_: int) -> None:
        time.sleep(0.25)
        if (out / "position" / "progress.json").is_file():
            raise Stop

    return on_step


def test_on_a_machine_that_is_about_to_go_the_position_is_saved_within_seconds(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch too, before anything was ever written."""
    flag = tmp_path / "leaving"
    monkeypatch.setenv(training.LEAVING, str(flag))
    monkeypatch.setattr(training, "LEAVING_SECONDS", 0.5)
    asked = with_training(settings, batch_size=4)
    stays, goes = tmp_path / "stays", tmp_path / "goes"
    with pytest.raises(Stop):
        train(demo_store, asked, stays, on_step=stop_at(3))
    flag.touch()
    began = time.monotonic()
    with pytest.raises(Stop):
        train(demo_store, asked, goes, on_step=go_on_until_saved(goes))
    assert 1.0 < time.monotonic() - began < 10.0
    assert read_progress(goes / "position").epoch == -1
    flag.unlink()  # on another machine it goes on, without such haste
    assert same_bits(
        train(demo_store, asked, goes).folder, train(demo_store, asked, tmp_path / "whole").folder
    )
    assert not (goes / "leaving").exists()


def train_on_rank(rank: int, port: int, out: Path, store: Store, settings: Settings) -> None:
    torch.set_num_threads(1)
    os.environ[training.LEAVING] = str(out.parent / f"leaving_{rank}")
    training.LEAVING_SECONDS = 0.5
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    with contextlib.suppress(Stop):
        train(store, settings, out, on_step=go_on_until_saved(out))


@pytest.mark.slow
def test_the_leader_saves_when_another_worker_s_machine_is_about_to_go(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    asked, out = with_training(settings, batch_size=4), tmp_path / "run"
    (tmp_path / "leaving_1").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=train_on_rank, args=(rank, port, out, demo_store, asked))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        if worker.is_alive():
            worker.kill()
    assert read_progress(out / "position").epoch == -1
    assert not (out / "last").exists()


def test_a_stale_position_beside_a_newer_checkpoint_is_ignored(
    demo_store: Store, settings: Settings, tmp_path: Path, uninterrupted: Path
) -> None:
    """As when the process is killed after `last/` was put in place, before `position/` went."""
    asked, out = resumed(settings, "averaged"), tmp_path / "run"
    with pytest.raises(Stop):
        train(demo_store, asked, out, on_step=stop_at(STEPS + 2))
    shutil.copytree(out / "position", tmp_path / "stale")
    with pytest.raises(Stop):
        train(demo_store, asked, out, on_epoch=stop_after(1))
    assert not (out / "position").exists()
    (tmp_path / "stale").rename(out / "position")
    notes: list[dict[str, float]] = []
    train(demo_store, asked, out, on_epoch=notes.append)
    assert [note["epoch"] for note in notes] == [2]
    assert_same(out, uninterrupted / "averaged")


MOMENTS = (1, 2, 3, 4, 8)
"""Steps after which a run is stopped: the first ones, an epoch's last, the next one's first."""


def go_on(folder: Path, store: Path, settings: Settings) -> None:
    """What the fresh process does."""
    torch.set_num_threads(1)
    for name in RESUMED:
        for step in MOMENTS:
            train(Store(store), resumed(settings, name), folder / name / str(step))


@pytest.fixture(scope="module")
def went_on(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Trainings that were stopped after a step and gone on with in another process."""
    folder = tmp_path_factory.mktemp("resumed")
    for name in RESUMED:
        for step in MOMENTS:
            out = folder / name / str(step)
            with pytest.raises(Stop):
                train(demo_store, resumed(settings, name), out, on_step=stop_at(step))
    child = multiprocessing.get_context("spawn").Process(
        target=go_on, args=(folder, demo_store.path, settings)
    )
    child.start()
    child.join(240)
    assert child.exitcode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", MOMENTS)
@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_gone_on_with_in_a_fresh_process_it_gives_the_same_bits(
    went_on: Path, uninterrupted: Path, name: str, step: int
) -> None:
    assert_same(went_on / name / str(step), uninterrupted / name)


def be_killed(store: Path, settings: Settings, out: Path, steps: int) -> None:
    """Train, save after every step, and die without a word while the saver writes."""
    torch.set_num_threads(1)
    training.SAVE_SECONDS = 0.0
    done = 0

    def on_step(_: int) -> None:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    train(Store(store), settings, out, on_step=on_step)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("steps", [2, 3])
def test_killed_again_and_again_it_gives_the_same_bits(
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    uninterrupted: Path,
    name: str,
    steps: int,
) -> None:
    """Each process dies after its second or third step, whatever is being written then.

    On a busy machine nothing may be saved before it dies: later processes live longer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["brstnet.training.train", "runs"])
    kills = 0
    for attempt in range(3 * EPOCHS * STEPS):
        lives = steps + attempt // (EPOCHS * STEPS)
        child = context.Process(
            target=be_killed,
            args=(demo_store.path, resumed(settings, name), tmp_path / "a", lives),
        )
        child.start()
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert child.exitcode == 0
    assert_same(tmp_path / "a", uninterrupted / name)


@pytest.mark.parametrize("name", RESUMED)
def test_dropout_was_at_work_in_those_runs(
    demo_store: Store, settings: Settings, name: str
) -> None:
    asked = resumed(settings, name)
    task, _ = prepare_task(demo_store, asked, 0, CPU)
    x_BCHW = task.units.input(task.train.batch(torch.arange(4)))
    without = dataclasses.replace(asked.training, dropout=0.0, drop_path=0.0)
    for drawn, differ in ((asked.training, True), (without, False)):
        model = build_model(drawn, task.fitted, 32).train()
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(model(x_BCHW)[0])
        assert torch.equal(*outputs) != differ


def test_the_schedules_were_at_work_in_those_runs(uninterrupted: Path) -> None:
    rates = {
        name: [note["learning_rate"] for note in history(uninterrupted / name / "last")]
        for name in RESUMED
    }
    assert len(set(rates["averaged"])) == EPOCHS
    assert {len(notes) for notes in rates.values()} == {EPOCHS}


# Memory ------------------------------------------------------------------------------------------

GIB = 1 << 30
SIDE, WHITE = 256, 11_000


def larger_than_memory(store: Store, folder: Path, sections: Sequence[str]) -> Store:
    """The store in patches of 256 px, and in these sections 2 GiB more of them, all white.

    The white ones are holes in their files, which take no room on the disk.
    """
    copy = Store(shutil.copytree(store.path, folder))
    index = json.loads((folder / "index.json").read_text())
    index["prepare"]["input_px"] = SIDE
    for entry in index["sections"]:
        name = entry["section"]
        more = WHITE if name in sections else 0
        few = np.array(copy.patches(name)).repeat(8, axis=1).repeat(8, axis=2)
        file = folder / name / "patches.npy"
        shape = (len(few) + more, SIDE, SIDE, 3)
        file.unlink()
        np.lib.format.open_memmap(file, "w+", np.uint8, shape)[: len(few)] = few
        spots = anndata.read_h5ad(folder / name / "spots.h5ad")
        obs = spots.obs.iloc[[*range(len(few)), *[0] * more]].copy()
        obs.index = pd.Index([str(n) for n in range(len(obs))])
        obs.loc[obs.index[len(few) :], "white_fraction"] = 1.0
        empty = sparse.csr_matrix((more, spots.n_vars), dtype=spots.X.dtype)
        counts = sparse.vstack([spots.X, empty], format="csr")
        anndata.AnnData(counts, obs=obs, var=spots.var).write_h5ad(folder / name / "spots.h5ad")
        entry["spots_kept"] = len(obs)
    (folder / "index.json").write_text(json.dumps(index))
    return Store(folder)


def fit_in(limit: int, store: Path, settings: Settings, out: Path) -> None:
    """What the process with little memory does."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with pytest.raises(MemoryError):
        np.ones(limit, np.uint8)
    train(Store(store), settings, out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
@pytest.mark.parametrize(("allocator", "limit"), [({}, 3 * GIB // 2), (ALLOCATOR, 3 * GIB)])
def test_a_store_larger_than_memory_is_trained_on(
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allocator: Mapping[str, str],
    limit: int,
) -> None:
    """With the launcher's settings each thread's heap grows by 256 MiB at a time."""
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    for name, value in allocator.items():
        monkeypatch.setenv(name, value)
    asked = with_training(settings, input_px=32)
    few, _ = prepare_task(demo_store, asked, 0, CPU)
    store = larger_than_memory(demo_store, tmp_path / "store", few.fold.train)
    size = sum(store.patches(name).nbytes for name in store.sections)
    assert size > 4 * GIB
    child = multiprocessing.get_context("spawn").Process(
        target=fit_in, args=(limit, store.path, asked, tmp_path / "fit")
    )
    child.start()
    child.join(300)
    assert child.exitcode == 0
    assert len(history(tmp_path / "fit" / "last")) == 2


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "backbone",
    ["test_resnet", "test_vit", pytest.param("efficientnet_b0", marks=pytest.mark.slow)],
)
def test_a_fit_in_bfloat16_on_the_gpu_agrees_with_float32_on_the_cpu(
    demo_store: Store, settings: Settings, tmp_path: Path, backbone: str
) -> None:
    """Its model predicts on the GPU in bfloat16 what it predicts on the CPU in float32.

    Tolerance: bfloat16 has 8 bits; a root mean square difference of 5 % of the predictions' spread.
    """
    settings = with_training(settings, backbone=backbone, precision="bfloat16", learning_rate=0.01)
    cuda = torch.device("cuda")
    result = train(demo_store, settings, tmp_path, device=cuda)
    assert math.isfinite(result.score)
    facts = checkpoint.read_facts(result.folder)
    assert facts["machine"]["precision"] == "bfloat16"
    assert facts["machine"]["device"] != "cpu"
    predictions = []
    for device, precision in ((cuda, "bfloat16"), (CPU, "float32")):
        member = checkpoint.load(result.folder, device)
        asked = with_training(settings, precision=precision)
        task, _ = prepare_task(demo_store, asked, 0, device)
        rows = torch.from_numpy(task.validation.rows).to(device)
        x_BCHW = task.units.input(task.validation.batch(rows))
        bf16 = precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = member.model(x_BCHW)
        predictions.append(task.units.whole(outputs).float().cpu().numpy())
    difference = np.sqrt(((predictions[0] - predictions[1]) ** 2).mean())
    assert difference < 0.05 * predictions[1].std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_on_the_gpu_goes_on_where_it_stopped(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """Not bitwise: some of cuDNN's and cuBLAS' sums are not in a fixed order."""
    settings = with_training(settings, precision="float32", epochs=3)
    cuda = torch.device("cuda")
    with pytest.raises(Stop):
        train(demo_store, settings, tmp_path / "a", device=cuda, on_epoch=stop_after(0))
    again = train(demo_store, settings, tmp_path / "a", device=cuda)
    whole = train(demo_store, settings, tmp_path / "b", device=cuda)
    for (name, one), other in zip(
        weights(again.folder).items(), weights(whole.folder).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-3, msg=name)
