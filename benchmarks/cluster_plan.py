"""What sweeps cost on 1, 8 and 64 GPUs, and what holds them up: a simulation, nothing is trained.

    python -m benchmarks.cluster_plan
    python -m benchmarks.cluster_plan --prices 2.9 1.4      # USD per GPU-hour, on demand and spot
    python -m benchmarks.cluster_plan --rates MINE.yaml --devices h100 --gpus 1 4 16

Three sweeps: the paper's table, the default search on the paper's data set, and the same search on
a cohort of 1,200 sections. What is known of speed, prices and clusters is in `rates.yaml`, each
figure marked measured, derived, set (in this project or Ray) or assumed.

Trials of unequal length take GPUs that boot, join, copy the store once, and on spot are lost now
and then with what was not saved; the probe comes before the search and the finalists' repeats after
it. Who is stopped at a rung is asked of the sweeps' own Pruner, without its paired test, in the
order in which trials get there. Wall-clock and cost are means over `--repeats` simulations with
scores, backbones and interruptions drawn anew. Shares are of the GPUs that the sweep uses at most,
times its wall-clock: a GPU is idle while it waits for a phase's last trials, has not come yet, or
was released.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.cluster_simulation import Cluster, Job, Outcome, Simulation, epoch_seconds
from brstnet.training.batches import SHARE_OF_FREE_MEMORY
from sweeps.plan import describe, estimate
from sweeps.probe import STEPS, Speed, kinds
from sweeps.pruning import Pruner
from sweeps.run import parse
from sweeps.space import Sweep, first_points

RATES = Path(__file__).with_name("rates.yaml")
SWEEPS = Path(__file__).parents[1] / "sweeps"
FORMAT = "brstnet-rates 1"
MARKS = ("measured", "derived", "set", "assumed")
INPUT_PX = 224
PATCH_BYTES = 3 * INPUT_PX**2
H100_FLOPS, H100_BYTES = 400e12, 2.8e12
"""Sustained arithmetic and memory traffic, assumed."""
PARTS = 5
"""Of a fold, at whose ends it is looked anew at who else writes to the shared file system."""

MOVES = {
    "idle in the probe": "a probe that begins before all GPUs are asked for",
    "idle in the search": "fewer GPUs; a trial's folds or workers (workers_per_trial) in parallel",
    "idle in the repeats": "repeats that begin before the search's last trial has ended",
    "start-up": "min_workers above 0, an image with the environment, faster upscaling_speed",
    "store copy": "an image or a disk snapshot with the store; a faster disk; a smaller window",
    "fold set-up": "keep each fold's statistics for all trials instead of fitting them anew",
    "validation": "validate every few epochs; one view",
    "shared files": "checkpoints on the node's disk, sent every few minutes; a faster file system",
    "driver": "several sweeps, each with its own driver",
    "hand-over": "longer trials",
    "redone after spot": "save more often; on demand for the last trials",
}
"""What time goes to beside training steps, and what would move it."""


# --- what is known


@dataclass(frozen=True)
class Rate:
    """Patches a second of one device, and how that is known."""

    value: float
    mark: str
    formula: str


class Known:
    """A rates file: step rates of devices, costs of backbones, and settings.

    Raises:
        ValueError: the file is of another format, or a figure lacks its unit, mark or source.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path}: must begin with format: {FORMAT}; copy {RATES.name}")
        self.devices: dict[str, dict[str, Any]] = content["devices"]
        self.settings: dict[str, dict[str, Any]] = content["settings"]
        self._costs: dict[str, dict[str, float]] = content["backbones"]
        for name, device in self.devices.items():
            asked = {"costs", "input_px", "patches_per_second", "source"}
            asked |= {"share"} if device.get("costs") == "limits" else set()
            if set(device) != asked or device["costs"] not in ("gflop", "operations", "limits"):
                raise ValueError(
                    f"{path}: devices.{name} must have {', '.join(sorted(asked))}, with costs: "
                    f"gflop, operations or limits (and then a share); got {device}"
                )
        for name, entry in self.settings.items():
            if set(entry) != {"value", "unit", "mark", "source"} or entry["mark"] not in MARKS:
                raise ValueError(
                    f"{path}: settings.{name} must have value, unit, source and a mark of "
                    f"{', '.join(MARKS)}; got {entry}"
                )

    def __getitem__(self, name: str) -> float:
        """The value of a setting.

        Raises:
            ValueError: it is not there.
        """
        if name not in self.settings:
            raise ValueError(f"{self.path}: settings.{name} is missing; {RATES.name} has it")
        return float(self.settings[name]["value"])

    def rate(self, device: str, backbone: str) -> Rate:
        """A backbone's rate on a device: as measured, or derived from the nearest that was.

        Raises:
            ValueError: nothing was measured that it could be derived from.
        """
        if device not in self.devices:
            raise ValueError(f"{self.path}: no device {device}; it has {', '.join(self.devices)}")
        entry = self.devices[device]
        rates, costs, px = entry["patches_per_second"], entry["costs"], entry["input_px"]
        if backbone in rates and px == INPUT_PX:
            return Rate(float(rates[backbone]), "measured", f"as measured at {px} px")
        cost = self._cost(backbone)
        if costs == "limits":
            return _of_limits(cost, entry["share"])
        known = {name: self._cost(name)[costs] for name in rates}
        if not known:
            raise ValueError(
                f"{self.path}: device {device} has no measured rate, so none can be derived for "
                f"{backbone}: measure with python -m benchmarks.train_step --device cuda"
            )
        near = min(known, key=lambda name: abs(math.log(known[name] / cost[costs])))
        pixels = (px / INPUT_PX) ** 2 if costs == "gflop" else 1.0
        value = rates[near] * known[near] / cost[costs] * pixels
        formula = f"{rates[near]:g} ({near}, {px} px) x {known[near]:g} / {cost[costs]:g} {costs}"
        if pixels != 1:
            formula += f" x ({px} / {INPUT_PX})^2"
        return Rate(value, "derived", formula)

    def _cost(self, backbone: str) -> dict[str, float]:
        if backbone not in self._costs:
            raise ValueError(
                f"{self.path}: {backbone} has neither a measured rate nor costs to derive one "
                "from: add it to patches_per_second or to backbones"
            )
        return self._costs[backbone]

    def model_mb(self, backbone: str) -> float:
        """Size of the weights in float32."""
        return 4 * self._cost(backbone)["parameters_m"]


def _of_limits(cost: dict[str, float], share: float) -> Rate:
    """A share of what an H100's arithmetic and memory allow: a goal, not a measurement."""
    flops, traffic = H100_FLOPS / (cost["gflop"] * 1e9), H100_BYTES / (cost["traffic_gb"] * 1e9)
    text = f"{share:g} x min({flops:,.0f} by FLOPs, {traffic:,.0f} by traffic)"
    return Rate(share * min(flops, traffic), "assumed", text)


# --- what is to be trained


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set: what the folds share out, and what a node must hold."""

    name: str
    sections: int
    held_out: int
    spots: float
    trainable: float
    """Spots that pass the white filter, which training takes."""

    @classmethod
    def like_the_papers(cls, name: str, sections: int) -> "Data":
        """So many sections with the paper's mean of spots a section (28,792 and 27,652 of 68)."""
        share = sections / 68
        spots, trainable = 28_792 * share, 27_652 * share
        return cls(name=name, sections=sections, held_out=3, spots=spots, trainable=trainable)

    def store_gb(self, count_bytes: float) -> float:
        """Patches of 224 px and counts."""
        return self.spots * (PATCH_BYTES + count_bytes) / 1e9

    def in_folds(self) -> float:
        """The share that is not held out."""
        return 1 - self.held_out / self.sections


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A sweep on a data set."""

    name: str
    sweep: Sweep
    data: Data


def scenarios() -> list[Scenario]:
    """The paper's table, the default search, and the search on a cohort."""
    paper, search = (parse([str(SWEEPS / f"{name}.yaml")])[0] for name in ("paper", "search"))
    theirs = Data.like_the_papers("paper's", 68)
    cohort = Data.like_the_papers("cohort", 1200)
    return [
        Scenario(name="paper's table", sweep=paper, data=theirs),
        Scenario(name="search", sweep=search, data=theirs),
        Scenario(name="search, cohort", sweep=search, data=cohort),
    ]


def feed(known: Known, data: Data) -> tuple[str, float]:
    """Where a node keeps the patches, and how many a second it can bring from there."""
    gb = data.spots * PATCH_BYTES / 1e9
    if gb <= SHARE_OF_FREE_MEMORY * known["gpu_memory_gb"]:
        return "GPU memory", math.inf
    if data.store_gb(known["count_bytes"]) <= SHARE_OF_FREE_MEMORY * known["host_memory_gb"]:
        return "host memory", known["gather_patches"]
    return "disk", known["copy_mb"] * 1e6 / PATCH_BYTES


def speeds(known: Known, scenario: Scenario, device: str) -> list[Speed]:
    """What the probe would say of each kind of trial, from the rates instead."""
    sweep, data = scenario.sweep, scenario.data
    folds, (_, most) = sweep.protocol.folds, feed(known, data)
    train = data.trainable * data.in_folds() * (folds - 1) / folds
    validated = data.spots * data.in_folds() / folds
    setup = known["setup_seconds_per_spot"] * data.spots * data.in_folds()
    found = []
    for point in kinds(sweep):
        settings = sweep.settings(point).training
        rate = min(known.rate(device, settings.backbone).value, most)
        views = settings.views if settings.stopping == "early" else 1
        found.append(
            Speed(
                point=point,
                setup_seconds=setup,
                step_seconds=settings.batch_size / rate,
                validation_seconds=views * validated / min(rate * known["validation_speed"], most),
                steps=math.ceil(train / settings.batch_size),
                epochs=settings.epochs,
                patches_per_second=rate,
                model_mb=known.model_mb(settings.backbone),
            )
        )
    return found


# --- the simulated sweep


def cluster_of(known: Known, gpus: int, data: Data, *, spot: bool, at_once: int | None) -> Cluster:
    """A cluster as the rates file has it."""
    return Cluster(
        gpus=gpus,
        at_once=at_once,
        boot_seconds=known["boot_seconds"] + known["join_seconds"],
        copy_seconds=data.store_gb(known["count_bytes"]) * 1e3 / known["copy_mb"],
        first_nodes=known["first_nodes"],
        upscaling_speed=known["upscaling_speed"],
        idle_seconds=known["idle_seconds"],
        interruptions=known["interruptions"] if spot else 0.0,
        save_seconds=known["save_seconds"],
        driver_seconds=1 / known["driver_trials"],
        hand_over_seconds=known["hand_over_seconds"],
        end_fold_seconds=known["end_fold_seconds"],
        epoch_write_seconds=known["saved_copies"] / known["shared_mb"],
    )


def jobs_of(
    scenario: Scenario, found: Sequence[Speed], rng: np.random.Generator
) -> dict[str, list[Job]]:
    """The probe, the search, and the finalists' repeats of a sweep.

    Backbones are the first points' where they say one, else drawn evenly; a search would come to
    prefer some. Finalists are drawn too.
    """
    sweep, folds = scenario.sweep, scenario.sweep.protocol.folds
    of = {speed.point.get("backbone", sweep.training.backbone): speed for speed in found}
    points = first_points(sweep)[: sweep.count]
    asked = [point.get("backbone", sweep.training.backbone) for point in points]
    drawn = [str(name) for name in rng.choice(list(of), sweep.count - len(asked))]
    rungs = judge_of(sweep).rungs if sweep.pruning != "none" else ()
    stops = sorted({*rungs, *(part / PARTS for part in range(1, folds * PARTS + 1))})
    scores = rng.permutation(sweep.count)
    probed = [
        Job(number=-1 - number, speed=_few_steps(speed), stops=[1.0])
        for number, speed in enumerate(found)
    ]
    trials = [
        Job(number=number, speed=of[name], stops=stops, score=float(scores[number]))
        for number, name in enumerate([*asked, *drawn])
    ]
    repeats = [
        Job(number=sweep.count + number, speed=found[int(rng.integers(len(found)))], stops=[folds])
        for number in range(min(sweep.finalists, sweep.count) * (sweep.seeds - 1))
    ]
    return {"probe": probed, "search": trials, "repeats": repeats}


def _few_steps(speed: Speed) -> Speed:
    """What the probe takes: a fold made ready and a few steps."""
    return Speed(
        point=speed.point,
        setup_seconds=speed.setup_seconds,
        step_seconds=speed.step_seconds,
        steps=STEPS + 1,
        epochs=1,
    )


def judge_of(sweep: Sweep) -> Pruner:
    """The sweep's Pruner without its paired test, which would want scores of sections."""
    return Pruner(
        folds=sweep.protocol.folds,
        grace_folds=sweep.grace_folds,
        reduction_factor=sweep.reduction_factor,
        paired_p=None,
    )


def simulate(
    known: Known,
    scenario: Scenario,
    found: Sequence[Speed],
    gpus: int,
    *,
    spot: bool,
    repeats: int,
) -> Outcome:
    """The mean outcome of a sweep over several simulations."""
    sweep, total = scenario.sweep, Outcome()
    at_once = None
    if sweep.search in ("tpe", "cmaes"):
        at_once = max(1, round(sweep.count * known["at_once_share"]))
    cluster = cluster_of(known, gpus, scenario.data, spot=spot, at_once=at_once)
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        judge = judge_of(sweep) if sweep.pruning != "none" else None
        phases = jobs_of(scenario, found, rng)
        out = Simulation(cluster, judge, rng).run(phases)
        total.wall += out.wall / repeats
        total.paid += out.paid / repeats
        total.nodes = max(total.nodes, out.nodes)
        for name, seconds in out.parts.items():
            total.parts[name] += seconds / repeats
    return total


# --- what is told


def hours(seconds: float) -> str:
    """Hours, with days where they are many."""
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} d"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates_table(known: Known, asked: Sequence[Scenario], devices: Sequence[str]) -> str:
    """Every rate that is used, and how it is known."""
    names = list(dict.fromkeys(kind["backbone"] for s in asked for kind in kinds(s.sweep)))
    rows = [
        [name, device, f"{rate.value:,.{0 if rate.value >= 100 else 1}f}", rate.mark, rate.formula]
        for device in devices
        for name in names
        for rate in [known.rate(device, name)]
    ]
    return table(["backbone", "device", "patches/s", "known", "how"], rows)


def data_table(known: Known, asked: Sequence[Scenario]) -> str:
    """What each data set asks of a node."""
    rows = []
    for data in {s.data.name: s.data for s in asked}.values():
        where, most = feed(known, data)
        gb = data.store_gb(known["count_bytes"])
        setup = known["setup_seconds_per_spot"] * data.spots * data.in_folds()
        rows.append(
            [
                data.name,
                f"{data.sections:,}",
                f"{data.spots:,.0f}",
                f"{gb:,.1f} GB",
                f"{gb * 1e3 / known['copy_mb']:,.0f} s",
                where + ("" if math.isinf(most) else f", {most:,.0f} patches/s at most"),
                f"{setup:,.0f} s",
                f"{math.ceil(data.trainable * data.in_folds() * 0.8 / 32):,}",
            ]
        )
    head = ["data set", "sections", "spots", "store", "copy to a node", "patches lie in"]
    return table([*head, "set-up of a fold", "steps an epoch (5 folds, batch 32)"], rows)


def sweep_row(
    known: Known, scenario: Scenario, found: Sequence[Speed], gpus: int, repeats: int
) -> list[str]:
    """Cost, wall-clock and bottleneck of one sweep on one cluster."""
    plan = estimate(scenario.sweep, found, gpus, 1.0)
    steady, spot = (
        simulate(known, scenario, found, gpus, spot=s, repeats=repeats) for s in (False, True)
    )
    head = known["price_head"] / 3600
    costs = [
        out.paid / 3600 * known[f"price_{name}"] + out.wall * head
        for out, name in ((steady, "on_demand"), (spot, "spot"))
    ]
    beside = ", ".join(f"{part} {share:.0%}" for part, share in bottlenecks(spot))
    each = [epoch_seconds(speed) for speed in found]
    told = spot.nodes * known["epoch_metrics"] / (sum(each) / len(each))
    return [
        f"{gpus}",
        f"{steady.nodes}",
        hours(plan.wall_seconds(plan.share)),
        hours(steady.wall),
        f"{costs[0]:,.0f}",
        hours(spot.wall),
        f"{costs[1]:,.0f}",
        f"{spot.parts['steps'] / spot.total:.0%}",
        beside,
        f"{told / known['mlflow_metrics']:.1%}",
    ]


def bottlenecks(out: Outcome) -> list[tuple[str, float]]:
    """The two largest shares of the GPUs' time beside training steps."""
    shares = {name: took / out.total for name, took in out.parts.items() if name != "steps"}
    return sorted(shares.items(), key=lambda item: -item[1])[:2]


def report(known: Known, args: argparse.Namespace) -> str:
    """The whole text."""
    asked = scenarios()
    parts = [describe(s.sweep, None).splitlines()[0] for s in asked[:2]]
    parts += [rates_table(known, asked, args.devices), data_table(known, asked)]
    head = ["sweep", "rates", "GPUs", "used", "plan's division", "on demand", "USD", "spot", "USD"]
    head += ["steps", "most beside steps", "MLflow's load"]
    rows = []
    for scenario, device in itertools.product(asked, args.devices):
        found = speeds(known, scenario, device)
        for gpus in args.gpus:
            row = sweep_row(known, scenario, found, gpus, args.repeats)
            rows.append([scenario.name, device, *row])
    parts.append(table(head, rows))
    told = [
        f"- {name}: {moves}" for name, moves in MOVES.items() if any(name in r[10] for r in rows)
    ]
    parts.append("What would move it:\n\n" + "\n".join(told))
    settings = [
        [name, f"{entry['value']:g} {entry['unit']}", entry["mark"], entry["source"]]
        for name, entry in known.settings.items()
    ]
    parts.append(table(["setting", "value", "known", "source"], settings))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=Path, default=RATES)
    parser.add_argument("--devices", nargs="+", default=["h100", "h100-goal"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument(
        "--prices", nargs=2, type=float, metavar=("ON_DEMAND", "SPOT"), help="USD per GPU-hour"
    )
    parser.add_argument("--repeats", type=int, default=20, help="simulations that are averaged")
    args = parser.parse_args(argv)
    try:
        known = Known(args.rates)
        for name, price in zip(("price_on_demand", "price_spot"), args.prices or (), strict=False):
            known.settings[name] |= {"value": price, "mark": "set", "source": "--prices"}
        print(report(known, args))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
