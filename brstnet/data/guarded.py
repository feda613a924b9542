"""Reading files that somebody else may have made.

Nothing is unpickled, nothing is followed out of its folder, and what a file claims to hold is
looked at before memory is taken for it.
"""

import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

MOST_JSON = 1 << 28
"""Bytes of a JSON file."""

MOST_CELLS = 1 << 29
"""Rows times columns of a table."""

MOST_UNPACKED = 100
"""How often its own size an HDF5 file may claim to hold; LZF, which we write, gives 88 at most."""

SMALL = 1 << 28
"""Bytes that an HDF5 file may claim in any case."""


def plain_name(name: object) -> bool:
    """Whether it can name one file in a folder, and nothing outside of it, on any system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 200
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set('/\\:*?"<>|')
    )


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder.

    Raises:
        ValueError: it leads out of the folder, by its name or by a link.
    """
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{file}: leads out of {folder}, to {file.resolve()}: nothing outside is read or "
            "written; put the file itself there"
        )
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ValueError: it is none, or absurdly large.
    """
    if (size := file.stat().st_size) > MOST_JSON:
        raise ValueError(f"{file}: {size} bytes, at most {MOST_JSON} are read as JSON")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """The mapping in a JSON text.

    Raises:
        ValueError: it is none; the message names `source`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: damaged, this is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: must hold a mapping, got a {type(values).__name__}")
    return values


def map_array(file: Path) -> np.ndarray:
    """The array in a .npy file, memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, holds objects, or is shorter than it says.
    """
    try:
        array: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file}: cannot be mapped as a plain array: {error}") from error
    return array


def read_table(file: Path) -> pd.DataFrame:
    """The table in a parquet file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or claims more cells than fit anywhere.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    try:
        facts = pq.read_metadata(file)
        if facts.num_rows * facts.num_columns > MOST_CELLS:
            raise ValueError(f"claims {facts.num_rows} rows of {facts.num_columns} columns")
        return pd.read_parquet(file)
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError) as error:
        raise ValueError(f"{file}: cannot be read as a table: {error}") from error
    except pa.ArrowException as error:
        raise ValueError(f"{file}: cannot be read as a table: {error}") from error


def read_counts(file: Path) -> anndata.AnnData:
    """Spots and their counts (CSR) of an .h5ad file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, refers to other files, or is inconsistent.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing")
    try:
        check_hdf5(file)
        adata = anndata.read_h5ad(file)
        if not sparse.issparse(adata.X) or adata.X.format != "csr":
            raise ValueError(f"X must be CSR, got {type(adata.X).__name__}")
        # SciPy walks through memory as the row pointers say, without looking.
        adata.X.check_format(full_check=True)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as counts: {error}") from error
    except (RuntimeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file}: cannot be read as counts: {error}") from error
    return adata


def check_hdf5(file: Path) -> None:
    """Refuse an HDF5 file that refers to others, or unpacks to far more than it is.

    Raises:
        ValueError: it does.
    """
    claimed = 0

    def look(name: str, item: h5py.Group | h5py.Dataset) -> None:
        nonlocal claimed
        if isinstance(item, h5py.Group):
            for key in item:
                if not isinstance(item.get(key, getlink=True), h5py.HardLink):
                    raise ValueError(f"{name}/{key} is a link: nothing elsewhere is read")
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise ValueError(f"{name} has its data in other files: they are not read")
            claimed += int(item.size or 0) * item.dtype.itemsize

    with h5py.File(file, "r") as content:
        look("", content)
        content.visititems(look)
    if claimed > max(SMALL, MOST_UNPACKED * (size := file.stat().st_size)):
        raise ValueError(f"claims to hold {claimed} bytes in a file of {size}")
