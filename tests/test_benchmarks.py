"""The benchmarks run and print their tables; their figures are no test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sweep_overhead import Drive, Sample, drive_info

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(module: str, *argv: str) -> list[list[str]]:
    """The cells of the table that a benchmark prints, its head first."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def test_the_step_is_measured_beside_its_limit_and_the_usual_loop(tmp_path: Path) -> None:
    quick = ["--rounds", "1", "--steps", "1", "--batch", "4", "--out", str(tmp_path / "out.jsonl")]
    head, row = run("train_step", "--backbones", "test_resnet", *quick)
    assert head[0] == "backbone"
    assert row[0] == "test_resnet"
    assert all(float(cell) > 0 for cell in row[2:5])
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1


@pytest.mark.drill
def test_scaling_compares_workers_that_share_with_workers_apart() -> None:
    quick = ["--rounds", "1", "--steps", "1", "--batch", "4", "--backbone", "test_resnet"]
    head, *rows = run("scaling", *quick)
    assert head[:2] == ["scaling", "workers"]
    assert [(r[0], r[1], r[2]) for r in rows] == [
        (kind, str(n), str(4 * n if kind == "weak" else 4))
        for n in (1, 2)
        for kind in ("apart", "weak", "strong")
    ]


def test_a_slot_is_busy_while_its_trial_trains(tmp_path: Path) -> None:
    busy = {"0000": [(12, 14, 1), (14, 16, 1)], "0001": [(13, 15, 2)], "0002": [(17, 30, 1)]}
    for name, lines in busy.items():
        (tmp_path / "fake" / "trials" / name).mkdir(parents=True)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / "fake" / "trials" / name / "busy.jsonl").write_text(text)
    notes = [("ray", 11), ("next", 12), ("next", 12), ("report", 14), ("end", 16), ("next", 17)]
    lines = [{"what": what, "at": at, "seconds": 0.5, "trial": ""} for what, at in notes]
    (tmp_path / "fake" / "timings.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drive = Drive(out=tmp_path, trials=3, slots=2, seconds=1.0, began=10.0)
    drive.samples = [Sample(at=at, gb=1.0, cpu=at / 10, pending=0, ended=0) for at in (13, 15, 17)]
    info = drive_info(drive)
    assert info["from the command until all of them train"] == "3 s"
    (share,) = (value for name, value in info.items() if "slots busy" in name)
    assert share == "**62.5%**"  # 3 s of one slot and 2 s of the other, of 4 s each
    assert info["idle from one trial to the next, mean / 99 %"] == "1.00 / 1.00 s"
    assert info["driver's CPU"].startswith("10% of one")


@pytest.mark.drill
def test_a_sweep_of_sleepers_survives_its_driver() -> None:
    small = ["--trials", "20", "--slots", "2", "--seconds", "8"]
    cells = run("sweep_overhead", "--parts", "fake", "restore", *small)
    found = {row[0]: row[1] for row in cells}
    assert found["runs / top-level runs"].endswith("/ 1")  # that none is lost it checks itself
    assert found["slots with a process"] == "2 of 2"


@pytest.mark.drill
def test_a_real_sweep_is_taken_apart() -> None:
    head, *rows = run("sweep_overhead", "--parts", "overhead", "--real_trials", "2")
    seconds = {row[0]: float(row[1].strip("*")) for row in rows}
    assert head[1] == "s/trial"
    assert 0 < seconds["training steps"] < seconds["wall, first begin to last end"]


@pytest.mark.drill
def test_what_writers_wait_for_and_what_an_outage_loses() -> None:
    head, *rows = run("writers", "--target", "sqlite", "outage", "--writers", "2", "--quick", "0.3")
    assert head[0] == "way"
    assert [row[0] for row in rows] == ["spool", "spool", "direct"]
    assert all(float(row[4]) > 0 for row in rows)
