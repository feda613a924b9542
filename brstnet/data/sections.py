"""What a raw section is, whatever its layout, and the checks it passes on its way in."""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from brstnet.data.genes import strip_version

ARRAY_PITCH_UM = 200.0
"""Centre to centre of two neighbouring spots of a Spatial Transcriptomics array (Stahl 2016)."""


@dataclass(frozen=True, kw_only=True)
class SectionFiles:
    """Where one section's raw files are."""

    section: str
    patient: str
    slide: Path
    counts: Path
    spots: Path
    subtype: str = ""
    labels: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The sections of a raw folder, and what was left alone, with the reason."""

    sections: Sequence[SectionFiles]
    left_alone: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RawSection:
    """One section as read: every spot that has both a position and counts, and those that lack one.

    `spots` is indexed by spot id ("XxY") with array_x, array_y, pixel_x, pixel_y (floats, slide
    pixels) and label; `counts` is CSR (spots, genes), in the order of `spots`; `lost` gives the
    reason of every other raw spot.
    """

    files: SectionFiles
    spots: pd.DataFrame
    counts: sparse.csr_matrix
    genes: pd.Index
    lost: pd.Series


class Faults:
    """Collects what is wrong with a folder, so that the user hears of all of it at once.

    Args:
        raw: the folder, for the heading; None for a part of one, which has no heading.
    """

    def __init__(self, raw: Path | None = None) -> None:
        self.raw = raw
        self.found: list[str] = []

    def add(self, path: Path | None, what: str) -> None:
        """Note one fault, with the file it is in."""
        self.found.append(f"{path}: {what}" if path else what)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note a ValueError or a missing file raised inside as one fault, and go on."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.found += str(error).splitlines()

    def raise_any(self) -> None:
        """Raise all that was found as one ValueError."""
        if self.found and self.raw is None:
            raise ValueError("\n".join(self.found))
        if self.found:
            listed = "\n".join(f"  - {fault}" for fault in self.found)
            raise ValueError(f"{self.raw}: {len(self.found)} fault(s) in the raw data:\n{listed}")


def read_table(path: Path, sep: str, **options: object) -> pd.DataFrame:
    """A delimited text file, plain or gzip.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or no table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file")
    try:
        return pd.read_csv(path, sep=sep, **options)  # type: ignore[call-overload]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: truncated or damaged gzip file: {error}; fetch it again"
        ) from error


def read_counts(path: Path) -> tuple[sparse.csr_matrix, pd.Index, pd.Index]:
    """A count matrix of spots x genes as int32 CSR, its spot ids and its gene ids.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: duplicate or malformed ids, or counts that are not whole numbers >= 0.
    """
    table = read_table(path, "\t", index_col=0)
    table.index = table.index.astype(str)
    faults = _duplicates("gene", strip_version(pd.Index(_header(path))))
    faults += _duplicates("spot", table.index) + _malformed(table.index) + _count_faults(table)
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    counts = sparse.csr_matrix(table.to_numpy(np.int32))
    return counts, table.index, table.columns.astype(str)


def _duplicates(what: str, ids: pd.Index) -> list[str]:
    return [f"duplicate {what} id {i!r}" for i in ids[ids.duplicated()].unique()[:5]]


def _malformed(ids: Iterable[str]) -> list[str]:
    wrong = [i for i in ids if not re.fullmatch(r"-?[0-9]+x-?[0-9]+", i)]
    return [f"spot id {i!r} must be COLUMNxROW, as in 11x17" for i in wrong[:5]]


def _header(path: Path) -> list[str]:
    """The gene ids as the file has them: pandas would rename a second GENE to GENE.1."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return file.readline().rstrip("\r\n").split("\t")[1:]


def _count_faults(table: pd.DataFrame) -> list[str]:
    """What is not a whole number >= 0, the first place of each kind."""
    text = [n for n, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if text:
        column = table[text[0]]
        found = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        return [f"gene {text[0]} holds text where counts must be: {found.head(1).to_dict()}"]
    values = table.to_numpy(np.float64)
    wrong = {
        "negative count": values < 0,
        "fractional count": np.isfinite(values) & (values != np.floor(values)),
        "missing count": ~np.isfinite(values),
        "count above 2^31": values >= 2**31,
    }
    faults = []
    for what, where in wrong.items():
        if where.any():
            row, column = np.argwhere(where)[0]
            place = f"spot {table.index[row]}, gene {table.columns[column]}"
            faults.append(
                f"{what} {values[row, column]} at {place} ({int(where.sum())} in all); "
                "counts must be whole numbers of at least 0, as sequenced"
            )
    return faults


def spot_table(
    path: Path,
    ids: pd.Index,
    pixel_x: pd.Series,
    pixel_y: pd.Series,
    taken: np.ndarray | None = None,
) -> pd.DataFrame:
    """Spots by id, with array_x, array_y, pixel_x, pixel_y.

    Args:
        path: the file they come from.
        ids: COLUMNxROW of each spot.
        pixel_x: column of its centre on the slide.
        pixel_y: row of its centre on the slide.
        taken: which spots must have a position; by default all.

    Raises:
        ValueError: duplicate or malformed ids, or positions that are not numbers.
    """
    faults = _duplicates("spot", ids) + _malformed(ids)
    pixels_N2 = np.column_stack([pd.to_numeric(p, errors="coerce") for p in (pixel_x, pixel_y)])
    lost = ~np.isfinite(pixels_N2).all(axis=1) & (True if taken is None else taken)
    faults += [f"spot {spot!r} has no pixel position" for spot in ids[lost][:5]]
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    array_N2 = np.array([i.split("x") for i in ids], dtype=np.int64).reshape(-1, 2)
    columns = ["array_x", "array_y", "pixel_x", "pixel_y"]
    values = [*array_N2.T, *pixels_N2.T]
    return pd.DataFrame(dict(zip(columns, values, strict=True)), index=ids)


def labels_by_spot(path: Path, table: pd.DataFrame) -> pd.Series:
    """Pathologist's `label` by spot id; x and y are array positions, not always whole: rounded.

    Raises:
        ValueError: a column is missing, or a position is text.
    """
    if lacking := [name for name in ("x", "y", "label") if name not in table.columns]:
        raise ValueError(f"{path}: needs the columns x, y and label; lacks {lacking}")
    placed = table[table["x"].notna() & table["y"].notna()]
    try:
        array = placed[["x", "y"]].astype(float).round().astype(int).astype(str)
    except ValueError as error:
        raise ValueError(f"{path}: x and y of a label must be numbers: {error}") from error
    labels = pd.Series(placed["label"].to_numpy(), index=array["x"] + "x" + array["y"])
    return labels[~labels.index.duplicated()]


def check_inside(files: SectionFiles, spots: pd.DataFrame, width: int, height: int) -> None:
    """Check that every spot's centre lies on the slide.

    Raises:
        ValueError: one does not, which means wrong coordinates or the wrong slide.
    """
    x, y = spots["pixel_x"], spots["pixel_y"]
    outside = spots.index[(x < 0) | (y < 0) | (x >= width) | (y >= height)]
    if len(outside):
        first = spots.loc[outside[0]]
        raise ValueError(
            f"{files.spots}: {len(outside)} spot(s) lie outside the slide, the first {outside[0]} "
            f"at x {first.pixel_x:.0f}, y {first.pixel_y:.0f}, where {files.slide.name} has "
            f"{width} x {height} px: coordinates and slide must belong together, at one scale"
        )


def join(
    files: SectionFiles,
    spots: pd.DataFrame,
    counted: tuple[sparse.csr_matrix, pd.Index, pd.Index],
    labels: pd.Series | None,
    lost: dict[str, str] | None = None,
) -> RawSection:
    """Bring a section's spot table and its counts together, in the order of the spot table.

    Args:
        files: where the section comes from.
        spots: indexed by spot id, with array_x, array_y, pixel_x, pixel_y.
        counted: what `read_counts` gives.
        labels: pathologist's label by spot id, if there is one.
        lost: spots that the layout itself rules out, with the reason.

    Raises:
        ValueError: no spot stands in both.
    """
    counts, ids, genes = counted
    reasons = dict(lost or {})
    reasons |= {s: "not_under_tissue" for s in ids if s not in spots.index and s not in reasons}
    reasons |= dict.fromkeys(spots.index.difference(ids, sort=False), "no_counts")
    both = spots.index[spots.index.isin(ids)]
    if both.empty:
        raise ValueError(
            f"{files.counts}: none of its {len(ids)} spots is among the {len(spots)} spots of "
            f"{files.spots.name}: both must be of one section, with the same ids"
        )
    kept = spots.loc[both].copy()
    kept["label"] = "" if labels is None else labels.reindex(both).fillna("").astype(str)
    rows = counts[ids.get_indexer(both)]
    return RawSection(
        files=files,
        spots=kept,
        counts=rows,
        genes=genes,
        lost=pd.Series(reasons, dtype=object, name="status"),
    )


def um_per_px(spots: pd.DataFrame) -> float:
    """Size of a slide pixel in um, from the array's pitch; NaN with fewer than three spots.

    The pixel positions are fitted as an affine map of the array positions; the square root of its
    determinant is the pitch in pixels (formats.md: about 291 px, so 0.69 um/px).

    On her2st's B4 and C2 to C5 it is 0.6857 to 0.6890, with a standard error of 0.08 % each (spots
    drawn anew; they lie 17 px beside the fitted array, root mean square). Columns and rows differ
    by up to 0.9 %, where a slide has one scale: take it as right to 1 %, if the array's nominal
    pitch is.
    """
    array = np.column_stack([spots[["array_x", "array_y"]].to_numpy(float), np.ones(len(spots))])
    if np.linalg.matrix_rank(array) < 3:
        return float("nan")
    pixels = spots[["pixel_x", "pixel_y"]].to_numpy(float)
    affine = np.linalg.lstsq(array, pixels, rcond=None)[0][:2]
    return float(ARRAY_PITCH_UM / np.sqrt(abs(np.linalg.det(affine))))
