"""After a sweep: what its trials teach, as one page that opens from disk and as tables.

The pictures are Optuna's but for the bars; the numbers come from `sweeps/importance.py`.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from jinja2 import Environment
from optuna import visualization as draw
from optuna.distributions import (
    CategoricalDistribution,
)
from plotly import graph_objects as go
from plotly import offline

from sweeps.importance import (
    COLOURS,
    DRAWN,
    complete,
    early_view,
    importance_table,
    pareto_table,
    score_view,
    thinned,
    tradeoff_view,
    trials_table,
    value_names,
)


def write(study: optuna.Study, folder: Path, *, title: str, note: str) -> list[Path]:
    """Write insight.html, importance.csv, trials.csv and pareto.csv; the same study, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        importance, pareto = importance_table(study), pareto_table(study)
        page = page_html(sections(study, importance, pareto), title, [note, counts(study)])
    tables = {"importance": importance, "trials": trials_table(study), "pareto": pareto}
    paths = [folder / "insight.html", *(folder / f"{name}.csv" for name in tables)]
    paths[0].write_text(page, encoding="utf-8")
    for path, table in zip(paths[1:], tables.values(), strict=True):
        table.to_csv(path, index=False)
    return paths


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines in which Optuna says that a study was made: ours are in memory."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


# The page


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a line that says how to read what follows, and what follows."""

    heading: str
    words: str
    figures: list[go.Figure] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    table: pd.DataFrame | None = None


def counts(study: optuna.Study) -> str:
    """How many trials ended how, and what that means for what is drawn."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    words = {"FAIL": "failed"}
    ended = ", ".join(
        f"{states.count(name)} {words.get(name, name.lower())}" for name in sorted(set(states))
    )
    text = f"{len(states)} trials: {ended or 'none'}."
    if "PRUNED" in states:
        text += (
            " Complete trials are those that survived pruning: a biased sample, in which what loses"
            " early is missing. What is said of all trials goes by the score at the first report."
        )
    return text


def sections(study: optuna.Study, importance: pd.DataFrame, pareto: pd.DataFrame) -> list[Section]:
    """All that the page shows, top to bottom."""
    score, name = score_view(study), value_names(study)[0]
    found = [importance_section(importance)]
    if complete(score):
        found = [history_section(score, name), *found]
        found += [coordinates_section(score, name), slices_section(score, name)]
        found += contour_sections(score, name, importance)
    early, when = early_view(study)
    if complete(early):
        found.append(coordinates_section(early, name, f", all trials{when}"))
        found.append(slices_section(early, name, f", all trials{when}"))
    if any(trial.intermediate_values for trial in score.get_trials(deepcopy=False)):
        found.append(curves_section(score, name))
    if complete(score):
        found.append(pareto_section(study, pareto))
    if score.get_trials(deepcopy=False):
        found.append(timeline_section(score))
    return found


def history_section(score: optuna.Study, name: str) -> Section:
    """Scores in the order of the trials."""
    figure = draw.plot_optimization_history(score, target_name=name)
    return Section(
        heading="Optimisation history",
        words="A dot is a complete trial; the line is the best so far.",
        figures=[figure],
    )


def importance_section(importance: pd.DataFrame) -> Section:
    """Bars of both evaluators for each branch, and what could not be judged."""
    told = importance[importance["fanova"].notna()]
    untold = importance[importance["note"] != ""]
    sizes = importance["branch"].value_counts().to_dict()
    lines = []
    for (branch, note), rows in untold.groupby(["branch", "note"], sort=False):
        whole = len(rows) == sizes[branch] > 1
        names = "" if whole else ", ".join(rows["parameter"])
        lines.append(": ".join(filter(None, [str(branch), names, str(note)])))
    return Section(
        heading="Parameter importances",
        words="Each parameter's own share, adding to one in a branch; interactions have no part in "
        "it. fANOVA: of the variance of the score; PED-ANOVA: of what sets the best tenth of the "
        "trials apart (of few trials the best five, at most half). With less than fifty trials the "
        "order is a hint.",
        figures=[bars(rows, str(label)) for label, rows in told.groupby("branch", sort=False)],
        lines=lines,
    )


def bars(rows: pd.DataFrame, label: str) -> go.Figure:
    """One branch of the importance table. Optuna's own chart has one evaluator, and computes."""
    upwards = rows[::-1]
    figure = go.Figure()
    for column, name, colour in (
        ("ped_anova", "PED-ANOVA", "#9ecae1"),
        ("fanova", "fANOVA", "#08519c"),
    ):
        figure.add_bar(
            x=upwards[column],
            y=upwards["parameter"],
            name=name,
            orientation="h",
            marker_color=colour,
            text=upwards[column].map("{:.2f}".format, na_action="ignore"),
            textposition="outside",
            cliponaxis=False,
        )
    trials = rows["trials"].iloc[0]
    figure.update_layout(
        legend={"orientation": "h", "traceorder": "reversed", "y": 1, "yanchor": "bottom"},
        height=120 + 42 * len(rows),
        xaxis={"range": [0, 1.1], "title": f"{label}: {trials} trials"},
    )
    return figure


def coordinates_section(score: optuna.Study, name: str, whose: str = "") -> Section:
    """Parallel coordinates."""
    figure = draw.plot_parallel_coordinate(thinned(score), target_name=name)
    figure.for_each_annotation(
        lambda tick: tick.update(text=_short(tick.text), bgcolor="rgba(255, 255, 255, 0.7)")
    )
    return Section(
        heading=f"Parallel coordinates{whose}",
        words="A line is a trial, the darker the better. None: the trial did not draw "
        "that parameter, or drew None." + _of(len(complete(score))),
        figures=[figure],
    )


def _log_ticks(score: optuna.Study, param: str) -> dict[str, Any]:
    """Ticks of a logarithmic axis as whole numbers, where plotly writes 2, 5 and 100 micro."""
    drawn = [trial for trial in complete(score) if param in trial.params]
    if not getattr(drawn[0].distributions[param], "log", False):
        return {}
    low, high = min(t.params[param] for t in drawn), max(t.params[param] for t in drawn)
    steps = (1,) if high >= 100 * low else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [f"{step}e{decade}" for decade in decades for step in steps]
    values = [float(tick) for tick in ticks]
    return {"tickvals": values, "ticktext": [f"{value:g}" for value in values]}


def _short(text: str) -> str:
    """A tick text that does not run into the axis on its left."""
    return text if len(text) <= 15 else f"{text[:14]}\N{HORIZONTAL ELLIPSIS}"


def _of(count: int) -> str:
    return f" About {DRAWN} of {count} trials, evenly chosen." if count > DRAWN else ""


def slices_section(score: optuna.Study, name: str, whose: str = "") -> Section:
    """The score against each parameter, a figure each: Optuna sets them all in one row."""
    params = sorted({param for trial in complete(score) for param in trial.params})
    figures = []
    for param in params:
        figure = draw.plot_slice(score, [param], target_name=name)
        figure.update_traces(marker_showscale=False)
        figure.update_layout(height=300)
        figure.update_xaxes(_log_ticks(score, param))
        figures.append(figure)
    return Section(
        heading=f"Slices{whose}",
        words="The score against each parameter, over the trials that drew it; the darker the "
        "later.",
        figures=figures,
    )


def contour_sections(score: optuna.Study, name: str, importance: pd.DataFrame) -> list[Section]:
    """The score over the two most important numbers, if every trial drew two that were judged."""
    told = importance[(importance["branch"] == "all") & importance["fanova"].notna()]
    distributions = complete(score)[0].distributions
    numbers = [
        param
        for param in told["parameter"]
        if not isinstance(distributions[param], CategoricalDistribution)
    ]
    if len(numbers) < 2:
        return []
    figure = draw.plot_contour(thinned(score), numbers[:2], target_name=name)
    across, up = sorted(numbers[:2])  # as Optuna sets them
    figure.update_layout(xaxis=_log_ticks(score, across), yaxis=_log_ticks(score, up))
    words = "A dot is a complete trial; the colour between dots is interpolated."
    words += _of(len(complete(score)))
    heading = f"Contour of {numbers[0]} and {numbers[1]}"
    return [Section(heading=heading, words=words, figures=[figure])]


def curves_section(score: optuna.Study, name: str) -> Section:
    """What trials reported on the way."""
    states = {f"Trial{trial.number}": trial.state for trial in score.get_trials(deepcopy=False)}
    figure = draw.plot_intermediate_values(score)
    count = len(figure.data)
    figure.data = figure.data[:: math.ceil(count / DRAWN)]
    for trace in figure.data:  # Optuna gives each trial a colour of its own, and ten at that
        colour = COLOURS.get(states[trace.name], "#969696")
        trace.update(line={"color": colour, "width": 1}, marker_size=4, opacity=0.6)
    last = max(max(trace.x) for trace in figure.data)
    figure.update_layout(yaxis_title=name, xaxis_dtick=math.ceil(last / 10))
    return Section(
        heading="Intermediate values",
        words="What each trial reported on its way: complete trials in blue, pruned ones in "
        "orange up to where they were stopped." + _of(count),
        figures=[figure],
    )


def pareto_section(study: optuna.Study, pareto: pd.DataFrame) -> Section:
    """The trials that no other beats in all objectives."""
    tradeoff, names = tradeoff_view(study)
    figures = []
    if len(names) in (2, 3):  # what Optuna draws
        figure = draw.plot_pareto_front(tradeoff, target_names=names)
        for trace, colour in zip(figure.data, ("#9ecae1", "#cb181d"), strict=True):
            trace.update(marker={"color": colour, "showscale": False})  # Optuna's fade with age
        figures.append(figure)
    words = f"Red: no other trial beats it in {' and '.join(names)} at once."
    if len(names) == 1:
        words = "The trials told no cost: the best alone is left."
    return Section(heading="Pareto front", words=words, figures=figures, table=pareto)


def timeline_section(score: optuna.Study) -> Section:
    """When trials ran."""
    figure = draw.plot_timeline(score)
    for trace in figure.data:
        state = next((each for each in COLOURS if each.name == trace.name), None)
        trace.marker.color = COLOURS[state] if state else trace.marker.color
        trace.marker.line.width = 0  # else the bars of a thousand trials are all outline
    return Section(
        heading="Timeline",
        words="When each trial ran, and how it ended.",
        figures=[figure],
    )


def page_html(found: list[Section], title: str, notes: list[str]) -> str:
    """The page, with plotly.js in it once; all text is escaped, nothing is loaded."""
    numbers = itertools.count()  # plotly's own ids are random

    def figure_html(figure: go.Figure) -> str:
        figure.update_layout(
            template="plotly_white",
            title=None,  # the section has a heading
            height=figure.layout.height or 400,
            margin={"l": 70, "r": 20, "t": 30, "b": 50},
        )
        return str(
            figure.to_html(
                full_html=False,
                include_plotlyjs=False,
                div_id=f"figure-{next(numbers)}",
                config={"displayModeBar": False, "responsive": True},
            )
        )

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": figure_html, "table": table_html}
    page = environment.from_string(PAGE)
    return page.render(sections=found, title=title, notes=notes, plotlyjs=offline.get_plotlyjs())


def table_html(table: pd.DataFrame) -> str:
    """A table as HTML, with four digits a number."""
    short = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    short = short.mask(table.isna(), "")
    return str(
        short.rename(columns=lambda n: n.removeprefix("params_")).to_html(
            index=False, border=0, na_rep=""
        )
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto;
  padding: 0 1em; }
h1 { margin-bottom: .2em; }
h2 { margin: 2em 0 0; border-top: 1px solid #ddd; padding-top: .8em; }
p { margin: .2em 0; max-width: 60em; }
.figures { display: grid; grid-template-columns: 1fr; }
.figures.many { grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); }
.figures > div { min-width: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  margin-top: .5em; }
th, td { text-align: right; padding: .2em .8em; border-bottom: 1px solid #eee;
  white-space: nowrap; }
</style>
<script>{{ plotlyjs | safe }}</script>
</head>
<body>
<h1>{{ title }}</h1>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
<p>Tables: <a href="importance.csv">importance.csv</a>, <a href="trials.csv">trials.csv</a>,
<a href="pareto.csv">pareto.csv</a>.</p>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
<p>{{ section.words }}</p>
{% for line in section.lines %}
<p>{{ line }}</p>
{% endfor %}
<div class="figures{{ ' many' if section.figures | length > 1 }}">
{% for figure in section.figures %}
<div>{{ figure | figure | safe }}</div>
{% endfor %}
</div>
{% if section.table is not none %}
<div class="table">{{ section.table | table | safe }}</div>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
