"""The team's MLflow server: its settings, its accounts, its secrets, and a database that goes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE
from mlflow.server import get_app_client
from servers import Postgres, free_port, postgres, s3

from clusters import account, schema
from clusters import tracking as team
from clusters.account import Refused, Settings
from sweeps import tracking
from sweeps.courier import REFUSALS, STATUS, Courier, _is_final, serve
from sweeps.events import Events

ROOT = Path(__file__).parents[1]
DATABASE_SECRET, SECRET = "database s3cret/@:%", "boss pass-w%rd 12"
ENV = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://team:hidden-word@127.0.0.1:5432/brst",
    "MLFLOW_ARTIFACTS_DESTINATION": "s3://brst/mlflow",
    "MLFLOW_TRACKING_USERNAME": "boss",
    "MLFLOW_TRACKING_PASSWORD": "hidden-word-too",
}


def write_env(home: Path, values: dict[str, str]) -> Path:
    home.mkdir(exist_ok=True)
    file = home / "tracking.env"
    account.write_secret(file, "# ours\n\n" + "".join(f"{k}='{v}'\n" for k, v in values.items()))
    return file


# Settings ----------------------------------------------------------------------------------------


def test_settings_are_read_as_a_shell_would(tmp_path: Path) -> None:
    file = tmp_path / "tracking.env"
    lines = [f"export {key}={value}" for key, value in ENV.items()]
    account.write_secret(file, "\n".join([*lines, "MLFLOW_PORT='5001' # a tunnel has 5000"]))
    settings = account.read_settings(file)
    assert settings.url == "http://127.0.0.1:5001"
    assert settings.password == "hidden-word-too"
    assert "hidden" not in repr(settings)
    shell = f"set -a; . {file}; exec {sys.executable} -c 'import os; print(dict(os.environ))'"
    said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert all(repr(value) in said for value in account.read_env(file).values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MLFLOW_BACKEND_STORE_URI": "", "MLFLOW_TRACKING_USERNAME": ""}, "USERNAME missing"),
        (
            {"MLFLOW_BACKEND_STORE_URI": "postgresql://a:hidden@h/d"},
            "must begin with postgresql+ps",
        ),
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://a:hid:den@h:x/d"}, "write @ as %40"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": "bucket"}, "s3://BUCKET"),
        ({"MLFLOW_TRACKING_PASSWORD": "hidden"}, "12 characters"),
        ({"MLFLOW_PORT": "http"}, "must be a number"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    file = write_env(tmp_path, {**ENV, **change})
    with pytest.raises(Refused) as error:
        account.read_settings(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)
    assert "hid" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("KEY=hidden$WORD", "single quotes"),
        ('KEY="hidden`id`"', "single quotes"),
        ("KEY=hidden word", "KEY=VALUE"),
        ("KEY='hidden", "not closed"),
        ("hidden", "KEY=VALUE"),
    ],
)
def test_a_line_that_a_shell_reads_otherwise_is_refused(
    tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "tracking.env"
    account.write_secret(file, f"OTHER=1\n{line}\n")
    with pytest.raises(Refused, match=said) as error:
        account.read_env(file)
    assert "line 2" in str(error.value)
    assert "hidden" not in str(error.value)


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    file = write_env(tmp_path, ENV)
    file.chmod(0o640)
    with pytest.raises(Refused, match="chmod 600"):
        account.read_settings(file)


def test_without_settings_nothing_is_started(tmp_path: Path) -> None:
    assert "sweeps use a database under --out" in team.start(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_secret_is_an_argument(tmp_path: Path) -> None:
    settings = account.read_settings(write_env(tmp_path, ENV))
    assert "hidden" not in " ".join(team.command(settings))
    environment = team.environment(settings, tmp_path)
    assert "hidden-word-too" not in str(environment)  # the administrator is made beforehand
    assert (tmp_path / "auth.ini").stat().st_mode & 0o777 == 0o600
    key = environment["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    assert len(key) == 64
    assert team.environment(settings, tmp_path)["MLFLOW_FLASK_SERVER_SECRET_KEY"] == key


class Open(BaseHTTPRequestHandler):
    """A server that lets everybody in, or nobody."""

    code: ClassVar[int] = 200

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else self.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("code", "said"), [(200, "without accounts"), (401, "boss's password")])
def test_another_server_in_the_place_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    monkeypatch.setattr(Open, "code", code)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        values = {**ENV, "MLFLOW_PORT": str(server.server_port)}
        with pytest.raises(Refused, match=said):
            team.answers(account.read_settings(write_env(tmp_path, values)))
    finally:
        server.shutdown()
        server.server_close()


# The server --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Team:
    """A head with its server."""

    home: Path
    database: Postgres
    settings: Settings
    said: str

    def ask(
        self, page: str, who: tuple[str, str] | None = None, **body: object
    ) -> requests.Response:
        at = f"{self.settings.url}/api/2.0/mlflow/{page}"
        if body:
            return requests.post(at, json=body, auth=who, timeout=60)
        return requests.get(at, auth=who, timeout=60)

    @property
    def boss(self) -> tuple[str, str]:
        return self.settings.user, self.settings.password


@contextmanager
def head(home: Path) -> Iterator[Team]:
    with (
        postgres(DATABASE_SECRET) as database,
        s3() as storage,
        pytest.MonkeyPatch.context() as own,
    ):
        for name, value in storage.items():
            own.setenv(name, value)
        values = {
            **ENV,
            "MLFLOW_BACKEND_STORE_URI": database.uri(),
            "MLFLOW_PORT": str(free_port()),
        }
        file = write_env(home, {**values, "MLFLOW_TRACKING_PASSWORD": SECRET})
        own.setenv("MLFLOW_TRACKING_USERNAME", "boss")
        own.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        try:
            said = team.start(home)
            settings = account.read_settings(file)
            yield Team(home=home, database=database, settings=settings, said=said)
        finally:
            team.stop_running(home / "mlflow")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with head(tmp_path_factory.mktemp("head") / "brstnet") as made:
        yield made


@pytest.mark.slow
def test_everyone_needs_an_account(ours: Team) -> None:
    page = "experiments/search?max_results=1"
    assert ours.ask(page).status_code == 401
    assert ours.ask(page, ("admin", "password1234")).status_code == 401
    assert ours.ask(page, ours.boss).status_code == 200
    artifacts = f"{ours.settings.url}/api/2.0/mlflow-artifacts/artifacts"
    assert requests.get(artifacts, timeout=30).status_code == 401


@pytest.mark.slow
def test_a_member_reads_and_changes_nothing_of_others(ours: Team) -> None:
    ann = ("ann", "a-password-of-ann")
    ours.ask("users/create", ours.boss, username=ann[0], password=ann[1]).raise_for_status()
    made = ours.ask("experiments/create", ours.boss, name="theirs").json()["experiment_id"]
    assert ours.ask(f"experiments/get?experiment_id={made}", ann).status_code == 200
    run = {"experiment_id": made, "start_time": 1}
    assert ours.ask("runs/create", ann, **run).status_code == 403
    assert ours.ask("experiments/delete", ann, experiment_id=made).status_code == 403
    assert ours.ask("users/create", ann, username="eve", password="x" * 12).status_code == 403
    accounts = get_app_client("basic-auth", tracking_uri=ours.settings.url)
    accounts.grant_user_permission("ann", "experiment", made, "EDIT")
    assert ours.ask("runs/create", ann, **run).status_code == 200


@pytest.mark.drill
def test_a_second_start_leaves_it_alone(ours: Team) -> None:
    before = team.running(ours.home / "mlflow")
    assert "already" in team.start(ours.home)
    assert team.running(ours.home / "mlflow") == before is not None


def processes(ours: Team) -> list[psutil.Process]:
    """The server's, by the port that stands in their arguments, and their children."""
    port = str(ours.settings.port)
    found = [p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or ())]
    return [*found, *(child for each in found for child in each.children(recursive=True))]


@pytest.mark.drill
def test_workers_of_a_server_that_was_killed_are_not_left(ours: Team) -> None:
    """Its first process dies alone; the next start finds what it left."""
    pid = team.running(ours.home / "mlflow")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert processes(ours)
    assert team.running(ours.home / "mlflow") == pid
    assert "MLflow runs" in team.start(ours.home)
    assert team.answers(ours.settings)


@pytest.mark.slow
def test_secrets_show_nowhere(ours: Team) -> None:
    ours.ask("experiments/search?max_results=1", ("boss", "not " + SECRET))
    secrets = [SECRET, DATABASE_SECRET, ours.database.uri().split(":")[2].split("@")[0]]
    shown = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout
    shown += (ours.home / "mlflow" / "server.log").read_text() + ours.said
    assert "basic-auth" in shown
    assert not [secret for secret in secrets if secret in shown]
    for file in (ours.home / "mlflow").iterdir():
        assert file.stat().st_size == 0 or file.stat().st_mode & 0o077 == 0, file


@pytest.mark.slow
def test_it_listens_on_loopback_alone(ours: Team) -> None:
    found = {
        (c.laddr.ip, c.laddr.port)
        for process in processes(ours)
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert found == {("127.0.0.1", ours.settings.port)}


@pytest.mark.drill
def test_a_database_that_is_gone_costs_nothing(ours: Team, tmp_path: Path) -> None:
    """The courier waits for it; what can never be stored holds up nothing."""
    client = tracking.connect(ours.settings.url)
    (tmp_path / tracking.ID_FILE).write_text("id")
    events = Events(tmp_path)
    events.start("sweep", "s", "sweep", {"brstnet.sweep": "s"})
    experiment = client.create_experiment("outage")
    with pytest.MonkeyPatch.context() as own:
        own.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        own.setattr(schema, "DATABASE_S", 1)
        courier, ended = Courier(client, experiment, tmp_path, 2), threading.Event()
        delivering = threading.Thread(target=partial(serve, courier, ended, 60))
        delivering.start()
        try:
            wait_for(lambda: "sweep" in courier.driver.runs)
            ours.database.stop()
            for step in range(5):
                events.log("sweep", {"best_score": step / 3}, step=step)
            events.log("sweep", tags={"reason": "half\0way", "k" * 300: "too long a name"})
            events.log("sweep", tags={"reason": "half\0way"}, step=1)
            wait_for(lambda: "503" in status(tmp_path)["error"])
            answer = ours.ask("experiments/search?max_results=1", ours.boss)
            assert answer.status_code == 503
            assert ours.ask("experiments/search?max_results=1").status_code == 401
            assert status(tmp_path)["refused"] == 0
            with pytest.raises(Refused, match="PostgreSQL does not take us") as error:
                team.start(ours.home)
            assert "s3cret" not in str(error.value)
        finally:
            ours.database.start()
            ended.set()
            delivering.join(90)
    run_id = courier.driver.runs["sweep"]
    assert [m.value for m in client.get_metric_history(run_id, "best_score")] == [
        step / 3 for step in range(5)
    ]
    assert client.get_run(run_id).data.tags["reason"] == "halfway"
    assert status(tmp_path) == {"pending": 0, "refused": 1, "error": ""}
    assert "exceeds the maximum length" in (tmp_path / REFUSALS).read_text()


def test_a_page_of_something_else_refuses_no_event() -> None:
    """A proxy without a server behind it may answer 404, as MLflow does for a run that is gone."""
    page = "failed with error code 404 != 200. Response body: '<html>'"
    assert not _is_final(MlflowException(page, RESOURCE_DOES_NOT_EXIST))
    assert _is_final(MlflowException("Run 1 not found", RESOURCE_DOES_NOT_EXIST))
    assert not _is_final(MlflowException("the database is away", TEMPORARILY_UNAVAILABLE))


def status(folder: Path) -> dict:
    return json.loads((folder / STATUS).read_text())


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.drill
def test_two_heads_at_once_make_one_schema(ours: Team, tmp_path: Path) -> None:
    ours.database.execute("CREATE DATABASE two")
    uri = ours.database.uri("two")
    write_env(tmp_path, {**ENV, "MLFLOW_BACKEND_STORE_URI": uri})
    code = "from pathlib import Path; from clusters import account, schema\n"
    code += f"schema.prepare(account.read_settings(Path({str(tmp_path / 'tracking.env')!r})))"
    start = partial(subprocess.Popen, [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ))
    heads = [start(), start()]
    assert [each.wait(120) for each in heads] == [0, 0]
    (users,) = ours.database.execute("SELECT count(*) FROM users", "two")
    (versions,) = ours.database.execute("SELECT count(*) FROM alembic_version", "two")
    assert (users, versions) == ((1,), (1,))


@pytest.mark.drill
def test_a_database_of_another_mlflow_is_left_as_it_is(ours: Team) -> None:
    ours.database.execute("CREATE DATABASE old")
    settings = replace(ours.settings, database=ours.database.uri("old"))
    ours.database.execute("CREATE TABLE alembic_version (version_num varchar(32))", "old")
    for revision, said in [("451aebb31d03", "mlflow db upgrade"), ("f" * 12, "by a newer MLflow")]:
        ours.database.execute(
            f"DELETE FROM alembic_version; INSERT INTO alembic_version VALUES ('{revision}')", "old"
        )
        with pytest.raises(Refused, match=said) as error:
            schema.prepare(settings)
        assert "s3cret" not in str(error.value)
    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    assert ours.database.execute(tables, "old") == [("alembic_version",)]


@pytest.mark.drill
def test_a_wrong_password_is_said_at_once(ours: Team) -> None:
    wrong = replace(ours.settings, database=ours.database.uri().replace("team:", "team:no-"))
    begun = time.monotonic()
    with pytest.raises(Refused, match="password authentication failed") as error:
        schema.prepare(wrong)
    assert time.monotonic() - begun < 20
    assert "s3cret" not in str(error.value)


@pytest.mark.drill
def test_a_server_that_does_not_start_says_why(ours: Team, tmp_path: Path) -> None:
    """Its port is taken, by something that is no web server."""
    values = {**ENV, "MLFLOW_BACKEND_STORE_URI": ours.database.uri()}
    values |= {"MLFLOW_TRACKING_PASSWORD": SECRET, "MLFLOW_PORT": str(ours.database.port)}
    write_env(tmp_path, values)
    with pytest.raises(Refused, match=r"(?s)did not start.*in use") as error:
        team.start(tmp_path)
    assert "s3cret" not in str(error.value)
    assert SECRET not in str(error.value)
    assert team.running(tmp_path / "mlflow") is None


@pytest.mark.drill
def test_a_new_password_counts_at_once_and_stop_ends_all(ours: Team) -> None:
    file = ours.home / "tracking.env"
    account.write_secret(file, file.read_text().replace(SECRET, "another-pass-word"))
    assert "already" in team.start(ours.home)
    page = "experiments/search?max_results=1"
    assert ours.ask(page, ("boss", "another-pass-word")).status_code == 200
    assert processes(ours)
    assert team.stop_running(ours.home / "mlflow")
    assert not processes(ours)
    assert not team.stop_running(ours.home / "mlflow")
