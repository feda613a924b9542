"""Predictions on a slide without counts, with what a reader must know of them beside each number.

Shape letters: M members, N spots, B batch, G genes, H W C rows, columns and channels.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from brstnet import __version__
from brstnet.config import plain
from brstnet.data import guarded
from brstnet.data.patches import resize
from brstnet.data.sections import ARRAY_PITCH_UM
from brstnet.data.store import sha256
from brstnet.evaluation import plots
from brstnet.evaluation.predict import PLAIN, Ensemble, How, load_ensemble, on_patches, together
from brstnet.evaluation.slides import ome, overlay, spatial, tissue
from brstnet.evaluation.slides.bands import Bands, read_bands
from brstnet.evaluation.slides.scale import Geometry, ModelInput, geometry, model_input
from brstnet.evaluation.slides.slide import Slide, open_slide, plausible
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.epoch import EVAL_BATCH

LOW_PCC = 0.1
"""Expected correlations below are told as a warning."""

FAR_STAIN_DEG = 10.0
"""The stains of her2st's B4, C3 and C5 are 1.2 to 6.5 degrees from those of C2."""

FAR_COLOUR = 1.0
"""Standard deviations of the training pixels that the mean colour may be off."""

Predictor = Callable[[np.ndarray], np.ndarray]
"""Patches uint8 (B, H, W, C) as they were cut to predictions float32 (B, G) in log units."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a slide.

    Args:
        spots: file of spots to predict at; None lays a grid over the tissue.
        um_per_px: of the slide's full resolution, over what the file says.
        model_um_per_px: of the slides that the model was trained on, over what it says.
        pitch_um: centre to centre of the grid's spots.
        min_tissue: share of a window that must not be white, on a grid; None takes what the model's
            training spots had to have.
        genes: ids or symbols to draw; none draws those with the highest expected PCC.
        spatialdata: write slide.zarr too (needs the extra `spatial`).
        ome_tiff: write each drawn gene's map as an OME-TIFF too (needs the extra `ome`).
        intervals: file of half-widths that `evaluate` wrote for this model; None: no intervals.
        level: of the intervals, of those that the file has.
    """

    spots: Path | None = None
    um_per_px: float | None = None
    model_um_per_px: float | None = None
    pitch_um: float = ARRAY_PITCH_UM
    min_tissue: float | None = None
    genes: Sequence[str] = ()
    spatialdata: bool = False
    ome_tiff: bool = False
    intervals: Path | None = None
    level: float = 0.9

    def __post_init__(self) -> None:
        for name, flag in (("um_per_px", "--mpp"), ("model_um_per_px", "--model_mpp")):
            value = getattr(self, name)
            if value is not None and plausible(value) is None:
                raise ValueError(
                    f"{name} ({flag}) must be microns, from 0.05 to 10 a pixel, got {value}"
                )
        if not 1 <= self.pitch_um <= 10_000:
            raise ValueError(f"pitch_um must be from 1 to 10000 microns, got {self.pitch_um}")
        if self.min_tissue is not None and not 0 < self.min_tissue <= 1:
            raise ValueError(f"min_tissue must be above 0 and at most 1, got {self.min_tissue}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be between 0 and 1, such as 0.9, got {self.level}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """Predictions at spots: mean over members, and their standard deviation if there are several.

    `spots` has array_x, array_y (where known), pixel_x, pixel_y and tissue_fraction; `mean_colour`
    (3,) is that of the patches, in 0..1.
    """

    spots: pd.DataFrame
    mean_NG: np.ndarray
    spread_NG: np.ndarray | None
    mean_colour: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What was written, and where."""

    adata: anndata.AnnData
    folder: Path
    files: Sequence[str]
    warnings: Sequence[str] = field(default_factory=list)


def predict_slide(
    checkpoints: Sequence[Path],
    path: Path,
    out: Path,
    asked: Asked,
    *,
    device: torch.device,
    progress: bool = True,
) -> Result:
    """Predict a slide's expression and write predictions.h5ad, maps a gene, and slide.zarr.

    Raises:
        FileExistsError: `out` is a file, or holds a slide.zarr that is none.
        FileNotFoundError: the slide, a checkpoint or the file of spots is not there.
        ImportError: `spatialdata` or `ome_tiff` is asked for, and what writes it not installed.
        ValueError: the slide cannot be read, has no tissue or an unknown scale, or a gene, a spot,
            the intervals or the checkpoints are not what they must be.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; --out must name a folder")
    if asked.spatialdata:
        spatial.require()
    if asked.ome_tiff:
        ome.require()
    ensemble = load_ensemble(checkpoints, device)
    model = model_input(ensemble.members, asked.model_um_per_px)
    expected = expected_pcc(ensemble)
    drawn = genes_to_draw(ensemble.genes["symbol"], expected, asked.genes)
    bands = None
    if asked.intervals is not None:
        bands = read_bands(asked.intervals, asked.level, ensemble.genes.index, ensemble.target)
    slide = open_slide(path)
    shape = geometry(slide, model, asked.pitch_um, asked.um_per_px)
    slide = slide.for_scale(shape.scale)
    spots, notes = choose_spots(slide, shape, asked.spots)
    found = tissue.survey(slide)
    look = tissue.fit_look(slide, found, model.target, lightness=model.lightness)
    least = least_tissue(asked, ensemble)
    predicted = predict_spots(
        ensemble, slide, look, spots, shape, model.input_px, least, progress=progress
    )
    warnings = [
        *shape.warnings,
        *notes,
        *colour_warnings(look, predicted, model, ensemble),
        *gene_warnings(expected, drawn, ensemble),
        *value_warnings(predicted, bands),
    ]
    about = describe(ensemble, slide, shape, model, look, warnings) | about_values(bands)
    pictured = picture(found, slide, shape)
    adata = to_anndata(predicted, ensemble, expected, about, pictured, bands)
    files = write(out, adata, drawn, slide, found, shape, asked)
    return Result(adata=adata, folder=out, files=files, warnings=warnings)


def choose_spots(
    slide: Slide, shape: Geometry, file: Path | None
) -> tuple[pd.DataFrame, list[str]]:
    """The spots to look at, and what is to be said of those that were left out.

    Raises:
        ValueError: none of the spots asked for has its window on the slide.
    """
    if file is None:
        spots = tissue.grid(slide, shape.window_px, shape.pitch_px)
        return spots[tissue.inside(slide, spots, shape.window_px)], []
    spots = tissue.read_spots(file)
    there = tissue.inside(slide, spots, shape.window_px)
    if not there.any():
        raise ValueError(
            f"{file}: no spot's window of {shape.window_px:.0f} px lies on {slide.path.name} "
            f"({slide.full_px[0]} x {slide.full_px[1]} px): positions must be pixels of this "
            "slide at full resolution"
        )
    lost = (
        []
        if there.all()
        else [
            f"{int((~there).sum())} of {len(spots)} spots were left out: "
            "their windows cross the slide's border"
        ]
    )
    return spots[there], lost


def least_tissue(asked: Asked, ensemble: Ensemble) -> float:
    """Share of a window that must not be white; spots that were given are all predicted."""
    if asked.spots is not None:
        return 0.0
    if asked.min_tissue is not None:
        return asked.min_tissue
    return 1 - ensemble.members[0].settings.protocol.max_white_fraction


def predictor(member: Checkpoint, genes: pd.Index, how: How = PLAIN) -> Predictor:
    """One model as a function of patches as they were cut."""
    device = next(member.model.parameters()).device
    side_px = member.settings.training.input_px
    see = on_patches(member, genes, how)

    def predict(patches: np.ndarray) -> np.ndarray:
        if side_px not in (None, patches.shape[1]):
            patches = resize(patches, len(patches), side_px)
        pred_BG, _ = see(torch.from_numpy(patches).to(device))
        return pred_BG

    return predict


def predict_spots(  # noqa: PLR0913 - what is predicted, where, and how it is cut
    ensemble: Ensemble,
    slide: Slide,
    look: tissue.Look,
    spots: pd.DataFrame,
    shape: Geometry,
    input_px: int,
    least: float,
    *,
    how: How = PLAIN,
    progress: bool = True,
) -> Predicted:
    """Predict all genes at the spots that have enough tissue; a batch of patches is held at a time.

    Raises:
        ValueError: no spot has.
    """
    members = [predictor(member, ensemble.genes.index, how) for member in ensemble.members]
    rows, shares, means, spreads, colours = [], [], [], [], []
    cuts = tissue.cut_patches(slide, look, spots, shape.window_px, input_px, least)
    with tqdm(total=len(spots), desc="predicting", unit=" spots", disable=not progress) as bar:
        for batch in tissue.batches(cuts, EVAL_BATCH):
            seen = together([(member(batch.x_BHWC), None) for member in members], spread=True)
            rows.append(batch.rows_B)
            shares.append(batch.tissue_B)
            means.append(seen.mean_NG)
            if seen.member_spread_NG is not None:
                spreads.append(seen.member_spread_NG)
            colours.append(batch.x_BHWC.reshape(len(batch.x_BHWC), -1, 3).mean(axis=1) / 255)
            bar.update(int(batch.rows_B[-1]) + 1 - bar.n)
        bar.update(len(spots) - bar.n)
    if not rows:
        raise ValueError(
            f"{slide.path}: no tissue found: all {len(spots)} windows of {shape.window_px:.0f} px "
            f"are more than {1 - least:.0%} white; --spots predicts at places of your own"
        )
    kept = spots.iloc[np.concatenate(rows)]
    return Predicted(
        spots=kept.assign(tissue_fraction=np.concatenate(shares)),
        mean_NG=np.concatenate(means),
        spread_NG=np.concatenate(spreads) if spreads else None,
        mean_colour=np.concatenate(colours).mean(axis=0),
    )


def expected_pcc(ensemble: Ensemble) -> pd.Series:
    """The correlation each gene had on validation sections, NaN where it was not measured.

    The median over a member's validation sections, averaged over members; a gene predicted
    constant counts as 0, as everywhere.
    """
    tables = []
    for member in ensemble.members:
        if not (member.path / "validation.parquet").is_file():
            continue
        table = guarded.read_table(guarded.inside(member.path, "validation.parquet"))
        if not {"gene", "pcc"} <= set(table):
            raise ValueError(f"{member.path}/validation.parquet: needs the columns gene and pcc")
        tables.append(table.assign(pcc=table["pcc"].fillna(0.0)).groupby("gene")["pcc"].median())
    if not tables:
        return pd.Series(np.nan, ensemble.genes.index, name="expected_pcc")
    mean = pd.concat(tables, axis=1).mean(axis=1)
    return mean.reindex(ensemble.genes.index).rename("expected_pcc")


def genes_to_draw(symbols: pd.Series, expected: pd.Series, asked: Sequence[str]) -> list[str]:
    """Ids of the genes asked for, by id or symbol; else of those that are expected to be best.

    Raises:
        ValueError: a gene is unknown, or a symbol belongs to several.
    """
    if not asked:
        best = expected.dropna().sort_values(ascending=False, kind="stable").index
        return list((best if len(best) else expected.index)[: plots.MAPPED_GENES])
    ids, faults = [], []
    for name in dict.fromkeys(asked):
        found = [name] if name in symbols.index else list(symbols.index[symbols == name])
        if len(found) == 1:
            ids += found
        else:
            several = f"stands for {', '.join(found)}: give the id" if found else "is not predicted"
            faults.append(f"gene {name!r} {several}")
    if faults:
        known = ", ".join(symbols.iloc[:8])
        raise ValueError("; ".join(faults) + f" (the model predicts {len(symbols)}: {known}, ...)")
    return ids


def gene_warnings(expected: pd.Series, drawn: Sequence[str], ensemble: Ensemble) -> list[str]:
    """What is to be said of the genes: how few can be trusted, and which of those drawn cannot."""
    notes = []
    low, unknown = expected < LOW_PCC, expected.isna()
    if low.any():
        notes.append(
            f"expected PCC below {LOW_PCC}: {int(low.sum())} of the {int((~unknown).sum())} genes "
            "that were scored; their maps show little of their expression"
        )
    if unknown.any():
        notes.append(f"{int(unknown.sum())} genes were never scored: their expected PCC is unknown")
    for gene in drawn:
        if low[gene] or unknown[gene]:
            what = "unknown" if unknown[gene] else f"{expected[gene]:.2f}, below {LOW_PCC}"
            notes.append(f"{ensemble.genes['symbol'][gene]}: expected PCC {what}")
    if len(ensemble.members) == 1:
        notes.append("one model: there is no spread over members")
    return notes


def colour_warnings(
    look: tissue.Look, predicted: Predicted, model: ModelInput, ensemble: Ensemble
) -> list[str]:
    """Where the slide looks unlike what the models were trained on."""
    notes = []
    if model.target is not None and look.stain_matrix is not None:
        angles = stain_angles(look.stain_matrix, model.target.stain_matrix)
        if max(angles) > FAR_STAIN_DEG:
            notes.append(
                "stain far from training: haematoxylin and eosin are "
                f"{angles[0]:.1f} and {angles[1]:.1f} degrees from the target's (at most "
                f"{FAR_STAIN_DEG:.0f} is usual): another stain or scanner, or pen marks"
            )
        if model.target.method == "staintools":
            notes.append(
                "the model's slides were normalised by StainTools, this one by the same chain "
                "fitted until it stands still (vahadane): colours differ a little"
            )
    off = np.max([
        np.abs(predicted.mean_colour - m.fitted.image_mean) / np.array(m.fitted.image_std)
        for m in ensemble.members
    ])  # fmt: skip
    if off > FAR_COLOUR:
        notes.append(
            f"colours far from training: the patches' mean is {off:.1f} standard deviations of the "
            "training pixels off"
        )
    return notes


def value_warnings(predicted: Predicted, bands: Bands | None) -> list[str]:
    """What is to be said of predictions that cannot be, and of their intervals."""
    below_NG = predicted.mean_NG < 0
    notes = [] if bands is None else list(bands.warnings)
    if below_NG.any():
        notes.append(
            f"{below_NG.mean():.1%} of the predictions, in {int(below_NG.any(axis=0).sum())} of "
            f"{below_NG.shape[1]} genes, were below 0, where log(1 + count) never is: they are 0 "
            "(var clipped says how many of each gene)"
        )
    return notes


def stain_angles(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Degrees between two slides' haematoxylin, and between their eosin."""
    unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (one, other)]
    cosine = np.clip((unit[0] * unit[1]).sum(axis=1), -1, 1)
    haematoxylin, eosin = np.degrees(np.arccos(cosine)).tolist()
    return haematoxylin, eosin


def describe(
    ensemble: Ensemble,
    slide: Slide,
    shape: Geometry,
    model: ModelInput,
    look: tissue.Look,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What goes into `uns`: flat, and of kinds that HDF5 and zarr both hold; unknown is NaN."""
    first = ensemble.members[0].settings
    normalised = f"scaled from the spot's total to {ensemble.median_total:.0f}"
    counts = normalised if ensemble.target == "log_normalised" else "as sequenced"
    target = None if model.target is None else model.target.to_json()
    own = None if look.stain_matrix is None else look.stain_matrix.tolist()
    facts = {
        "brstnet_version": __version__,
        "model": [str(m.path) for m in ensemble.members],
        "model_sha256": [sha256(m.path / "model.safetensors") for m in ensemble.members],
        "model_settings": [m.settings.fingerprint() for m in ensemble.members],
        "protocol_line": first.protocol.line(),
        "protocol": json.dumps(plain(first.protocol)),
        "target": ensemble.target,
        "units": f"natural log(1 + count), count {counts}",
        "spread": "standard deviation over members, not calibrated",
        "expected_pcc": "median over validation sections, mean over members; NaN: never measured",
        "slide": slide.path.name,
        "slide_px": list(slide.full_px),
        "level_zoom": slide.zoom,
        "um_per_px": _number(shape.um_per_px),
        "model_um_per_px": _number(model.um_per_px),
        "window_px": shape.window_px,
        "pitch_px": shape.pitch_px,
        "stain_target": json.dumps(target),
        "stain_of_slide": json.dumps(own),
        "white_above": look.white,
        "warnings": "\n".join(warnings),
    }  # fmt: skip
    return {
        key: np.array(value) if isinstance(value, list) else value for key, value in facts.items()
    }


def about_values(bands: Bands | None) -> dict[str, Any]:
    """What goes into `uns` on the values themselves: how they were cut, and their intervals."""
    about: dict[str, Any] = {"clipped": "predictions below 0 are 0; var clipped counts their spots"}
    if bands is not None:
        about |= {
            "intervals": bands.source,
            "interval_level": bands.level,
            "interval_patients": bands.patients,
        }
    return about


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def picture(found: tissue.Survey, slide: Slide, shape: Geometry) -> dict[str, Any]:
    """The slide's thumbnail and its scales, as squidpy and scanpy look for them in `uns`."""
    scales = {
        "tissue_hires_scalef": 1 / (found.factor * slide.zoom),
        "spot_diameter_fullres": shape.pitch_px / 2,
    }
    images = {"hires": found.thumbnail_HW3}
    return {slide.path.stem: {"images": images, "scalefactors": scales}}


def to_anndata(
    predicted: Predicted,
    ensemble: Ensemble,
    expected: pd.Series,
    about: dict[str, Any],
    pictured: dict[str, Any],
    bands: Bands | None = None,
) -> anndata.AnnData:
    """Predictions as X in log units, spots in `obs`, genes in `var`, the rest in `uns`.

    X is never below 0, as log(1 + count) never is: a linear head knows nothing of that, and who
    takes X back to counts must not get negative ones (MAGIC's authors advise the same of theirs).
    `var["clipped"]` counts the spots of a gene that were. Scores are of predictions as they come.

    `uns["brstnet"]` is what `describe` gave; `uns["spatial"]` what `picture` gave.
    """
    layers = {} if predicted.spread_NG is None else {"member_spread": predicted.spread_NG}
    layers |= {} if bands is None else bands.around(predicted.mean_NG)
    genes = ensemble.genes[["symbol", "panel", "mean", "std"]]
    return anndata.AnnData(
        X=np.maximum(predicted.mean_NG, 0).astype(np.float32),
        layers={name: values.astype(np.float32) for name, values in layers.items()},
        obs=predicted.spots,
        var=genes.assign(
            expected_pcc=expected,
            clipped=(predicted.mean_NG < 0).sum(axis=0),
            **({} if bands is None else {"half_width": bands.half_width_G}),
        ),
        obsm={"spatial": predicted.spots[["pixel_x", "pixel_y"]].to_numpy(float)},
        uns={"brstnet": about, "spatial": pictured},
    )


def write(
    out: Path,
    adata: anndata.AnnData,
    drawn: Sequence[str],
    slide: Slide,
    found: tissue.Survey,
    shape: Geometry,
    asked: Asked,
) -> list[str]:
    """Write all files, each whole or not at all, and return their names."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".predict-", dir=out) as scratch:
        adata.write_h5ad(Path(scratch) / "predictions.h5ad", compression="lzf")
        for gene in drawn:
            info = overlay.overlay_info(adata, gene, found, slide, shape.um_per_px)
            plots.save(overlay.plot_overlay(info), Path(scratch) / overlay.file_name(adata, gene))
            if asked.ome_tiff:
                file = Path(scratch) / overlay.file_name(adata, gene, ".ome.tif")
                ome.write(file, info, slide, found.factor, shape.um_per_px)
        if asked.spatialdata:
            spatial.write(Path(scratch) / "slide.zarr", adata, slide, shape.pitch_px / 4)
        names = sorted(p.name for p in Path(scratch).iterdir())
        for name in names:
            _replace(Path(scratch) / name, out / name)
    return names


def _replace(new: Path, place: Path) -> None:
    """Put a file or a zarr folder in its place; another folder of that name is left alone."""
    if place.is_dir():
        if not (place / "zarr.json").is_file():
            raise FileExistsError(f"{place}: is there and is no zarr store; choose another --out")
        shutil.rmtree(place)
    new.rename(place)
