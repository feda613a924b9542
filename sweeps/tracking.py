"""MLflow: sweep run > trial run > fold run, evaluations beside them, the champion in the registry.

Everything goes through one client with an explicit address, so that nothing depends on the
process's environment. Run ids are kept in the trial's folder, so that a resumed trial goes on in
the runs it had.
"""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis

from brstnet.config import Protocol, Training, plain
from brstnet.data.store import Store

EXPERIMENT = "brstnet"
MODEL = "brstnet"
ALIAS = "champion"
LOCAL_FILE = "mlflow.db"


def local_uri(out: Path) -> str:
    """The address of the database that a sweep makes by default."""
    return f"sqlite:///{(out / LOCAL_FILE).resolve()}"


def connect(uri: str) -> MlflowClient:
    """A client of a tracking server or database; a database is made if it is missing."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
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


def log_store(client: MlflowClient, run_id: str, store: Store, protocol: Protocol) -> None:
    """Note the store and the protocol as the run's input."""
    profile = {"sections": len(store.sections), "patients": len(store.patients)}
    dataset = Dataset(
        name=store.path.name,
        digest=store.digest,
        source_type="brstnet-store",
        source=json.dumps({"path": str(store.path), "prepare": store.index["prepare"]}),
        schema=json.dumps({"genes": store.index["genes"], "input_px": store.input_px}),
        profile=json.dumps(profile),
    )
    tags = [InputTag("mlflow.data.context", protocol.line())]
    client.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=tags)])


class TrialTracker:
    """One trial's runs. Kept by the process that trains it, or that leads those which do."""

    def __init__(
        self, uri: str, experiment_id: str, sweep: str, sweep_run: str, folder: Path
    ) -> None:
        self.client = connect(uri)
        self.experiment_id = experiment_id
        self.tags = {"brstnet.sweep": sweep}
        self.sweep_run = sweep_run
        self.folder = folder
        self.runs: dict[str, str] = read_runs(folder)

    def trial(self, number: int, training: Training, store: Store, protocol: Protocol) -> str:
        """The trial's run, started on first use."""
        self.tags["brstnet.protocol_line"] = protocol.line()
        tags = {**self.tags, "brstnet.trial": str(number), "brstnet.state": "RUNNING"}
        run_id, new = self._run(
            "trial", f"trial {number} {training.backbone}", tags, self.sweep_run
        )
        if new:
            log(self.client, run_id, params=plain(training))
            log_store(self.client, run_id, store, protocol)
        return run_id

    def fold(self, number: int) -> str:
        """A fold's run below the trial's, started on first use."""
        tags = {**self.tags, "brstnet.fold": str(number)}
        return self._run(f"fold_{number}", f"fold {number}", tags, self.runs["trial"])[0]

    def _run(self, key: str, name: str, tags: dict[str, str], parent: str) -> tuple[str, bool]:
        if key in self.runs:
            self.client.update_run(self.runs[key], status="RUNNING")
            return self.runs[key], False
        kind = key.split("_")[0]
        self.runs[key] = start_run(self.client, self.experiment_id, kind, name, tags, parent)
        write_runs(self.folder, self.runs)
        return self.runs[key], True

    def epoch(self, fold: int, note: Mapping[str, float]) -> None:
        """One epoch's numbers, in one request."""
        metrics = {k: v for k, v in note.items() if k != "epoch"}
        log(self.client, self.runs[f"fold_{fold}"], metrics, step=int(note["epoch"]))

    def end_fold(self, fold: int, score: float, files: Path) -> None:
        """A fold's score and files, and its run's end."""
        run_id = self.runs[f"fold_{fold}"]
        log(self.client, run_id, {"fold_score": score})
        self.client.log_artifacts(run_id, str(files))
        self.client.set_terminated(run_id)

    def running(self, result: Mapping[str, float]) -> None:
        """The trial's score so far."""
        log(self.client, self.runs["trial"], result, step=int(result["folds_done"]))


def read_runs(folder: Path) -> dict[str, str]:
    """The run ids of a trial, by trial and fold_0, fold_1, ...; empty before it has started."""
    file = folder / "mlflow.json"
    if not file.is_file():
        return {}
    runs: dict[str, str] = json.loads(file.read_text())
    return runs


def write_runs(folder: Path, runs: Mapping[str, str]) -> None:
    """Keep run ids in a folder, whole or not at all."""
    scratch = folder / "mlflow.json.tmp"
    scratch.write_text(json.dumps(runs))
    scratch.rename(folder / "mlflow.json")


def stop_open_runs(client: MlflowClient, out: Path) -> None:
    """Mark what a stopped sweep leaves running as killed; it goes on in the same runs."""
    for file in sorted((out / "trials").glob("*/mlflow.json")):
        for run_id in read_runs(file.parent).values():
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, status="KILLED")


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


def as_json(value: object) -> str:
    """Canonical JSON for a tag."""
    return json.dumps(value, sort_keys=True)


def end_trial(client: MlflowClient, folder: Path, state: str, reason: str = "") -> None:
    """Mark a trial's run, and whatever fold of it still runs, as COMPLETE, PRUNED or FAILED."""
    runs = read_runs(folder)
    if "trial" not in runs:
        return
    tags = {"brstnet.state": state} | ({"brstnet.reason": reason[:5000]} if reason else {})
    log(client, runs["trial"], tags=tags)
    status = "FAILED" if state == "FAILED" else "FINISHED"
    for run_id in runs.values():
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status="FINISHED" if run_id != runs["trial"] else status)


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
