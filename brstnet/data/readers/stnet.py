"""The paper's data set (Mendeley Data 29ntw7sh4r): a flat folder with a `metadata.csv`."""

from pathlib import Path

import pandas as pd

from brstnet.data.sections import (
    Faults,
    Listing,
    RawSection,
    SectionFiles,
    join,
    labels_by_spot,
    read_counts,
    read_table,
    spot_table,
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
        ValueError: columns or names are missing or stand twice; all of them are listed.
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
    for column in COLUMNS[1:-1]:
        for files in (s for s, name in zip(sections, table[column], strict=True) if not name):
            faults.add(path, f"section {files.section} has no {column}")
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
        ValueError: files are missing, damaged or hold what cannot be; all faults are listed.
    """
    faults = Faults()
    with faults.collecting():
        spots = _spots(files.spots)
    with faults.collecting():
        counted = read_counts(files.counts)
    with faults.collecting():
        labels = _labels(files.labels)
    faults.raise_any()
    return join(files, spots, counted, labels)


def _spots(path: Path) -> pd.DataFrame:
    table = read_table(path, ",", index_col=0)
    if not {"X", "Y"} <= set(table.columns):
        raise ValueError(f"{path}: needs the columns X and Y, has {list(table.columns)}")
    return spot_table(path, table.index.astype(str), table["X"], table["Y"])


def _labels(path: Path | None) -> pd.Series | None:
    """Tumour label by spot id; CR line ends, and a header of four names over five columns."""
    if path is None:
        return None
    names = ["id", "x", "y", "number", "label"]
    return labels_by_spot(path, read_table(path, "\t", skiprows=1, header=None, names=names))
