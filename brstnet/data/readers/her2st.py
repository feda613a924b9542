"""Andersson et al. 2021 (github almaan/her2st): slides, counts and spots in sibling folders."""

from pathlib import Path

import numpy as np
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

SUBTYPE = "HER2"
COLUMNS = ("x", "y", "pixel_x", "pixel_y")
COUNTS = ("ST-cnts", "counts")
SPOTS = ("ST-spotfiles", "spots")
LABELS = ("ST-pat/lbl", "labels")


def find(raw: Path) -> Listing:
    """The sections that have a slide; the patient is the first letter of the section.

    Counts without a slide are left alone, and named. Folders may have the names of the original
    (ST-imgs, ST-cnts, ST-spotfiles, ST-pat/lbl) or short ones (images, counts, spots, labels).
    A slide's counts and spots are named whether they are there or not: `read` says what is missing.

    Raises:
        ValueError: no slides, two slides of one section.
    """
    slides = _slides(raw)
    counts = _by_section(raw, COUNTS, (".tsv.gz", ".tsv"))
    spots = _by_section(raw, SPOTS, ("_selection.tsv",))
    labels = _by_section(raw, LABELS, ("_labeled_coordinates.tsv",))
    faults = Faults(raw)
    if not slides:
        faults.add(None, f"{raw}: no slides under ST-imgs/PATIENT/SECTION/*.jpg or images/*.jpg")
    for section, paths in slides.items():
        if len(paths) > 1:
            faults.add(paths[1], f"section {section} has {len(paths)} slides; keep one")
    faults.raise_any()
    return Listing(
        sections=[
            SectionFiles(
                section=section,
                patient=section[0],
                subtype=SUBTYPE,
                slide=slides[section][0],
                counts=counts.get(section) or _there(raw, COUNTS) / f"{section}.tsv.gz",
                spots=spots.get(section) or _there(raw, SPOTS) / f"{section}_selection.tsv",
                labels=labels.get(section),
            )
            for section in sorted(slides)
        ],
        left_alone=dict.fromkeys(sorted(set(counts) - set(slides)), "counts without a slide"),
    )


def _slides(raw: Path) -> dict[str, list[Path]]:
    slides: dict[str, list[Path]] = {}
    for path in sorted(raw.glob("ST-imgs/*/*/*.jpg")):
        slides.setdefault(path.parent.name, []).append(path)
    for path in sorted(raw.glob("images/*.jpg")):
        slides.setdefault(path.stem, []).append(path)
    return slides


def _by_section(raw: Path, folders: tuple[str, ...], endings: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for ending in endings:
            for path in sorted((raw / folder).glob(f"*{ending}")):
                found.setdefault(path.name.removesuffix(ending), path)
    return found


def _there(raw: Path, folders: tuple[str, ...]) -> Path:
    """The folder of one kind of file: the first that is there, else the original's name."""
    return next((raw / f for f in folders if (raw / f).is_dir()), raw / folders[0])


def read(files: SectionFiles) -> RawSection:
    """One section's spots and counts.

    Raises:
        ValueError: files are missing, damaged or hold what cannot be; all faults are listed.
    """
    faults = Faults()
    with faults.collecting():
        spots, selected = _spots(files.spots)
    with faults.collecting():
        counted = read_counts(files.counts)
    with faults.collecting():
        labels = _labels(files.labels)
    faults.raise_any()
    lost = dict.fromkeys(spots.index[~selected], "not_selected")
    return join(files, spots[selected], counted, labels, lost)


def _spots(path: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """All spots, and which of them were selected, (N,) bool."""
    table = read_table(path, "\t")
    if lacking := [name for name in COLUMNS if name not in table.columns]:
        raise ValueError(f"{path}: needs the columns {', '.join(COLUMNS)}; lacks {lacking}")
    chosen = table["selected"] if "selected" in table else pd.Series(1, index=table.index)
    selected = chosen.to_numpy() == 1
    ids = pd.Index(table["x"].astype(str) + "x" + table["y"].astype(str))
    return spot_table(path, ids, table["pixel_x"], table["pixel_y"], selected), selected


def _labels(path: Path | None) -> pd.Series | None:
    return None if path is None else labels_by_spot(path, read_table(path, "\t"))
