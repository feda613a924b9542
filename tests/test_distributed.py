"""Two processes on this machine train and validate as one would."""

import contextlib
import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import socket
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from trainings import CPU, Stop, history, same_bits, stop_at, train, with_training

from brstnet import metrics
from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training import distributed
from brstnet.training.distributed import World
from brstnet.training.epoch import train_epoch, validate
from brstnet.training.keep import finished
from brstnet.training.step import train_step
from brstnet.training.task import Run, Task, prepare_task
from brstnet.training.train import fit, start

WORLD = 2
FIELDS = ("mx", "my", "sxx", "syy", "sxy")


def no_batch_norm(settings: Settings) -> Settings:
    """A ViT in float32: what each worker computes depends on its own rows alone."""
    return with_training(settings, backbone="test_vit", precision="float32")


def parts() -> list[metrics.Moments]:
    """What each rank has seen of three genes, the first of them constant; unequal numbers."""
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(1000 + 0.1 * rng.normal(size=(2, 50, 3)))
    x[:, 0] = 1000.1
    return [metrics.moments(x[:13], y[:13]), metrics.moments(x[13:], y[13:])]


def one_spot_in_the_first_section(task: Task) -> Task:
    """The task with fewer validation spots in a section than there are workers."""
    section_N = task.validation.section_N
    rows = np.flatnonzero((section_N > 0) | (np.arange(len(section_N)) == 0))
    return dataclasses.replace(task, validation=dataclasses.replace(task.validation, rows=rows))


def numbers(found: tuple[float, list[metrics.Moments]]) -> dict[str, Any]:
    """A validation's outcome, to be written down."""
    loss, sections = found
    moments = [[m.n, *(np.asarray(getattr(m, f)).tolist() for f in FIELDS)] for m in sections]
    return {"loss": loss, "moments": moments}


def do_all(folder: Path, store: Store, settings: Settings) -> dict[str, Any]:
    """Everything that is compared, done by whoever calls: one process, or each of several."""
    here = distributed.world()
    found: dict[str, Any] = {}
    vit = no_batch_norm(settings)
    run = start(*prepare_task(store, vit, 0, CPU), folder / "vit")
    task = run.task
    found["before"] = numbers(validate(task, run.model))
    found["few"] = numbers(validate(one_spot_in_the_first_section(task), run.model))
    first = [p.detach().clone() for p in run.model.parameters()]
    found["train_loss"] = train_epoch(run)[0]
    found["after"] = numbers(validate(task, run.model))
    updates = [p.detach() - f for p, f in zip(run.model.parameters(), first, strict=True)]
    np.save(folder / f"update_{here.size}_{here.rank}.npy", torch.cat([u.ravel() for u in updates]))
    notes: list[dict[str, float]] = []
    result = fit(
        store,
        settings,
        0,
        folder / "resnet",
        device=CPU,
        on_epoch=lambda note: notes.append(dict(note)),
    )
    found["fit"] = {"score": result.score, "epoch": result.epoch, "notes": len(notes)}
    return found


STEPPED: dict[str, dict[str, Any]] = {
    "no BatchNorm": {"backbone": "test_vit"},
    "BatchNorm in evaluation mode": {"backbone": "test_resnet"},
    "BatchNorm over all workers": {"backbone": "test_resnet", "sync_batchnorm": True},
    "timm's BatchNorm over all workers": {
        "backbone": "test_efficientnet",
        "sync_batchnorm": True,
    },
}
PARTS = (None, 4)
"""Patches of both workers together that go through the network at a time."""


def stepped(store: Store, settings: Settings, case: str) -> dict[str, torch.Tensor]:
    """Two steps on rows chosen by hand, each rank its share, whole and in parts, in both widths.

    Returns the update of all parameters and of all running statistics, each in one vector.
    """
    asked = with_training(settings, precision="float32", **STEPPED[case])
    task, model = prepare_task(store, asked, 0, CPU)
    found = {}
    for parts, wide in itertools.product(PARTS, (False, True)):
        run = start(task, copy.deepcopy(model.double() if wide else model.float()), Path("nowhere"))
        run.network.train()
        if "evaluation" in case:
            for module in run.model.modules():
                module.train(not isinstance(module, torch.nn.BatchNorm2d))
        first = copy.deepcopy(run.model.state_dict())
        step_twice(run, parts)
        changed = {n: v - first[n] for n, v in run.model.state_dict().items()}
        for kind in ("weights", "statistics"):
            of_kind = [
                v.ravel() for n, v in changed.items() if ("running_" in n) == (kind[0] == "s")
            ]
            name = f"{case}, {parts}, {'double' if wide else 'single'}, {kind}"
            found[name] = torch.cat(of_kind or [torch.zeros(0)])
    return found


def step_twice(run: Run, parts: int | None) -> None:
    """Each rank on its rows of the same two batches of 8."""
    task, here = run.task, run.task.here
    width = next(run.model.parameters()).dtype
    micro_batch = None if parts is None else parts // here.size
    for rows in (np.arange(8), np.arange(8, 16)):
        batch = task.train.batch(torch.from_numpy(rows[here.rank :: here.size]))
        x, y_BG = task.units.input(batch).to(width), task.units.target(batch).to(width)
        train_step(run.network, run.optimizer, x, y_BG, 2.0, torch.float32, micro_batch)


def exchanges(store: Store, settings: Settings, parts: int | None) -> int:
    """How often the workers exchange gradients in two steps."""
    run = start(*prepare_task(store, no_batch_norm(settings), 0, CPU), Path("nowhere"))
    counted: list[int] = []

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted.append(1)
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    assert isinstance(run.network, DistributedDataParallel)
    run.network.register_comm_hook(None, hook)
    step_twice(run, parts)
    return len(counted)


def stop_and_go_on(store: Store, settings: Settings, folder: Path) -> None:
    """A fit that both workers leave at the same step of the second epoch, and take up again."""
    for on_step in (stop_at(7), None):
        with contextlib.suppress(Stop):
            train(store, settings, folder, on_step=on_step)


def work(rank: int, port: int, folder: Path, store: Path, settings: Settings) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    assert distributed.world() == World(rank, WORLD)
    merged = distributed.merge_everywhere(parts()[rank], distributed.world())
    np.save(folder / f"merged_{rank}.npy", torch.stack([getattr(merged, f) for f in FIELDS]))
    found = do_all(folder, Store(store), settings)
    found["n"] = merged.n
    for case in STEPPED:
        np.savez(folder / f"{case}_{rank}.npz", **stepped(Store(store), settings, case))
    found["exchanges"] = [exchanges(Store(store), settings, parts) for parts in PARTS]
    together = with_training(settings, sync_batchnorm=True, ema_decay=0.9, dropout=0.2)
    train(Store(store), together, folder / "whole")
    stop_and_go_on(Store(store), together, folder / "parts")
    try:
        prepare_task(Store(store), with_training(settings, batch_size=9), 0, CPU)
    except ValueError as error:
        found["uneven"] = str(error)
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Both:
    """What two processes found, and what one did."""

    folder: Path
    ranks: list[dict[str, Any]]
    alone: dict[str, Any]
    alone_folder: Path

    def load(self, name: str) -> np.ndarray:
        loaded: np.ndarray = np.load(self.folder / name)
        return loaded


@pytest.fixture(scope="module")
def both(demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder, alone_folder = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = (port, folder, demo_store.path, settings)
    workers = [context.Process(target=work, args=(rank, *arguments)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    alone = do_all(alone_folder, demo_store, settings)
    for worker in workers:
        worker.join(180)
        assert worker.exitcode == 0
    ranks = [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(WORLD)]
    return Both(folder, ranks, alone, alone_folder)


@pytest.mark.slow
def test_merging_everywhere_equals_the_whole_with_the_same_bits_on_each_rank(both: Both) -> None:
    merged = both.load("merged_0.npy")
    np.testing.assert_array_equal(merged, both.load("merged_1.npy"))
    whole = reduce(metrics.merge, parts())
    expected = np.stack([np.asarray(getattr(whole, field)) for field in FIELDS])
    np.testing.assert_array_equal(merged, expected)
    assert [found["n"] for found in both.ranks] == [50, 50]
    assert np.isnan(metrics.correlation(metrics.Moments(50, *merged)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["before", "few"])
def test_validation_by_two_equals_validation_by_one(both: Both, what: str) -> None:
    """The same model and spots; only the last bits of a forward pass depend on the batch."""
    assert both.ranks[0][what] == both.ranks[1][what]
    two, one = both.ranks[0][what], both.alone[what]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for ours, theirs in zip(two["moments"], one["moments"], strict=True):
        assert ours[0] == theirs[0]
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_section_with_fewer_spots_than_workers_is_validated(both: Both) -> None:
    assert both.ranks[0]["few"]["moments"][0][0] == 1
    assert np.isfinite(both.ranks[0]["few"]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPPED)
def test_two_steps_by_two_equal_two_steps_by_one_on_the_same_global_batches(
    both: Both, demo_store: Store, settings: Settings, case: str
) -> None:
    """The update of the weights and of the running statistics, relative to its size."""
    alone = stepped(demo_store, settings, case)
    ranks = [dict(both.load(f"{case}_{rank}.npz")) for rank in range(WORLD)]
    assert len(alone) == 8
    for name, one in alone.items():
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name], err_msg=name)
        frozen = name.endswith("statistics") and "over all" not in case
        size = np.linalg.norm(one.numpy())
        assert (size == 0) == frozen, name
        apart = np.linalg.norm(ranks[0][name] - one.numpy())
        assert apart <= (1e-10 if "double" in name else 1e-4) * size, name
    whole, parts = (alone[f"{case}, {p}, double, weights"] for p in PARTS)
    same = float((whole - parts).norm() / whole.norm()) <= 1e-10
    assert same != ("over all" in case)  # BatchNorm sees a part at a time


@pytest.mark.slow
def test_workers_exchange_gradients_once_a_step(both: Both) -> None:
    for found in both.ranks:
        whole, parts = found["exchanges"]
        assert whole == parts > 0


@pytest.mark.slow
def test_two_that_were_stopped_go_on_to_the_same_bits(both: Both) -> None:
    """With BatchNorm over both, a moving average and dropout."""
    for name in ("best", "last"):
        assert same_bits(both.folder / "whole" / name, both.folder / "parts" / name)
    last = [both.folder / name / "last" for name in ("whole", "parts")]
    assert same_bits(*last, "optimizer")
    assert history(last[0]) == history(last[1])


@pytest.mark.slow
def test_an_epoch_by_two_equals_an_epoch_by_one(both: Both) -> None:
    one = np.load(both.alone_folder / "update_1_0.npy")
    two = [both.load(f"update_2_{rank}.npy") for rank in range(WORLD)]
    np.testing.assert_array_equal(*two)
    assert np.linalg.norm(two[0] - one) / np.linalg.norm(one) <= 1e-4
    losses = [found["train_loss"] for found in both.ranks]
    assert losses[0] == losses[1] == pytest.approx(both.alone["train_loss"], rel=1e-5)
    assert both.ranks[0]["after"] == both.ranks[1]["after"]
    assert both.ranks[0]["after"]["loss"] == pytest.approx(both.alone["after"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_fit_by_two_ends_with_one_result_that_the_leading_one_wrote(
    both: Both, demo_store: Store, settings: Settings
) -> None:
    """With BatchNorm each worker has its own batches; all validate the model that is saved."""
    outcomes = [found["fit"] for found in both.ranks]
    assert outcomes[0]["score"] == outcomes[1]["score"]
    assert [outcome["notes"] for outcome in outcomes] == [2, 2]  # groups report inside a fold
    result = finished(both.folder / "resnet")
    assert result is not None
    assert result.score == outcomes[0]["score"]
    assert result.folder.is_dir()
    facts = json.loads((result.folder / "checkpoint.json").read_text())
    assert facts["machine"]["workers"] == WORLD
    run = start(*prepare_task(demo_store, settings, 0, CPU), both.folder / "resnet")
    task = run.task
    sections = validate(task, run.model)[1]
    assert metrics.fold_score(sections, task.patients) == pytest.approx(result.score, abs=2e-3)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(both: Both) -> None:
    for found in both.ranks:
        assert "must be a multiple of their number (2)" in found["uneven"]


def test_alone_nothing_is_wrapped_and_nothing_waits() -> None:
    here, model = distributed.world(), torch.nn.Linear(2, 2)
    assert here == World(0, 1)
    assert here.leads
    assert distributed.wrap(model, here, CPU) is model
    distributed.share_buffers(model, here)
    distributed.barrier(here)
    part = parts()[0]
    assert distributed.merge_everywhere(part, here) is part
    assert float(distributed.total(torch.tensor(3.0), here)) == 3
    assert distributed.synchronise(model, here, CPU) is model


def test_nobody_joins_where_torchrun_has_started_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.join(CPU) == CPU
    distributed.leave()
    assert not dist.is_initialized()
