"""Machines on which trials fail at once: noted beside the trials, and avoided.

A trial that fails before it gets anywhere is tried again on another machine. A machine on which
two trials failed so, and went on elsewhere, gets no more trials; one whose GPU does not answer
gets none at once.
"""

import fcntl
import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from sweeps.events import mend, read

FILE = "nodes.jsonl"
ENOUGH = 2
"""So many trials must have failed at once on a machine, and gone on elsewhere, to blame it."""

RESERVE_BYTES, RESERVE_SHARE = 2**29, 0.02
"""A disk counts as full with less left than the smaller of the two: what a checkpoint may need."""

NODE_ID = "ray.io/node-id"
"""The label that Ray gives every node."""


class BrokenNodeError(RuntimeError):
    """This machine cannot train, whatever is to be trained."""


def check_gpu(gpus: float) -> None:
    """Let the GPU that a process was given do something.

    Raises:
        BrokenNodeError: it was given one, and none answers: it would train on the CPU instead, or
            fail. A GPU whose memory somebody else has taken is not broken.
    """
    if not gpus:
        return
    try:
        ones = torch.ones(64, 64, device="cuda")
        answer = float((ones @ ones).sum())
    except (RuntimeError, AssertionError) as error:  # the latter: no CUDA in torch
        if "out of memory" in str(error):
            return  # the training meets it too, and knows what to do
        raise BrokenNodeError(f"{socket.gethostname()}: the GPU does not work: {error}") from error
    if answer != 64.0**3:
        raise BrokenNodeError(f"{socket.gethostname()}: the GPU miscalculates: {answer}")


def is_broken_node(error: str) -> bool:
    """Whether an error, as Ray hands it on, says that a machine is broken."""
    return BrokenNodeError.__name__ in error


def note_place(folder: Path, rank: int) -> None:
    """Note on which node a trial's worker is."""
    if ray.is_initialized():
        node = ray.get_runtime_context().get_node_id()
        text = json.dumps({"node": node, "host": socket.gethostname()})
        (folder / f"node_{rank}.json").write_text(text)


def forget_places(folder: Path) -> None:
    """Before a new try: one that does not come to note its place must not be given the last's."""
    for file in folder.glob("node_*.json"):
        file.unlink(missing_ok=True)


def read_place(folder: Path, rank: int) -> dict[str, str] | None:
    """The node and host on which a trial's worker was last, if it came to note it."""
    file = folder / f"node_{rank}.json"
    try:
        place: dict[str, str] = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # killed in the middle of its one line
        return None
    return place


@dataclass(frozen=True)
class Nodes:
    """What is known of a sweep's machines. Any of its processes may add to it.

    Args:
        out: the sweep's folder.
    """

    out: Path

    def failed(self, trial: str, place: Mapping[str, str], error: str, *, broken: bool) -> None:
        """Note that a trial failed at once on a machine; `broken` if that is surely its fault."""
        self._add({"trial": trial, **place, "error": error[-500:], "broken": broken})

    def went_on(self, trial: str, folder: Path) -> None:
        """Note that a trial got further than where it had failed, if that was on other machines.

        Args:
            trial: its name.
            folder: of the trial, where its workers have noted their places.
        """
        of_it = [line for line in self._lines() if line["trial"] == trial]
        if not of_it or "went_on" in of_it[-1]:
            return
        ranks = range(len(list(folder.glob("node_*.json"))))
        now = {place["node"] for rank in ranks if (place := read_place(folder, rank))}
        if not now & {line["node"] for line in of_it if "node" in line}:
            self._add({"trial": trial, "went_on": True})

    def avoided(self, trial: str) -> set[str]:
        """Ids of the nodes on which a trial should not be started."""
        own = {line["node"] for line in self._lines() if line["trial"] == trial and "node" in line}
        return own | self.broken().keys()

    def broken(self) -> dict[str, str]:
        """The machines to blame: host by node id."""
        hosts: dict[str, str] = {}
        sure: set[str] = set()
        suspects: dict[str, set[str]] = {}  # by trial, since it last went on
        blamed_by: dict[str, set[str]] = {}  # trials by node
        for line in self._lines():
            trial = line["trial"]
            if "went_on" in line:
                for node in suspects.pop(trial, ()):
                    blamed_by.setdefault(node, set()).add(trial)
                continue
            hosts[line["node"]] = line["host"]
            suspects.setdefault(trial, set()).add(line["node"])
            if line["broken"]:
                sure.add(line["node"])
        enough = {node for node, trials in blamed_by.items() if len(trials) >= ENOUGH}
        return {node: host for node, host in hosts.items() if node in sure | enough}

    def selector(self, trial: str, bundle: Mapping[str, float], workers: int = 1) -> dict[str, str]:
        """Ray's label selector for a place to start a trial; empty where it has no choice.

        Args:
            trial: its name.
            bundle: what a worker takes of a node.
            workers: of the trial.
        """
        avoided = self.avoided(trial)
        if not avoided or room_elsewhere(bundle, avoided) < workers:
            return {}
        return {NODE_ID: f"!in({','.join(sorted(avoided))})"}

    def _add(self, line: Mapping[str, Any]) -> None:
        with (self.out / FILE).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            mend(self.out / FILE)
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        return read(self.out / FILE)[0]


def room_elsewhere(bundle: Mapping[str, float], avoided: set[str]) -> int:
    """Workers that find room on the nodes that are alive and not avoided, when those are free."""
    return sum(
        int(min(node["Resources"].get(name, 0) // amount for name, amount in bundle.items()))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in avoided
    )


def storage_full(folder: Path) -> str:
    """Why nothing more should be written to the sweep's folder, or nothing."""
    disk = shutil.disk_usage(folder)
    why = f"{disk.free / 1e9:.2f} of {disk.total / 1e9:.2f} GB are free"
    if disk.free >= min(RESERVE_BYTES, RESERVE_SHARE * disk.total):
        scratch = folder / "room.tmp"
        try:  # a quota is not seen in what is free
            scratch.write_bytes(bytes(2**16))
        except OSError as error:
            why = error.strerror or str(error)
        else:
            return ""
        finally:
            scratch.unlink(missing_ok=True)
    return (
        f"{folder}: no room is left ({why}): the sweep stops before it loses anything; make room, "
        "and the same command goes on"
    )
