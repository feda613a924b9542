"""The team's MLflow server on a cluster's head: PostgreSQL, object storage, an account a person.

    python -m clusters.tracking           # start it and return; a healthy server is left alone
    python -m clusters.tracking --stop    # end it

What it needs stands in `~/.brstnet/tracking.env` (mode 600, KEY=VALUE lines as a shell reads them);
without that file nothing is started, and sweeps keep their record in a database under `--out`.

    MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://USER:PASSWORD@HOST:5432/DATABASE
    MLFLOW_ARTIFACTS_DESTINATION=s3://BUCKET/mlflow
    MLFLOW_TRACKING_USERNAME=...          # the administrator: the sweeps write in this name
    MLFLOW_TRACKING_PASSWORD=...          # at least 12 characters; may be changed here
    MLFLOW_HOST=127.0.0.1                 # these two may be left out
    MLFLOW_PORT=5000

The administrator makes further accounts on the server's page `/signup`. They may read everything
and change nothing of others (`PERMISSION`); who is to log evaluations gets more in Python:

    accounts = mlflow.server.get_app_client("basic-auth", tracking_uri="http://127.0.0.1:5000")
    accounts.grant_user_permission(NAME, "experiment", EXPERIMENT_ID, "EDIT")

Users lie in the same database, in tables of their own: MLflow counts the versions of their schema
apart (`alembic_version_auth`).

No secret is ever an argument of a process: the server takes the database's address from its
environment and from a configuration of mode 600. A changed or removed account may still be let in
for a minute, for which a checked password is remembered.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from fcntl import LOCK_EX, flock
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from clusters.account import Refused, Settings, read_env, read_settings, write_secret
from clusters.schema import prepare

HOME = Path.home() / ".brstnet"

PERMISSION = "READ"
"""What an account may do that nobody gave more: all sweeps share one experiment and one registered
model, so EDIT would let a slip of one member change or delete the others' runs and champion."""

PATIENCE_S = 180
"""MLflow's server was seen to take 18 to 43 s to answer on a busy machine."""


def environment(settings: Settings, folder: Path) -> dict[str, str]:
    """The server's environment, with the files it names made."""
    key, configuration = folder / "secret.key", folder / "auth.ini"
    if not key.is_file():
        write_secret(key, secrets.token_hex(32))
    lines = {
        "default_permission": PERMISSION,
        "database_uri": settings.database.replace("%", "%%"),
        "admin_username": settings.user.replace("%", "%%"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",  # else each request hashes the password: 0.3 s measured
    }
    text = "".join(f"{name} = {value}\n" for name, value in lines.items())
    write_secret(configuration, f"[mlflow]\n{text}")
    nodes = folder.parent / "nodes.env"  # the object storage's keys
    own = {**(read_env(nodes) if nodes.is_file() else {}), **os.environ}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        own.pop(name, None)  # they are the clients'
    if endpoint := own.get("AWS_ENDPOINT_URL"):
        own.setdefault("MLFLOW_S3_ENDPOINT_URL", endpoint)
    return {
        **own,
        "MLFLOW_BACKEND_STORE_URI": settings.database,
        "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts,
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes for LLMs
        "MLFLOW_SQLALCHEMYSTORE_POOL_RECYCLE": "300",  # managed databases drop idle connections
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def command(settings: Settings) -> list[str]:
    """What is started; nothing secret is in it."""
    program = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    place = ["--host", settings.host, "--port", str(settings.port)]
    return [*program, *place, "--serve-artifacts", "--workers", "2"]


def answers(settings: Settings) -> bool:
    """Whether a server is there that knows our account and turns away who has none.

    Raises:
        Refused: one is there that lets everybody in, or not us.
    """
    page = f"{settings.url}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        if _status(f"{settings.url}/health") != 200:
            return False
        stranger = _status(page)
        token = b64encode(f"{settings.user}:{settings.password}".encode()).decode()
        ours = _status(page, {"Authorization": f"Basic {token}"})
    except (URLError, TimeoutError, ConnectionError):
        return False
    if stranger < 400:
        raise Refused(
            f"{settings.url}: a server without accounts is there; end it, or set MLFLOW_PORT"
        )
    if ours in (401, 403):
        raise Refused(
            f"{settings.url}: the server there does not take {settings.user}'s password; is it "
            "another one? End it, or set MLFLOW_PORT in tracking.env"
        )
    return stranger == 401 and ours == 200


def _status(url: str, headers: Mapping[str, str] | None = None) -> int:
    try:
        with urlopen(Request(url, headers=dict(headers or {})), timeout=15) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def start(home: Path = HOME) -> str:
    """Start the server and wait until it answers as it must; one line about it.

    Raises:
        Refused: it cannot be started, with the reason.
    """
    file, folder = home / "tracking.env", home / "mlflow"
    if not file.is_file():
        return f"{file} is not there: no MLflow server; sweeps use a database under --out"
    settings = read_settings(file)
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        already = f"MLflow runs at {settings.url} already"
        with suppress(Refused):  # a new password, which prepare sets
            if running(folder) and answers(settings):
                return already
        prepare(settings)
        if answers(settings):
            return already
        stop_running(folder)
        log = folder / "server.log"
        if log.is_file():
            log.replace(folder / "server.log.1")
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as out:
            server = subprocess.Popen(
                command(settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment(settings, folder),
                cwd=folder,
                start_new_session=True,
            )
        write_secret(folder / "server.json", json.dumps([server.pid, _born(server.pid)]))
        _wait(settings, server, log)
    return f"MLflow runs at {settings.url}, log in {log}"


def _wait(settings: Settings, server: subprocess.Popen, log: Path) -> None:
    deadline, why = time.monotonic() + PATIENCE_S, f"it did not answer in {PATIENCE_S} s"
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if server.poll() is not None:
            why = f"it ended with code {server.returncode}"
            break
        if answers(settings):
            return
    stop_running(log.parent)
    tail = settings.hide("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    raise Refused(f"MLflow's server at {settings.url} did not start: {why}; {log} ends:\n{tail}")


def running(folder: Path) -> int | None:
    """The process of the server that was started from this folder, or None."""
    note = folder / "server.json"
    if not note.is_file():
        return None
    pid, born = json.loads(note.read_text())
    is_born = _born(pid)
    orphans = is_born is None and _group_lives(pid)  # it was killed, and left its workers
    return int(pid) if is_born == born or orphans else None


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: its number may have gone to another since."""
    try:
        state, born = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0:20:19]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else born


def stop_running(folder: Path, patience: float = 15) -> bool:
    """End the server of this folder with all its workers; whether there was one."""
    pid = running(folder)
    if pid is not None:
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while _group_lives(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if _group_lives(pid):
            os.killpg(pid, signal.SIGKILL)
    (folder / "server.json").unlink(missing_ok=True)
    return pid is not None


def _group_lives(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def main(home: Path = HOME) -> int:
    """Run the command; what the user can mend is told in a few lines, with exit code 2."""
    parser = ArgumentParser(prog="python -m clusters.tracking", description=__doc__)
    parser.add_argument("--stop", action="store_true", help="end the server")
    options = parser.parse_args()
    try:
        if options.stop:
            ended = stop_running(home / "mlflow")
            said = "MLflow's server has ended" if ended else "no MLflow server was started here"
        else:
            said = start(home)
    except (Refused, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(said)  # noqa: T201 - the command line's output
    return 0


if __name__ == "__main__":
    sys.exit(main())
