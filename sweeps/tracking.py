"""MLflow: sweep run > trial run > fold run, evaluations beside them, the champion in the registry.

Everything goes through one client with an explicit address, so that nothing depends on the
process's environment. A sweep's runs are written by `sweeps/courier.py` alone, which keeps their
ids in the trials' folders, so that a resumed trial goes on in the runs it had.
"""

import ast
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis

EXPERIMENT = "brstnet"
MODEL = "brstnet"
ALIAS = "champion"
LOCAL_FILE = "mlflow.db"

ID_FILE = "sweep.id"
"""Made with a sweep's folder: its runs are known by it, whatever other sweep had its name."""


def runs_folder() -> Path:
    """Where sweeps lie by default: BRSTNET_RUNS, which a cluster's set-up gives, or `runs`."""
    return Path(os.environ.get("BRSTNET_RUNS", "runs"))


def local_uri(out: Path) -> str:
    """The address of the database that a sweep makes by default."""
    return f"sqlite:///{(out / LOCAL_FILE).resolve()}"


def connect(uri: str) -> MlflowClient:
    """A client of a tracking server or database; a database is made if it is missing."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # and a read a run
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment(client: MlflowClient, out: Path, uri: str) -> str:
    """The id of the platform's experiment, made on first use; local artifacts go under `out`."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = (out / "artifacts").resolve().as_uri() if uri.startswith("sqlite") else None
    tags = {"mlflow.experimentKind": "custom_model_development"}  # what the UI opens at
    return str(client.create_experiment(EXPERIMENT, artifact_location=local, tags=tags))


def share_view(client: MlflowClient, experiment_id: str, sweep: str, searched: list[str]) -> None:
    """Give the UI a view of a sweep's trials: its leaderboard, with what was searched as columns.

    MLflow keeps the views that users share in tags of the experiment; this writes one of them.
    """
    metrics = ["score", "folds_done", "cost_seconds"]
    columns = [*(f"metrics.`{m}`" for m in metrics), *(f"params.`{p}`" for p in searched)]
    view = {
        "searchFilter": f"tags.`brstnet.kind` = 'trial' and tags.`brstnet.sweep` = '{sweep}'",
        "orderByKey": "metrics.`score`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["tags.`brstnet.state`", *columns],
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "compareRunCharts": [],
        "compareRunSections": [],
    }
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{sweep}", json.dumps(view))


def latest_sweep(client: MlflowClient, experiment_id: str) -> str:
    """The name of the sweep that was started last.

    Raises:
        ValueError: there is none.
    """
    kind = "tags.`brstnet.kind` = 'sweep'"
    newest = ["attributes.start_time DESC"]
    runs = client.search_runs([experiment_id], kind, max_results=1, order_by=newest)
    if not runs:
        raise ValueError("no sweep was run here yet")
    return str(runs[0].data.tags["brstnet.sweep"])


def start_run(
    client: MlflowClient,
    experiment_id: str,
    kind: str,
    name: str,
    tags: Mapping[str, str],
    parent: str | None = None,
) -> str:
    """Start a run of a kind (sweep, trial, fold, evaluation) and return its id."""
    source = "sweeps/evaluate.py" if kind == "evaluation" else "sweeps/run.py"
    own = {"brstnet.kind": kind, "mlflow.source.name": source}
    if parent is not None:
        own["mlflow.parentRunId"] = parent
    run = client.create_run(experiment_id, run_name=name, tags={**own, **tags})
    return str(run.info.run_id)


def log(
    client: MlflowClient,
    run_id: str,
    metrics: Mapping[str, float] | None = None,
    *,
    step: int = 0,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log metrics, parameters and tags in one request."""
    now = get_current_time_millis()
    client.log_batch(
        run_id,
        metrics=[Metric(k, float(v), now, step) for k, v in (metrics or {}).items()],
        params=[Param(k, str(v)) for k, v in (params or {}).items()],
        tags=[RunTag(k, str(v)) for k, v in (tags or {}).items()],
    )


def read_runs(folder: Path) -> dict[str, str]:
    """The run ids of a trial, by trial and fold_0, fold_1, ...; empty before it has started."""
    file = folder / "mlflow.json"
    if not file.is_file():
        return {}
    runs: dict[str, str] = json.loads(file.read_text())
    return runs


def write_runs(folder: Path, runs: Mapping[str, str]) -> None:
    """Keep run ids in a folder."""
    write_json(folder / "mlflow.json", runs)


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(file, json.dumps(value))


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    scratch = file.with_name(f"{file.name}.tmp")
    scratch.write_text(text)
    scratch.rename(file)


def find_version(client: MlflowClient, model: str) -> ModelVersion:
    """The registry's entry of a model: where its files are, and the run it came from.

    Raises:
        ValueError: the address is not of the form models:/NAME@ALIAS or models:/NAME/VERSION, or
            there is no such model.
    """
    name, at, alias = model.removeprefix("models:/").partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, version = name.partition("/")
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise ValueError(
            f"{model}: no such model in the registry ({error.message}); it must be "
            "models:/NAME@ALIAS or models:/NAME/VERSION"
        ) from error


def champion_settings(client: MlflowClient) -> dict[str, Any] | None:
    """The training settings of the registered champion, or None while there is none."""
    try:
        version = client.get_model_version_by_alias(MODEL, ALIAS)
    except MlflowException:
        return None
    params = client.get_run(str(version.run_id)).data.params
    return {name: _value_of(text) for name, text in params.items()}


def _value_of(text: str) -> Any:
    """What a parameter was before it became text; a word stays one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def as_json(value: object) -> str:
    """Canonical JSON for a tag."""
    return json.dumps(value, sort_keys=True)


def register(client: MlflowClient, run_id: str, folder: Path, facts: Mapping[str, Any]) -> str:
    """Put a folder of fold checkpoints into the registry as the champion; return the version.

    The folder is one artifact with all that evaluation needs. It is no MLflow flavour that would
    be unpickled on loading: `brstnet.training.checkpoint` reads it.
    """
    client.log_artifacts(run_id, str(folder), "champion")
    with suppress(MlflowException):  # it is there from an earlier sweep
        client.create_registered_model(MODEL, description="Spatial gene expression from H&E slides")
    source = f"{client.get_run(run_id).info.artifact_uri}/champion"
    tags = {key: str(value) for key, value in facts.items()}
    version = client.create_model_version(MODEL, source, run_id=run_id, tags=tags)
    client.set_registered_model_alias(MODEL, ALIAS, version.version)
    return str(version.version)
