"""The demo tissue: its layout, its bytes, and that what it plants (and does not plant) is there."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from brstnet.data.synthetic import DRIVERS, SUBTYPES, Demo, make_demo

TINY = Demo(patients=6, sections_per_patient=1, spots_per_section=12, pitch_px=36, genes=140)
SMALL = Demo(patients=6, sections_per_patient=2, spots_per_section=60, genes=240, seed=3)


@dataclass(frozen=True, kw_only=True)
class Read:
    """A demo as a plain reader finds it: counts (all array spots), spots and labels by section."""

    folder: Path
    metadata: pd.DataFrame
    counts: dict[str, pd.DataFrame]
    spots: dict[str, pd.DataFrame]
    genes: pd.DataFrame
    truth: pd.DataFrame

    def target(self, section: str) -> pd.DataFrame:
        """log1p(count / spot total * 8000) of the spots under tissue with 1000 counts or more."""
        counts = self.counts[section].reindex(columns=self.genes.index, fill_value=0)
        counts = counts.loc[self.spots[section].index]
        totals = counts.sum(axis=1)
        return np.log1p(counts.div(totals, axis=0) * 8000)[totals >= 1000]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Read:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    make_demo(folder, SMALL)
    metadata = pd.read_csv(folder / "metadata.csv")
    metadata.index = metadata["patient"] + "_" + metadata["replicate"]
    return Read(
        folder=folder,
        metadata=metadata,
        counts={
            section: pd.read_csv(folder / name, sep="\t", index_col=0)
            for section, name in metadata["count_matrix"].items()
        },
        spots={
            section: pd.read_csv(folder / name, index_col=0)
            for section, name in metadata["spot_coordinates"].items()
        },
        genes=pd.read_parquet(folder / "truth.parquet").set_index("gene"),
        truth=pd.read_parquet(folder / "truth_spots.parquet").set_index(["section", "spot"]),
    )


def test_metadata_names_every_file_and_nothing_else_is_there(small: Read) -> None:
    files = ["histology_image", "spot_coordinates", "count_matrix", "tumor_annotation"]
    assert list(small.metadata) == ["type", "patient", "replicate", *files]
    named = set(small.metadata[files].to_numpy().ravel())
    beside = {"metadata.csv", "truth.parquet", "truth_spots.parquet"}
    assert {path.name for path in small.folder.iterdir()} == named | beside
    assert len(named) == 12 * 4
    assert set(small.metadata["type"]) == set(SUBTYPES)
    assert small.metadata.groupby("patient")["type"].nunique().eq(1).all()
    prefixes = small.metadata[files[:2]].apply(lambda names: names.str.contains("_BT"))
    assert (prefixes["histology_image"] != prefixes["spot_coordinates"]).any()


def test_counts_hold_all_array_spots_and_lack_the_genes_without_a_count(small: Read) -> None:
    side = SMALL.array_side
    array = {f"{x}x{y}" for x in range(1, side + 1) for y in range(1, side + 1)}
    for section, counts in small.counts.items():
        assert set(counts.index) == array
        assert counts.index.is_unique
        assert counts.any().all()
        assert set(counts.columns) < set(small.genes.index)
        under = small.spots[section].index
        assert len(under) == SMALL.spots_per_section
        assert (
            counts.drop(under).sum(axis=1).median() < 0.02 * counts.loc[under].sum(axis=1).median()
        )
    assert small.genes.index.str.fullmatch(r"ENSG999\d{8}").all()


def test_some_spots_under_tissue_fall_below_the_count_filter(small: Read) -> None:
    totals = pd.concat(
        [small.counts[s].loc[small.spots[s].index].sum(axis=1) for s in small.counts]
    )
    assert 0 < (totals < 1000).mean() < 0.06
    assert 6000 < totals.median() < 10000


def test_labels_have_the_quirks_of_the_real_files(small: Read) -> None:
    for section, name in small.metadata["tumor_annotation"].items():
        text = gzip.decompress((small.folder / name).read_bytes()).decode()
        assert "\n" not in text
        header, *lines = (line.split("\t") for line in text.rstrip("\r").split("\r"))
        assert len(header) == 4
        assert {len(line) for line in lines} == {5}
        spots = [f"{round(float(x))}x{round(float(y))}" for _, x, y, _, _ in lines]
        assert spots == list(small.spots[section].index)
        assert any(not float(x).is_integer() for _, x, *_ in lines)
        assert {line[4] for line in lines} == {"tumor", "non"}


def test_high_block_is_the_top_by_mean(small: Read) -> None:
    means = pd.concat([small.counts[s].loc[small.spots[s].index] for s in small.counts]).mean()
    high = small.genes.index[small.genes["block"] == "high"]
    assert set(means.nlargest(120).index) == set(high)
    assert small.genes.groupby(["block", "group"]).size().tolist() == [60, 60, 60, 60]


def test_drivers_are_visible_at_the_spots(small: Read) -> None:
    """Nuclei take out red light, eosin green: X is the pixel column and Y the row."""
    correlations = []
    for section, spots in small.spots.items():
        image = cv2.imread(str(small.folder / small.metadata["histology_image"][section]))
        assert image.shape == (SMALL.size_px, SMALL.size_px, 3)
        patches = np.stack(
            [image[y - 32 : y + 32, x - 32 : x + 32] for x, y in spots.astype(int).to_numpy()]
        )
        red, green = (np.log(patches[..., c] + 1.0).mean(axis=(1, 2)) for c in (2, 1))
        truth = small.truth.loc[section].loc[spots.index]
        correlations.append(
            (
                stats.pearsonr(-red, truth["nuclear_fraction"])[0],
                stats.pearsonr(red - green, truth["eosin"])[0],
            )
        )
    assert np.median(correlations, axis=0).min() > 0.5


def test_ceiling_of_the_planted_genes_is_near_eight_tenths(small: Read) -> None:
    planted = small.genes["group"] == "planted"
    assert small.genes.loc[~planted, ["ceiling", "driver"]].isna().all(axis=None)
    assert small.genes.loc[~planted, "effect"].eq(0).all()
    assert small.genes.loc[planted, "ceiling"].notna().all()
    high = small.genes.loc[planted & (small.genes["block"] == "high"), "ceiling"]
    assert 0.7 < high.median() < 0.9
    assert high.max() < 1


def driver_z(small: Read, genes: pd.Index) -> np.ndarray:
    """Fisher z of target and driver within sections, summed over them: N(0, 1) if independent."""
    total, weight = np.zeros((len(genes), len(DRIVERS))), 0
    for section in small.counts:
        target = small.target(section)
        drivers = small.truth.loc[section].loc[target.index, DRIVERS]
        both = np.corrcoef(target[genes].to_numpy().T, drivers.to_numpy().T)
        total += np.arctanh(both[: len(genes), len(genes) :]) * (len(target) - 3)
        weight += len(target) - 3
    return total / np.sqrt(weight)


def test_high_null_genes_are_independent_of_the_drivers(small: Read) -> None:
    """Analytic null: of 180 |z|, 5 % pass 1.96; that over 19 do, or any 4.5, is below 1 in 1000."""
    null = small.genes.index[(small.genes["block"] == "high") & (small.genes["group"] == "null")]
    z = np.abs(driver_z(small, null))
    assert (z > 1.96).sum() <= stats.binom.isf(1e-3, z.size, 0.05)
    assert z.max() < stats.norm.isf(1e-3 / 2 / z.size)


def test_high_planted_genes_follow_their_driver_in_their_direction(small: Read) -> None:
    chosen = (small.genes["block"] == "high") & (small.genes["group"] == "planted")
    planted = small.genes[chosen]
    z = driver_z(small, planted.index)
    own = z[np.arange(len(z)), [DRIVERS.index(driver) for driver in planted["driver"]]]
    assert (own * np.sign(planted["effect"]) > 4.7).all()


def test_library_size_is_a_nuisance_the_drivers_do_not_explain(small: Read) -> None:
    log_size = np.log(small.truth["library_size"])
    assert abs(small.truth[DRIVERS].corrwith(log_size)).max() < 0.2
    assert small.truth[DRIVERS].mean().abs().max() < 0.05


def test_same_settings_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()  # an empty folder is as good as none
    heard: list[str] = []
    for name in "ab":
        make_demo(tmp_path / name, TINY, heard.append)
    assert heard[:6] == [f"BC9000{i}_C1" for i in range(1, 7)] == heard[6:]
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert first == second
    assert len({content for name, content in first.items() if name.endswith(".jpg")}) == 6


def test_full_folder_and_file_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    mine = tmp_path / "raw" / "mine.txt"
    mine.write_text("keep")
    for folder in (tmp_path / "raw", mine):
        with pytest.raises(FileExistsError, match="new or an empty folder"):
            make_demo(folder, TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", "mine.txt"]


def test_nothing_is_left_of_a_demo_that_stopped_half_way(tmp_path: Path) -> None:
    def stop(section: str) -> None:
        raise KeyboardInterrupt(section)

    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "raw", TINY, stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patients": 5}, r"patients must lie in 6\.\.99, got 5"),
        ({"sections_per_patient": 0}, r"sections_per_patient must lie in 1\.\.9, got 0"),
        ({"spots_per_section": 3}, r"spots_per_section must lie in 12\.\.1000"),
        ({"pitch_px": 20}, r"pitch_px must lie in 36\.\.300"),
        ({"genes": 100}, r"genes must lie in 140\.\.30000"),
        ({"seed": -1}, r"seed must lie in 0\.\."),
        ({"patients": 2, "seed": -1}, r"patients .*; seed "),
    ],
)
def test_settings_out_of_range_are_named_with_the_range(
    settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Demo(**settings)
