"""Takes a cluster down from its own head, after a sweep that was asked to: --down-when-done.

    python -m clusters.off CODE      # as a job's last command, with the sweep's exit code

Finished or failed, nobody may be watching, and results lie off the machines: it goes down. A sweep
that was stopped by hand leaves the cluster up, and so does any other sweep until it has ended. In a
cloud the head shuts itself down last; hosts of one's own keep their MLflow server, for `home`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from clusters.down import STOP, STOP_RAY, end_host, say
from clusters.nodes import BOOTSTRAP, Cluster, read_cluster
from clusters.tunnel import JOBS, LOOPBACK
from sweeps import submit

BY_HAND = (130, 143)
"""Exit codes of a driver that was told to stop."""

POLL_S = 30.0
RETRY_S = 60.0


def log_file() -> Path:
    """Where it can be read what happened, when the machine has gone."""
    shared = os.environ.get("BRSTNET_RUNS", "")
    return (Path(shared) if shared and Path(shared).is_dir() else Path.home()) / "cluster-off.log"


def detach(code: int) -> int:
    """Leave the rest to a process that the end of Ray does not end; the sweep's code again."""
    if code in BY_HAND:
        say("stopped by hand: the cluster stays up")
        return code
    log = log_file()
    say(f"the sweep ended with code {code}: the cluster goes down, as {log} tells")
    with log.open("a") as out:
        subprocess.Popen(
            [sys.executable, "-m", "clusters.off"],
            cwd=Path.home(),  # the job's own folder goes with Ray
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return code


def off(cluster: Cluster) -> None:
    """Wait for other sweeps, end all workers, then this machine."""
    say(time.strftime("%Y-%m-%d %H:%M:%S"))
    while others():
        time.sleep(POLL_S)
    say("no sweep runs")
    # First, so that its autoscaler starts nothing more.
    subprocess.run(["bash", "--login", "-c", STOP_RAY], stdin=subprocess.DEVNULL, check=False)
    if cluster.on_premise:
        say(*filter(None, (end_host(cluster, host, STOP) for host in cluster.workers)))
        return
    while cluster.ray("down", "-y", "--workers-only", str(cluster.file)):
        # A worker that is forgotten costs more than this machine.
        say(f"workers may be left: once more in {RETRY_S:g} s")
        time.sleep(RETRY_S)
    say("no worker is left; this machine shuts down")
    subprocess.run(["sudo", "shutdown", "-h", "now"], check=True)


def others() -> bool:
    """Whether a sweep runs; none does where no job server answers, three times."""
    for attempt in range(3):
        try:
            there = submit.client(f"http://{LOOPBACK}:{JOBS}")
            return any(submit.running(job) for job in submit.jobs(there))
        except (ValueError, RuntimeError, OSError) as error:
            say(f"no answer to question {attempt + 1}: {error}")
            time.sleep(POLL_S / 3)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run either half."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words:
        return detach(int(words[0]))
    off(read_cluster(BOOTSTRAP.expanduser()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
