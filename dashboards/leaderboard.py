"""One self-contained page for one sweep, made from MLflow alone.

`leaderboard_info` reads and decides, `leaderboard_html` only draws. The page opens from disk:
`python dashboards/leaderboard.py --runs runs --sweep NAME`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jsonargparse import auto_cli
from mlflow import MlflowClient

from brstnet.page import DASH, environment

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "brstnet"
STATES = ("COMPLETE", "PRUNED", "RUNNING", "FAILED")  # the order in the table
COLUMNS = [
    "run_id",
    "trial",
    "seed",
    "state",
    "champion",
    "score",
    "folds_done",
    "cost_seconds",
    "reason",
]
MEDIANS = {
    "median_pcc": "model",
    "median_pcc_colour_ridge": "control: colour ridge",
    "median_pcc_encoder_ridge": "control: frozen encoder, ridge",
    "median_pcc_tumour_mean": "control: tumour/normal mean",
    "median_pcc_depth_only": "control: depth only",
    "median_pcc_shuffled_ridge": "control: labels shuffled",
    "median_pcc_oracle_neighbour_mean": "oracle: neighbours' truth",
    "median_partial_pcc": "model, partial given depth",
    "median_partial_pcc_colour_ridge": "control: colour ridge, partial given depth",
}


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """What the page shows of one sweep.

    `trials` is in the order of the table, one row a trial: COLUMNS, `rank` (only of complete
    trials), a column for each of `folds`, and `params.NAME` for every setting.
    """

    sweep: str
    protocol: dict[str, Any]
    trials: pd.DataFrame
    folds: list[str]
    constants: dict[str, str]  # settings that are equal in all trials
    varying: dict[str, bool]  # the others: are they numbers?
    evaluations: list[dict[str, Any]]  # on held-out patients, oldest first
    facts: dict[str, Any]  # protocol_line, store, champion, states, cost_seconds, range, read_at


def leaderboard_info(client: MlflowClient, sweep: str) -> Leaderboard:
    """Read a sweep from MLflow; ValueError if there is none, or its runs break the structure."""
    run = _sweep_run(client, sweep)
    own = [each for each in _runs(client, "trial", sweep) if _parent(each) == run.info.run_id]
    trials = _trials(own, run.data.tags.get("brstnet.champion"))
    judged = [r for r in _runs(client, "evaluation", sweep) if _parent(r) in set(trials["run_id"])]
    evaluations = [_evaluation(each, trials) for each in judged]
    constants, varying = _split_settings(trials)
    return Leaderboard(
        sweep=sweep,
        protocol=json.loads(_tag(run, "brstnet.protocol")),
        trials=trials,
        folds=_fold_columns(trials),
        constants=constants,
        varying=varying,
        evaluations=evaluations,
        facts=_facts(run, trials, evaluations),
    )


def leaderboard_html(info: Leaderboard) -> str:
    """Draw the page: one file, nothing loaded from elsewhere, all text from runs escaped."""
    made = environment()
    made.filters |= {"setting": _setting, "duration": _duration}
    made.tests["known"] = pd.notna
    rows = info.trials.to_dict("records")
    return made.from_string(PAGE).render(info=info, facts=info.facts, rows=rows)


def _runs(client: MlflowClient, kind: str, sweep: str | None = None) -> list[Run]:
    """All runs of one kind, oldest first; the name is compared here, as it may hold a quote."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise ValueError(f"MLflow must hold the experiment {EXPERIMENT!r}: run a sweep first")
    where = f"tags.`brstnet.kind` = '{kind}'"
    search = partial(client.search_runs, [experiment.experiment_id], where)
    page = search()
    runs = list(page)
    while page.token:
        page = search(page_token=page.token)
        runs += page
    named = [run for run in runs if sweep in (None, run.data.tags.get("brstnet.sweep"))]
    return sorted(named, key=lambda run: run.info.start_time)


def _sweep_run(client: MlflowClient, sweep: str) -> Run:
    """The newest run of that sweep; ValueError if unknown."""
    runs = _runs(client, "sweep")
    named = [run for run in runs if run.data.tags.get("brstnet.sweep") == sweep]
    if not named:
        names = sorted({_tag(run, "brstnet.sweep") for run in runs})
        raise ValueError(f"sweep must be one of {', '.join(names) or '(none yet)'}; got {sweep!r}")
    return named[-1]


def _parent(run: Run) -> str | None:
    """The run above this one: a sweep that was begun anew under its name keeps its trials apart."""
    return run.data.tags.get("mlflow.parentRunId")


def _tag(run: Run, key: str) -> str:
    """The value of a tag that must be there; ValueError otherwise."""
    if key not in run.data.tags:
        raise ValueError(f"run {run.info.run_id} must have the tag {key!r}")
    return run.data.tags[key]


def _trials(runs: list[Run], champion: str | None) -> pd.DataFrame:
    """One row a trial: complete by score, then the others by folds done and score."""
    rows = [_trial_row(run, champion) for run in runs]
    extra = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    trials = pd.DataFrame(rows, columns=[*COLUMNS, *extra])
    complete = trials["state"] == "COMPLETE"
    order = pd.DataFrame(
        {
            "state": trials["state"].map(STATES.index),
            "folds": -trials["folds_done"].where(~complete, 0),
            "score": -trials["score"].astype(float),
            "trial": trials["trial"],
        }
    )
    order = order.sort_values(["state", "folds", "score", "trial"])  # no score: last
    trials = trials.loc[order.index].reset_index(drop=True)
    ranked = (trials["state"] == "COMPLETE") & trials["score"].notna() & (trials["seed"] == 0)
    trials["rank"] = ranked.cumsum().where(ranked)
    return trials


def _trial_row(run: Run, champion: str | None) -> dict[str, Any]:
    """The row of one trial; ValueError if its state is none of STATES."""
    state, metrics = _tag(run, "brstnet.state"), run.data.metrics
    if state not in STATES:
        raise ValueError(f"run {run.info.run_id}: state must be one of {STATES}, got {state!r}")
    return {
        "run_id": run.info.run_id,
        "trial": int(_tag(run, "brstnet.trial")),
        "seed": int(run.data.tags.get("brstnet.seed", 0)),  # above 0: a finalist's repeat
        "state": state,
        "champion": run.info.run_id == champion,
        "score": metrics.get("score", float("nan")),
        "folds_done": int(metrics.get("folds_done", 0)),
        "cost_seconds": metrics.get("cost_seconds", float("nan")),
        "reason": run.data.tags.get("brstnet.reason", ""),
        **{name: value for name, value in metrics.items() if name.startswith("score_fold_")},
        **{f"params.{name}": value for name, value in run.data.params.items()},
    }


def _fold_columns(trials: pd.DataFrame) -> list[str]:
    """The columns of fold scores, in the order of the folds (10 after 9)."""
    names = [str(name) for name in trials if str(name).startswith("score_fold_")]
    return sorted(names, key=lambda name: int(name.removeprefix("score_fold_")))


def _split_settings(trials: pd.DataFrame) -> tuple[dict[str, str], dict[str, bool]]:
    """Settings equal in all trials; then those that differ or that some lack: are they numbers?"""
    settings = trials.filter(regex=r"^params\.").sort_index(axis=1)
    settings.columns = settings.columns.str.removeprefix("params.")
    settings = settings.dropna(how="all")  # a trial may fail before it has logged its settings
    constants, varying = {}, {}
    for name, column in settings.items():
        if column.nunique(dropna=False) == 1:
            constants[str(name)] = str(column.iloc[0])
        else:
            numbers = pd.to_numeric(column.dropna(), errors="coerce")
            varying[str(name)] = bool(numbers.notna().all())
    return constants, varying


def _evaluation(run: Run, trials: pd.DataFrame) -> dict[str, Any]:
    """Summary of one held-out evaluation; its trial is None if it belongs to no trial."""
    metrics, prefix = run.data.metrics, "genes_above_"
    parent = trials["run_id"] == run.data.tags.get("mlflow.parentRunId")
    above = {float(k.removeprefix(prefix)): v for k, v in metrics.items() if k.startswith(prefix)}
    return {
        "run_id": run.info.run_id,
        "trial": int(trials.loc[parent, "trial"].iloc[0]) if parent.any() else None,
        "patients": _tag(run, "brstnet.patients"),
        "protocol_line": _tag(run, "brstnet.protocol_line"),
        "medians": {label: metrics[name] for name, label in MEDIANS.items() if name in metrics},
        "genes_above": dict(sorted(above.items())),
    }


def _facts(run: Run, trials: pd.DataFrame, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """What belongs to the sweep as a whole; `range` is the one axis of all drawn correlations."""
    drawn = trials[[*_fold_columns(trials), "score"]].melt()["value"].dropna().tolist()
    drawn += [value for each in evaluations for value in each["medians"].values()]
    best = trials[trials["champion"]].to_dict("records")
    return {
        "protocol_line": _tag(run, "brstnet.protocol_line"),
        "store": run.data.tags.get("brstnet.store", "not recorded"),
        "champion": best[0] if best else None,
        "states": {state: int((trials["state"] == state).sum()) for state in STATES},
        "cost_seconds": float(trials["cost_seconds"].sum()),
        "range": (min([0.0, *drawn]), max([0.1, *drawn])),
        "read_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _setting(value: Any) -> str:
    """A setting as logged, long decimals at four digits; a dash where a trial has none."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    text = DASH if pd.isna(value) else str(value)
    try:
        return f"{float(text):.4g}" if len(text) > 7 and ("." in text or "e-" in text) else text
    except ValueError:
        return text


def _duration(seconds: float) -> str:
    """Seconds in the unit a reader thinks in."""
    if pd.isna(seconds):
        return DASH
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def main(
    sweep: str, runs: Path = Path("runs"), tracking_uri: str | None = None, out: Path | None = None
) -> None:
    """Write the leaderboard of a sweep as one HTML file.

    Args:
        sweep: Name of the sweep.
        runs: Folder of the runs.
        tracking_uri: Where MLflow is; by default the database in the folder of the runs.
        out: The file to write; by default leaderboard.html in the sweep's folder.
    """
    database = runs / "mlflow.db"
    if tracking_uri is None and not database.is_file():  # MLflow would make an empty one
        raise ValueError(f"{database} must exist: run a sweep first, or give --tracking_uri")
    info = leaderboard_info(MlflowClient(tracking_uri or f"sqlite:///{database}"), sweep)
    out = out or runs / sweep / "leaderboard.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(leaderboard_html(info), encoding="utf-8")
    sys.stdout.write(f"{out}\n")


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ info.sweep }} &ndash; leaderboard</title>
<style>
{{ style | safe }}
th, td { white-space: nowrap } .score { font-weight: 600 }
th, th button { color: var(--soft); font-weight: 600 } th button { all: unset; cursor: pointer }
th button:focus-visible { outline: 2px solid var(--accent) }
th[aria-sort] button { color: var(--ink) }
th[aria-sort=ascending] button::after { content: " ↑" }
th[aria-sort=descending] button::after { content: " ↓" }
.champion td { background: var(--tint) } .PRUNED td, .FAILED td { color: var(--soft) }
.star { color: var(--accent); font-weight: 600 }
.reason { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; width: 15rem;
  overflow: hidden; white-space: normal; overflow-wrap: anywhere; color: var(--bad) }
.reason:is(:hover, :focus) { -webkit-line-clamp: none }
svg { display: block; width: 120px; height: 16px } .zero { stroke: var(--line);
  vector-effect: non-scaling-stroke }
circle { fill: var(--accent); fill-opacity: .55 } .mean { stroke: var(--ink); stroke-width: 2 }
.bars svg { width: 100%; min-width: 100px } .bars td { padding: .3rem .5rem .3rem 0; border: 0 }
.bars rect { fill: var(--control) } .bars .model rect { fill: var(--accent) }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 } dl div { min-width: 0 }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; overflow-wrap: anywhere }
</style>
{% set lo, hi = facts.range %}
{% macro x(value) %}{{ ((value - lo) / (hi - lo) * 112 + 4) | round(1) }}{% endmacro %}
{% macro zero(height) %}<line class="zero" x1="{{ x(0) }}" x2="{{ x(0) }}" y2="{{ height }}"/>
{% endmacro %}
{% macro strip(row) %}<svg viewBox="0 0 120 16" aria-hidden="true">{{ zero(16) }}
{% for fold in info.folds if row[fold] is known %}<circle cx="{{ x(row[fold]) }}" cy="8" r="3.5"/>
{% endfor %}{% if row.score is known %}
<line class="mean" x1="{{ x(row.score) }}" x2="{{ x(row.score) }}" y1="2" y2="14"/>{% endif %}</svg>
{% endmacro %}
{% macro head(name, numeric=true) %}<th scope="col"{% if numeric %} class="n"{% endif %}
{% if name == "rank" %} aria-sort="ascending"{% endif %}><button>{{ name }}</button></th>
{% endmacro %}
{% macro cell(value, shown, class="n") %}
<td class="{{ class }}" data-v="{{ value if value is known else "" }}">{{ shown }}</td>
{% endmacro %}
{% macro pairs(items) %}<dl>{% for name, value in items.items() %}
<div><dt>{{ name }}</dt><dd>{{ value | setting }}</dd></div>{% endfor %}</dl>{% endmacro %}
<div class="soft">brstnet sweep</div>
<h1>{{ info.sweep }}</h1>
<div class="protocol">{{ facts.protocol_line }}</div>
<div class="tiles">
<div class="card"><div class="label">Champion, mean score over folds</div>
{% if facts.champion %}<div class="big">{{ facts.champion.score | number }}</div>
{{ strip(facts.champion) }}<div class="label">trial {{ facts.champion.trial }}</div>
{% else %}<div class="big">&ndash;</div><div class="label">none chosen yet</div>{% endif %}</div>
{% if info.evaluations %}{% set last = info.evaluations[-1] %}
<div class="card"><div class="label">Held-out patients {{ last.patients }}, model</div>
<div class="big">{{ last.medians.get("model") | number }}</div>
<div class="label"><a href="#held-out">with its controls below</a></div></div>{% endif %}
<div class="card"><div class="label">Trials</div><div class="big">{{ rows | length }}</div>
<div class="label">{% for state, count in facts.states.items() %}
{{ count }} {{ state | lower }}{{ "" if loop.last else ", " }}{% endfor %}</div></div>
<div class="card"><div class="label">Device time</div>
<div class="big">{{ facts.cost_seconds | duration }}</div>
<div class="label">summed over all trials</div></div>
</div>
<h2>Trials</h2>
<p class="soft">Score: median over the panel's genes of the per-section PCC averaged over a
fold's validation patients; mean over folds. Dots are folds, the bar is their mean. Only complete
trials are ranked: a pruned trial's score is a mean over fewer folds. A finalist's repeat with
another training seed stands beside it, unranked.</p>
{% if info.constants %}<div class="card" style="margin-bottom: .8rem">
<div class="label" style="margin-bottom: .3rem">Equal in all trials</div>{{ pairs(info.constants) }}
</div>{% endif %}
<div class="card scroll"><table><thead><tr>{{ head("rank") }}{{ head("trial") }}
{{ head("state", false) }}{{ head("score") }}<th scope="col">folds</th>
{% for fold in info.folds %}{{ head("fold " ~ fold.removeprefix("score_fold_")) }}{% endfor %}
{% for name, numeric in info.varying.items() %}{{ head(name, numeric) }}{% endfor %}
{{ head("cost") }}</tr></thead><tbody>
{% for row in rows %}
<tr class="{{ row.state }}{{ " champion" if row.champion }}" title="MLflow run {{ row.run_id }}">
{{ cell(loop.index, row.rank | number(0)) }}
{{ cell(row.trial, row.trial ~ (" seed " ~ row.seed if row.seed else "")) }}
<td data-v="{{ row.state }}">{{ row.state | lower }}
{% if row.champion %}<span class="star">&#9733; champion</span>{% endif %}
{% if row.reason %}<span class="reason" tabindex="0">{{ row.reason }}</span>{% endif %}</td>
{{ cell(row.score, row.score | number, "n score") }}<td>{{ strip(row) }}</td>
{% for fold in info.folds %}{{ cell(row[fold], row[fold] | number) }}{% endfor %}
{% for name, numeric in info.varying.items() %}{% set value = row["params." ~ name] %}
{{ cell(value, value | setting, "n" if numeric else "") }}{% endfor %}
{{ cell(row.cost_seconds, row.cost_seconds | duration) }}</tr>
{% endfor %}</tbody></table></div>
<h2 id="held-out">Held-out patients</h2>
{% for each in info.evaluations %}
<div class="card" style="margin-bottom: .8rem"><strong>{{ each.patients }}</strong>
{% if each.trial is not none %}<span class="soft">&middot; trial {{ each.trial }}</span>{% endif %}
<div class="protocol">{{ each.protocol_line }}</div>
<table class="bars">{% for label, value in each.medians.items() %}
<tr{% if label.startswith("model") %} class="model"{% endif %}><td>{{ label }}</td>
<td class="n score">{{ value | number }}</td><td style="width: 60%">
<svg viewBox="0 0 120 16" preserveAspectRatio="none" aria-hidden="true">{{ zero(16) }}
<rect x="{{ x([value, 0] | min) }}" y="3" height="10"
  width="{{ ((value | abs) / (hi - lo) * 112) | round(1) }}"/></svg></td></tr>{% endfor %}</table>
{% if each.genes_above %}<p class="label">Genes with a PCC above:
{% for threshold, count in each.genes_above.items() %}
{{ threshold }}: <strong>{{ count | number(0) }}</strong>{{ "" if loop.last else ", " }}
{% endfor %}</p>{% endif %}</div>
{% else %}<p class="soft">Not evaluated yet.</p>{% endfor %}
<h2>Protocol</h2>
<div class="card">{{ pairs(info.protocol) }}</div>
<footer>Store {{ facts.store }}. Read from MLflow {{ facts.read_at }}.</footer>
<script>
document.querySelectorAll("th button").forEach(button => button.onclick = () => {
  const th = button.closest("th"), body = th.closest("table").tBodies[0];
  const sign = th.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = row => row.cells[th.cellIndex].dataset.v;
  const sorted = [...body.rows].sort((a, b) => {
    const [p, q] = [key(a), key(b)];
    if (!p || !q) return !p - !q;
    return sign * (isNaN(p) || isNaN(q) ? p.localeCompare(q) : p - q);
  });
  th.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  body.append(...sorted);
});
</script>
</html>
"""

if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except ValueError as error:
        sys.exit(f"leaderboard: {error}")
