"""Trials on GPUs that come and go: a simulation of events, for `cluster_plan.py`.

Phases of jobs of unequal length wait for each other. Nodes boot, join and copy the store when they
are wanted, as fast as Ray's autoscaler asks for them; they are released when idle, and on spot are
lost with what was not saved.
"""

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sweeps.probe import Speed
from sweeps.pruning import Pruner


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, one a node, that come when they are wanted. The defaults are free and never fail."""

    gpus: int
    at_once: int | None = None
    """Trials of the search at once."""
    boot_seconds: float = 0.0
    copy_seconds: float = 0.0
    first_nodes: float = math.inf
    upscaling_speed: float = 1.0
    idle_seconds: float = math.inf
    interruptions: float = 0.0
    """Of a GPU-hour."""
    save_seconds: float = 300.0
    driver_seconds: float = 0.0
    hand_over_seconds: float = 0.0
    end_fold_seconds: float = 0.0
    epoch_write_seconds: float = 0.0
    """What an epoch's save takes of the shared file system, for a MB of a model."""


@dataclass
class Job:
    """A trial, or a kind of trial that is probed, and how far it is."""

    number: int
    speed: Speed
    stops: Sequence[float]
    """Where it is judged, in folds; at the last it is done."""
    score: float = 0.0
    at: int = 0
    stretch: dict[str, float] = field(default_factory=dict)
    """Seconds to its next stop, by what they go to."""
    kept: float = 0.0
    """Seconds of the current stretch that were saved before its node was lost."""
    again: float = 0.0
    """Seconds of a fold's set-up that it takes to go on from there."""


@dataclass
class Node:
    """A GPU that is paid from the moment it boots."""

    ready: float
    lost: float
    free: float | None = None
    """Since when it has nothing to do."""
    until: float | None = None


@dataclass
class Outcome:
    """What a simulated sweep took."""

    wall: float = 0.0
    paid: float = 0.0
    nodes: int = 0
    """Most at a time."""
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """GPU-seconds by what they went to; together nodes x wall."""

    @property
    def total(self) -> float:
        """GPU-seconds in all."""
        return sum(self.parts.values())


Happens = Callable[[float, Node, Job | None, float], None]


class Simulation:
    """Phases of jobs on a cluster, one phase after the other.

    Args:
        cluster: what they run on.
        pruner: asked at every stop but the last; None lets all go on.
        rng: of interruptions.
    """

    def __init__(self, cluster: Cluster, pruner: Pruner | None, rng: np.random.Generator) -> None:
        self._cluster, self._pruner, self._rng = cluster, pruner, rng
        self._events: list[tuple[float, int, Happens, Node, Job | None, float]] = []
        self._order = itertools.count()
        self._nodes: list[Node] = []
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._pending = 0
        self._at_once = cluster.gpus
        self._driver_free = 0.0
        self._out = Outcome()

    def run(self, phases: Mapping[str, Sequence[Job]]) -> Outcome:
        """Simulate; the phase `search` is the one that `at_once` limits."""
        now, gpus, ends = 0.0, self._cluster.gpus, [(0.0, 0.0)]
        for name, jobs in phases.items():
            limit = self._cluster.at_once if name == "search" else None
            self._at_once = min(gpus, limit or gpus)
            self._waiting.extend(jobs)
            self._dispatch(now)
            while self._waiting or self._running:
                now, _, what, node, job, began = heapq.heappop(self._events)
                what(now, node, job, began)
                self._dispatch(now)
            ends.append((now, self._out.total))
        out = self._out
        out.wall = now
        for node in self._nodes:
            end = node.until if node.until is not None else now
            if node.until is None and node.free is not None:
                end = min(now, node.lost, node.free + self._cluster.idle_seconds)
            out.paid += end - (node.ready - self._coming)
        for name, ((since, before), (end, after)) in zip(
            phases, itertools.pairwise(ends), strict=True
        ):
            out.parts[f"idle in the {name}"] = out.nodes * (end - since) - (after - before)
        return out

    @property
    def _coming(self) -> float:
        return self._cluster.boot_seconds + self._cluster.copy_seconds

    def _push(self, when: float, what: Happens, node: Node, job: Job | None, now: float) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, node, job, now))

    def _dispatch(self, now: float) -> None:
        """Hand waiting jobs to free nodes, and ask for nodes where there are too few."""
        for node in self._nodes:
            if not (self._waiting and len(self._running) < self._at_once):
                break
            if node.free is None or node.until is not None:
                continue
            gone = min(node.lost, node.free + self._cluster.idle_seconds)
            if gone < now:  # released, or lost while it had nothing to do
                node.until = gone
                continue
            self._hand_out(now, node, self._waiting.popleft())
        alive = sum(n.until is None and n.ready <= now for n in self._nodes)
        wanted = min(self._at_once - len(self._running), len(self._waiting))
        free = sum(n.until is None and n.free is not None for n in self._nodes)
        cap = max(self._cluster.first_nodes, self._cluster.upscaling_speed * alive)
        while self._pending < min(wanted - free, cap):
            self._ask(now)

    def _ask(self, now: float) -> None:
        ready, rate = now + self._coming, self._cluster.interruptions / 3600
        lost = ready + self._rng.exponential(1 / rate) if rate else math.inf
        node = Node(ready=ready, lost=lost)
        self._nodes.append(node)
        self._pending += 1
        self._push(ready, self._come, node, None, now)

    def _come(self, now: float, node: Node, _job: Job | None, _began: float) -> None:
        self._pending -= 1
        node.free = now
        self._out.parts["start-up"] += self._cluster.boot_seconds
        self._out.parts["store copy"] += self._cluster.copy_seconds
        alive = sum(n.until is None and n.ready <= now for n in self._nodes)
        self._out.nodes = max(self._out.nodes, alive)

    def _hand_out(self, now: float, node: Node, job: Job) -> None:
        node.free, self._running[job.number] = None, job
        self._driver_free = max(now, self._driver_free) + self._cluster.driver_seconds
        begin = self._driver_free + self._cluster.hand_over_seconds
        self._out.parts["driver"] += self._driver_free - now
        self._out.parts["hand-over"] += self._cluster.hand_over_seconds
        self._go_on(begin, node, job)

    def _go_on(self, now: float, node: Node, job: Job) -> None:
        """To the next stop, or to the moment at which the node is lost."""
        job.stretch = job.stretch or self._stretch(job)
        end = now + sum(job.stretch.values()) - job.kept + job.again
        if end > node.lost:
            self._push(max(now, node.lost), self._lose, node, job, now)
        else:
            self._push(end, self._stop, node, job, now)

    def _stretch(self, job: Job) -> dict[str, float]:
        """Seconds from a job's last stop to its next, by what they go to."""
        begin, end = (job.stops[job.at - 1] if job.at else 0.0), job.stops[job.at]
        speed, cluster, epochs = job.speed, self._cluster, (end - begin) * job.speed.epochs
        write = self._write_seconds(speed)
        return {
            "steps": epochs * speed.steps * speed.step_seconds,
            "validation": epochs * speed.validation_seconds,
            "fold set-up": (math.ceil(end) - math.ceil(begin)) * speed.setup_seconds,
            "shared files": epochs * max(0.0, write - epoch_seconds(speed)),
            "hand-over": (math.floor(end) - math.floor(begin)) * cluster.end_fold_seconds,
        }

    def _write_seconds(self, speed: Speed) -> float:
        """What saving an epoch takes of training, which waits while the last save is written.

        Where all together write more than the shared file system takes, each gets an equal part.
        """
        soon = itertools.islice(self._waiting, self._at_once - len(self._running))
        at_once = [job.speed for job in (*self._running.values(), *soon)]
        second = self._cluster.epoch_write_seconds
        if sum(second * s.model_mb / epoch_seconds(s) for s in at_once) <= 1:
            return 0.0
        return second * speed.model_mb * len(at_once)

    def _stop(self, now: float, node: Node, job: Job | None, _began: float) -> None:
        """A job is at its next stop: judged, or done."""
        assert job is not None
        for name, seconds in job.stretch.items():
            self._out.parts[name] += seconds
        self._out.parts["redone after spot"] += job.again
        done, job.stretch, job.kept, job.again = job.stops[job.at], {}, 0.0, 0.0
        job.at += 1
        over = job.at == len(job.stops)
        if not over and self._pruner is not None:
            over = bool(self._pruner.judge(job.number, done, job.score, {}))
        if over:
            node.free = now
            del self._running[job.number]
        else:
            self._go_on(now, node, job)

    def _lose(self, now: float, node: Node, job: Job | None, began: float) -> None:
        """A node is lost, with what its job had not saved."""
        assert job is not None
        node.until = now
        del self._running[job.number]
        worked = now - began
        useful = max(0.0, worked - job.again)
        unsaved = min(useful, self._rng.uniform(0, self._cluster.save_seconds))
        self._out.parts["redone after spot"] += worked - useful + unsaved
        job.kept += useful - unsaved
        job.again = job.speed.setup_seconds
        self._waiting.appendleft(job)


def epoch_seconds(speed: Speed) -> float:
    """Training and validation of an epoch."""
    return speed.steps * speed.step_seconds + speed.validation_seconds
