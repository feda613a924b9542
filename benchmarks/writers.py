"""Eight trials that tell MLflow of their epochs at once: through the spool, or each for itself.

    python -m benchmarks.writers --target sqlite server outage

*spool* is what a sweep does: each writer appends to its `events.jsonl`, one courier delivers.
*direct* is what it would do otherwise: each writer calls `log_batch` and waits. In the *outage* the
server is killed while the writers go on, and started again; what arrived is compared number by
number with what was written.
"""

import argparse
import json
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient

from sweeps import tracking
from sweeps.events import FILE, Events, read
from sweeps.ui import HOST, wait_until_healthy

METRICS = 10
SPAWN = mp.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What each writer writes: so many epochs, no more than so many a second."""

    writers: int
    epochs: int
    rate: float

    @property
    def metrics(self) -> int:
        """Of all writers together."""
        return self.writers * self.epochs * METRICS

    def run(self, folder: Path, tell: Callable[[int], None], barrier: Barrier) -> None:
        """One writer: all begin together; the longest that it waited is left in its folder."""
        barrier.wait()
        began, longest = time.monotonic(), 0.0
        for epoch in range(self.epochs):
            time.sleep(max(0.0, began + epoch / self.rate - time.monotonic()))
            asked = time.monotonic()
            tell(epoch)
            longest = max(longest, time.monotonic() - asked)
        note = {"longest": longest, "seconds": time.monotonic() - began}
        (folder / "waits.json").write_text(json.dumps(note))


def numbers(rank: int, epoch: int) -> dict[str, float]:
    """What writer `rank` says of an epoch: no two say the same."""
    return {f"metric_{n}": rank + epoch / 1000 + n / 10 for n in range(METRICS)}


def write_to_spool(rank: int, folder: Path, load: Load, barrier: Barrier) -> None:
    """A trial's process as sweeps have it."""
    events, trial, fold = Events(folder), f"{folder.name}/trial", f"{folder.name}/fold_0"
    events.start(trial, trial, "trial", {}, "sweep")
    events.start(fold, fold, "fold", {}, trial)
    load.run(folder, lambda epoch: events.log(fold, numbers(rank, epoch), step=epoch), barrier)
    events.status(fold, "FINISHED")


def write_directly(rank: int, folder: Path, load: Load, barrier: Barrier, uri: str) -> None:
    """A trial's process that talks to MLflow itself."""
    folder.mkdir(parents=True)
    client = tracking.connect(uri)
    experiment = tracking.experiment(client, folder.parents[2], uri)  # it is there already
    run = tracking.start_run(client, experiment, "fold", folder.name, {})
    load.run(
        folder,
        lambda epoch: tracking.log(client, run, numbers(rank, epoch), step=epoch),
        barrier,
    )


def go(out: Path, load: Load, target: Any, *more: Any) -> Path:
    """Run all writers to their end."""
    barrier = SPAWN.Barrier(load.writers)
    folders = [out / "trials" / f"{rank:04d}" for rank in range(load.writers)]
    writers = [
        SPAWN.Process(target=target, args=(rank, folder, load, barrier, *more))
        for rank, folder in enumerate(folders)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    return out


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """MLflow's server on a database of its own; killed with its workers at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", tracking.local_uri(folder)]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_healthy(port, process)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


@contextmanager
def courier(out: Path, uri: str, patience: float = 600.0) -> Iterator[None]:
    """The product's courier, until it has delivered all.

    Raises:
        RuntimeError: it gave up.
    """
    client = tracking.connect(uri)
    experiment = tracking.experiment(client, out.parent, uri)
    out.mkdir(parents=True)
    tracking.write_text(out / tracking.ID_FILE, out.name)
    Events(out).start("sweep", out.name, "sweep", {})
    words = [str(out), "--tracking_uri", uri, "--experiment", experiment]
    words += ["--patience", str(patience)]
    command = [sys.executable, "-m", "sweeps.courier", *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if process.wait():
            raise RuntimeError(f"the courier gave up with exit code {process.returncode}")


@dataclass
class Watch(threading.Thread):
    """Notes when each folder's events were delivered up to where."""

    out: Path
    seen: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Look twenty times a second."""
        while not self._ended.wait(0.05):
            self.look()

    def look(self) -> None:
        """Once."""
        for file in self.out.glob("trials/*/delivered.json"):
            offset, marks = json.loads(file.read_text()), self.seen.setdefault(file.parent.name, [])
            if not marks or marks[-1][1] < offset:
                marks.append((time.time(), offset))

    def end(self) -> None:
        """Look a last time."""
        self._ended.set()
        self.join()
        self.look()

    def lags(self) -> np.ndarray:
        """Seconds from the writing of each epoch to its delivery."""
        found = []
        for name, marks in self.seen.items():
            times, offsets = np.array(marks).T
            end = 0
            for line in (self.out / "trials" / name / FILE).read_bytes().splitlines(keepends=True):
                end += len(line)
                event = json.loads(line)
                if event["do"] == "log":
                    found.append(times[np.searchsorted(offsets, end)] - event["time"] / 1000)
        return np.array(found)


def spool(out: Path, uri: str, load: Load) -> dict[str, Any]:
    """Write through the spool: how fast it is delivered, and how late."""
    with courier(out, uri):
        watch = Watch(out)
        watch.start()
        go(out, load, write_to_spool)
        events = Events(out)
        for path in sorted((out / "trials").iterdir()):
            events.status(f"{path.name}/trial", "FINISHED")
    watch.end()
    lags, waits = watch.lags(), read_waits(out)
    assert len(lags) == load.metrics / METRICS
    last = max(mark[0] for marks in watch.seen.values() for mark in marks)
    first = min(read(f)[0][2]["time"] for f in out.glob(f"trials/*/{FILE}")) / 1000
    return {**waits, "speed": load.metrics / (last - first), "lags": lags}


def direct(out: Path, uri: str, load: Load) -> dict[str, Any]:
    """Each writer for itself."""
    tracking.experiment(tracking.connect(uri), out.parent, uri)
    waits = read_waits(go(out, load, write_directly, uri))
    return {**waits, "speed": load.metrics / waits["seconds"], "lags": np.zeros(1)}


def read_waits(out: Path) -> dict[str, float]:
    """The longest that any writer waited, and the time of the slowest."""
    notes = [json.loads(file.read_text()) for file in out.glob("trials/*/waits.json")]
    return {key: max(note[key] for note in notes) for key in ("longest", "seconds")}


def show(way: str, target: str, load: Load, found: dict[str, Any]) -> None:
    """A row of the table."""
    lags = found["lags"]
    offered = f"{load.writers * load.rate * METRICS:.0f}" if load.rate < np.inf else "all it can"
    late = f"{np.median(lags):.1f} / {lags.max():.1f}" if lags.any() else "-"
    cells = [way, target, str(load.metrics), offered, f"{found['speed']:.0f}"]
    cells += [f"{1000 * found['longest']:.0f}", late]
    print("| " + " | ".join(cells) + " |", flush=True)


def compare(folder: Path, target: str, writers: int, quick: float) -> None:
    """Spool and direct writing to one target, a steady load and as fast as can be."""
    steady = Load(writers=writers, epochs=round(30 * quick), rate=1.0)
    burst = Load(writers=writers, epochs=round(150 * quick), rate=100.0)
    flood = Load(writers=writers, epochs=round(30 * quick), rate=np.inf)
    port = free_port()
    place = folder / target
    place.mkdir()
    uri = f"http://{HOST}:{port}" if target == "server" else tracking.local_uri(place)
    tracking.connect(tracking.local_uri(place)).search_experiments()  # its tables, made once

    def measure() -> None:
        show("spool", target, steady, spool(place / "steady", uri, steady))
        show("spool", target, burst, spool(place / "burst", uri, burst))
        show("direct", target, flood, direct(place / "direct", uri, flood))

    if target == "server":
        with server(place, port):
            measure()
    else:
        measure()


def outage(folder: Path, writers: int, quick: float) -> None:
    """Kill the server under a steady load and start it again; every number must arrive, once."""
    load = Load(writers=writers, epochs=round(40 * quick), rate=1.0)
    place, port = folder / "outage", free_port()
    place.mkdir()
    uri = f"http://{HOST}:{port}"
    with server(place, port) as first, courier(place / "sweep", uri):
        writing = threading.Thread(target=go, args=(place / "sweep", load, write_to_spool))
        writing.start()
        while not list(place.glob("sweep/trials/*/delivered.json")):
            time.sleep(0.1)
        time.sleep(load.epochs / 4)
        killed = time.monotonic()
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        time.sleep(load.epochs / 4)
        with server(place, port):
            away = time.monotonic() - killed
            writing.join()
            waits, began = read_waits(place / "sweep"), time.monotonic()
            while json.loads((place / "sweep" / "courier.json").read_text())["pending"]:
                time.sleep(0.1)
            caught_up = time.monotonic() - began
            check_arrived(tracking.connect(uri), place / "sweep", load)
    assert waits["longest"] < 1, waits
    print(
        f"\noutage: the server was away for {away:.0f} s; {load.metrics} metrics of {load.writers} "
        f"writers arrived, none lost, none twice, in order; no writer waited longer than "
        f"{1000 * waits['longest']:.0f} ms; all was there {caught_up:.1f} s after the last writer "
        "ended or the server was back"
    )


def check_arrived(client: MlflowClient, out: Path, load: Load) -> None:
    """Compare what MLflow has with what was written."""
    for rank, folder in enumerate(sorted((out / "trials").iterdir())):
        run = tracking.read_runs(folder)["fold_0"]
        written = [event["time"] for event in read(folder / FILE)[0] if event["do"] == "log"]
        assert client.get_run(run).info.status == "FINISHED"
        for name in numbers(rank, 0):
            history = client.get_metric_history(run, name)  # in the order in which they came
            assert [m.step for m in history] == list(range(load.epochs))
            assert [m.timestamp for m in history] == written
            assert [m.value for m in history] == [numbers(rank, m.step)[name] for m in history]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["sqlite", "server", "outage"])
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--quick", type=float, default=1.0, help="a share of the epochs")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends as well
    print("| way | target | metrics | offered/s | delivered/s | longest wait ms | lag s, max |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for target in args.target:
            if target == "outage":
                outage(Path(scratch), args.writers, args.quick)
            else:
                compare(Path(scratch), target, args.writers, args.quick)


if __name__ == "__main__":
    main()
