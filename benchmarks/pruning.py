"""What pruning saves and what it loses: recorded learning curves, replayed through the Pruner.

    python -m benchmarks.pruning                                # the curves in benchmarks/curves
    python -m benchmarks.pruning MINE.parquet --plot pruning.png
    python -m benchmarks.pruning --record runs/NAME --out MINE.parquet      # a sweep, pruning: none

Every configuration was trained to its end, so what a stopped trial would have come to is known. A
replay draws configurations, runs them in `--slots` at once through the Pruner that sweeps use, and
looks at what is complete at the end.

*epochs*: share of those without pruning. *best*: true score of the best complete trial. *regret*:
how far that is below the best that was drawn. *winner lost*: how often the best that was drawn is
not what was chosen. *same best*: how many times fewer epochs than without pruning until the best
complete trial is as good, on average, where what is saved goes into more configurations (drawn with
replacement; trials that are still running are paid for). Errors are standard errors over replays of
one recording; another recording differs by more.

In the arm *per fold* each (configuration, fold) is a trial of its own, compared with all others; a
configuration counts with the mean of the folds that it completed, if any. The folds that the chosen
one lacks are trained afterwards, and counted.
"""

import argparse
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.recording import Curves, Unit, beside, read_curves, record
from sweeps.pruning import Pruner

HERE = Path(__file__).parent / "curves"
BATCHES = 10
"""Groups of replays whose spread is the error of a figure that is no mean over replays."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to prune. Without a grace period there are no rungs, without a p no paired test."""

    name: str
    grace_folds: float | None = None
    reduction_factor: int = 3
    paired_p: float | None = None
    per_fold: bool = False

    def pruner(self, folds: int) -> Pruner:
        """A new judge for trials of so many folds."""
        pruner = Pruner(
            folds=folds,
            grace_folds=self.grace_folds or 1,
            reduction_factor=self.reduction_factor,
            paired_p=self.paired_p,
        )
        if self.grace_folds is None:
            pruner.rungs = ()
        return pruner


ARMS = (
    Arm(name="no pruning"),
    Arm(name="fold ends, 1 in 2 from 1", grace_folds=1, reduction_factor=2),
    Arm(name="fold ends, 1 in 3 from 1", grace_folds=1),
    Arm(name="rungs, 1 in 2 from .25", grace_folds=0.25, reduction_factor=2),
    Arm(name="rungs, 1 in 3 from .25", grace_folds=0.25),
    Arm(name="rungs, 1 in 4 from .25", grace_folds=0.25, reduction_factor=4),
    Arm(name="rungs, 1 in 2 from .5", grace_folds=0.5, reduction_factor=2),
    Arm(name="rungs, 1 in 3 from .5", grace_folds=0.5),
    Arm(name="rungs, 1 in 4 from .5", grace_folds=0.5, reduction_factor=4),
    Arm(name="paired .1", paired_p=0.1),
    Arm(name="paired .3", paired_p=0.3),
    Arm(name="1 in 3 from .25, paired .1", grace_folds=0.25, paired_p=0.1),
    Arm(name="1 in 2 from .5, paired .1", grace_folds=0.5, reduction_factor=2, paired_p=0.1),
    Arm(name="1 in 3 from .5, paired .05", grace_folds=0.5, paired_p=0.05),
    Arm(name="1 in 3 from .5, paired .1", grace_folds=0.5, paired_p=0.1),
    Arm(name="1 in 3 from .5, paired .3", grace_folds=0.5, paired_p=0.3),
    Arm(name="per fold, 1 in 3 from .25", grace_folds=0.25, per_fold=True),
    Arm(name="per fold, 1 in 3 from .5", grace_folds=0.5, per_fold=True),
)
"""A factor of 3 where nothing else is said."""


@dataclass(frozen=True)
class Done:
    """A unit that was not stopped, and the epochs that all had spent by then."""

    spent: int
    unit: Unit


def simulate(
    units: Sequence[Unit], pruner: Pruner, epochs: int, slots: int, budget: float = np.inf
) -> tuple[list[Done], int]:
    """Run units in order, `slots` at once; those that were not stopped, and the epochs spent.

    A unit reports when a rung is due and at the end of a fold; the pruner is asked in the order of
    the times at which that happens, as it is in a sweep.
    """
    moments = moments_of(pruner, len(units[0].running), epochs)
    waiting = iter(range(len(units)))
    heap: list[tuple[float, int, int]] = []
    done: list[Done] = []
    spent = 0

    def run_on(now: float, number: int, stage: int) -> None:
        begin, end = moments[stage], moments[stage + 1]
        seconds = float(units[number].seconds[begin:end].sum())
        heapq.heappush(heap, (now + seconds, number, stage + 1))

    for number in itertools.islice(waiting, slots):
        run_on(0.0, number, 0)
    while heap and spent < budget:
        now, number, stage = heapq.heappop(heap)
        unit, at = units[number], moments[stage]
        spent += min(at, unit.ran) - moments[stage - 1]
        if goes_on(unit, number, at, epochs, pruner):
            run_on(now, number, stage)
            continue
        if at == len(unit.running) and np.isfinite(unit.score):
            done.append(Done(spent, unit))
        if (following := next(waiting, None)) is not None:
            run_on(now, following, 0)
    return done, spent


def moments_of(pruner: Pruner, total: int, epochs: int) -> list[int]:
    """Epochs after which a unit reports, 0 before them: where a rung is due, and ends of folds."""
    ticks = range(1, total + 1)
    due = [t for t in ticks if t % epochs == 0 or pruner.due((t - 1) / epochs, t / epochs)]
    return [0, *due]


def goes_on(unit: Unit, number: int, at: int, epochs: int, pruner: Pruner) -> bool:
    """Whether a unit trains on after so many epochs: not if it failed, is whole, or is stopped."""
    sections = unit.sections[at // epochs]
    if unit.ran <= at and not np.isfinite(unit.score):
        return False
    if at == len(unit.running):
        pruner.complete(number, unit.score, sections)
        return False
    return not pruner.judge(number, at / epochs, float(unit.running[at - 1]), sections)


def units_of(curves: Curves, arm: Arm) -> list[list[Unit]]:
    """What an arm runs for each configuration, in order."""
    if not arm.per_fold:
        return [[curves.whole(c)] for c in range(len(curves.score_CFE))]
    folds = range(curves.folds)
    return [[curves.single(c, f) for f in folds] for c in range(len(curves.score_CFE))]


def choices(done: Sequence[Done]) -> Iterator[tuple[int, int, int]]:
    """After each unit that ended: epochs spent, the best configuration, how many folds it has.

    Best by the mean over what it completed, which is what one has to choose on.
    """
    scores: dict[int, dict[int, float]] = {}
    means: dict[int, float] = {}
    for ended in done:
        unit = ended.unit
        by_fold = scores.setdefault(unit.config, {})
        by_fold[unit.fold] = unit.score
        means[unit.config] = float(np.mean(list(by_fold.values())))
        best = max(means, key=means.__getitem__)
        yield ended.spent, best, len(scores[best])


def lacking(curves: Curves, arm: Arm, folds: int) -> int:
    """Epochs of the folds that a chosen configuration still lacks."""
    return (curves.folds - folds) * curves.epochs if arm.per_fold else 0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A recording and how it is replayed."""

    curves: Curves
    draws: int
    slots: int
    repeats: int
    seed: int = 0

    @property
    def whole_sweep(self) -> int:
        """Epochs of `draws` configurations that are trained to their end."""
        return self.draws * self.curves.folds * self.curves.epochs

    def drawn(self, count: int, *, replace: bool) -> Iterator[np.ndarray]:
        """The configurations of each replay; the same for all arms."""
        for repeat in range(self.repeats):
            rng = np.random.default_rng([self.seed, repeat])
            yield rng.choice(len(self.curves.score_CFE), count, replace=replace)

    def run(
        self, arm: Arm, units: list[list[Unit]], configs: np.ndarray, budget: float = np.inf
    ) -> tuple[list[Done], int]:
        """One replay."""
        queue = [unit for config in configs for unit in units[config]]
        pruner = arm.pruner(1 if arm.per_fold else self.curves.folds)
        return simulate(queue, pruner, self.curves.epochs, self.slots, budget)


def sweeps_info(bench: Bench, arm: Arm) -> pd.DataFrame:
    """Each replay over `draws` different configurations: cost, the chosen's score, the loss."""
    curves, units, rows = bench.curves, units_of(bench.curves, arm), []
    whole_C = np.array([curves.whole(c).ran for c in range(len(curves.score_CFE))])
    true_C = np.nan_to_num(curves.final_C, nan=0.0)
    for configs in bench.drawn(bench.draws, replace=False):
        done, spent = bench.run(arm, units, configs)
        chosen = list(choices(done))
        best = true_C[chosen[-1][1]] if chosen else 0.0
        spent += lacking(curves, arm, chosen[-1][2]) if chosen else 0
        regret = true_C[configs].max() - best
        share = spent / whole_C[configs].sum()
        rows.append({"share": share, "best": best, "regret": regret, "lost": regret > 0})
    return pd.DataFrame(rows).astype(float)


def stream_info(bench: Bench, arm: Arm) -> np.ndarray:
    """True score of the chosen after each epoch spent (repeats, epochs), from an endless stream."""
    units, budget = units_of(bench.curves, arm), bench.whole_sweep
    true_C = np.nan_to_num(bench.curves.final_C, nan=0.0)
    best_RT = np.zeros((bench.repeats, budget + 1))
    for repeat, configs in enumerate(bench.drawn(10 * bench.draws, replace=True)):
        done, _ = bench.run(arm, units, configs, budget)
        for spent, chosen, folds in choices(done):
            best_RT[repeat, spent + lacking(bench.curves, arm, folds) :] = true_C[chosen]
    return best_RT


def times_fewer(best_RT: np.ndarray, full_RT: np.ndarray) -> float:
    """How many times fewer epochs an arm needs for what no pruning reaches at the end of them."""
    goal = full_RT[:, -1].mean() - 1e-12
    reached = np.flatnonzero(best_RT.mean(axis=0) >= goal)
    return (full_RT.shape[1] - 1) / reached[0] if len(reached) else np.nan


def compare(bench: Bench, arms: Sequence[Arm]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """All arms: a table of figures and their errors, and the course of the best score."""
    rows, courses = [], {}
    for arm in arms:
        info = sweeps_info(bench, arm)
        courses[arm.name] = best_RT = stream_info(bench, arm)
        full_RT = courses[arms[0].name]
        parts = [times_fewer(best_RT[b::BATCHES], full_RT[b::BATCHES]) for b in range(BATCHES)]
        errors = info.sem().add_suffix("_se")
        same = {
            "same_best": times_fewer(best_RT, full_RT),
            "same_best_se": np.nanstd(parts, ddof=1) / np.sqrt(BATCHES),
        }
        rows.append({"arm": arm.name, **info.mean(), **errors, **same})
    return pd.DataFrame(rows), courses


def show(table: pd.DataFrame, bench: Bench) -> None:
    """Print the table."""
    curves, final_C = bench.curves, bench.curves.final_C
    print(f"\n{curves.name}: {curves.protocol}.")
    print(
        f"{len(final_C)} configurations, {curves.folds} folds, {curves.epochs} epochs a fold;",
        end=" ",
    )
    print(f"best {np.nanmax(final_C):.4f}, median {np.nanmedian(final_C):.4f}", end=", ")
    print(f"{np.isnan(final_C).sum()} failed; {bench.draws} drawn, {bench.slots} slots,", end=" ")
    print(f"{bench.repeats} replays.\n")
    print("| arm | epochs | times fewer | best | regret | winner lost | same best, times fewer |")
    print("|---|---|---|---|---|---|---|")
    for row in table.to_dict("records"):
        cells = [
            row["arm"],
            f"{row['share']:.1%} +- {row['share_se']:.1%}",
            f"{1 / row['share']:.2f}",
            f"{row['best']:.4f}",
            f"{row['regret']:.4f} +- {row['regret_se']:.4f}",
            f"{row['lost']:.1%} +- {row['lost_se']:.1%}",
            f"{row['same_best']:.2f} +- {row['same_best_se']:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def plot_courses(found: dict[str, dict[str, np.ndarray]]) -> Figure:
    """The mean best score against the epochs spent, a panel for each recording."""
    figure = Figure(figsize=(6 * len(found), 4.5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, courses) in zip(panels, found.items(), strict=True):
        for arm, best_RT in courses.items():
            share_T = np.linspace(0, 1, best_RT.shape[1])
            axes.plot(share_T, best_RT.mean(axis=0), label=arm, lw=1.2)
        axes.set(title=name, xlabel="epochs spent", ylabel="mean true score of the chosen")
        axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Replay, or record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("curves", nargs="*", type=Path, help="recordings; default: all beside this")
    parser.add_argument("--draws", type=int, default=32, help="configurations of a sweep")
    parser.add_argument("--slots", type=int, default=4, help="trials at once")
    parser.add_argument("--repeats", type=int, default=300, help="replays of each arm")
    parser.add_argument("--arms", default="", help="only those whose name has this in it")
    clock = "what time an epoch takes: as recorded, or the same for all configurations"
    parser.add_argument("--clock", choices=["epochs", "seconds"], default="epochs", help=clock)
    parser.add_argument("--plot", type=Path, help="draw the course of the best score")
    parser.add_argument("--record", type=Path, help="folder of a sweep: write its curves to --out")
    parser.add_argument("--out", type=Path, help="parquet file that --record writes")
    args = parser.parse_args()
    if args.record:
        if not args.out:
            parser.error("--record wants --out FILE")
        record(args.record, args.out)
        return
    files = args.curves or [f for f in sorted(HERE.glob("*.parquet")) if beside(f).is_file()]
    arms = [ARMS[0], *(arm for arm in ARMS[1:] if args.arms in arm.name)]
    found = {}
    for file in files:
        curves = read_curves(file)
        if args.clock == "epochs":
            curves = curves.in_step()
        bench = Bench(curves=curves, draws=args.draws, slots=args.slots, repeats=args.repeats)
        table, found[curves.name] = compare(bench, arms)
        show(table, bench)
    if args.plot:
        plot_courses(found).savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
