"""A step: against plain autograd, in parts, recorded, compiled."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import train, weights, with_training

from brstnet.config import Settings, Training
from brstnet.data.store import Store
from brstnet.training import step
from brstnet.training.batches import Batch, Units
from brstnet.training.jitter import draw_jitter
from brstnet.training.model import Outputs
from brstnet.training.step import (
    Learn,
    choose_engine,
    eager,
    loss_parts,
    recorded,
    train_step,
)

# A step ------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two linear heads on flattened patches; nothing else."""

    def __init__(self, aux: bool = True, depth: bool = False) -> None:
        super().__init__()
        self.main = nn.Linear(12, 3)
        self.aux = nn.Linear(12, 2) if aux else None
        self.depth = nn.Linear(12, 1) if depth else None

    def forward(self, x_BCHW: Tensor) -> Outputs:
        flat = x_BCHW.flatten(1)
        return Outputs(
            self.main(flat),
            None if self.aux is None else self.aux(flat),
            None if self.depth is None else self.depth(flat),
        )


def batch(seed: int, genes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(8, 12 + genes, generator=generator)
    return draw[:, :12].reshape(8, 3, 2, 2), draw[:, 12:].clone()


def test_three_steps_equal_sgd_worked_out_by_hand() -> None:
    """Gradient of main + lambda * aux; v = mu v + g + decay w; w -= lr v. In numpy, float64."""
    learning_rate, momentum, decay, aux_weight = 0.05, 0.9, 0.01, 3.0
    model = Linear()
    layers = {"main": model.main, "aux": model.aux}
    w = {k: m.weight.detach().double().numpy().copy() for k, m in layers.items() if m is not None}
    b = {k: m.bias.detach().double().numpy().copy() for k, m in layers.items() if m is not None}
    v = {k: [np.zeros_like(w[k]), np.zeros_like(b[k])] for k in w}
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum, weight_decay=decay, fused=True
    )
    for number in range(3):
        x_BCHW, y_BG = batch(number)
        loss = train_step(model, optimizer, x_BCHW, y_BG, aux_weight, torch.float32)
        x = x_BCHW.flatten(1).double().numpy()
        truth = {"main": y_BG[:, :3].double().numpy(), "aux": y_BG[:, 3:].double().numpy()}
        expected = 0.0
        for head, scale in (("main", 1.0), ("aux", aux_weight)):
            error = x @ w[head].T + b[head] - truth[head]
            expected += scale * (error**2).mean()
            grad = scale * 2 * error / error.size
            gradients = (grad.T @ x + decay * w[head], grad.sum(axis=0) + decay * b[head])
            v[head] = [momentum * old + g for old, g in zip(v[head], gradients, strict=True)]
            w[head] -= learning_rate * v[head][0]
            b[head] -= learning_rate * v[head][1]
        assert float(loss) == pytest.approx(expected, rel=1e-5)
    for head in w:
        got = layers[head]
        assert got is not None
        np.testing.assert_allclose(got.weight.detach().numpy(), w[head], atol=1e-5)
        np.testing.assert_allclose(got.bias.detach().numpy(), b[head], atol=1e-5)


def test_the_auxiliary_loss_is_absent_without_auxnet() -> None:
    model = Linear(aux=False)
    x_BCHW, y_BG = batch(0, genes=3)
    main, aux, outputs = loss_parts(model, x_BCHW, y_BG)
    assert float(aux) == 0
    assert not aux.requires_grad
    torch.testing.assert_close(main, ((model(x_BCHW)[0] - y_BG) ** 2).mean())
    assert outputs.aux is None
    assert outputs.main.shape == (8, 3)
    results = []
    for aux_weight in (0.0, 40.0):
        torch.manual_seed(0)
        model = Linear(aux=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        train_step(model, optimizer, x_BCHW, y_BG, aux_weight, torch.float32)
        results.append(model.main.weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("aux", [True, False])
def test_the_error_of_the_depth_counts_among_the_main_genes(aux: bool) -> None:
    """The depth is the last column of the goal, with and without auxiliary genes before it."""
    model = Linear(aux, depth=True)
    x_BCHW, goal = batch(0, genes=6 if aux else 4)
    main_loss, aux_loss, outputs = loss_parts(model, x_BCHW, goal)
    error_of_genes = ((outputs.main - goal[:, :3]) ** 2).mean()
    error_of_depth = ((outputs.depth - goal[:, -1:]) ** 2).mean()
    torch.testing.assert_close(main_loss, error_of_genes + error_of_depth)
    if aux:
        torch.testing.assert_close(aux_loss, ((outputs.aux - goal[:, 3:5]) ** 2).mean())
    else:
        assert float(aux_loss) == 0


def test_a_step_in_bfloat16_keeps_float32_parameters_and_nearly_the_loss() -> None:
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Linear()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses.append(float(train_step(model, optimizer, *batch(0), 1.0, precision)))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# In parts ----------------------------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7, 8, 100])
def test_the_gradients_of_parts_sum_to_the_whole_batchs(micro_batch: int) -> None:
    """Parts of unequal size count by their patches; in float64, without BatchNorm."""
    torch.manual_seed(0)
    model = Linear().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x_BCHW, y_BG = (part.double() for part in batch(0))
    whole_loss = train_step(model, optimizer, x_BCHW, y_BG, 3.0, torch.float32)
    whole = gradients(model)
    loss = train_step(model, optimizer, x_BCHW, y_BG, 3.0, torch.float32, micro_batch)
    assert len(whole) == 4
    for part, expected in zip(gradients(model), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)


def test_no_more_than_a_micro_batch_goes_through_at_once() -> None:
    seen: list[int] = []
    model = Linear()
    model.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train_step(model, optimizer, *batch(0), 1.0, torch.float32, 3)
    assert seen == [3, 3, 2]


def test_jitter_is_split_with_the_batch() -> None:
    """Each part has its patches' own: without BatchNorm the update is the whole batch's."""
    updates = []
    for micro_batch in (None, 3):
        trained = Trained("sgd", 0, micro_batch)
        trained.model.norm, trained.model.drop = nn.Identity(), nn.Identity()
        trained.step(trained.learn, 0)
        updates.append(trained.state())
    for name, whole in updates[0].items():
        torch.testing.assert_close(updates[1][name], whole, rtol=1e-5, atol=1e-6)


def test_jitter_is_at_work_in_a_step() -> None:
    one, other = Trained("sgd", 0), Trained("sgd", 0)
    torch.manual_seed(0)
    loss = one.learn(raw())
    torch.manual_seed(0)
    assert loss != other.learn(dataclasses.replace(raw(), jitter_B43=None))


# Engines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "workers", "engine"),
    [
        ("auto", "cpu", 1, "eager"),
        ("auto", "cpu", 2, "eager"),
        ("auto", "cuda", 1, "graph"),
        ("auto", "cuda", 2, "eager"),
        ("eager", "cuda", 1, "eager"),
        ("graph", "cuda", 1, "graph"),
        ("compile", "cpu", 1, "compile"),
        ("compile", "cuda", 2, "compile"),
    ],
)
def test_the_engine_for_device_and_workers(
    asked: Any, device: str, workers: int, engine: str
) -> None:
    assert choose_engine(Training(engine=asked), torch.device(device), workers) == engine


@pytest.mark.parametrize(("device", "workers"), [("cpu", 1), ("cuda", 2)])
def test_a_graph_that_cannot_be_is_refused(device: str, workers: int) -> None:
    with pytest.raises(ValueError, match=f"one worker on a GPU, got {workers} on {device}"):
        choose_engine(Training(engine="graph"), torch.device(device), workers)


def test_a_fit_with_a_graph_on_the_cpu_is_refused(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"training\.engine graph needs one worker on a GPU"):
        train(demo_store, with_training(settings, engine="graph"), tmp_path)


# Recorded ----------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Linear heads behind BatchNorm and dropout: all that a step may change or draw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.2)
        self.heads = Linear(depth=True)

    def forward(self, x_BCHW: Tensor) -> Outputs:
        found: Outputs = self.heads(self.drop(self.norm(x_BCHW)))
        return found


def raw(seed: int = 0) -> Batch:
    """A batch as it is stored: 8 patches of 2 x 2, 5 genes."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        x=torch.randint(0, 256, (8, 2, 2, 3), dtype=torch.uint8, generator=generator),
        symmetry_B=torch.arange(8) % 8,
        jitter_B43=torch.from_numpy(draw_jitter(np.random.default_rng(seed), (8,))),
        counts_BG=torch.randint(0, 50, (8, 5), generator=generator).to(torch.int16),
        scale_B=torch.rand(8, generator=generator) + 0.5,
        depth_B=torch.randn(8, generator=generator),
    )


class Trained:
    """A model, its optimiser, and an eager step."""

    def __init__(self, optimizer: str, steps: int, micro_batch: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: Any = Normed().train()
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, 0.01, fused=True)
            if optimizer == "adamw"
            else torch.optim.SGD(parameters, 0.1, momentum=0.9, fused=True)
        )
        units = Units(
            image_mean=torch.full((1, 3, 1, 1), 127.5),
            image_std=torch.full((1, 3, 1, 1), 60.0),
            target_mean_G=torch.ones(5),
            target_std_G=torch.ones(5),
            depth_slope_G=torch.linspace(0.5, 2, 5),
            depth_scale=0.7,
        )
        self.learn: Learn = eager(
            self.model, self.optimizer, units, Training(aux_weight=2.0), torch.float32, micro_batch
        )
        for number in range(steps):
            self.step(self.learn, number)

    def step(self, learn: Learn, number: int) -> float:
        torch.manual_seed(number)
        return float(learn(raw(number)))

    def record(self, *, must: bool = False) -> tuple[Learn, str]:
        return recorded(self.learn, self.model, self.optimizer, raw(99), must=must)

    def state(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.model.state_dict().items()}


def as_recorded(learn: Learn, batch: Batch) -> Learn:
    """Stands in for a recording that is right: it warms up, then copies its input and steps."""
    for _ in range(step.WARM_UP + 1):
        learn(batch)
    return learn


def forgets_the_update(learn: Learn, batch: Batch) -> Learn:
    as_recorded(learn, batch)
    return lambda _: torch.zeros(())


def stale(*names: str) -> Callable[[Learn, Batch], Learn]:
    """A recording whose replay does not copy these fields of its input."""

    def record(learn: Learn, batch: Batch) -> Learn:
        as_recorded(learn, batch)
        kept = {name: getattr(batch, name).clone() for name in names}
        return lambda now: learn(dataclasses.replace(now, **kept))

    return record


def fails(learn: Learn, batch: Batch) -> Learn:
    as_recorded(learn, batch)
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [0, 3], ids=["at the beginning", "under way"])
@pytest.mark.parametrize("record", [as_recorded, forgets_the_update, fails])
@pytest.mark.filterwarnings("ignore:no CUDA graph")
def test_recording_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, steps: int, record: Any
) -> None:
    """Not on weights and buffers, and the steps after it are the same bits as without it."""
    monkeypatch.setattr(step, "_record", record)
    one, other = Trained(optimizer, steps), Trained(optimizer, steps)
    before = one.state()
    learn, _ = one.record()
    assert all(torch.equal(v, before[k]) for k, v in one.state().items())
    losses = [[t.step(way, n) for n in range(3)] for t, way in ((one, learn), (other, other.learn))]
    if record is not forgets_the_update:
        assert losses[0] == losses[1]
    for name, value in one.state().items():
        assert torch.equal(value, other.state()[name]), name
    kept = [list(t.optimizer.state_dict()["state"].values()) for t in (one, other)]
    for a, b in zip(*kept, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_recording_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_record", as_recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Trained("sgd", 0).record()[1] == "graph"


WRONG = {
    "forgets the update": forgets_the_update,
    "stale patches": stale("x"),
    "stale symmetries": stale("symmetry_B"),
    "stale jitter": stale("jitter_B43"),
    "stale counts": stale("counts_BG"),
    "stale scales": stale("scale_B"),
    "stale depths": stale("depth_B"),
    "fails": fails,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_recording_that_is_wrong_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(step, "_record", WRONG[wrong])
    trained = Trained("sgd", 1)
    with pytest.warns(UserWarning, match="no CUDA graph, steps are run eagerly: "):
        learn, engine = trained.record()
    assert (learn, engine) == (trained.learn, "eager")
    with pytest.raises(RuntimeError, match=r"off the eager one's|not permitted"):
        trained.record(must=True)


def test_a_lack_of_memory_while_recording_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(learn: Learn, batch: Batch) -> Learn:
        as_recorded(learn, batch)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "_record", too_much)
    trained = Trained("sgd", 1)
    before = trained.state()
    with pytest.raises(torch.OutOfMemoryError):
        trained.record()
    assert all(torch.equal(v, before[k]) for k, v in trained.state().items())


# Compiled ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_fit_agrees_with_an_eager_one(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """Fused kernels round otherwise: the update of an epoch within 1 %, the names the same."""
    small = with_training(
        settings, backbone="test_vit", precision="float32", epochs=1, batch_size=24
    )
    folders = {
        engine: train(demo_store, with_training(small, engine=engine), tmp_path / engine).folder
        for engine in ("eager", "compile")
    }
    one, other = weights(folders["eager"]), weights(folders["compile"])
    assert one.keys() == other.keys()
    apart = math.sqrt(sum(float((one[k] - other[k]).double().square().sum()) for k in one))
    size = math.sqrt(sum(float(v.double().square().sum()) for v in one.values()))
    assert apart < 1e-4 * size
