"""The folder of a machine that keeps copies of stores: who uses which, and room for another.

    CACHE/<key>/       a copy, laid out as the store is; derived/ is its own
    CACHE/<key>.lock   held by whom copies into it, with the bytes that the copy will have
    CACHE/<key>.use    held, shared, by whoever has the copy open; its time is that of the last use
    CACHE/room.lock    held by who makes room

Locks are flock's: they end with the process that holds them, however it ends.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from brstnet.data.remote import tell

SHARE = 0.8
"""The part of the disk's free space that copies may take, if BRSTNET_CACHE_GB does not say."""


def cache_root() -> Path:
    """The folder of all copies: stores/ in BRSTNET_CACHE, by default in ~/.cache/brstnet."""
    where = os.environ.get("BRSTNET_CACHE") or "~/.cache/brstnet"
    root = Path(where).expanduser() / "stores"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def use(folder: Path) -> IO[bytes]:
    """Hold a copy, so that nobody removes it; until the file that this gives is closed."""
    file = folder.with_name(f"{folder.name}.use").open("ab")
    fcntl.flock(file, fcntl.LOCK_SH)
    os.utime(file.fileno())
    return file


@contextmanager
def copying(folder: Path, origin: str) -> Iterator[IO[str]]:
    """Be the only one who copies into `folder`; waits for another who does."""
    with folder.with_name(f"{folder.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another process that copies {origin} to {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield lock
        finally:
            lock.truncate(0)


def make_room(folder: Path, missing: int, lock: IO[str]) -> None:
    """Reserve room for what is missing of a copy; others that nobody uses go first, oldest first.

    Args:
        folder: the copy's.
        missing: bytes that will be written.
        lock: what `copying` gave: what is reserved is noted there.

    Raises:
        OSError: it does not fit.
    """
    root = folder.parent
    with (root / "room.lock").open("a") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        here = size_of(folder)
        others = {other: size_of(other) for other in _copies(root) if other != folder}
        promised = {other: max(0, _promised(other) - size) for other, size in others.items()}
        free = shutil.disk_usage(root).free
        budget = _budget(free + here + sum(others.values()))
        while True:
            taken = here + sum(others.values()) + sum(promised.values())
            fits = min(budget - taken, free - sum(promised.values()))
            if missing <= fits:
                break
            if (oldest := _remove_oldest(list(others))) is None:
                raise OSError(
                    errno.ENOSPC,
                    f"{root}: {_gb(missing)} more are needed for a copy of a store, but "
                    f"{_gb(max(0, fits))} are left of a budget of {_gb(budget)} ({_gb(free)} free "
                    "on the disk, other copies in use): set BRSTNET_CACHE_GB to more, or "
                    "BRSTNET_CACHE to a folder on a larger disk",
                )
            free += others.pop(oldest)
            promised.pop(oldest)
        lock.seek(0)
        lock.truncate()
        lock.write(str(here + missing))
        lock.flush()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed by who writes it
                total += Path(top, name).stat().st_size
    return total


def _copies(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir()]


def _budget(most: int) -> float:
    """Bytes that all copies may take; `most` is what they could.

    Raises:
        ValueError: BRSTNET_CACHE_GB is no number.
    """
    text = os.environ.get("BRSTNET_CACHE_GB")
    try:
        return float(text) * 1e9 if text else SHARE * most
    except ValueError as error:
        raise ValueError(f"BRSTNET_CACHE_GB must be a number of GB, got {text!r}") from error


def _promised(folder: Path) -> int:
    """Bytes that a copy will have which somebody makes now; 0 if nobody does."""
    with folder.with_name(f"{folder.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            return int(lock.read() or 0)
    return 0


def _remove_oldest(folders: list[Path]) -> Path | None:
    """Remove the copy that was used longest ago among those nobody uses; None if all are used."""

    def last_use(folder: Path) -> float:
        note = folder.with_name(f"{folder.name}.use")
        return note.stat().st_mtime if note.exists() else 0.0

    for folder in sorted(folders, key=last_use):
        used = last_use(folder)
        with folder.with_name(f"{folder.name}.use").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            tell(f"{folder}: removed to make room; {_ago(used)}")
            gone = folder.with_name(f"{folder.name}.gone")
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
            shutil.rmtree(gone)
        return folder
    return None


def _ago(moment: float) -> str:
    return f"last used {(time.time() - moment) / 3600:.1f} hours ago" if moment else "never used"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
