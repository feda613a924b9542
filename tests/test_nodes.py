"""Machines to avoid: whom the ledger blames, where trials are sent, and when storage is full."""

import errno
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import disk

from sweeps import nodes as module
from sweeps.nodes import (
    FILE,
    BrokenNodeError,
    Nodes,
    check_gpu,
    forget_places,
    is_broken_node,
    read_place,
    room_elsewhere,
    storage_full,
)

A, B, C = ({"node": name, "host": f"host-{name}"} for name in "abc")
CPU = {"CPU": 1.0}


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Three nodes of two CPUs, as Ray lists them."""
    there = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": 2.0, "memory": 1e9}} for name in "abc"
    ]
    monkeypatch.setattr(module.ray, "nodes", lambda: there)
    return there


def is_on(nodes: Nodes, trial: str, *places: dict[str, str]) -> Path:
    """The trial's folder with its workers at these places."""
    folder = nodes.out / trial
    folder.mkdir(exist_ok=True)
    forget_places(folder)
    for rank, place in enumerate(places):
        (folder / f"node_{rank}.json").write_text(json.dumps(place))
    return folder


def fails(nodes: Nodes, trial: str, place: dict[str, str], *, broken: bool = False) -> None:
    nodes.failed(trial, place, "it died", broken=broken)


# --- blame


def test_two_trials_that_went_on_elsewhere_blame_a_machine(nodes: Nodes) -> None:
    assert nodes.broken() == {}
    for trial in ("0", "1"):
        fails(nodes, trial, A)
        assert nodes.broken() == {}  # one trial may have a fault of its own
        assert nodes.avoided(trial) == {"a"}
        nodes.went_on(trial, is_on(nodes, trial, B))
    assert nodes.broken() == {"a": "host-a"}
    assert nodes.avoided("7") == {"a"}
    assert Nodes(nodes.out).broken() == {"a": "host-a"}  # the next driver knows


def test_one_trial_alone_never_blames_a_machine(nodes: Nodes) -> None:
    for _ in range(3):
        fails(nodes, "0", A)
        nodes.went_on("0", is_on(nodes, "0", B))
    assert nodes.broken() == {}


def test_a_trial_that_went_on_where_it_had_failed_blames_nobody(nodes: Nodes) -> None:
    for trial in ("0", "1"):
        fails(nodes, trial, A)
        nodes.went_on(trial, is_on(nodes, trial, A))
    for trial in ("2", "3"):  # a group with one worker there
        fails(nodes, trial, A)
        nodes.went_on(trial, is_on(nodes, trial, B, A))
    assert nodes.broken() == {}


def test_a_trial_that_fails_everywhere_blames_nobody(nodes: Nodes) -> None:
    for trial in ("0", "1", "2"):
        for place in (A, B, C):
            fails(nodes, trial, place)
    assert nodes.broken() == {}


def test_what_fails_after_a_trial_went_on_is_another_matter(nodes: Nodes) -> None:
    for trial in ("0", "1"):
        fails(nodes, trial, A)
        nodes.went_on(trial, is_on(nodes, trial, B))
        fails(nodes, trial, C)  # further on, and to the end: memory, such as it needs there
    assert nodes.broken() == {"a": "host-a"}


def test_a_broken_gpu_is_blamed_at_once(nodes: Nodes) -> None:
    fails(nodes, "0", A, broken=True)
    assert nodes.broken() == {"a": "host-a"}


def test_what_went_on_without_ever_failing_is_not_noted(nodes: Nodes) -> None:
    nodes.went_on("0", is_on(nodes, "0", A))
    assert not (nodes.out / FILE).exists()


# --- the file


def note_many(out: Path, trial: str, count: int) -> None:
    for _ in range(count):
        Nodes(out).failed(trial, A, "x" * 5000, broken=False)


def test_several_processes_add_to_the_ledger(nodes: Nodes) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=note_many, args=(nodes.out, str(n), 40)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = [json.loads(line) for line in (nodes.out / FILE).read_text().splitlines()]
    assert sorted(line["trial"] for line in lines) == sorted("0123" * 40)
    assert {len(line["error"]) for line in lines} == {500}


def test_half_a_line_of_a_killed_process_is_cut_off(nodes: Nodes) -> None:
    fails(nodes, "0", A, broken=True)
    with (nodes.out / FILE).open("a") as file:
        file.write('{"trial": "1", "no')
    assert nodes.broken() == {"a": "host-a"}
    fails(nodes, "2", B, broken=True)
    assert set(nodes.broken()) == {"a", "b"}


def test_a_place_that_was_not_noted_whole_is_none(tmp_path: Path) -> None:
    assert read_place(tmp_path, 0) is None
    (tmp_path / "node_0.json").write_text('{"node": "a"')
    assert read_place(tmp_path, 0) is None
    forget_places(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- where to


def test_a_trial_is_sent_elsewhere_where_there_is_room(
    nodes: Nodes, cluster: list[dict[str, Any]]
) -> None:
    assert nodes.selector("0", CPU) == {}
    fails(nodes, "0", A)
    assert nodes.selector("0", CPU) == {"ray.io/node-id": "!in(a)"}
    assert nodes.selector("1", CPU) == {}
    fails(nodes, "0", B)
    assert nodes.selector("0", CPU) == {"ray.io/node-id": "!in(a,b)"}
    assert nodes.selector("0", CPU, workers=2) == {"ray.io/node-id": "!in(a,b)"}
    assert nodes.selector("0", CPU, workers=3) == {}  # nowhere else: it must do where it was
    assert nodes.selector("0", {"CPU": 3.0}) == {}
    cluster[2]["Alive"] = False
    assert nodes.selector("0", CPU) == {}


def test_room_is_counted_in_whole_workers(cluster: list[dict[str, Any]]) -> None:
    cluster[0]["Resources"] = {"CPU": 8.0, "GPU": 1.0}
    assert room_elsewhere({"CPU": 1.0, "GPU": 0.25}, set()) == 4
    assert room_elsewhere({"CPU": 1.5}, {"a"}) == 2
    assert room_elsewhere({"CPU": 1.0}, {"a", "b", "c"}) == 0


# --- the GPU


def test_a_machine_whose_gpu_does_not_answer_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpu(0.0)
    if not torch.cuda.is_available():
        with pytest.raises(BrokenNodeError, match="the GPU does not work"):
            check_gpu(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", lambda *_, **__: torch.eye(64))
        with pytest.raises(BrokenNodeError, match="miscalculates"):
            check_gpu(0.5)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", full)
    check_gpu(0.5)  # a neighbour took it: nothing is broken


def test_a_broken_machine_is_known_by_ray_s_text() -> None:
    error = "ray::run()\n  File ...\nsweeps.nodes.BrokenNodeError: vm: the GPU does not work"
    assert is_broken_node(error)
    assert not is_broken_node("RuntimeError: CUDA")


# --- storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", megabytes=8) as made:
        yield made


def test_a_disk_that_is_full_is_told_until_there_is_room(small_disk: Path) -> None:
    assert storage_full(small_disk) == ""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(7_500_000))  # more than 2 % are left
    assert storage_full(small_disk) == ""
    filler.write_bytes(bytes(8_300_000))
    said = storage_full(small_disk)
    assert said.startswith(f"{small_disk}: no room is left (0.00 of 0.01 GB are free)")
    assert "the same command goes on" in said
    filler.unlink()
    assert storage_full(small_disk) == ""
    assert list(small_disk.iterdir()) == []


def test_a_quota_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert "no room is left (Disk quota exceeded)" in storage_full(tmp_path)
