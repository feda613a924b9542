"""Run a sweep: python sweeps/run.py sweeps/demo.yaml --store STORE.

The same command again resumes a sweep that was stopped, by whatever. `--promote RUN` makes a trial
the champion by hand.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from mlflow.exceptions import MlflowException
from ray import tune
from ray.tune.utils.log import Verbosity

from brstnet.config import (
    Parser,
    check_names,
    fingerprint,
    from_namespace,
    plain,
    preset,
    preset_asked,
    read_yaml,
    to_yaml,
)
from brstnet.data.mirror import open_store
from brstnet.data.store import Store
from sweeps import submit, tracking
from sweeps.board import Board, Budget, alone, open_study
from sweeps.champion import describe_leaderboard, promote, read_outcomes
from sweeps.cluster import HEAD, capacity, gpus_per_worker, leave, slots, start_ray
from sweeps.conclude import conclude
from sweeps.events import Events
from sweeps.nodes import BrokenNodeError, storage_full
from sweeps.plan import check_budget, check_folds, describe, describe_estimate, estimate
from sweeps.probe import Speed, kinds, probe
from sweeps.progress import SweepProgress, close_runs, tell_ends
from sweeps.record import describe_store
from sweeps.search import BoardScheduler, BoardSearch
from sweeps.space import Sweep
from sweeps.trial import Job
from sweeps.workers import run_trial


def make_parser(config: Path | None) -> Parser:
    """The command line: the sweep's own settings, each by its name, and where things are."""
    parser = Parser(prog="sweeps/run.py", description="Run a sweep, or resume it.")
    parser.add_argument("--config", action=ActionConfigFile, help="the sweep's YAML (also first)")
    parser.add_argument(
        "--store", help="patch store: a folder or an address, such as s3://BUCKET/NAME"
    )
    parser.add_argument("--out", type=Path, default=tracking.runs_folder(), help="for everything")
    parser.add_argument(
        "--tracking_uri",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="MLflow server; default: MLFLOW_TRACKING_URI, or a database under --out",
    )
    parser.add_argument(
        "--address",
        help="Ray cluster, or http://... of its job server: the sweep is sent and runs there; "
        "default: RAY_ADDRESS, or this machine",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--only", nargs="+", help="names of the space to search; no others are")
    parser.add_argument("--budget-gpu-hours", type=float, help="of workers, where there is no GPU")
    parser.add_argument("--max-trials", type=int, help="begin no more than so many in all")
    parser.add_argument("--deadline", type=moment, help="such as 2026-11-30T08:00")
    parser.add_argument("--price", type=float, help="of a GPU-hour, for the plan")
    parser.add_argument("--promote", metavar="RUN", help="(alone) make a trial the champion")
    parser.add_class_arguments(Sweep)
    parser.set_defaults(name=config.stem if config else "")
    return parser


def moment(value: str | datetime) -> datetime:
    """A date and time as written, or as the YAML reader has made it; local time by default.

    Raises:
        ValueError: it is none.
    """
    read = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return read.astimezone()


def parse(argv: Sequence[str]) -> tuple[Sweep, Namespace]:
    """The sweep and where it runs, of a command line whose first word may be the YAML.

    Raises:
        FileNotFoundError: there is no such YAML.
        ValueError: a setting is unknown or wrong.
    """
    words = list(argv)
    config = Path(words[0]) if words and not words[0].startswith("-") else None
    asked = preset_asked(words)
    if config is not None:
        values = read_yaml(config)
        check_names(Sweep, values, str(config))
        asked = asked or values.get("preset")
        words = ["--config", *words]
    parser = make_parser(config)
    if asked is not None:
        parser.set_defaults(preset(asked, "protocol", "training"))
    args = parser.parse_args(words)
    options = parser.instantiate(args)
    plan = from_namespace(Sweep, options)
    return (narrowed(plan, options.only) if options.only else plan), options


def narrowed(plan: Sweep, names: Sequence[str]) -> Sweep:
    """The sweep with a part of its space: what is left out stays as `training` says.

    Raises:
        ValueError: a name is not in the space.
    """
    if unknown := sorted(set(names) - set(plan.space)):
        raise ValueError(f"--only {' '.join(unknown)}: the space has {', '.join(plan.space)}")
    points = [
        p if isinstance(p, str) else {k: v for k, v in p.items() if k in names} for p in plan.points
    ]
    return replace(plan, space={k: plan.space[k] for k in plan.space if k in names}, points=points)


def sweep(plan: Sweep, options: Namespace) -> int:
    """Check, launch or resume, choose the champion; exit code 130 if it was stopped before."""
    stores = open_stores(plan, options.store)
    print(describe(plan, stores[""]))  # noqa: T201 - the command line's output
    check_folds(plan, stores)
    places = {name: store.address for name, store in stores.items()}
    if options.dry_run:
        expect(plan, places, options, options.out)
        return 0
    uri = options.tracking_uri or tracking.local_uri(options.out)
    with claimed_folder(plan, stores[""], options.out) as folder:
        client, experiment_id = reach(uri, options.out)
        board = Board(
            sweep=plan,
            study=open_study(plan, folder, tracking.champion_settings(client)),
            out=folder,
            budget=Budget(
                gpu_hours=options.budget_gpu_hours,
                trials=options.max_trials,
                deadline=options.deadline,
            ),
        )
        with courier(folder, uri, experiment_id):
            events = Events(folder)
            tell_begin(events, plan, stores[""], to_yaml(plan))
            tell_ends(events, board)
            tracking.share_view(client, experiment_id, plan.name, list(plan.space))
            if not board.done:
                launch(board, events, places, options)
            stopped = bool(board.running) or (not board.done and not board.stopped_by)
            if board.halted:  # said here, where the courier's own troubles cannot hide it
                with suppress(OSError):  # no room for this either
                    tell_stop(events, board)
                raise ValueError(board.halted)
            if stopped:
                tell_stop(events, board)
        print(describe_leaderboard(read_outcomes(folder), plan))  # noqa: T201
        if stopped:
            ended = f"{len(board.searched)} of {plan.count} trials ended"
            sys.stderr.write(f"\nstopped with {ended}; the same command resumes\n")
            return 130
        if board.stopped_by:
            print(f"ended: {board.stopped_by}; the same command with more goes on")  # noqa: T201
        conclude(client, board, places, options.address)
        return 0


def open_stores(plan: Sweep, where: str | None) -> dict[str, Store]:
    """The sweep's store under "", and those that its space names; of copies without the patches.

    Raises:
        ValueError: no store is given.
    """
    if where is None:
        raise ValueError("--store is missing: the patch store to train on")
    places = {"": where, **plan.stores}
    return {name: open_store(place, patches=False) for name, place in places.items()}


def reach(uri: str, out: Path) -> tuple[Any, str]:
    """A client of the tracking server and the id of the platform's experiment there.

    Raises:
        ValueError: the server does not answer. Once a sweep goes it may: what there is to tell
            then waits on disk.
    """
    client = tracking.connect(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        return client, tracking.experiment(client, out, uri)
    except MlflowException as error:
        raise ValueError(f"--tracking_uri {uri}: MLflow must answer to begin: {error}") from error


@contextmanager
def courier(folder: Path, uri: str, experiment_id: str) -> Iterator[None]:
    """The process that tells MLflow, until it has told all.

    Raises:
        ValueError: the server was away at the end; nothing is lost.
    """
    words = ["--tracking_uri", uri, "--experiment", experiment_id]
    command = [sys.executable, "-m", "sweeps.courier", str(folder), *words]
    until, driver = os.pipe()  # its end is the driver's, however that comes about

    def deliver() -> int:
        # In a session of its own: Ctrl-C is for the driver. If it is killed another takes over.
        while (code := subprocess.call(command, stdin=until, start_new_session=True)) < 0:
            pass
        return code

    with ThreadPoolExecutor(1) as thread:
        delivering = thread.submit(deliver)
        try:
            yield
        finally:
            os.close(driver)
            code = delivering.result()
            os.close(until)
    if code:
        raise ValueError(
            f"{uri}: MLflow did not take all there is to tell (exit code {code} of the courier); "
            f"it waits in {folder}: the same command delivers it when the server is back"
        )


def tell_begin(events: Events, plan: Sweep, store: Store, text: str) -> None:
    """The sweep's run: a new one, or the one it had."""
    tags = {
        "brstnet.sweep": plan.name,
        "brstnet.protocol": tracking.as_json(plain(plan.protocol)),
        "brstnet.protocol_line": plan.protocol.line(),
        "brstnet.store": store.digest,
        "mlflow.note.content": plan.protocol.line(),
    }
    events.start("sweep", plan.name, "sweep", tags)
    events.input("sweep", **describe_store(store), context=plan.protocol.line())
    asked = events.file.parent / "asked"
    asked.mkdir(exist_ok=True)
    (asked / "sweep.yaml").write_text(text)
    events.files("sweep", asked)
    events.status("sweep", "RUNNING")


def tell_stop(events: Events, board: Board) -> None:
    """Mark what a stopped sweep leaves running as killed; it goes on in the same runs."""
    for name in board.running:
        close_runs(events, board.out / "trials" / name, "KILLED")
    events.status("sweep", "KILLED")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the sweep may take of it."""

    concurrent: int
    gpus_per_worker: float
    trial_seconds: float


def expect(plan: Sweep, stores: dict[str, str], options: Namespace, out: Path) -> Cluster:
    """Start or join the cluster, measure, and say what the sweep will cost.

    Raises:
        ValueError: the cluster cannot train even one trial, or the budget is below one.
    """
    start_ray(plan, options.address)
    resources = capacity(options.address)
    gpus = gpus_per_worker(plan, resources)
    concurrent = plan.concurrent_trials or slots(plan, resources, gpus)
    speeds = measured(plan, stores, gpus, out / plan.name)
    now, expected = datetime.now().astimezone(), estimate(plan, speeds, concurrent, gpus)
    print(describe_estimate(expected, speeds, options.price, now))  # noqa: T201
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free_gb = shutil.disk_usage(there).free / 1e9
    budget = Budget(gpu_hours=options.budget_gpu_hours, deadline=options.deadline)
    if warning := check_budget(expected, budget, free_gb, now):
        sys.stderr.write(f"{warning}\n")
    return Cluster(
        concurrent=concurrent, gpus_per_worker=gpus, trial_seconds=expected.trial_seconds
    )


def measured(plan: Sweep, stores: dict[str, str], gpus: float, folder: Path) -> list[Speed]:
    """What each kind of trial costs: measured, or as it was when the sweep was begun."""
    file, key = folder / "probe.json", fingerprint([plan.identity(), plan.cpus_per_worker, gpus])
    note = json.loads(file.read_text()) if file.is_file() else {}
    if note.get("key") == key:
        return [Speed(**speed) for speed in note["speeds"]]
    speeds = probe(plan, stores, gpus, kinds(plan))
    if folder.is_dir():
        tracking.write_json(file, {"key": key, "speeds": [asdict(speed) for speed in speeds]})
    return speeds


def launch(board: Board, events: Events, stores: dict[str, str], options: Namespace) -> None:
    """Train what has not ended yet, until it has or somebody stops it.

    Raises:
        ValueError: the cluster cannot train even one trial.
    """
    cluster = expect(board.sweep, stores, options, options.out)
    board.concurrent, board.trial_seconds = cluster.concurrent, cluster.trial_seconds
    board.gpus_per_worker = cluster.gpus_per_worker or 1.0
    job = Job(
        sweep=board.sweep,
        stores=stores,
        out=board.out,
        gpus_per_worker=cluster.gpus_per_worker,
        session=f"{time.time_ns():x}",
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background job
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    bundle = job.bundle if job.sweep.workers_per_trial == 1 else None
    trainable = tune.with_parameters(run_trial, job=job)
    try:
        train(board, events, tune.with_resources(trainable, bundle or HEAD), bundle)
    except Exception:
        board.halted = board.halted or storage_full(board.out)  # Tune's and our own notes need room
        if not board.halted:
            raise


def train(
    board: Board, events: Events, trainable: Any, bundle: dict[str, float] | None = None
) -> None:
    """Let Tune run the trainable for each trial that the board hands out."""
    progress = SweepProgress(board, events)
    scratch = board.out / "tune"  # Tune's own account of the sweep, which nothing reads
    shutil.rmtree(scratch, ignore_errors=True)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=BoardSearch(board),
            scheduler=BoardScheduler(board, bundle),
            num_samples=-1,
            max_concurrent_trials=board.concurrent,  # else Tune starts one actor after the other
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=scratch.name,
            storage_path=str(board.out),
            failure_config=tune.FailureConfig(max_failures=-1),  # a trial counts its own attempts
            callbacks=[progress],
            verbose=int(Verbosity.V0_MINIMAL),
        ),
    )
    try:
        tuner.fit()
    finally:
        progress.close()
        for name in (scratch.name, "train"):
            shutil.rmtree(board.out / name, ignore_errors=True)


@contextmanager
def claimed_folder(plan: Sweep, store: Store, out: Path) -> Iterator[Path]:
    """The sweep's folder, new or that of the same sweep on the same store, for this process alone.

    Raises:
        ValueError: another sweep of that name is there, or another process runs this one.
    """
    folder = (out / plan.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        check_same_sweep(plan, store, folder)
        yield folder


def check_same_sweep(plan: Sweep, store: Store, folder: Path) -> None:
    """Note what the sweep is, or compare it with what was noted.

    Raises:
        ValueError: what makes trials comparable has changed.
    """
    note = folder / "identity.yaml"
    mine = yaml.safe_load(yaml.safe_dump({"store": store.digest, **plan.identity()}))
    before = yaml.safe_load(note.read_text()) if note.is_file() else mine
    if changed := sorted(key for key in {*mine, *before} if mine.get(key) != before.get(key)):
        raise ValueError(
            f"{note}: a sweep of this name has another {', '.join(changed)}, so that new trials "
            "could not be compared with its old ones: choose another --name, or remove the folder"
        )
    tracking.write_text(note, yaml.safe_dump(mine, sort_keys=False))
    tracking.write_text(folder / "sweep.yaml", to_yaml(plan))
    if not (folder / tracking.ID_FILE).is_file():
        tracking.write_text(folder / tracking.ID_FILE, uuid.uuid4().hex)


def promote_by_hand(words: Sequence[str]) -> int:
    """Make a trial of somebody's choice the champion."""
    parser = Parser(prog="sweeps/run.py", description="Make a trial the champion.")
    parser.add_argument("--promote", help="MLflow id of its run, or SWEEP/TRIAL such as demo/3")
    parser.add_argument("--out", type=Path, default=tracking.runs_folder(), help="of the sweeps")
    parser.add_argument("--tracking_uri", default=os.environ.get("MLFLOW_TRACKING_URI"))
    options = parser.parse_args(words)
    uri = options.tracking_uri or tracking.local_uri(options.out)
    client, _ = reach(uri, options.out)
    version = promote(client, options.out, options.promote)
    print(f"champion: models:/{tracking.MODEL}@{tracking.ALIAS} (version {version})")  # noqa: T201
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what the user can mend is told in a few lines, with exit code 2."""
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        if any(word.startswith("--promote") for word in words):
            return promote_by_hand(words)
        plan, options = parse(words)
        if submit.is_remote(options.address):
            return submit.send(plan, options, words)
        if options.dry_run and options.store is None:
            print(describe(plan, None))  # noqa: T201 - the command line's output
            return 0
        return sweep(plan, options)
    except MlflowException as error:
        sys.stderr.write(
            f"error: MLflow is away: {error}\nnothing is lost; the same command goes on\n"
        )
        return 2
    except (ValueError, OSError, BrokenNodeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on\n")
        return 130
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
