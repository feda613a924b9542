"""Brings sweeps home: from the head's MLflow into a database and files of one's own.

    names = check(uri, to, sweep)     # what will come; refuses what cannot
    ...                               # the folders of these sweeps are copied to to/NAME
    report = bring(uri, to, sweep)    # runs, artifacts, champion; the folders' run ids

`to` is then like the folder of a sweep that ran here: `sweeps/ui.py --runs`, `sweeps/evaluate.py
--runs` and `dashboards/leaderboard.py --runs` work on it. The folders must be there before `bring`:
their mlflow.json name the runs of the head, and get the ids that the runs have here. The copy must
leave symbolic links out, and may leave out weights, `tune/` and *.lock. User and password are
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as MLflow has it.

It may be repeated: a run that came home is known by a tag with its id on the head, and is looked at
again when its state there is another than the one that was noted after all of it had come.

What the server says is not trusted: a path that leads out of its folder, an address of another
server, and a champion with anything in it that could be code are refused. No file is opened.
"""

import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from requests import RequestException

from brstnet.config import fingerprint
from clusters.artifacts import Files
from sweeps import tracking
from sweeps.gather import FOLDER, NOTE

SOURCE = "brstnet.home.run"
"""A run's id on the head."""

STATE = "brstnet.home.state"
"""What a run was there when all of it had come; written last."""

VERSION = "brstnet.home.version"
"""A model's version on the head."""

PARENT, CHAMPION = "mlflow.parentRunId", "brstnet.champion"
"""Tags that name another run."""

HARMLESS = (".json", ".safetensors", ".parquet", ".yaml", ".md")
"""What a champion consists of; none of these can hold code (`brstnet.training.checkpoint`)."""

THREADS = 8
RUNNING = ("RUNNING", "SCHEDULED")


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What came home."""

    sweeps: list[str]
    new: int
    changed: int
    unchanged: int
    champion: str | None
    """Its version here, where it is one of these sweeps'."""

    def line(self) -> str:
        """It in one line."""
        which = f"the champion is version {self.champion} here" if self.champion else "no champion"
        counts = f"{self.new} new runs, {self.changed} changed, {self.unchanged} as they were"
        return f"{', '.join(self.sweeps)}: {counts}; {which}"


@dataclass(kw_only=True)
class _There:
    """What the server has of the sweeps, parents first."""

    uri: str
    client: MlflowClient
    experiment_tags: dict[str, str]
    sweeps: dict[str, Run]
    runs: list[Run]
    versions: dict[str, list[ModelVersion]]
    champion: tuple[str, str] | None  # run, version


@dataclass(kw_only=True)
class _Here:
    """What is there at home, by the runs' ids on the head; written by one thread at a time."""

    client: MlflowClient
    experiment_id: str
    runs: dict[str, Run] = field(default_factory=dict)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def id_of(self, there: str) -> str:
        """A run's id here; one that did not come keeps its own."""
        return str(self.runs[there].info.run_id) if there in self.runs else there


# What to bring -----------------------------------------------------------------------------------


def check(uri: str, to: Path, sweep: str | None = None) -> list[str]:
    """The names of the sweeps that will come: the one, or all that the server has.

    Raises:
        ValueError: there is none; or `to/NAME` is the folder of another sweep of that name.
        OSError: the server is away, or refuses the account.
    """
    with _told(uri):
        there = _read(uri, sweep)
    _check_folders(there, to)
    return sorted(there.sweeps)


def bring(uri: str, to: Path, sweep: str | None = None) -> Brought:
    """Bring sweeps' runs with artifacts, and the champion where it is theirs, into `to`.

    Raises:
        ValueError: as `check`; or something is refused: all of it is named, and the rest has come.
        OSError: the server is away, refuses the account, or the disk is full; or another process
            is bringing something to `to`.
    """
    to.mkdir(parents=True, exist_ok=True)
    with (to / "home.lock").open("w") as lock, _told(uri):
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{to}: another process is bringing results here") from None
        there = _read(uri, sweep)
        _check_folders(there, to)
        here = _open(to)
        known = {run_id: run.data.tags.get(STATE) for run_id, run in here.runs.items()}
        _begin(there, here)
        bringing = partial(_bring_run, there, here, to)
        with ThreadPoolExecutor(THREADS) as pool:
            outcomes = list(pool.map(bringing, there.runs))
        faults = [outcome for outcome in outcomes if isinstance(outcome, str)]
        faults += _name_here(there, here, to)
        champion = None if faults else _crown(there, here)
        if faults:
            raise ValueError("refused, and not brought:\n" + "\n".join(faults))
    new = sum(run.info.run_id not in known for run in there.runs)
    unchanged = sum(outcome is False for outcome in outcomes)
    changed = len(there.runs) - new - unchanged
    names = sorted(there.sweeps)
    return Brought(sweeps=names, new=new, changed=changed, unchanged=unchanged, champion=champion)


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Say what a server's refusal means."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] = "false"  # nothing but this server
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        yield
    except (MlflowException, RequestException) as error:
        answer = getattr(error, "response", None)
        code = getattr(error, "error_code", "")
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or (
            answer is not None and answer.status_code in (401, 403)
        ):
            raise OSError(
                f"{uri}: MLflow refuses this account; look at MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            ) from error
        raise OSError(f"{uri}: MLflow is away, or says: {str(error)[:500]}") from error


def _read(uri: str, sweep: str | None) -> _There:
    client = tracking.connect(uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    if experiment is None:
        raise ValueError(
            f"{uri}: MLflow has no experiment {tracking.EXPERIMENT}: no sweep ran there"
        )
    found = _all_runs(client, experiment.experiment_id)
    tops = [run for run in found if run.data.tags.get("brstnet.kind") == "sweep"]
    named = [run for run in tops if sweep in (None, run.data.tags["brstnet.sweep"])]
    if not named:
        names = sorted({run.data.tags["brstnet.sweep"] for run in tops})
        wanted = "a sweep" if sweep is None else f"sweep {sweep!r}"
        raise ValueError(f"{uri}: MLflow must hold {wanted}; there is {', '.join(names) or 'none'}")
    sweeps = {_name(run): run for run in sorted(named, key=lambda run: run.info.start_time)}
    below: dict[str, list[Run]] = {}
    for run in found:
        below.setdefault(run.data.tags.get(PARENT, ""), []).append(run)
    runs = list(named)
    for run in runs:  # grows
        runs += below.pop(run.info.run_id, [])
    versions: dict[str, list[ModelVersion]] = {}
    for version in client.search_model_versions(f"name = '{tracking.MODEL}'"):
        versions.setdefault(str(version.run_id), []).append(version)
    champion = None
    with suppress(MlflowException):  # there is none
        version = client.get_model_version_by_alias(tracking.MODEL, tracking.ALIAS)
        champion = str(version.run_id), str(version.version)
    return _There(
        uri=uri,
        client=client,
        experiment_tags=dict(experiment.tags),
        sweeps=sweeps,
        runs=runs,
        versions=versions,
        champion=champion,
    )


def _all_runs(client: MlflowClient, experiment_id: str) -> list[Run]:
    search = partial(client.search_runs, [experiment_id], max_results=1000)
    page = search()
    runs = list(page)
    while page.token:
        page = search(page_token=page.token)
        runs += page
    return runs


def _name(run: Run) -> str:
    """A sweep's name, which becomes a folder's.

    Raises:
        ValueError: it cannot be one.
    """
    name = str(run.data.tags["brstnet.sweep"])
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(
            f"run {run.info.run_id}: the sweep's name {name!r} is refused: it must be letters, "
            "digits and . _ + - to become a folder here"
        )
    return name


def _check_folders(there: _There, to: Path) -> None:
    for name, run in there.sweeps.items():
        folder, key = to / name, run.data.tags.get("brstnet.key", "")
        own = folder / tracking.ID_FILE
        is_here = own.read_text() if own.is_file() else ""
        if is_here and is_here != key.partition("/")[0]:  # without one, a copy was interrupted
            raise ValueError(
                f"{folder}: is of another sweep that has this name too; bring it into another "
                "folder, or move this one away"
            )


# Runs --------------------------------------------------------------------------------------------


def _open(to: Path) -> _Here:
    uri = tracking.local_uri(to)
    client = tracking.connect(uri)
    here = _Here(client=client, experiment_id=tracking.experiment(client, to, uri))
    for run in _all_runs(client, here.experiment_id):
        if SOURCE in run.data.tags:
            here.runs[run.data.tags[SOURCE]] = run
    return here


def _begin(there: _There, here: _Here) -> None:
    """Give every run one here, so that they can name each other; a run is filled after."""
    for run in there.runs:
        if run.info.run_id not in here.runs:
            here.runs[run.info.run_id] = here.client.create_run(
                here.experiment_id,
                start_time=run.info.start_time,
                run_name=run.info.run_name,
                tags={**_tags(run, here), SOURCE: run.info.run_id},
            )
    for sweep in there.sweeps:
        view = f"mlflow.sharedViewState.{sweep}"
        if view in there.experiment_tags:
            here.client.set_experiment_tag(here.experiment_id, view, there.experiment_tags[view])


def _tags(run: Run, here: _Here) -> dict[str, str]:
    named = {name: here.id_of(value) for name, value in run.data.tags.items() if _is_id(name)}
    return {**{k: v for k, v in run.data.tags.items() if k not in (SOURCE, STATE)}, **named}


def _is_id(tag: str) -> bool:
    return tag in (PARENT, CHAMPION)


def _bring_run(there: _There, here: _Here, to: Path, run: Run) -> bool | str:
    """Whether there was something to bring; or why it was refused."""
    run_id = str(run.info.run_id)
    mine, versions = here.runs[run_id], there.versions.get(run_id, [])
    try:
        files = Files(there.uri, run)
        state = _state(run, files.sizes, versions)
        if mine.data.tags.get(STATE) == state:
            return False
        for version in versions:
            _check_version(run, version, files.sizes)
        numbers = [there.client.get_metric_history(run_id, key) for key in run.data.metrics]
        with tempfile.TemporaryDirectory(dir=to, prefix="home-") as scratch:
            files.download(Path(scratch))
            with here.writing:
                _fill(here, run, [number for history in numbers for number in history])
                if files.sizes:
                    here.client.log_artifacts(mine.info.run_id, scratch)
                for version in sorted(versions, key=lambda v: int(v.version)):
                    _register(here, mine, version)
                here.client.set_tag(mine.info.run_id, STATE, state)
    except ValueError as fault:
        return str(fault)
    return True


def _state(run: Run, files: Mapping[str, int], versions: Sequence[ModelVersion]) -> str:
    """All that is asked before a run is copied, as one word."""
    latest = [(m.key, repr(m.value), m.step, m.timestamp) for m in run.data._metric_objs]
    sets = [(i.dataset.name, i.dataset.digest) for i in _datasets(run)]
    about = [(v.version, v.last_updated_timestamp, v.description, v.tags) for v in versions]
    said = [run.info.status, run.info.end_time, run.data.params, run.data.tags]
    return fingerprint([*said, sorted(latest), sorted(sets), sorted(files.items()), about])


def _datasets(run: Run) -> list[DatasetInput]:
    return list(run.inputs.dataset_inputs) if run.inputs is not None else []


def _fill(here: _Here, run: Run, numbers: Sequence[Metric]) -> None:
    """Write what a run says, beside what is here already; what it says twice stays twice."""
    client, run_id = here.client, here.id_of(run.info.run_id)
    has = {_number(m) for key in run.data.metrics for m in client.get_metric_history(run_id, key)}
    client.log_batch(
        run_id,
        [Metric(m.key, m.value, m.timestamp, m.step) for m in numbers if _number(m) not in has],
        [Param(key, value) for key, value in run.data.params.items()],
        [RunTag(key, value) for key, value in _tags(run, here).items()],
    )
    if sets := _datasets(run):
        client.log_inputs(run_id, datasets=sets)
    if run.info.status in RUNNING:
        client.update_run(run_id, status=run.info.status)
    else:
        client.set_terminated(run_id, status=run.info.status, end_time=run.info.end_time)


def _number(metric: Metric) -> tuple[str, int, int, str]:
    return metric.key, metric.step, metric.timestamp, repr(metric.value)


# The champion ------------------------------------------------------------------------------------


def _check_version(run: Run, version: ModelVersion, files: Mapping[str, int]) -> None:
    what = f"model {version.name} version {version.version}"
    if version.source != f"{run.info.artifact_uri}/{FOLDER}":
        raise ValueError(
            f"{what}: its files are at {version.source!r}, which is refused: they must be the "
            f"artifacts {FOLDER}/ of run {run.info.run_id}"
        )
    own = [path for path in files if path.startswith(f"{FOLDER}/")]
    if strange := [path for path in own if not path.endswith(HARMLESS)]:
        raise ValueError(
            f"{what} of run {run.info.run_id}: {', '.join(strange)} refused: a model is made of "
            f"{', '.join(HARMLESS)} files, which cannot hold code"
        )


def _register(here: _Here, mine: Run, version: ModelVersion) -> None:
    """Give the model its version here, or what is new about it."""
    client, run_id = here.client, mine.info.run_id
    with suppress(MlflowException):  # it is there from an earlier sweep
        client.create_registered_model(tracking.MODEL)
    found = client.search_model_versions(f"name = '{tracking.MODEL}' and run_id = '{run_id}'")
    same = [v for v in found if v.tags.get(VERSION) == str(version.version)]
    tags = {**version.tags, VERSION: str(version.version)}
    if same:
        own = str(same[0].version)
        for key, value in tags.items():
            client.set_model_version_tag(tracking.MODEL, own, key, value)
    else:
        source = f"{mine.info.artifact_uri}/{FOLDER}"
        made = client.create_model_version(tracking.MODEL, source, run_id=run_id, tags=tags)
        own = str(made.version)
    client.update_model_version(tracking.MODEL, own, version.description or "")


def _crown(there: _There, here: _Here) -> str | None:
    """Let the champion there be the champion here; its version here, if it is one that came."""
    if there.champion is None or there.champion[0] not in {r.info.run_id for r in there.runs}:
        return None
    run_id = here.id_of(there.champion[0])
    found = here.client.search_model_versions(f"name = '{tracking.MODEL}' and run_id = '{run_id}'")
    own = next(str(v.version) for v in found if v.tags.get(VERSION) == there.champion[1])
    here.client.set_registered_model_alias(tracking.MODEL, tracking.ALIAS, own)
    return own


# The folders -------------------------------------------------------------------------------------


def _name_here(there: _There, here: _Here, to: Path) -> list[str]:
    """Put the runs' ids here into the folders that came, whatever symbolic link lies in them."""
    links = []
    for name in there.sweeps:
        for at, folders, files in os.walk(to / name):
            place = Path(at)
            links += [place / each for each in (*folders, *files) if (place / each).is_symlink()]
            if "mlflow.json" in files and not (place / "mlflow.json").is_symlink():
                ids = tracking.read_runs(place)
                tracking.write_runs(place, {key: here.id_of(run) for key, run in ids.items()})
        note = to / name / NOTE
        if note.is_file() and not note.is_symlink():
            facts: dict[str, Any] = json.loads(note.read_text())
            tracking.write_json(note, {**facts, "run": here.id_of(str(facts.get("run")))})
    return [
        f"{link}: a symbolic link; remove it, and copy the folder without links" for link in links
    ]
