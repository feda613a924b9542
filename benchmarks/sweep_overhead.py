"""What a sweep costs beyond its training steps, and how far it scales.

    python -m benchmarks.sweep_overhead                            # all parts
    python -m benchmarks.sweep_overhead --parts overhead           # seconds a trial, a real sweep
    python -m benchmarks.sweep_overhead --parts fake --trials 200 --slots 16
    python -m benchmarks.sweep_overhead --parts fake restore       # 1,000 trials on 64 slots
    python -m benchmarks.writers                                   # MLflow writes a second

*overhead*: a real sweep on demo tissue, one slot; wall time from the first trial's begin to the
last one's end, less what its training steps took.

*fake*: a sweep of trials that sleep (`fake_sweep.py`), on GPUs that are but a number. A slot is
busy while its trial sleeps; it is idle while the trial waits for an answer to a report, and from
one trial to the next. Counted from the moment all slots have a process to that when the last trial
was handed out. *restore*: the driver is killed (`kill -9`) at 70 % of the trials and the same
command given again. A machine with fewer cores than slots shows its own load in all of this.
"""

import argparse
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from benchmarks import fake_sweep
from brstnet.config import Prepare, Settings, build, read_yaml
from brstnet.data.prepare import prepare
from brstnet.data.store import Store
from brstnet.data.synthetic import Demo, make_demo
from brstnet.training.task import prepare_task
from dashboards.leaderboard import leaderboard_html, leaderboard_info
from sweeps import tracking
from sweeps.board import load_outcomes, open_study
from sweeps.events import FILE, read

ROOT = Path(__file__).parents[1]
KILL_AT = 0.7

REAL = """
name: real
protocol: {{held_out: [BC90006], folds: 2, panel_size: 40}}
training:
  {{backbone: test_resnet, genes: 60, epochs: 2, batch_size: 8, schedule: cosine, stopping: fixed}}
trials: {trials}
pruning: none
finalists: 1
concurrent_trials: 1
space:
  genes: [60, 100]
  learning_rate: {{low: 0.001, high: 0.05, log: true}}
  aux_weight: {{low: 0.1, high: 40.0, log: true}}
"""


def show(head: str, rows: list[list[str]]) -> None:
    """Print a table."""
    print(f"\n| {head} |\n|" + "---|" * (head.count("|") + 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


# A real sweep ------------------------------------------------------------------------------------


def overhead(scratch: Path, trials: int) -> None:
    """Run a small real sweep and say where its time went."""
    demo = Demo(patients=6, sections_per_patient=1, spots_per_section=24, genes=150)
    make_demo(scratch / "raw", demo)
    asked = Prepare(layout="stnet", window_px=64, input_px=32, held_out=("BC90006",))
    store = prepare(scratch / "raw", scratch / "store", asked, progress=False)
    (scratch / "real.yaml").write_text(REAL.format(trials=trials))
    words = [str(scratch / "real.yaml"), "--store", str(store.path), "--out", str(scratch / "runs")]
    began = time.time()
    with (scratch / "real.log").open("w") as log:
        subprocess.run(
            [sys.executable, "sweeps/run.py", *words],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            check=True,
        )
    whole = time.time() - began
    folder = scratch / "runs" / "real"
    parts: dict[str, float] = defaultdict(float)
    for trial in sorted((folder / "trials").iterdir()):
        for name, seconds in parts_of(trial, store.path).items():
            parts[name] += seconds
    first, last = ends_of(folder)
    parts["between trials"] = last - first - sum(parts.values())
    beyond = last - first - parts["training steps"]
    rows = [["wall, first begin to last end", f"{(last - first) / trials:.2f}"]]
    rows += [[name, f"{seconds / trials:.2f}"] for name, seconds in parts.items()]
    rows += [["**beyond training steps**", f"**{beyond / trials:.2f}**"]]
    rows += [["the command before and after its trials, in all", f"{whole - last + first:.1f}"]]
    show(f"a real sweep of {trials} trials, 2 folds of 2 epochs, 1 slot | s/trial", rows)


def ends_of(folder: Path) -> tuple[float, float]:
    """When the first trial began, and when the driver knew of the last one's end."""
    files = folder.glob(f"trials/*/{FILE}")
    first = min(read(file)[0][0]["time"] for file in files) / 1000
    told = [e for e in read(folder / FILE)[0] if e["do"] == "status" and e["run"] != "sweep"]
    return first, max(event["time"] for event in told) / 1000


def parts_of(trial: Path, store: Path) -> dict[str, float]:
    """What a trial's seconds went into, by what it told and when."""
    events = [event for event in read(trial / FILE)[0] if "time" in event]
    settings = build(Settings, read_yaml(trial / "settings.yaml"), str(trial))
    parts: dict[str, float] = defaultdict(float)
    for before, event in pairwise(events):
        seconds = (event["time"] - before["time"]) / 1000
        key = event["run"].partition("/")[2]
        if event["do"] != "log" or "train_loss" not in event["metrics"]:
            parts[OTHER.get((event["do"], key == "trial"), "ending a fold")] += seconds
            continue
        note = event["metrics"]
        steps = steps_of(store, settings, int(key.removeprefix("fold_")))
        trained = steps * settings.training.batch_size / note["patches_per_second"]
        parts["training steps"] += trained * note["step_share"]
        parts["between steps"] += trained * (1 - note["step_share"])
        parts["validation"] += note["seconds"] - trained
        first = event["step"] == 0
        parts["making a fold ready, saving" if first else "saving"] += seconds - note["seconds"]
    return dict(parts)


OTHER = {("start", True): "beginning a trial", ("start", False): "from fold to fold"}
"""What a trial has done before it tells of a run's begin."""


@functools.cache
def steps_of(store: Path, settings: Settings, fold: int) -> int:
    """Steps of an epoch."""
    return prepare_task(Store(store), settings, fold, torch.device("cpu"))[0].steps


# A sweep of sleepers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A look at the driver: when, memory and CPU seconds so far; events that wait; trials ended."""

    at: float
    gb: float
    cpu: float
    pending: int
    ended: int


@dataclass(kw_only=True)
class Drive:
    """One start of the driver, and what was seen of it."""

    out: Path
    trials: int
    slots: int
    seconds: float
    began: float = field(default_factory=time.time)
    samples: list[Sample] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The sweep's."""
        return self.out / fake_sweep.NAME

    def run(self, kill_at: int | None = None) -> None:
        """To the end, or until so many trials have ended.

        Raises:
            RuntimeError: the driver failed.
        """
        words = [str(self.out), "--trials", str(self.trials), "--slots", str(self.slots)]
        command = [sys.executable, "-m", "benchmarks.fake_sweep", *words]
        command += ["--seconds", str(self.seconds)]
        with (self.out / "driver.log").open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(1)
                self.look(process.pid)
                if kill_at is not None and self.samples and self.samples[-1].ended >= kill_at:
                    return
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log_text = (self.out / "driver.log").read_text()
            raise RuntimeError(f"the driver ended with {process.returncode}:\n{log_text[-3000:]}")

    def look(self, pid: int) -> None:
        """Take a sample."""
        try:
            memory = Path(f"/proc/{pid}/statm").read_text().split()
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return
        status = self.folder / "courier.json"
        note = json.loads(status.read_text()) if status.is_file() else {"pending": 0}
        sample = Sample(
            at=time.time(),
            gb=int(memory[1]) * resource.getpagesize() / 1e9,
            cpu=(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
            pending=note["pending"],
            ended=sum(1 for _ in self.folder.glob("trials/*/outcome.json")),
        )
        self.samples.append(sample)

    def timings(self) -> pd.DataFrame:
        """What this start's driver did: what, at, seconds, trial."""
        lines = (self.folder / "timings.jsonl").read_text().splitlines()
        table = pd.DataFrame([json.loads(line) for line in lines])
        until = self.samples[-1].at + 1
        return table[(table["at"] >= self.began) & (table["at"] < until)]

    def busy(self) -> pd.DataFrame:
        """When slots were busy under this start: begin, end, process, trial."""
        rows = [
            [*json.loads(line), file.parent.name]
            for file in self.folder.glob("trials/*/busy.jsonl")
            for line in file.read_text().splitlines()
        ]
        table = pd.DataFrame(rows, columns=["begin", "end", "pid", "trial"])
        timings = self.timings()  # processes of a driver that was killed may outlive it a moment
        up = timings[timings["what"] == "ray"]["at"].min()
        table = table[table["begin"].between(up, self.samples[-1].at)]
        return table.sort_values(["pid", "begin"])


def drive_info(drive: Drive) -> dict[str, str]:
    """What a start of the driver shows, in words and figures."""
    busy, timings, samples = drive.busy(), drive.timings(), drive.samples
    draws = timings[timings["what"] == "next"]
    full = busy.groupby("pid")["begin"].min().max()
    last = min(draws["at"].max(), busy["end"].max())
    inside = np.minimum(busy["end"], last) - np.maximum(busy["begin"], full)
    share = inside.clip(lower=0).sum() / (drive.slots * (last - full))
    gaps = busy["begin"].to_numpy()[1:] - busy["end"].to_numpy()[:-1]
    own = busy["pid"].to_numpy()[1:] == busy["pid"].to_numpy()[:-1]
    own &= busy["begin"].to_numpy()[1:] > full
    same = busy["trial"].to_numpy()[1:] == busy["trial"].to_numpy()[:-1]
    over = [s for s in samples if full <= s.at <= last] or samples[-1:]
    ended = over[-1].ended - over[0].ended
    steady = draws[draws["at"] > full]["seconds"]
    seconds = (busy["end"] - busy["begin"]).groupby(busy["trial"]).sum()
    return {
        "slots with a process": f"{busy['pid'].nunique()} of {drive.slots}",
        "from the command until all of them train": f"{full - drive.began:.0f} s",
        "**slots busy from then until the last trial is handed out**": f"**{share:.1%}**",
        "that is": f"{last - full:.0f} s, {ended} trials, {ended / (last - full):.2f} a second",
        "busy seconds of a trial, mean / median": f"{seconds.mean():.0f} / {seconds.median():.0f}",
        "idle at a report, mean / 99 %": spread(gaps[own & same]),
        "idle from one trial to the next, mean / 99 %": spread(gaps[own & ~same]),
        "drawing a trial, first 100 / last 100": (
            f"{steady[:100].mean():.3f} / {steady[-100:].mean():.3f} s"
        ),
        "taking in a report / an end": " / ".join(
            f"{timings[timings['what'] == what]['seconds'].mean():.3f}"
            for what in ("report", "end")
        )
        + " s",
        "driver's CPU": (
            f"{(over[-1].cpu - over[0].cpu) / (last - full):.0%} of one, "
            f"{(over[-1].cpu - over[0].cpu) / max(1, ended):.2f} s a trial"
        ),
        "driver's memory, first trials / most": (
            f"{over[0].gb:.2f} / {max(s.gb for s in samples):.2f} GB"
        ),
        "events that wait for MLflow, most": str(max(s.pending for s in over)),
    }


def spread(seconds: np.ndarray) -> str:
    """Mean and 99th percentile."""
    if not len(seconds):
        return "-"
    return f"{seconds.mean():.2f} / {np.percentile(seconds, 99):.2f} s"


def fake(out: Path, trials: int, slots: int, seconds: float, *, restore: bool) -> None:
    """Run the sweep of sleepers, and kill its driver on the way if asked to."""
    first = Drive(out=out, trials=trials, slots=slots, seconds=seconds)
    first.run(round(KILL_AT * trials) if restore else None)
    head = f"{trials} trials on {slots} slots"
    until = "until the driver was killed" if restore else "to the end"
    show(f"{head} | {until}", rows_of(first))
    if restore:
        unfinished = sum(1 for _ in first.folder.glob("trials/*")) - first.samples[-1].ended
        again = Drive(out=out, trials=trials, slots=slots, seconds=seconds)
        again.run()
        show(f"{head} | started again", rows_of(again))
        show(
            f"restore with {first.samples[-1].ended} trials ended, {unfinished} not | s",
            restore_rows(again),
        )
    check_whole(first.folder, trials)
    show("in MLflow | figure", list(mlflow_rows(out)))


def rows_of(drive: Drive) -> list[list[str]]:
    """Cells of a table."""
    return [list(row) for row in drive_info(drive).items()]


def restore_rows(drive: Drive) -> list[list[str]]:
    """What of a restore takes how long, from the command on."""
    timings = drive.timings()
    marks = {
        what: timings[timings["what"] == what]["at"].min() - drive.began
        for what in ("begin", "mlflow", "board", "ray", "next")
    }
    up = min(
        file.stat().st_mtime
        for file in drive.folder.glob("up-*/*")
        if file.stat().st_mtime > drive.began + marks["ray"]
    )
    return [
        ["imports", f"{marks['begin']:.1f}"],
        ["MLflow", f"{marks['mlflow'] - marks['begin']:.1f}"],
        ["study and board", f"{marks['board'] - marks['mlflow']:.1f}"],
        ["Ray started", f"{marks['ray'] - marks['board']:.1f}"],
        ["first trial handed out", f"{marks['next'] - marks['ray']:.1f}"],
        ["its process begins", f"{up - drive.began - marks['next']:.1f}"],
        ["**from the command until the first trial runs**", f"**{up - drive.began:.1f}**"],
    ]


def check_whole(folder: Path, trials: int) -> None:
    """No trial is lost or there twice: on disk, in the study, in MLflow."""
    outcomes = load_outcomes(folder)
    assert sorted(o["trial"] for o in outcomes) == list(range(trials))
    study = open_study(fake_sweep.make_plan(trials, 1), folder)
    states = {t.number: t.state.name.replace("FAIL", "FAILED") for t in study.get_trials()}
    assert states == {o["trial"]: o["state"] for o in outcomes}
    client = tracking.connect(tracking.local_uri(folder.parent))
    runs = all_runs(client, "tags.`brstnet.kind` = 'trial'")
    assert sorted(int(run.data.tags["brstnet.trial"]) for run in runs) == list(range(trials))
    assert {run.info.status for run in runs} == {"FINISHED"}


def all_runs(client: MlflowClient, where: str) -> list[Run]:
    """All runs that a filter lets through, page by page."""
    experiments = [each.experiment_id for each in client.search_experiments()]
    page = client.search_runs(experiments, where, max_results=1000)
    runs = list(page)
    while page.token:
        page = client.search_runs(experiments, where, max_results=1000, page_token=page.token)
        runs += page
    return runs


def mlflow_rows(out: Path) -> Iterator[list[str]]:
    """How usable MLflow is with all of it."""
    client = tracking.connect(tracking.local_uri(out))
    runs = all_runs(client, "")
    top = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    yield ["runs / top-level runs", f"{len(runs)} / {len(top)}"]
    experiments = [each.experiment_id for each in client.search_experiments()]
    began = time.perf_counter()
    client.search_runs(
        experiments,
        f"tags.`brstnet.kind` = 'trial' and tags.`brstnet.sweep` = '{fake_sweep.NAME}'",
        max_results=100,
        order_by=["metrics.score DESC"],
    )
    yield ["the leaderboard's first 100 trials", f"{time.perf_counter() - began:.2f} s"]
    began = time.perf_counter()
    page = leaderboard_html(leaderboard_info(client, fake_sweep.NAME))
    took = time.perf_counter() - began
    yield ["dashboards/leaderboard.py", f"{took:.1f} s, {len(page) / 1e6:.1f} MB"]
    size = (out / tracking.LOCAL_FILE).stat().st_size
    yield ["database", f"{size / 1e6:.0f} MB"]


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["overhead", "fake", "restore"])
    parser.add_argument("--trials", type=int, default=1000, help="of the fake sweep")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0, help="of a whole fake trial")
    parser.add_argument("--real_trials", type=int, default=12)
    parser.add_argument("--out", type=Path, help="keep the runs here; default: nowhere")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends as well
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        if "overhead" in args.parts:
            overhead(folder, args.real_trials)
        if {"fake", "restore"} & set(args.parts):
            out = folder / "fake"
            out.mkdir(parents=True)
            fake(out, args.trials, args.slots, args.seconds, restore="restore" in args.parts)


if __name__ == "__main__":
    main()
