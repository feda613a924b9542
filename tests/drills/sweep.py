"""A small real sweep as a user runs it: a command, a tracking server, the same command again."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from drills.processes import Family, Process, holds

ROOT = Path(__file__).parents[2]

LOOK_S = 0.25
"""How often a sweep is looked at."""

PATIENCE_S = 300.0
"""The longest that anything here is waited for."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
AGENTS_S = 150.0
"""Ray's agents do nothing once their raylet is gone, but try for a minute to tell its GCS."""

COMMON = """
name: {name}
protocol: {{held_out: [BC90006], folds: 2, panel_size: 40}}
seed: 2
champion_rule: best  # the other rule weighs seconds, which a kill changes
space:
  genes: [60, 100]
  learning_rate: [0.01, 0.02, 0.03, 0.05, 1.0e+25]  # the last fails for its own reason
  aux_weight: {{low: 0.1, high: 10, log: true}}
points:
  - {{genes: 60, learning_rate: 0.02, aux_weight: 1}}
  - {{genes: 100, learning_rate: 1.0e+25, aux_weight: 1}}
  - {{genes: 60, learning_rate: 0.03, aux_weight: 1}}
  - {{genes: 60, learning_rate: 0.05, aux_weight: 1}}
training:
  backbone: test_resnet
  genes: 60
  batch_size: 8
  schedule: cosine
  stopping: fixed
"""

VARIANTS = {
    "search": "  epochs: 18\ntrials: 6\nsearch: random\npruning: none\nconcurrent_trials: 2\n",
    "asha": (
        "  epochs: 12\ntrials: 8\nsearch: tpe\npruning: asha\nconcurrent_trials: 1\n"
        "grace_folds: 0.25\nreduction_factor: 2\n"
    ),
    "workers": (
        "  epochs: 8\ntrials: 4\nsearch: random\npruning: none\nconcurrent_trials: 1\n"
        "workers_per_trial: 2\n"
    ),
}
"""`search`: two trials at once. `asha`: one at a time, so that the order of things is the same and
what is pruned and drawn must be too. `workers`: two Ray Train workers a trial."""

TRIALS = {"search": 6, "asha": 8, "workers": 4}


class Drilled(Exception):
    """A sweep did not do what it must."""


def wait_for(what: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    """Whether something came true in time."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


class Server:
    """`mlflow server` on this machine, on a database and a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        self.process, self.family = process, Family(process.pid)

    def healthy(self) -> bool:
        """Whether it answers."""
        self.family.see()
        if self.process.poll() is not None:
            raise Drilled(f"the tracking server ended: {self.folder / 'server.log'}")
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, TimeoutError, ConnectionError):
            return False

    def kill(self) -> None:
        """Kill it, whole."""
        self.family.kill()
        self.process.wait()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server that answers, until the end."""
    server = Server(folder)
    try:
        if not wait_for(server.healthy):
            raise Drilled(f"the tracking server does not answer: {folder / 'server.log'}")
        yield server
    finally:
        server.kill()


@dataclass
class Sweep:
    """One sweep in a folder of its own, begun as often as it takes."""

    variant: str
    name: str
    out: Path
    store: Path
    uri: str
    starts: int = 0
    finished_folds: dict[Path, tuple[int, int]] = field(default_factory=dict)
    families: list[Family] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.out / self.name
        self.yaml = self.out.with_suffix(".yaml")
        self.out.mkdir(parents=True)
        self.yaml.write_text(COMMON.format(name=self.name) + VARIANTS[self.variant])

    # The driver

    def start(self) -> None:
        """The command, the same each time."""
        self.starts += 1
        self.log = self.out / f"start-{self.starts}.log"
        words = [self.yaml, "--store", self.store, "--out", self.out, "--tracking_uri", self.uri]
        env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        with self.log.open("w") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "sweeps/run.py", *map(str, words)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"RAY_worker_niceness": "0", **env},
            )
        self.families.append(Family(self.driver.pid))

    def living(self) -> list[Process]:
        """The processes of this start of the driver."""
        self.note_finished()
        return self.families[-1].see()

    @property
    def code(self) -> int | None:
        """The driver's exit code, None while it runs."""
        return self.driver.poll()

    def has_stopped(self) -> bool:
        """Whether the driver has ended, whatever lives on."""
        self.living()
        return self.code is not None

    def left_behind(self) -> list[Process]:
        """All that lives of a sweep whose driver has ended."""
        return [process for family in self.families for process in family.see()]

    def end(self) -> None:
        """Leave nothing running."""
        for family in self.families:
            family.kill()
        self.driver.wait()

    # What it has come to

    def events(self) -> Iterator[tuple[str, dict]]:
        """What the trials have told, whole lines alone."""
        for file in sorted(self.folder.glob("trials/*/events.jsonl")):
            whole = file.read_bytes().rpartition(b"\n")[0]
            for line in whole.splitlines():
                yield file.parent.name, json.loads(line)

    def epochs(self, trial: str | None = None) -> int:
        """Epochs told so far, of one trial or all."""
        told = (name for name, event in self.events() if "train_loss" in event.get("metrics", {}))
        return sum(trial is None or name == trial for name in told)

    def ended(self) -> set[str]:
        """The trials that have ended."""
        return {file.parent.name for file in self.folder.glob("trials/*/outcome.json")}

    def all_ended(self) -> bool:
        """Whether training is over."""
        return len(self.ended()) == TRIALS[self.variant]

    def training(self) -> dict[str, Process]:
        """The processes of this start that hold a trial, by its name."""
        workers = [p for p in self.living() if p.title.startswith("ray::")]
        locks = {f.parent.name: f for f in self.folder.resolve().glob("trials/*/lock")}
        return {
            name: process
            for name, lock in locks.items()
            for process in workers
            if name not in self.ended() and holds(process.pid, lock)
        }

    def unsaved(self, trial: str = "") -> int:
        """Epochs that were told, but that no checkpoint has: the next start repeats them.

        Args:
            trial: whose alone; all by default.
        """
        lost = 0
        for folder in self.folder.glob(f"trials/{trial or '*'}/fold_*"):
            if (folder / "result.json").is_file() or folder.parent.name in self.ended():
                continue
            note = folder / "last" / "progress.json"
            saved = json.loads(note.read_text())["epoch"] if note.is_file() else -1
            run = f"{folder.parent.name}/{folder.name}"
            steps = [e["step"] for _, e in self.events() if e["run"] == run and e.get("metrics")]
            lost += max([*steps, saved]) - saved
        return lost

    def note_finished(self) -> None:
        """Remember the finished folds' results, which nothing may write again."""
        for file in self.folder.glob("trials/*/fold_*/result.json"):
            stat = file.stat()
            self.finished_folds.setdefault(file, (stat.st_mtime_ns, stat.st_ino))

    def repeated_folds(self) -> list[str]:
        """Finished folds that were trained again."""
        return [
            f"{file.parent.parent.name}/{file.parent.name} was finished twice"
            for file, (written, inode) in self.finished_folds.items()
            if (file.stat().st_mtime_ns, file.stat().st_ino) != (written, inode)
        ]

    def run_to_the_end(self) -> None:
        """Wait for its end, which must be a good one; it is started if it does not run.

        Raises:
            Drilled: it does not end well.
        """
        if self.starts == 0 or self.code:
            self.start()
        if not wait_for(self.has_stopped):
            raise Drilled(f"{self.log}: the driver does not end")
        if self.code:
            raise Drilled(f"{self.log}: exit code {self.code}\n{self.said()}")
        if not wait_for(lambda: not self.left_behind(), AGENTS_S):
            raise Drilled(f"{self.log}: left behind {[p.title for p in self.left_behind()]}")

    def said(self) -> str:
        """The end of what the driver wrote."""
        return self.log.read_text(errors="replace")[-600:]
