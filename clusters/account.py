"""The files of secrets on a laptop and on a head, and what they say of MLflow's server.

Only their owner may read them. No message about them holds a value.
"""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

NEEDED = (
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_ARTIFACTS_DESTINATION",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
DRIVER = "postgresql+psycopg2://"


class Refused(ValueError):
    """The server cannot be started; says what to do about it, and no secret."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What tracking.env says."""

    database: str = field(repr=False)
    artifacts: str
    user: str
    password: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 5000

    @property
    def url(self) -> str:
        """Where the server is reached from this machine."""
        everywhere = self.host == "0.0.0.0"
        return f"http://{'127.0.0.1' if everywhere else self.host}:{self.port}"

    def hide(self, text: str) -> str:
        """The text without the passwords."""
        from sqlalchemy import make_url

        for secret in (self.password, str(make_url(self.database).password or "")):
            for form in {secret, quote(secret, safe="")} - {""}:
                text = text.replace(form, "***")
        return text


def read_env(file: Path) -> dict[str, str]:
    """The variables of a file of secrets.

    Raises:
        Refused: others may read it, or a line means something else to a shell.
    """
    state = file.stat()
    if state.st_mode & 0o077 or state.st_uid != os.geteuid():
        raise Refused(f"{file}: must be readable by its owner alone: chmod 600 {file}")
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{file}, line {number}"
        try:
            words = shlex.split(line.removeprefix("export "), comments=True)
        except ValueError:
            raise Refused(f"{where}: a quote is not closed") from None
        if not words:
            continue
        key, equals, value = words[0].partition("=")
        if len(words) > 1 or not equals or not key.isidentifier():
            raise Refused(f"{where}: must be KEY=VALUE; put a value with spaces in single quotes")
        if set(value) & set("$`\\") and f"'{value}'" not in line:
            raise Refused(f"{where}: a shell would change {key}: put its value in single quotes")
        found[key] = value
    return found


def read_settings(file: Path) -> Settings:
    """What tracking.env says, checked; all that is missing is named at once.

    Raises:
        Refused: as `read_env`, or a needed key is missing or cannot be.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    found = read_env(file)
    if missing := [key for key in NEEDED if not found.get(key)]:
        raise Refused(f"{file}: {', '.join(missing)} missing; python -m clusters.tracking --help")
    database = found["MLFLOW_BACKEND_STORE_URI"]
    if not database.startswith(DRIVER):
        raise Refused(
            f"{file}: MLFLOW_BACKEND_STORE_URI must begin with {DRIVER} (SQLAlchemy takes plain "
            "postgresql:// for another driver, which is not installed)"
        )
    try:
        make_url(database)
    except (ArgumentError, ValueError):  # its message may hold a part of the password
        raise Refused(
            f"{file}: MLFLOW_BACKEND_STORE_URI must be {DRIVER}USER:PASSWORD@HOST:PORT/DATABASE; "
            "in the password write @ as %40, : as %3A, / as %2F, # as %23, % as %25"
        ) from None
    if "://" not in found["MLFLOW_ARTIFACTS_DESTINATION"]:
        raise Refused(
            f"{file}: MLFLOW_ARTIFACTS_DESTINATION must be a URI such as s3://BUCKET/mlflow"
        )
    if len(found["MLFLOW_TRACKING_PASSWORD"]) < 12:
        raise Refused(f"{file}: MLFLOW_TRACKING_PASSWORD must have 12 characters or more")
    port = found.get("MLFLOW_PORT", "5000")
    if not port.isdecimal():
        raise Refused(f"{file}: MLFLOW_PORT must be a number; got {port!r}")
    return Settings(
        database=database,
        artifacts=found["MLFLOW_ARTIFACTS_DESTINATION"],
        user=found["MLFLOW_TRACKING_USERNAME"],
        password=found["MLFLOW_TRACKING_PASSWORD"],
        host=found.get("MLFLOW_HOST") or "127.0.0.1",
        port=int(port),
    )


def write_secret(file: Path, text: str) -> None:
    """Write a file that only its owner may ever read."""
    scratch = file.with_name(file.name + ".tmp")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    scratch.rename(file)
