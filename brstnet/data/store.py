"""The patch store: a folder with one sub-folder a section, an index, and a hash of every file.

STORE/index.json            format, version, prepare settings, stain target, sections, hashes
STORE/genes.parquet         all genes of the store: id, symbol
STORE/<section>/patches.npy     uint8 (N, H, W, 3), to be memory-mapped
STORE/<section>/spots.h5ad      raw counts (CSR), position, white fraction, total, label
STORE/<section>/ledger.parquet  every raw spot: kept, or the reason it was not
STORE/derived/<hash>.npy    shrunk patches, features of frozen backbones; may be removed at any time
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from brstnet.config import fingerprint
from brstnet.data.patches import resize

FORMAT = "brstnet-store"
VERSION = 1
SECTION_FILES = ("patches.npy", "spots.h5ad", "ledger.parquet")


class Store:
    """An opened patch store. Counts stay raw; whatever is fitted is fitted by a fold.

    Args:
        path: the store's folder.

    Raises:
        FileNotFoundError: there is no store, or a file of it is missing.
        ValueError: the folder is no store, or one of a newer format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._at_hand: dict[str, anndata.AnnData] | None = None
        self.index = read_index(self.path)
        names = [f"{e['section']}/{name}" for e in self.index["sections"] for name in SECTION_FILES]
        for name in ("genes.parquet", *names):
            if not (file := self.path / name).is_file():
                raise FileNotFoundError(
                    f"{file}: missing from the store; remove the store and prepare it again"
                )

    @cached_property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The index entry of each section, by name."""
        return {entry["section"]: entry for entry in self.index["sections"]}

    @cached_property
    def patients(self) -> list[str]:
        """All patients, sorted."""
        return sorted({entry["patient"] for entry in self.index["sections"]})

    @cached_property
    def genes(self) -> pd.DataFrame:
        """All genes of the store, index `gene` (id), column `symbol`."""
        return pd.read_parquet(self.path / "genes.parquet")

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the store's whole content."""
        return fingerprint([(e["section"], e["files"]) for e in self.index["sections"]])

    @property
    def input_px(self) -> int:
        """Side of the stored patches, in pixels."""
        return int(self.index["prepare"]["input_px"])

    def of_patients(self, patients: Iterable[str]) -> list[str]:
        """Names of the sections of these patients.

        Raises:
            ValueError: a patient is not in the store.
        """
        wanted = set(patients)
        if unknown := sorted(wanted - set(self.patients)):
            raise ValueError(
                f"{self.path}: no patient {', '.join(unknown)}; it has {', '.join(self.patients)}"
            )
        return [n for n, entry in self.sections.items() if entry["patient"] in wanted]

    def patches(self, section: str, side_px: int | None = None) -> np.ndarray:
        """Patches of a section, uint8 (N, H, W, 3), memory-mapped.

        Shrunk to `side_px` by area, as prepare would have made them; those are kept in the store's
        folder, in `derived/`.
        """
        if side_px in (None, self.input_px):
            return _mapped(self.path / section / "patches.npy")
        made_of = {"patches": self.sections[section]["files"]["patches.npy"], "side_px": side_px}

        def shrink() -> np.ndarray:
            whole = self.patches(section)
            return resize(whole, len(whole), side_px)

        return self.derived(made_of, shrink)

    def derived(self, made_of: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """What follows from the store's content, made once and kept beside it, memory-mapped.

        Args:
            made_of: everything that it follows from; its hash is the file's name.
            make: makes it, if it is not there yet. Who may not write there makes it each time.
        """
        file = self.path / "derived" / f"{fingerprint(made_of)}.npy"
        if file.is_file():
            return _mapped(file)
        array = make()
        scratch = file.with_name(f"{file.stem}.{os.getpid()}.tmp.npy")
        try:
            file.parent.mkdir(exist_ok=True)
            np.save(scratch, array)
            scratch.rename(file)
            return _mapped(file)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            warnings.warn(
                f"{file.parent}: nothing can be kept here ({error.strerror}): what is derived from "
                "the store is made anew by every run",
                stacklevel=2,
            )
        return array

    def spots(self, sections: Sequence[str]) -> pd.DataFrame:
        """Kept spots of these sections in order, with `section`, `patient` and `spot` columns."""
        parts = [self._adata(name).obs for name in sections]
        joined = [
            part.assign(section=name, patient=self.sections[name]["patient"], spot=part.index)
            for name, part in zip(sections, parts, strict=True)
        ]
        return pd.concat(joined, ignore_index=True)

    def counts(self, sections: Sequence[str]) -> sparse.csr_matrix:
        """Raw counts of these sections, CSR (spots, genes of the store); an absent gene is zero."""
        parts = []
        for name in sections:
            adata = self._adata(name)
            columns = self.genes.index.get_indexer(adata.var_names)
            counts = adata.X.tocoo()
            parts.append(
                sparse.csr_matrix(
                    (counts.data, (counts.row, columns[counts.col])),
                    shape=(adata.n_obs, len(self.genes)),
                )
            )
        return sparse.vstack(parts, format="csr")

    def ledger(self, section: str) -> pd.DataFrame:
        """Every raw spot of a section, with `status` kept or the reason it was not."""
        return pd.read_parquet(self.path / section / "ledger.parquet")

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Within, the counts of a section are read from disk once and kept in memory."""
        self._at_hand = {}
        try:
            yield
        finally:
            self._at_hand = None

    def _adata(self, section: str) -> anndata.AnnData:
        if self._at_hand is None:
            return anndata.read_h5ad(self.path / section / "spots.h5ad")
        if section not in self._at_hand:
            self._at_hand[section] = anndata.read_h5ad(self.path / section / "spots.h5ad")
        return self._at_hand[section]

    def verify(self) -> list[str]:
        """Read every file and compare it with its hash; the names of those that differ."""
        hashes = dict(self.index.get("files", {}))
        for section, entry in self.sections.items():
            hashes |= {f"{section}/{name}": expected for name, expected in entry["files"].items()}
        return [name for name, expected in hashes.items() if sha256(self.path / name) != expected]

    def info(self) -> dict[str, Any]:
        """Facts for people and programs: what `brstnet info --json` prints."""
        keys = ("format", "version", "brstnet", "genes", "gene_names", "prepare", "stain_target")
        return {
            **{key: self.index[key] for key in keys},
            "digest": self.digest,
            "patients": self.patients,
            "sections": self.index["sections"],
            "left_alone": self.index["left_alone"],
        }


def _mapped(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r")
    return array


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
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file}: the index is damaged: {error}; prepare the store again"
        ) from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{file}: format is {index.get('format')!r}, a store has {FORMAT!r}")
    if index["version"] > VERSION:
        raise ValueError(
            f"{file}: the store has format version {index['version']}, this brstnet reads up to "
            f"{VERSION}: update brstnet, or prepare the store again"
        )
    return index


def partial_path(store: Path) -> Path:
    """Where a store is written before it is whole."""
    return store.with_name(store.name + ".partial")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
