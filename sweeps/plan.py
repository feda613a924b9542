"""What a sweep will do, said before it is done, and refused where it cannot be."""

from collections.abc import Mapping
from typing import Any

from brstnet.data.store import Store
from brstnet.training.fitted import fit_statistics
from brstnet.training.folds import make_folds
from brstnet.training.leaks import leak_gate
from sweeps.space import Sweep, first_points


def describe(sweep: Sweep, store: Store | None) -> str:
    """The plan: protocol, folds, configurations; with a store also who is in which fold."""
    folds = sweep.protocol.folds
    pruned = f", pruned by ASHA after {sweep.grace_folds} folds" if sweep.pruning == "asha" else ""
    lines = [
        f"sweep {sweep.name}: {sweep.count} configurations x {folds} folds = "
        f"{sweep.count * folds} trainings at most{pruned}",
        f"protocol: {sweep.protocol.line()}",
        f"search: {sweep.search}, seed {sweep.seed}; {sweep.workers_per_trial} worker(s) a trial, "
        f"up to {sweep.training.epochs} epochs a fold ({sweep.training.stopping} stopping)",
    ]
    if store is not None:
        lines += _describe_folds(sweep, store)
    lines += [f"  {name}: {_describe_range(values)}" for name, values in sweep.space.items()]
    points = first_points(sweep)
    for number, point in enumerate(points[: sweep.count]):
        text = ", ".join(f"{name}={value}" for name, value in point.items()) or "the defaults"
        paper = " (the paper's values of what is searched)" if number == 0 else ""
        lines.append(f"  trial {number:>3}: {text}{paper}")
    if sweep.count > len(points):
        lines.append(f"  trials {len(points)} to {sweep.count - 1}: drawn by {sweep.search}")
    return "\n".join(lines)


def _describe_range(values: list[Any] | Mapping[str, Any]) -> str:
    if isinstance(values, list):
        return " | ".join(map(str, values))
    return f"{values['low']} to {values['high']}{', log scale' if values.get('log') else ''}"


def _describe_folds(sweep: Sweep, store: Store) -> list[str]:
    key = sweep.protocol.group
    lines = [f"store: {store.path} ({store.digest})"]
    for fold in make_folds(store, sweep.protocol):
        groups = sorted({store.sections[name][key] for name in fold.validation})
        spots = sum(store.sections[name]["spots_kept"] for name in fold.train)
        lines.append(
            f"  fold {fold.number}: validates on {key} {', '.join(groups)}; trains on "
            f"{spots} spots of {len(fold.train)} sections"
        )
    return lines


def check_folds(sweep: Sweep, store: Store) -> None:
    """Pass every fold's leak gate before anything is launched, with the most genes of the space.

    Raises:
        ValueError: a fold is empty, has too few genes, or leaks.
    """
    genes = sweep.space.get("genes", [sweep.training.genes])
    settings = sweep.settings({"genes": max(genes) if isinstance(genes, list) else genes["high"]})
    for fold in make_folds(store, sweep.protocol):
        leak_gate(store, fold, fit_statistics(store, fold, settings), sweep.protocol)


def slots(sweep: Sweep, resources: Mapping[str, float], gpus_per_worker: float) -> int:
    """How many trials the cluster can train at once.

    Raises:
        ValueError: not even one, whatever the cluster would wait for.
    """
    wanted = {"CPU": sweep.cpus_per_worker, "GPU": gpus_per_worker}
    fits = [
        resources.get(name, 0) / (amount * sweep.workers_per_trial)
        for name, amount in wanted.items()
        if amount
    ]
    if min(fits) < 1:
        has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        needs = ", ".join(f"{v:g} {name}" for name, v in wanted.items() if v)
        raise ValueError(
            f"a trial needs {sweep.workers_per_trial} worker(s) of {needs} each, but the cluster "
            f"has {has}: lower workers_per_trial, cpus_per_worker or gpus_per_worker"
        )
    return int(min(fits))
