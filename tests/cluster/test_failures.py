"""What can fail on a cluster, one by one: work goes on, and nothing that was finished is lost.

Each test writes a row of the table that is printed at the end (`tell`).
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.cluster import RAY, Cluster, Sweep, steps_told_twice
from cluster.hosts import ROOT, wait_for

pytestmark = [
    pytest.mark.cluster_hosts,
    pytest.mark.cluster,
    pytest.mark.drill,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

Tell = Callable[[str, str, float], None]
NOTICE = ROOT / "clusters" / "notice.py"
LEAVING = "/tmp/brstnet-leaving"
METADATA = "169.254.169.254"


@pytest.fixture(autouse=True)
def whole(up: Cluster) -> Iterator[None]:
    """Each test finds all nodes, and leaves no driver."""
    if not up.hosts.h1.processes("gcs_server"):  # another test has taken it down
        up.postgres.start()
        up.up()
    wait_for(up.whole, 300, "all nodes are there", every=2)
    yield
    up.hosts.h1.kill("python sweeps/run.py")


def training(up: Cluster, store: str, name: str, *, epochs: int = 14, workers: int = 2) -> Sweep:
    """A sweep of two trials in the middle of its training."""
    sweep = Sweep(up, name, store, epochs=epochs, workers=workers)
    sweep.start()
    sweep.train_until(4)
    return sweep


def ended_well(sweep: Sweep) -> None:
    """All trials complete, nothing twice in MLflow and nothing open, nothing left in Ray."""
    assert {outcome["state"] for outcome in sweep.outcomes().values()} == {"COMPLETE"}
    record = sweep.record()
    assert {run["status"] for run in record.values()} == {"FINISHED"}
    assert not steps_told_twice(record)
    steps = [r["steps"]["train_loss"] for k, r in record.items() if "/fold_" in k]
    assert steps == [list(range(sweep.epochs))] * 2 * sweep.trials
    wait_for(lambda: not sweep.cluster.left_in_ray(), 30, "nothing is left in Ray", every=3)


def test_a_worker_loses_power(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = training(up, pushed, "power")
    victim, hit = sweep.one_place()
    before = sweep.epochs_told()
    up.hosts.host[victim].power_cut()
    seconds = sweep.goes_on(*hit)
    tell("a worker loses power", sweep.lost(before, *hit), seconds)
    up.hosts.start(victim)  # the head's autoscaler brings it back
    sweep.finish()
    ended_well(sweep)


@pytest.mark.parametrize("length", [20, 90])
def test_the_network_between_head_and_worker_is_cut(
    up: Cluster, pushed: str, tell: Tell, length: int
) -> None:
    sweep = training(up, pushed, f"cut-{length}", epochs=length + 60)
    victim, hit = sweep.one_place()
    before, began = sweep.epochs_told(), time.monotonic()
    up.hosts.cut(victim)
    try:
        time.sleep(length)
    finally:
        up.hosts.heal(victim)
    sweep.goes_on(*hit)
    seconds = time.monotonic() - began
    if length == 20:
        assert not sweep.resumed_at(), "a short cut costs no restart"
    tell(f"network cut for {length} s", sweep.lost(before), seconds)
    sweep.finish()
    ended_well(sweep)


def test_the_head_dies_and_comes_back(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = training(up, pushed, "head")
    before, began = sweep.epochs_told(), time.monotonic()
    up.hosts.h1.kill(*RAY, "sweeps/run.py", "sweeps.courier")
    up.up()
    sweep.start()
    sweep.goes_on(*before)
    tell("Ray and driver die on the head", sweep.lost(before), time.monotonic() - began)
    sweep.finish()
    ended_well(sweep)


METADATA_SERVER = f"""
import http.server, json, pathlib
class Metadata(http.server.BaseHTTPRequestHandler):
    def answer(self):
        said = pathlib.Path('/root/notice')
        token = self.path.endswith('/api/token')
        text = b'token' if token else said.read_bytes() if said.exists() else b''
        there = token or ('spot/instance-action' in self.path and said.exists())
        self.send_response(200 if there else 404)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    do_GET = do_PUT = answer
http.server.ThreadingHTTPServer(('{METADATA}', 80), Metadata).serve_forever()
"""
"""What AWS tells a machine about itself, as far as a spot notice goes."""


@pytest.mark.skipif(not NOTICE.is_file(), reason="clusters/notice.py is not there yet")
def test_a_spot_machine_is_told_to_go(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = training(up, pushed, "spot", epochs=80)
    victim, hit = sweep.one_place()
    host = up.hosts.host[victim]
    host.run(f"ip address add {METADATA}/32 dev lo")
    host.path("/root/metadata.py").write_text(METADATA_SERVER)
    host.begin("python ~/metadata.py", up.folder / "metadata.log")
    host.begin("python -m clusters.notice", up.folder / "notice.log")
    began = time.monotonic()
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
    host.path("/root/notice").write_text(f'{{"action": "terminate", "time": "{when}"}}')
    wait_for(host.path(LEAVING).exists, 60, "the notice is heard")
    time.sleep(20)  # the rest of the two minutes is not waited for
    before = sweep.epochs_told()
    host.power_cut()
    sweep.goes_on(*hit)
    tell("spot notice", sweep.lost(before), time.monotonic() - began)
    up.hosts.start(victim)
    sweep.finish()
    ended_well(sweep)


def test_storage_is_full(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = training(up, pushed, "full", epochs=30, workers=1)
    before = sweep.epochs_told()
    up.hosts.h1.run("dd if=/dev/zero of=/mnt/brstnet/filler bs=64k", check=False)
    code = sweep.end()
    assert code in (2, 130), sweep.said()
    assert f"/mnt/brstnet/runs/{sweep.name}" in sweep.said()
    up.hosts.h1.run("rm /mnt/brstnet/filler")
    began = time.monotonic()
    sweep.start()
    sweep.goes_on(*before)
    tell("storage full, then space", sweep.lost(before), time.monotonic() - began)
    sweep.finish()
    ended_well(sweep)


def test_the_database_is_away_for_a_minute(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = training(up, pushed, "database", epochs=100, workers=1)
    before = sweep.epochs_told()
    up.postgres.stop()
    began, seconds = time.monotonic(), sweep.goes_on()
    time.sleep(max(0, 60 - (time.monotonic() - began)))
    up.postgres.start()
    tell("PostgreSQL away for a minute", sweep.lost(before), seconds)
    sweep.finish()
    ended_well(sweep)


def test_the_tracking_server_is_killed(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = training(up, pushed, "server", epochs=30, workers=1)
    before = sweep.epochs_told()
    up.hosts.h1.kill("mlflow server", "mlflow.server", "multiprocessing.spawn")
    seconds = sweep.goes_on()
    up.hosts.h1.run("cd ~/brstnet; python -m clusters.tracking", seconds=200)
    tell("MLflow's server killed", sweep.lost(before), seconds)
    sweep.finish()
    ended_well(sweep)


def test_a_broken_machine_is_avoided(up: Cluster, pushed: str, tell: Tell) -> None:
    cache = "/root/.cache/brstnet"
    up.hosts.h3.run(f"mkdir -p {cache}; mount -t tmpfs -o ro tmpfs {cache}")
    try:
        sweep = Sweep(up, "broken", pushed, trials=6, epochs=6, workers=1, at_once=4)
        began = time.monotonic()
        sweep.start()
        sweep.train_until(1)
        seconds = time.monotonic() - began
        sweep.finish()
    finally:
        up.hosts.h3.run(f"umount {cache}")
    assert "h3" in sweep.log.read_text()
    assert sweep.places().values()
    assert all(hosts == {"h2"} for hosts in sweep.places().values())
    tell("a machine where trials fail at once", "nothing", seconds)
    ended_well(sweep)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop_leaves_nothing(
    up: Cluster, pushed: str, tell: Tell, number: signal.Signals
) -> None:
    sweep = training(up, pushed, f"stop-{number.name.lower()}")
    before, began = sweep.epochs_told(), time.monotonic()
    sweep.tell(number)
    assert sweep.end() == 130, sweep.said()
    sys.stdout.write(f"\n{number.name}: ended in {time.monotonic() - began:.0f} s\n")
    wait_for(lambda: not up.left_in_ray(), 60, f"{number.name} leaves nothing in Ray", every=3)
    assert "RUNNING" not in {run["status"] for run in sweep.record().values()}
    began = time.monotonic()
    sweep.start()
    sweep.goes_on(*before)
    tell(f"{number.name} to the driver, then again", sweep.lost(before), time.monotonic() - began)
    sweep.finish()
    ended_well(sweep)
