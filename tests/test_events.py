"""The spool: what is told once, what again, and what a writer killed in the middle leaves."""

import json
import os
import time
from pathlib import Path

import pytest

from sweeps.events import FILE, Events, last, mend, read


def told(folder: Path) -> list[dict]:
    return read(folder / FILE)[0]


def test_what_was_told_before_a_restart_is_not_told_again(tmp_path: Path) -> None:
    def tell(losses: list[float]) -> None:
        events = Events(tmp_path)
        events.start("0001/fold_0", "fold 0", "fold", {"a": "b"}, "0001/trial")
        events.log("0001/fold_0", params={"genes": 250})
        events.input("0001/fold_0", name="store", digest="d")
        for step, loss in enumerate(losses):
            events.log("0001/fold_0", {"loss": loss}, step=step)

    tell([3.0, 2.0])
    first = told(tmp_path)
    tell([3.0, 2.5, 1.0])  # the times and the last bits of a resumed epoch may differ
    again = told(tmp_path)
    assert again[: len(first)] == first
    assert [e["metrics"] for e in again[len(first) :]] == [{"loss": 1.0}]
    assert [e["step"] for e in again if e["do"] == "log"] == [0, 0, 1, 2]


def test_the_same_numbers_of_another_run_step_or_name_are_told(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.log("a", {"x": 1.0}, step=1)
    events.log("b", {"x": 1.0}, step=1)
    events.log("a", {"x": 1.0}, step=2)
    events.log("a", {"y": 1.0}, step=1)
    events.log("a", {"x": 1.0, "y": 1.0}, step=1)
    events.log("a", {"x": 1.0}, step=1)
    assert len(told(tmp_path)) == 5


def test_tags_with_new_values_are_told(tmp_path: Path) -> None:
    for state in ("RUNNING", "RUNNING", "COMPLETE"):
        Events(tmp_path).log("0001/trial", tags={"state": state})
    assert [e["tags"]["state"] for e in told(tmp_path)] == ["RUNNING", "COMPLETE"]
    Events(tmp_path).log("0001/trial", tags={"state": "COMPLETE", "reason": "why"})
    assert len(told(tmp_path)) == 3


def test_a_status_is_told_whenever_it_may_have_changed_elsewhere(tmp_path: Path) -> None:
    steps = ["RUNNING", "RUNNING", "KILLED", "KILLED", "RUNNING", "FINISHED", "FINISHED"]
    steps += ["RUNNING", "FINISHED", "FAILED"]  # told as finished, killed, and told anew
    for status in steps:
        Events(tmp_path).status("0001/fold_0", status)
    assert [e["status"] for e in told(tmp_path)] == [*steps[:6], *steps[7:]]
    Events(tmp_path).status("0001/fold_1", "FINISHED")
    assert len(told(tmp_path)) == 10


def test_files_are_told_again_for_they_may_have_changed(tmp_path: Path) -> None:
    for _ in range(2):
        Events(tmp_path / "run").files("sweep", tmp_path / "asked")
    assert [e["path"] for e in told(tmp_path / "run")] == ["../asked"] * 2


@pytest.mark.parametrize("torn", [b'{"do": "log", "run": "a", "metr', b"\0" * 40, b"{"])
def test_a_torn_last_line_is_cut_off_and_its_event_told_anew(tmp_path: Path, torn: bytes) -> None:
    events = Events(tmp_path)
    events.log("a", {"x": 1.0})
    events.log("a", {"x": 1.0}, step=1)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + torn)
    events, offset = told(tmp_path), read(tmp_path / FILE)[1]
    assert len(events) == 2
    assert offset == len(whole)  # a reader waits for the rest
    Events(tmp_path).log("a", {"x": 3.0}, step=2)
    assert [e["step"] for e in told(tmp_path)] == [0, 1, 2]
    assert (tmp_path / FILE).read_bytes().startswith(whole)
    assert [e["step"] for e in read(tmp_path / FILE, offset)[0]] == [2]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"do"')
    mend(tmp_path / FILE)
    assert (tmp_path / FILE).read_bytes() == b""


def test_reading_on_from_an_offset_misses_and_repeats_nothing(tmp_path: Path) -> None:
    events, seen, offset, ends = Events(tmp_path), [], 0, [0]
    for step in range(30):
        events.log("a", {"x": step}, step=step, tags={"name": "Größe\n\r\u2028 é"})
        ends.append((tmp_path / FILE).stat().st_size)
        if step % 7 == 0:
            new, offset = read(tmp_path / FILE, offset)
            seen += new
    new, offset = read(tmp_path / FILE, offset)
    assert [e["step"] for e in [*seen, *new]] == list(range(30))
    assert read(tmp_path / FILE, offset) == ([], offset)
    for end in (ends[4], ends[5] - 1):  # up to a byte: whole lines before it
        part, after = read(tmp_path / FILE, ends[2], end)
        assert [e["step"] for e in part] == [2, 3]
        assert after == ends[4]
    assert read(tmp_path / FILE, ends[5], ends[2]) == ([], ends[5])
    assert read(tmp_path / "missing", 12) == ([], 12)


def test_a_writer_killed_at_any_byte_leaves_what_the_next_goes_on_from(tmp_path: Path) -> None:
    """A process writes until it is killed; nothing that a reader has seen is lost or changed."""
    file = tmp_path / FILE
    steps = 0
    for kill_after in (0.01, 0.03, 0.08):
        child = os.fork()
        if child == 0:
            try:
                events = Events(tmp_path)
                for step in range(10**6):
                    events.log("a", {f"metric_{n}": n for n in range(200)}, step=step)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while len(told(tmp_path)) <= steps and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(kill_after)
        os.kill(child, 9)
        os.waitpid(child, 0)
        with file.open("ab") as torn:
            torn.write(b'{"do": "log", "run": "a", "step": 7, "met')  # whichever byte it was
        before, offset = read(file)
        Events(tmp_path)
        assert told(tmp_path) == before
        assert offset == file.stat().st_size
        assert len(before) > steps
        steps = len(before)
    assert [e["step"] for e in told(tmp_path)] == list(range(steps))


def test_last_is_the_newest_of_its_kind_near_the_end(tmp_path: Path) -> None:
    assert last(tmp_path / FILE) == {}
    events = Events(tmp_path)
    events.log("a", {"x": 0.5})
    assert last(tmp_path / FILE)["metrics"] == {"x": 0.5}  # the only line
    events.input("a", schema="g" * 20000)  # longer than what is looked at
    assert last(tmp_path / FILE) == {}
    events.log("b", {"x": 0.25}, step=3)
    events.status("b", "FINISHED")
    with (tmp_path / FILE).open("ab") as torn:
        torn.write(b'{"do": "log", "st')
    assert last(tmp_path / FILE)["step"] == 3
    assert last(tmp_path / FILE, "status")["run"] == "b"
    assert last(tmp_path / FILE, "files") == {}


def test_events_are_one_line_each_and_numbers_keep_their_bits(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    Events(tmp_path).log("a", {"x": value}, params={"rate": 1e-6, "none": None, "yes": True})
    (line,) = (tmp_path / FILE).read_text().splitlines()
    event = json.loads(line)
    assert event["metrics"]["x"] == value
    assert event["params"] == {"rate": "1e-06", "none": "None", "yes": "True"}
    assert abs(event["time"] / 1000 - time.time()) < 60
