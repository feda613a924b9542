"""One section of a store: which spots it keeps, and its files."""

import errno
import io
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd

from brstnet.config import Prepare
from brstnet.data import stain
from brstnet.data.genes import strip_version
from brstnet.data.index import SECTION_FILES
from brstnet.data.patches import (
    corners,
    crosses_border,
    cut,
    read_slide,
    white_fraction,
    white_mask,
)
from brstnet.data.sections import RawSection, um_per_px
from brstnet.data.store import sha256


def write_section(
    folder: Path, section: RawSection, target: stain.StainTarget | None, settings: Prepare
) -> dict[str, Any]:
    """Write one section's files and return its entry of the index."""
    image = read_slide(section.files.slide)
    height, width = image.shape[:2]
    spots = filter_spots(section, width, height, settings)
    kept = (spots["status"] == "kept").to_numpy()
    corner_N2 = corners(spots[kept], settings.window_px)
    if target is not None:
        image = stain.normalise(image, target, lightness=settings.luminosity == "both")
    white = white_fraction(white_mask(image), corner_N2, settings.window_px)
    patches = cut(image, corner_N2, settings.window_px, settings.input_px)
    _write_patches(folder / "patches.npy", patches)
    obs = spots[kept].drop(columns="status").assign(white_fraction=white)
    _write_spots(folder / "spots.h5ad", section, obs, kept)
    ledger = _ledger(spots, section.lost)
    ledger.to_parquet(folder / "ledger.parquet")
    lost = ledger["status"][ledger["status"] != "kept"].value_counts()
    pitch = um_per_px(section.spots)
    return {
        "section": section.files.section,
        "patient": section.files.patient,
        "subtype": section.files.subtype,
        "slide": section.files.slide.name,
        "slide_px": [width, height],
        "um_per_px": round(pitch, 5) if np.isfinite(pitch) else None,
        "spots_raw": len(ledger),
        "spots_kept": int(kept.sum()),
        "lost": {reason: int(n) for reason, n in lost.items()},
        "genes": len(section.genes),
        "median_counts": float(np.median(spots["total_counts"][kept])),
        "files": {name: sha256(folder / name) for name in SECTION_FILES},
    }


def filter_spots(section: RawSection, width: int, height: int, settings: Prepare) -> pd.DataFrame:
    """A section's spots with their total_counts, and the status that the filters give them.

    Order of the filters: counts, then border; the white fraction is kept for the fold to apply,
    since it is for training spots only.

    Raises:
        ValueError: no spot is left.
    """
    totals = np.asarray(section.counts.sum(axis=1)).ravel()
    corner_N2 = corners(section.spots, settings.window_px)
    few = totals < settings.min_counts
    outside = crosses_border(corner_N2, settings.window_px, width, height)
    if (few | outside).all():
        raise ValueError(
            f"{section.files.slide}: no spot of section {section.files.section} is left "
            f"({int(few.sum())} of {len(few)} have fewer than {settings.min_counts} counts, "
            f"{int((~few & outside).sum())} windows cross the border): "
            "lower min_counts or window_px"
        )
    status = np.where(few, "below_min_counts", np.where(outside, "crosses_border", "kept"))
    return section.spots.assign(total_counts=totals, status=status)


def _write_patches(path: Path, patches: np.ndarray) -> None:
    try:
        np.save(path, patches)
    except OSError as error:
        if error.errno is None:  # how numpy tells that there is no room
            raise OSError(errno.ENOSPC, str(error), str(path)) from error
        raise


def _write_spots(path: Path, section: RawSection, spots: pd.DataFrame, kept: np.ndarray) -> None:
    """Write counts and positions, made in memory: HDF5 on a full disk ends in a segfault."""
    adata = anndata.AnnData(
        X=section.counts[kept],
        obs=spots,
        var=pd.DataFrame(index=strip_version(section.genes)),
        obsm={"spatial": spots[["pixel_x", "pixel_y"]].to_numpy(float)},
    )
    adata.strings_to_categoricals()
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        anndata.io.write_elem(file, "/", adata, dataset_kwargs={"compression": "lzf"})
    path.write_bytes(memory.getvalue())


def _ledger(spots: pd.DataFrame, lost: pd.Series) -> pd.DataFrame:
    """Every raw spot once, with its status."""
    columns = ["status", "total_counts", "pixel_x", "pixel_y"]
    ledger = pd.concat([spots[columns], lost.to_frame("status")])
    ledger.index.name = "spot"
    return ledger.reset_index()
