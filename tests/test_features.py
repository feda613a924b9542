"""A frozen backbone's features: cached, and trained on as if the backbone were there."""

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import CPU, Stop, same_bits, stop_at, train, weights, with_training

from brstnet.config import Settings, fingerprint
from brstnet.data.store import Store
from brstnet.evaluation.predict import predict
from brstnet.training import checkpoint, features
from brstnet.training.batches import epoch_plan, turn
from brstnet.training.model import build_model
from brstnet.training.optim import Rate, make_optimizer
from brstnet.training.step import train_step
from brstnet.training.task import prepare_task
from brstnet.training.train import start


@pytest.fixture
def store(demo_store: Store, tmp_path: Path) -> Store:
    """A copy of the demo store, to keep features in, without what other tests have derived."""
    without = shutil.ignore_patterns("derived")
    return Store(shutil.copytree(demo_store.path, tmp_path / "store", ignore=without))


@pytest.fixture
def frozen(settings: Settings) -> Settings:
    """BatchNorm under the features, so that a backbone in training mode would show."""
    return with_training(settings, frozen=True, precision="float32", weight_decay=0.01)


def files(store: Store) -> set[str]:
    return {p.name for p in (store.path / "derived").glob("*")}


def never(*_: Any) -> np.ndarray:
    raise AssertionError("computed again")


def test_features_are_the_backbones_in_all_eight_symmetries(store: Store, frozen: Settings) -> None:
    task, model = prepare_task(store, frozen, 0, CPU)
    backbone = build_model(frozen.training, task.fitted, 32).backbone.eval()
    found = task.train.features_VNF
    assert found is not None
    assert found.shape == (8, len(task.train.counts_NG), backbone.num_features)
    patches = task.train.patches(torch.arange(found.shape[1]))
    with torch.inference_mode():
        for view in range(8):
            turned = turn(patches, torch.full((len(patches),), view))
            expected = backbone(task.units.image(turned))
            torch.testing.assert_close(found[view], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[4], rtol=1e-3)
    assert not list(model.backbone.parameters())


def test_training_on_features_is_training_the_heads_on_a_frozen_backbone(
    store: Store, frozen: Settings, tmp_path: Path
) -> None:
    """By hand: each patch of the plan turned, through the backbone in evaluation mode; SGD."""
    result = train(store, frozen, tmp_path / "fit")
    task, _ = prepare_task(store, with_training(frozen, frozen=False), 0, CPU)
    model = build_model(frozen.training, task.fitted, 32)
    model.backbone.eval().requires_grad_(False)
    heads = [*model.main.parameters(), *model.aux.parameters()]  # type: ignore[union-attr]
    first = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(heads, 0.02, momentum=0.9, weight_decay=0.01)
    rate = Rate(frozen.training, task.steps)
    for epoch in range(2):
        plan = epoch_plan(task.train.rows, 8, 0, epoch)
        for rows_B, how_B in zip(*map(torch.from_numpy, plan[:2]), strict=True):
            optimizer.param_groups[0]["lr"] = rate.now
            batch = task.train.batch(rows_B, how_B)
            x, y_BG = task.units.input(batch), task.units.target(batch)
            train_step(model, optimizer, x, y_BG, 1.0, torch.float32)
        rate.after_epoch(0.0)
    learned = weights(result.folder)
    assert set(learned) == {n for n in first if not n.startswith("backbone.")}
    for name, value in learned.items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, first[name])


def test_without_augmentation_training_sees_the_view_that_is_not_turned(
    store: Store, frozen: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the features that trainings with symmetries have kept, whatever the others hold."""
    train(store, frozen, tmp_path / "turned")
    asked, computed = with_training(frozen, augmentation="none"), files(store)
    expected = train(store, asked, tmp_path / "none")
    assert files(store) == computed
    true_derived = Store.derived

    def spoilt(self: Store, made_of: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        found = np.array(true_derived(self, made_of, make))
        if "weights" in made_of:
            found[1:] = np.nan
        return found

    monkeypatch.setattr(Store, "derived", spoilt)
    result = train(store, asked, tmp_path / "spoilt")
    assert same_bits(result.folder, expected.folder)
    assert not same_bits(result.folder, tmp_path / "turned" / "last")


def test_the_checkpoint_predicts_what_backbone_and_heads_do(
    store: Store, frozen: Settings, tmp_path: Path
) -> None:
    """Each spot's prediction from its patch is the one that its cached features gave."""
    run_folder = tmp_path / "fit"
    result = train(store, frozen, run_folder)
    task, model = prepare_task(store, frozen, 0, CPU)
    model.load_state_dict(weights(result.folder))
    loaded = checkpoint.load(shutil.move(result.folder, tmp_path / "elsewhere"))
    everyone = torch.from_numpy(task.validation.rows)
    with torch.inference_mode():
        seen = task.units.whole(model.eval()(task.validation.batch(everyone).x))
        patches = task.validation.patches(everyone)
        told = task.units.whole(loaded.model(task.units.image(patches)))
    torch.testing.assert_close(told, seen, rtol=1e-4, atol=1e-4)
    predicted = predict(loaded, store, task.fold.validation).to_numpy()
    in_log = told.numpy() * task.fitted.genes["std"].to_numpy()
    np.testing.assert_allclose(predicted, in_log + task.fitted.genes["mean"].to_numpy(), atol=1e-3)
    names = {p.name for p in (run_folder / "best").iterdir()}
    assert names == {
        "backbone.safetensors",
        "checkpoint.json",
        "genes.parquet",
        "model.safetensors",
        "validation.parquet",
    }


def test_a_second_run_reads_what_the_first_has_kept(
    store: Store, frozen: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(store, frozen, tmp_path / "first")
    kept = files(store)
    assert len(kept) == len((*first_fold(store, frozen),))
    monkeypatch.setattr(features, "compute", never)
    again = train(store, frozen, tmp_path / "again")
    assert same_bits(first.folder, again.folder)
    assert same_bits(first.folder, again.folder, "backbone")
    train(store, with_training(frozen, learning_rate=0.01), tmp_path / "other heads")
    assert files(store) == kept


def first_fold(store: Store, settings: Settings) -> tuple[str, ...]:
    fold = prepare_task(store, settings, 0, CPU)[0].fold
    return (*fold.train, *fold.validation)


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"seed": 5},
    "backbone": {"backbone": "test_vit"},
    "input_px": {"input_px": 16},
    "colours": {"image_statistics": "weights"},
    "precision": {"precision": "bfloat16"},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_features_follow_from_changes_their_name(
    store: Store, frozen: Settings, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 px is below what a backbone takes by itself; here only the name is asked for."""
    monkeypatch.setattr("brstnet.training.model._check_input_size", lambda *_: None)
    before = set(names(store, frozen))
    after = set(names(store, with_training(frozen, **CHANGES[changed])))
    assert not before & after
    assert before == set(names(store, frozen))


def names(store: Store, settings: Settings) -> list[str]:
    """The names of the files that a run asks for, without computing any features."""
    asked: list[str] = []
    true_derived = Store.derived

    def derived(self: Store, made_of: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        if "weights" not in made_of:
            return true_derived(self, made_of, make)
        asked.append(fingerprint(made_of))
        return make()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "derived", derived)
        patch.setattr(features, "compute", lambda p, b, *_: np.zeros((8, len(p), b.num_features)))
        prepare_task(store, settings, 0, CPU)
    return asked


def test_where_nothing_can_be_kept_it_is_told_and_trained_all_the_same(
    store: Store, frozen: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    expected = train(store, frozen, tmp_path / "kept")
    shutil.rmtree(store.path / "derived")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", read_only)
        with pytest.warns(UserWarning, match=r"can be kept here \(Read-only file system\)"):
            result = train(store, frozen, tmp_path / "not kept")
    assert same_bits(result.folder, expected.folder)
    assert not files(store)


def test_half_written_features_are_never_read(
    store: Store, frozen: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes: the next run computes them again."""

    def killed(file: Path, found: np.ndarray) -> None:
        Path(file).write_bytes(found.tobytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(store, frozen, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(store, frozen, tmp_path)


def test_stopped_and_gone_on_with_it_gives_the_same_bits(
    store: Store, frozen: Settings, tmp_path: Path
) -> None:
    asked = with_training(frozen, dropout=0.3, ema_decay=0.9)
    whole = train(store, asked, tmp_path / "whole")
    with pytest.raises(Stop):
        train(store, asked, tmp_path / "parts", on_step=stop_at(8))
    again = train(store, asked, tmp_path / "parts")
    assert same_bits(again.folder, whole.folder, "model", "optimizer", "backbone")


def test_the_backbones_file_is_shared_and_never_written_to_again(
    store: Store, frozen: Settings, tmp_path: Path
) -> None:
    """The checkpoints hold links to it: who is killed while he rewrites it damages them all."""
    with pytest.raises(Stop):
        train(store, frozen, tmp_path, on_step=stop_at(8))
    linked = [tmp_path / name / "backbone.safetensors" for name in ("best", "last", "position")]
    assert len({file.stat().st_ino for file in linked}) == 1
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in linked]
    start(*prepare_task(store, frozen, 0, CPU), tmp_path)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in linked] == before


def test_a_frozen_backbone_is_in_no_group_of_the_optimizer(store: Store, frozen: Settings) -> None:
    _, model = prepare_task(store, frozen, 0, CPU)
    optimizer = make_optimizer(model, frozen.training)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == 4
