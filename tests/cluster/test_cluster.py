"""Three hosts, made a cluster by clusters/ssh.yaml: up, a sweep, a host that dies, down."""

import math
from collections.abc import Callable

import pytest

from cluster.cluster import WORKERS, Cluster, Sweep, steps_told_twice

pytestmark = [
    pytest.mark.cluster_hosts,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

Tell = Callable[[str, str, float], None]
EVERY_INTERFACE = {
    "gcs_server": "Ray's head: its gRPC takes no address; refuses who has not the token",
    "raylet/raylet": "object manager and node manager of each node: as above",
    "ray::DashboardAgent": "metrics to read, and a gRPC server that wants the token",
    "dashboard/dashboard.py": "the dashboard's own metrics, to read",
    "_private/monitor.py": "the autoscaler's metrics, to read",
    "default_worker.py": "workers' gRPC servers: as above",
    "ray::": "workers' gRPC servers: as above",
}
"""What listens on all interfaces, as Ray offers no setting: a firewall must close it (ssh.yaml)."""


def test_up_all_nodes_join(up: Cluster) -> None:
    assert up.whole()
    for worker in WORKERS:
        home = up.hosts.host[worker].path("/root")
        assert not (home / ".brstnet/tracking.env").exists()  # MLflow's password is the head's
        assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0


def test_only_intended_sockets_listen(up: Cluster) -> None:
    found = []
    for host in (up.hosts.host[name] for name in ("h1", *WORKERS)):
        for socket in host.listening():
            open_to_all = socket.address not in ("127.0.0.1", "::1", host.address)
            if open_to_all and not any(part in socket.title for part in EVERY_INTERFACE):
                found.append((host.name, socket.address, socket.port, socket.title[:90]))
    assert not found
    for port in (5000, 5432, 8265):  # MLflow, PostgreSQL, Ray's dashboard: through SSH alone
        assert {s.address for s in up.hosts.h1.listening() if s.port == port} == {"127.0.0.1"}


def test_a_node_without_the_token_is_refused(up: Cluster) -> None:
    start = f"ray start --address={up.hosts.h1.address}:6379 --num-cpus=2"
    said = up.hosts.laptop.run(f"HOME=/tmp RAY_AUTH_MODE=disabled {start}", check=False)
    assert "uthentication" in said, said
    assert not up.hosts.laptop.processes("raylet/raylet")
    assert up.whole()


def test_a_sweep_over_two_hosts(up: Cluster, pushed: str) -> None:
    sweep = Sweep(up, "pair", pushed, trials=2, epochs=3, cpus=2, at_once=1)
    sweep.start()
    sweep.finish()
    outcomes, record = sweep.outcomes(), sweep.record()
    assert {o["state"] for o in outcomes.values()} == {"COMPLETE"}
    assert sweep.places() == {"0000": set(WORKERS), "0001": set(WORKERS)}  # one worker on each
    assert {run["status"] for run in record.values()} == {"FINISHED"}
    assert len(record) == 1 + 2 * (1 + 2)  # the sweep, its trials, their folds
    for trial, outcome in outcomes.items():
        assert math.isclose(record[f"{trial}/trial"]["last"]["score"], outcome["score"])
        for fold in range(2):
            assert record[f"{trial}/fold_{fold}"]["steps"]["train_loss"] == [0, 1, 2]
    assert any(key.startswith("mlflow/") for key in up.s3.objects())
    assert not up.left_in_ray()


def test_a_worker_host_dies_and_all_work_goes_on(up: Cluster, pushed: str, tell: Tell) -> None:
    sweep = Sweep(up, "killed", pushed, trials=2, epochs=12)
    sweep.start()
    sweep.train_until(3)
    victim, hit = sweep.one_place()
    before = sweep.epochs_told()
    up.hosts.host[victim].kill()
    seconds = sweep.goes_on(*hit)
    sweep.finish()
    assert {o["state"] for o in sweep.outcomes().values()} == {"COMPLETE"}
    assert not steps_told_twice(sweep.record())
    tell("all of a worker is killed", sweep.lost(before, *hit), seconds)


def test_down_leaves_nothing(up: Cluster) -> None:
    said = up.home("python -m clusters down ~/ssh.yaml", seconds=400)
    assert "all is down" in said
    up.postgres.stop()  # not the cluster's own: it was there before
    for host in (up.hosts.host[name] for name in ("h1", *WORKERS)):
        assert not [process.title[:90] for process in host.processes()], (host.name, said)
    home = up.hosts.h1.path("/root")
    assert not list(home.glob("ray_bootstrap*"))
