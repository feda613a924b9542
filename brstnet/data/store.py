"""The patch store: a folder with one sub-folder a section, an index, and a hash of every file.

STORE/index.json            format, version, prepare settings, stain target, sections, hashes
STORE/genes.parquet         all genes of the store: id, symbol
STORE/<section>/patches.npy     uint8 (N, H, W, 3), to be memory-mapped
STORE/<section>/spots.h5ad      raw counts (CSR), position, white fraction, total, label
STORE/<section>/ledger.parquet  every raw spot: kept, or the reason it was not
STORE/derived/<hash>.npy    shrunk patches, features of frozen backbones; may be removed at any time
"""

import hashlib
import math
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
from brstnet.data.guarded import inside, map_array, read_counts, read_table
from brstnet.data.index import TABLE, digest, hashes, read_index
from brstnet.data.patches import resize


class Store:
    """An opened patch store. Counts stay raw; whatever is fitted is fitted by a fold.

    Args:
        path: the store's folder.
        origin: where it is a copy from.
        address: what another process opens to get the same store; the folder, if it is no copy.
        bring: brings a section's patches, where the copy is made as they are asked for.

    Raises:
        FileNotFoundError: there is no store, or a file of it is missing.
        ValueError: the folder is no store, one of a newer format, or leads out of itself.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        origin: str | None = None,
        address: str | None = None,
        bring: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.origin = origin or str(path)
        self.address = address or str(self.path.resolve())
        self._bring = bring
        self._at_hand: dict[str, anndata.AnnData] | None = None
        self.index = read_index(self.path)
        for name in (TABLE, *hashes(self.index)):
            file = inside(self.path, name)
            if not file.is_file() and not (bring and file.name == "patches.npy"):
                raise FileNotFoundError(
                    f"{file}: missing from the store; remove the store and prepare it again"
                )

    @property
    def name(self) -> str:
        """What the store is called where it comes from."""
        return self.origin.rstrip("/").rpartition("/")[2]

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
        table = read_table(inside(self.path, TABLE))
        if len(table) != self.index["genes"] or "symbol" not in table:
            raise ValueError(
                f"{self.path / TABLE}: must have {self.index['genes']} genes and the column "
                f"symbol, has {len(table)} and {', '.join(map(str, table.columns))}"
            )
        return table

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the store's whole content."""
        return digest(self.index)

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

    def um_per_px(self, sections: Iterable[str]) -> dict[str, float | None]:
        """Microns that a pixel of each section's slide spans; None where its spots do not say it.

        From the pitch of the array, when the store was made: `brstnet.data.sections.um_per_px` says
        how, and how wrong it can be.

        Raises:
            ValueError: the index holds something else.
        """
        found = {name: self.sections[name].get("um_per_px") for name in sections}
        for name, um in found.items():
            if um is not None and not (isinstance(um, float | int) and 0 < um < math.inf):
                raise ValueError(
                    f"{self.path}: um_per_px of section {name!r} must be a number above 0, got "
                    f"{um!r:.100}: prepare the store again"
                )
        return found

    def patches(self, section: str, side_px: int | None = None) -> np.ndarray:
        """Patches of a section, uint8 (N, H, W, 3), memory-mapped.

        Shrunk to `side_px` by area, as prepare would have made them; those are kept in the store's
        folder, in `derived/`.
        """
        if side_px in (None, self.input_px):
            return self._whole_patches(section)
        made_of = {"patches": self.sections[section]["files"]["patches.npy"], "side_px": side_px}

        def shrink() -> np.ndarray:
            whole = self.patches(section)
            return resize(whole, len(whole), side_px)

        return self.derived(made_of, shrink)

    def _whole_patches(self, section: str) -> np.ndarray:
        file = self._file(section, "patches.npy")
        if self._bring is not None:
            self._bring(section)
        patches = map_array(file)
        expected = (self.sections[section]["spots_kept"], self.input_px, self.input_px, 3)
        if patches.shape != expected or patches.dtype != np.uint8:
            raise ValueError(
                f"{file}: must be uint8 {expected}, as the index says, is {patches.dtype} "
                f"{patches.shape}: prepare the store again"
            )
        return patches

    def _file(self, section: str, name: str) -> Path:
        """A section's file; the section may be named by a checkpoint that somebody else made."""
        if section not in self.sections:
            raise ValueError(
                f"{self.origin}: no section {section!r}; it has {', '.join(self.sections)}"
            )
        return inside(self.path, f"{section}/{name}")

    def derived(self, made_of: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """What follows from the store's content, made once and kept beside it, memory-mapped.

        Args:
            made_of: everything that it follows from; its hash is the file's name.
            make: makes it, if it is not there yet. Who may not write there makes it each time.
        """
        file = inside(self.path, f"derived/{fingerprint(made_of)}.npy")
        if file.is_file():
            return map_array(file)
        array = make()
        scratch = file.with_name(f"{file.stem}.{os.getpid()}.tmp.npy")
        try:
            file.parent.mkdir(exist_ok=True)
            np.save(scratch, array)
            scratch.rename(file)
            return map_array(file)
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
        return read_table(self._file(section, "ledger.parquet"))

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Within, the counts of a section are read from disk once and kept in memory."""
        before = self._at_hand
        self._at_hand = {} if before is None else before
        try:
            yield
        finally:
            self._at_hand = before

    def _adata(self, section: str) -> anndata.AnnData:
        if self._at_hand is None:
            return self._read_spots(section)
        if section not in self._at_hand:
            self._at_hand[section] = self._read_spots(section)
        return self._at_hand[section]

    def _read_spots(self, section: str) -> anndata.AnnData:
        file = self._file(section, "spots.h5ad")
        adata, kept = read_counts(file), self.sections[section]["spots_kept"]
        if adata.n_obs != kept or not adata.var_names.isin(self.genes.index).all():
            raise ValueError(
                f"{file}: must have {kept} spots, as the index says, and no genes but the store's, "
                f"has {adata.n_obs} and {adata.n_vars} genes: prepare the store again"
            )
        return adata

    def verify(self) -> list[str]:
        """Read every file and compare it with its hash; the names of those that differ."""
        expected = hashes(self.index)
        return [n for n, value in expected.items() if sha256(inside(self.path, n)) != value]

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


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
