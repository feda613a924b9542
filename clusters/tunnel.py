"""A way to a port that the head opens for itself alone."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from clusters.nodes import ROOT, Cluster

LOOPBACK = "127.0.0.1"
JOBS = 8265
MLFLOW = 5000
PATIENCE_S = 90
"""Clouds are asked where the head is, which takes some of it."""


def free_port(wanted: int = 0) -> int:
    """A port that nobody listens on: the one that is wanted, if it is free."""
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError:
            return free_port()
        return int(probe.getsockname()[1])


@contextmanager
def tunnel(
    cluster: Cluster, port: int, local: int = 0, patience_s: float = PATIENCE_S
) -> Iterator[str]:
    """The address here of an HTTP server on the head's own 127.0.0.1, while the block runs.

    Ray makes the connection, so whatever proxy the YAML names is used.

    Raises:
        OSError: the head, or its server, does not answer.
    """
    here = free_port(local)
    with tempfile.TemporaryFile() as log:
        # Made for the dashboard, it forwards any port of the head's to any of this machine's.
        forward = subprocess.Popen(
            cluster.words(
                "dashboard", "--port", str(here), "--remote-port", str(port), str(cluster.file)
            ),
            cwd=ROOT,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for whoever opened the tunnel
        )
        try:
            wait(here, port, forward, log, patience_s)
            yield f"http://{LOOPBACK}:{here}"
        finally:
            close(forward, here, port)


def wait(
    here: int, port: int, forward: subprocess.Popen[bytes], log: IO[bytes], patience_s: float
) -> None:
    """Wait until an HTTP server answers, whatever it says.

    Raises:
        OSError: the tunnel ended, or nobody answers at its other end.
    """
    deadline = time.monotonic() + patience_s
    while forward.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"http://{LOOPBACK}:{here}", timeout=5):
                return
        except HTTPError:
            return  # it wants a token or a password: it is there
        except (URLError, TimeoutError, HTTPException, ConnectionError):
            time.sleep(0.3)
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()[-5:]
    raise OSError(
        f"the head does not answer on its port {port}: is the cluster up? Ray says\n"
        + "\n".join(f"  {line}" for line in said)
    )


def close(forward: subprocess.Popen[bytes], here: int, port: int) -> None:
    """End the connection on both sides.

    Ray lets ssh keep a connection for ten seconds in the background, with the port still open:
    that process is told to let the port go and to end with its last user.
    """
    if forward.poll() is None:
        os.killpg(forward.pid, signal.SIGTERM)
    forward.wait()
    for kept in Path("/tmp").glob("ray_ssh_*/*/*"):  # where Ray puts them
        control = ["ssh", "-o", f"ControlPath={kept}"]
        forwarded = ["-O", "cancel", "-L", f"{here}:localhost:{port}", "head"]
        if kept.is_socket() and _quietly([*control, *forwarded]) == 0:
            _quietly([*control, "-O", "stop", "head"])


def _quietly(command: list[str]) -> int:
    silent = subprocess.DEVNULL
    return subprocess.run(command, stdin=silent, stdout=silent, stderr=silent).returncode
