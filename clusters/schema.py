"""MLflow's tables in PostgreSQL and its administrator: made once, before any server is started."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusters.account import Refused, Settings

DATABASE_S = 30
"""A database that is starting is waited for as long as this."""

FINAL = ("authentication failed", "does not exist")
"""What PostgreSQL says that waiting does not change."""

LOCK = 0x62727374
"""The advisory lock under which the schema is made, whatever machine it is made from: "brst"."""


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Be the only one, on any machine, that makes tables in this database.

    Raises:
        Refused: the database does not answer, or not to this user.
    """
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError

    engine = create_engine(settings.database, connect_args={"connect_timeout": 10})
    deadline = time.monotonic() + DATABASE_S
    while True:
        try:
            connection = engine.connect()
            break
        except OperationalError as error:
            final = any(word in str(error.orig) for word in FINAL)
            if final or time.monotonic() > deadline:
                raise Refused(
                    f"PostgreSQL does not take us: {settings.hide(str(error.orig)).strip()}\n"
                    "look at MLFLOW_BACKEND_STORE_URI in tracking.env, and whether it runs"
                ) from None
            time.sleep(2)
    with connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
        connection.commit()  # the lock is the session's, and no transaction stays open
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
    engine.dispose()


def check_schema(settings: Settings) -> None:
    """See that the tables are those of this MLflow, or not there yet.

    MLflow itself would upgrade an older database whose tables are fewer, without a backup.

    Raises:
        Refused: they are of another MLflow.
    """
    import mlflow
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine

    engine = create_engine(settings.database)
    with engine.connect() as connection:
        is_at = MigrationContext.configure(connection).get_current_revision()
    engine.dispose()
    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if is_at in (None, migrations.get_current_head()):
        return
    if is_at not in {script.revision for script in migrations.walk_revisions()}:
        raise Refused(
            f"the database was made by a newer MLflow than {mlflow.__version__} (schema {is_at}): "
            "install that version on the head"
        )
    raise Refused(
        f"the database was made by an older MLflow (schema {is_at}). Back it up, stop all servers "
        "that use it, then upgrade it:\n"
        '(set -a; . ~/.brstnet/tracking.env; mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI")'
    )


def prepare(settings: Settings) -> None:
    """Make the tables and the administrator, once, before any server.

    Raises:
        Refused: the database is away, of another MLflow, or the account cannot be.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "starlette")  # MLflow's own, of its web framework
        from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as Users
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Record

    with alone(settings):
        check_schema(settings)
        Record(settings.database, "mlflow-artifacts:/")
        users = Users()
        users.init_db(settings.database)
        try:
            if not users.has_user(settings.user):
                users.create_user(settings.user, settings.password, is_admin=True)
            elif not users.authenticate_user(settings.user, settings.password):
                users.update_user(settings.user, password=settings.password)
        except MlflowException as error:
            raise Refused(f"account {settings.user}: {settings.hide(error.message)}") from None
