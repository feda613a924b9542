"""What is to be judged: predictions of some genes on some sections, and where they come from.

A held-out case is the mean of all models on patients that none of them has seen. A validation case
is one fold's models on the sections that fold was validated on: all folds together are the
cross-validated evaluation.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from brstnet.config import plain
from brstnet.data.store import Store
from brstnet.evaluation.certainty.confidence import Confidence, believe
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.leaks.checks import Check
from brstnet.evaluation.leaks.gate import judge_gate
from brstnet.evaluation.predict import (
    Ensemble,
    How,
    as_ensemble,
    load_ensemble,
    predict_ensemble,
    predict_mean,
)
from brstnet.evaluation.yardstick import Yardstick, judged_genes, read_gene_list, standardise
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.folds import ALL


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be judged: predictions (N, G) of these genes on these sections, standardised.

    `checks` are those of the leak gate; `sure` is how far single predictions can be believed, of
    checkpoints on held-out patients.
    """

    yardstick: Yardstick
    store: Store
    sections: Sequence[str]
    genes: pd.DataFrame
    pred_NG: np.ndarray
    checks: Sequence[Check] = ()
    sure: Confidence | None = None


def held_out_case(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    options: Judging,
    *,
    earlier: int | None,
    progress: bool,
) -> Case:
    """The mean of all models on sections of patients that none of them has seen.

    Raises:
        LeakError: a section's patient was in training or validation.
        ValueError: store and models do not fit.
    """
    checks = judge_gate(ensemble, store, sections, earlier=earlier)
    yardstick = Yardstick.of(ensemble, store)
    genes = judged_genes(yardstick, store, listed(options))
    how = How(views=options.views, spread=True, symmetries=options.symmetries)
    found = predict_ensemble(ensemble, store, sections, how, progress=progress)
    return Case(
        yardstick=yardstick,
        store=store,
        sections=sections,
        genes=genes,
        pred_NG=_of_genes(found.mean_NG, ensemble, genes),
        checks=checks,
        sure=believe(ensemble, store, sections, genes, found, how),
    )


def validation_cases(
    checkpoints: Sequence[Path],
    store: Store,
    device: torch.device,
    options: Judging,
    *,
    progress: bool,
) -> tuple[list[Case], Ensemble]:
    """Each fold's models on the sections that the fold was validated on, and all of them.

    Panel, statistics and controls are of the fold's own training sections. The leak gate, which was
    passed before training, is passed again on this store.

    Raises:
        LeakError: a fold was not what its checkpoint says.
        ValueError: there is a model of no fold, or the store is not the one they were trained on.
    """
    everybody = load_ensemble(checkpoints, device)
    folds: dict[int, list[Checkpoint]] = {}
    for member in everybody.members:
        _check_validated(member, store)
        folds.setdefault(member.fold.number, []).append(member)
    cases = []
    for _, members in sorted(folds.items()):
        ensemble, fold = as_ensemble(members), members[0].fold
        checks = judge_gate(ensemble, store, fold.validation, cross_validated=True)
        yardstick = dataclasses.replace(Yardstick.of(ensemble, store), train=tuple(fold.train))
        genes = judged_genes(yardstick, store, listed(options))
        how = How(views=options.views)
        mean_NG = predict_mean(ensemble, store, fold.validation, how=how, progress=progress)
        cases.append(
            Case(
                yardstick=yardstick,
                store=store,
                sections=fold.validation,
                genes=genes,
                pred_NG=_of_genes(mean_NG, ensemble, genes),
                checks=checks,
            )
        )
    return cases, everybody


def _check_validated(member: Checkpoint, store: Store) -> None:
    """Check that the sections that a member trained and validated on are in this store.

    Raises:
        ValueError: nobody validated it, or the store lacks a section, or has another of its name.
    """
    if member.fold.number == ALL or not member.fold.validation:
        raise ValueError(
            f"{member.path}: nobody validated this model (all patients trained it): only folds can "
            "be cross-validated; judge it on held-out patients"
        )
    lacking = [
        name
        for name, sha in member.facts["store"]["sections"].items()
        if name not in store.sections or store.sections[name]["files"]["patches.npy"] != sha
    ]
    if lacking:
        raise ValueError(
            f"{store.path}: {member.path} was trained on other sections than are here "
            f"({', '.join(lacking[:3])} and {max(0, len(lacking) - 3)} more): cross-validation "
            "needs the store that the folds were trained on"
        )


def _of_genes(log_units_NG: np.ndarray, ensemble: Ensemble, genes: pd.DataFrame) -> np.ndarray:
    columns = ensemble.genes.index.get_indexer(genes.index)
    return standardise(log_units_NG[:, columns], genes)


def listed(options: Judging) -> list[str] | None:
    """The user's own panel, by id or symbol."""
    return None if options.gene_list is None else read_gene_list(options.gene_list)


# What a reader needs to know ----------------------------------------------------------------------


def describe_case(cases: Sequence[Case], what: str) -> dict[str, Any]:
    """All that a reader needs to know to believe, or to repeat, the numbers beside it.

    Args:
        cases: one, or one a fold.
        what: was judged, in words.
    """
    store, protocol = cases[0].store, cases[0].yardstick.protocol
    sections = [name for case in cases for name in case.sections]
    scored = min(int(case.genes["panel"].sum()) for case in cases)
    patients = sorted({store.sections[name]["patient"] for name in sections})
    fewer = f"; scored on {scored} of the panel's genes" if scored < protocol.panel_size else ""
    return {
        "line": f"judged on {', '.join(patients)} ({len(sections)} sections); "
        f"{what}; {protocol.line()}{fewer}",
        "protocol": plain(protocol),
        "patients": patients,
        "sections": sections,
        "spots": {name: store.sections[name]["spots_kept"] for name in sections},
        "genes": scored,
        "panel_genes_not_scored": protocol.panel_size - scored,
        "store": store.digest,
        "prepare": store.index["prepare"],
        "yardstick": cases[0].yardstick.origin,
    }


def describe_models(cases: Sequence[Case], ensemble: Ensemble, what: str) -> dict[str, Any]:
    """`describe_case` of checkpoints, with their settings and scores."""
    first, store = ensemble.members[0], cases[0].store
    trained = first.facts["store"]
    return {
        **describe_case(cases, what),
        "models": [
            {
                "settings": m.settings.fingerprint(),
                "fold": m.fold.number,
                "epoch": int(m.facts["scores"]["epoch"]),
                "validation_score": m.facts["scores"]["score"],
            }
            for m in ensemble.members
        ],
        "training": plain(first.settings.training),
        "trained_on_store": trained["digest"],
        "same_stain_target": store.index["stain_target"] == trained["stain_target"],
    }


def describe_folds(cases: Sequence[Case], ensemble: Ensemble) -> str:
    """What is judged in a cross-validated evaluation, in words."""
    stopping = ensemble.members[0].settings.training.stopping
    epoch = "epoch and settings" if stopping == "early" else "settings"
    return (
        f"cross-validated: each of {len(cases)} folds by its own model, which did not train on "
        f"it; {epoch} may have been chosen by these scores"
    )
