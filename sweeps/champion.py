"""The leaderboard, and the champion in the registry: put there by the rule, or by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from sweeps import tracking
from sweeps.board import alone, read_outcome
from sweeps.choice import Choice, Outcome, by_hand, count_states, known
from sweeps.gather import FOLDER, NOTE, TOLD, gather, write_whole
from sweeps.space import Sweep

RANK = {"COMPLETE": 0, "PRUNED": 1, "FAILED": 2}
MOST_ROWS = 20
"""Configurations that the leaderboard prints; the others are counted."""


def read_outcomes(folder: Path) -> list[Outcome]:
    """How each ended trial of a sweep came out, best first; pruned and failed ones after.

    A configuration that was trained again with other seeds has an outcome a seed; the search's own
    is that of seed 0.
    """
    files = sorted((folder / "trials").glob("*/outcome.json"))
    # Outcomes of 0.3 do not say the seed yet.
    outcomes = [{"seed": 0, **read_outcome(file), "folder": str(file.parent)} for file in files]

    def place(outcome: Outcome) -> tuple[int, int, float]:
        score = outcome["score"] if known(outcome["score"]) else -1.0
        return RANK[outcome["state"]], -len(outcome["scores"]), -score

    return sorted(outcomes, key=place)


# The leaderboard ---------------------------------------------------------------------------------


def describe_leaderboard(outcomes: Sequence[Outcome], sweep: Sweep) -> str:
    """The leaderboard as text, under its protocol: a line a configuration, the finalists first."""
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome["trial"], []).append(outcome)
    seeded = any(len(group) > 1 for group in groups.values())
    rows = sorted((_row(group) for group in groups.values()), key=lambda row: row["place"])
    lines = [f"\nsweep {sweep.name}: {sweep.protocol.line()}"]
    between = "seeds       ±   " if seeded else ""
    lines.append(
        f"rank  trial  state     score  {between} folds                            settings"
    )
    for rank, row in enumerate(rows[:MOST_ROWS], 1):
        seeds = f"{row['seeds']:>5}  {row['spread']:>6}  " if seeded else ""
        place = str(rank) if row["state"] == "COMPLETE" else "-"
        lines.append(
            f"{place:>4}  {row['trial']:>5}  {row['state']:<8}  {row['score']:>6}  {seeds}"
            f" {row['folds']:<31}  {row['config']}"
        )
    if len(rows) > MOST_ROWS:
        rest = count_states([row["own"] for row in rows[MOST_ROWS:]])
        lines.append(f"and {len(rows) - MOST_ROWS} more: {_counted(rest)}")
    lines.append(
        "score: median over the panel's genes of the per-section PCC averaged over a fold's "
        "validation patients, mean over the folds"
        + (" and the training seeds; ±: standard deviation over these" if seeded else "")
    )
    return "\n".join(lines)


def _row(group: Sequence[Outcome]) -> dict[str, Any]:
    """One configuration in words, and its place: finalists, complete, pruned, failed; by score."""
    own = min(group, key=lambda o: int(o["seed"]))
    done = [o for o in group if o["state"] == "COMPLETE" and known(o["score"])] or [own]
    scores = [o["score"] for o in done if known(o["score"])]
    score = float(np.mean(scores)) if scores else -1.0
    folds = np.mean([o["scores"] for o in done], axis=0)
    return {
        "own": own,
        "trial": own["trial"],
        "state": own["state"],
        "score": f"{score:.4f}" if scores else "-",
        "seeds": len(scores),
        "spread": f"{np.std(scores, ddof=1):.4f}" if len(scores) > 1 else "-",
        "folds": " ".join(f"{s:.3f}" for s in folds),
        "config": ", ".join(f"{k}={_short(v)}" for k, v in own["config"].items()),
        "place": (len(scores) < 2, RANK[own["state"]], -len(own["scores"]), -score, own["trial"]),
    }


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _counted(states: dict[str, int]) -> str:
    return ", ".join(f"{states[state]} {state}" for state in RANK if state in states)


# The champion ------------------------------------------------------------------------------------


def crown(
    client: MlflowClient, folder: Path, choice: Choice, *, sweep_run: str | None = None
) -> str:
    """Gather the chosen trial's models, register them as the champion, return the version.

    May be repeated after whatever stopped it: models that the registry has already get the alias
    and the new card, and no second version.

    Args:
        client: of the tracking server.
        folder: the sweep's, of whose name it is.
        choice: what `choose` or `by_hand` gave.
        sweep_run: the sweep's run in MLflow, to be told; by default the one its folder names.

    Raises:
        ValueError: the trial's checkpoints or its run are missing.
    """
    run_id = trial_run(choice.chosen.folder)
    sweep_run = sweep_run or tracking.read_runs(folder).get("sweep")
    store = store_of(client, run_id)
    sweep_store = store_of(client, sweep_run) if sweep_run else store
    place = gather(folder, choice, store=store, sweep_store=sweep_store)
    note = json.loads((place / NOTE).read_text())
    tags = {
        "brstnet.sweep": folder.name,
        "brstnet.trial": choice.chosen.trial,
        "brstnet.content": note["content"],
        "score": choice.chosen.score,
        "brstnet.protocol_line": note["protocol"],
        "brstnet.rule": choice.rule,
        "brstnet.reason": choice.reason[:4000],
    }
    version = find_registered(client, run_id, note["content"])
    if version is None:
        version = tracking.register(client, run_id, place, tags)
    else:
        register_again(client, version, run_id, place, tags)
    about = f"Sweep {folder.name}, {choice.reason}.\n\nScored under: {note['protocol']}."
    client.update_model_version(tracking.MODEL, version, about)
    if sweep_run is not None:
        tracking.log(client, sweep_run, tags={"brstnet.champion": run_id})
    facts = {"trial": choice.chosen.trial, "version": version, "run": run_id, "rule": choice.rule}
    write_whole(folder / NOTE, json.dumps(facts))
    return version


def trial_run(folder: Path) -> str:
    """The MLflow run of a trial.

    Raises:
        ValueError: its folder names none.
    """
    runs = tracking.read_runs(folder)
    if "trial" not in runs:
        raise ValueError(f"{folder}: no mlflow.json names this trial's run: it was not tracked")
    return runs["trial"]


def store_of(client: MlflowClient, run_id: str) -> str:
    """The path of the store that a run was given, or the word STORE where it does not say."""
    inputs = client.get_run(run_id).inputs
    datasets = inputs.dataset_inputs if inputs is not None else []
    return str(json.loads(datasets[0].dataset.source)["path"]) if datasets else "STORE"


def find_registered(client: MlflowClient, run_id: str, content: str) -> str | None:
    """The version that a run has already given with this content, the newest; None without one."""
    found = client.search_model_versions(f"name = '{tracking.MODEL}' and run_id = '{run_id}'")
    versions = [int(v.version) for v in found if v.tags.get("brstnet.content") == content]
    return str(max(versions)) if versions else None


def register_again(
    client: MlflowClient, version: str, run_id: str, place: Path, tags: dict[str, Any]
) -> None:
    """Give a version that is there the alias, and what is new about it: why it was chosen."""
    for name in TOLD:
        if (place / name).is_file():
            client.log_artifact(run_id, str(place / name), FOLDER)
    for key, value in tags.items():
        client.set_model_version_tag(tracking.MODEL, version, key, str(value))
    client.set_registered_model_alias(tracking.MODEL, tracking.ALIAS, version)


# By hand -----------------------------------------------------------------------------------------


def promote(client: MlflowClient, out: Path, run: str) -> str:
    """Make a trial of one's own choice the champion; return its version.

    Args:
        client: of the tracking server.
        out: the sweeps' folder.
        run: the MLflow id of a trial's run, or SWEEP/TRIAL, such as demo/3.

    Raises:
        ValueError: there is no such trial, it is not complete, or its checkpoints are not here.
    """
    sweep, trial = find_trial(client, run)
    folder = (out / sweep).resolve()
    outcomes = read_outcomes(folder)
    if not outcomes:
        raise ValueError(f"{folder}: no trial has ended here; --out must be the sweeps' folder")
    with alone(folder):
        return crown(client, folder, by_hand(outcomes, trial))


def promoted(folder: Path) -> int | None:
    """The trial that somebody made this sweep's champion by hand, or None."""
    note = folder / NOTE
    facts = json.loads(note.read_text()) if note.is_file() else {}
    return int(facts["trial"]) if facts.get("rule") == "hand" else None


def find_trial(client: MlflowClient, run: str) -> tuple[str, int]:
    """The sweep's name and the trial's number.

    Raises:
        ValueError: `run` is neither SWEEP/TRIAL nor the id of a trial's run.
    """
    sweep, slash, trial = run.rpartition("/")
    if slash:
        if not (sweep and trial.isdecimal()):
            raise ValueError(f"{run}: must be SWEEP/TRIAL, such as demo/3, or an MLflow run id")
        return sweep, int(trial)
    try:
        tags = client.get_run(run).data.tags
    except MlflowException as error:
        raise ValueError(
            f"{run}: no such run in MLflow ({error.message}); give the id of a trial's run, or "
            "SWEEP/TRIAL, such as demo/3"
        ) from error
    if tags.get("brstnet.kind") != "trial":
        kind = tags.get("brstnet.kind", "unknown")
        raise ValueError(
            f"{run}: this run is of kind {kind}: a champion is a trial; give the run above it"
        )
    return tags["brstnet.sweep"], int(tags["brstnet.trial"])
