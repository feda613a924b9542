"""One step: forward, loss, backward, update; launched kernel by kernel, compiled, or recorded.

Shape letters: B batch, C channels, H and W pixels, G genes.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from brstnet.config import Training
from brstnet.training.batches import Batch, Units
from brstnet.training.model import Outputs

Learn = Callable[[Batch], Tensor]
"""Takes a step on a batch and gives its loss, on the device."""

WARM_UP = 3
"""Steps before one is recorded, so that libraries have chosen their kernels (PyTorch's notes)."""

AGREE = 0.05
"""How far a recorded step's update may be from an eager one's, relative: kernels in bfloat16 sum
in another order each time, while a step that misses its input or its rate is off by 1 or more."""


def loss_parts(model: nn.Module, x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Outputs]:
    """Forward pass: mean squared error of main and auxiliary genes, and the outputs.

    A depth head's error counts among the main genes' (`Units` has its scale). The paper calls its
    loss cross-entropy, which is undefined for real-valued targets; the authors' code uses the mean
    squared error.

    Args:
        model: the network.
        x: its input.
        goal: `Units.goal`, (B, G) or (B, G + 1).
    """
    outputs: Outputs = model(x)
    main, aux, depth_B1 = outputs
    split, end = main.shape[1], main.shape[1] + (0 if aux is None else aux.shape[1])
    main_loss = F.mse_loss(main, goal[:, :split])
    if depth_B1 is not None:
        main_loss = main_loss + F.mse_loss(depth_B1, goal[:, end:])
    if aux is None:
        return main_loss, torch.zeros_like(main_loss), outputs
    return main_loss, F.mse_loss(aux, goal[:, split:end]), outputs


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    goal: Tensor,
    aux_weight: float,
    precision: torch.dtype,
    micro_batch: int | None = None,
) -> Tensor:
    """Forward, loss = main + aux_weight * auxiliary (paper, Methods), backward, update.

    With a `micro_batch` below B the batch goes through in parts, and their gradients are summed:
    the same update, but that BatchNorm sees a part at a time.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=x.device)
    size = micro_batch or len(x)
    parts = list(zip(x.split(size), goal.split(size), strict=True))
    for number, (part, y) in enumerate(parts, 1):
        with _no_sync(model, last=number == len(parts)):  # DDP asks for the forward in it too
            with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
                main_loss, aux_loss, _ = loss_parts(model, part, y)
                loss = (main_loss + aux_weight * aux_loss) * (len(part) / len(x))
            loss.backward()
        total += loss.detach()
    optimizer.step()
    return total


def _no_sync(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Workers exchange gradients once a step, after its last part."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def eager(
    model: nn.Module,
    optimizer: Optimizer,
    units: Units,
    training: Training,
    precision: torch.dtype,
    micro_batch: int | None,
) -> Learn:
    """A step from raw batch to update, kernel by kernel."""

    def learn(batch: Batch) -> Tensor:
        return train_step(
            model,
            optimizer,
            units.input(batch),
            units.goal(batch),
            training.aux_weight,
            precision,
            micro_batch,
        )

    return learn


def choose_engine(training: Training, device: torch.device, workers: int) -> str:
    """How steps are run: eager, graph or compile.

    Raises:
        ValueError: a graph is asked for on a CPU or for several workers.
    """
    possible = device.type == "cuda" and workers == 1
    if training.engine == "graph" and not possible:
        raise ValueError(
            "training.engine graph needs one worker on a GPU, got "
            f"{workers} on {device.type}: take auto, eager or compile"
        )
    if training.engine == "auto":
        return "graph" if possible else "eager"
    return training.engine


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network through torch.compile; on a GPU with its kernels recorded."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    whole: nn.Module = torch.compile(network, mode=mode)  # type: ignore[assignment]
    return whole


def recorded(
    learn: Learn, model: nn.Module, optimizer: Optimizer, batch: Batch, *, must: bool
) -> tuple[Learn, str]:
    """The step as one CUDA graph, after it has given the same update as the eager one.

    Recording leaves no trace: weights, buffers and optimiser are put back.

    Args:
        learn: the eager step.
        model: what it trains.
        optimizer: what it trains with.
        batch: any batch of the run; all have its shape.
        must: raise where recording fails, instead of going on with the eager step.

    Returns:
        The step, and the engine that runs it: graph or eager.
    """
    kept = _Kept(model, optimizer)
    seed = torch.initial_seed()
    try:
        replay = _record(learn, _other(batch))
        kept.put_back()
        gap = _gap(learn, replay, kept, batch, seed)
        if not gap < AGREE:
            raise RuntimeError(f"its update is {gap:.3f} off the eager one's")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if must:
            raise
        warnings.warn(f"no CUDA graph, steps are run eagerly: {error}", stacklevel=2)
        return learn, "eager"
    finally:
        kept.put_back()
    return replay, "graph"


def _record(learn: Learn, batch: Batch) -> Learn:
    static = Batch(
        x=batch.x.clone(),
        symmetry_B=None if batch.symmetry_B is None else batch.symmetry_B.clone(),
        jitter_B43=None if batch.jitter_B43 is None else batch.jitter_B43.clone(),
        counts_BG=batch.counts_BG.clone(),
        scale_B=batch.scale_B.clone(),
        depth_B=batch.depth_B.clone(),
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            learn(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = learn(static)

    def replay(batch: Batch) -> Tensor:
        for field in fields(Batch):
            target = getattr(static, field.name)
            if target is not None:
                target.copy_(getattr(batch, field.name))
        graph.replay()
        return loss

    return replay


def _other(batch: Batch) -> Batch:
    """A batch of the same shape that differs in everything: a replay must take its input anew."""
    return Batch(
        x=batch.x.roll(1, 0),
        symmetry_B=None if batch.symmetry_B is None else (batch.symmetry_B + 3) % 8,
        jitter_B43=None if batch.jitter_B43 is None else batch.jitter_B43.roll(1, 0) * 2,
        counts_BG=batch.counts_BG.roll(2, 0),
        scale_B=batch.scale_B.roll(3, 0) * 2,
        depth_B=batch.depth_B.roll(5, 0) + 1,
    )


def _gap(learn: Learn, replay: Learn, kept: "_Kept", batch: Batch, seed: int) -> float:
    """How far one replayed step's update is from one eager step's, relative to it."""
    updates = []
    for step in (learn, replay):
        kept.put_back()
        torch.manual_seed(seed)
        step(batch)
        updates.append(kept.moved())
    norm = float(updates[0].norm())
    return float((updates[1] - updates[0]).norm()) / norm if norm > 0 else float("nan")


class _Kept:
    """Everything that a step changes, as it was."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = list(model.parameters())
        tensors = [*self.parameters, *model.buffers(), *self._state()]
        self.before = [(t, t.detach().clone()) for t in tensors]

    def _state(self) -> list[Tensor]:
        return [
            v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """As it was; what the optimiser has begun to keep since is zero, where it begins."""
        known = {id(t) for t, _ in self.before}
        for tensor in self._state():
            if id(tensor) not in known:
                tensor.zero_()
        for tensor, value in self.before:
            tensor.copy_(value)

    def moved(self) -> Tensor:
        """How far the parameters have moved, in one vector."""
        return torch.cat(
            [(t.detach() - v).ravel() for t, v in self.before[: len(self.parameters)]]
        ).float()
