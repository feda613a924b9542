"""The patch store and its making: against the raw files, and against an undisturbed run."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_raw import GENES, content, put, put_slide, text, tiny, write_her2st, write_stnet

from brstnet.config import Prepare
from brstnet.data import stain
from brstnet.data.index import FORMAT, VERSION, partial_path
from brstnet.data.patches import open_image, resize, white_mask
from brstnet.data.prepare import choose_target, prepare
from brstnet.data.readers import stnet
from brstnet.data.store import Store

SETTINGS = Prepare(stain="none", min_counts=10, window_px=16, input_px=16)
GENES_OF = {
    "BC00001_C1": GENES,
    "BC00001_C2": GENES[:3],
    "BC00002_D1": (*GENES[1:], "ENSG00000999999"),
    "BC00003_A1": tuple(f"{gene}.7" for gene in GENES),  # with a version
}
PLANTED = {name: tiny(seed, genes) for seed, (name, genes) in enumerate(GENES_OF.items())}
UNION = [*GENES, "ENSG00000999999"]

pytestmark = pytest.mark.usefixtures("hgnc_once")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_stnet(tmp_path / "raw", PLANTED)


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The planted sections as a store; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    return prepare(write_stnet(folder / "raw", PLANTED), folder / "store", SETTINGS, progress=False)


def make(raw: Path, settings: Prepare = SETTINGS, name: str = "store") -> Store:
    return prepare(raw, raw.parent / name, settings, progress=False)


def expected_status() -> dict[str, str]:
    """The status of each of the 30 planted spots, by the rules of `tiny`."""
    status = {f"{x}x{y}": "kept" for x in range(6) for y in range(5)}
    status |= {f"0x{y}": "not_under_tissue" for y in range(5)}
    status |= {f"1x{y}": "crosses_border" for y in range(5)}
    return status | {"2x2": "no_counts", "3x3": "below_min_counts"}


def planted_kept(section: str) -> list[str]:
    return [s for s in PLANTED[section].spots.index if expected_status()[s] == "kept"]


# --- content


def test_counts_are_the_raw_files_over_the_union_of_genes(tiny_store: Store) -> None:
    assert tiny_store.genes.index.tolist() == UNION
    for section, planted in PLANTED.items():
        columns = planted.counts.columns.str.removesuffix(".7")
        expected = planted.counts.set_axis(columns, axis=1).loc[planted_kept(section)]
        found = tiny_store.counts([section])
        assert found.dtype.kind == "i"
        np.testing.assert_array_equal(
            found.toarray(), expected.reindex(columns=UNION, fill_value=0).to_numpy()
        )
    several = ["BC00002_D1", "BC00001_C2"]
    stacked = np.vstack([tiny_store.counts([name]).toarray() for name in several])
    np.testing.assert_array_equal(tiny_store.counts(several).toarray(), stacked)


def test_counts_of_the_demo_are_those_of_pandas(demo_raw: Path, demo_store: Store) -> None:
    metadata = pd.read_csv(demo_raw / "metadata.csv").set_index("patient")
    tables = {
        section: pd.read_csv(
            demo_raw / metadata.loc[entry["patient"], "count_matrix"], sep="\t", index_col=0
        )
        for section, entry in demo_store.sections.items()
    }
    genes = sorted(set().union(*(table.columns for table in tables.values())))
    assert demo_store.genes.index.tolist() == genes
    lacking = 0
    for section, table in tables.items():
        kept = demo_store.spots([section])["spot"]
        expected = table.reindex(columns=genes, fill_value=0).loc[kept]
        np.testing.assert_array_equal(demo_store.counts([section]).toarray(), expected.to_numpy())
        lacking += len(genes) - table.shape[1]
    assert lacking > 0, "the demo leaves genes out, as the paper's data does"


def test_patches_and_spots_stand_in_the_order_of_the_raw_file(tiny_store: Store) -> None:
    for section, planted in PLANTED.items():
        spots = tiny_store.spots([section])
        kept = planted_kept(section)
        assert spots["spot"].tolist() == kept
        assert set(spots["section"]) == {section}
        assert set(spots["patient"]) == {section.split("_")[0]}
        np.testing.assert_array_equal(
            spots["total_counts"], planted.counts.loc[kept].sum(axis=1).to_numpy()
        )
        np.testing.assert_allclose(
            spots[["pixel_x", "pixel_y"]].to_numpy(), planted.spots.loc[kept], rtol=1e-14
        )
        assert spots["label"].tolist() == [planted.labels.get(spot, "") for spot in kept]
        raw = tiny_store.path.parent / "raw"
        with Image.open(raw / f"HE_BT{section.removeprefix('BC')}.jpg") as slide:
            corners = np.rint(planted.spots.loc[kept].to_numpy()).astype(int) - 8
            crops = [np.array(slide.crop((x, y, x + 16, y + 16))) for x, y in corners]
            mask = white_mask(np.array(slide))
        patches = tiny_store.patches(section)
        assert isinstance(patches, np.memmap)
        np.testing.assert_array_equal(patches, crops)
        white = [mask[y : y + 16, x : x + 16].mean() for x, y in corners]
        np.testing.assert_allclose(spots["white_fraction"], white, rtol=1e-6)
        assert 0 == min(white) < max(white), "some patches are partly white"


def test_spots_of_several_sections_are_numbered_through(tiny_store: Store) -> None:
    spots = tiny_store.spots(["BC00002_D1", "BC00001_C1"])
    assert spots.index.tolist() == list(range(36))
    assert spots["section"].tolist() == ["BC00002_D1"] * 18 + ["BC00001_C1"] * 18


def test_ledger_holds_every_raw_spot_once_with_its_reason(tiny_store: Store) -> None:
    for section in PLANTED:
        ledger = tiny_store.ledger(section)
        assert not ledger["spot"].duplicated().any()
        assert ledger.set_index("spot")["status"].to_dict() == expected_status()


@pytest.mark.parametrize("store", ["tiny_store", "demo_store"])
def test_spots_in_are_spots_kept_and_lost(store: str, request: pytest.FixtureRequest) -> None:
    opened: Store = request.getfixturevalue(store)
    for section, entry in opened.sections.items():
        assert entry["spots_raw"] == entry["spots_kept"] + sum(entry["lost"].values())
        ledger = opened.ledger(section)
        assert len(ledger) == entry["spots_raw"]
        status = ledger["status"].value_counts().to_dict()
        assert status == {"kept": entry["spots_kept"], **entry["lost"]}
        assert entry["spots_kept"] == len(opened.patches(section)) == len(opened.spots([section]))


def test_info_has_the_documented_keys(tiny_store: Store) -> None:
    info = json.loads(json.dumps(tiny_store.info(), allow_nan=False))
    assert {"format", "version", "genes", "sections"} <= set(info)
    assert (info["format"], info["version"], info["genes"]) == (FORMAT, VERSION, 5)
    assert [s["section"] for s in info["sections"]] == sorted(PLANTED)
    for entry in info["sections"]:
        keys = {"section", "patient", "spots_raw", "spots_kept", "lost", "um_per_px"}
        assert keys <= set(entry)
        assert (entry["spots_raw"], entry["spots_kept"]) == (30, 18)
        assert entry["um_per_px"] == pytest.approx(10, rel=0.03)  # 200 um over 20 px
        kept = planted_kept(entry["section"])
        totals = PLANTED[entry["section"]].counts.loc[kept].sum(axis=1)
        assert entry["median_counts"] == totals.median()
    assert info["patients"] == tiny_store.patients == ["BC00001", "BC00002", "BC00003"]


def test_a_scale_that_cannot_be_known_is_null(tmp_path: Path) -> None:
    """NaN would be no JSON."""
    planted = tiny()
    row = [s for s in planted.spots.index if s.endswith("x1")]
    few = SimpleNamespace(**{**vars(planted), "spots": planted.spots.loc[row]})
    store = make(write_stnet(tmp_path / "raw", {"BC1_A1": few}))
    assert json.loads(json.dumps(store.info(), allow_nan=False))["sections"][0]["um_per_px"] is None
    assert store.um_per_px(["BC1_A1"]) == {"BC1_A1": None}


def test_a_scale_that_is_no_number_is_refused(tiny_store: Store) -> None:
    names = list(tiny_store.sections)
    assert all(9 < um < 11 for um in tiny_store.um_per_px(names).values() if um)
    for wrong in ("wide", -1.0, [0.5], {}):
        store = Store(tiny_store.path)
        store.sections[names[0]]["um_per_px"] = wrong
        with pytest.raises(ValueError, match=r"um_per_px of section '.*' must be a number above 0"):
            store.um_per_px(names)
    del store.sections[names[0]]["um_per_px"]  # stores made before
    assert store.um_per_px(names[:1]) == {names[0]: None}


def test_sections_of_patients(tiny_store: Store) -> None:
    assert tiny_store.of_patients(["BC00001"]) == ["BC00001_C1", "BC00001_C2"]
    assert tiny_store.of_patients([]) == []
    with pytest.raises(ValueError, match="no patient BC7, BC8; it has BC00001, BC00002, BC00003"):
        tiny_store.of_patients(["BC8", "BC00001", "BC7"])


def test_the_filter_takes_what_is_fewer_than_min_counts(raw: Path) -> None:
    """Spot 3x3 has one count in all: kept at 1, lost at 2."""
    for least, status in ((1, "kept"), (2, "below_min_counts")):
        settings = Prepare(stain="none", min_counts=least, window_px=16, input_px=16)
        ledger = make(raw, settings, f"least_{least}").ledger("BC00001_C1").set_index("spot")
        assert ledger.loc["3x3", "status"] == status


# --- hashes


@pytest.mark.parametrize(
    "name",
    [
        "BC00001_C2/patches.npy",
        "BC00002_D1/spots.h5ad",
        "BC00003_A1/ledger.parquet",
        "genes.parquet",
    ],
)
def test_verify_finds_a_flipped_byte(tiny_store: Store, tmp_path: Path, name: str) -> None:
    copy = Store(shutil.copytree(tiny_store.path, tmp_path / "copy"))
    assert copy.verify() == []
    file = copy.path / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert copy.verify() == [name]


def test_the_same_raw_data_makes_the_same_bytes(raw: Path, tiny_store: Store) -> None:
    again = make(raw, name="again")
    assert content(again.path) == content(tiny_store.path)
    assert again.digest == tiny_store.digest


@pytest.mark.parametrize("change", ["count", "position", "slide", "settings"])
def test_digest_changes_with_content(raw: Path, tiny_store: Store, change: str) -> None:
    settings = SETTINGS
    section = PLANTED["BC00001_C1"]
    if change == "count":
        counts = section.counts.copy()
        counts.loc["4x4", GENES[0]] += 1
        put(raw / "BC00001_C1_stdata.tsv.gz", text(counts))
    elif change == "position":
        spots = section.spots.copy()
        spots.loc["4x4", "X"] += 0.01
        put(raw / "spots_BT00001_C1.csv.gz", text(spots, ","))
    elif change == "slide":
        put_slide(raw / "HE_BT00001_C1.jpg", 255 - section.slide)
    else:
        settings = Prepare(stain="none", min_counts=11, window_px=18, input_px=16)
    assert make(raw, settings).digest != tiny_store.digest


# --- what is no store


@pytest.fixture
def copied(tiny_store: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store.path, tmp_path / "copy"))


def change_index(store: Path, **values: object) -> None:
    index = json.loads((store / "index.json").read_text())
    (store / "index.json").write_text(json.dumps(index | values))


def test_a_store_of_a_newer_format_is_refused_by_name(copied: Path, raw: Path) -> None:
    change_index(copied, version=VERSION + 1)
    told = f"index.json: the store has format version {VERSION + 1}.*reads up to {VERSION}: update"
    with pytest.raises(ValueError, match=told):
        Store(copied)
    with pytest.raises(ValueError, match=told):
        prepare(raw, copied, SETTINGS, progress=False)


def test_another_format_is_refused(copied: Path) -> None:
    change_index(copied, format="anndata")
    with pytest.raises(ValueError, match="format is 'anndata', a store has 'brstnet-store'"):
        Store(copied)


def test_a_damaged_index_is_named(copied: Path) -> None:
    text = (copied / "index.json").read_text()
    (copied / "index.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        Store(copied)


@pytest.mark.parametrize("name", ["BC00001_C2/patches.npy", "genes.parquet"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing from the store; remove"):
        Store(copied)


def test_a_half_written_store_is_no_store(copied: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no patch store here; brstnet prepare"):
        Store(copied.parent / "nowhere")
    copied.rename(partial_path(copied))
    with pytest.raises(FileNotFoundError, match="half-written one waits beside it: run prepare"):
        Store(copied)


# --- again


def test_prepare_again_returns_the_store(raw: Path) -> None:
    first = make(raw)
    before = content(first.path)
    stamps = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    assert make(raw).digest == first.digest
    assert content(first.path) == before
    assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*")} == stamps, (
        "nothing is rewritten"
    )


@pytest.mark.parametrize("change", ["settings", "counts", "labels", "one section less"])
def test_prepare_again_with_anything_else_is_refused(raw: Path, change: str) -> None:
    before = content(make(raw).path)
    settings = SETTINGS
    if change == "settings":
        settings = Prepare(stain="none", min_counts=10, window_px=16, input_px=32)
    elif change == "counts":  # the same size, another digit
        counts = PLANTED["BC00001_C1"].counts
        put(raw / "BC00001_C1_stdata.tsv.gz", text(counts.replace(counts.iloc[0, 0], 11)))
    elif change == "labels":
        (raw / "BC00001_C1_Coords.tsv.gz").unlink()
    else:
        pd.read_csv(raw / "metadata.csv").iloc[1:].to_csv(raw / "metadata.csv", index=False)
    with pytest.raises(FileExistsError, match="other settings or other raw data; remove it or"):
        make(raw, settings)
    assert content(raw.parent / "store") == before


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file"])
def test_prepare_leaves_what_is_no_store_alone(raw: Path, kind: str) -> None:
    there = raw.parent / "store"
    if kind == "file":
        there.write_text("mine")
    else:
        there.mkdir()
    if kind == "folder":
        (there / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="store: is there and is no store"):
        make(raw)
    if kind != "empty folder":
        mine = there if kind == "file" else there / "thesis.txt"
        assert mine.read_text() == "mine"


def test_what_was_left_unfinished_with_other_settings_is_refused(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 3, "np.save")
        with pytest.raises(OSError, match="No space"):
            make(raw)
    before = content(partial_path(raw.parent / "store"))
    with pytest.raises(FileExistsError, match=r"store\.partial: left unfinished with other sett"):
        make(raw, Prepare(stain="none", min_counts=10, window_px=16, input_px=32))
    assert content(partial_path(raw.parent / "store")) == before


# --- full disk


def fail_at(patch: pytest.MonkeyPatch, number: int, kind: str) -> None:
    """Let the disk be full at the `number`-th section."""
    calls = []

    def full(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) != number:
                return original(*args, **options)
            path = next(a for a in args if isinstance(a, Path))
            path.write_bytes(b"half")
            if kind == "np.save, as numpy says it":
                raise OSError("12345 requested and 678 written")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        return write

    if kind.startswith("np.save"):
        patch.setattr(np, "save", full(np.save))
    elif kind == "to_parquet":
        patch.setattr(pd.DataFrame, "to_parquet", full(pd.DataFrame.to_parquet))
    else:
        patch.setattr(Path, "write_bytes", full(Path.write_bytes))


@pytest.mark.parametrize("kind", ["np.save", "np.save, as numpy says it", "to_parquet"])
def test_a_full_disk_keeps_finished_sections_and_the_next_run_completes(
    raw: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    partial = partial_path(raw.parent / "store")
    with monkeypatch.context() as patch:
        fail_at(patch, 3, kind)
        with pytest.raises(OSError, match=r"No space|requested and") as caught:
            make(raw)
    assert caught.value.errno == errno.ENOSPC
    (note,) = caught.value.__notes__
    assert f"{partial}: the disk is full; finished sections are kept" in note
    assert "run the same command again" in note
    assert not (raw.parent / "store").exists()
    finished = content(partial)
    names = {name.split("/")[0] for name in finished if name.endswith("entry.json")}
    assert names == {"BC00001_C1", "BC00001_C2"}
    stamps = {p: p.stat().st_mtime_ns for n in names for p in (partial / n).iterdir()}

    store = make(raw)
    assert content(store.path) == content(tiny_store.path)
    for path, stamp in stamps.items():
        assert (store.path / path.relative_to(partial)).stat().st_mtime_ns == stamp, "not redone"
    assert not partial.exists()


def test_a_full_disk_at_the_last_file_too(
    raw: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, len(PLANTED) + 1, "to_parquet")  # genes.parquet
        with pytest.raises(OSError, match="No space") as caught:
            make(raw)
    assert caught.value.__notes__
    assert content(make(raw).path) == content(tiny_store.path)


def test_too_little_disk_is_told_at_the_start(
    raw: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
        with pytest.raises(OSError, match=r"needs about .* GB, the disk has .* GB free") as caught:
            make(raw)
    assert caught.value.errno == errno.ENOSPC
    assert set(content(partial_path(raw.parent / "store"))) == {"order.json"}
    assert content(make(raw).path) == content(tiny_store.path)


def test_a_disk_that_is_really_full(raw: Path) -> None:
    """On a file system of 248 kB, in a name space of its own: full at the first counts.

    The process must end cleanly, where HDF5 writing to the disk itself ends in a segfault.
    """
    disk = raw.parent / "disk"
    disk.mkdir()
    code = (
        "import shutil, sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from brstnet.__main__ import main\n"
        "shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 40)\n"
        f"made = main({arguments(raw, disk / 'store')})\n"
        "print(made, *(p.name for p in Path(sys.argv[1]).rglob('*.*') if p.stat().st_size))\n"
    )
    mount = f'mount -t tmpfs -o size=248k tmpfs "{disk}" && exec "$@"'
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*alone, "true"], capture_output=True).returncode
    ):
        pytest.skip("no name space to mount a small file system in")
    run = subprocess.run(
        [*alone, sys.executable, "-c", code, str(disk)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "2"
    written = {"store.partial", "order.json", "BC00001_C1.tmp", "patches.npy", "spots.h5ad"}
    assert set(run.stdout.split()[1:]) == written
    assert "the disk is full; finished sections are kept" in run.stderr
    assert "Traceback" not in run.stderr


def arguments(raw: Path, store: Path) -> list[str]:
    given = {"stain": "none", "min_counts": 10, "window_px": 16, "input_px": 64}
    return ["prepare", str(raw), str(store), *(f"--{k}={v}" for k, v in given.items())]


def test_a_killed_run_leaves_nothing_that_the_next_one_trusts(
    raw: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a section: its scratch folder is thrown away."""
    with monkeypatch.context() as patch:
        fail_at(patch, 2, "np.save")
        with pytest.raises(OSError, match="No space"):
            make(raw)
    scratch = partial_path(raw.parent / "store") / "BC00001_C2.tmp"
    assert (scratch / "patches.npy").read_bytes() == b"half"
    (scratch / "entry.json").write_text("{}")
    assert content(make(raw).path) == content(tiny_store.path)


def test_a_run_that_goes_on_takes_the_stain_target_that_was_fitted(
    demo_raw: Path, demo_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Prepare(layout="stnet", window_px=64, input_px=32, held_out=("BC90006",))
    fitted = []
    fit = stain.fit_target
    monkeypatch.setattr(
        stain, "fit_target", lambda *args, **given: fitted.append(1) or fit(*args, **given)
    )
    with monkeypatch.context() as patch:
        fail_at(patch, 3, "np.save")
        with pytest.raises(OSError, match="No space"):
            prepare(demo_raw, tmp_path / "store", settings, progress=False)
    store = prepare(demo_raw, tmp_path / "store", settings, progress=False)
    assert len(fitted) == 1
    kept = {k: v for k, v in content(demo_store.path).items() if not k.startswith("derived/")}
    assert content(store.path) == kept


# --- bad input


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def move_spot_outside(raw: Path) -> None:
    spots = PLANTED["BC00002_D1"].spots.copy()
    spots.loc["5x4"] = [1300.0, 94.0]
    put(raw / "spots_BT00002_D1.csv.gz", text(spots, ","))


def shrink_slide(raw: Path) -> None:
    put_slide(raw / "HE_BT00002_D1.jpg", PLANTED["BC00002_D1"].slide[:60])


def make_shallow(raw: Path) -> None:
    counts = PLANTED["BC00002_D1"].counts // 100
    put(raw / "BC00002_D1_stdata.tsv.gz", text(counts))


BAD_INPUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no slide": (
        lambda raw: (raw / "HE_BT00002_D1.jpg").unlink(),
        r"HE_BT00002_D1\.jpg: missing file",
    ),
    "no counts": (
        lambda raw: (raw / "BC00002_D1_stdata.tsv.gz").unlink(),
        r"BC00002_D1_stdata\.tsv\.gz: missing file",
    ),
    "no spots": (
        lambda raw: (raw / "spots_BT00002_D1.csv.gz").unlink(),
        r"spots_BT00002_D1\.csv\.gz: missing file",
    ),
    "truncated JPEG": (
        lambda raw: cut_off(raw / "HE_BT00002_D1.jpg"),
        r"HE_BT00002_D1\.jpg: truncated JPEG.*fetch the file again",
    ),
    "truncated gzip": (
        lambda raw: cut_off(raw / "BC00002_D1_stdata.tsv.gz"),
        r"BC00002_D1_stdata\.tsv\.gz: truncated or damaged gzip file.*fetch it again",
    ),
    "spot outside": (
        move_spot_outside,
        r"spots_BT00002_D1\.csv\.gz: 1 spot.s. lie outside the slide, the first 5x4 at x 1300",
    ),
    "small slide": (
        shrink_slide,
        r"spots_BT00002_D1\.csv\.gz: 10 spot.s. lie outside the slide.* has 130 x 60 px",
    ),
    "no spot left": (
        make_shallow,
        r"HE_BT00002_D1\.jpg: no spot of section BC00002_D1 is left "
        r"\(24 of 24 have fewer than 10 counts, 0 windows cross.*lower min_counts or window_px",
    ),
}


@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_is_told_before_anything_is_written(raw: Path, fault: str) -> None:
    spoil, told = BAD_INPUT[fault]
    spoil(raw)
    with pytest.raises(ValueError, match=rf"raw: 1 fault\(s\) in the raw data:\n  - .*{told}"):
        make(raw)
    assert list(raw.parent.iterdir()) == [raw], "nothing is written"


def test_all_faults_of_a_folder_are_told_at_once(raw: Path) -> None:
    """Six faults in four sections, one message, each with its file."""
    cut_off(raw / "HE_BT00001_C1.jpg")
    cut_off(raw / "BC00001_C1_stdata.tsv.gz")
    (raw / "spots_BT00001_C2.csv.gz").unlink()
    move_spot_outside(raw)
    counts = PLANTED["BC00003_A1"].counts.astype(object)
    counts.loc["4x4", counts.columns[0]] = -1
    counts.loc["4x3", counts.columns[1]] = 0.5
    put(raw / "BC00003_A1_stdata.tsv.gz", text(counts))
    with pytest.raises(ValueError, match=r"6 fault\(s\)") as caught:
        make(raw)
    told = str(caught.value).splitlines()[1:]
    places = [line.removeprefix("  - ").split(": ")[0].rsplit("/", 1)[1] for line in told]
    assert places == [
        "HE_BT00001_C1.jpg",
        "BC00001_C1_stdata.tsv.gz",
        "spots_BT00001_C2.csv.gz",
        "spots_BT00002_D1.csv.gz",
        "BC00003_A1_stdata.tsv.gz",
        "BC00003_A1_stdata.tsv.gz",
    ]


def test_a_slide_that_nothing_can_decode_stops_the_run_with_its_name(raw: Path) -> None:
    """Damage inside a JPEG whose end is there shows only when it is decoded."""
    path = raw / "HE_BT00002_D1.jpg"
    whole = path.read_bytes()
    tables = whole.index(b"\xff\xdb")
    path.write_bytes(whole[:tables] + b"\xff\xfe\x00\x02" * 3 + whole[-2:])
    with pytest.raises(ValueError, match=r"HE_BT00002_D1\.jpg: .*(not a readable|decoded|trunc)"):
        make(raw)


def test_no_raw_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of raw data"):
        make(tmp_path / "nowhere")


def test_the_wrong_layout_is_told(raw: Path) -> None:
    settings = Prepare(layout="her2st", stain="none", min_counts=10, window_px=16, input_px=16)
    with pytest.raises(ValueError, match="no slides under ST-imgs"):
        make(raw, settings)


# --- stain target and held-out patients


def test_stain_target_by_default(raw: Path) -> None:
    """First section of the patient with most sections, never a held-out one."""
    listing = stnet.find(raw)

    def target(**given: Any) -> str | None:
        files = choose_target(listing, Prepare(**given))
        return None if files is None else files.section

    assert target() == "BC00001_C1"
    assert target(held_out=("BC00001",)) == "BC00002_D1"
    assert target(held_out=("BC00001", "BC00002")) == "BC00003_A1"
    assert target(stain_target="BC00001_C2") == "BC00001_C2"
    assert target(stain="none") is None
    with pytest.raises(ValueError, match="every patient is held out"):
        target(held_out=("BC00001", "BC00002", "BC00003"))
    with pytest.raises(ValueError, match=r"not held out \(BC00002_D1, BC00003_A1\), got 'BC00001_"):
        target(held_out=("BC00001",), stain_target="BC00001_C1")
    with pytest.raises(ValueError, match=r"stain_target must be a section .*got 'BC00001_C9'"):
        target(stain_target="BC00001_C9")


@pytest.mark.parametrize("method", ["none", "vahadane"])
def test_an_unknown_held_out_patient_is_refused(raw: Path, method: Any) -> None:
    settings = Prepare(stain=method, min_counts=10, window_px=16, held_out=("BC00001", "BC1"))
    with pytest.raises(ValueError, match="held_out names BC1, not among the patients: BC00001, BC"):
        make(raw, settings)
    assert list(raw.parent.iterdir()) == [raw], "nothing is written"


def test_the_demo_is_normalised_to_a_training_patient(demo_store: Store) -> None:
    target = demo_store.info()["stain_target"]
    assert (target["section"], target["patient"]) == ("BC90001_C1", "BC90001")


# --- her2st


def test_her2st_end_to_end(tmp_path: Path) -> None:
    planted = {"A1": tiny(0, ("ERBB2", "MKI67")), "B4": tiny(1, ("ERBB2", "GAPDH"))}
    raw = write_her2st(tmp_path / "raw", {**planted, "C1": tiny(2)})
    (raw / "images/C1.jpg").unlink()
    settings = Prepare(layout="her2st", stain="none", min_counts=10, window_px=16, input_px=16)
    store = make(raw, settings)
    assert store.patients == ["A", "B"]
    assert store.genes.index.tolist() == ["ERBB2", "GAPDH", "MKI67"]
    assert store.info()["left_alone"] == {"C1": "counts without a slide"}
    found = store.counts(["B4"]).toarray()
    expected = planted["B4"].counts.loc[store.spots(["B4"])["spot"]]
    np.testing.assert_array_equal(found[:, [0, 1]], expected.to_numpy())
    assert not found[:, 2].any(), "MKI67 is absent from B4: zero"


@pytest.mark.slow
def test_real_her2st_store(her2st_raw: Path, tmp_path: Path) -> None:
    settings = Prepare(layout="her2st", stain="none", window_px=224, input_px=224)
    store = prepare(her2st_raw, tmp_path / "store", settings, progress=False)
    assert store.verify() == []
    lost = {name: entry["lost"].get("no_counts", 0) for name, entry in store.sections.items()}
    assert lost == {"B4": 1, "C2": 0, "C3": 2, "C4": 3, "C5": 2}
    spots = store.spots(["C3"])
    with open_image(her2st_raw / "images/C3.jpg") as slide:
        for number in (0, 90, len(spots) - 1):
            x, y = np.rint(spots.loc[number, ["pixel_x", "pixel_y"]].to_numpy(float)).astype(int)
            crop = slide.crop((x - 112, y - 112, x + 112, y + 112))
            np.testing.assert_array_equal(store.patches("C3")[number], np.array(crop))
    table = pd.read_csv(her2st_raw / "counts/C3.tsv.gz", sep="\t", index_col=0)
    expected = table.loc[spots["spot"]].reindex(columns=store.genes.index, fill_value=0)
    np.testing.assert_array_equal(store.counts(["C3"]).toarray(), expected.to_numpy())


def test_shrunk_patches_are_those_that_prepare_would_have_made(
    demo_raw: Path, demo_store: Store, tmp_path: Path
) -> None:
    """Kept beside the store and mapped; the store itself stays what it was."""
    without = shutil.ignore_patterns("derived")
    store = Store(shutil.copytree(demo_store.path, tmp_path / "store", ignore=without))
    name = next(iter(store.sections))
    small = store.patches(name, 16)
    expected = resize(store.patches(name), len(small), 16)
    assert small.shape == (len(expected), 16, 16, 3)
    np.testing.assert_array_equal(small, expected)
    assert isinstance(store.patches(name, 16), np.memmap)
    assert isinstance(small, np.memmap)
    assert len(list((store.path / "derived").iterdir())) == 1
    np.testing.assert_array_equal(store.patches(name, 32), store.patches(name))
    assert not store.verify()


def test_counts_are_read_once_where_it_is_asked_for(
    demo_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = Store(demo_store.path), []
    true_read = anndata.read_h5ad
    monkeypatch.setattr(anndata, "read_h5ad", lambda file: (read.append(file), true_read(file))[1])
    names = list(store.sections)[:2]
    with store.read_once():
        inside = [(store.counts(names), store.spots(names)) for _ in range(2)]
    assert len(read) == 2
    assert (inside[0][0] != inside[1][0]).nnz == 0
    assert inside[0][1].equals(inside[1][1])
    store.spots(names)
    assert len(read) == 4
