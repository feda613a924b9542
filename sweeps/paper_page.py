"""The paper's results as one page that opens from disk: all tables and figures are in it."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from brstnet.evaluation.paper import printed
from brstnet.evaluation.paper.models import DEPTH
from brstnet.evaluation.paper.same_quantity import TRAINING_ERRORS
from brstnet.evaluation.paper.tables import DEPTH_LABEL, clock
from brstnet.page import environment
from sweeps.paper_results import Results, with_clock


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of ours, the printed one below it, and whether ours is the best of its row."""

    ours: float
    printed: float = float("nan")
    best: bool = False


def page(results: Results) -> str:
    """Draw the page; all text is escaped, nothing is loaded."""
    made = environment()
    made.filters["clock"] = clock
    absent = [model for model in results.models if model.missing]
    groups = itertools.groupby(absent, key=lambda model: model.missing)
    why = [(reason, [model.label for model in group]) for reason, group in groups]
    return made.from_string(PAGE).render(
        r=results,
        verdicts=results.verdicts,
        above=above(results),
        halves=[half_1(results.table_1, auxnet=auxnet) for auxnet in (True, False)],
        table_2=results.table_2.to_dict("records"),
        table_3=with_clock(results.table_3).to_dict("records"),
        missing=merged(why),
        errors=printed.ERRORS,
        training_errors=TRAINING_ERRORS,
        papers_best=f"{printed.NAMES[printed.BEST]} + AuxNet",
        bins=printed.bins(),
    )


def merged(groups: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The same reason once."""
    found: dict[str, list[str]] = {}
    for reason, models in groups:
        found.setdefault(reason, []).extend(models)
    return list(found.items())


def above(results: Results) -> list[dict[Hashable, Any]]:
    """Genes above 0 and above 0.5: of the best model, of the control, and as printed."""
    table = results.figure_2
    best = (table["model"] == results.best.label) & (table["whose"] == "ours")
    control, theirs = table["backbone"] == DEPTH, table["whose"] == "printed"
    rows = pd.concat([table[best], table[control], table[theirs]])
    positive = list(printed.bins())[1:]
    rows = rows.assign(above_0=rows[positive].sum(axis=1), above_half=rows[positive[-1]])
    numbers = ["above_0", "above_half", "genes"]
    return rows[["model", "whose", *numbers]].astype(dict.fromkeys(numbers, int)).to_dict("records")


def half_1(table: pd.DataFrame, *, auxnet: bool) -> dict[str, Any]:
    """Table 1 with or without AuxNet, for the page: column names, and rows of cells."""
    control = table["backbone"] == DEPTH
    part = table[(table["auxnet"] == auxnet) & ~control]
    there = part.groupby("model", sort=False)["pcc"].transform(lambda pcc: pcc.notna().any())
    known = part.groupby("model", sort=False)["printed"].transform(lambda p: p.notna().any())
    part = part[there | known]
    models = list(dict.fromkeys(part["model"]))
    rows = []
    for symbol, mine in part.groupby("symbol", sort=False):
        highest, first = mine["pcc"].max(), mine.iloc[0]
        cells = [
            Cell(ours=row["pcc"], printed=row["printed"], best=row["pcc"] == highest)
            for _, row in mine.iterrows()
        ]
        depth = table[control & (table["symbol"] == symbol)]["pcc"].iloc[0]
        about = {"symbol": symbol, "rank": first["rank"], "papers": first["papers"]}
        if not (mine["pcc"].notna() | mine["printed"].notna()).any():
            continue  # a gene of the paper's that nobody predicts here
        about["absent"] = mine["pcc"].isna().all()
        rows.append({**about, "cells": [*cells, Cell(ours=depth)]})
    names = [short(name) for name in models]
    return {"models": [*names, DEPTH_LABEL], "rows": rows, "any": bool(models), "auxnet": auxnet}


def short(name: str) -> str:
    """A model's name as the paper shortens it in Table 1."""
    name = name.removesuffix(" + AuxNet")
    return name.replace("EfficientNet", "ENet").replace("Inception", "Incep")


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ r.sweep }} &ndash; the paper's results</title>
<style>
{{ style | safe }}
body { max-width: 84rem }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.2rem } h3 { margin: 1.2rem 0 .4rem; font-size: .95rem }
p, li { max-width: 62rem }
.protocol, .verdict { margin: .8rem 0; padding: .55rem .9rem; background: var(--tint);
  border-left: 3px solid var(--accent); border-radius: 0 6px 6px 0; overflow-wrap: anywhere }
.verdict.other { background: var(--warm); border-color: var(--bad) }
.verdict strong { display: block } .verdict ul { margin: .2rem 0 0; padding-left: 1.1rem }
details { margin: .3rem 0 .8rem; color: var(--soft); font-size: .9rem }
details ul { margin: .3rem 0; padding-left: 1.1rem }
.card { padding: .4rem .6rem; overflow-x: auto; margin: .6rem 0 }
th, td { padding: .3rem .5rem; font-size: .85rem; text-align: right; white-space: nowrap }
th { vertical-align: bottom; white-space: normal }
th:first-child, td:first-child, .l { text-align: left } .wrap { white-space: normal; width: 24% }
.p { color: var(--soft); font-size: .8em; display: block } td.p { display: table-cell }
.best { font-weight: 700 } .control { color: var(--soft); font-style: italic }
.missing td { color: var(--soft) } .sum td { font-weight: 600 }
figure { margin: .6rem 0 } img { border: 1px solid var(--line) }
figcaption { font-size: .85rem; margin-top: .3rem; max-width: 62rem }
.tag { font-size: .75rem; color: var(--soft); margin-left: .4rem }
</style>
{% macro verdict(v) %}
<div class="verdict{{ "" if v.same else " other" }}">
{% if v.same %}<strong>{{ v.line }}</strong>
{% else %}<strong>Not the same quantity as the paper's:</strong>
<ul>{% for each in v.quantity %}<li>{{ each }}</li>{% endfor %}</ul>{% endif %}</div>
{% if v.training %}<details{{ " open" if v.same }}><summary>The models were made otherwise in
{{ v.training | length }} setting{{ "s" if v.training | length > 1 }}</summary>
<ul>{% for each in v.training %}<li>{{ each }}</li>{% endfor %}</ul></details>{% endif %}
<details><summary>What the paper leaves open, and what was done here</summary>
<ul>{% for each in v.open %}<li>{{ each }}</li>{% endfor %}</ul></details>
{% endmacro %}
{% macro both(ours, printed) %}
<td>{{ ours | number(4) }}</td><td class="p">{{ printed | number(4) }}</td>
{% endmacro %}
<div class="soft">brstnet: the results of Rahaman, Millar and Meijering 2023, beside ours</div>
<h1>{{ r.sweep }}</h1>
<div class="protocol">{{ r.line }}<br><span class="soft">Store: {{ r.store }}</span></div>
<p class="soft">Ours stand first, the paper's printed values in grey. Whether the two are the same
quantity is worked out, for each table, from the protocol of the trials.
Best model here, by cross-validation: <strong>{{ r.best.label }}</strong>
({{ r.best.score | number(4) }}).</p>
<div class="card"><table><thead><tr><th>genes by median PCC on the held-out patient</th>
<th>above 0</th><th>above 0.5</th><th>of</th></tr></thead><tbody>
{% for row in above %}
<tr><td{% if row.model.startswith("total") %} class="control"{% endif %}>{{ row.model }}
{{ "(the paper's printed values)" if row.whose == "printed" }}</td>
<td>{{ row.above_0 }}</td><td>{{ row.above_half }}</td><td>{{ row.genes }}</td></tr>
{% endfor %}</tbody></table></div>
{% if missing %}<details><summary>
{{ missing | map(attribute=1) | map("length") | sum }} of {{ r.models | length }} models are
missing</summary><ul>
{% for reason, models in missing %}<li>{{ models | join(", ") }}: {{ reason }}</li>{% endfor %}
</ul></details>{% endif %}

<h2>Table 1. Median PCC of the top genes on the held-out patient</h2>
{{ verdict(verdicts.table1) }}
{% for half in halves if half.any %}
<h3>{{ "With AuxNet" if half.auxnet else "Without AuxNet (the paper's: in its supplement)" }}</h3>
<div class="card"><table><thead><tr><th>gene</th><th>rank here</th>
{% for model in half.models %}<th>{{ model }}</th>{% endfor %}</tr></thead><tbody>
{% for row in half.rows %}
<tr><td>{{ row.symbol }}{% if row.papers %}
<span class="tag">paper's{{ "; not predicted here" if row.absent }}</span>{% endif %}</td>
<td>{{ row.rank | number(0) }}</td>
{% for cell in row.cells %}<td{% if loop.last %} class="control"{% endif %}>
<span{% if cell.best %} class="best"{% endif %}>{{ cell.ours | number(3) }}</span>
{% if cell.printed == cell.printed %}
<span class="p">{{ cell.printed | number(4) }}</span>{% endif %}
</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
<p class="soft">First the ten genes that {{ r.best.label }} predicts best, then the paper's ten
where they are not among them. Rows outside the paper's ten have no printed value. Bold: the best
of the row. A dash: the model is missing, or the gene is not among those that it predicts and the
store has measured.</p>

<h2>Table 2. Mean errors over genes, in training standard deviations</h2>
{{ verdict(verdicts.table2) }}
<p>All rows are over the same {{ r.common }} genes, those that every model here predicts.
Training columns: {{ training_errors.partition(": ")[2] }}.</p>
<div class="card"><table><thead><tr><th rowspan="2">model</th>
<th colspan="4">training</th><th colspan="4">held-out patient</th><th rowspan="2"></th></tr><tr>
{% for _ in (1, 2) %}<th>aMAE</th><th>printed</th><th>aRMSE</th><th>printed</th>{% endfor %}</tr>
</thead><tbody>{% for row in table_2 %}
<tr{% if row.note and row.test_aMAE != row.test_aMAE %} class="missing"{% endif %}>
<td{% if row.backbone == "depth_only" %} class="control"{% endif %}>{{ row.model }}</td>
{% for error in errors %}{{ both(row[error], row["printed_" ~ error]) }}{% endfor %}
<td class="l wrap soft">{{ row.note }}</td></tr>{% endfor %}
</tbody></table></div>

<h2>Table 3. Training time of all folds</h2>
{{ verdict(verdicts.table3) }}
<p>This is said of the times (h:mm:ss). The columns beside EfficientNet-b0 are a network's time
divided by that one's, with or without AuxNet as it is: the hardware falls out in part, and what
networks cost beside one another can be compared.</p>
<div class="card"><table><thead><tr><th>model</th><th>time (h:mm:ss)</th><th>printed</th>
<th>beside EfficientNet-b0</th><th>printed</th><th></th></tr></thead><tbody>
{% for row in table_3 %}
<tr class="{{ "sum" if row.model == "all" else "missing" if row.note }}"><td>{{ row.model }}</td>
<td>{{ row.time or "&ndash;" | safe }}</td><td class="p">{{ row.printed_time }}</td>
<td>{{ row.relative | number(2) }}</td><td class="p">{{ row.printed_relative | number(2) }}</td>
<td class="l wrap soft">{{ row.note }}</td></tr>
{% endfor %}</tbody></table></div>

<h2>Fig. 2. Genes by their PCC, each model</h2>
{{ verdict(verdicts.fig2) }}
<figure><img src="{{ r.figures.fig2 | picture }}" alt="stacked bars"><figcaption>Hatched: the
paper's printed counts, of {{ papers_best }} alone; those of the other models are in a picture.
The first two of its bins follow from the others: {{ bins["<= 0"] }} genes not above 0,
{{ bins["0 - 0.1"] }} between 0 and 0.1.</figcaption></figure>

<h2>Fig. 3. Positive PCCs of {{ r.best.label }}</h2>
{{ verdict(verdicts.fig3) }}
<figure><img src="{{ r.figures.fig3 | picture }}" alt="histogram"></figure>

<h2>Fig. 4. {{ r.map.symbol }} on section {{ r.map.section }}</h2>
{{ verdict(verdicts.fig4) }}
<figure><img src="{{ r.figures.fig4 | picture }}" alt="slide, labels, measured, predicted, overlay">
<figcaption>H&amp;E: {{ r.map.picture.origin }}. Labels: black tumour, white normal, grey neither
or not said{{ "" if r.map.kind_N is not none else "; this section has none" }}. Measured and
predicted are in training standard deviations, each with its own colours (2nd to 98th percentile).
The paper shows B2M on BC23903 C2, PCC 0.6325.</figcaption></figure>
<footer>{{ r.sweep }}. Numbers: results.json and the CSV files beside this page.</footer>
</html>
"""
