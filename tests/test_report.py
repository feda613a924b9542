"""The page of an evaluation: what it shows is what was found, escaped, and nothing is loaded."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brstnet.evaluation import plots, report
from brstnet.evaluation.report import Block, Tile, cell, page, side_table


class Tables(HTMLParser):
    """The cells of every table of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True
        self.sources += [str(v) for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def read(text: str) -> Tables:
    found = Tables()
    found.feed(text)
    return found


def test_a_table_is_drawn_cell_by_cell_and_escaped() -> None:
    table = pd.DataFrame(
        {"gene": ["<script>a</script>", "b&c"], "PCC": [-0.12345, np.nan], "n": [1200, 3]}
    )
    text = page("A <b>title", "one & two", [Block(title="T", table=table, lines=["<i>"])])
    assert "<script>" not in text
    assert "<b>title" not in text
    assert "<i>" not in text
    rows = read(text).rows
    assert rows[0] == ["gene", "PCC", "n"]
    assert rows[1] == ["<script>a</script>", "\N{MINUS SIGN}0.123", "1,200"]
    assert rows[2] == ["b&c", "\N{EN DASH}", "3"]


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    figure = tmp_path / "f.png"
    plots.save(plots.Figure(), figure)
    tiles = [Tile(label="l", value="0.1", below="b")]
    found = read(page("t", "l", [Block(title="T", figures=[figure])], tiles, "foot"))
    assert len(found.sources) == 1
    assert found.sources[0].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "yes"),
        (np.float64(0.5), "0.500"),
        (0.0, "0"),
        (250.0, "250"),
        (float("inf"), "\N{EN DASH}"),
        (None, "\N{EN DASH}"),
        (pd.NA, "\N{EN DASH}"),
        ("", ""),
        (np.int64(30612), "30,612"),
    ],
)
def test_values_are_shown_as_people_write_them(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_a_predictor_that_has_no_correlation_gets_dashes_and_its_errors() -> None:
    known = {
        "genes": 4,
        "genes_without_pcc": 0,
        "genes_without_partial_pcc": 4,
        "median_pcc": 0.3,
        "median_partial_pcc": 0.0,
        "median_r2": 0.1,
        "genes_above_0": 3,
    }
    silent = {**known, "genes_without_pcc": 4, "median_pcc": 0.0, "genes_above_0": 0}
    table = side_table({"training_mean": silent, "model": known}).set_index("")
    assert table.index.tolist() == ["model", "training mean"]
    assert table.loc["model", "> 0"] == 3
    assert table.loc["model", "given total"] is None or np.isnan(table.loc["model", "given total"])
    assert pd.isna(table.loc["training mean", "median PCC"])
    assert pd.isna(table.loc["training mean", "> 0"])
    assert table.loc["training mean", "R2"] == 0.1


def test_the_worst_patient_has_a_tile_only_among_several() -> None:
    line = {"line": "0.3 (no interval)"}
    summary = {
        "genes": 250,
        "median_pcc": 0.3,
        "median_partial_pcc": 0.1,
        "interval": {"pcc": line, "partial_pcc": line},
        "null": {"pcc": {"genes_above_0": {"observed": 240.0, "null_p95": 244.0, "p": 0.2}}},
        "worst_patient": {"patient": "B", "median_pcc": -0.05, "patients": 3},
    }
    found = {tile.label: tile for tile in report.tiles(summary)}
    assert found["Worst of 3 patients"].below == "B"
    assert found["Worst of 3 patients"].value == "\N{MINUS SIGN}0.050"
    above = found["Genes whose patients' mean PCC is above 0"]
    assert above.value == "240 of 250"
    assert "up to 244" in above.below
    summary["worst_patient"] = {**summary["worst_patient"], "patients": 1}
    assert not [t for t in report.tiles(summary) if t.label.startswith("Worst")]
