"""What only a GPU can show: recorded steps, asynchronous copies, memory that runs out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training import checkpoint, epoch
from brstnet.training.batches import epoch_plan, rng
from brstnet.training.task import prepare_task
from brstnet.training.train import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
CUDA = torch.device("cuda", 0)


def quiet(note: Mapping[str, float]) -> None:
    """A callback that does nothing."""


def with_training(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **changes))


@pytest.mark.parametrize(
    ("optimizer", "augmentation"),
    [("sgd", "symmetries"), ("adamw", "symmetries"), ("sgd", "none"), ("adamw", "colour")],
)
def test_a_recorded_run_ends_where_an_eager_one_does(
    demo_store: Store, settings: Settings, tmp_path: Path, optimizer: str, augmentation: str
) -> None:
    found = {}
    for engine in ("eager", "graph"):
        changed = with_training(
            settings,
            engine=engine,
            precision="float32",
            optimizer=optimizer,
            augmentation=augmentation,
            learning_rate=0.001,
            warmup_epochs=1,
            ema_decay=0.9,
        )
        out = tmp_path / engine
        result = fit(demo_store, changed, 0, out, device=CUDA, on_epoch=quiet)
        assert checkpoint.read_facts(result.folder)["engine"] == engine
        weights = safetensors.torch.load_file(result.folder / "model.safetensors")
        found[engine] = torch.cat([v.double().ravel() for v in weights.values()])
    gap = (found["graph"] - found["eager"]).norm() / found["eager"].norm()
    assert float(gap) < 1e-2


def test_auto_records_on_a_gpu_and_says_so(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    result = fit(demo_store, settings, 0, tmp_path, device=CUDA, on_epoch=quiet)
    assert checkpoint.read_facts(result.folder)["engine"] == "graph"


def test_dropout_is_at_work_in_a_recorded_run_and_repeats(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """Two runs with the same seed are far nearer to each other than to one with another seed."""

    def heads(name: str, seed_of_dropout: int) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(epoch, "rng", lambda *key: rng(seed_of_dropout, *key))
            changed = with_training(settings, dropout=0.5, engine="graph", precision="float32")
            result = fit(demo_store, changed, 0, tmp_path / name, device=CUDA, on_epoch=quiet)
        return safetensors.torch.load_file(result.folder / "model.safetensors")["main.weight"]

    one, again, other = heads("one", 0), heads("again", 0), heads("other", 1)
    assert float((one - again).norm()) < 0.1 * float((one - other).norm())


def test_batches_sent_ahead_are_those_that_lie_there(demo_store: Store, settings: Settings) -> None:
    task, _ = prepare_task(demo_store, settings, 0, CUDA)
    assert task.train.resident is not None
    mapped = dataclasses.replace(task.train, resident=None)
    plan = epoch_plan(task.train.rows, 8, seed=0, epoch=0, augmentation="colour")
    for one, other in zip(task.train.feed(plan), mapped.feed(plan), strict=True):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_a_batch_that_does_not_fit_is_taken_in_parts(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """The process may take a fraction of the memory in which the whole batch has no room."""
    big = with_training(settings, backbone="resnet50", batch_size=64, epochs=1)
    free, total = torch.cuda.mem_get_info(CUDA)
    room = torch.cuda.memory_allocated(CUDA) + 0.6e9
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(room, free) / total, CUDA)
    try:
        with pytest.warns(UserWarning, match="do not fit"):
            fit(demo_store, big, 0, tmp_path, device=CUDA, on_epoch=quiet)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert (tmp_path / "micro_batch.json").is_file()


def test_a_frozen_backbones_features_are_those_of_the_cpu(
    demo_store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "derived", lambda *a: a[2]())  # else the second reads the first's
    frozen = with_training(settings, frozen=True, precision="float32")
    on_gpu, _ = prepare_task(demo_store, frozen, 0, CUDA)
    on_cpu, _ = prepare_task(demo_store, frozen, 0, torch.device("cpu"))
    one, other = (t.train.features_VNF for t in (on_gpu, on_cpu))
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(one.cpu().numpy(), other.numpy(), rtol=1e-2, atol=1e-3)
