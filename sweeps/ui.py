"""MLflow's UI on this machine alone, opened at the sweeps' trials, best score first."""

import os
import signal
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from brstnet.config import Parser
from sweeps import tracking

HOST = "127.0.0.1"
PATIENCE_S = 180
"""MLflow's server was seen to take 18 to 43 s to answer on a busy machine."""


def leaderboard_url(port: int, experiment_id: str, sweep: str) -> str:
    """The address of a sweep's view: its trials, best score first."""
    page = f"http://{HOST}:{port}/#/experiments/{experiment_id}/runs"
    return f"{page}?viewStateShareKey={quote(sweep)}&workflowType=machine_learning"


def wait_until_healthy(port: int, server: subprocess.Popen) -> None:
    """Wait for the server to answer.

    Raises:
        OSError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)  # a server that finds its port taken ends before another one's is asked
        try:
            with urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (URLError, TimeoutError, ConnectionError):
            continue
    raise OSError(f"MLflow's server on port {port} did not start; is the port taken? Try --port")


def serve(runs: Path, port: int, sweep: str | None) -> None:
    """Serve until Ctrl-C.

    Raises:
        FileNotFoundError: no sweep was run here.
        ValueError: likewise.
        OSError: the server does not start.
    """
    if not (runs / tracking.LOCAL_FILE).is_file():
        raise FileNotFoundError(f"{runs / tracking.LOCAL_FILE}: no sweep was run here")
    uri = tracking.local_uri(runs)
    client = tracking.connect(uri)
    experiment_id = tracking.experiment(client, runs, uri)
    name = sweep or tracking.latest_sweep(client, experiment_id)
    url = leaderboard_url(port, experiment_id, name)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", uri]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # ten processes for LLMs
    server = subprocess.Popen(command, env=env)
    try:
        wait_until_healthy(port, server)
        print(f"\n{url}\nCtrl-C stops it", flush=True)  # noqa: T201 - the command line's output
        webbrowser.open(url)
        server.wait()
    finally:
        server.terminate()
        server.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="sweeps/ui.py", description="MLflow's UI, at the sweeps' leaderboard.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the sweeps' folder")
    parser.add_argument("--sweep", help="which to open at; default: the last that was started")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's background job ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        serve(options.runs, options.port, options.sweep)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
