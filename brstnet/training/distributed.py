"""Several workers as one: who am I, and how are parts put together exactly.

Works under anything that has set up `torch.distributed` (Ray Train, torchrun); alone without it.
"""

import os
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from brstnet.metrics import Moments, merge


@dataclass(frozen=True)
class World:
    """This process among its fellows."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0


def world() -> World:
    """The world that torch.distributed knows, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def join(device: torch.device) -> torch.device:
    """Join the workers that torchrun has started, if it has; the device of this one.

    Returns:
        With several workers on CUDA the GPU of this worker's number on its machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """End what `join` has begun."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, here: World, device: torch.device) -> nn.Module:
    """Average gradients over the workers; the bare model in a world of one."""
    if here.size == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # Buffers (BatchNorm's running statistics) are made equal once an epoch, by `share_buffers`.
    with warnings.catch_warnings():  # its successor in torch 2.14 is not there before
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def synchronise(model: nn.Module, here: World, device: torch.device) -> nn.Module:
    """BatchNorm over all workers' patches: PyTorch's on a GPU, on the CPU, where it refuses, ours.

    Changes the model in place where it can; use what is returned.
    """
    if here.size == 1:
        return model
    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = types.MethodType(_norm_over_all, module)  # type: ignore[method-assign]
    return model


class _SumOverAll(torch.autograd.Function):
    """The sum over all workers; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed


def _mean_over_all(value: Tensor) -> Tensor:
    summed: Tensor = _SumOverAll.apply(value)
    return summed / dist.get_world_size()


def _norm_over_all(norm: _BatchNorm, x_BCHW: Tensor) -> Tensor:
    """BatchNorm's forward with mean and variance over all workers; as many patches on each."""
    if not norm.training:
        return type(norm).forward(norm, x_BCHW)
    dims = [d for d in range(x_BCHW.ndim) if d != 1]
    n = dist.get_world_size() * x_BCHW.numel() // x_BCHW.shape[1]
    wide = x_BCHW if x_BCHW.dtype == torch.float64 else x_BCHW.float()
    mean = _mean_over_all(wide.mean(dims))
    shape = [1, -1, *[1] * (x_BCHW.ndim - 2)]
    variance = _mean_over_all((wide - mean.view(shape)).square().mean(dims))
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            norm.running_mean.lerp_(mean, norm.momentum)  # type: ignore[union-attr, arg-type]
            norm.running_var.lerp_(variance * n / (n - 1), norm.momentum)  # type: ignore[union-attr, arg-type]
    scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    y = (wide - mean.view(shape)) * scale.view(shape)
    y = (y if norm.bias is None else y + norm.bias.view(shape)).to(x_BCHW.dtype)
    return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y


def share_buffers(model: nn.Module, here: World) -> None:
    """Give every worker rank 0's buffers, so that all validate the model that is saved."""
    if here.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def total(value: Tensor, here: World) -> Tensor:
    """The sum of a tensor over the workers."""
    if here.size > 1:
        dist.all_reduce(value)
    return value


def merge_everywhere(part: Moments, here: World) -> Moments:
    """Moments over all workers, merged in the order of the ranks: the same bits on each."""
    if here.size == 1:
        return part
    fields = [part.mx, part.my, part.sxx, part.syy, part.sxy]
    packed = torch.stack([torch.full_like(fields[0], part.n), *fields])
    parts = [torch.empty_like(packed) for _ in range(here.size)]
    dist.all_gather(parts, packed)
    merged = Moments(0, *fields)
    for n, *rest in parts:
        merged = merge(merged, Moments(float(n[0]), *rest))
    return merged


def barrier(here: World) -> None:
    """Wait until all workers are here."""
    if here.size > 1:
        dist.barrier()


def of_leader(text: str, here: World) -> str:
    """What the leading worker says, on each of them."""
    said = [text]
    if here.size > 1:
        dist.broadcast_object_list(said)
    return said[0]
