"""What is killed, and what a sweep must do then."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from drills.processes import Process, send
from drills.sweep import Server, Sweep

LOST, TOLD, STOPPED = 1, 2, 130
"""Exit codes of the driver: ended by Ray, without a cluster; a few lines told; Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of kill.

    `victim` finds whom to kill, None while nobody is there. `ends` says that the driver must end,
    since it is the victim or has lost what it stands on; `codes` are those that it may end with.
    """

    name: str
    victim: Callable[[Sweep, Server, Random], Process | None]
    number: int = signal.SIGKILL
    codes: tuple[int, ...] = ()
    ends: bool = False
    variants: tuple[str, ...] = ("search", "asha", "workers")
    phases: tuple[str, ...] = ("start", "training", "end")


def driver(sweep: Sweep, _: Server, __: Random) -> Process | None:
    """The process of `sweeps/run.py`."""
    return next((p for p in sweep.living() if p.pid == sweep.driver.pid), None)


def actor(sweep: Sweep, _: Server, rng: Random) -> Process | None:
    """A process that trains a trial."""
    return chosen(list(sweep.training().values()), rng)


def worker(sweep: Sweep, _: Server, rng: Random) -> Process | None:
    """A worker of a trial's group, leading or not; only when the group trains."""
    return chosen(titled(sweep, "ray::RayTrainWorker") if sweep.training() else [], rng)


def server(_: Sweep, server: Server, __: Random) -> Process | None:
    """The tracking server."""
    return next(iter(server.family.see()), None)


def daemon(title: str) -> Callable[[Sweep, Server, Random], Process | None]:
    """The one process with this in its command."""
    return lambda sweep, _, rng: chosen(titled(sweep, title), rng)


def titled(sweep: Sweep, words: str) -> list[Process]:
    """The processes of this start with these words in their title."""
    return [p for p in sweep.living() if words in p.title and p.pid != sweep.driver.pid]


def chosen(found: list[Process], rng: Random) -> Process | None:
    """One of them, if there are any."""
    return rng.choice(sorted(found, key=lambda p: p.pid)) if found else None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="driver", victim=driver, codes=(-signal.SIGKILL,), ends=True),
        Kind(name="Ctrl-C", victim=driver, number=signal.SIGINT, codes=(STOPPED,), ends=True),
        Kind(name="trial actor", victim=actor, phases=("training",)),
        Kind(name="train worker", victim=worker, variants=("workers",), phases=("training",)),
        Kind(name="Ray head: GCS", victim=daemon("/gcs/gcs_server"), codes=(LOST,), ends=True),
        Kind(name="Ray head: raylet", victim=daemon("/raylet/raylet "), codes=(LOST,), ends=True),
        Kind(name="tracking server", victim=server, codes=(TOLD,)),
        Kind(name="courier", victim=daemon("sweeps.courier")),
    )
}


def kill(kind: Kind, victim: Process, sweep: Sweep, server: Server) -> None:
    """Do it. A Ctrl-C is heard by all of the terminal's foreground processes."""
    sweep.living()
    if kind.name == "tracking server":
        server.kill()
    elif kind.name == "Ctrl-C":
        send(-victim.pid, kind.number)
    else:
        send(victim.pid, kind.number)
