"""Judge models on held-out patients, with the controls beside every score."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from brstnet import __version__
from brstnet.config import plain
from brstnet.data.store import Store
from brstnet.evaluation import controls, plots, tables
from brstnet.evaluation.export import to_anndata
from brstnet.evaluation.predict import Ensemble, load_ensemble, predict_mean
from brstnet.training.fitted import training_rows, transform
from brstnet.training.leaks import LeakError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found: tidy scores, a table per gene, the summary, the protocol it stands under."""

    scores: pd.DataFrame
    genes: pd.DataFrame
    summary: dict[str, Any]
    protocol: dict[str, Any]


def evaluate(
    checkpoints: Sequence[Path],
    store: Store,
    patients: Sequence[str],
    out: Path,
    *,
    device: torch.device,
    gene_groups: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate the mean of these models on these patients and write everything under `out`.

    Args:
        checkpoints: checkpoint folders, finished folds, or folders of them.
        store: the store the patients are in.
        patients: whom to judge on; none of them may have trained or validated any model.
        out: folder for scores.parquet, summary.json, protocol.json, predictions.h5ad, figures/.
        device: where to predict.
        gene_groups: parquet with columns gene, group and maybe ceiling, to be summed up apart.
        progress: draw progress bars.

    Raises:
        LeakError: a patient, or a section by its content, was used in training or validation.
        ValueError: store and models do not fit, or a patient is unknown.
    """
    groups = None if gene_groups is None else tables.read_groups(gene_groups)
    ensemble = load_ensemble(checkpoints, device)
    sections = store.of_patients(patients)
    check_unseen(ensemble, store, sections)
    genes = scored_genes(ensemble, store)
    spots = store.spots(sections)
    predicted = predict_mean(ensemble, store, sections, progress=progress)
    columns = ensemble.genes.index.get_indexer(genes.index)
    pred_NG = standardise(predicted[:, columns], genes)
    true_NG = standardise(measured(ensemble, store, sections, genes), genes)
    totals = spots["total_counts"].to_numpy(float)
    beside, ridge_facts = _controls(ensemble, store, sections, genes, totals, progress=progress)
    protocol = describe_protocol(ensemble, store, sections, genes, ridge_facts)
    scores = _score_sections(spots, genes, pred_NG, true_NG, beside)
    table = tables.gene_table(scores, genes["symbol"])
    summary = _summary(table, scores, protocol, groups)
    adata = to_anndata(pred_NG, true_NG, spots, genes, protocol)
    out.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(out / "predictions.h5ad")
    shutil.rmtree(out / "figures", ignore_errors=True)  # of an earlier evaluation, maybe of others
    plots.draw_all(table, adata, protocol["line"], out / "figures")
    result = Evaluation(scores=scores, genes=table, summary=summary, protocol=protocol)
    _write(result, out)
    return result


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


def standardise(log_units: np.ndarray, genes: pd.DataFrame) -> np.ndarray:
    """Log units to training standard deviations of each gene, (N, G)."""
    scaled: np.ndarray = (log_units - genes["mean"].to_numpy()) / genes["std"].to_numpy()
    return scaled


def scored_genes(ensemble: Ensemble, store: Store) -> pd.DataFrame:
    """The panel's genes that the store has measured."""
    panel = ensemble.genes[ensemble.genes["panel"]]
    here = panel[panel.index.isin(store.genes.index)]
    if here.empty:
        raise ValueError(
            f"{store.path}: none of the model's {len(panel)} genes is in this store; its ids begin "
            f"{', '.join(store.genes.index[:3])}, the model's {', '.join(panel.index[:3])}"
        )
    return here


def _raw(store: Store, sections: Sequence[str], genes: pd.DataFrame) -> sparse.csr_matrix:
    return store.counts(sections)[:, store.genes.index.get_indexer(genes.index)]


def measured(
    ensemble: Ensemble, store: Store, sections: Sequence[str], genes: pd.DataFrame
) -> np.ndarray:
    """What was measured, in log units on the ensemble's scale, (N, G)."""
    totals = store.spots(sections)["total_counts"].to_numpy(float)
    counts = _raw(store, sections, genes)
    units = transform(counts, totals, ensemble.target, ensemble.median_total)
    dense: np.ndarray = units.toarray()
    return dense


def _training_sections(ensemble: Ensemble, store: Store) -> list[str]:
    """The sections that any member trained or validated on, if this store still has them all."""
    seen: dict[str, str] = {}
    for member in ensemble.members:
        seen |= member.facts["store"]["sections"]
    same = [
        name
        for name, entry in store.sections.items()
        if seen.get(name) == entry["files"]["patches.npy"]
    ]
    return same if len(same) == len(seen) else []


def _controls(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    genes: pd.DataFrame,
    totals: np.ndarray,
    *,
    progress: bool,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Predictions of the controls, standardised (N, G), and how the ridge was fitted."""
    beside = {"depth_only": standardise(controls.depth_only(genes, totals), genes)}
    train = _training_sections(ensemble, store)
    if len(train) < 2:
        why = "not available: the training sections are not in this store, or only one is"
        return beside, {"colour_ridge": why}
    rows = training_rows(store.spots(train), ensemble.members[0].settings.protocol)
    y_NG = standardise(measured(ensemble, store, train, genes), genes)[rows]
    section_N = store.spots(train)["section"].to_numpy()[rows]
    features = controls.colour_features(store, train, progress=progress)[rows]
    ridge = controls.fit_colour_ridge(features, y_NG, section_N)
    here = controls.colour_features(store, sections, progress=progress)
    beside["colour_ridge"] = ridge.predict(here)
    return beside, {
        "colour_ridge": {
            "alpha": ridge.alpha,
            "left_out_median_pcc": ridge.cross_validated,
            "sections": train,
            "spots": int(rows.sum()),
        }
    }


def _score_sections(
    spots: pd.DataFrame,
    genes: pd.DataFrame,
    pred_NG: np.ndarray,
    true_NG: np.ndarray,
    beside: dict[str, np.ndarray],
) -> pd.DataFrame:
    parts = []
    log_total = np.log1p(spots["total_counts"].to_numpy(float))
    for section in dict.fromkeys(spots["section"]):
        here = (spots["section"] == section).to_numpy()
        scores = tables.section_scores(
            pred_NG[here], true_NG[here], {k: v[here] for k, v in beside.items()}, log_total[here]
        )
        patient = str(spots["patient"][here].iloc[0])
        parts.append(tables.tidy(scores, genes.index, patient, section, int(here.sum())))
    return pd.concat(parts, ignore_index=True)


def describe_protocol(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    genes: pd.DataFrame,
    ridge_facts: dict[str, Any],
) -> dict[str, Any]:
    """All that a reader needs to know to believe, or to repeat, the numbers beside it."""
    first = ensemble.members[0]
    patients = sorted({store.sections[name]["patient"] for name in sections})
    trained = first.facts["store"]
    panel = first.settings.protocol.panel_size
    fewer = f"; scored on {len(genes)} of the panel's genes" if len(genes) < panel else ""
    return {
        "line": f"judged on {', '.join(patients)} ({len(sections)} sections); "
        f"mean of {len(ensemble.members)} models; {first.settings.protocol.line()}{fewer}",
        "protocol": plain(first.settings.protocol),
        "patients": patients,
        "sections": list(sections),
        "spots": {name: store.sections[name]["spots_kept"] for name in sections},
        "genes": len(genes),
        "panel_genes_not_scored": panel - len(genes),
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
        "store": store.digest,
        "trained_on_store": trained["digest"],
        "prepare": store.index["prepare"],
        "same_stain_target": store.index["stain_target"] == trained["stain_target"],
        "controls": ridge_facts,
        "scores": tables.SCORES,
        "units": "training standard deviations of each gene's target",
        "brstnet": __version__,
    }


def _summary(
    table: pd.DataFrame, scores: pd.DataFrame, protocol: dict[str, Any], groups: pd.DataFrame | None
) -> dict[str, Any]:
    summary = {"protocol": protocol["line"], **tables.summarise(table)}
    pcc = scores[scores["metric"] == "pcc"]
    summary["median_pcc_by_section"] = pcc.groupby("section")["value"].median().to_dict()
    if groups is not None:
        summary["groups"] = tables.summarise_groups(table, groups)
    return summary


def _write(result: Evaluation, out: Path) -> None:
    result.scores.to_parquet(out / "scores.parquet")
    result.scores.to_csv(out / "scores.csv", index=False)
    result.genes.to_csv(out / "genes.csv")
    for name, values in (("summary", result.summary), ("protocol", result.protocol)):
        (out / f"{name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
