"""What a sweep will do, said before it is done, and refused where it cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from brstnet.data.store import Store
from brstnet.training.fitted import Fitted, fit_statistics
from brstnet.training.folds import Fold, make_folds
from brstnet.training.leaks import leak_gate
from sweeps.board import Budget
from sweeps.probe import Speed
from sweeps.pruning import expected_share, pruner_of
from sweeps.refit import check_refit
from sweeps.space import Sweep, choices, condition, first_points

SHOWN = 30
"""So many of the points to try first are written out."""


def describe(sweep: Sweep, store: Store | None) -> str:
    """The plan: protocol, folds, configurations; with a store also who is in which fold."""
    folds = sweep.protocol.folds
    lines = [
        f"sweep {sweep.name}: {sweep.count} configurations x {folds} folds = "
        f"{sweep.count * folds} trainings at most{_describe_pruning(sweep)}",
        f"protocol: {sweep.protocol.line()}",
        f"search: {sweep.search}, seed {sweep.seed}; {sweep.workers_per_trial} worker(s) a trial, "
        f"up to {sweep.training.epochs} epochs a fold ({sweep.training.stopping} stopping)",
    ]
    if sweep.seeds > 1:
        lines.append(f"finalists: the best {sweep.finalists}, each with {sweep.seeds} seeds in all")
    if store is not None:
        lines += _describe_folds(sweep, store)
    for name, values in sweep.space.items():
        wanted = condition(name, sweep.space)
        where = " and ".join(f"{k} is {' or '.join(map(str, v))}" for k, v in wanted.items())
        branch = f" (where {where})" if where else ""
        lines.append(f"  {name}: {_describe_range(values)}{branch}")
    points = first_points(sweep)[: sweep.count]
    for number, point in enumerate(points[:SHOWN]):
        text = ", ".join(f"{name}={value}" for name, value in point.items()) or "the defaults"
        paper = " (the paper's values of what is searched)" if number == 0 else ""
        lines.append(f"  trial {number:>3}: {text}{paper}")
    if len(points) > SHOWN:
        lines.append(f"  and {len(points) - SHOWN} more points")
    if sweep.count > len(points):
        lines.append(f"  trials {len(points)} to {sweep.count - 1}: drawn by {sweep.search}")
    return "\n".join(lines)


def _describe_pruning(sweep: Sweep) -> str:
    if sweep.pruning == "none":
        return ""
    pruner = pruner_of(sweep)
    rungs = ", ".join(f"{rung:g}" for rung in pruner.rungs)
    paired = "" if sweep.paired_p is None else f", and tested against the best (p {sweep.paired_p})"
    return f", pruned by ASHA after {rungs} folds{paired}"


def _describe_range(values: list[Any] | Mapping[str, Any]) -> str:
    if (listed := choices(values)) is not None:
        return " | ".join(map(str, listed))
    assert isinstance(values, Mapping)
    return f"{values['low']} to {values['high']}{', log scale' if values.get('log') else ''}"


def _describe_folds(sweep: Sweep, store: Store) -> list[str]:
    key = sweep.protocol.group
    lines = [f"store: {store.origin} ({store.digest})"]
    for fold in make_folds(store, sweep.protocol):
        groups = sorted({store.sections[name][key] for name in fold.validation})
        spots = sum(store.sections[name]["spots_kept"] for name in fold.train)
        lines.append(
            f"  fold {fold.number}: validates on {key} {', '.join(groups)}; trains on "
            f"{spots} spots of {len(fold.train)} sections"
        )
    return lines


def check_folds(sweep: Sweep, stores: Mapping[str, Store]) -> None:
    """Pass every fold's leak gate before anything is launched, with the most genes of the space.

    Args:
        sweep: what is asked.
        stores: the sweep's store under "", and those that the space names.

    Raises:
        ValueError: a fold is empty, has too few genes, or leaks; or the stores would not be scored
            alike.
    """
    if sweep.refit:
        for schedule in choices(sweep.space.get("schedule", [sweep.training.schedule])) or []:
            check_refit(replace(sweep.training, schedule=schedule), "refit: true: the champion")
    genes = sweep.space.get("genes", [sweep.training.genes])
    most = max(choices(genes) or [genes["high"]])
    settings = sweep.settings({"genes": most})
    scored: dict[int, list[Any]] = {}
    for name, store in stores.items():
        for fold in make_folds(store, sweep.protocol):
            fitted = fit_statistics(store, fold, settings, images=False)
            leak_gate(store, fold, fitted, sweep.protocol)
            _check_alike(name, store, fold, fitted, scored)


def _check_alike(
    name: str, store: Store, fold: Fold, fitted: Fitted, scored: dict[int, list[Any]]
) -> None:
    """All trials must be scored on the same spots, panel and target, whatever their store."""
    spots = store.spots(fold.validation)
    panel = sorted(fitted.genes.index[fitted.genes["panel"]])
    mine = [
        ("validation spots", spots[["section", "spot", "total_counts"]].to_numpy().tolist()),
        ("gene panel", panel),
        ("target (median total of the training spots)", round(fitted.median_total, 6)),
    ]
    first = scored.setdefault(fold.number, mine)
    for (what, here), (_, there) in zip(mine, first, strict=True):
        if here != there:
            raise ValueError(
                f"{store.origin}: store {name or 'of the sweep'} has another {what} in fold "
                f"{fold.number} than the sweep's own, so that trials on it could not be compared: "
                "prepare both from the same raw folder with the same min_counts, and if only the "
                "window or the stain differs set protocol.max_white_fraction to 1"
            )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a sweep is expected to cost, from what was measured.

    `trial_seconds` are those of all workers of a trial that completes all folds with all epochs,
    averaged over the kinds that were measured; `share` of them is what a trial takes on average
    once poor ones are stopped.
    """

    trials: int
    repeats: int
    share: float
    trial_seconds: float
    slots: int
    workers: int
    gpus_per_worker: float
    disk_gb: float

    def hours(self, share: float) -> float:
        """GPU-hours of the whole sweep, or worker-hours without GPUs."""
        seconds = (self.trials * share + self.repeats) * self.trial_seconds
        return seconds * (self.gpus_per_worker or 1.0) / 3600

    def wall_seconds(self, share: float) -> float:
        """From the first trial to the last, all slots busy; no less than one whole trial takes."""
        seconds = (self.trials * share + self.repeats) * self.trial_seconds / self.workers
        return max(seconds / self.slots, self.trial_seconds / self.workers)


def estimate(sweep: Sweep, speeds: Sequence[Speed], slots: int, gpus_per_worker: float) -> Estimate:
    """What the sweep will cost.

    Raises:
        ValueError: no kind of trial can be trained.
    """
    known = [speed for speed in speeds if not speed.error]
    if not known:
        raise ValueError(
            "no trial of this sweep can be trained: " + "; ".join(s.error for s in speeds)
        )
    folds, workers = sweep.protocol.folds, sweep.workers_per_trial
    seconds = [folds * s.fold_seconds() for s in known]
    model_gb = sum(s.model_mb for s in known) / len(known) / 1000
    rule = (folds, sweep.grace_folds, sweep.reduction_factor, sweep.count)
    pruned = sweep.pruning != "none"
    share = expected_share(*rule) if pruned else 1.0
    rungs = len(pruner_of(sweep).rungs) if pruned else 0
    complete = max(1.0, sweep.count / sweep.reduction_factor**rungs)
    repeats = min(sweep.finalists, sweep.count) * (sweep.seeds - 1)
    return Estimate(
        trials=sweep.count,
        repeats=repeats,
        share=share,
        trial_seconds=sum(seconds) / len(seconds) * workers,
        slots=slots,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        disk_gb=model_gb * (folds * (complete + repeats) + 6 * slots),
    )


def describe_estimate(
    expected: Estimate, speeds: Sequence[Speed], price: float | None, now: datetime
) -> str:
    """The plan's cost as a table, and what each kind of trial was measured to do."""
    unit = "GPU-hours" if expected.gpus_per_worker else "worker-hours"
    lines = [f"\nmeasured{'':27}patches/s  s/step  set-up s  minutes a fold of all epochs"]
    for speed in speeds:
        name = ", ".join(f"{v}" for v in speed.point.values()) or "as set"
        if speed.error:
            lines.append(f"  {name:<32} cannot be trained: {speed.error.splitlines()[0]}")
            continue
        minutes = speed.fold_seconds() / 60
        lines.append(
            f"  {name:<32} {speed.patches_per_second:>9.1f}  {speed.step_seconds:>6.3f}  "
            f"{speed.setup_seconds:>8.1f}  {minutes:>8.1f}"
        )
    lines.append(f"\nexpected cost{'':22}trials  {unit:>12}  on {expected.slots} slot(s)  finished")
    rows = [("without pruning", 1.0)]
    if expected.share < 1:
        rows.append((f"with pruning ({expected.share:.0%} spent)", expected.share))
    for name, share in rows:
        wall = timedelta(seconds=round(expected.wall_seconds(share)))
        finish = f"{now + wall:%a %d %b %H:%M}"
        money = f"  {expected.hours(share) * price:,.2f} at {price:g} an hour" if price else ""
        lines.append(
            f"  {name:<32} {expected.trials + expected.repeats:>6}  {expected.hours(share):>12.2f}"
            f"  {wall!s:>14}  {finish}{money}"
        )
    lines.append(f"  disk: about {expected.disk_gb:.1f} GB of checkpoints")
    return "\n".join(lines)


def check_budget(expected: Estimate, budget: Budget, free_gb: float, now: datetime) -> str:
    """Refuse what cannot even finish one trial; a warning about the disk, or nothing.

    Raises:
        ValueError: the budget or the deadline is below one trial.
    """
    hours = expected.trial_seconds * (expected.gpus_per_worker or 1.0) / 3600
    if budget.gpu_hours is not None and budget.gpu_hours < hours:
        raise ValueError(
            f"--budget-gpu-hours {budget.gpu_hours:g} is below what one whole trial is expected to "
            f"take ({hours:.2f}): raise it, or lower training.epochs"
        )
    if budget.deadline is not None:
        first = now + timedelta(seconds=expected.trial_seconds / expected.workers)
        if first.timestamp() > budget.deadline.timestamp():  # one may have no time zone
            raise ValueError(
                f"--deadline {budget.deadline:%Y-%m-%d %H:%M} is before one whole trial is "
                f"expected to end ({first:%Y-%m-%d %H:%M}): put it off, or lower training.epochs"
            )
    if expected.disk_gb > free_gb:
        return (
            f"warning: the checkpoints need about {expected.disk_gb:.0f} GB, but {free_gb:.0f} GB "
            "are free where --out is"
        )
    return ""
