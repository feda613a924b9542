"""Several workers as one: who am I, and how are parts put together exactly.

Works under anything that has set up `torch.distributed` (Ray Train, torchrun); alone without it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
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


def wrap(model: nn.Module, here: World, device: torch.device) -> nn.Module:
    """Average gradients over the workers; the bare model in a world of one."""
    if here.size == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # Buffers (BatchNorm's running statistics) are made equal once an epoch, by `share_buffers`.
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


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
