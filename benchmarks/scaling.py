"""What several workers bring: weak scaling (a batch each) and strong (one batch shared).

    python -m benchmarks.scaling --workers 1 2                     # gloo on the CPU, 1 thread each
    python -m benchmarks.scaling --workers 1 2 4 8 --device cuda   # nccl, a GPU each

Each number of workers trains real epochs (`train_epoch` under DDP) on the same store, and all take
turns for `--rounds`. Efficiency is patches a second over the workers times those of one worker of
the same round. `apart` is what the machine can do: as many processes, each training for itself, a
GPU each; `packed` is the same on one GPU, as a sweep's trials with a fraction of it
(`gpus_per_worker: 0.5`) are.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from benchmarks.train_step import make_store, settings_for
from brstnet.data.store import Store
from brstnet.launch import restart_with_allocator
from brstnet.training import distributed
from brstnet.training.epoch import train_epoch
from brstnet.training.task import Progress, prepare_task
from brstnet.training.train import start

ALONE = ("apart", "packed")
"""Kinds whose processes do not know of each other."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One measurement: its `kind` (see above), and the global `batch` of a training."""

    kind: str
    workers: int
    batch: int
    device: str
    backbone: str
    threads: int
    steps: int
    store: Path


def work(rank: int, plan: Plan, port: int) -> None:
    """One worker: warm up, time an epoch, write patches a second of the training it is in."""
    torch.set_num_threads(plan.threads)
    index = rank if plan.kind == "apart" else 0
    device = torch.device(plan.device, index) if plan.device == "cuda" else torch.device("cpu")
    if plan.kind not in ALONE:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(plan.workers), "LOCAL_RANK": str(rank)}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device = distributed.join(torch.device(plan.device))
    settings = settings_for(plan.backbone, plan.batch, "eager")
    task, model = prepare_task(Store(plan.store), settings, 0, device)
    rows = np.resize(task.train.rows, plan.steps * plan.batch)
    task = replace(task, train=replace(task.train, rows=rows))
    run = start(task, model, plan.store.parent / f"run_{rank}")
    train_epoch(run)
    run.progress = Progress(epoch=0)
    distributed.barrier(task.here)
    began = time.perf_counter()
    train_epoch(run)[1].read()
    distributed.barrier(task.here)
    speed = len(rows) / (time.perf_counter() - began)
    (plan.store.parent / f"speed_{rank}.json").write_text(json.dumps(speed))
    distributed.leave()


def patches_per_second(plan: Plan) -> float:
    """Of one training, or of all that run apart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (plan, port), nprocs=plan.workers)
    files = [plan.store.parent / f"speed_{rank}.json" for rank in range(plan.workers)]
    speeds = [float(json.loads(file.read_text())) for file in files]
    return sum(speeds) if plan.kind in ALONE else speeds[0]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=["apart", "weak", "strong"])
    parser.add_argument("--backbone", default="efficientnet_b0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="of one worker")
    parser.add_argument("--steps", type=int, default=4, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    args = parser.parse_args()
    found: dict[tuple[str, int, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch))
        for _ in range(args.rounds):
            for workers in args.workers:
                for kind in args.kinds:
                    batch = args.batch * (workers if kind == "weak" else 1)
                    plan = Plan(
                        kind=kind,
                        workers=workers,
                        batch=batch,
                        device=args.device,
                        backbone=args.backbone,
                        threads=args.threads,
                        steps=args.steps,
                        store=store.path,
                    )
                    speed = patches_per_second(plan)
                    found.setdefault((kind, workers, batch), []).append(speed)
    print("| scaling | workers | global batch | patches/s | gain over 1 | efficiency |")
    print("|---|---|---|---|---|---|")
    for (kind, workers, batch), values in found.items():
        alone = np.array(found[kind, 1, args.batch])
        gain = float(np.median(np.array(values) / alone))
        cells = (kind, workers, batch, f"{np.median(values):.1f}", f"{gain:.2f}")
        print("| " + " | ".join(map(str, cells)) + f" | {gain / workers:.0%} |", flush=True)


if __name__ == "__main__":
    restart_with_allocator("benchmarks.scaling")
    main()
