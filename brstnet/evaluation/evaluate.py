"""Judge models on held-out patients, with the controls beside every score."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch

from brstnet import __version__
from brstnet.data.store import Store
from brstnet.evaluation import plots, report, subgroups, tables
from brstnet.evaluation.cases import (
    Case,
    describe_folds,
    describe_models,
    held_out_case,
    listed,
    validation_cases,
)
from brstnet.evaluation.certainty import belief, confidence, out_of_fold
from brstnet.evaluation.certainty.ceiling import SectionCeiling, shallow_sections
from brstnet.evaluation.controls import Controls, Encoder, Wanted, predict_controls
from brstnet.evaluation.export import to_anndata
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.leaks.checks import Check
from brstnet.evaluation.leaks.gate import gate_line, gate_rows
from brstnet.evaluation.predict import How, load_ensemble
from brstnet.evaluation.scores import METRICS, MODEL, Judged, score_table, spot_table
from brstnet.evaluation.yardstick import measured, standardise

USUAL = Judging()
PANELS = "panels.parquet"
"""A row a fold and gene that was judged: fold, gene, symbol, and who is in which panel."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found, and the protocol it stands under.

    Attributes:
        scores: the tidy table of every score of every predictor (`scores.COLUMNS`).
        panels: a row a fold and gene that was judged: symbol, and who is in which panel.
        spots: the PCC over genes of each spot and predictor.
        genes: a row per gene: medians over sections, and which panel it is in.
        subgroups: the same figures by subtype, patient, tissue.
        null: what chance gives.
        summary: the figures to quote.
        protocol: all that a reader needs to believe, or repeat, them.
    """

    scores: pd.DataFrame
    panels: pd.DataFrame
    spots: pd.DataFrame
    genes: pd.DataFrame
    subgroups: pd.DataFrame
    null: pd.DataFrame
    summary: dict[str, Any]
    protocol: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A case beside the truth and all controls."""

    case: Case
    judged: Judged
    beside: Controls


def evaluate(  # noqa: PLR0913 - whom, on what, and what is known of it
    checkpoints: Sequence[Path],
    store: Store,
    patients: Sequence[str],
    out: Path,
    *,
    device: torch.device,
    options: Judging = USUAL,
    progress: bool = True,
    earlier: int | None = None,
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
        earlier: how many evaluations of these patients are on record; None: there is no record.

    Raises:
        LeakError: a patient, or a section by its content, was used in training or validation.
        ValueError: store and models do not fit, or a patient is unknown.
    """
    _check_files(options)
    ensemble = load_ensemble(checkpoints, device)
    sections = store.of_patients(patients)
    case = held_out_case(ensemble, store, sections, options, earlier=earlier, progress=progress)
    about = describe_models([case], ensemble, f"mean of {len(ensemble.members)} models")
    return judge([case], about, out, options, wanted(options, device, progress=progress))


def cross_validate(
    checkpoints: Sequence[Path],
    store: Store,
    out: Path,
    *,
    device: torch.device,
    options: Judging = USUAL,
    progress: bool = True,
) -> Evaluation:
    """Evaluate each fold's models on the fold's validation sections, and write all as one.

    So every patient of the cohort is judged once, by models that did not train on them: enough
    patients for intervals and tests. The scores are those that configurations were chosen by, and
    a little optimistic; only held-out patients are beyond that. Each fold has its own panel, units
    and controls, fitted on its own training sections. Arguments and what is raised are those of
    `evaluate`; predictions go to predictions_fold_K.h5ad, intervals for a new patient to
    intervals.parquet.
    """
    _check_files(options)
    with store.read_once():
        cases, ensemble = validation_cases(checkpoints, store, device, options, progress=progress)
        about = describe_models(cases, ensemble, describe_folds(cases, ensemble))
        result = judge(cases, about, out, options, wanted(options, device, progress=progress))
        found = out_of_fold.calibrate(ensemble, store, how=How(views=options.views))
    found.write(out / "intervals.parquet")
    return result


def _check_files(options: Judging) -> None:
    """Read what the user names before anything is computed."""
    listed(options)
    if options.gene_groups is not None:
        tables.read_groups(options.gene_groups)


def wanted(options: Judging, device: torch.device, *, progress: bool) -> Wanted:
    """What is optional of the controls."""
    encoder = options.encoder and Encoder(name=options.encoder, weights=options.encoder_weights)
    return Wanted(encoder=encoder or None, device=device, seed=options.seed, progress=progress)


def judge(
    cases: Sequence[Case], about: Mapping[str, Any], out: Path, options: Judging, fitting: Wanted
) -> Evaluation:
    """Score predictions beside all controls and write everything under `out`.

    What is judged are the numbers that predictions.h5ad holds, float32, so that they score the same
    when they come back by `brstnet score`.

    Args:
        cases: one, or one a fold.
        about: where the predictions come from, with `line`; see `describe_case`.
        out: folder to write to.
        options: panels, draws.
        fitting: what is optional of the controls.
    """
    with cases[0].store.read_once():
        parts = [_beside(case, fitting) for case in cases]
        result = _found(parts, about, options)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("predictions*.h5ad"):  # of an earlier evaluation, maybe of other folds
        old.unlink()
    annotated = {_end(part, parts): _annotated(part, result.protocol) for part in parts}
    for end, adata in annotated.items():
        adata.write_h5ad(out / f"predictions{end}.h5ad")
    shutil.rmtree(out / "figures", ignore_errors=True)  # of an earlier evaluation, maybe of others
    panel = result.genes[result.genes["panel"]]
    plots.draw_all(panel, list(annotated.values()), result.protocol["line"], out / "figures")
    confidence.write(cases[0].sure, out, result.protocol["line"])
    checks = [check for case in cases for check in case.checks]
    (out / "leaks.json").write_text(json.dumps(gate_rows(checks), indent=1), encoding="utf-8")
    _write(result, out)
    _report(result, checks, out)
    return result


def _end(part: Part, parts: Sequence[Part]) -> str:
    """What a file of one fold's is called after."""
    return f"_fold_{part.judged.fold}" if len(parts) > 1 else ""


def _annotated(part: Part, protocol: dict[str, Any]) -> anndata.AnnData:
    judged = part.judged
    predicted = judged.predictions[MODEL].astype(np.float32)
    adata = to_anndata(predicted, judged.true_NG, judged.spots, judged.genes, protocol)
    adata.uns["brstnet_median_total"] = part.case.yardstick.median_total
    adata.uns["brstnet_fold"] = judged.fold
    return adata


def _beside(case: Case, fitting: Wanted) -> Part:
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
    return Part(case=case, judged=judged, beside=beside)


def _found(parts: Sequence[Part], about: Mapping[str, Any], options: Judging) -> Evaluation:
    """All tables of what is judged."""
    judged, seed = [part.judged for part in parts], options.seed
    ceilings = [_ceilings(part.case, options) for part in parts]
    scores = pd.concat(map(score_table, judged, ceilings), ignore_index=True)
    genes = pd.concat([one.genes.assign(fold=one.fold) for one in judged])
    sections, store = about["sections"], parts[0].case.store
    subtypes = {name: store.sections[name].get("subtype") or None for name in sections}
    grouped = subgroups.subgroup_table(judged, scores, genes, subtypes)
    null, why_not = belief.nulls(judged, draws=options.draws, seed=seed)
    in_panel, panel = tables.within(scores, genes, "panel"), tables.members(genes, "panel")
    table = tables.gene_table(scores, genes).join(belief.gene_tests(in_panel, panel))
    summary = {
        "protocol": about["line"],
        **tables.summarise(scores, genes),
        "interval": belief.intervals(in_panel, panel),
        "null": belief.cautious(null),
        "null_not_drawn": why_not,
        "shallow_sections": [line for found in ceilings for line in shallow_sections(found)],
        "worst_patient": subgroups.worst_patient(grouped),
        "not_available": _by_fold(parts, lambda part: part.beside.not_available),
    }
    summary["lines"] = belief.describe(summary)
    if (sure := parts[0].case.sure) is not None:
        summary["confidence"] = {k: v for k, v in sure.summary.items() if k != "lines"}
        summary["lines"] += sure.summary["lines"]
    if checks := [check for part in parts for check in part.case.checks]:
        summary["lines"].append(f"{gate_line(checks)}; each is in leaks.json")
    if options.gene_groups is not None:
        groups = tables.read_groups(options.gene_groups)
        summary["groups"] = tables.summarise_groups(table[table["panel"]], groups)
    facts = {
        **about,
        "genes_judged": len(table),
        "controls": _by_fold(parts, lambda part: part.beside.facts),
        "scores": METRICS,
        "units": "training standard deviations of each gene's target",
        "judging": dataclasses.asdict(options),
        "brstnet": __version__,
    }
    return Evaluation(
        scores=scores,
        panels=genes[["fold", "symbol", "panel", "variable", "listed"]],
        spots=pd.concat(map(spot_table, judged), ignore_index=True),
        genes=table,
        subgroups=grouped,
        null=null,
        summary=summary,
        protocol=strict(facts),
    )


def _ceilings(case: Case, options: Judging) -> dict[str, SectionCeiling]:
    return belief.ceilings(
        case.yardstick,
        case.store,
        case.sections,
        case.genes,
        thinnings=options.thinnings,
        seed=options.seed,
    )


def _by_fold(parts: Sequence[Part], facts: Callable[[Part], Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of the only part; of several, those that all share, and else a fact a fold."""
    if len(parts) == 1:
        return dict(facts(parts[0]))
    found = [facts(part) for part in parts]
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        each = {
            f"fold {p.judged.fold}": f[name] for p, f in zip(parts, found, strict=True) if name in f
        }
        first, *others = each.values()
        shared = len(each) == len(parts) and all(other == first for other in others)
        merged[name] = first if shared else each
    return merged


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


def _report(result: Evaluation, checks: Sequence[Check], out: Path) -> None:
    """report.html: all of it on a page."""
    blocks = report.report_blocks(
        result.summary,
        result.scores,
        result.panels.rename_axis("gene"),
        result.genes,
        result.subgroups,
        out / "figures",
    )
    blocks[1:1] = report.gate_blocks(checks)
    facts = result.protocol
    patients = ", ".join(facts["patients"])
    page = report.page(
        f"Judged on {patients}",
        facts["line"],
        blocks,
        report.tiles(result.summary),
        f"brstnet {facts['brstnet']}; store {facts['store']}; {facts['yardstick']}",
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def _write(result: Evaluation, out: Path) -> None:
    result.scores.to_parquet(out / "scores.parquet")
    result.scores.to_csv(out / "scores.csv", index=False)
    result.panels.rename_axis("gene").reset_index().to_parquet(out / PANELS)
    result.spots.to_parquet(out / "spots.parquet")
    result.genes.to_csv(out / "genes.csv")
    result.subgroups.to_csv(out / "subgroups.csv", index=False)
    result.null.to_csv(out / "null.csv", index=False)
    for name, values in (("summary", result.summary), ("protocol", result.protocol)):
        (out / f"{name}.json").write_text(json.dumps(strict(values), indent=1), encoding="utf-8")
