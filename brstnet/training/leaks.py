"""The leak gate: before the first step, show that nothing was fitted on those it will be judged on.

The gate computes what it can a second time from the raw store, rather than believe what it is told.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from brstnet.config import Protocol
from brstnet.data.store import Store
from brstnet.training.fitted import Fitted, column_mean, ranked_genes, training_rows
from brstnet.training.folds import ALL, Fold


class LeakError(ValueError):
    """A number would be reported on data that the model has seen."""


def leak_gate(store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> dict[str, Any]:
    """Check patients, panel, statistics and stain target of a fold; return the report.

    Raises:
        LeakError: a check fails; the message holds every failure.
    """
    checks = {
        "groups": _check_groups(store, fold, protocol),
        "held_out": _check_held_out(store, fold, protocol),
        "statistics": _check_statistics(fold, fitted),
        "panel": _check_panel(store, fold, fitted, protocol),
        "targets": _check_targets(store, fold, fitted, protocol),
        "stain_target": _check_stain_target(store, fold, protocol),
    }
    failures = [f"{name}: {check['why']}" for name, check in checks.items() if not check["ok"]]
    if failures:
        raise LeakError(f"{store.path}, {fold.name}: a leak\n  " + "\n  ".join(failures))
    return {
        "fold": fold.number,
        "protocol": protocol.line(),
        "train": list(fold.train),
        "validation": list(fold.validation),
        "held_out": list(fold.held_out),
        "checks": checks,
    }


def _named(store: Store, sections: Iterable[str], key: str) -> set[str]:
    return {store.sections[name][key] for name in sections}


def _passed(why: str) -> dict[str, Any]:
    return {"ok": True, "why": why}


def _failed(why: str) -> dict[str, Any]:
    return {"ok": False, "why": why}


def _check_groups(store: Store, fold: Fold, protocol: Protocol) -> dict[str, Any]:
    train = _named(store, fold.train, protocol.group)
    if fold.number == ALL and fold.train and not fold.validation:
        return _passed("all train and nobody validates: no score is taken from it")
    both = train & _named(store, fold.validation, protocol.group)
    if both or not fold.validation or not fold.train:
        return _failed(f"{protocol.group}s {sorted(both)} train and validate")
    patients = _named(store, fold.train, "patient") & _named(store, fold.validation, "patient")
    if patients:
        return _passed(
            f"no section on both sides; patients {sorted(patients)} are, by group: section: "
            "scores are within-patient",
        )
    return _passed("no patient on both sides")


def _check_held_out(store: Store, fold: Fold, protocol: Protocol) -> dict[str, Any]:
    seen = _named(store, (*fold.train, *fold.validation), "patient") & set(protocol.held_out)
    why = f"patients {sorted(seen)} are held out and in the fold" if seen else "none is in the fold"
    return _failed(why) if seen else _passed(why)


def _check_statistics(fold: Fold, fitted: Fitted) -> dict[str, Any]:
    why = f"fitted on {', '.join(fitted.sections)} ({fitted.spots} spots)"
    return _passed(why) if set(fitted.sections) <= set(fold.train) else _failed(why)


def _check_panel(store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> dict[str, Any]:
    """Which genes are in the panel, and their means, from the raw training counts alone."""
    counts = store.counts(fold.train)[training_rows(store.spots(fold.train), protocol)]
    panel = fitted.genes[fitted.genes["panel"]]
    expected = store.genes.index[ranked_genes(counts, protocol)[: protocol.panel_size]]
    if list(panel.index) != list(expected):
        other = sorted(set(panel.index) - set(expected))[:3]
        return _failed(f"the panel is not the training spots' top {len(expected)} genes: {other}")
    mean = column_mean(counts[:, store.genes.index.get_indexer(panel.index)])
    if not np.allclose(mean, panel["mean_count"], rtol=1e-9):
        return _failed(f"mean counts of the {len(panel)} genes are not the training spots'")
    return _passed(f"the {len(panel)} genes and their mean counts are those of the training spots")


def _check_targets(store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> dict[str, Any]:
    """Median total, mean and deviation of the panel's targets, from dense training counts."""
    rows = training_rows(store.spots(fold.train), protocol)
    totals = store.spots(fold.train)["total_counts"].to_numpy(float)[rows]
    panel = fitted.genes[fitted.genes["panel"]]
    columns = store.genes.index.get_indexer(panel.index)
    counts = store.counts(fold.train)[rows][:, columns].toarray()
    scale = np.median(totals) / totals if protocol.target == "log_normalised" else 1 + 0 * totals
    units = np.log1p(counts * scale[:, None])
    same = np.allclose(units.mean(axis=0), panel["mean"]) and np.allclose(
        units.std(0), panel["std"]
    )
    if not same or fitted.median_total != np.median(totals):
        return _failed(
            "median total, means or deviations of the targets are not the training spots'"
        )
    return _passed(
        f"median total, means and deviations are those of {int(rows.sum())} training spots"
    )


def _check_stain_target(store: Store, fold: Fold, protocol: Protocol) -> dict[str, Any]:
    target = store.index["stain_target"]
    if target is None:
        return _passed("no stain normalisation")
    name = f"section {target['section']} of patient {target['patient']}"
    if target["patient"] in protocol.held_out:
        return _failed(
            f"the stain target is {name}, who is held out: prepare the store again with "
            f"--held_out '[{', '.join(protocol.held_out)}]' or another --stain_target",
        )
    if target["section"] in fold.validation:
        return _passed(f"NOTE: the stain target, {name}, belongs to this fold's validation")
    if target["patient"] in _named(store, fold.validation, "patient"):
        return _passed(f"NOTE: the stain target, {name}, is of a validation patient")
    return _passed(f"the stain target is {name}, a training section")
