"""An evaluation as one page that opens from disk: `report_blocks` decides, `page` only draws.

Nothing is loaded from elsewhere, and all text is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brstnet.evaluation import tables
from brstnet.evaluation.leaks.checks import PASSED, Check
from brstnet.evaluation.leaks.gate import gate_line, gate_rows
from brstnet.evaluation.scores import METRICS, MODEL, TRUTH
from brstnet.page import DASH, environment, number

GENES_SHOWN = 20
MAPS_SHOWN = 6
"""Sections whose maps are in the page; the others are in figures/."""
SIDES = {
    "median_pcc": "median PCC",
    "median_partial_pcc": "given total",
    "median_pcc_smoothed": "smoothed 3 x 3",
    "median_pcc_pooled": "pooled spots",
    "median_spearman": "Spearman",
    "median_ccc": "CCC",
    "median_spot_pcc": "per spot",
    "median_r2": "R2",
    "aMAE": "aMAE",
    "aRMSE": "aRMSE",
    "share_of_ceiling": "share of ceiling",
    "genes_above_0": "> 0",
    "genes_above_0.3": "> 0.3",
    "genes_above_0.5": "> 0.5",
}
"""Columns of the first table: keys of `tables.predictor_summary`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A part of a page: words, a table (its index is not shown), figures (PNG files)."""

    title: str
    note: str = ""
    lines: Sequence[str] = ()
    table: pd.DataFrame | None = None
    figures: Sequence[Path] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure to be seen first."""

    label: str
    value: str
    below: str = ""


def tiles(summary: Mapping[str, Any]) -> list[Tile]:
    """The figures to quote, with what qualifies each."""
    interval, worst = summary["interval"], summary["worst_patient"]
    found = [
        Tile(
            label="Median PCC",
            value=number(summary["median_pcc"]),
            below=f"patients' mean {interval['pcc']['line']}",
        ),
        Tile(
            label="Median PCC given total count",
            value=number(summary["median_partial_pcc"]),
            below=f"patients' mean {interval['partial_pcc']['line']}",
        ),
    ]
    if "share_of_ceiling" in summary:
        found.append(
            Tile(
                label="Of what counting noise allows",
                value=f"{100 * summary['share_of_ceiling']:.0f} %",
                below=f"given total {100 * summary['share_of_ceiling_partial']:.0f} %; over genes "
                "whose halves agree",
            )
        )
    if above := summary["null"].get("pcc", {}).get("genes_above_0"):
        found.append(
            Tile(
                label="Genes whose patients' mean PCC is above 0",
                value=f"{above['observed']:.0f} of {summary['genes']}",
                below=f"chance alone: up to {above['null_p95']:.0f} (95th percentile), "
                f"p {above['p']:.3f}",
            )
        )
    if worst["patients"] > 1:
        found.append(
            Tile(
                label=f"Worst of {worst['patients']} patients",
                value=number(worst["median_pcc"]),
                below=worst["patient"],
            )
        )
    return found


def report_blocks(
    summary: Mapping[str, Any],
    scores: pd.DataFrame,
    panels: pd.DataFrame,
    genes: pd.DataFrame,
    subgroups: pd.DataFrame,
    figures: Path,
) -> list[Block]:
    """The parts of an evaluation's page.

    Args:
        summary: of the evaluation.
        scores: the tidy table.
        panels: a row a fold and gene.
        genes: a row a gene, best first.
        subgroups: by subtype, patient, tissue.
        figures: folder of the figures that were drawn.
    """
    panel = genes[genes["panel"]]
    maps = sorted(figures.glob("genes_*.png"))
    left = (
        f" {len(maps) - MAPS_SHOWN} more sections are in figures/."
        if len(maps) > MAPS_SHOWN
        else ""
    )
    return [
        Block(
            title="The model beside the controls",
            note=f"Medians over the panel's {summary['genes']} genes (of the median over sections) "
            "unless the glossary below says more; errors in training standard deviations. A model "
            "that does not beat the colour ridge has learnt colour; what is left given the total "
            "count is what it knows beyond a spot's depth.",
            lines=[f"{tables.NAMES.get(k, k)}: {v}" for k, v in summary["not_available"].items()],
            table=side_table(summary["predictors"]),
            figures=[p for p in [figures / "pcc_histogram.png"] if p.is_file()],
        ),
        Block(
            title="Sections",
            note="Medians over the panel's genes. The ceiling is the best PCC of a perfect "
            "predictor, as counts are noisy.",
            lines=summary["shallow_sections"],
            table=section_rows(tables.within(scores, panels, "panel")),
        ),
        Block(
            title="What chance gives",
            note="Patients' means, and the same with truth and prediction put out of step, "
            "all genes together. spots: spots permuted freely; torus: the section mirrored and "
            "shifted as a whole, which keeps its smoothness. Shown is the kind with the larger p; "
            "both are in null.csv.",
            lines=summary["null_not_drawn"],
            table=null_rows(summary["null"]),
        ),
        Block(
            title="Subgroups",
            note="The same scores for parts of what was judged. Tumour and normal: within the "
            "spots of that tissue alone.",
            table=subgroup_rows(subgroups),
        ),
        Block(
            title=f"The panel's {min(GENES_SHOWN, len(panel))} best genes",
            note="Medians over sections; best of many, so expect less of them on new patients. All "
            "genes are in genes.csv.",
            table=gene_rows(panel.head(GENES_SHOWN)),
        ),
        *spread_blocks(figures / "reliability.png"),
        Block(
            title="Maps",
            note="Measured above, predicted below, each with its own colour range." + left,
            figures=maps[:MAPS_SHOWN],
        ),
        Block(
            title="Glossary",
            table=pd.DataFrame({"score": list(METRICS), "what it is": list(METRICS.values())}),
            folded=True,
        ),
    ]  # fmt: skip


def spread_blocks(figure: Path) -> list[Block]:
    """The spread of the models beside their errors; none where it was not taken."""
    if not figure.is_file():
        return []
    return [
        Block(
            title="Spread as uncertainty",
            note="Errors against the spread of the models: on the line the spread would be the "
            "error. What intervals hold is in coverage.parquet.",
            figures=[figure],
        )
    ]


def gate_blocks(checks: Sequence[Check]) -> list[Block]:
    """The leak gate's report; none where nothing could be checked, as of somebody's predictions."""
    if not checks:
        return []
    table = pd.DataFrame(gate_rows(checks))
    table["of"] = table["of"].str.replace(" ", "\N{NO-BREAK SPACE}")
    same = table.groupby(["state", "name", "why"], sort=False)["of"]  # of several folds, once
    table = same.agg(lambda of: ", ".join(filter(None, of))).reset_index()
    table = table[["state", "name", "of", "why"]]
    return [
        Block(
            title="Leak gate",
            note="Before anything was judged, from the raw counts and patches. "
            + gate_line(checks),
            table=table[table["state"] != PASSED].rename(columns={"name": "check"}),
        ),
        Block(title="Leak gate: every check", table=table, folded=True),
    ]


def side_table(predictors: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row a predictor, the model first; a dash where a constant has no correlation."""
    rows = []
    for name in (*tables.NAMES, *(p for p in predictors if p not in tables.NAMES)):
        if name not in predictors:
            continue
        found = predictors[name]
        row = {key: found.get(key) for key in SIDES}
        if found["genes_without_pcc"] == found["genes"]:  # no correlation, rather than one of 0
            row = {k: v if k in ("median_r2", "aMAE", "aRMSE") else None for k, v in row.items()}
        if found["genes_without_partial_pcc"] == found["genes"]:
            row["median_partial_pcc"] = None
        rows.append({"": tables.NAMES.get(name, name), **row})
    table = pd.DataFrame(rows).rename(columns=SIDES)
    counts = [SIDES[key] for key in SIDES if key.startswith("genes_above")]
    return table.astype(dict.fromkeys(counts, "Int64"))


def null_rows(null: Mapping[str, Any]) -> pd.DataFrame:
    """A row a score and statistic: observed, and what chance gives."""
    names = {"pcc": "PCC", "partial_pcc": "PCC given total"}
    rows = [
        {
            "score": names[score],
            "statistic": statistic.replace("_", " ").replace("pcc", "PCC"),
            "observed": round(one["observed"], 3),
            "chance: median": round(one["null_p50"], 3),
            "chance: 95th percentile": round(one["null_p95"], 3),
            "p": one["p"],
            "kind": one["kind"],
            "draws": one["draws"],
        }
        for score, found in null.items()
        for statistic, one in found.items()
    ]
    return pd.DataFrame(rows)


def section_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a section: spots, the model's medians, the best control's, the ceilings."""
    own = scores[(scores["section"] != "") & (scores["gene"] != "")]
    genes = pd.Index(own["gene"].unique())
    known, truth = (tables.values(own, name, genes) for name in (MODEL, TRUTH))
    by = ["patient", "section"]
    rows = known.groupby(by, sort=False)[["pcc", "partial_pcc", "spearman", "r2"]].median()
    for control in ("colour_ridge", "depth_only"):
        if (own["predictor"] == control).any():
            mine = tables.values(own, control, genes)
            rows[tables.NAMES[control]] = mine.groupby(by)["pcc"].median()
    for name in ("ceiling", "ceiling_partial"):
        if name in truth:
            rows[name.replace("_partial", ", given total")] = truth.groupby(by)[name].median()
    spots = own.groupby(by, observed=True)["n"].first()
    rows.insert(0, "spots", spots)
    return rows.rename(
        columns={"partial_pcc": "given total", "r2": "R2", "pcc": "PCC"}
    ).reset_index()


def subgroup_rows(subgroups: pd.DataFrame) -> pd.DataFrame:
    """The model and the colour ridge of each group."""
    mine = subgroups[subgroups["predictor"].isin([MODEL, "colour_ridge"])]
    shown = ["grouping", "group", "predictor", "patients", "sections", "spots", "median_pcc"]
    mine = mine[[*shown, "median_partial_pcc", "median_r2", "genes_above_0"]]
    named = mine.assign(predictor=mine["predictor"].map(tables.NAMES))
    return named.rename(columns=SIDES)


def gene_rows(genes: pd.DataFrame) -> pd.DataFrame:
    """Genes with their scores beside the controls' and the ceiling."""
    names = {
        "symbol": "gene",
        "pcc": "PCC",
        "partial_pcc": "given total",
        "spearman": "Spearman",
        "ccc": "CCC",
        "r2": "R2",
        "rmse_log": "RMSE, log units",
        "pcc_colour_ridge": "colour ridge",
        "pcc_depth_only": "total count only",
        "ceiling": "ceiling",
    }
    shown = [name for name in names if name in genes]
    return genes[shown].rename(columns=names).reset_index(names="id")


# Drawing ------------------------------------------------------------------------------------------


def page(
    title: str, line: str, blocks: Sequence[Block], first: Sequence[Tile] = (), foot: str = ""
) -> str:
    """Draw a page: its title, the protocol's line, tiles, blocks."""
    made = environment()
    made.filters |= {"cell": cell, "numeric": _numeric}
    found = made.from_string(PAGE)
    return found.render(title=title, line=line, blocks=blocks, tiles=first, foot=foot)


def cell(value: Any) -> str:
    """A value of a table in words."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        value = float(value)
        return f"{value:,.0f}" if value.is_integer() else number(value)
    return DASH if value is None or value is pd.NA else str(value)


def _numeric(table: pd.DataFrame) -> list[bool]:
    """Which columns hold numbers."""
    return [pd.api.types.is_any_real_numeric_dtype(kind) for kind in table.dtypes]


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
{{ style | safe }}
th, td { vertical-align: top } td.n, td:first-child { white-space: nowrap }
img { margin: 1rem 0 } summary { margin: 2.5rem 0 .6rem; font-size: 1.15rem; font-weight: 600 }
</style>
<div class="soft">brstnet evaluation</div>
<h1>{{ title }}</h1>
<div class="protocol">{{ line }}</div>
{% if tiles %}<div class="tiles">{% for tile in tiles %}
<div class="card"><div class="label">{{ tile.label }}</div><div class="big">{{ tile.value }}</div>
<div class="label">{{ tile.below }}</div></div>{% endfor %}</div>{% endif %}
{% for block in blocks %}
{% if block.folded %}<details><summary>{{ block.title }}</summary>
{% else %}<h2>{{ block.title }}</h2>{% endif %}
{% if block.note %}<p class="soft">{{ block.note }}</p>{% endif %}
{% for text in block.lines %}<p>{{ text }}</p>{% endfor %}
{% if block.table is not none %}{% set right = block.table | numeric %}
<div class="card scroll"><table><thead><tr>
{% for name in block.table.columns %}
<th{% if right[loop.index0] %} class="n"{% endif %}>{{ name }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in block.table.itertuples(index=false) %}<tr>
{% for value in row %}
<td{% if right[loop.index0] %} class="n"{% endif %}>{{ value | cell }}</td>
{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% endif %}
{% for figure in block.figures %}<img src="{{ figure | picture }}" alt="{{ figure.stem }}">
{% endfor %}
{% if block.folded %}</details>{% endif %}
{% endfor %}
<footer>{{ foot }}</footer>
</html>
"""
