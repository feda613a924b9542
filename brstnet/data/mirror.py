"""A store from wherever it lies: a folder as it is, an address by a checked copy on this machine.

`open_store` copies what an address has once a machine, `push` puts a store there.
"""

import errno
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replace_in
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any
from weakref import finalize

from brstnet.config import fingerprint
from brstnet.data.cache import cache_root, copying, make_room, use
from brstnet.data.guarded import MOST_JSON, parse_json
from brstnet.data.index import digest, hashes, parse_index, read_index
from brstnet.data.remote import Remote, connect, is_uri, tell
from brstnet.data.store import Store, sha256

THREADS = 8
"""Files at a time: S3 gives about 100 MB/s each."""

INDEX = "index.json"
COPY = "copy.json"
PUSH = "push.json"
KEY = re.compile("[0-9a-f]{12}-[0-9a-f]{12}")

NOTE_SECONDS = 5.0
"""So often what was uploaded is noted there."""


def open_store(where: Path | str, *, patches: bool = True) -> Store:
    """Open a store in a folder, or a copy of the one at an address.

    Args:
        where: a path, or an address such as s3://BUCKET/STORE. What `Store.address` gives names
            the content too: where this machine has it nothing is asked of object storage.
        patches: copy them now; else a section's come when they are first asked for.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is no store, another one than the address names, or has damaged files.
        OSError: storage was away for too long, or there is no room for the copy.
    """
    if not is_uri(where):
        return Store(where)
    uri, _, pin = str(where).partition("#")
    if pin and not KEY.fullmatch(pin):
        raise ValueError(f"{where}: what follows # must name a store's content, as sweeps write it")
    root = cache_root()
    copy = Copy(uri, root / pin) if pin else None
    if copy is None or not (copy.folder / INDEX).is_file():
        copy = Copy(uri, root / _key_there(uri, pin))
    held = use(copy.folder)
    try:
        copy.complete(wanted=lambda name: patches or not name.endswith("patches.npy"))
        store = Store(
            copy.folder,
            origin=uri,
            address=f"{uri}#{copy.folder.name}",
            bring=None if patches else copy.bring,
        )
    except BaseException:
        held.close()
        raise
    finalize(store, held.close)
    return store


def _key_there(uri: str, pin: str) -> str:
    """The name of the copy of what lies at an address now.

    Raises:
        ValueError: it is another store than `pin` names.
    """
    key = key_of(connect(uri).read(INDEX, MOST_JSON), f"{uri}/{INDEX}")
    if pin and key != pin:
        raise ValueError(
            f"{uri}: here lies store {key} now, but {pin} was asked for: push that one again, or "
            "begin anew with the other"
        )
    return key


def key_of(text: bytes, source: str) -> str:
    """What a copy is called: the digest of the store, and that of all its index says."""
    return f"{digest(parse_index(text, source))}-{fingerprint(text.decode())}"


@dataclass
class Copy:
    """A copy of the store at `uri`, whole or in the making; its folder's name is its content's."""

    uri: str
    folder: Path

    @cached_property
    def remote(self) -> Remote:
        """Where it comes from."""
        return connect(self.uri)

    def bring(self, section: str) -> None:
        """Copy a section's patches, if they are not here yet."""
        if not (self.folder / section / "patches.npy").is_file():
            self.complete(wanted=lambda name: name == f"{section}/patches.npy")

    def complete(self, wanted: Callable[[str], bool]) -> None:
        """Copy those files that are wanted and not here yet; one process does, others wait.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file has not the hash that the index says, twice.
            OSError: storage was away for too long, or there is no room for the copy.
        """
        if not self._missing(wanted):
            return
        with copying(self.folder, self.uri) as lock:
            if not self._missing(wanted):
                return  # another has copied it
            sizes = self._begin()
            missing = self._missing(wanted)
            make_room(self.folder, sum(sizes[name] for name in missing), lock)
            began, size = time.monotonic(), sum(sizes[name] for name in missing)
            tell(f"copying {size / 1e6:.1f} MB of {self.uri} to {self.folder}")
            expected = hashes(self._index)
            _all_of(self.remote, missing, lambda n: self._fetch(n, sizes[n], expected[n]))
            seconds = time.monotonic() - began
            speed = f"{seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)"
            tell(f"copied {size / 1e6:.1f} MB of {self.uri} in {speed}")

    @property
    def _index(self) -> dict[str, Any]:
        return read_index(self.folder)

    def _missing(self, wanted: Callable[[str], bool]) -> list[str]:
        """What is wanted and not here; a file is here if it has its size: its hash was right."""
        note = self.folder / COPY
        if not (note.is_file() and (self.folder / INDEX).is_file()):
            return [INDEX]
        sizes = parse_json(note.read_bytes(), str(note))
        files = {name: self.folder / name for name in hashes(self._index) if wanted(name)}
        return [n for n, f in files.items() if not f.is_file() or f.stat().st_size != sizes[n]]

    def _begin(self) -> dict[str, int]:
        """Note what there is to copy, as it is there now; the sizes, by name."""
        text = self.remote.read(INDEX, MOST_JSON)
        if (key := key_of(text, f"{self.uri}/{INDEX}")) != self.folder.name:
            raise ValueError(
                f"{self.uri}: here lies store {key} now, so that the copy of {self.folder.name} "
                "cannot be completed: push that one again, or begin anew with the other"
            )
        there = self.remote.sizes()
        names = hashes(parse_index(text, f"{self.uri}/{INDEX}"))
        if lost := [name for name in names if name not in there]:
            raise FileNotFoundError(
                f"{self.uri}/{lost[0]}: the index names it, but it is not there, and "
                f"{len(lost) - 1} more: push the store again"
            )
        self.folder.mkdir(exist_ok=True)
        sizes = {name: there[name] for name in names}
        _write_whole(self.folder / COPY, json.dumps(sizes).encode())
        _write_whole(self.folder / INDEX, text)
        return sizes

    def _fetch(self, name: str, size: int, expected: str) -> None:
        """One file, under its name only once its hash was right."""
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        scratch = file.with_name(f"{file.name}.part")
        found = []
        try:
            for _ in range(2):
                found.append(self.remote.fetch(name, scratch, size))
                if found[-1] == expected:
                    scratch.rename(file)
                    return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                why = (
                    "the disk is full: free some, or set BRSTNET_CACHE to a folder on a larger one"
                )
                raise OSError(errno.ENOSPC, f"{self.folder}: {why}") from error
            raise
        finally:
            scratch.unlink(missing_ok=True)
        raise ValueError(
            f"{self.uri}/{name}: damaged: its SHA-256 must be {expected}, but it came as "
            f"{found[0]} and as {found[1]}; it was not kept. Push the store again"
        )


def push(store: Path, uri: str, *, replace: bool = False) -> str:
    """Upload a store, its index last: half of one never opens. Goes on where it was stopped.

    Args:
        store: its folder.
        uri: where to, such as s3://BUCKET/NAME.
        replace: whether another store there may be removed.

    Returns:
        What was done, in a line.

    Raises:
        FileNotFoundError: there is no store.
        FileExistsError: another store is there.
        ValueError: a file of the store has not the hash that the index says.
        OSError: storage refuses, or was away for too long.
    """
    opened, remote = Store(store), connect(uri)
    text = (store / INDEX).read_bytes()
    key = key_of(text, str(store / INDEX))
    there = remote.sizes()
    done = _done_before(remote, there, key, replace=replace)
    expected = hashes(opened.index)
    local = {name: (store / name).stat().st_size for name in expected}
    todo = [n for n in expected if n not in done or there.get(n) != local[n]]
    size, began = sum(local[n] for n in todo), time.monotonic()
    if not todo and INDEX in there:
        return f"{uri}: has this store already ({key})"
    remote.put(PUSH, _note(key, done))
    noted = time.monotonic()

    def upload(name: str) -> None:
        if (found := sha256(store / name)) != expected[name]:
            raise ValueError(
                f"{store / name}: damaged: its SHA-256 must be {expected[name]}, but is {found}; "
                "prepare the store again"
            )
        remote.put(name, store / name)

    def note(name: str) -> None:
        nonlocal noted
        done.add(name)
        if time.monotonic() - noted > NOTE_SECONDS:
            remote.put(PUSH, _note(key, done))
            noted = time.monotonic()

    try:
        _all_of(remote, todo, upload, note)
    except BaseException:
        last = replace_in(remote, stopped=Event(), patience=0.0)
        with suppress(OSError):  # that what is there need not be sent again
            last.put(PUSH, _note(key, done))
        raise
    there = remote.sizes()
    if wrong := [n for n in expected if there.get(n) != local[n]]:
        raise OSError(f"{uri}/{wrong[0]}: has {there.get(wrong[0])} bytes there, not its own")
    remote.put(INDEX, text)
    remote.remove(PUSH)
    seconds = time.monotonic() - began
    return (
        f"{uri}: uploaded {len(todo)} of {len(expected)} files, {size / 1e6:.1f} MB in "
        f"{seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s); store {key}"
    )


def _done_before(remote: Remote, there: dict[str, int], key: str, *, replace: bool) -> set[str]:
    """The files of this store that are there already.

    Raises:
        FileExistsError: another store is there, or something else.
    """
    if not there:
        return set()
    old: set[str] = set()
    if INDEX in there:
        text = remote.read(INDEX, MOST_JSON)
        source = f"{remote.uri}/{INDEX}"
        old, same = set(hashes(parse_index(text, source))), key_of(text, source) == key
    elif PUSH in there:
        note = parse_json(remote.read(PUSH, MOST_JSON), f"{remote.uri}/{PUSH}")
        old, same = set(map(str, note.get("done", []))), note.get("store") == key
    else:
        raise FileExistsError(f"{remote.uri}: something else is there; choose another address")
    if same:
        return old
    if not replace:
        raise FileExistsError(
            f"{remote.uri}: {'' if INDEX in there else 'half of '}another store is there; choose "
            "another address, or say --replace"
        )
    for name in (INDEX, *sorted(old & set(there))):  # from the first on no store opens there
        if name in there:
            remote.remove(name)
            del there[name]
    return set()


def _note(key: str, done: set[str]) -> bytes:
    return json.dumps({"store": key, "done": sorted(done)}).encode()


def _all_of(
    remote: Remote,
    names: Sequence[str],
    act: Callable[[str], None],
    after: Callable[[str], None] | None = None,
) -> None:
    """Do it for each of these files, several at a time; the first that fails stops the others."""
    remote.stopped.clear()
    with ThreadPoolExecutor(THREADS, "storage") as pool:
        doing = {pool.submit(act, name): name for name in names}
        try:
            for one in as_completed(doing):
                one.result()
                if after is not None:
                    after(doing[one])
        except BaseException:
            remote.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_whole(file: Path, content: bytes) -> None:
    scratch = file.with_name(f"{file.name}.part")
    scratch.write_bytes(content)
    scratch.rename(file)
