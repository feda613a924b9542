"""How near the real loop comes to the bare step, and how far it is from a loop of the usual kind.

    python -m benchmarks.train_step                               # ten backbones on the CPU
    python -m benchmarks.train_step --device cuda --batch 32 --rounds 20 --steps 20

Arms, in shuffled order within each round, all in one process with the launcher's allocator:

    bare    the same step on one batch that lies ready on the device: the limit
    ours    `train_epoch` of a real run from a store, everything included
    plain   benchmarks/plain.py, float32 as such loops are
    plain, started as usual   the same in a process of its own with the C library's defaults

Ratios are medians over the rounds of ratios within a round.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PlainLoop, write_files
from brstnet.config import Prepare, Protocol, Settings, Training
from brstnet.data.prepare import prepare
from brstnet.data.store import Store
from brstnet.data.synthetic import Demo, make_demo
from brstnet.launch import ALLOCATOR, restart_with_allocator
from brstnet.training.batches import rng
from brstnet.training.epoch import train_epoch
from brstnet.training.model import PAPER_BACKBONES, build_model
from brstnet.training.step import train_step
from brstnet.training.task import Progress, Run, prepare_task
from brstnet.training.train import start

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0, "T4": 65.0}
"""Dense bf16 (T4: fp16) of the maker's data sheets, SXM where there are several."""

HELD_OUT = "BC90006"


@dataclass(frozen=True)
class Arm:
    """One way to take steps: `take(n)` takes n of them."""

    name: str
    take: Callable[[int], None]


def make_store(folder: Path) -> Store:
    """Demo tissue as a store of 224 px patches."""
    demo = Demo(patients=6, sections_per_patient=1, spots_per_section=100, genes=2000)
    make_demo(folder / "raw", demo)
    settings = Prepare(layout="stnet", window_px=64, input_px=224, held_out=(HELD_OUT,))
    return prepare(folder / "raw", folder / "store", settings, progress=False)


def settings_for(backbone: str, batch: int, engine: Any) -> Settings:
    """The paper's training, with AuxNet."""
    training = Training(backbone=backbone, batch_size=batch, engine=engine, schedule="none")
    return Settings(protocol=Protocol(held_out=(HELD_OUT,), folds=2), training=training)


def bare_arm(run: Run) -> Arm:
    """The run's own engine on one batch that lies ready; with eager steps even its input is."""
    task = run.task
    rows_B = torch.from_numpy(task.train.rows[: task.training.batch_size]).to(task.device)
    batch = task.train.batch(rows_B, torch.zeros_like(rows_B))
    x, y_BG = task.units.input(batch), task.units.goal(batch)

    def take(steps: int) -> None:
        run.network.train()
        for _ in range(steps):
            if run.engine == "graph":
                run.learn(batch)
            else:
                train_step(
                    run.network, run.optimizer, x, y_BG, task.training.aux_weight, task.precision
                )

    return Arm("bare", take)


def real_arm(run: Run) -> Arm:
    """`train_epoch` over as many spots as the steps need, drawn anew each time."""
    whole, size = run.task.train.rows, run.task.training.batch_size

    def take(steps: int) -> None:
        drawn = rng(run.progress.epoch + 2).choice(whole, steps * size)
        run.task = replace(run.task, train=replace(run.task.train, rows=drawn))
        run.progress = Progress(epoch=run.progress.epoch + 1)
        train_epoch(run)

    return Arm("ours", take)


def plain_arm(run: Run, folder: Path) -> Arm:
    """The usual loop on files of the same spots."""
    task = run.task
    if not folder.is_dir():
        write_files(folder, task.train, task.train.rows[: 16 * task.training.batch_size])
    input_px = int(task.train.maps[0].shape[1])
    model = build_model(task.training, task.fitted, input_px)
    model = model.to(task.device).to(memory_format=torch.contiguous_format)
    loop = PlainLoop(folder, task.fitted, model, task.device, task.training.batch_size)

    def take(steps: int) -> None:
        for _ in range(steps):
            loop.step(task.training.aux_weight)

    return Arm("plain", take)


def seconds(arm: Arm, steps: int, device: torch.device) -> float:
    """Seconds a step, the device waited for."""
    began = time.perf_counter()
    arm.take(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def step_flop(run: Run) -> float:
    """Floating point operations of a step: three times those of the forward pass.

    PyTorch's counter ignores groups in the backward pass of depthwise convolutions.
    """
    model = build_model(run.task.training, run.task.fitted, 224).to(run.task.device).eval()
    x = torch.zeros(1, 3, 224, 224, device=run.task.device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return 3.0 * counter.get_total_flops() * run.task.training.batch_size


def measure(
    args: argparse.Namespace, backbone: str, store: Store, folder: Path
) -> dict[str, object]:
    """One backbone: medians of seconds a step, and of ratios within rounds."""
    device = torch.device(args.device)
    settings = settings_for(backbone, args.batch, args.engine)
    task, model = prepare_task(store, settings, 0, device)
    run = start(task, model, folder / "run")
    arms = [bare_arm(run), real_arm(run), plain_arm(run, folder / f"files_{args.batch}")]
    for arm in arms:
        arm.take(2)
    order, found = random.Random(0), {arm.name: list[float]() for arm in arms}
    for _ in range(args.rounds):
        for arm in order.sample(arms, len(arms)):
            found[arm.name].append(seconds(arm, args.steps, device))
        if args.usual:
            found.setdefault("usual", []).append(as_usual(args, backbone, folder))
    middle = {name: float(np.median(values)) for name, values in found.items()}
    of_limit = np.array(found["bare"]) / np.array(found["ours"])
    gain = np.array(found["plain"]) / np.array(found["ours"])
    result: dict[str, Any] = {
        "backbone": backbone,
        "engine": run.engine,
        "precision": str(task.precision).removeprefix("torch."),
        "batch": args.batch,
        "img_per_s": {name: args.batch / value for name, value in middle.items()},
        "ours_of_bare": quartiles(of_limit),
        "ours_over_plain": quartiles(gain),
        "step_tflops": step_flop(run) / middle["bare"] / 1e12,
    }
    if args.usual:
        result["ours_over_usual"] = quartiles(np.array(found["usual"]) / np.array(found["ours"]))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((tf for key, tf in PEAK_TFLOPS.items() if key in name), float("nan"))
        result["share_of_peak"] = result["step_tflops"] / peak
    return result


def quartiles(values: np.ndarray) -> list[float]:
    """Median, and the quartiles round it."""
    return [float(np.quantile(values, q)) for q in (0.5, 0.25, 0.75)]


def as_usual(args: argparse.Namespace, backbone: str, folder: Path) -> float:
    """Seconds a step of the plain loop in a process that was started without our allocator."""
    own = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    command = [sys.executable, "-m", "benchmarks.train_step", "--device", args.device]
    command += ["--batch", str(args.batch), "--steps", str(args.steps), "--threads"]
    command += [str(args.threads), "--backbones", backbone, "--only_plain", str(folder)]
    done = subprocess.run(command, env=own, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def only_plain(args: argparse.Namespace) -> None:
    """What the process of `as_usual` does."""
    store = Store(args.only_plain / "store")
    settings = settings_for(args.backbones[0], args.batch, "eager")
    device = torch.device(args.device)
    task, model = prepare_task(store, settings, 0, device)
    arm = plain_arm(
        start(task, model, args.only_plain / "run"), args.only_plain / f"files_{args.batch}"
    )
    arm.take(2)
    print(seconds(arm, args.steps, device))


def row(result: Mapping[str, Any]) -> str:
    """A line of the table."""

    def ratio(name: str, digits: int) -> str:
        if name not in result:
            return "-"
        middle, low, high = result[name]
        return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    cells = [
        f"{result['backbone']:16}",
        f"{result['precision']}, {result['engine']}",
        *(f"{result['img_per_s'][name]:8.1f}" for name in ("bare", "ours", "plain")),
        ratio("ours_of_bare", 3),
        ratio("ours_over_plain", 2),
        ratio("ours_over_usual", 2),
        f"{result['step_tflops']:.3f}",
        f"{result['share_of_peak']:.1%}" if "share_of_peak" in result else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=list(PAPER_BACKBONES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--usual", action="store_true", help="and the plain loop as usually started"
    )
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--only_plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_plain:
        only_plain(args)
        return
    names = ["backbone", "precision, engine", "bare img/s", "ours", "plain", "ours / bare"]
    names += ["ours / plain", "ours / plain as usual", "TFLOP/s", "of the card's"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch))
        for backbone in args.backbones:
            result = measure(args, backbone, store, Path(scratch))
            print(row(result), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    if "--only_plain" not in sys.argv:
        restart_with_allocator("benchmarks.train_step")
    main()
