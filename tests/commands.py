"""Commands of the project as a shell would start them, and a small disk for them to fill."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_OURS = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "BRSTNET_RUNS")


def start(*words: object) -> subprocess.Popen:
    """A command in its own process group; Ray picks its own ports, nothing of the shell counts."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k not in NOT_OURS},
    )


def finish(process: subprocess.Popen, expected: int, seconds: float = 400) -> str:
    """What it said, once it has ended as expected."""
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expected, said[-5000:]
    return said


@contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of so much memory; the test is skipped where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
