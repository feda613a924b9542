"""Judge models on held-out patients, with the controls beside every score."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from brstnet import __version__
from brstnet.config import plain
from brstnet.data.store import Store
from brstnet.evaluation import belief, plots, subgroups, tables
from brstnet.evaluation.ceiling import shallow_sections
from brstnet.evaluation.controls import Controls, Encoder, Wanted, predict_controls
from brstnet.evaluation.export import to_anndata
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.predict import Ensemble, load_ensemble, predict_mean
from brstnet.evaluation.scores import METRICS, MODEL, Judged, score_table, spot_table
from brstnet.evaluation.yardstick import (
    Yardstick,
    judged_genes,
    measured,
    read_gene_list,
    standardise,
)
from brstnet.training.leaks import LeakError

USUAL = Judging()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found, and the protocol it stands under.

    Attributes:
        scores: the tidy table of every score of every predictor (`scores.COLUMNS`).
        spots: the PCC over genes of each spot and predictor.
        genes: a row per gene: medians over sections, and which panel it is in.
        subgroups: the same figures by subtype, patient, tissue.
        null: what chance gives.
        summary: the figures to quote.
        protocol: all that a reader needs to believe, or repeat, them.
    """

    scores: pd.DataFrame
    spots: pd.DataFrame
    genes: pd.DataFrame
    subgroups: pd.DataFrame
    null: pd.DataFrame
    summary: dict[str, Any]
    protocol: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be judged: predictions (N, G) of these genes on these sections, standardised.

    `about` says where they come from: the part of the protocol that this room cannot know.
    """

    yardstick: Yardstick
    store: Store
    sections: Sequence[str]
    genes: pd.DataFrame
    pred_NG: np.ndarray
    about: Mapping[str, Any]


def evaluate(
    checkpoints: Sequence[Path],
    store: Store,
    patients: Sequence[str],
    out: Path,
    *,
    device: torch.device,
    options: Judging = USUAL,
    progress: bool = True,
) -> Evaluation:
    """Evaluate the mean of these models on these patients and write everything under `out`.

    Args:
        checkpoints: checkpoint folders, finished folds, or folders of them.
        store: the store the patients are in.
        patients: whom to judge on; none of them may have trained or validated any model.
        out: folder for the tables, protocol.json, predictions.h5ad, figures/.
        device: where to predict.
        options: panels, an encoder as a control, draws.
        progress: draw progress bars.

    Raises:
        LeakError: a patient, or a section by its content, was used in training or validation.
        ValueError: store and models do not fit, or a patient is unknown.
    """
    _check_files(options)
    ensemble = load_ensemble(checkpoints, device)
    sections = store.of_patients(patients)
    check_unseen(ensemble, store, sections)
    yardstick = Yardstick.of(ensemble, store)
    genes = judged_genes(yardstick, store, listed(options))
    predicted = predict_mean(ensemble, store, sections, progress=progress)
    columns = ensemble.genes.index.get_indexer(genes.index)
    case = Case(
        yardstick=yardstick,
        store=store,
        sections=sections,
        genes=genes,
        pred_NG=standardise(predicted[:, columns], genes),
        about=describe_models(ensemble, store, sections, genes),
    )
    return judge(case, out, options, wanted(options, device, progress=progress))


def _check_files(options: Judging) -> None:
    """Read what the user names before anything is computed."""
    listed(options)
    if options.gene_groups is not None:
        tables.read_groups(options.gene_groups)


def wanted(options: Judging, device: torch.device, *, progress: bool) -> Wanted:
    """What is optional of the controls."""
    encoder = options.encoder and Encoder(name=options.encoder, weights=options.encoder_weights)
    return Wanted(encoder=encoder or None, device=device, seed=options.seed, progress=progress)


def listed(options: Judging) -> list[str] | None:
    """The user's own panel, by id or symbol."""
    return None if options.gene_list is None else read_gene_list(options.gene_list)


def judge(case: Case, out: Path, options: Judging, fitting: Wanted) -> Evaluation:
    """Score predictions beside all controls and write everything under `out`.

    What is judged are the numbers that predictions.h5ad holds, float32, so that they score the same
    when they come back by `brstnet score`.
    """
    with case.store.read_once():
        judged, beside = _beside(case, fitting)
        result = _found(case, judged, beside, options)
    predicted = judged.predictions[MODEL].astype(np.float32)
    adata = to_anndata(predicted, judged.true_NG, judged.spots, judged.genes, result.protocol)
    adata.uns["brstnet_median_total"] = case.yardstick.median_total
    out.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(out / "predictions.h5ad")
    shutil.rmtree(out / "figures", ignore_errors=True)  # of an earlier evaluation, maybe of others
    panel = result.genes[result.genes["panel"]]
    plots.draw_all(panel, adata, result.protocol["line"], out / "figures")
    _write(result, out)
    return result


def _beside(case: Case, fitting: Wanted) -> tuple[Judged, Controls]:
    """The predictions, the truth, and all controls."""
    store, sections, genes = case.store, case.sections, case.genes
    true_NG = standardise(measured(case.yardstick, store, sections, genes), genes)
    beside = predict_controls(case.yardstick, store, sections, genes, true_NG, fitting)
    pred_NG = case.pred_NG.astype(np.float32, order="C").astype(np.float64)
    judged = Judged(
        spots=store.spots(sections),
        genes=genes,
        true_NG=true_NG,
        predictions={MODEL: pred_NG, **beside.predictions},
        fold=case.yardstick.fold,
    )
    return judged, beside


def _found(case: Case, judged: Judged, beside: Controls, options: Judging) -> Evaluation:
    """All tables of what is judged."""
    store, sections, genes, seed = case.store, case.sections, case.genes, options.seed
    ceilings = belief.ceilings(
        case.yardstick, store, sections, genes, thinnings=options.thinnings, seed=seed
    )
    scores = score_table(judged, ceilings)
    subtypes = {name: store.sections[name].get("subtype") or None for name in sections}
    parts = subgroups.subgroup_table(judged, scores, subtypes)
    null, why_not = belief.nulls(judged, draws=options.draws, seed=seed)
    table = tables.gene_table(scores, genes)
    panel = table[table["panel"]]
    facts = {
        **case.about,
        "genes_judged": len(genes),
        "controls": beside.facts,
        "scores": METRICS,
        "units": "training standard deviations of each gene's target",
        "judging": dataclasses.asdict(options),
        "brstnet": __version__,
    }
    summary = {
        "protocol": case.about["line"],
        **tables.summarise(scores, genes),
        "interval": belief.intervals(scores, panel.index),
        "null": belief.cautious(null),
        "null_not_drawn": why_not,
        "shallow_sections": shallow_sections(ceilings),
        "worst_patient": subgroups.worst_patient(parts),
        "not_available": beside.not_available,
    }
    summary["lines"] = belief.describe(summary)
    if options.gene_groups is not None:
        groups = tables.read_groups(options.gene_groups)
        summary["groups"] = tables.summarise_groups(panel, groups)
    return Evaluation(
        scores=scores,
        spots=spot_table(judged),
        genes=table,
        subgroups=parts,
        null=null,
        summary=summary,
        protocol=strict(facts),
    )


def check_unseen(ensemble: Ensemble, store: Store, sections: Sequence[str]) -> None:
    """Refuse to judge a model on a patient it has seen, whatever the patient is called here.

    A patient has been seen whose name the checkpoint has, or who owns a section here that it has by
    name or by the very patches.

    Raises:
        LeakError: a section's patient was in training or validation.
    """
    for member in ensemble.members:
        hashes = member.facts["store"]["sections"]
        seen = {*member.facts["patients"]} | {
            entry["patient"]
            for name, entry in store.sections.items()
            if name in hashes or entry["files"]["patches.npy"] in hashes.values()
        }
        for name in sections:
            if (patient := store.sections[name]["patient"]) in seen:
                raise LeakError(
                    f"section {name} of patient {patient} cannot judge {member.path}: that model "
                    "was trained or chosen on the patient; judge it on held-out patients "
                    f"({', '.join(member.settings.protocol.held_out) or 'this one has none'})"
                )


def describe_case(
    yardstick: Yardstick, store: Store, sections: Sequence[str], genes: pd.DataFrame, what: str
) -> dict[str, Any]:
    """All that a reader needs to know to believe, or to repeat, the numbers beside it.

    Args:
        yardstick: what is measured by.
        store: where the sections are.
        sections: that are judged.
        genes: that are judged.
        what: was judged, in words.
    """
    protocol, scored = yardstick.protocol, int(genes["panel"].sum())
    patients = sorted({store.sections[name]["patient"] for name in sections})
    fewer = f"; scored on {scored} of the panel's genes" if scored < protocol.panel_size else ""
    return {
        "line": f"judged on {', '.join(patients)} ({len(sections)} sections); "
        f"{what}; {protocol.line()}{fewer}",
        "protocol": plain(protocol),
        "patients": patients,
        "sections": list(sections),
        "spots": {name: store.sections[name]["spots_kept"] for name in sections},
        "genes": scored,
        "panel_genes_not_scored": protocol.panel_size - scored,
        "store": store.digest,
        "prepare": store.index["prepare"],
        "yardstick": yardstick.origin,
    }


def describe_models(
    ensemble: Ensemble, store: Store, sections: Sequence[str], genes: pd.DataFrame
) -> dict[str, Any]:
    """`describe_case` of checkpoints, with their settings and scores."""
    first = ensemble.members[0]
    trained = first.facts["store"]
    what = f"mean of {len(ensemble.members)} models"
    return {
        **describe_case(Yardstick.of(ensemble, store), store, sections, genes, what),
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


def strict(value: Any) -> Any:
    """The same for JSON, which knows neither NaN nor numbers as keys: null, and text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _write(result: Evaluation, out: Path) -> None:
    result.scores.to_parquet(out / "scores.parquet")
    result.scores.to_csv(out / "scores.csv", index=False)
    result.spots.to_parquet(out / "spots.parquet")
    result.genes.to_csv(out / "genes.csv")
    result.subgroups.to_csv(out / "subgroups.csv", index=False)
    result.null.to_csv(out / "null.csv", index=False)
    for name, values in (("summary", result.summary), ("protocol", result.protocol)):
        (out / f"{name}.json").write_text(json.dumps(strict(values), indent=1), encoding="utf-8")
