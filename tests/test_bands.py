"""Intervals of a new slide's genes, from a file of half-widths."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brstnet.evaluation.slides.bands import Bands, read_bands

GENES = pd.Index(["A", "B", "C"])


def write(folder: Path, **changes: object) -> Path:
    table = pd.DataFrame({
        "gene": ["B", "A", "A", "Z"],
        "level": [0.9, 0.9, 0.5, 0.9],
        "half_width": [np.inf, 0.4, 0.1, 7.0],
        "patients": [9, 12, 12, 10],
        "spots": [30, 80, 80, 10],
        "target": "log_counts",
        "seen": True,
    })  # fmt: skip
    table.assign(**changes).to_parquet(folder / "intervals.parquet")  # type: ignore[arg-type]
    return folder / "intervals.parquet"


def read(file: Path, level: float = 0.9, genes: pd.Index = GENES) -> Bands:
    return read_bands(file, level, genes, "log_counts")


def test_half_widths_come_in_the_models_order(tmp_path: Path) -> None:
    bands = read(write(tmp_path))
    assert np.array_equal(bands.half_width_G, [0.4, np.inf, np.nan], equal_nan=True)
    assert (bands.level, bands.patients, bands.source) == (0.9, 9, "intervals.parquet")
    assert bands.warnings[:2] == [
        "the 90% interval is infinite for 1 of 3 genes: it says nothing of them",
        "1 of 3 genes have no interval in intervals.parquet",
    ]
    assert any("too narrow for a new patient" in w for w in bands.warnings)
    assert read(write(tmp_path), 0.1 + 0.4, GENES[:1]).half_width_G.tolist() == [0.1]


def test_an_interval_never_begins_below_0(tmp_path: Path) -> None:
    layers = read(write(tmp_path)).around(np.array([[0.3, 1, 1], [-0.7, 1, 1]]))
    assert layers["lower"][:, 0].tolist() == [0, 0]
    assert np.allclose(layers["upper"][:, 0], [0.7, 0])
    assert layers["lower"][:, 1].tolist() == [0, 0]
    assert np.isinf(layers["upper"][:, 1]).all()
    assert np.isnan(layers["lower"][:, 2]).all()
    assert layers["lower"].dtype == np.float32


def test_a_cut_interval_holds_all_that_the_whole_one_held(tmp_path: Path) -> None:
    """Truths are never below 0; predictions may be."""
    rng = np.random.default_rng(0)
    truth = np.maximum(rng.normal(0.2, 0.5, (5000, 1)), 0)
    pred = truth + rng.normal(0, 0.4, truth.shape)
    layers = read(write(tmp_path), genes=GENES[:1]).around(pred)
    held = (layers["lower"] <= truth) & (truth <= layers["upper"])
    whole = np.abs(pred - truth) <= 0.4 - 1e-6
    assert held[whole].all()
    assert 0.6 < whole.mean() < 0.75
    assert (held == (np.abs(pred - truth) <= 0.4))[truth > 0].all()


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({}, 0.95, r"has no level 0\.95, but 0\.5, 0\.9: give --level"),
        ({"gene": ["Z", "Y", "A", "X"]}, 0.9, r"has none of the model's 3 genes at level 0\.9"),
        ({"gene": "A"}, 0.9, "a gene has one interval at a level"),
        ({"half_width": "wide"}, 0.9, "half_width must be numbers"),
        ({"target": "log_normalised"}, 0.9, "intervals of log_normalised, but log_counts"),
    ],
)
def test_other_tables_are_refused(
    changes: dict[str, object], level: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"intervals\.parquet: .*{message}"):
        read(write(tmp_path, **changes), level)


def test_files_that_are_no_intervals_are_named(tmp_path: Path) -> None:
    file = tmp_path / "other.parquet"
    with pytest.raises(FileNotFoundError, match=r"other\.parquet"):
        read(file)
    file.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"other\.parquet: cannot be read"):
        read(file)
