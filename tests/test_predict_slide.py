"""A slide without counts: what is predicted, what is written, and what is said of it."""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import cv2
import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image
from tiled_tiff import aperio, write_tiled
from trainings import CPU, train

from brstnet import __main__ as cli
from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.evaluation import plots
from brstnet.evaluation.predict import load_ensemble, predict, predict_mean
from brstnet.evaluation.slides import new_slide, overlay, spatial
from brstnet.evaluation.slides.new_slide import Asked, Result, predict_slide
from brstnet.training.train import fit

SECTION = "BC90006_C1"
GENE = "ENSG99900000066"
UM = 0.69
HERE = Asked(um_per_px=UM, model_um_per_px=UM)

needs_tifffile = pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None,
    reason="tifffile is not installed (the extra brstnet[ome])",
)
needs_spatialdata = pytest.mark.skipif(
    importlib.util.find_spec("spatialdata") is None,
    reason="spatialdata is not installed (the extra brstnet[spatial])",
)


@pytest.fixture(scope="module")
def trained(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Both folds of the usual settings, after one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    short = dataclasses.replace(settings, training=dataclasses.replace(settings.training, epochs=1))
    train(demo_store, short, folder / "fold_0")
    fit(demo_store, short, 1, folder / "fold_1", device=CPU, on_epoch=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def slide(demo_raw: Path, demo_store: Store) -> Path:
    """The held-out patient's slide."""
    return demo_raw / demo_store.sections[SECTION]["slide"]


@pytest.fixture(scope="module")
def whole_spots(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve spots at whole pixels of the slide."""
    width, height = Image.open(slide).size
    rng = np.random.default_rng(0)
    xy = {"x": rng.integers(40, width - 40, 12), "y": rng.integers(40, height - 40, 12)}
    file = tmp_path_factory.mktemp("spots") / "spots.csv"
    pd.DataFrame(xy).to_csv(file, index_label="spot")
    return file


@pytest.fixture(autouse=True)
def _few_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps take most of the time: none is drawn unasked, but for the module's own grid."""
    monkeypatch.setattr(plots, "MAPPED_GENES", 0)


def run(trained: Path, path: Path, out: Path, asked: Asked = HERE) -> Result:
    return predict_slide([trained], path, out, asked, device=CPU, progress=False)


@pytest.fixture(scope="module")
def gridded(trained: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The slide on a narrow grid, by both folds."""
    asked = dataclasses.replace(HERE, pitch_um=35.0, genes=())
    return run(trained, slide, tmp_path_factory.mktemp("gridded"), asked)


def changed_copy(
    trained: Path,
    folder: Path,
    change: Callable[[dict[str, Any]], None],
    folds: Sequence[int] = (0, 1),
) -> Path:
    """The models with other facts about their store."""
    shutil.copytree(trained, folder)
    for fold in folds:
        for file in (folder / f"fold_{fold}").rglob("checkpoint.json"):
            facts = json.loads(file.read_text())
            change(facts)
            file.write_text(json.dumps(facts))
    return folder


def told(um: float) -> Callable[[dict[str, Any]], None]:
    """A change that sets the microns per pixel."""
    return lambda facts: facts.update(um_per_px=dict.fromkeys(facts["um_per_px"], um))


def silent(facts: dict[str, Any]) -> None:
    """A change that leaves them out, as older checkpoints did."""
    del facts["um_per_px"]


# The same values ---------------------------------------------------------------------------------


def test_spots_of_a_store_are_predicted_as_through_the_store(
    trained: Path, slide: Path, demo_store: Store, tmp_path: Path
) -> None:
    spots = demo_store.path / SECTION / "spots.h5ad"
    found = run(trained, slide, tmp_path, dataclasses.replace(HERE, spots=spots)).adata
    ensemble = load_ensemble([trained], CPU)
    expected = predict_mean(ensemble, demo_store, [SECTION], progress=False)
    assert found.var_names.tolist() == ensemble.genes.index.tolist()
    assert np.abs(found.X - np.maximum(expected, 0)).max() < 1e-5
    assert expected.std() > 0.1
    kept = demo_store.spots([SECTION])
    assert found.obs_names.tolist() == kept["spot"].tolist()
    assert np.allclose(1 - found.obs["tissue_fraction"], kept["white_fraction"], atol=1e-6)
    assert (found.obs["array_x"].to_numpy() == kept["array_x"].to_numpy()).all()


def test_what_is_below_0_is_0_and_counted(
    trained: Path, slide: Path, demo_store: Store, tmp_path: Path
) -> None:
    spots = demo_store.path / SECTION / "spots.h5ad"
    found = run(trained, slide, tmp_path, dataclasses.replace(HERE, spots=spots))
    ensemble = load_ensemble([trained], CPU)
    below = predict_mean(ensemble, demo_store, [SECTION], progress=False) < 0
    assert 0 < below.mean() < 0.5
    assert (found.adata.X[below] == 0).all()
    assert (found.adata.X[~below] > 0).all()
    assert found.adata.var["clipped"].tolist() == below.sum(axis=0).tolist()
    (told,) = (w for w in found.warnings if "var clipped" in w)
    assert told.startswith(f"{below.mean():.1%} of the predictions, in {below.any(axis=0).sum()} ")


def test_the_spread_is_that_of_the_members(
    trained: Path, slide: Path, demo_store: Store, tmp_path: Path
) -> None:
    spots = demo_store.path / SECTION / "spots.h5ad"
    found = run(trained, slide, tmp_path, dataclasses.replace(HERE, spots=spots)).adata
    ensemble = load_ensemble([trained], CPU)
    each = [predict(m, demo_store, [SECTION])[ensemble.genes.index] for m in ensemble.members]
    assert np.allclose(found.layers["member_spread"], np.std(each, axis=0, ddof=1), atol=1e-5)
    one = predict_slide([trained / "fold_0"], slide, tmp_path / "one", HERE, device=CPU)
    assert "member_spread" not in one.adata.layers
    assert "one model: there is no spread over members" in one.warnings


def doubled(slide: Path) -> tuple[np.ndarray, np.ndarray]:
    """The slide's pixels, and the same with four in the place of each."""
    image = np.asarray(Image.open(slide))
    return image, image.repeat(2, axis=0).repeat(2, axis=1)


def twice(spots: Path, folder: Path) -> Path:
    table = pd.read_csv(spots)
    (2 * table[["x", "y"]]).assign(spot=table["spot"]).to_csv(folder / "twice.csv", index=False)
    return folder / "twice.csv"


def test_a_finer_slide_is_shrunk_to_the_models_pixels(
    trained: Path, slide: Path, whole_spots: Path, tmp_path: Path
) -> None:
    coarse = run(trained, slide, tmp_path / "a", dataclasses.replace(HERE, spots=whole_spots)).adata
    Image.fromarray(doubled(slide)[1]).save(tmp_path / "fine.png")
    spots = twice(whole_spots, tmp_path)
    asked = Asked(um_per_px=UM / 2, model_um_per_px=UM, spots=spots)
    fine = run(trained, tmp_path / "fine.png", tmp_path / "b", asked).adata
    assert np.abs(fine.X - coarse.X).max() < 0.02 * coarse.X.std()
    asked = dataclasses.replace(HERE, spots=spots)
    unscaled = run(trained, tmp_path / "fine.png", tmp_path / "c", asked).adata
    assert np.abs(unscaled.X - coarse.X).max() > 0.1 * coarse.X.std()
    assert fine.uns["brstnet"]["window_px"] == 128


@pytest.mark.parametrize("name", ["p.tif", "p.svs"])
def test_the_level_of_a_pyramid_that_fits_is_read(
    name: str, trained: Path, slide: Path, whole_spots: Path, tmp_path: Path
) -> None:
    """Scale from the file; the second level is the slide itself: the same bits come out."""
    image, large = doubled(slide)
    Image.fromarray(image).save(tmp_path / "same.png")
    asked = dataclasses.replace(HERE, spots=whole_spots)
    plain = run(trained, tmp_path / "same.png", tmp_path / "a", asked).adata
    if name == "p.tif":
        per_cm = round(10_000 / (UM / 2))
        write_tiled(tmp_path / name, [large, image], (per_cm, per_cm))
    else:
        text = aperio([large, image], UM / 2, 40)
        write_tiled(tmp_path / name, [large, image], description=text)
    asked = Asked(model_um_per_px=UM, spots=twice(whole_spots, tmp_path))
    found = run(trained, tmp_path / name, tmp_path / "b", asked).adata
    assert (found.X == plain.X).all()
    assert found.uns["brstnet"]["level_zoom"] == 2
    assert found.uns["brstnet"]["um_per_px"] == pytest.approx(UM / 2, rel=1e-4)
    assert (found.obsm["spatial"] == 2 * plain.obsm["spatial"]).all()


# The grid, and what is written -------------------------------------------------------------------


def test_a_grid_covers_the_tissue(gridded: Result, slide: Path) -> None:
    adata = anndata.read_h5ad(gridded.folder / "predictions.h5ad")
    assert adata.shape == gridded.adata.shape
    assert 20 < adata.n_obs < 400
    assert (adata.obs["tissue_fraction"] >= 0.5).all()
    pitch = 35 / UM
    step = np.diff(np.sort(adata.obs["pixel_x"].unique()))
    assert np.allclose(step / pitch, np.round(step / pitch))
    assert adata.obs_names[0] == f"{adata.obs['array_x'].iloc[0]}x{adata.obs['array_y'].iloc[0]}"
    image = cv2.cvtColor(np.asarray(Image.open(slide)), cv2.COLOR_RGB2GRAY)
    x, y = adata.obsm["spatial"].round().astype(int).T
    assert image[y, x].mean() < image.mean() - 10  # on tissue, which is darker


def test_what_a_reader_must_know_stands_beside_the_numbers(
    gridded: Result, trained: Path, settings: Settings
) -> None:
    adata = anndata.read_h5ad(gridded.folder / "predictions.h5ad")
    about = adata.uns["brstnet"]
    ensemble = load_ensemble([trained], CPU)
    assert about["protocol_line"] == settings.protocol.line()
    assert about["units"].startswith("natural log(1 + count), count scaled")
    assert about["model"].tolist() == [str(m.path) for m in ensemble.members]
    assert all(len(h) == 64 for h in about["model_sha256"])
    assert about["warnings"].split("\n") == list(gridded.warnings)
    assert any(w.startswith("expected PCC below 0.1: ") for w in gridded.warnings)
    assert set(adata.uns["spatial"]) == {gridded.adata.uns["brstnet"]["slide"].split(".")[0]}
    tables = [pd.read_parquet(m.path / "validation.parquet") for m in ensemble.members]
    gene = tables[0]["gene"].iloc[0]
    each = [
        t[t["gene"] == gene]["pcc"].fillna(0).median() for t in tables if gene in set(t["gene"])
    ]
    assert adata.var["expected_pcc"][gene] == pytest.approx(np.mean(each))
    assert adata.var["expected_pcc"].isna().sum() == len(ensemble.genes) - len(
        set.union(*(set(t["gene"]) for t in tables)) & set(ensemble.genes.index)
    )


def test_a_map_is_drawn_of_each_gene_asked_for(
    trained: Path, slide: Path, tmp_path: Path, gridded: Result
) -> None:
    assert len([f for f in gridded.files if f.startswith("gene_")]) == 4
    symbols = gridded.adata.var["symbol"]
    asked = dataclasses.replace(HERE, genes=(symbols.iloc[3], symbols.index[7]))
    found = run(trained, slide, tmp_path, asked)
    names = [overlay.file_name(found.adata, g) for g in (symbols.index[3], symbols.index[7])]
    assert sorted(found.files) == sorted(["predictions.h5ad", *names])
    image = np.asarray(Image.open(tmp_path / names[0]).convert("RGB"))
    assert image.std() > 20
    assert not list(tmp_path.glob(".predict*"))


def test_unknown_genes_are_refused_before_the_slide_is_read(trained: Path, tmp_path: Path) -> None:
    asked = dataclasses.replace(HERE, genes=("NOGENE",))
    with pytest.raises(ValueError, match=r"gene 'NOGENE' is not predicted \(the model predicts"):
        run(trained, tmp_path / "not_there.svs", tmp_path / "out", asked)
    symbols = pd.Series({"A1": "TWO", "A2": "TWO"})
    with pytest.raises(ValueError, match="'TWO' stands for A1, A2: give the id"):
        new_slide.genes_to_draw(symbols, pd.Series({"A1": 0.1, "A2": 0.2}), ["TWO"])


# Scale -------------------------------------------------------------------------------------------


def test_a_slide_of_unknown_scale_is_refused_where_the_models_is_known(
    trained: Path, slide: Path, tmp_path: Path
) -> None:
    models = changed_copy(trained, tmp_path / "models", told(0.69))
    with pytest.raises(ValueError, match=r"does not say its microns .* at 0\.690: give --mpp"):
        run(models, slide, tmp_path / "out", Asked())
    found = run(models, slide, tmp_path / "out", Asked(um_per_px=UM))
    assert found.adata.uns["brstnet"]["model_um_per_px"] == UM
    assert not any("microns" in w for w in found.warnings)


def test_a_checkpoint_says_the_microns_of_its_slides(
    trained: Path, slide: Path, demo_store: Store, tmp_path: Path
) -> None:
    members = load_ensemble([trained], CPU).members
    each = [demo_store.sections[n]["um_per_px"] for m in members for n in m.fold.train]
    assert len(each) > 4
    found = run(trained, slide, tmp_path, Asked(um_per_px=2.0))
    about = found.adata.uns["brstnet"]
    assert about["model_um_per_px"] == pytest.approx(np.median(each))
    assert about["model_um_per_px"] == pytest.approx(200 / 72, rel=0.02)  # the demo's array
    assert about["window_px"] == pytest.approx(64 * np.median(each) / 2)


def test_where_no_scale_is_known_the_window_is_the_pitch(
    trained: Path, slide: Path, tmp_path: Path
) -> None:
    models = changed_copy(trained, tmp_path / "models", silent)
    found = run(models, slide, tmp_path / "out", Asked())
    about = found.adata.uns["brstnet"]
    assert (about["pitch_px"], about["window_px"]) == (64, 64)
    assert np.isnan(about["um_per_px"])
    assert any("the pitch is one window" in w for w in found.warnings)
    assert any("was taken in this slide's pixels" in w for w in found.warnings)


def test_impossible_scales_are_refused() -> None:
    assert Asked(um_per_px=0.05).um_per_px == 0.05
    for asked in ({"um_per_px": 0.0}, {"model_um_per_px": 300.0}, {"pitch_um": -1.0}):
        with pytest.raises(ValueError, match=next(iter(asked))):
            Asked(**asked)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_tissue"):
        Asked(min_tissue=1.5)


# Intervals ---------------------------------------------------------------------------------------


def intervals_of(genes: pd.Index, folder: Path) -> Path:
    """Half-widths of all genes but the last; the first one's is infinite at 90 %."""
    rows = [
        {"gene": g, "level": level, "half_width": level / 3, "patients": 20, "spots": 99}
        for g in genes[:-1]
        for level in (0.5, 0.9)
    ]
    table = pd.DataFrame(rows)
    table.loc[(table["gene"] == genes[0]) & (table["level"] == 0.9), "half_width"] = np.inf
    table.to_parquet(folder / "intervals.parquet")
    return folder / "intervals.parquet"


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_stand_beside_predictions(
    level: float, trained: Path, slide: Path, whole_spots: Path, tmp_path: Path
) -> None:
    genes = load_ensemble([trained], CPU).genes.index
    asked = dataclasses.replace(
        HERE, spots=whole_spots, intervals=intervals_of(genes, tmp_path), level=level
    )
    found = run(trained, slide, tmp_path / "out", asked)
    adata = anndata.read_h5ad(tmp_path / "out" / "predictions.h5ad")
    assert np.isnan(adata.layers["upper"][:, -1]).all()
    assert np.isinf(adata.layers["upper"][:, 0]).all() == (level == 0.9)
    inner = np.s_[:, 1:-1]
    lower, upper, x = (a[inner] for a in (adata.layers["lower"], adata.layers["upper"], adata.X))
    known = x > 0  # elsewhere the prediction itself was cut
    assert np.allclose(upper[known], x[known] + level / 3, atol=1e-6)
    assert np.allclose(lower[known], np.maximum(x[known] - level / 3, 0), atol=1e-6)
    assert (lower >= 0).all()
    assert (upper[~known] <= level / 3).all()
    about = adata.uns["brstnet"]
    assert (about["interval_level"], about["interval_patients"]) == (level, 20)
    assert f"1 of {len(genes)} genes have no interval in intervals.parquet" in found.warnings
    assert any("approximate" in w for w in found.warnings)
    endless = f"interval is infinite for 1 of {len(genes)} genes"
    assert any(endless in w for w in found.warnings) == (level == 0.9)


def test_intervals_of_another_model_are_refused_before_the_slide_is_read(
    trained: Path, tmp_path: Path
) -> None:
    file = intervals_of(pd.Index(["A", "B", "C"]), tmp_path)
    asked = dataclasses.replace(HERE, intervals=file)
    with pytest.raises(ValueError, match=r"has none of the model's \d+ genes"):
        run(trained, tmp_path / "not_there.svs", tmp_path / "out", asked)
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        dataclasses.replace(HERE, level=90)


# What is refused, and what is warned of ----------------------------------------------------------


def test_a_slide_without_tissue_is_refused(trained: Path, tmp_path: Path) -> None:
    glass = np.random.default_rng(0).normal(238, 2, (400, 400, 3)).astype(np.uint8)
    Image.fromarray(glass).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"glass\.png: no tissue found"):
        run(trained, tmp_path / "glass.png", tmp_path / "out")
    glass[::20] = 60  # scratches
    Image.fromarray(glass).save(tmp_path / "scratched.png")
    with pytest.raises(ValueError, match=r"scratched\.png: (no tissue found|the stain cannot be)"):
        run(trained, tmp_path / "scratched.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spots_off_the_slide_are_left_out_and_told(
    trained: Path, slide: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.csv").write_text("x,y\n100,120\n5,5\n")
    found = run(trained, slide, tmp_path, dataclasses.replace(HERE, spots=tmp_path / "some.csv"))
    assert found.adata.obs_names.tolist() == ["0"]
    assert any(w.startswith("1 of 2 spots were left out") for w in found.warnings)
    (tmp_path / "none.csv").write_text("x,y\n-100,120\n99999,5\n")
    with pytest.raises(ValueError, match=r"none\.csv: no spot's window of 64 px lies on"):
        run(trained, slide, tmp_path, dataclasses.replace(HERE, spots=tmp_path / "none.csv"))


def test_models_of_other_patches_are_not_averaged(
    trained: Path, slide: Path, tmp_path: Path
) -> None:
    def other(facts: dict[str, Any]) -> None:
        facts["store"]["prepare"]["window_px"] = 128

    models = changed_copy(trained, tmp_path / "models", other, folds=[1])
    with pytest.raises(ValueError, match="trained on patches of different windows"):
        run(models, slide, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["store"].pop("prepare"),
        lambda facts: facts["store"]["prepare"].update(window_px=10**9),
        lambda facts: facts["store"]["prepare"].update(input_px="big"),
        lambda facts: facts["store"]["stain_target"].update(stain_matrix=[[1, 2], [3, 4]]),
        lambda facts: facts["store"].update(stain_target=7),
        lambda facts: facts.update(um_per_px=7),
        told("wide"),  # type: ignore[arg-type]
    ],
)
def test_a_spoilt_description_of_the_store_is_named(
    change: Callable[[dict[str, Any]], None], trained: Path, slide: Path, tmp_path: Path
) -> None:
    models = changed_copy(trained, tmp_path / "models", change)
    with pytest.raises(ValueError, match="damaged, or made by something else"):
        predict_slide([models], slide, tmp_path / "out", Asked(), device=CPU, progress=False)


def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_read(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out: is a file; --out must name a folder"):
        run(trained, tmp_path / "not_there.svs", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_foreign_stain_is_told(trained: Path, slide: Path, tmp_path: Path) -> None:
    image = np.asarray(Image.open(slide))
    Image.fromarray(image[..., [2, 1, 0]]).save(tmp_path / "blue.png")
    found = run(trained, tmp_path / "blue.png", tmp_path / "out")
    assert any(w.startswith("stain far from training") for w in found.warnings)
    angles = new_slide.stain_angles(np.eye(3)[:2], np.array([[1, 1, 0], [0, 2, 0]]))
    assert angles == pytest.approx((45, 0))


def test_a_folder_that_is_no_zarr_store_is_left_alone(tmp_path: Path) -> None:
    place, new = tmp_path / "slide.zarr", tmp_path / "new"
    for folder in (place, new):
        folder.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"slide\.zarr: is there and is no zarr store"):
        new_slide._replace(new, place)
    assert (place / "mine.txt").is_file()


@pytest.mark.parametrize(
    ("um", "length"), [(1, 1), (9.9, 5), (1300, 1000), (2000, 2000), (0.3, 0.2)]
)
def test_scale_bars_have_round_lengths(um: float, length: float) -> None:
    assert overlay.round_length(um) == pytest.approx(length)


# The command, and SpatialData --------------------------------------------------------------------


def test_the_command_says_what_it_found(
    trained: Path, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", trained / "fold_0", trained / "fold_1", slide, "--out", tmp_path / "out"]
    words += ["--mpp", UM, "--model_mpp", UM, "--pitch_um", 90, "--device", "cpu"]
    assert cli.main([str(w) for w in words]) == 0
    said = capsys.readouterr().out
    assert "spots, " in said
    assert "warning: expected PCC below 0.1" in said
    assert "predictions.h5ad" in said


def test_without_the_extra_nothing_is_begun(
    trained: Path,
    slide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(spatial.importlib.util, "find_spec", lambda _: None)
    words = ["predict", trained, slide, "--out", tmp_path / "out", "--spatialdata"]
    assert cli.main([str(w) for w in words]) == 2
    assert "brstnet[spatial]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_tifffile
def test_a_gene_asked_for_is_an_ome_tiff_too(
    trained: Path, slide: Path, whole_spots: Path, tmp_path: Path
) -> None:
    import tifffile

    image, large = doubled(slide)
    per_cm = round(10_000 / (UM / 2))
    write_tiled(tmp_path / "p.tif", [large, image], (per_cm, per_cm))
    spots = twice(whole_spots, tmp_path)
    asked = Asked(model_um_per_px=UM, spots=spots, genes=(GENE,), ome_tiff=True)
    found = run(trained, tmp_path / "p.tif", tmp_path / "out", asked)
    assert found.files == [f"gene_{GENE}.ome.tif", f"gene_{GENE}.png", "predictions.h5ad"]
    with tifffile.TiffFile(tmp_path / "out" / f"gene_{GENE}.ome.tif") as tiff:
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
    assert pixels["Channel"]["Name"] == GENE
    assert (pixels["SizeX"], pixels["SizeY"]) == (image.shape[1], image.shape[0])
    assert pixels["PhysicalSizeX"] == pytest.approx(UM, rel=1e-4)  # of the level that was read
    with openslide.OpenSlide(tmp_path / "out" / f"gene_{GENE}.ome.tif") as handle:
        x, y = (found.adata.obsm["spatial"][0] / 2).astype(int).tolist()
        painted = np.asarray(handle.read_region((x, y), 0, (1, 1)))[0, 0, :3]
    assert np.abs(painted - image[y, x].astype(float)).max() > 20


@needs_spatialdata
def test_spatialdata_holds_slide_spots_and_predictions(
    trained: Path, slide: Path, whole_spots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spatialdata

    monkeypatch.setattr(spatial, "CHUNK_PX", 200)
    monkeypatch.setattr(spatial, "SMALLEST_PX", 200)
    image, large = doubled(slide)
    per_cm = round(10_000 / (UM / 2))
    write_tiled(tmp_path / "p.tif", [large, image], (per_cm, per_cm))
    asked = Asked(model_um_per_px=UM, spots=twice(whole_spots, tmp_path), spatialdata=True)
    for _ in range(2):  # the second takes the place of the first
        found = run(trained, tmp_path / "p.tif", tmp_path / "out", asked)
    sdata = spatialdata.read_zarr(tmp_path / "out" / "slide.zarr")
    top = sdata["slide"]["scale0"].image.to_numpy()
    assert (top.transpose(1, 2, 0) == image).all()
    assert len(sdata["slide"].children) > 2
    table = sdata["predictions"]
    assert (table.layers["predicted"] == found.adata.X).all()
    assert table.uns["brstnet"]["warnings"] == found.adata.uns["brstnet"]["warnings"]
    spots = sdata["spots"]
    assert spots.index.tolist() == table.obs["instance_id"].tolist()
    assert np.allclose(np.column_stack([spots.geometry.x, spots.geometry.y]), table.obsm["spatial"])
    extent = spatialdata.get_extent(sdata["slide"])
    assert extent["x"] == pytest.approx((0, large.shape[1]))
