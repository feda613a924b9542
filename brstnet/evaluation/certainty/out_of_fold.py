"""Each fold's model on the sections it was validated on: errors on spots it has not trained on.

Shape letters: N spots, G genes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from brstnet.data.store import Store
from brstnet.evaluation.certainty.conformal import Intervals, Residuals, intervals
from brstnet.evaluation.certainty.spread import LEVELS
from brstnet.evaluation.predict import PLAIN, Ensemble, How, predict_ensemble
from brstnet.evaluation.yardstick import measured
from brstnet.training.checkpoint import Checkpoint


def calibrate(
    ensemble: Ensemble,
    store: Store,
    genes: pd.Index | None = None,
    levels: Sequence[float] = LEVELS,
    how: How = PLAIN,
) -> Intervals:
    """Intervals from each fold's errors on its own validation sections; see `conformal`.

    Args:
        ensemble: fold models.
        store: has their validation sections.
        genes: ids; by default all that are predicted and measured.
        levels: shares of the truths to be held.
        how: as in `cross_validation_errors`.

    Raises:
        ValueError: the store has no section that a model was validated on, or a level is none.
    """
    return intervals(cross_validation_errors(ensemble, store, genes, how), levels)


def cross_validation_errors(
    ensemble: Ensemble, store: Store, genes: pd.Index | None = None, how: How = PLAIN
) -> Residuals:
    """Each fold model's errors on its validation sections, in the ensemble's log units.

    A section that several models were validated on is predicted by their mean. Sections are taken
    one by one; what is kept is one float32 (N, G), two with `how.symmetries`.

    Args:
        ensemble: fold models.
        store: has their validation sections.
        genes: ids; by default all that are predicted and measured.
        how: as predictions that get the intervals are made; with `symmetries` scaled ones can be.

    Raises:
        ValueError: the store has no section that a model was validated on, or lacks a gene.
    """
    if not (unseen := validated_by(ensemble, store)):
        raise ValueError(
            f"{store.path}: has no section, patch by patch, that one of the "
            f"{len(ensemble.members)} models was validated on: intervals need the store that the "
            "folds were trained from, and models of folds (a refit on all has no validation)"
        )
    both = ensemble.genes.index[ensemble.genes.index.isin(store.genes.index)]
    here = both if genes is None else genes
    if lacking := [str(gene) for gene in here if gene not in both]:
        raise ValueError(
            f"{store.path}: {len(lacking)} genes are not both predicted and measured here, the "
            f"first {lacking[0]}"
        )
    table = ensemble.genes.loc[here]
    patient_N = np.concatenate([
        np.full(store.sections[name]["spots_kept"], store.sections[name]["patient"])
        for name in unseen
    ])  # fmt: skip
    error_NG = np.empty((len(patient_N), len(here)), np.float32)
    spread_NG = np.empty_like(error_NG) if how.symmetries else None
    start = 0
    for section, members in unseen.items():
        one = dataclasses.replace(ensemble, members=members)
        found = predict_ensemble(one, store, [section], how, genes=here, progress=False)
        true_NG = measured(ensemble, store, [section], table)
        rows = slice(start, start + len(true_NG))
        error_NG[rows] = np.abs(found.mean_NG - true_NG)
        if spread_NG is not None:
            spread_NG[rows] = found.symmetry_spread_NG
        start = rows.stop
    return Residuals(
        genes=here,
        error_NG=error_NG,
        spread_NG=spread_NG,
        patient_N=patient_N,
        seen=any(
            _has_met(member, store.sections[section]["patient"], store)
            for section, members in unseen.items()
            for member in members
        ),
        target=ensemble.target,
    )


def validated_by(ensemble: Ensemble, store: Store) -> dict[str, list[Checkpoint]]:
    """The members that each section of the store was a validation section of, by its patches."""
    found: dict[str, list[Checkpoint]] = {}
    for name, entry in store.sections.items():
        members = [
            member
            for member in ensemble.members
            if name in member.fold.validation
            and member.facts["store"]["sections"].get(name) == entry["files"]["patches.npy"]
        ]
        if members:
            found[name] = members
    return found


def _has_met(member: Checkpoint, patient: str, store: Store) -> bool:
    """Whether a model may have trained on another section of a patient."""
    known = [store.sections[n]["patient"] for n in member.fold.train if n in store.sections]
    all_known = len(known) == len(member.fold.train)
    return patient in known or not (all_known or member.settings.protocol.group == "patient")
