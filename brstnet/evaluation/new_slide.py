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
from brstnet.config import Prepare, plain
from brstnet.data import guarded, stain
from brstnet.data.patches import resize
from brstnet.data.sections import ARRAY_PITCH_UM
from brstnet.data.store import sha256
from brstnet.evaluation import overlay, plots, spatial, tissue
from brstnet.evaluation.predict import Ensemble, load_ensemble
from brstnet.evaluation.slide import Slide, open_slide, plausible
from brstnet.training.batches import Units, turn
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.epoch import EVAL_BATCH
from brstnet.training.fitted import target_scale
from brstnet.training.model import choose_precision, fit_to

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
    """

    spots: Path | None = None
    um_per_px: float | None = None
    model_um_per_px: float | None = None
    pitch_um: float = ARRAY_PITCH_UM
    min_tissue: float | None = None
    genes: Sequence[str] = ()
    spatialdata: bool = False

    def __post_init__(self) -> None:
        for name in ("um_per_px", "model_um_per_px"):
            value = getattr(self, name)
            if value is not None and plausible(value) is None:
                raise ValueError(f"{name} must be microns, from 0.05 to 10 a pixel, got {value}")
        if not 1 <= self.pitch_um <= 10_000:
            raise ValueError(f"pitch_um must be from 1 to 10000 microns, got {self.pitch_um}")
        if self.min_tissue is not None and not 0 < self.min_tissue <= 1:
            raise ValueError(f"min_tissue must be above 0 and at most 1, got {self.min_tissue}")


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What all members were trained on: pixels of the window and of the stored patch, and stain."""

    window_px: int
    input_px: int
    target: stain.StainTarget | None
    lightness: bool
    um_per_px: float | None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a slide is cut, in pixels of its full resolution.

    `scale` are its pixels in one of the model's; `um_per_px` is the slide's, None if nobody knows.
    """

    window_px: float
    pitch_px: float
    scale: float
    um_per_px: float | None
    warnings: tuple[str, ...] = ()


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
    """Predict a slide's expression and write predictions.h5ad, a map a gene, and slide.zarr.

    Raises:
        FileNotFoundError: the slide, a checkpoint or the file of spots is not there.
        ImportError: `spatialdata` is asked for and not installed.
        ValueError: the slide cannot be read, has no tissue or an unknown scale, or a gene, a spot
            or the checkpoints are not what they must be.
    """
    if asked.spatialdata:
        spatial.require()
    ensemble = load_ensemble(checkpoints, device)
    model, expected = model_input(ensemble, asked.model_um_per_px), expected_pcc(ensemble)
    drawn = genes_to_draw(ensemble.genes["symbol"], expected, asked.genes)
    slide = open_slide(path)
    shape = geometry(slide, model, asked)
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
    ]
    about = describe(ensemble, slide, shape, model, look, warnings)
    adata = to_anndata(predicted, ensemble, expected, about, found, slide, shape)
    files = write(out, adata, drawn, slide, found, shape, spatialdata=asked.spatialdata)
    return Result(adata=adata, folder=out, files=files, warnings=warnings)


def model_input(ensemble: Ensemble, um_per_px: float | None = None) -> ModelInput:
    """What the members' stores were prepared like; `um_per_px` goes over what they say.

    Raises:
        ValueError: the members were trained on patches of different kinds.
    """
    kinds = [_input_of(member, um_per_px) for member in ensemble.members]
    for member, kind in zip(ensemble.members[1:], kinds[1:], strict=True):
        if _comparable(kind) != _comparable(kinds[0]):
            raise ValueError(
                f"{member.path} and {ensemble.members[0].path} were trained on patches of "
                "different windows, sizes or stains: predict with each of them apart"
            )
    return kinds[0]


def _input_of(member: Checkpoint, um_per_px: float | None) -> ModelInput:
    keys = ("window_px", "input_px", "luminosity")  # what is missing has its default
    try:
        store = member.facts["store"]
        prepared = Prepare(**{k: store["prepare"][k] for k in keys if k in store["prepare"]})
        fields = store["stain_target"]
        target = None if fields is None else stain.StainTarget.from_json(fields)
        known = um_per_px if um_per_px is not None else store.get("um_per_px")
        um = None if known is None else plausible(float(known))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{member.path}: damaged, or made by something else: its store is not described: "
            f"{type(error).__name__} {error}"
        ) from error
    return ModelInput(
        window_px=prepared.window_px,
        input_px=prepared.input_px,
        target=target,
        lightness=prepared.luminosity == "both",
        um_per_px=um,
    )


def _comparable(kind: ModelInput) -> tuple[Any, ...]:
    target = None if kind.target is None else json.dumps(kind.target.to_json())
    return (kind.window_px, kind.input_px, target, kind.lightness)


def geometry(slide: Slide, model: ModelInput, asked: Asked) -> Geometry:
    """Window and pitch on this slide, so that a model's pixel spans the microns it was trained on.

    Where the model does not say its own microns per pixel, its window is taken in the slide's
    pixels; where the slide's are not known either, the grid's pitch is one window.

    Raises:
        ValueError: the model's microns per pixel are known, and the slide's are not.
    """
    um = asked.um_per_px or slide.um_per_px
    if model.um_per_px is not None and um is None:
        raise ValueError(
            f"{slide.path}: does not say its microns per pixel, and the model was trained at "
            f"{model.um_per_px:.3f}: give --mpp, such as 0.5 for a 20x scan, 0.25 for 40x"
        )
    notes = []
    if um is not None and slide.um_per_px and abs(um / slide.um_per_px - 1) > 0.02:
        notes.append(
            f"the file says {slide.um_per_px:.4f} um a pixel; --mpp {um} was taken instead"
        )
    scale = 1.0
    if model.um_per_px is not None and um is not None:
        scale = model.um_per_px / um
    else:
        notes.append(
            "the model does not say the microns per pixel of its training slides (--model_mpp "
            f"would): its window of {model.window_px} px was taken in this slide's pixels"
        )
    window_px = model.window_px * scale
    pitch_px = window_px if um is None else asked.pitch_um / um
    if um is None:
        notes.append("the slide's microns per pixel are unknown (--mpp): the pitch is one window")
    if scale < 0.9:
        notes.append(
            f"the slide's pixels are {1 / scale:.2f} times as large as those the model was trained "
            "on: its patches are enlarged and lack detail that the model knows"
        )
    return Geometry(
        window_px=window_px, pitch_px=pitch_px, scale=scale, um_per_px=um, warnings=tuple(notes)
    )


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


def predictor(member: Checkpoint, genes: pd.Index) -> Predictor:
    """One model as a function of patches, as `brstnet.evaluation.predict.predict` has it."""
    device = next(member.model.parameters()).device
    training = member.settings.training
    units = Units.of(member.fitted, training, device)
    precision = choose_precision(training, device)
    fit_to(member.model, device, precision)
    shift, scale = target_scale(member.fitted, training.aux_target)
    columns = member.fitted.genes.index.get_indexer(genes)

    @torch.inference_mode()
    def predict(patches: np.ndarray) -> np.ndarray:
        if training.input_px not in (None, patches.shape[1]):
            patches = resize(patches, len(patches), training.input_px)
        x_BHWC = torch.from_numpy(patches).to(device)
        preds = []
        for view in range(training.views):
            symmetry_B = torch.full((len(patches),), view, device=device)
            x_BCHW = units.image(turn(x_BHWC, symmetry_B))
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                preds.append(units.whole(member.model(x_BCHW)))
        pred_BG: np.ndarray = torch.stack(preds).mean(0).float().cpu().numpy()
        return (pred_BG * scale + shift)[:, columns]

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
    progress: bool = True,
) -> Predicted:
    """Predict all genes at the spots that have enough tissue; a batch of patches is held at a time.

    Raises:
        ValueError: no spot has.
    """
    members = [predictor(member, ensemble.genes.index) for member in ensemble.members]
    rows, shares, means, spreads, colours = [], [], [], [], []
    cuts = tissue.cut_patches(slide, look, spots, shape.window_px, input_px, least)
    with tqdm(total=len(spots), desc="predicting", unit=" spots", disable=not progress) as bar:
        for batch in tissue.batches(cuts, EVAL_BATCH):
            pred_MBG = np.stack([member(batch.x_BHWC) for member in members])
            rows.append(batch.rows_B)
            shares.append(batch.tissue_B)
            means.append(pred_MBG.mean(axis=0))
            if len(members) > 1:
                spreads.append(pred_MBG.std(axis=0, ddof=1))
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
                f"{FAR_STAIN_DEG:.0f} is usual)"
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


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def to_anndata(
    predicted: Predicted,
    ensemble: Ensemble,
    expected: pd.Series,
    about: dict[str, Any],
    found: tissue.Survey,
    slide: Slide,
    shape: Geometry,
) -> anndata.AnnData:
    """Predictions as X in log units, spots in `obs`, genes in `var`, the rest in `uns`.

    `uns["brstnet"]` is what `describe` gave; `uns["spatial"]` the slide's thumbnail and scales,
    where squidpy and scanpy look for them.
    """
    library = slide.path.stem
    layers = {} if predicted.spread_NG is None else {"member_spread": predicted.spread_NG}
    scales = {
        "tissue_hires_scalef": 1 / (found.factor * slide.zoom),
        "spot_diameter_fullres": shape.pitch_px / 2,
    }
    picture = {"images": {"hires": found.thumbnail_HW3}, "scalefactors": scales}
    return anndata.AnnData(
        X=predicted.mean_NG.astype(np.float32),
        layers={name: values.astype(np.float32) for name, values in layers.items()},
        obs=predicted.spots,
        var=ensemble.genes[["symbol", "panel", "mean", "std"]].assign(expected_pcc=expected),
        obsm={"spatial": predicted.spots[["pixel_x", "pixel_y"]].to_numpy(float)},
        uns={"brstnet": about, "spatial": {library: picture}},
    )


def write(
    out: Path,
    adata: anndata.AnnData,
    drawn: Sequence[str],
    slide: Slide,
    found: tissue.Survey,
    shape: Geometry,
    *,
    spatialdata: bool,
) -> list[str]:
    """Write all files, each whole or not at all, and return their names."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".predict-", dir=out) as scratch:
        adata.write_h5ad(Path(scratch) / "predictions.h5ad", compression="lzf")
        for gene in drawn:
            info = overlay.overlay_info(adata, gene, found, slide, shape.um_per_px)
            plots.save(overlay.plot_overlay(info), Path(scratch) / overlay.file_name(adata, gene))
        if spatialdata:
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
