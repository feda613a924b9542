"""What a run leaves on disk: taken up by the same run alone, and by halves where memory ran out."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
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
    with_training,
)

from brstnet.config import Settings, Training
from brstnet.data.store import Store
from brstnet.training import distributed, step
from brstnet.training.distributed import World
from brstnet.training.keep import FitResult, finished, halve, micro_batch
from brstnet.training.step import train_step
from brstnet.training.task import prepare_task
from brstnet.training.train import fit, start

ALONE = World()


@pytest.fixture(scope="module")
def whole(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> FitResult:
    """The usual settings trained to the end; not to be changed."""
    return train(demo_store, settings, tmp_path_factory.mktemp("whole"))


# Another's ---------------------------------------------------------------------------------------


def test_a_finished_fold_is_not_repeated(
    demo_store: Store, settings: Settings, whole: FitResult
) -> None:
    def never(note: Mapping[str, float]) -> None:
        raise AssertionError

    out = whole.folder.parent
    assert train(demo_store, settings, out, on_epoch=never) == whole
    assert finished(out) == whole


def test_what_another_run_finished_is_not_taken_for_this_one(
    demo_store: Store, settings: Settings, whole: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = whole.folder.parent, with_training(settings, seed=9)
    with pytest.raises(ValueError, match="made with another settings"):
        train(demo_store, other, out)
    with pytest.raises(ValueError, match="made with another fold"):
        fit(demo_store, settings, 1, out, device=CPU, on_epoch=quiet)
    monkeypatch.setattr(Store, "digest", "another")
    with pytest.raises(ValueError, match="made with another store"):
        train(demo_store, settings, out)


def test_resume_refuses_what_other_settings_left(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(demo_store, settings, tmp_path, on_epoch=stop_after(0))
    assert finished(tmp_path) is None
    other = with_training(settings, learning_rate=0.03)
    with pytest.raises(ValueError, match="made with another settings; choose another folder"):
        train(demo_store, other, tmp_path)
    with pytest.raises(ValueError, match="made with another fold"):
        fit(demo_store, settings, 1, tmp_path, device=CPU, on_epoch=quiet)


def test_a_position_of_other_settings_is_refused(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(demo_store, settings, tmp_path, on_step=stop_at(2))
    assert [p.name for p in tmp_path.iterdir()] == ["position"]
    with pytest.raises(ValueError, match="position: made with another settings"):
        train(demo_store, with_training(settings, dropout=0.5), tmp_path)


def test_a_run_goes_on_that_began_before_checkpoints_said_their_microns(
    demo_store: Store, settings: Settings, whole: FitResult, tmp_path: Path
) -> None:
    """Versions until 0.4 had no um_per_px in the facts that a run must share."""
    with pytest.raises(Stop):
        train(demo_store, settings, tmp_path, on_epoch=stop_after(0))
    file = tmp_path / "last" / "checkpoint.json"
    facts = json.loads(file.read_text())
    assert set(facts["store"]) == {"digest", "prepare", "stain_target", "sections"}
    del facts["um_per_px"]
    file.write_text(json.dumps(facts))
    result = train(demo_store, settings, tmp_path)
    assert same_bits(result.folder, whole.folder)
    found = json.loads((result.folder / "checkpoint.json").read_text())["um_per_px"]
    used = (*facts["fold"]["train"], *facts["fold"]["validation"])
    assert found == {name: demo_store.sections[name]["um_per_px"] for name in used}


def test_momentum_comes_back_in_the_layout_of_its_parameter(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """The fused update walks through memory without looking at strides."""
    with pytest.raises(Stop):
        train(demo_store, settings, tmp_path, on_epoch=stop_after(0))
    run = start(*prepare_task(demo_store, settings, 0, CPU), tmp_path)
    state = run.optimizer.state
    assert run.progress.epoch == 0
    kernels = [p for p in run.model.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert kernels
    for parameter in run.model.parameters():
        assert state[parameter]["momentum_buffer"].stride() == parameter.stride()


def test_the_adam_moments_and_the_moving_weights_come_back_as_they_were(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    asked = with_training(settings, optimizer="adamw", ema_decay=0.9, learning_rate=0.001)
    with pytest.raises(Stop):
        train(demo_store, asked, tmp_path, on_epoch=stop_after(0))
    run = start(*prepare_task(demo_store, asked, 0, CPU), tmp_path)
    assert run.average is not None
    assert run.judged is run.average.module
    steps = set()
    for parameter in run.model.parameters():
        state = run.optimizer.state[parameter]
        steps.add(float(state["step"]))
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].stride() == parameter.stride()
    assert steps == {run.task.steps}
    moved = [
        not torch.equal(a, b)
        for a, b in zip(run.model.parameters(), run.judged.parameters(), strict=True)
    ]
    assert any(moved)


# Out of memory -----------------------------------------------------------------------------------


Error = Callable[[], RuntimeError]
ERRORS: dict[str, Error] = {
    "on a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "on the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def test_torch_says_so_in_these_words_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def room_for(patches: int, error: Error, tried: list[int]) -> Callable[..., Tensor]:
    """A step that runs out of memory with more than so many patches at a time."""

    def step(*args: Any) -> Tensor:
        tried.append(args[6])
        if args[6] > patches:
            raise error()
        return train_step(*args)

    return step


@pytest.mark.parametrize("where", ERRORS)
def test_a_batch_that_does_not_fit_is_taken_in_halves(
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """From 8 patches to 3: tried are 8, 4 and 2; the rest of the run keeps to 2."""
    tried: list[int] = []
    settings = with_training(settings, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(step, "train_step", room_for(3, ERRORS[where], tried))
        with pytest.warns(UserWarning, match="do not fit the memory at a time") as caught:
            result = train(demo_store, settings, tmp_path / "a")
    told = [str(w.message) for w in caught if "do not fit" in str(w.message)]
    assert "8 patches of training.batch_size 8" in told[0]
    assert [line.split("going on with ")[1][0] for line in told] == ["4", "2"]
    assert tried[:3] == [8, 4, 2]
    assert set(tried[2:]) == {2}
    assert [note["micro_batch"] for note in history(result.folder)] == [2]
    assert json.loads((tmp_path / "a" / "micro_batch.json").read_text()) == 2
    asked = with_training(settings, micro_batch=2)
    assert same_bits(result.folder, train(demo_store, asked, tmp_path / "b").folder)


def test_a_later_fit_begins_with_what_did_fit(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on from where it was, after a lack of memory in the midst of an epoch too."""
    tried: list[int] = []
    calls = iter(range(100))
    small = room_for(4, ERRORS["on a GPU"], tried)

    def later(*args: Any) -> Tensor:
        return small(*args) if next(calls) >= 9 else train_step(*args)

    notes: list[Mapping[str, float]] = []
    with monkeypatch.context() as patch:
        patch.setattr(step, "train_step", later)
        with pytest.raises(Stop), pytest.warns(UserWarning, match="going on with 4"):
            train(demo_store, settings, tmp_path, on_step=stop_at(11), on_epoch=notes.append)
    assert [note["micro_batch"] for note in notes] == [8]
    assert tried == [8, 4, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(demo_store, settings, tmp_path)
    assert [note["micro_batch"] for note in history(result.folder)] == [8, 4]


def test_where_not_even_one_patch_fits_it_is_told(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(step, "train_step", room_for(0, ERRORS["on a GPU"], tried))
    with (
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"),
        pytest.warns(UserWarning, match="going on with 1"),
    ):
        train(demo_store, with_training(settings, micro_batch=2), tmp_path)
    assert tried == [2, 1]


def test_another_error_is_not_taken_for_a_lack_of_memory(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    other = room_for(0, lambda: RuntimeError("shapes cannot be multiplied"), tried)
    monkeypatch.setattr(step, "train_step", other)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(demo_store, settings, tmp_path)
    assert tried == [8]
    assert not (tmp_path / "micro_batch.json").exists()


@pytest.mark.parametrize(
    ("asked", "noted", "workers", "taken"),
    [
        (None, None, 1, 32),
        (None, None, 4, 8),
        (20, None, 1, 20),
        (20, None, 2, 16),
        (None, 5, 1, 5),
        (4, 5, 1, 4),
        (64, 8, 2, 8),
    ],
)
def test_the_micro_batch_is_the_smallest_of_asked_share_and_what_did_fit(
    tmp_path: Path, asked: int | None, noted: int | None, workers: int, taken: int
) -> None:
    if noted is not None:
        (tmp_path / "micro_batch.json").write_text(json.dumps(noted))
    assert micro_batch(tmp_path, Training(micro_batch=asked), World(0, workers)) == taken


def test_one_of_several_workers_leaves_a_note_and_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it: the whole group must begin anew, with smaller parts."""
    error, here = ERRORS["on a GPU"](), World(1, 2)
    monkeypatch.setattr(distributed, "world", lambda: here)
    for _ in range(2):  # both run out: the second does not halve the first one's note
        with pytest.raises(torch.OutOfMemoryError):
            halve(tmp_path, 16, 32, error)
    assert micro_batch(tmp_path, Training(batch_size=32), here) == 8
