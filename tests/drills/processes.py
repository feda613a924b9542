"""Processes as /proc knows them: who came from whom, who holds a folder, who is still there."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process. A number is given again after a while: with its start it is one alone."""

    pid: int
    parent: int
    began: int
    title: str

    @property
    def known_as(self) -> tuple[int, int]:
        """What it is told from others by."""
        return self.pid, self.began


def processes() -> dict[int, Process]:
    """All that run; those that have died and were not waited for are not counted."""
    found = {}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has gone
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
            if state not in "ZX":
                pid = int(folder.name)
                found[pid] = Process(pid=pid, parent=int(parent), began=int(rest[17]), title=title)
    return found


@dataclass
class Family:
    """A process and all that came from it, also those that it has left behind.

    Only what was seen is known: `see` is called often, and before somebody is killed.
    """

    pid: int
    known: set[tuple[int, int]] = field(default_factory=set)

    def see(self) -> list[Process]:
        """Look for new members; all that live."""
        now = processes()
        if not self.known and self.pid in now:
            self.known.add(now[self.pid].known_as)
        living = {p.pid for p in now.values() if p.known_as in self.known}
        while children := {p.pid for p in now.values() if p.parent in living} - living:
            living |= children
        self.known |= {now[pid].known_as for pid in living}
        return [now[pid] for pid in sorted(living)]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal all that live."""
        for process in self.see():
            send(process.pid, number)


def send(pid: int, number: int) -> None:
    """Signal a process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def holds(pid: int, file: Path) -> bool:
    """Whether a process has a file open."""
    with suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                if link.readlink() == file:
                    return True
    return False
