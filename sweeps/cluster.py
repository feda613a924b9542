"""The cluster that trials run on: Ray on this machine, or one that is there; what fits on it."""

import os
from collections.abc import Mapping
from typing import Any

import ray

from brstnet.launch import ALLOCATOR
from sweeps.space import Sweep

HEAD = {"CPU": 0, "node:__internal_head__": 0.001}
"""What the driver of a worker group takes: a place on the head, and no CPU that a worker needs."""


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


def gpus_per_worker(plan: Sweep, resources: Mapping[str, float]) -> float:
    """GPUs that a worker takes: what the sweep says, else one if the cluster has any."""
    if plan.gpus_per_worker is not None:
        return plan.gpus_per_worker
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def slots(sweep: Sweep, resources: Mapping[str, float], gpus_per_worker: float) -> int:
    """How many trials the cluster can train at once.

    Raises:
        ValueError: not even one, whatever the cluster would wait for.
    """
    wanted = {"CPU": sweep.cpus_per_worker, "GPU": gpus_per_worker}
    fits = [
        resources.get(name, 0) / (amount * sweep.workers_per_trial)
        for name, amount in wanted.items()
        if amount
    ]
    if min(fits) < 1:
        has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        needs = ", ".join(f"{v:g} {name}" for name, v in wanted.items() if v)
        raise ValueError(
            f"a trial needs {sweep.workers_per_trial} worker(s) of {needs} each, but the cluster "
            f"has {has}: lower workers_per_trial, cpus_per_worker or gpus_per_worker"
        )
    return int(min(fits))
