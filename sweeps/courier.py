"""Delivers a sweep's events to MLflow, in order, whether or not the server is there just now.

    python -m sweeps.courier SWEEP_FOLDER --tracking_uri URI --experiment ID

One process beside the driver, and the only one that writes a sweep's runs. It ends when its
standard input does, which is when the driver ends, however that comes about, after delivering what
is there. What it has delivered is noted in each folder: killed at any moment, it goes on where it
was, and what might have arrived already is asked for before it is sent again.
"""

import json
import os
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fcntl import LOCK_EX, flock
from itertools import groupby
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from sweeps import tracking
from sweeps.events import FILE, after, mend, read

LOOK_SECONDS = 0.5
"""How often the folders are looked through for new events."""

BACK_OFF_SECONDS = (1.0, 2.0, 5.0, 15.0)
"""Waits between tries while the server is away."""

REFUSED = {
    ErrorCode.Name(code)
    for code in (INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, RESOURCE_ALREADY_EXISTS)
}
"""What a server says that another try would hear again."""

STATUS = "courier.json"
REFUSALS = "refused.jsonl"


@dataclass(kw_only=True)
class Folder:
    """One folder's events: how far they are delivered, and the runs they made."""

    path: Path
    offset: int = 0
    closed: bool = False
    runs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """As it was left."""
        note = path / "delivered.json"
        offset = json.loads(note.read_text()) if note.is_file() else 0
        return cls(path=path, offset=offset, runs=tracking.read_runs(path))

    @property
    def pending_bytes(self) -> int:
        """What is not delivered yet."""
        file = self.path / FILE
        return file.stat().st_size - self.offset if file.is_file() else 0

    def delivered(self, offset: int) -> None:
        """Note how far it is."""
        self.offset = offset
        tracking.write_json(self.path / "delivered.json", offset)


class Courier:
    """Takes events from folders to a tracking server."""

    def __init__(self, client: MlflowClient, experiment_id: str, out: Path, threads: int) -> None:
        self.client, self.experiment_id, self.out = client, experiment_id, out
        self.driver = Folder.open(out)
        self.trials: dict[str, Folder] = {}
        self.sweep_id = (out / tracking.ID_FILE).read_text()
        mend(out / REFUSALS)
        self._refused = {_without_reason(event) for event in read(out / REFUSALS)[0]}
        self._refusing = threading.Lock()
        self._pool = ThreadPoolExecutor(threads)

    @property
    def refused(self) -> int:
        """Events that the server will never take."""
        return len(self._refused)

    def round(self) -> int:
        """Deliver what there is: each trial's events, then the driver's up to those seen before.

        The driver says of a trial that it has ended after the trial has said its last. Returns the
        number of events that were delivered.

        Raises:
            MlflowException: the server is away; what was not delivered is tried again next time.
        """
        end = self.driver.offset + self.driver.pending_bytes
        for path in (self.out / "trials").glob("*/"):
            if path.name not in self.trials:
                self.trials[path.name] = Folder.open(path)
        if "sweep" not in self.driver.runs:
            for event in read(self.out / FILE, 0, end)[0][:1]:
                self._start(event)  # the run that all others lie below
        waiting = [f for f in self.trials.values() if not f.closed and f.pending_bytes > 0]
        delivering = [self._pool.submit(self.deliver, folder) for folder in waiting]
        wait(delivering)  # where one fails too: no folder is ever in two hands
        return sum(d.result() for d in delivering) + self.deliver(self.driver, end)

    def deliver(self, folder: Folder, end: int | None = None) -> int:
        """Deliver a folder's events up to a byte."""
        file = folder.path / FILE
        events, offset = read(file, folder.offset, end)
        sent = 0
        try:
            for part in _parts(_storable(events)):
                self._send_or_refuse(folder, part)
                sent += len(part)
        finally:  # a server that takes a few at a time gets on too
            if sent:
                whole = sent == len(events)
                folder.delivered(offset if whole else after(file, folder.offset, sent))
        return sent

    def _send_or_refuse(self, folder: Folder, part: Sequence[dict[str, Any]]) -> None:
        try:
            self._send(folder, part)
        except MlflowException as error:
            if not _is_final(error):
                raise
            if len(part) == 1:
                self._refuse(part[0], error)
            else:  # together they are only faster
                for event in part:
                    self._send_or_refuse(folder, [event])

    def _refuse(self, event: dict[str, Any], error: MlflowException) -> None:
        """Keep what the server will never take, with the reason: it must not hold up the rest."""
        with self._refusing:
            if _without_reason(event) in self._refused:
                return
            with (self.out / REFUSALS).open("a") as file:
                file.write(json.dumps({**event, "refused": str(error)}) + "\n")
            self._refused.add(_without_reason(event))

    def _send(self, folder: Folder, events: Sequence[dict[str, Any]]) -> None:
        event = events[0]
        match event["do"]:
            case "start":
                self._start(event)
            case "log":
                self._log(events)
            case "input":
                self._input(event)
            case "files":
                self._files(folder.path / event["path"], event)
            case "status":
                self._status(folder, event)

    def home(self, key: str) -> tuple[Folder, str]:
        """The folder that keeps a run's id, and the run's name there."""
        if key == "sweep":
            return self.driver, key
        trial, _, name = key.partition("/")
        if trial not in self.trials:
            self.trials[trial] = Folder.open(self.out / "trials" / trial)
        return self.trials[trial], name

    def run_id(self, key: str) -> str:
        """The id of a run that was begun."""
        folder, name = self.home(key)
        if name not in folder.runs:
            raise MlflowException(f"run {key} was never begun", RESOURCE_DOES_NOT_EXIST)
        return folder.runs[name]

    def _start(self, event: dict[str, Any]) -> None:
        folder, name = self.home(event["run"])
        if name in folder.runs:
            return
        own = {"brstnet.kind": event["kind"], "mlflow.source.name": "sweeps/run.py"}
        own["brstnet.key"] = f"{self.sweep_id}/{event['run']}"
        if event["parent"]:
            own["mlflow.parentRunId"] = self.run_id(event["parent"])
        trying = folder.path / "creating"
        found = self._find(own["brstnet.key"]) if trying.exists() else None
        trying.touch()  # from here on the run may exist without our knowing its id
        if found is None:
            run = self.client.create_run(
                self.experiment_id,
                start_time=event["time"],
                tags={**event["tags"], **own},
                run_name=event["name"],
            )
            found = str(run.info.run_id)
        folder.runs[name] = found
        tracking.write_runs(folder.path, folder.runs)
        trying.unlink()

    def _find(self, key: str) -> str | None:
        runs = self.client.search_runs([self.experiment_id], f"tags.`brstnet.key` = '{key}'")
        return str(runs[0].info.run_id) if runs else None

    def _log(self, events: Sequence[dict[str, Any]]) -> None:
        """Events of one run, which MLflow's client sends in as few requests as it may."""
        self.client.log_batch(
            self.run_id(events[0]["run"]),
            [
                Metric(name, value, event["time"], event["step"])
                for event in events
                for name, value in event["metrics"].items()
            ],
            [Param(k, v) for event in events for k, v in event["params"].items()],
            [RunTag(k, v[:5000]) for event in events for k, v in event["tags"].items()],
        )

    def _input(self, event: dict[str, Any]) -> None:
        names = ("name", "digest", "source", "schema", "profile")
        dataset = Dataset(source_type="brstnet-store", **{name: event[name] for name in names})
        tags = [InputTag("mlflow.data.context", event["context"])]
        run_id = self.run_id(event["run"])
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=tags)])

    def _files(self, path: Path, event: dict[str, Any]) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.run_id(event["run"]), str(path))

    def _status(self, folder: Folder, event: dict[str, Any]) -> None:
        run_id, status = self.run_id(event["run"]), event["status"]
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
            return
        self.client.set_terminated(run_id, status=status, end_time=event["time"])
        if folder is self.driver and event["run"] != "sweep":
            self.home(event["run"])[0].closed = status != "KILLED"

    def pending(self) -> int:
        """Events that are not delivered."""
        folders = [self.driver, *self.trials.values()]
        return sum(len(read(f.path / FILE, f.offset)[0]) for f in folders if f.pending_bytes > 0)


def _is_final(error: MlflowException) -> bool:
    """Whether MLflow said it, and would again: 5xx and a proxy's page of any code are no answer."""
    return error.error_code in REFUSED and "Response body: '" not in error.message


def _storable(value: Any) -> Any:
    """Without the character 0: PostgreSQL cannot store it, and the server says 500 for ever."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, dict):
        return {key: _storable(each) for key, each in value.items()}
    return [_storable(each) for each in value] if isinstance(value, list) else value


def _without_reason(event: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in event.items() if key != "refused"})


def _parts(events: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Events that can be sent together: neighbours that log to the same run."""
    for _, part in groupby(events, lambda e: e["run"] if e["do"] == "log" else id(e)):
        yield list(part)


def serve(courier: Courier, ended: threading.Event, patience: float) -> int:
    """Deliver until the driver has ended and nothing is left; 3 if patience was over before."""
    tries, deadline = 0, None
    while True:
        if ended.is_set() and deadline is None:
            deadline = time.monotonic() + patience
        try:
            sent, error, tries = courier.round(), "", 0
        except (MlflowException, OSError) as why:  # requests' exceptions are OSErrors
            sent, error, tries = 0, str(why), tries + 1
        left = courier.pending()
        note = {"pending": left, "refused": courier.refused, "error": error[:500]}
        tracking.write_json(courier.out / STATUS, note)
        if deadline is not None and (left == 0 or time.monotonic() > deadline):
            return 0 if left == 0 else 3
        if not sent:
            wait = (
                BACK_OFF_SECONDS[min(tries, len(BACK_OFF_SECONDS)) - 1] if tries else LOOK_SECONDS
            )
            ended.wait(wait) if deadline is None else time.sleep(min(wait, 1.0))


def _until_input_ends(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def main() -> int:
    """Run until standard input ends."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the sweep's folder")
    parser.add_argument("--tracking_uri", required=True)
    parser.add_argument("--experiment", required=True, help="id of the experiment")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds, after the driver")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is the driver's: it closes our input
        signal.signal(number, signal.SIG_IGN)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # the spool is the retry
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "15"
    ended = threading.Event()
    threading.Thread(target=_until_input_ends, args=(ended,), daemon=True).start()
    threads = 1 if args.tracking_uri.startswith("sqlite") else 8
    with (args.out / "courier.lock").open("w") as lock:
        flock(lock, LOCK_EX)  # the courier of a driver that was killed is still delivering
        client = tracking.connect(args.tracking_uri)
        return serve(Courier(client, args.experiment, args.out, threads), ended, args.patience)


if __name__ == "__main__":
    sys.exit(main())
