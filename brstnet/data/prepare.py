"""Raw folder -> patch store: check everything, then write one section at a time, whole or not."""

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from brstnet import __version__
from brstnet.config import Prepare, fingerprint, plain
from brstnet.data import stain
from brstnet.data.genes import name_genes, strip_version
from brstnet.data.index import FORMAT, VERSION, partial_path
from brstnet.data.patches import read_slide, slide_size
from brstnet.data.readers import her2st, stnet
from brstnet.data.sections import Faults, Listing, RawSection, SectionFiles, check_inside
from brstnet.data.shard import filter_spots, write_section
from brstnet.data.store import Store, sha256

READERS = {"stnet": stnet, "her2st": her2st}


def prepare(raw: Path, store: Path, settings: Prepare, *, progress: bool = True) -> Store:
    """Make a patch store of a raw folder; an interrupted run goes on at the section it was at.

    Args:
        raw: folder in the layout that the settings name.
        store: folder to make; nothing is there until it is whole.
        settings: see `Prepare`.
        progress: draw a progress bar.

    Raises:
        FileNotFoundError: there is no `raw`, or no table of its sections.
        FileExistsError: `store` is there with other settings or raw data, or is no store.
        ValueError: the raw data is wrong; all faults are listed before anything is written.
        OSError: the disk is full; finished sections stay.
    """
    if not raw.is_dir():
        raise FileNotFoundError(f"{raw}: no such folder of raw data")
    reader = READERS[settings.layout]
    listing = reader.find(raw)
    order = {"prepare": plain(settings), "raw": _raw_identity(listing)}
    if store.exists():
        return _already_there(store, order)
    target = choose_target(listing, settings)
    sections = _read_all(raw, listing, settings, progress=progress)
    partial = _begin(store, order)
    _check_space(partial, sections, settings)
    try:
        _write(partial, sections, target, settings, progress=progress)
        _finish(partial, listing, sections, order)
        partial.rename(store)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            error.add_note(
                f"{partial}: the disk is full; finished sections are kept. Free some space and run "
                "the same command again: it goes on where it stopped."
            )
        raise
    return Store(store)


def choose_target(listing: Listing, settings: Prepare) -> SectionFiles | None:
    """The section that all others' stain is normalised to; None without normalisation.

    By default the first section of the patient with most sections: the least likely to be held out.

    Raises:
        ValueError: the section asked for is unknown or a held-out patient's, or a held-out
            patient is unknown.
    """
    patients = {s.patient for s in listing.sections}
    if unknown := set(settings.held_out) - patients:
        raise ValueError(
            f"held_out names {', '.join(sorted(unknown))}, not among the patients: "
            f"{', '.join(sorted(patients))}"
        )
    if settings.stain == "none":
        return None
    allowed = [s for s in listing.sections if s.patient not in settings.held_out]
    if settings.stain_target is not None:
        for files in allowed:
            if files.section == settings.stain_target:
                return files
        names = ", ".join(s.section for s in allowed)
        raise ValueError(
            f"stain_target must be a section of a patient who is not held out ({names}), "
            f"got {settings.stain_target!r}"
        )
    if not allowed:
        raise ValueError("every patient is held out: no section is left as stain target")
    counts = pd.Series([s.patient for s in allowed]).value_counts()
    most = min(counts.index[counts == counts.max()])
    return min((s for s in allowed if s.patient == most), key=lambda s: s.section)


def _raw_identity(listing: Listing) -> str:
    files = [f for s in listing.sections for f in (s.slide, s.counts, s.spots, s.labels) if f]
    return fingerprint([(f.name, sha256(f) if f.is_file() else None) for f in files])


def _already_there(path: Path, order: dict[str, Any]) -> Store:
    if not (path / "index.json").is_file():
        raise FileExistsError(f"{path}: is there and is no store; choose another folder")
    store = Store(path)
    if {"prepare": store.index["prepare"], "raw": store.index["raw"]} == order:
        return store
    raise FileExistsError(
        f"{path}: there is a store made with other settings or other raw data; remove it or "
        "choose another folder"
    )


def _read_all(
    raw: Path, listing: Listing, settings: Prepare, *, progress: bool
) -> list[RawSection]:
    """Read and check every section, so that every fault of the folder is told at once."""
    faults = Faults(raw)
    sections = []
    for files in tqdm(listing.sections, "reading counts", unit="section", disable=not progress):
        before = len(faults.found)
        with faults.collecting():
            width, height = slide_size(files.slide)
        with faults.collecting():
            section = READERS[settings.layout].read(files)
        if len(faults.found) > before:
            continue
        with faults.collecting():
            check_inside(files, section.spots, width, height)
            filter_spots(section, width, height, settings)
            sections.append(section)
    faults.raise_any()
    return sections


def _begin(store: Path, order: dict[str, Any]) -> Path:
    """The folder to write to: a new one, or one that the same order left unfinished."""
    partial = partial_path(store)
    note = partial / "order.json"
    text = json.dumps(order)
    if partial.exists():
        if not note.is_file() or note.read_text() != text:
            raise FileExistsError(
                f"{partial}: left unfinished with other settings or raw data; remove it"
            )
        return partial
    partial.mkdir(parents=True)
    note.write_text(text)
    return partial


def _check_space(partial: Path, sections: Sequence[RawSection], settings: Prepare) -> None:
    """Refuse to start what cannot end: patches are the bulk, counts about 12 bytes an entry."""
    todo = [s for s in sections if not (partial / s.files.section).is_dir()]
    needed = sum(len(s.spots) * 3 * settings.input_px**2 + s.counts.nnz * 12 for s in todo)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the store needs about {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
            str(partial),
        )


def _write(
    partial: Path,
    sections: Sequence[RawSection],
    target: SectionFiles | None,
    settings: Prepare,
    *,
    progress: bool,
) -> None:
    """Write the sections that are not there yet."""
    todo = [s for s in sections if not (partial / s.files.section).is_dir()]
    fitted = _stain_target(partial, target, settings) if todo else None
    for section in tqdm(todo, "cutting patches", unit="section", disable=not progress):
        scratch = partial / f"{section.files.section}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        entry = write_section(scratch, section, fitted, settings)
        (scratch / "entry.json").write_text(json.dumps(entry))
        scratch.rename(partial / section.files.section)


def _stain_target(
    partial: Path, target: SectionFiles | None, settings: Prepare
) -> stain.StainTarget | None:
    """Fit the stain target once; a run that goes on takes what was fitted."""
    if target is None:
        return None
    file = partial / "stain_target.json"
    if not file.is_file():
        fitted = stain.fit_target(read_slide(target.slide), method=settings.stain)
        about = {"section": target.section, "patient": target.patient, "slide": target.slide.name}
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps({**about, **fitted.to_json()}))
        scratch.rename(file)
    values = json.loads(file.read_text())
    return stain.StainTarget.from_json(values)


def _finish(
    partial: Path, listing: Listing, sections: Sequence[RawSection], order: dict[str, Any]
) -> None:
    """Write what describes the whole, the index last."""
    ids = sorted(set().union(*(strip_version(s.genes) for s in sections)))
    names = name_genes(pd.Index(ids, name="gene"))
    names.table.to_parquet(partial / "genes.parquet")
    entries = [partial / s.files.section / "entry.json" for s in sections]
    target = partial / "stain_target.json"
    index = {
        "format": FORMAT,
        "version": VERSION,
        "brstnet": __version__,
        **order,
        "genes": len(ids),
        "files": {"genes.parquet": sha256(partial / "genes.parquet")},
        "gene_names": {
            "source": names.source,
            "ambiguous": names.ambiguous,
            "renamed": names.renamed,
            "unknown": names.unknown,
        },
        "stain_target": json.loads(target.read_text()) if target.is_file() else None,
        "sections": [json.loads(entry.read_text()) for entry in entries],
        "left_alone": listing.left_alone,
    }
    (partial / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
