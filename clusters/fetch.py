"""Brings results here: the sweeps' folders over SSH, MLflow's record through a tunnel."""

import os
import tempfile
from pathlib import Path

import yaml

from clusters import home as record
from clusters.down import say
from clusters.nodes import TRACKING, Cluster
from clusters.tracking import read_env
from clusters.tunnel import MLFLOW, tunnel

LEFT_THERE = ("/trials/**.safetensors", "/tune/", "/train/")
"""Weights of trials, of which the champion's are in its own folder, and Tune's scratch."""


def home(cluster: Cluster, to: Path, sweep: str | None, runs: str) -> None:
    """Bring one sweep, or all that the head's MLflow knows, into the folder `to`.

    Raises:
        ValueError: the cluster has no MLflow server, or something there cannot be brought.
        OSError: the head does not answer, or a folder does not come.
    """
    account = read_env(TRACKING.expanduser()) if TRACKING.expanduser().is_file() else {}
    if not account:
        raise ValueError(
            f"{TRACKING} is empty, so the cluster has no MLflow server to bring a record from: "
            f"sweeps keep a database on the head, in {runs}"
        )
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        os.environ[name] = account.get(name, "")
    with tunnel(cluster, int(account.get("MLFLOW_PORT", MLFLOW))) as uri:
        for name in record.check(uri, to, sweep):
            say(f"{name}: its folder")
            folder(cluster, f"{runs}/{name}/", to / name)
        say(record.bring(uri, to, sweep).line())


def folder(cluster: Cluster, source: str, to: Path) -> None:
    """Copy what is new in a folder on the head, without the weights of trials.

    Raises:
        OSError: it does not come.
        ValueError: it has links, which could lead anywhere on this machine.
    """
    to.mkdir(parents=True, exist_ok=True)
    config = cluster.config | {"rsync_exclude": list(LEFT_THERE)}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        if code := cluster.ray("rsync-down", file.name, source, f"{to.resolve()}/"):
            raise OSError(f"{source}: does not come from the head (exit code {code})")
    if links := [path for path in to.rglob("*") if path.is_symlink()]:
        for path in links:
            path.unlink()
        raise ValueError(
            f"{source} has links, which are not followed: {', '.join(map(str, links))}"
        )
