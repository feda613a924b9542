"""The benchmarks run and print their tables; their figures are no test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(module: str, *argv: str) -> list[list[str]]:
    """The cells of the table that a benchmark prints, its head first."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def test_the_step_is_measured_beside_its_limit_and_the_usual_loop(tmp_path: Path) -> None:
    quick = ["--rounds", "1", "--steps", "1", "--batch", "4", "--out", str(tmp_path / "out.jsonl")]
    head, row = run("train_step", "--backbones", "test_resnet", *quick)
    assert head[0] == "backbone"
    assert row[0] == "test_resnet"
    assert all(float(cell) > 0 for cell in row[2:5])
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1


def test_scaling_compares_workers_that_share_with_workers_apart() -> None:
    quick = ["--rounds", "1", "--steps", "1", "--batch", "4", "--backbone", "test_resnet"]
    head, *rows = run("scaling", *quick)
    assert head[:2] == ["scaling", "workers"]
    assert [(r[0], r[1], r[2]) for r in rows] == [
        (kind, str(n), str(4 * n if kind == "weak" else 4))
        for n in (1, 2)
        for kind in ("apart", "weak", "strong")
    ]
