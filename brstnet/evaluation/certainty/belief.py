"""How far the scores of an evaluation can be believed: intervals, what chance gives, the ceiling.

The tools are `uncertainty` and `ceiling`; here they meet the table of scores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from brstnet import metrics
from brstnet.data.store import Store
from brstnet.evaluation.certainty import uncertainty
from brstnet.evaluation.certainty.ceiling import SectionCeiling, noise_ceiling
from brstnet.evaluation.certainty.null import Section, permutation_null
from brstnet.evaluation.scores import MODEL, TRUTH, Judged
from brstnet.evaluation.tables import section_table
from brstnet.evaluation.yardstick import Scale, raw_counts
from brstnet.training.fitted import transform

NOT_COMPARED = (TRUTH, "training_mean")
"""What a model's PCC is not compared with: it has none."""


def patient_scores(
    scores: pd.DataFrame, predictor: str, metric: str, genes: Sequence[str] | pd.Index
) -> tuple[np.ndarray, list[str]]:
    """Mean over each patient's sections, (G, P), and the patients."""
    table = section_table(scores, predictor, metric, genes)
    patients = [str(patient) for patient in table.columns.get_level_values("patient")]
    per_patient = uncertainty.patient_table(table.to_numpy(float), patients)
    return per_patient, list(dict.fromkeys(patients))


def intervals(scores: pd.DataFrame, genes: Sequence[str] | pd.Index) -> dict[str, Any]:
    """Intervals over patients of the model's scores, and of what it is better than each control.

    The value is the median over genes of the mean over patients of the mean of their sections.
    With fewer than 5 patients there is no interval, and `line` says so.
    """
    found: dict[str, Any] = {}
    for metric in ("pcc", "partial_pcc"):
        mine, patients = patient_scores(scores, MODEL, metric, genes)
        found[metric] = _plain(uncertainty.bootstrap_patients(mine))
    mine, patients = patient_scores(scores, MODEL, "pcc", genes)
    for control in dict.fromkeys(scores["predictor"]):
        if control in (MODEL, *NOT_COMPARED):
            continue
        other, _ = patient_scores(scores, control, "pcc", genes)
        difference = uncertainty.paired_bootstrap(mine, other)
        found[f"pcc_minus_{control}"] = {
            **_plain(difference.interval),
            "p": difference.p,
            "smallest_p": difference.smallest_p,
        }
    stnet, tests = uncertainty.stnet_count(mine), uncertainty.gene_tests(mine)
    return found | {
        "patients": patients,
        "stnet": {"genes": stnet.genes, "rule": stnet.line},
        "sign_test": {"genes": tests.found(), "undefined": tests.genes_undefined},
    }


def gene_tests(scores: pd.DataFrame, genes: Sequence[str] | pd.Index) -> pd.DataFrame:
    """Of each gene: is the model's PCC above 0 in patients? A one-sided sign test, adjusted.

    Columns patients (with a score), patients_positive, p_sign, p_holm, p_bh.
    """
    per_patient, _ = patient_scores(scores, MODEL, "pcc", genes)
    tests = uncertainty.gene_tests(per_patient)
    columns = {
        "patients": tests.patients_G,
        "patients_positive": tests.positive_G,
        "p_sign": tests.p_G,
        "p_holm": tests.holm_G,
        "p_bh": tests.bh_G,
    }
    return pd.DataFrame(columns, index=pd.Index(genes))


def _plain(interval: uncertainty.Interval) -> dict[str, Any]:
    keys = ("value", "low", "high", "unit", "units", "genes_undefined")
    return {key: getattr(interval, key) for key in keys} | {"line": interval.line()}


def nulls(
    judged: Sequence[Judged], *, draws: int = 200, seed: int = 0
) -> tuple[pd.DataFrame, list[str]]:
    """What chance gives, over each fold's panel, and why a kind of chance could not be drawn.

    A row per score (pcc, partial_pcc), kind (spots, torus) and statistic: observed, the null's
    mean, sd and quantiles, p, draws.
    """
    parts, why = [], []
    for score in ("pcc", "partial_pcc"):
        given_depth = score == "partial_pcc"
        sections = [s for one in judged for s in _null_sections(one, given_depth=given_depth)]
        for kind in ("spots", "torus"):
            try:
                null = permutation_null(sections, kind, draws=draws, seed=seed)
            except ValueError as error:
                why.append(f"{kind}: {error}")
                continue
            parts.append(null.table().reset_index().assign(score=score))
    table = pd.concat(parts, ignore_index=True)
    first = ["score", "kind", "statistic"]
    return table[[*first, *(c for c in table if c not in first)]], list(dict.fromkeys(why))


def _null_sections(judged: Judged, *, given_depth: bool) -> list[Section]:
    panel = judged.genes["panel"].to_numpy(bool)
    array_N2 = judged.spots[["array_x", "array_y"]].to_numpy(float)
    found = []
    for _, patient, rows in judged.sections():
        sides = (judged.predictions[MODEL][rows][:, panel], judged.true_NG[rows][:, panel])
        if given_depth:
            sides = tuple(metrics.residual(side, judged.log_total_N[rows]) for side in sides)  # type: ignore[assignment]
        found.append(
            Section(
                patient=patient,
                pred_NG=sides[0],
                true_NG=sides[1],
                array_N2=array_N2[rows],
                genes=judged.genes.index[panel],
            )
        )
    return found


def cautious(nulls: pd.DataFrame) -> dict[str, Any]:
    """For each score and statistic the kind of chance to believe: of larger p, then larger p95."""
    worst = nulls.sort_values(["p", "null_p95"], ascending=False, kind="stable")
    worst = worst.drop_duplicates(["score", "statistic"])
    keys = ["observed", "null_p50", "null_p95", "p", "kind", "draws"]
    found: dict[str, Any] = {}
    for row in worst.to_dict("records"):
        found.setdefault(row["score"], {})[row["statistic"]] = {k: row[k] for k in keys}
    return found


def ceilings(
    scale: Scale,
    store: Store,
    sections: Sequence[str],
    genes: pd.DataFrame,
    *,
    thinnings: int = 10,
    seed: int = 0,
) -> dict[str, SectionCeiling]:
    """The noise ceiling of each gene on each section, in the target's units."""
    to_units = functools.partial(transform, target=scale.target, median_total=scale.median_total)
    return {
        name: noise_ceiling(
            raw_counts(store, [name], genes),
            store.spots([name])["total_counts"].to_numpy(float),
            to_units,
            thinnings=thinnings,
            seed=seed,
        )
        for name in sections
    }


def describe(summary: dict[str, Any]) -> list[str]:
    """Lines for people: the interval, what chance gives, the ceiling, the worst patient."""
    lines = [
        f"median PCC, patients' mean: {summary['interval']['pcc']['line']}",
        f"given total: {summary['interval']['partial_pcc']['line']}",
    ]
    for score, name in (("pcc", "PCC"), ("partial_pcc", "PCC given total")):
        found = summary["null"].get(score, {})
        above = [
            f"{one['observed']:.0f} > {t} ({one['null_p95']:.0f}, p {one['p']:.3f})"
            for t in ("0", "0.1", "0.3", "0.5")
            if (one := found.get(f"genes_above_{t}"))
        ]
        if above:
            lines.append(f"genes by {name} (chance's 95th percentile): {', '.join(above)}")
    model = summary["predictors"][MODEL]
    if "share_of_ceiling" in model:
        lines.append(
            "of what counting noise allows (a little low: genes whose halves agree): "
            f"{100 * model['share_of_ceiling']:.0f} %, "
            f"given total {100 * model['share_of_ceiling_partial']:.0f} %"
        )
    lines += summary["shallow_sections"]
    if (worst := summary["worst_patient"])["patients"] > 1:
        lines.append(
            f"worst of {worst['patients']} patients: {worst['patient']}, "
            f"median PCC {worst['median_pcc']:.3f}"
        )
    return lines
