"""The cluster that trials run on: Ray on this machine, or one that is there; what fits on it."""

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.autoscaler.sdk import request_resources

from brstnet.launch import ALLOCATOR
from sweeps.space import Sweep

HEAD = {"CPU": 0, "node:__internal_head__": 0.001}
"""What the driver of a worker group takes: a place on the head, and no CPU that a worker needs."""

GROUPS_END_SECONDS = 5.0
"""Worker groups of a driver that has left are gone after one or two."""

_joined = False
"""Whether this process is on a cluster that was there before it, and will be after."""

STARTED_FROM = Path("~/ray_bootstrap_config.yaml").expanduser()
"""Where `ray up` leaves the cluster's YAML on the head."""


def start_ray(plan: Sweep, address: str | None) -> None:
    """Connect to a cluster, or start Ray on this machine.

    The dashboard is needed where a trial has workers of its own: without it Ray frees no worker
    group of a trial that was stopped.
    """
    global _joined
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow keeps the record
    common: dict[str, Any] = {
        "runtime_env": {"env_vars": {**ALLOCATOR, "MLFLOW_DISABLE_TELEMETRY": "true"}},
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    _joined = bool(address or os.environ.get("RAY_ADDRESS"))
    if _joined:
        ray.init(address=address, **common)
        return
    ray.init(
        address="local",
        include_dashboard=plan.workers_per_trial > 1,
        dashboard_host="127.0.0.1",
        object_store_memory=256 * 2**20,
        **common,
    )


def capacity(address: str | None) -> dict[str, float]:
    """What the cluster has, or may grow to: its head has the YAML that it was started from."""
    now: dict[str, float] = ray.cluster_resources()
    if not (address or os.environ.get("RAY_ADDRESS")) or not STARTED_FROM.is_file():
        return now
    config = yaml.safe_load(STARTED_FROM.read_text())
    grown: Counter[str] = Counter()
    for name, node in config.get("available_node_types", {}).items():
        if name != config.get("head_node_type"):
            count = min(node.get("max_workers", 0), config.get("max_workers", 0))
            grown.update({key: count * amount for key, amount in node["resources"].items()})
    return {key: max(now.get(key, 0.0), grown[key]) for key in {*now, *grown}}


def leave() -> None:
    """Leave Ray; take back what worker groups asked a cluster to grow to: it would be paid for.

    Ray's coordinator repeats for minutes what a group that was stopped had asked for. Started anew
    it knows nothing; the groups of others ask it again within 20 seconds. That is done when the
    groups are gone, which is after this driver has left: until then they ask again.
    """
    if not ray.is_initialized():
        return
    address = ray.get_runtime_context().gcs_address if _joined and _coordinator() else ""
    ray.shutdown()
    if not address:
        return
    time.sleep(GROUPS_END_SECONDS)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    if (coordinator := _coordinator()) is not None:
        ray.kill(coordinator, no_restart=False)
    request_resources(bundles=[])
    ray.shutdown()


def _coordinator() -> Any:
    """Ray's actor that asks for what worker groups need, if one has ever been started."""
    name = "AutoscalingCoordinator"
    with suppress(ValueError):
        return ray.get_actor(name, namespace=name)
    return None


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
