"""The leaderboard and the champion: chosen on the folds alone, never on held-out patients."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from brstnet.config import plain
from brstnet.training.keep import finished
from sweeps import tracking
from sweeps.space import Sweep
from sweeps.trial import Job

RANK = {"COMPLETE": 0, "PRUNED": 1, "FAILED": 2}


def read_outcomes(folder: Path) -> list[dict[str, Any]]:
    """How each ended trial of a sweep came out, best first; pruned and failed ones after."""
    files = sorted((folder / "trials").glob("*/outcome.json"))
    outcomes = [{**json.loads(file.read_text()), "folder": str(file.parent)} for file in files]

    def place(outcome: dict[str, Any]) -> tuple[int, int, float]:
        score = -1.0 if outcome["score"] is None else outcome["score"]
        return RANK[outcome["state"]], -len(outcome["scores"]), -score

    return sorted(outcomes, key=place)


def describe_leaderboard(outcomes: Sequence[dict[str, Any]], sweep: Sweep) -> str:
    """The leaderboard as text, under its protocol."""
    lines = [f"\nsweep {sweep.name}: {sweep.protocol.line()}"]
    lines.append("rank  trial  state     score    folds                            settings")
    for rank, outcome in enumerate(outcomes, 1):
        place = str(rank) if outcome["state"] == "COMPLETE" else "-"
        score = "-" if outcome["score"] is None else f"{outcome['score']:.4f}"
        folds = " ".join(f"{s:.3f}" for s in outcome["scores"])
        config = ", ".join(f"{k}={_short(v)}" for k, v in outcome["config"].items())
        state = f"{outcome['trial']:>5}  {outcome['state']:<8}"
        lines.append(f"{place:>4}  {state}  {score:>6}   {folds:<31}  {config}")
    lines.append(
        "score: median over the panel's genes of the per-section PCC averaged over a fold's "
        "validation patients, mean over the folds"
    )
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def crown(client: MlflowClient, job: Job, outcomes: Sequence[dict[str, Any]]) -> str:
    """Gather the best complete trial's fold models, register them, return the version.

    Raises:
        ValueError: no trial completed all folds.
    """
    best = outcomes[0]
    if best["state"] != "COMPLETE":
        reasons = {o["reason"] or o["state"] for o in outcomes}
        raise ValueError(f"{job.out}: no trial completed all folds: {'; '.join(reasons)}")
    note = job.out / "champion.json"
    if note.is_file() and json.loads(note.read_text())["trial"] == best["trial"]:
        version = str(json.loads(note.read_text())["version"])
        client.set_registered_model_alias(tracking.MODEL, tracking.ALIAS, version)
        return version
    folder = gather(job, best)
    run_id = tracking.read_runs(Path(best["folder"]))["trial"]
    facts = {
        "brstnet.sweep": job.sweep.name,
        "brstnet.trial": best["trial"],
        "score": best["score"],
        "brstnet.protocol_line": job.sweep.protocol.line(),
    }
    version = tracking.register(client, run_id, folder, facts)
    tags = {"brstnet.champion": run_id}
    tracking.log(client, job.sweep_run, {"best_score": best["score"]}, tags=tags)
    note.write_text(json.dumps({"trial": best["trial"], "version": version, "run": run_id}))
    return version


def gather(job: Job, best: dict[str, Any]) -> Path:
    """Copy the checkpoints that stand for the best trial's folds into one folder."""
    folder = job.out / "champion"
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(job.sweep.protocol.folds):
        done = finished(Path(best["folder"]) / f"fold_{number}")
        assert done is not None
        skip = shutil.ignore_patterns("optimizer.safetensors", "progress.json")
        shutil.copytree(done.folder, folder / f"fold_{number}", ignore=skip)
    card = {
        "sweep": job.sweep.name,
        "trial": best["trial"],
        "protocol": job.sweep.protocol.line(),
        "score": best["score"],
        "scores": best["scores"],
        "settings": plain(job.sweep.settings(best["config"])),
        "chosen": "highest mean score over the folds among the trials that completed all of them; "
        "held-out patients had no part in it",
    }
    (folder / "champion.json").write_text(json.dumps(card, indent=1))
    return folder
