"""Object storage, or any other file system that PyArrow knows by an address such as s3://."""

import functools
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

PATIENCE_SECONDS = 240.0
"""So long storage may be away before what needs it gives up."""

CHUNK = 16 << 20
"""Bytes a request: PyArrow makes a request of each read."""

FINAL = (
    *("ACCESS_DENIED", "NO_SUCH_", "INVALID_ACCESS_KEY_ID", "SIGNATURE", "CLIENT_TOKEN"),
    *("HTTP status 401", "HTTP status 403"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT", "NOT_FOUND"),  # Google's
)
"""Words in an answer of object storage that another try would hear again."""

T = TypeVar("T")


def is_uri(where: Path | str) -> bool:
    """Whether this is an address, and no path."""
    return "://" in str(where)


@dataclass(frozen=True)
class Remote:
    """A folder on object storage. `stopped`, once set, ends what its threads do."""

    uri: str
    files: FileSystem
    base: str
    stopped: threading.Event = field(default_factory=threading.Event)
    patience: float = field(default_factory=lambda: PATIENCE_SECONDS)

    def read(self, name: str, most: int) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it has more than `most` bytes.
            OSError: storage refuses, or was away for too long.
        """

        def fetch() -> bytes:
            with self.files.open_input_file(f"{self.base}/{name}") as file:
                if (size := file.size()) > most:
                    raise ValueError(f"{self.uri}/{name}: {size} bytes, at most {most} are read")
                content: bytes = file.read()
                return content

        return self.patiently(fetch)

    def sizes(self) -> dict[str, int]:
        """The size of every file below, by its name there; none if there is no such folder.

        Raises:
            OSError: storage refuses, or was away for too long.
        """
        selector = FileSelector(self.base, allow_not_found=True, recursive=True)
        found = self.patiently(lambda: self.files.get_file_info(selector))
        return {
            info.path[len(self.base) :].lstrip("/"): info.size
            for info in found
            if info.type == FileType.File
        }

    def fetch(self, name: str, target: Path, size: int) -> str:
        """Write a file's content to `target`, `size` bytes and no more; returns its SHA-256.

        Raises:
            FileNotFoundError: there is none.
            OSError: storage refuses or was away for too long, or the disk is full.
        """
        digest = sha256()
        with target.open("wb") as out:
            path = f"{self.base}/{name}"
            with self.patiently(lambda: self.files.open_input_file(path)) as file:
                for start in range(0, size, CHUNK):
                    length = min(CHUNK, size - start)
                    chunk = self.patiently(functools.partial(file.read_at, length, start))
                    digest.update(chunk)
                    out.write(chunk)
        return digest.hexdigest()

    def put(self, name: str, source: Path | bytes) -> None:
        """Put a file or these bytes there, whole or not at all.

        Raises:
            OSError: storage refuses, or was away for too long.
        """
        path = f"{self.base}/{name}"
        local = isinstance(self.files, LocalFileSystem)  # only object storage shows whole files
        scratch = f"{path}.part" if local else path

        def upload() -> None:
            if local:
                self.files.create_dir(path.rpartition("/")[0])
            with self.files.open_output_stream(scratch) as out:
                if isinstance(source, bytes):
                    out.write(source)
                else:
                    with source.open("rb") as file:
                        while chunk := file.read(CHUNK):
                            self._check_going()
                            out.write(chunk)
            if local:
                self.files.move(scratch, path)

        self.patiently(upload)

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            OSError: storage refuses, or was away for too long.
        """
        self.patiently(lambda: self.files.delete_file(f"{self.base}/{name}"))

    def patiently(self, act: Callable[[], T]) -> T:
        """Do it, and again with growing pauses while storage is away.

        Raises:
            FileNotFoundError: storage has no such thing.
            OSError: it refuses, or was away for as long as patience lasts.
        """
        deadline, pause = time.monotonic() + self.patience, 1.0
        told = False
        while True:
            self._check_going()
            try:
                return act()
            except InterruptedError:
                raise
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self.uri}: {error}") from error
            except OSError as error:
                if not passing(error):
                    raise OSError(error.errno, f"{self.uri}: {error}") from error
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError(
                        f"{self.uri}: storage was away for {self.patience:g} s; the same "
                        f"command goes on where it stopped. The last answer: {error}"
                    ) from error
                if not told:
                    tell(f"{self.uri}: storage is away, trying for {left:.0f} s more: {error}")
                told = True
            # Not all nodes at the same moment.
            self.stopped.wait(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, 30.0)

    def _check_going(self) -> None:
        if self.stopped.is_set():
            raise InterruptedError(f"{self.uri}: stopped, as something else went wrong")


def connect(uri: str) -> Remote:
    """The folder at an address; nothing is asked of it yet.

    S3's endpoint, region and credentials are those of AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE,
    AWS_ACCESS_KEY_ID and so on, or the machine's role.

    Raises:
        ValueError: the address is of an unknown kind, or has a secret in it.
    """
    parts = urlsplit(uri)
    if parts.username or parts.password:
        raise ValueError(
            f"{parts.scheme}://...@{parts.hostname}{parts.path}: a key in an address ends in logs; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use the machine's role"
        )
    try:
        files, base = FileSystem.from_uri(uri)
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"{uri}: no address of a store, such as s3://BUCKET/NAME, gs://BUCKET/NAME or "
            f"file:///FOLDER: {error}"
        ) from error
    return Remote(uri=uri.partition("?")[0].rstrip("/"), files=files, base=base.rstrip("/"))


def passing(error: OSError) -> bool:
    """Whether another try may succeed: what storage says has no number, what the disk says has."""
    words = str(error)
    return error.errno is None and not any(word in words for word in FINAL)


def tell(text: str) -> None:
    """One line for who looks at the terminal or the log."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
