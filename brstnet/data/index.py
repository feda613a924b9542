"""A store's index: what there is and its hashes, checked before what it names is opened."""

import re
from pathlib import Path
from typing import Any

from brstnet.config import fingerprint
from brstnet.data.guarded import parse_json, plain_name, read_json

FORMAT = "brstnet-store"
VERSION = 1
SECTION_FILES = ("patches.npy", "spots.h5ad", "ledger.parquet")
TABLE = "genes.parquet"
RESERVED = ("derived", "index.json", TABLE)
"""Names in a store's folder that no section can have."""

HASH = re.compile("[0-9a-f]{64}")
MOST = 10**9
"""Spots or genes of one section."""


def read_index(path: Path) -> dict[str, Any]:
    """The index of the store at `path`.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the folder is something else, or of a newer format.
    """
    file = path / "index.json"
    if not file.is_file():
        partial = " (a half-written one waits beside it: run prepare again to finish it)"
        hint = partial if partial_path(path).is_dir() else ""
        raise FileNotFoundError(f"{path}: no patch store here{hint}; brstnet prepare makes one")
    try:
        index = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; prepare the store again") from error
    return check_index(index, str(file))


def parse_index(text: bytes, source: str) -> dict[str, Any]:
    """The index in this text.

    Raises:
        ValueError: it is none; the message names `source`.
    """
    return check_index(parse_json(text, source), source)


def check_index(index: dict[str, Any], source: str) -> dict[str, Any]:
    """The index itself, if it is one.

    Raises:
        ValueError: it is of something else or of a newer format, or names what cannot be a
            section's file.
    """
    if index.get("format") != FORMAT:
        raise ValueError(f"{source}: format is {index.get('format')!r}, a store has {FORMAT!r}")
    if not isinstance(index.get("version"), int) or index["version"] > VERSION:
        raise ValueError(
            f"{source}: the store has format version {index.get('version')}, this brstnet reads up "
            f"to {VERSION}: update brstnet, or prepare the store again"
        )
    if fault := _fault(index):
        raise ValueError(f"{source}: {fault}; nothing of this store is read: prepare it again")
    return index


def _fault(index: dict[str, Any]) -> str:
    """What is wrong with an index, or nothing."""
    prepare = index.get("prepare")
    if not isinstance(prepare, dict) or not _count(prepare.get("input_px")):
        return "prepare must be a mapping with input_px, a number of pixels"
    if not _count(index.get("genes")):
        return f"genes must be a number from 0 to {MOST}, got {index.get('genes')!r:.100}"
    if not isinstance(index.get("sections"), list) or not index["sections"]:
        return "sections must be a list of sections"
    if not isinstance(index.get("files", {}), dict) or set(index.get("files", {})) - {TABLE}:
        return f"files must be {TABLE} and its hash, got {sorted(index['files'])!r:.200}"
    seen: set[str] = set()
    for entry in index["sections"]:
        if not isinstance(entry, dict) or not plain_name(entry.get("section")):
            name = entry.get("section") if isinstance(entry, dict) else entry
            return f"a section must have a plain name, which can be a folder's, got {name!r:.200}"
        if (name := entry["section"]).casefold() in seen or name in RESERVED:
            return f"section {name!r} is there twice, or has a name of the store's own"
        seen.add(name.casefold())
        if fault := _fault_of_entry(entry):
            return f"section {name!r}: {fault}"
    return ""


def _fault_of_entry(entry: dict[str, Any]) -> str:
    if not isinstance(entry.get("patient"), str):
        return "patient must be a name"
    if wrong := [key for key in ("spots_raw", "spots_kept", "genes") if not _count(entry.get(key))]:
        return f"{wrong[0]} must be a number from 0 to {MOST}, got {entry.get(wrong[0])!r:.100}"
    files = entry.get("files")
    if not isinstance(files, dict) or set(files) != set(SECTION_FILES):
        return f"files must be {', '.join(SECTION_FILES)}, got {files!r:.300}"
    if wrong := [n for n, value in files.items() if not HASH.fullmatch(str(value))]:
        return f"{wrong[0]} must have a SHA-256, got {files[wrong[0]]!r:.100}"
    return ""


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def digest(index: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for the store's whole content."""
    return fingerprint([(e["section"], e["files"]) for e in index["sections"]])


def hashes(index: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of every file, by its name in the store; patches last."""
    found = dict(index.get("files", {}))
    for name in reversed(SECTION_FILES):
        found |= {f"{e['section']}/{name}": e["files"][name] for e in index["sections"]}
    return found


def partial_path(store: Path) -> Path:
    """Where a store is written before it is whole."""
    return store.with_name(store.name + ".partial")
