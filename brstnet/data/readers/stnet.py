"""The paper's data set (Mendeley Data 29ntw7sh4r): a flat folder with a `metadata.csv`."""

import gzip
import io
from pathlib import Path

import pandas as pd

from brstnet.data.sections import (
    Faults,
    Listing,
    RawSection,
    SectionFiles,
    array_position,
    join,
    read_table,
)

COLUMNS = (
    "type",
    "patient",
    "replicate",
    "histology_image",
    "spot_coordinates",
    "count_matrix",
    "tumor_annotation",
)


def find(raw: Path) -> Listing:
    """The sections that `metadata.csv` names.

    File names come from the table, since the prefixes BT and BC are mixed within one section.

    Raises:
        FileNotFoundError: there is no `metadata.csv`.
        ValueError: columns, names or files are missing or stand twice; all of them are listed.
    """
    path = raw / "metadata.csv"
    table = read_table(path, ",", dtype=str, keep_default_na=False)
    missing = [name for name in COLUMNS[:-1] if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: needs the columns {', '.join(COLUMNS)}; lacks {missing}")
    faults = Faults(raw)
    sections = [_section(raw, dict(zip(table.columns, row, strict=True))) for row in table.values]
    for name in sorted({s.section for s in sections if _count(sections, s.section) > 1}):
        faults.add(path, f"section {name} stands {_count(sections, name)} times")
    for files in sections:
        for kind in (files.slide, files.counts, files.spots):
            if not kind.is_file():
                faults.add(kind, f"missing file, named by metadata.csv for {files.section}")
    if not sections:
        faults.add(path, "names no section")
    faults.raise_any()
    return Listing(sections=sorted(sections, key=lambda s: s.section))


def _count(sections: list[SectionFiles], name: str) -> int:
    return sum(s.section == name for s in sections)


def _section(raw: Path, row: dict[str, str]) -> SectionFiles:
    labels = raw / row["tumor_annotation"] if row.get("tumor_annotation") else None
    return SectionFiles(
        section=f"{row['patient']}_{row['replicate']}",
        patient=row["patient"],
        subtype=row["type"],
        slide=raw / row["histology_image"],
        counts=raw / row["count_matrix"],
        spots=raw / row["spot_coordinates"],
        labels=labels if labels and labels.is_file() else None,  # users report it missing
    )


def read(files: SectionFiles) -> RawSection:
    """One section's spots and counts.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds what cannot be.
    """
    table = read_table(files.spots, ",", index_col=0)
    if not {"X", "Y"} <= set(table.columns):
        raise ValueError(f"{files.spots}: needs the columns X and Y, has {list(table.columns)}")
    table.index = table.index.astype(str)
    array = array_position(table.index, files.spots)
    spots = pd.DataFrame(
        {
            "array_x": array[:, 0],
            "array_y": array[:, 1],
            "pixel_x": pd.to_numeric(table["X"], errors="coerce"),
            "pixel_y": pd.to_numeric(table["Y"], errors="coerce"),
        },
        index=table.index,
    )
    return join(files, spots, _labels(files.labels))


def _labels(path: Path | None) -> pd.Series | None:
    """Tumour label by spot id; CR line ends, four names over five columns, x and y to round."""
    if path is None:
        return None
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        lines = file.read().replace("\r\n", "\n").replace("\r", "\n")
    names = ["id", "x", "y", "number", "label"]
    table = pd.read_csv(io.StringIO(lines), sep="\t", skiprows=1, header=None, names=names)
    ids = (
        table["x"].round().astype(int).astype(str)
        + "x"
        + table["y"].round().astype(int).astype(str)
    )
    labels = pd.Series(table["label"].to_numpy(), index=ids.to_numpy())
    return labels[~labels.index.duplicated()]
