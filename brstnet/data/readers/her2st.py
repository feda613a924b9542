"""Andersson et al. 2021 (github almaan/her2st): slides, counts and spots in sibling folders."""

from pathlib import Path

import pandas as pd

from brstnet.data.sections import Faults, Listing, RawSection, SectionFiles, join, read_table

SUBTYPE = "HER2"
COLUMNS = ("x", "y", "pixel_x", "pixel_y")


def find(raw: Path) -> Listing:
    """The sections that have a slide; the patient is the first letter of the section.

    Counts without a slide are left alone, and named. Folders may have the names of the original
    (ST-imgs, ST-cnts, ST-spotfiles, ST-pat/lbl) or short ones (images, counts, spots, labels).

    Raises:
        ValueError: no slides, a slide without counts or spots, two slides of one section.
    """
    slides = _slides(raw)
    counts = _by_section(raw, ("ST-cnts", "counts"), (".tsv.gz", ".tsv"))
    spots = _by_section(raw, ("ST-spotfiles", "spots"), ("_selection.tsv",))
    labels = _by_section(raw, ("ST-pat/lbl", "labels"), ("_labeled_coordinates.tsv",))
    faults = Faults(raw)
    if not slides:
        faults.add(None, f"{raw}: no slides under ST-imgs/PATIENT/SECTION/*.jpg or images/*.jpg")
    for section, paths in slides.items():
        if len(paths) > 1:
            faults.add(paths[1], f"section {section} has {len(paths)} slides; keep one")
        for what, found in (("counts", counts), ("spots", spots)):
            if section not in found:
                faults.add(paths[0], f"the slide of section {section} has no {what} file")
    faults.raise_any()
    return Listing(
        sections=[
            SectionFiles(
                section=section,
                patient=section[0],
                subtype=SUBTYPE,
                slide=slides[section][0],
                counts=counts[section],
                spots=spots[section],
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


def read(files: SectionFiles) -> RawSection:
    """One section's spots and counts.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds what cannot be.
    """
    table = read_table(files.spots, "\t")
    lacking = [name for name in COLUMNS if name not in table.columns]
    if lacking:
        raise ValueError(f"{files.spots}: needs the columns {', '.join(COLUMNS)}; lacks {lacking}")
    spots = pd.DataFrame(
        {
            "array_x": table["x"],
            "array_y": table["y"],
            "pixel_x": pd.to_numeric(table["pixel_x"], errors="coerce"),
            "pixel_y": pd.to_numeric(table["pixel_y"], errors="coerce"),
        }
    )
    spots.index = pd.Index(table["x"].astype(str) + "x" + table["y"].astype(str))
    selected = table["selected"].to_numpy() == 1 if "selected" in table else slice(None)
    taken = spots.loc[selected]
    lost = dict.fromkeys(spots.index.difference(taken.index, sort=False), "not_selected")
    return join(files, taken, _labels(files.labels), lost)


def _labels(path: Path | None) -> pd.Series | None:
    """Pathologist's label by spot id; x and y are array positions, not whole numbers."""
    if path is None:
        return None
    table = read_table(path, "\t")
    table = table[table["x"].notna() & table["y"].notna()]
    ids = (
        table["x"].round().astype(int).astype(str)
        + "x"
        + table["y"].round().astype(int).astype(str)
    )
    labels = pd.Series(table["label"].to_numpy(), index=ids.to_numpy())
    return labels[~labels.index.duplicated()]
