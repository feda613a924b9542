"""Takes a cluster down, and says what it could not end.

For on-premise hosts Ray's own `down` stops Ray on the head alone, and leaves a private key there.
So here each host is asked, the head first: its autoscaler would start the others again.
"""

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray._common.utils import get_default_ray_temp_dir

from clusters.nodes import BOOTSTRAP, NO_ANSWER, Cluster
from clusters.tunnel import JOBS, tunnel
from sweeps import submit

KEY = "~/ray_bootstrap_key.pem"
OURS = "site-packages/[r]ay/|[r]ay::|clusters[.](notice|off)|sweeps[.](run|courier)"
"""Command lines of Ray's processes and ours; the brackets keep a search from finding itself."""

STOP_RAY = """
ray stop > /dev/null 2>&1
ray stop --force > /dev/null 2>&1
"""
STOP = f"""
pkill -u "$(id -u)" -f 'clusters[.](notice|off)'
{STOP_RAY}
for i in $(seq 30); do
  pgrep -u "$(id -u)" -f '{OURS}' > /dev/null || break
  sleep 0.5
done
pgrep -u "$(id -u)" -f -l '{OURS}'
"""
"""Ends Ray on a host; prints what is left after 15 s, and ends with 1 if that is nothing."""

STOP_HEAD = f"""
test ! -d ~/brstnet || (cd ~/brstnet && python -m clusters.tracking --stop > /dev/null 2>&1)
rm -f {KEY} {BOOTSTRAP}
{STOP}
"""
NOTHING_LEFT = 1  # of pgrep


def down(cluster: Cluster) -> int:
    """End everything: 0 if nothing is left that was found, 1 with the reason else."""
    say(end_sweeps(cluster))
    faults = down_hosts(cluster) if cluster.on_premise else down_cloud(cluster)
    if not faults:
        forget(cluster)
    say(*faults)
    return 1 if faults else 0


def say(*lines: str) -> None:
    """Tell the user."""
    for line in lines:
        print(line, flush=True)  # noqa: T201 - the command line's output


def end_sweeps(cluster: Cluster) -> str:
    """Stop the sweeps that run, so that they end in order; what came of it, in words."""
    if cluster.on_premise and cluster.ssh(cluster.head, "true", 20)[0] == NO_ANSWER:
        return f"{cluster.head}: no answer, so no sweep could be stopped in order"
    try:
        with tunnel(cluster, JOBS, patience_s=30) as address:
            names = submit.stop_all(address)
    except (OSError, RuntimeError):
        return "no job server answers on the head, so there was no sweep to stop in order"
    return f"stopped: {', '.join(names)}" if names else "no sweep was running"


def down_hosts(cluster: Cluster) -> list[str]:
    """End Ray on the head, then on all workers; what is left, in words."""
    first = end_host(cluster, cluster.head, STOP_HEAD)
    with ThreadPoolExecutor(16) as threads:
        rest = threads.map(lambda host: end_host(cluster, host, STOP), cluster.workers)
        return [fault for fault in (first, *rest) if fault]


def end_host(cluster: Cluster, host: str, command: str) -> str:
    """End Ray on one host; what is left there, or nothing."""
    code, said = cluster.ssh(host, command, 180)
    if code == NOTHING_LEFT and not said:
        say(f"{host}: nothing of Ray is left")
        return ""
    if code == NO_ANSWER:
        return (
            f"{host}: no answer ({said or 'ssh'}): Ray's processes may still run there; "
            "the same command again when the host is back ends them"
        )
    return f"{host}: still there:\n" + "\n".join(f"  {line}" for line in said.splitlines())


def down_cloud(cluster: Cluster) -> list[str]:
    """End the machines by the cloud's own interface, which needs no answer of theirs."""
    for attempt in range(3):
        if attempt:
            time.sleep(10)
        if cluster.ray("down", "-y", str(cluster.file)) == 0:
            return []
    return [
        f"{cluster.file}: `ray down` failed: machines may STILL RUN AND COST MONEY. Look for them "
        f"in the cloud's console, under the tag ray-cluster-name = {cluster.name}, and end them; "
        "or mend what Ray says above and give the same command again"
    ]


def forget(cluster: Cluster) -> None:
    """Remove what Ray's commands left on this machine about the cluster."""
    for ending in ("state", "lock"):
        (Path(get_default_ray_temp_dir()) / f"cluster-{cluster.name}.{ending}").unlink(
            missing_ok=True
        )
    for cache in Path(tempfile.gettempdir()).glob("ray-config-*"):
        if json.loads(cache.read_text())["config"].get("cluster_name") == cluster.name:
            cache.unlink()
