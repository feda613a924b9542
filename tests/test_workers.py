"""Real sweeps on a real small cluster of which one machine can write no file of any size."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import pytest
import ray
import torch
from commands import ROOT, disk, finish
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get
from ray.util import placement_group_table

from brstnet.data.store import Store
from sweeps.nodes import Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # a checkpoint is larger
"""

YAML = """
name: {name}
protocol: {{held_out: [BC90006], folds: 2, panel_size: 40}}
training:
  {{backbone: test_resnet, epochs: {epochs}, batch_size: 8, schedule: cosine, stopping: fixed}}
trials: {trials}
pruning: none
search: random
workers_per_trial: {workers}
cpus_per_worker: {cpus}
gpus_per_worker: {gpus}
concurrent_trials: 2
space:
  genes: [60, 100]
  learning_rate: {{low: 0.001, high: 0.05, log: true}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    """A head that trains nothing and two nodes of two CPUs; and the id of the one that is ill."""
    ill = tmp_path_factory.mktemp("ill")
    (ill / "sitecustomize.py").write_text(LIMIT)
    cluster = Cluster(head_node_args={"num_cpus": 0, "include_dashboard": True})
    cluster.add_node(num_cpus=0)
    cluster.add_node(num_cpus=2)
    bad = cluster.add_node(num_cpus=2, env_vars={"PYTHONPATH": f"{ill}:{ROOT}"})
    yield cluster, bad.node_id
    cluster.shutdown()


def start(address: str, store: Store, folder: Path, **values: object) -> subprocess.Popen:
    """A sweep's driver; without an address on a Ray of its own."""
    asked = {"name": "s", "epochs": 2, "trials": 3, "workers": 1, "cpus": 2, "gpus": 0, **values}
    (folder / "s.yaml").write_text(YAML.format(**asked))
    words = [folder / "s.yaml", "--store", store.path, "--out", folder / "runs"]
    words += ["--address", address] if address else []
    return commands.start("sweeps/run.py", *words)


def wait_until(what: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextlib.contextmanager
def watched(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Leave no driver behind where a test fails."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def requests() -> list:
    """What the cluster is asked to grow to, as its autoscaler reads it."""
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")


def placement_groups() -> list:
    """What is reserved on the cluster."""
    return [g for g in placement_group_table().values() if g["state"] != "REMOVED"]


@pytest.mark.drill
@pytest.mark.parametrize(("workers", "cpus"), [(1, 2), (2, 1)])
def test_a_machine_on_which_trials_fail_at_once_is_avoided(
    cluster: tuple[Cluster, str], demo_store: Store, tmp_path: Path, workers: int, cpus: int
) -> None:
    process = start(cluster[0].address, demo_store, tmp_path, workers=workers, cpus=cpus)
    said = finish(process, 0, 800)
    out = tmp_path / "runs" / "s"
    states = [json.loads(f.read_text())["state"] for f in out.glob("trials/*/outcome.json")]
    assert states == ["COMPLETE"] * 3
    assert set(Nodes(out).broken()) == {cluster[1]}
    assert "avoided from now on" in said
    failed = [json.loads(line) for line in (out / "nodes.jsonl").read_text().splitlines()]
    assert {line["node"] for line in failed if "node" in line} == {cluster[1]}


@pytest.mark.drill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_driver_leaves_no_claim_on_the_cluster(
    cluster: tuple[Cluster, str], demo_store: Store, tmp_path: Path, number: int
) -> None:
    address, asked = cluster[0].address, {"trials": 1, "workers": 2, "cpus": 1, "epochs": 200}
    driver = start(address, demo_store, tmp_path, **asked)
    ray.init(address, logging_level="ERROR", log_to_driver=False)
    saved = "runs/s/trials/*/fold_0/last/progress.json"
    try:
        with watched(driver):
            wait_until(lambda: driver.poll() or list(tmp_path.glob(saved)))
            assert placement_groups()
            driver.send_signal(number)
            finish(driver, 130, 800)
        wait_until(lambda: not placement_groups() and not requests(), 30)
        # Ray's coordinator repeats every 20 s what it was asked for: nothing may come back.
        time.sleep(25)
        assert placement_groups() == []
        assert requests() == []
    finally:
        ray.shutdown()


@pytest.mark.drill
def test_a_machine_whose_gpus_do_not_answer_stops_the_sweep_with_the_reason(
    demo_store: Store, tmp_path: Path
) -> None:
    """Ray is told of a GPU, torch finds none, and there is no other machine."""
    if torch.cuda.is_available():
        pytest.skip("the GPU of this machine works")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        said = finish(start(cluster.address, demo_store, tmp_path, cpus=1, gpus=1), 2, 800)
    finally:
        cluster.shutdown()
    assert "the GPU does not work" in said.splitlines()[-1]
    assert not list((tmp_path / "runs" / "s").glob("trials/*/outcome.json"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", megabytes=60) as made:
        yield made


@pytest.mark.drill
def test_a_sweep_whose_storage_is_full_stops_and_goes_on_when_there_is_room(
    demo_store: Store, small_disk: Path
) -> None:
    asked = {"trials": 2, "cpus": 1, "epochs": 12}
    process = start("", demo_store, small_disk, **asked)
    out = small_disk / "runs" / "s"
    filler = small_disk / "filler"
    with watched(process):
        wait_until(lambda: process.poll() or list(out.glob("trials/*/fold_*/last/progress.json")))
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**16))
        said = finish(process, 2, 800)
    assert "no room is left" in said.splitlines()[-1], said[-3000:]
    assert "FAILED" not in said
    filler.unlink()
    finish(start("", demo_store, small_disk, **asked), 0, 800)
    states = [json.loads(f.read_text())["state"] for f in out.glob("trials/*/outcome.json")]
    assert states == ["COMPLETE"] * 2
