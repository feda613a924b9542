"""Raw folders of a few planted spots, in both layouts, for the tests to spoil."""

import gzip
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

PITCH_PX = 20
SIZE_PX = (130, 110)  # width, height
GENES = ("ENSG00000000003", "ENSG00000000005", "ENSG00000000419", "ENSG00000000457")


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What a section's files say: counts (spot ids x genes), spots with X and Y, labels, slide."""

    counts: pd.DataFrame
    spots: pd.DataFrame
    labels: dict[str, str]
    slide: np.ndarray


def tiny(seed: int = 0, genes: Iterable[str] = GENES) -> Tiny:
    """A 6 x 5 array: column 0 off the tissue, column 1 too near the border, 2x2 without counts.

    Spot 3x3 has one count in all, so that a filter takes it; every other spot has 10 or more.
    """
    rng = np.random.default_rng(seed)
    ids = [f"{x}x{y}" for x in range(6) for y in range(5)]
    counts = pd.DataFrame(rng.integers(10, 99, (30, len(list(genes)))), ids, list(genes))
    counts.loc["3x3"] = 0
    counts.loc["3x3", counts.columns[0]] = 1
    array = np.array([i.split("x") for i in ids[5:]], int)
    pixels = (array * PITCH_PX + rng.uniform(-1, 1, array.shape) + [-14, 14]).round(2)
    noise = rng.integers(0, 120, (*SIZE_PX[::-1], 3), dtype=np.uint8)
    noise[:, 84:] = 250  # white on the right
    return Tiny(
        counts=counts.drop(index="2x2").sample(frac=1, random_state=seed),
        spots=pd.DataFrame(pixels, ids[5:], ["X", "Y"]).sample(frac=1, random_state=seed + 1),
        labels={"3x1": "tumor", "4x2": "non"},
        slide=noise,
    )


def text(table: pd.DataFrame, sep: str = "\t") -> str:
    return table.to_csv(sep=sep)


def put(path: Path, content: str | bytes) -> None:
    """Write a file, with gzip where its name asks for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def put_slide(path: Path, slide: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(slide).save(path, quality=95)


def write_stnet(raw: Path, sections: dict[str, Tiny]) -> Path:
    """The flat layout; the prefixes BT and BC are mixed, as in the original."""
    rows = []
    for name, section in sections.items():
        patient, replicate = name.split("_")
        stem = name.removeprefix("BC")
        files = {
            "histology_image": f"HE_BT{stem}.jpg",
            "spot_coordinates": f"spots_BT{stem}.csv.gz",
            "count_matrix": f"BC{stem}_stdata.tsv.gz",
            "tumor_annotation": f"BC{stem}_Coords.tsv.gz",
        }
        rows.append({"type": "TNBC", "patient": patient, "replicate": replicate, **files})
        put_slide(raw / files["histology_image"], section.slide)
        put(raw / files["spot_coordinates"], text(section.spots, ","))
        put(raw / files["count_matrix"], text(section.counts))
        lines = ["id\tx\ty\tlabel"]  # four names over five columns, CR ends, off by a little
        for number, (spot, label) in enumerate(section.labels.items()):
            x, y = (int(part) for part in spot.split("x"))
            lines.append(f"{number}\t{x + 0.04}\t{y - 0.11}\tL{number}\t{label}")
        put(raw / files["tumor_annotation"], "\r".join(lines) + "\r")
    put(raw / "metadata.csv", pd.DataFrame(rows).to_csv(index=False))
    return raw


ORIGINAL = ("ST-imgs/{patient}/{section}", "ST-cnts", "ST-spotfiles", "ST-pat/lbl")
SHORT = ("images", "counts", "spots", "labels")


def write_her2st(
    raw: Path, sections: dict[str, Tiny], folders: tuple[str, ...] = SHORT, ending: str = ".tsv.gz"
) -> Path:
    """Andersson's layout, with the folder names of the original or the short ones."""
    for name, section in sections.items():
        images, counts, spots, labels = (
            raw / f.format(patient=name[0], section=name) for f in folders
        )
        put_slide(images / f"{name}.jpg", section.slide)
        put(counts / f"{name}{ending}", text(section.counts))
        put(spots / f"{name}_selection.tsv", selection(section).to_csv(sep="\t", index=False))
        lines = ["Row.names\tx\ty\tpixel_x\tpixel_y\tlabel"]
        for spot, label in section.labels.items():
            x, y = (int(part) for part in spot.split("x"))
            lines.append(f"row\t{x + 0.008}\t{y - 0.21}\t1\t1\t{label}")
        lines.append("row\t\t\t1\t1\tundetermined")  # the original has rows without a position
        put(labels / f"{name}_labeled_coordinates.tsv", "\n".join(lines) + "\n")
    return raw


def selection(section: Tiny) -> pd.DataFrame:
    """A section's spots as her2st writes them; all are selected."""
    array = np.array([i.split("x") for i in section.spots.index], int)
    x, y = array.T
    pixel_x, pixel_y = section.spots["X"].to_numpy(), section.spots["Y"].to_numpy()
    columns = {"x": x, "y": y, "new_x": x + 0.01, "new_y": y - 0.01}
    return pd.DataFrame({**columns, "pixel_x": pixel_x, "pixel_y": pixel_y, "selected": 1})


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its name there."""
    files = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}
