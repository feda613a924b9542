"""The leak gate: before the first step, show that nothing was fitted on those it will be judged on.

The gate computes what it can a second time from the raw store, rather than believe what it is told.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

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
        "groups": check_groups(store, fold, protocol),
        "held_out": check_held_out(store, fold, protocol),
        "statistics": check_statistics(fold, fitted),
        "panel": check_panel(store, fold, fitted, protocol),
        "targets": check_targets(store, fold, fitted, protocol),
        "stain_target": check_stain_target(store, fold, protocol),
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


def check_groups(store: Store, fold: Fold, protocol: Protocol) -> dict[str, Any]:
    """No patient, or section, trains and validates."""
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


def check_held_out(store: Store, fold: Fold, protocol: Protocol) -> dict[str, Any]:
    """No held-out patient trains or validates."""
    seen = _named(store, (*fold.train, *fold.validation), "patient") & set(protocol.held_out)
    why = f"patients {sorted(seen)} are held out and in the fold" if seen else "none is in the fold"
    return _failed(why) if seen else _passed(why)


def check_statistics(fold: Fold, fitted: Fitted) -> dict[str, Any]:
    """Statistics say that they are of training sections alone."""
    why = f"fitted on {', '.join(fitted.sections)} ({fitted.spots} spots)"
    return _passed(why) if set(fitted.sections) <= set(fold.train) else _failed(why)


def check_panel(store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> dict[str, Any]:
    """Which genes are in the panel, and their means, from the raw training counts alone."""
    counts = _training_counts(store, fold, protocol)
    panel = fitted.genes[fitted.genes["panel"]]
    passing = ranked_genes(counts, protocol)
    expected = passing[: protocol.panel_size]
    if not _ranked_alike(store, counts, panel, passing) or len(panel) != len(expected):
        other = sorted(set(panel.index) - set(store.genes.index[expected]))[:3]
        return _failed(f"the panel is not the training spots' top {len(expected)} genes: {other}")
    mean = column_mean(counts[:, store.genes.index.get_indexer(panel.index)])
    if not np.allclose(mean, panel["mean_count"], rtol=1e-9):
        return _failed(f"mean counts of the {len(panel)} genes are not the training spots'")
    return _passed(f"the {len(panel)} genes and their mean counts are those of the training spots")


def check_filters(store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> dict[str, Any]:
    """Which spots trained, and which genes are predicted: all that pass, or the first of them."""
    counts = _training_counts(store, fold, protocol)
    spots, genes = counts.shape[0], len(fitted.genes)
    if fitted.spots != spots:
        return _failed(
            f"fitted on {fitted.spots} spots, but {spots} of the training sections' are no whiter "
            f"than {protocol.max_white_fraction}"
        )
    passing = ranked_genes(counts, protocol)
    expected = passing if fitted.aux_genes else passing[:genes]
    if not _ranked_alike(store, counts, fitted.genes, passing) or genes != len(expected):
        other = sorted(set(fitted.genes.index) - set(store.genes.index[expected]))[:3]
        return _failed(
            f"the {genes} genes are not the first {len(expected)} that pass the filter on the "
            f"training spots: {other}"
        )
    return _passed(
        f"{spots} training spots pass the white filter, and the {genes} genes that are predicted "
        f"are in at least {protocol.min_gene_fraction:.0%} of them"
    )


def _training_counts(store: Store, fold: Fold, protocol: Protocol) -> sparse.csr_matrix:
    return store.counts(fold.train)[training_rows(store.spots(fold.train), protocol)]


def _ranked_alike(
    store: Store, counts: sparse.csr_matrix, genes: pd.DataFrame, passing: np.ndarray
) -> bool:
    """Whether these are the first of the passing genes, in order; equal means may change places.

    Ties are in the order of the store, and this may be another store with the same sections.
    """
    columns = store.genes.index.get_indexer(genes.index)
    if not np.isin(columns, passing).all() or len(set(columns)) < len(columns):
        return False
    mean = column_mean(counts)
    same: bool = np.array_equal(mean[columns], mean[passing[: len(columns)]])
    return same


def check_targets(store: Store, fold: Fold, fitted: Fitted, protocol: Protocol) -> dict[str, Any]:
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


def check_stain_target(store: Store, fold: Fold, protocol: Protocol) -> dict[str, Any]:
    """The store's stain target is of nobody held out; of a validation patient it is told."""
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
