"""Readers of raw data: planted values come out, every spot is accounted for, faults are named."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_raw
from tiny_raw import GENES, ORIGINAL, SHORT, Tiny, put, text, tiny, write_her2st, write_stnet

from brstnet.data.patches import slide_size
from brstnet.data.readers import her2st, stnet
from brstnet.data.sections import RawSection, SectionFiles, check_inside, um_per_px

READER = {"stnet": stnet, "her2st": her2st}


def layout(tmp_path: Path, name: str, sections: dict[str, Tiny]) -> Path:
    write = {"stnet": write_stnet, "her2st": write_her2st}[name]
    return write(tmp_path / "raw", sections)


def read_one(raw: Path, name: str) -> RawSection:
    return READER[name].read(READER[name].find(raw).sections[0])


def assert_planted(read: RawSection, planted: Tiny) -> None:
    """Positions, counts and labels of the read spots are those that were written."""
    both = [spot for spot in planted.spots.index if spot != "2x2"]
    assert read.spots.index.tolist() == both, "in the order of the spot table"
    pixels = read.spots[["pixel_x", "pixel_y"]].to_numpy()
    np.testing.assert_allclose(pixels, planted.spots.loc[both].to_numpy(), rtol=1e-14)
    ids = read.spots["array_x"].astype(str) + "x" + read.spots["array_y"].astype(str)
    assert ids.tolist() == both
    assert list(read.genes) == list(planted.counts.columns)
    np.testing.assert_array_equal(read.counts.toarray(), planted.counts.loc[both].to_numpy())
    assert read.counts.dtype == np.int32
    expected = [planted.labels.get(spot, "") for spot in both]
    assert read.spots["label"].tolist() == expected
    assert read.lost.to_dict() == {"2x2": "no_counts"} | {
        f"0x{y}": "not_under_tissue" for y in range(5)
    }


# --- planted values


def test_stnet_gives_what_was_planted(tmp_path: Path) -> None:
    planted = {"BC00002_D1": tiny(2), "BC00001_C2": tiny(1), "BC00001_C1": tiny(0)}
    listing = stnet.find(write_stnet(tmp_path, planted))
    assert [s.section for s in listing.sections] == sorted(planted)
    assert [s.patient for s in listing.sections] == ["BC00001", "BC00001", "BC00002"]
    assert {s.subtype for s in listing.sections} == {"TNBC"}
    assert listing.left_alone == {}
    for files in listing.sections:
        assert files.slide.name == f"HE_BT{files.section.removeprefix('BC')}.jpg"
        assert_planted(stnet.read(files), planted[files.section])


@pytest.mark.parametrize("folders", [ORIGINAL, SHORT], ids=["original", "short"])
@pytest.mark.parametrize("ending", [".tsv.gz", ".tsv"])
def test_her2st_gives_what_was_planted(
    tmp_path: Path, folders: tuple[str, ...], ending: str
) -> None:
    planted = {"B4": tiny(0, ("ERBB2", "MKI67")), "A1": tiny(1, ("ERBB2", "GAPDH"))}
    listing = her2st.find(write_her2st(tmp_path, planted, folders, ending))
    assert [(s.section, s.patient, s.subtype) for s in listing.sections] == [
        ("A1", "A", "HER2"),
        ("B4", "B", "HER2"),
    ]
    for files in listing.sections:
        assert_planted(her2st.read(files), planted[files.section])


@pytest.mark.parametrize("name", ["stnet", "her2st"])
def test_every_spot_of_either_file_is_accounted_for(tmp_path: Path, name: str) -> None:
    planted = tiny()
    section = "A1" if name == "her2st" else "BC1_A1"
    read = read_one(layout(tmp_path, name, {section: planted}), name)
    kept, lost = set(read.spots.index), set(read.lost.index)
    assert kept | lost == set(planted.counts.index) | set(planted.spots.index)
    assert not kept & lost
    assert len(kept) + len(lost) == len(read.spots) + len(read.lost) == 30


def test_her2st_spots_not_selected_have_their_reason(tmp_path: Path) -> None:
    raw = write_her2st(tmp_path, {"A1": tiny()})
    table = tiny_raw.selection(tiny())
    table.loc[table["x"] == 5, "selected"] = 0
    table.loc[(table["x"] == 5) & (table["y"] == 1), "pixel_x"] = np.nan  # nobody needs it
    put(raw / "spots/A1_selection.tsv", table.to_csv(sep="\t", index=False))
    read = read_one(raw, "her2st")
    assert {s for s, why in read.lost.items() if why == "not_selected"} == {
        f"5x{y}" for y in range(5)
    }
    assert len(read.spots) + len(read.lost) == 30


def test_her2st_counts_without_a_slide_are_named_and_left_alone(tmp_path: Path) -> None:
    raw = write_her2st(tmp_path, {"A1": tiny(0), "B1": tiny(1)})
    (raw / "images/B1.jpg").unlink()
    listing = her2st.find(raw)
    assert [s.section for s in listing.sections] == ["A1"]
    assert listing.left_alone == {"B1": "counts without a slide"}


@pytest.mark.parametrize("ends", ["\r", "\n", "\r\n"], ids=["CR", "LF", "CRLF"])
@pytest.mark.parametrize("name", ["L_Coords.tsv.gz", "L_Coords.tsv"])
def test_stnet_labels_whatever_the_line_ends(tmp_path: Path, ends: str, name: str) -> None:
    raw = write_stnet(tmp_path, {"BC1_A1": tiny()})
    lines = ["id\tx\ty\tlabel", "1\t2.97\t0.9\tL1\ttumor", "2\t4.3\t2.0\tL2\tnon"]
    put(raw / name, ends.join(lines) + ends)
    files = dataclasses.replace(stnet.find(raw).sections[0], labels=raw / name)
    labels = stnet.read(files).spots["label"]
    assert labels[labels != ""].to_dict() == {"3x1": "tumor", "4x2": "non"}


@pytest.mark.parametrize("gone", ["the file", "its name"])
def test_stnet_labels_are_optional(tmp_path: Path, gone: str) -> None:
    raw = write_stnet(tmp_path, {"BC1_A1": tiny()})
    if gone == "the file":
        (raw / "BC1_A1_Coords.tsv.gz").unlink()
    else:
        table = pd.read_csv(raw / "metadata.csv").drop(columns="tumor_annotation")
        table.to_csv(raw / "metadata.csv", index=False)
    files = stnet.find(raw).sections[0]
    assert files.labels is None
    assert set(stnet.read(files).spots["label"]) == {""}


def test_um_per_px_is_the_planted_scale() -> None:
    """A turned and shifted array of 291 px pitch: 200 / 291 um a pixel, whatever the turn."""
    x, y = (a.ravel().astype(float) for a in np.meshgrid(np.arange(5), np.arange(7)))
    turn = np.deg2rad(11)
    spots = pd.DataFrame(
        {
            "array_x": x,
            "array_y": y,
            "pixel_x": 291 * (np.cos(turn) * x - np.sin(turn) * y) + 1234,
            "pixel_y": 291 * (np.sin(turn) * x + np.cos(turn) * y) - 77,
        }
    )
    assert um_per_px(spots) == pytest.approx(200 / 291)
    assert np.isnan(um_per_px(spots[y == 0])), "one row of spots has no second direction"


# --- real tissue


@pytest.fixture(scope="module")
def real(her2st_raw: Path) -> dict[str, RawSection]:
    return {files.section: her2st.read(files) for files in her2st.find(her2st_raw).sections}


def test_real_her2st(her2st_raw: Path, real: dict[str, RawSection]) -> None:
    assert list(real) == ["B4", "C2", "C3", "C4", "C5"]
    assert len(her2st.find(her2st_raw).left_alone) == 28
    for read in real.values():
        check_inside(read.files, read.spots, *slide_size(read.files.slide))
        table = pd.read_csv(read.files.spots, sep="\t")
        counted = pd.read_csv(read.files.counts, sep="\t", usecols=[0]).iloc[:, 0]
        positions = table["x"].astype(str) + "x" + table["y"].astype(str)
        assert sorted([*read.spots.index, *read.lost.index]) == sorted({*counted, *positions})
    no_counts = {name: int((read.lost == "no_counts").sum()) for name, read in real.items()}
    assert no_counts == {"B4": 1, "C2": 0, "C3": 2, "C4": 3, "C5": 2}
    scales = [um_per_px(read.spots) for read in real.values()]
    np.testing.assert_allclose(scales, 0.687, atol=0.003)


def test_real_her2st_counts_are_those_of_pandas(real: dict[str, RawSection]) -> None:
    read = real["B4"]
    table = pd.read_csv(read.files.counts, sep="\t", index_col=0)
    expected = table.loc[read.spots.index]
    assert list(read.genes) == list(expected.columns)
    np.testing.assert_array_equal(read.counts.toarray(), expected.to_numpy())


# --- faults


def spoil(table: pd.DataFrame, at: tuple[str, str], value: object) -> pd.DataFrame:
    spoilt = table.astype(object)
    spoilt.loc[at] = value
    return spoilt


def twice(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return pd.concat([table, table.loc[[name]]])


Change = Callable[[pd.DataFrame], pd.DataFrame]
COUNT_FAULTS: dict[str, tuple[Change, str]] = {
    "negative": (lambda t: spoil(t, ("3x1", GENES[1]), -4), f"negative .* 3x1, gene {GENES[1]}"),
    "fractional": (lambda t: spoil(t, ("3x1", GENES[0]), 2.5), "fractional count 2.5 at spot 3x1"),
    "missing": (lambda t: spoil(t, ("4x4", GENES[0]), None), "missing count nan at spot 4x4"),
    "infinite": (lambda t: spoil(t, ("4x4", GENES[0]), np.inf), "missing count inf at spot 4x4"),
    "huge": (lambda t: spoil(t, ("4x4", GENES[0]), 2**31), r"count above 2\^31"),
    "text": (lambda t: spoil(t, ("4x4", GENES[3]), "many"), f"gene {GENES[3]} .*'4x4': 'many'"),
    "spot twice": (lambda t: twice(t, "3x1"), "duplicate spot id '3x1'"),
    "gene twice": (lambda t: t.set_axis([*GENES[:3], GENES[0]], axis=1), f"gene id '{GENES[0]}'"),
    "gene twice but for its version": (
        lambda t: t.set_axis([f"{GENES[0]}.{v}" for v in range(4)], axis=1),
        f"gene id '{GENES[0]}'",
    ),
    "malformed spot": (lambda t: t.rename({"3x1": "3_1"}), "spot id '3_1' must be COLUMNxROW"),
    "other section": (lambda t: t.rename(lambda s: f"9{s}"), "none of its 29 spots is among"),
}


@pytest.mark.parametrize("fault", COUNT_FAULTS)
@pytest.mark.parametrize("name", ["stnet", "her2st"])
def test_faults_of_counts(tmp_path: Path, name: str, fault: str) -> None:
    change, told = COUNT_FAULTS[fault]
    section = "A1" if name == "her2st" else "BC1_A1"
    raw = layout(tmp_path, name, {section: tiny()})
    path = READER[name].find(raw).sections[0].counts
    put(path, text(change(tiny().counts)))
    with pytest.raises(ValueError, match=told) as caught:
        read_one(raw, name)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


SPOT_FAULTS: dict[str, tuple[Change, str]] = {
    "twice": (lambda t: twice(t, "3x1"), "duplicate spot id '3x1'"),
    "no position": (lambda t: spoil(t, ("3x1", "X"), None), "spot '3x1' has no pixel position"),
    "text": (lambda t: spoil(t, ("3x1", "Y"), "left"), "spot '3x1' has no pixel position"),
    "malformed": (lambda t: t.rename({"3x1": "3x1x1"}), "'3x1x1' must be COLUMNxROW"),
    "not whole": (lambda t: t.rename({"3x1": "3.5x1"}), r"'3.5x1' must be COLUMNxROW"),
    "no column": (lambda t: t.drop(columns="X"), "needs the columns X and Y, has .'Y'."),
}


@pytest.mark.parametrize("fault", SPOT_FAULTS)
def test_faults_of_stnet_spots(tmp_path: Path, fault: str) -> None:
    change, told = SPOT_FAULTS[fault]
    raw = write_stnet(tmp_path, {"BC1_A1": tiny()})
    put(raw / "spots_BT1_A1.csv.gz", text(change(tiny().spots), ","))
    with pytest.raises(ValueError, match=f"spots_BT1_A1.csv.gz: .*{told}"):
        read_one(raw, "stnet")


HER2ST_SPOT_FAULTS: dict[str, tuple[Change, str]] = {
    "twice": (lambda t: pd.concat([t, t.iloc[[0]]]), "duplicate spot id"),
    "twice, once selected": (
        lambda t: pd.concat([t, t.iloc[[0]].assign(selected=0)]),
        "duplicate spot id",
    ),
    "no position": (lambda t: t.assign(pixel_y=t["pixel_y"].mask(t["x"] == 3)), "no pixel pos"),
    "no array position": (lambda t: t.assign(x=t["x"].mask(t["x"] == 3)), "must be COLUMNxROW"),
    "not whole": (lambda t: t.assign(x=t["x"] + 0.5), "must be COLUMNxROW"),
    "no column": (lambda t: t.drop(columns="pixel_x"), r"lacks \['pixel_x'\]"),
}


@pytest.mark.parametrize("fault", HER2ST_SPOT_FAULTS)
def test_faults_of_her2st_spots(tmp_path: Path, fault: str) -> None:
    change, told = HER2ST_SPOT_FAULTS[fault]
    raw = write_her2st(tmp_path, {"A1": tiny()})
    table = change(tiny_raw.selection(tiny()))
    put(raw / "spots/A1_selection.tsv", table.to_csv(sep="\t", index=False))
    with pytest.raises(ValueError, match=f"A1_selection.tsv: .*{told}"):
        read_one(raw, "her2st")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("kind", ["counts", "spots", "labels"])
def test_truncated_gzip(tmp_path: Path, kind: str) -> None:
    raw = write_stnet(tmp_path, {"BC1_A1": tiny()})
    path = getattr(stnet.find(raw).sections[0], kind)
    cut_off(path)
    with pytest.raises(ValueError, match=f"{path}: truncated or damaged gzip.*fetch it again"):
        read_one(raw, "stnet")


@pytest.mark.parametrize("content", [b"", b"\x1f\x8bnonsense"], ids=["empty", "no gzip"])
def test_counts_that_are_no_table(tmp_path: Path, content: bytes) -> None:
    raw = write_her2st(tmp_path, {"A1": tiny()})
    (raw / "counts/A1.tsv.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"A1\.tsv\.gz: (not a readable|truncated or damaged)"):
        read_one(raw, "her2st")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("x\ty\tlabel\nleft\t2\ttumor\n", "x and y of a label must be numbers"),
        ("x\ty\n1\t2\n", r"lacks \['label'\]"),
    ],
    ids=["text", "no label"],
)
def test_faults_of_labels(tmp_path: Path, lines: str, told: str) -> None:
    raw = write_her2st(tmp_path, {"A1": tiny()})
    put(raw / "labels/A1_labeled_coordinates.tsv", lines)
    with pytest.raises(ValueError, match=f"A1_labeled_coordinates.tsv: .*{told}"):
        read_one(raw, "her2st")


def test_all_faults_of_a_section_are_told_at_once(tmp_path: Path) -> None:
    raw = write_stnet(tmp_path, {"BC1_A1": tiny()})
    files: SectionFiles = stnet.find(raw).sections[0]
    spoilt = spoil(
        spoil(twice(tiny().counts, "3x1"), ("4x1", GENES[0]), -1), ("5x1", GENES[1]), 2.5
    )
    put(files.counts, text(spoilt))
    put(files.spots, text(spoil(twice(tiny().spots, "4x4"), ("5x4", "X"), None), ","))
    cut_off(files.labels or Path())
    with pytest.raises(ValueError, match="negative") as caught:
        stnet.read(files)
    told = str(caught.value).splitlines()
    assert len(told) == 6
    assert [
        sum(line.startswith(f"{p}: ") for line in told) for p in (files.counts, files.spots)
    ] == [
        3,
        2,
    ]


def test_metadata_names_a_section_twice(tmp_path: Path) -> None:
    raw = write_stnet(tmp_path, {"BC1_A1": tiny(0), "BC1_A2": tiny(1)})
    table = pd.read_csv(raw / "metadata.csv").assign(replicate="A1")
    table.to_csv(raw / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=r"metadata\.csv: section BC1_A1 stands 2 times"):
        stnet.find(raw)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.assign(count_matrix=""), "section BC1_A1 has no count_matrix"),
        (lambda t: t.assign(patient="", spot_coordinates=""), "has no patient"),
        (lambda t: t.drop(columns="histology_image"), r"lacks \['histology_image'\]"),
        (lambda t: t.iloc[:0], "names no section"),
    ],
    ids=["no counts", "no patient", "no column", "no row"],
)
def test_faults_of_metadata(tmp_path: Path, change: Change, told: str) -> None:
    raw = write_stnet(tmp_path, {"BC1_A1": tiny()})
    change(pd.read_csv(raw / "metadata.csv")).to_csv(raw / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=f"metadata.csv: .*{told}"):
        stnet.find(raw)


def test_metadata_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv: missing file"):
        stnet.find(tmp_path)


@pytest.mark.parametrize("folders", [ORIGINAL, SHORT], ids=["original", "short"])
def test_her2st_slide_without_counts_and_spots(tmp_path: Path, folders: tuple[str, ...]) -> None:
    raw = write_her2st(tmp_path, {"A1": tiny(0), "B1": tiny(1)}, folders)
    counts, spots = raw / folders[1] / "A1.tsv.gz", raw / folders[2] / "A1_selection.tsv"
    counts.unlink()
    spots.unlink()
    with pytest.raises(ValueError, match="missing file") as caught:
        read_one(raw, "her2st")
    assert str(caught.value).splitlines() == [f"{spots}: missing file", f"{counts}: missing file"]


def test_her2st_without_slides_or_with_two_of_a_section(tmp_path: Path) -> None:
    raw = write_her2st(tmp_path, {"A1": tiny()})
    tiny_raw.put_slide(raw / "ST-imgs/A/A1/second.jpg", tiny().slide)
    with pytest.raises(ValueError, match="section A1 has 2 slides; keep one"):
        her2st.find(raw)
    with pytest.raises(ValueError, match="no slides under ST-imgs"):
        her2st.find(tmp_path / "elsewhere")
