"""What a sweep has to tell MLflow, written to disk first: a file of events for each trial.

A trial never waits for a server: it appends a line to `events.jsonl` in its folder, and
`sweeps/courier.py` delivers the lines in order. The files stay, as a record of the sweep that
needs no server. Nothing heavy is imported here: every trial's process does.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "events.jsonl"

ENDED = ("FINISHED", "FAILED")
"""What a run stays, unless it goes on."""


class Events:
    """Appends to the events of one folder. What was told before a restart is not told again.

    An event is known by what it does, to which run, at which step; `key` is the run's name within
    the sweep: `0007/trial`, `0007/fold_2`, or `sweep`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE
        mend(self.file)
        events = read(self.file)[0]
        self._told = {_identity(event) for event in events}
        self._status = {e["run"]: e["status"] for e in events if e["do"] == "status"}

    def start(
        self, key: str, name: str, kind: str, tags: Mapping[str, str], parent: str = ""
    ) -> None:
        """A run begins, below another."""
        self._tell("start", key, name=name, kind=kind, tags=dict(tags), parent=parent)

    def log(
        self,
        key: str,
        metrics: Mapping[str, float] | None = None,
        *,
        step: int = 0,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Metrics at a step; parameters and tags of a run."""
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        said = {name: str(value) for name, value in (params or {}).items()}
        labels = {name: str(value) for name, value in (tags or {}).items()}
        self._tell("log", key, step=step, metrics=numbers, params=said, tags=labels)

    def input(self, key: str, **dataset: str) -> None:
        """The store a run learns from."""
        self._tell("input", key, **dataset)

    def files(self, key: str, folder: Path) -> None:
        """A folder whose files belong to a run; they stay where they are until delivered."""
        self._tell("files", key, path=os.path.relpath(folder, self.file.parent))

    def status(self, key: str, status: str) -> None:
        """A run is RUNNING again, FINISHED, FAILED or KILLED."""
        if status in ENDED and self._status.get(key) == status:
            return
        self._status[key] = status
        self._tell("status", key, status=status)

    def _tell(self, do: str, key: str, **what: Any) -> None:
        event = {"do": do, "run": key, **what, "time": time.time_ns() // 1_000_000}
        if (identity := _identity(event)) in self._told and do not in ("status", "files"):
            return
        self._told.add(identity)
        with self.file.open("a") as file:
            file.write(json.dumps(event) + "\n")


def _identity(event: Mapping[str, Any]) -> tuple[Any, ...]:
    if event["do"] == "start":
        return ("start", event["run"])
    said = [sorted(event.get(part, {}).items()) for part in ("params", "tags")]
    said.append(sorted(event.get("metrics", ())))
    where = [event.get(part) for part in ("step", "path")]
    return (event["do"], event["run"], repr((where, said)))


def read(file: Path, offset: int = 0, end: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The events of a file from a byte on, up to another; the byte after the last whole line."""
    if not file.is_file():
        return [], offset
    with file.open("rb") as lines:
        lines.seek(offset)
        text = lines.read(-1 if end is None else max(0, end - offset))
    whole = text[: text.rfind(b"\n") + 1]
    return list(_parsed(whole)), offset + len(whole)


def _parsed(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        if _is_event(line):
            yield json.loads(line)


def _is_event(line: bytes) -> bool:
    return bool(line.strip(b"\0 \n"))


def after(file: Path, offset: int, count: int) -> int:
    """The byte after so many events from a byte on."""
    with file.open("rb") as lines:
        lines.seek(offset)
        while count:
            count -= _is_event(lines.readline())
        return lines.tell()


def last(file: Path, do: str = "log", tail_bytes: int = 8192) -> dict[str, Any]:
    """The last event of a kind, looked for at the file's end alone; empty if there is none."""
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        before = max(0, file.stat().st_size - tail_bytes)
        lines.seek(before)
        found = lines.read().split(b"\n")[1 if before else 0 : -1]  # the ends may be parts
    events = (json.loads(line) for line in reversed(found))
    return next((event for event in events if event["do"] == do), {})


def mend(file: Path) -> None:
    """Cut off the half line that a killed process left: its event is told anew."""
    if file.is_file() and (text := file.read_bytes()) and not text.endswith(b"\n"):
        with file.open("rb+") as lines:
            lines.truncate(text.rfind(b"\n") + 1)
