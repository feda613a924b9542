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
from jinja2 import Environment
from jsonargparse import auto_cli
from mlflow import MlflowClient

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "brstnet"
STATES = ("COMPLETE", "PRUNED", "RUNNING", "FAILED")  # the order in the table
COLUMNS = ["run_id", "trial", "state", "champion", "score", "folds_done", "cost_seconds", "reason"]
MEDIANS = {
    "median_pcc": "model",
    "median_pcc_colour_ridge": "control: colour ridge",
    "median_pcc_depth_only": "control: depth only",
    "median_partial_pcc": "model, partial given depth",
}
TEMPLATE = Path(__file__).with_name("leaderboard.html.j2")


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
    varying: list[str]  # names of the others
    evaluations: list[dict[str, Any]]  # on held-out patients, oldest first
    facts: dict[str, Any]  # protocol_line, store, champion, states, cost_seconds, range, read_at


def leaderboard_info(client: MlflowClient, sweep: str) -> Leaderboard:
    """Read a sweep from MLflow; ValueError if there is none, or its runs break the structure."""
    run = _sweep_run(client, sweep)
    trials = _trials(_runs(client, "trial", sweep), run.data.tags.get("brstnet.champion"))
    evaluations = [_evaluation(each, trials) for each in _runs(client, "evaluation", sweep)]
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
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "setting": _setting, "duration": _duration}
    environment.tests["known"] = pd.notna
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(info=info, facts=info.facts, rows=info.trials.to_dict("records"))


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
    """The newest run of that sweep; ValueError if unknown, or if two protocols share the name."""
    runs = _runs(client, "sweep")
    named = [run for run in runs if run.data.tags.get("brstnet.sweep") == sweep]
    if not named:
        names = sorted({_tag(run, "brstnet.sweep") for run in runs})
        raise ValueError(f"sweep must be one of {', '.join(names) or '(none yet)'}; got {sweep!r}")
    if len({_tag(run, "brstnet.protocol") for run in named}) > 1:
        ids = ", ".join(run.info.run_id for run in named)
        raise ValueError(f"sweep {sweep!r} must have one protocol, but its runs differ: {ids}")
    return named[-1]


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
    trials = trials.loc[order.sort_values(list(order)).index].reset_index(drop=True)
    ranked = (trials["state"] == "COMPLETE") & trials["score"].notna()
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
    names = [name for name in trials if name.startswith("score_fold_")]
    return sorted(names, key=lambda name: int(name.removeprefix("score_fold_")))


def _split_settings(trials: pd.DataFrame) -> tuple[dict[str, str], list[str]]:
    """Settings equal in all trials, and the names of those that differ or that some lack."""
    settings = trials.filter(regex=r"^params\.").sort_index(axis=1)
    settings.columns = settings.columns.str.removeprefix("params.")
    settings = settings.dropna(how="all")  # a trial may fail before it has logged its settings
    equal = [name for name in settings if settings[name].nunique(dropna=False) == 1]
    constants = {name: settings[name].iloc[0] for name in equal}
    return constants, [name for name in settings if name not in constants]


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
    drawn = [*trials[_fold_columns(trials)].stack(), *trials["score"].dropna()]
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


def _number(value: float | None, digits: int = 3) -> str:
    """Fixed digits with a real minus sign; a dash where there is no value."""
    return "–" if value is None or pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


def _setting(value: str | float) -> str:
    """A setting as logged, long decimals at four digits; a dash where a trial has none."""
    if pd.isna(value):
        return "–"
    try:
        return f"{float(value):.4g}" if "." in str(value) or "e-" in str(value) else str(value)
    except ValueError:
        return str(value)


def _duration(seconds: float) -> str:
    """Seconds in the unit a reader thinks in."""
    if pd.isna(seconds):
        return "–"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
