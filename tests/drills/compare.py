"""What a sweep came to, so that two of them can be held against each other, to the last bit."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from drills.sweep import Sweep
from sweeps.courier import STATUS
from sweeps.tracking import ID_FILE, read_runs

MEASURED = {"seconds", "patches_per_second", "step_share", "memory_gb"}
"""Of an epoch: what a clock or the machine says."""

COSTS = {"cost_seconds", "cost_hours", "fold_seconds", "seconds_left"}


def facts(sweep: Sweep) -> dict[str, Any]:
    """All that a kill must not change, by name; none of it is a time or a place."""
    folder = sweep.folder
    found = {
        "trials": {f.parent.name: trial(f) for f in folder.glob("trials/*/outcome.json")},
        "folds": {name(f): fold(f) for f in folder.glob("trials/*/fold_*/result.json")},
        "study": list(study(folder, sweep.name)),
        "champion": json.loads((folder / "champion.json").read_text())["trial"],
        "tracked": dict(tracked(MlflowClient(sweep.uri), folder)),
    }
    if (folder / "rungs.jsonl").is_file():
        found["rungs"] = [json.loads(s) for s in (folder / "rungs.jsonl").read_text().splitlines()]
    return found


def faults(sweep: Sweep) -> list[str]:
    """What must be so in any sweep that has ended, whatever happened to it."""
    folder = sweep.folder
    found = sweep.repeated_folds()
    if (folder / "refused.jsonl").is_file():
        found.append(f"MLflow refused: {(folder / 'refused.jsonl').read_text()[:300]}")
    if left := json.loads((folder / STATUS).read_text())["pending"]:
        found.append(f"{left} events were not delivered")
    return found + list(doubled(MlflowClient(sweep.uri), folder))


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two of `facts` differ, in words."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            here = f"{at}/{key}"
            if key not in one or key not in other:
                yield f"{here} is only in the {'second' if key in other else 'first'}"
            else:
                yield from differences(one[key], other[key], here)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{at}[{number}]")
    elif json.dumps(one) != json.dumps(other):  # NaN is as NaN
        yield f"{at}: {one!r}, then {other!r}"


def name(file: Path) -> str:
    """The trial and fold that a file of a fold's folder belongs to."""
    return "/".join(file.parent.parts[-2:])


def trial(file: Path) -> dict[str, Any]:
    """How a trial ended."""
    return {k: v for k, v in json.loads(file.read_text()).items() if k not in COSTS}


def fold(file: Path) -> dict[str, Any]:
    """A finished fold: score, the sections' correlations, the weights if they were kept."""
    result = json.loads(file.read_text())
    chosen = file.parent / result["checkpoint"]
    table = pd.read_parquet(chosen / "validation.parquet")
    weights = chosen / "model.safetensors"
    return {
        **{k: v for k, v in result.items() if k != "seconds"},
        "sections": hashlib.sha256(pd.util.hash_pandas_object(table).to_numpy()).hexdigest(),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "",
    }


def study(folder: Path, sweep: str) -> Iterator[dict[str, Any]]:
    """The trials as Optuna has them."""
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.jsonl")))
    for one in optuna.load_study(study_name=sweep, storage=storage).trials:
        yield {
            "number": one.number,
            "state": one.state.name,
            "params": dict(sorted(one.params.items())),
            "values": one.values,
            "reported": {str(k): v for k, v in sorted(one.intermediate_values.items())},
        }


def runs(client: MlflowClient, folder: Path) -> Iterator[tuple[str, Any]]:
    """The sweep's runs in MLflow, by their keys; those of one key are each there."""
    (experiment,) = [e for e in client.search_experiments() if e.name == "brstnet"]
    mine, token = (folder / ID_FILE).read_text(), None
    where = f"tags.`brstnet.key` LIKE '{mine}/%'"
    while True:
        page = client.search_runs([experiment.experiment_id], where, page_token=token)
        yield from ((r.data.tags["brstnet.key"].partition("/")[2], r) for r in page)
        if not (token := page.token):
            return


def tracked(client: MlflowClient, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each run: how it ended, what it was given, every number by its step."""
    for key, run in runs(client, folder):
        own = {k: v for k, v in run.data.tags.items() if k in ("brstnet.state", "brstnet.reason")}
        last = {k: v for k, v in run.data.metrics.items() if k not in MEASURED | COSTS}
        yield (
            key,
            {
                "status": run.info.status,
                "parameters": dict(sorted(run.data.params.items())),
                "tags": own,
                "inputs": len(run.inputs.dataset_inputs),
                "artifacts": sorted(a.path for a in client.list_artifacts(run.info.run_id)),
                "last": last,
                "steps": {} if key == "sweep" else steps(client, run.info.run_id, last),
            },
        )


def steps(client: MlflowClient, run_id: str, names: Mapping[str, float]) -> dict[str, list]:
    """The history of each metric: step and value."""
    return {
        name: sorted([m.step, m.value] for m in client.get_metric_history(run_id, name))
        for name in names
    }


def doubled(client: MlflowClient, folder: Path) -> Iterator[str]:
    """Runs of the same trial or fold, steps of the same metric, that are there twice."""
    found = list(runs(client, folder))
    counts = Counter(key for key, _ in found)
    yield from (f"MLflow has {n} runs of {key}" for key, n in counts.items() if n > 1)
    known = {"sweep": read_runs(folder)["sweep"]}
    for path in folder.glob("trials/*/"):
        known |= {f"{path.name}/{k}": run_id for k, run_id in read_runs(path).items()}
    yield from (f"{key} is not noted" for key, r in found if known.get(key) != r.info.run_id)
    for key, run in found:
        for metric in run.data.metrics:
            told = [m.step for m in client.get_metric_history(run.info.run_id, metric)]
            if len(told) != len(set(told)):
                yield f"{key} has steps of {metric} twice: {sorted(told)}"
    if versions := registered(client, folder):
        if len(versions) > 1:
            yield f"the champion was registered {len(versions)} times"
    else:
        yield "no champion is registered"


def registered(client: MlflowClient, folder: Path) -> list[str]:
    """The versions that the sweep gave to the registry."""
    found = client.search_model_versions("name = 'brstnet'")
    return [v.version for v in found if v.tags.get("brstnet.sweep") == folder.name]
