"""Run a sweep: python sweeps/run.py sweeps/demo.yaml --store STORE.

The same command again resumes a sweep that was stopped.
"""

import fcntl
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from jsonargparse import ActionConfigFile, Namespace
from ray import tune
from ray.tune.utils.log import Verbosity

from brstnet.config import (
    Parser,
    check_names,
    from_namespace,
    plain,
    preset,
    preset_asked,
    read_yaml,
    to_yaml,
)
from brstnet.data.store import Store
from brstnet.launch import ALLOCATOR
from sweeps import tracking
from sweeps.champion import crown, describe_leaderboard, read_outcomes
from sweeps.plan import check_folds, describe, slots
from sweeps.progress import SweepProgress
from sweeps.search import make_scheduler, make_search
from sweeps.space import Sweep
from sweeps.trial import Job, run_trial

HEAD = {"CPU": 0, "node:__internal_head__": 0.001}
"""What the driver of a worker group takes: a place on the head, and no CPU that a worker needs."""


def make_parser(config: Path | None) -> Parser:
    """The command line: the sweep's own settings, each by its name, and where things are."""
    parser = Parser(prog="sweeps/run.py", description="Run a sweep, or resume it.")
    parser.add_argument("--config", action=ActionConfigFile, help="the sweep's YAML (also first)")
    parser.add_argument("--store", type=Path, help="patch store")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for everything")
    parser.add_argument("--tracking_uri", help="MLflow server; default: a database under --out")
    parser.add_argument("--address", help="Ray cluster; default: RAY_ADDRESS, or this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_class_arguments(Sweep)
    parser.set_defaults(name=config.stem if config else "")
    return parser


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
    return from_namespace(Sweep, options), options


def sweep(plan: Sweep, options: Namespace) -> int:
    """Check, launch or resume, choose the champion; exit code 130 if it was stopped before."""
    store = Store(options.store)
    print(describe(plan, store))  # noqa: T201 - the command line's output
    check_folds(plan, store)
    folder = claim_folder(plan, store, options.out)
    lock = (folder / "lock").open("w")  # held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{folder}: another process is running this sweep") from error
    uri = options.tracking_uri or tracking.local_uri(options.out)
    client = tracking.connect(uri)
    experiment_id = tracking.experiment(client, options.out, uri)
    job = Job(
        sweep=plan,
        store=store.path.resolve(),
        out=folder.resolve(),
        tracking_uri=uri,
        experiment_id=experiment_id,
        sweep_run=sweep_run(client, experiment_id, plan, store, folder),
        gpus_per_worker=plan.gpus_per_worker or 0.0,
    )
    if len(read_outcomes(job.out)) < plan.count:
        launch(job, options)
    return conclude(job)


def launch(job: Job, options: Namespace) -> None:
    """Train what has not ended yet, until it has or somebody stops it.

    Raises:
        ValueError: the cluster cannot train even one trial.
    """
    start_ray(job.sweep, options.address)
    resources = ray.cluster_resources()
    job = replace(job, gpus_per_worker=gpus_per_worker(job.sweep, resources))
    concurrent = job.sweep.concurrent_trials or slots(job.sweep, resources, job.gpus_per_worker)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background job
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    make_tuner(job, concurrent).fit()


def claim_folder(plan: Sweep, store: Store, out: Path) -> Path:
    """The sweep's folder: new, or that of the same sweep on the same store.

    Raises:
        ValueError: another sweep of that name is there.
    """
    folder = out / plan.name
    note = folder / "sweep.yaml"
    mine = f"# store {store.digest}\n" + to_yaml(plan)
    if note.is_file() and note.read_text() != mine:
        raise ValueError(
            f"{note}: a sweep of this name has other settings or another store; choose another "
            "--name, or remove the folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(mine)
    return folder


def start_ray(plan: Sweep, address: str | None) -> None:
    """Connect to a cluster, or start Ray on this machine.

    The dashboard is needed where a trial has workers of its own: without it Ray frees no worker
    group of a trial that was stopped.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow keeps the record
    common: dict[str, Any] = {
        "runtime_env": {"env_vars": {**ALLOCATOR, "MLFLOW_DISABLE_TELEMETRY": "true"}},
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **common)
        return
    ray.init(
        address="local",
        include_dashboard=plan.workers_per_trial > 1,
        dashboard_host="127.0.0.1",
        object_store_memory=256 * 2**20,
        **common,
    )


def gpus_per_worker(plan: Sweep, resources: dict[str, float]) -> float:
    """GPUs that a worker takes: what the sweep says, else one if the cluster has any."""
    if plan.gpus_per_worker is not None:
        return plan.gpus_per_worker
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def sweep_run(client: Any, experiment_id: str, plan: Sweep, store: Store, folder: Path) -> str:
    """The sweep's run in MLflow: a new one, or the one it had."""
    runs = tracking.read_runs(folder)
    if "sweep" in runs:
        client.update_run(runs["sweep"], status="RUNNING")
        return runs["sweep"]
    tags = {
        "brstnet.sweep": plan.name,
        "brstnet.protocol": tracking.as_json(plain(plan.protocol)),
        "brstnet.protocol_line": plan.protocol.line(),
        "brstnet.store": store.digest,
        "mlflow.note.content": plan.protocol.line(),
    }
    run_id = tracking.start_run(client, experiment_id, "sweep", plan.name, tags)
    tracking.log_store(client, run_id, store, plan.protocol)
    client.log_text(run_id, to_yaml(plan), "sweep.yaml")
    tracking.write_runs(folder, {"sweep": run_id})
    tracking.share_view(client, experiment_id, plan.name, list(plan.space))
    return run_id


def make_tuner(job: Job, concurrent: int) -> tune.Tuner:
    """A Tuner for the sweep, restored if the sweep was stopped; failed trials stay failed."""
    plan, path = job.sweep, job.out / "tune"
    resources = (
        {"CPU": plan.cpus_per_worker, "GPU": job.gpus_per_worker}
        if plan.workers_per_trial == 1
        else HEAD
    )
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), resources)
    if tune.Tuner.can_restore(str(path)):
        return tune.Tuner.restore(str(path), trainable, resume_unfinished=True)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=make_search(plan, job.out),
            scheduler=make_scheduler(plan, job.out),
            num_samples=plan.count,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(job.out),
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[SweepProgress(job)],
            verbose=int(Verbosity.V0_MINIMAL),
        ),
    )


def conclude(job: Job) -> int:
    """Print the leaderboard; choose and register the champion once every trial has ended."""
    client = tracking.connect(job.tracking_uri)
    outcomes = read_outcomes(job.out)
    print(describe_leaderboard(outcomes, job.sweep))  # noqa: T201 - the command line's output
    if len(outcomes) < job.sweep.count:
        client.set_terminated(job.sweep_run, status="KILLED")
        tracking.stop_open_runs(client, job.out)
        message = (
            f"\nstopped with {len(outcomes)} of {job.sweep.count} trials ended; the same command"
        )
        sys.stderr.write(f"{message} resumes\n")
        return 130
    version = crown(client, job, outcomes)
    print(f"champion: models:/{tracking.MODEL}@{tracking.ALIAS} (version {version})")  # noqa: T201
    client.set_terminated(job.sweep_run)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what the user can mend is told in a few lines, with exit code 2."""
    try:
        plan, options = parse(sys.argv[1:] if argv is None else argv)
        if options.dry_run:
            store = Store(options.store) if options.store else None
            print(describe(plan, store))  # noqa: T201 - the command line's output
            return 0
        if options.store is None:
            raise ValueError("--store is missing: the patch store to train on")
        return sweep(plan, options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped before the first trial; the same command starts again\n")
        return 130
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
