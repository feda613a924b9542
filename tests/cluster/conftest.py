"""One cluster for all tests here, made once from the YAML that users get; or the reason why not."""

import json
from collections.abc import Callable, Iterator

import pytest

from brstnet.data.store import Store
from cluster import hosts, services
from cluster.cluster import Cluster

ROWS = pytest.StashKey[list[dict[str, str]]]()
TABLE = hosts.ROOT / "build" / "failures.json"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts and a laptop with all that is there before `up`, and nothing after the tests."""
    if why := hosts.missing() or services.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("cluster")
    with hosts.running(folder / "hosts") as made:
        here = Cluster(made, folder)
        here.prepare()
        yield here


@pytest.fixture(scope="session")
def up(cluster: Cluster) -> Cluster:
    """The cluster, up."""
    cluster.up()
    return cluster


@pytest.fixture(scope="session")
def pushed(cluster: Cluster, demo_store: Store) -> str:
    """The demo tissue's store on the object storage."""
    return cluster.push(demo_store.path)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str, str, float], None]:
    """Takes a row of the table: what failed, what is lost, seconds until work goes on."""

    def add(failure: str, lost: str, seconds: float) -> None:
        row = {"failure": failure, "lost": lost, "work goes on after, s": str(round(seconds))}
        rows = request.config.stash[ROWS]
        rows.append(row)
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")

    return add


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table, which is kept as well, printed."""
    if rows := config.stash[ROWS]:
        terminalreporter.section(f"failures of the cluster ({TABLE})")
        for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)):
            terminalreporter.write_line(f"| {' | '.join(cells)} |")
