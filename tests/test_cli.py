"""The command line: what the user sees, in a temporary folder, with demo tissue of a second."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_raw import content, tiny, write_her2st
from torch import Tensor
from trainings import same_bits, train, with_training

import brstnet
from brstnet import __main__ as cli
from brstnet.config import Prepare, Settings, build, read_yaml, to_yaml
from brstnet.data.index import FORMAT, VERSION
from brstnet.data.store import Store
from brstnet.training.checkpoint import read_facts
from brstnet.training.keep import finished, read_progress
from brstnet.training.step import train_step

DEMO = {
    "patients": 6,
    "sections_per_patient": 1,
    "spots_per_section": 12,
    "pitch_px": 36,
    "genes": 140,
}
PREPARE = {"stain": "none", "window_px": 32, "input_px": 16}

pytestmark = pytest.mark.usefixtures("hgnc_once")


def options(values: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Said:
    """What a command returned, printed and complained of."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The complaint of a command that failed as it should: exit code 2, no traceback."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        assert "\nerror: " in f"\n{self.err}"
        return self.err[f"\n{self.err}".index("\nerror: ") :]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command as a shell would; argparse ends with SystemExit, all else returns."""

    def run(*argv: object) -> Said:
        capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `raw` and `store`, made by the command line; not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    assert cli.main(["demo-data", str(folder / "raw"), *options(DEMO)]) == 0
    argv = ["prepare", str(folder / "raw"), str(folder / "store"), *options(PREPARE)]
    assert cli.main(argv) == 0
    return folder


# --- end to end


def test_demo_data_prepare_info(say: Callable[..., Said], tmp_path: Path, made: Path) -> None:
    said = say("demo-data", tmp_path / "new" / "raw", *options(DEMO))
    assert said.code == 0
    assert f"demo tissue in {tmp_path / 'new' / 'raw'}" in said.out
    raw = tmp_path / "new" / "raw"
    assert content(raw) == content(made / "raw"), "the same settings, the same bytes"

    said = say("prepare", raw, tmp_path / "new" / "store", *options(PREPARE))
    assert said.code == 0
    store = Store(tmp_path / "new" / "store")
    assert content(store.path) == content(made / "store")
    assert said.out == say("info", store.path).out

    kept = sum(entry["spots_kept"] for entry in store.index["sections"])
    raw_spots = sum(entry["spots_raw"] for entry in store.index["sections"])
    assert f"6 patients, 6 sections, {kept} of {raw_spots} spots kept" in said.out
    assert f"store {store.digest}, format {FORMAT} {VERSION}" in said.out
    for entry in store.index["sections"]:
        (line,) = [line for line in said.out.splitlines() if line.startswith(entry["section"])]
        assert all(f"{why} {n}" in line for why, n in entry["lost"].items())
    assert max(map(len, said.out.splitlines()[1:7])) <= 130


def test_prepare_reads_its_settings_from_yaml_and_the_command_line_goes_before_it(
    say: Callable[..., Said], tmp_path: Path, made: Path
) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text("stain: none\nwindow_px: 32\ninput_px: 24\n")
    said = say("prepare", made / "raw", tmp_path / "store", "--config", path, "--input_px", 16)
    assert said.code == 0
    expected = Prepare(stain="none", window_px=32, input_px=16)
    assert build(Prepare, Store(tmp_path / "store").index["prepare"], "index") == expected
    assert content(tmp_path / "store") == content(made / "store")
    assert build(Prepare, read_yaml(path), "x").input_px == 24


def test_prepare_again(say: Callable[..., Said], tmp_path: Path, made: Path) -> None:
    first = content(made / "store")
    assert say("prepare", made / "raw", made / "store", *options(PREPARE)).code == 0
    said = say("prepare", made / "raw", made / "store", *options(PREPARE | {"input_px": 32}))
    assert "made with other settings or other raw data" in said.error()
    assert content(made / "store") == first


def test_prepare_her2st_names_what_it_left_alone(say: Callable[..., Said], tmp_path: Path) -> None:
    raw = write_her2st(tmp_path / "raw", {"A1": tiny(0), "B1": tiny(1), "B2": tiny(2)})
    (raw / "images/B2.jpg").unlink()
    values = {"layout": "her2st", "min_counts": 10} | PREPARE | {"window_px": 16}
    said = say("prepare", raw, tmp_path / "store", *options(values))
    assert said.code == 0
    assert "left alone: 1 (counts without a slide): B2" in said.out


# --- info


@pytest.mark.parametrize("verify", [False, True])
def test_info_json_is_json_with_the_documented_keys(
    say: Callable[..., Said], made: Path, verify: bool
) -> None:
    said = say("info", made / "store", "--json", *["--verify"][: int(verify)])
    assert said.code == 0
    info = json.loads(said.out)
    assert {"format", "version", "genes", "sections"} <= set(info)
    assert (info["format"], info["version"]) == (FORMAT, VERSION)
    assert info["genes"] == len(Store(made / "store").genes)
    keys = {"section", "patient", "spots_raw", "spots_kept", "lost", "um_per_px"}
    assert all(keys <= set(entry) for entry in info["sections"])
    assert [entry["section"] for entry in info["sections"]] == [
        f"BC9000{n}_C1" for n in range(1, 7)
    ]
    assert info == json.loads(json.dumps(Store(made / "store").info()))


def test_info_verify(say: Callable[..., Said], tmp_path: Path, made: Path) -> None:
    said = say("info", made / "store", "--verify")
    assert said.code == 0
    assert said.out.endswith("every file has the hash it was written with\n")
    copy = Path(shutil.copytree(made / "store", tmp_path / "copy"))
    file = copy / "BC90003_C1" / "patches.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert say("info", copy).code == 0
    told = say("info", copy, "--verify").error()
    assert f"{copy}: files differ from their hashes: BC90003_C1/patches.npy" in told


def test_info_of_a_section_without_a_scale(
    say: Callable[..., Said], tmp_path: Path, made: Path
) -> None:
    copy = Path(shutil.copytree(made / "store", tmp_path / "copy"))
    index = json.loads((copy / "index.json").read_text())
    index["sections"][0]["um_per_px"] = None
    (copy / "index.json").write_text(json.dumps(index))
    assert say("info", copy).out.splitlines()[1].split()[6] == "-"


# --- errors


def test_user_errors_return_2_and_say_error(
    say: Callable[..., Said], tmp_path: Path, made: Path
) -> None:
    told = say("prepare", tmp_path / "nowhere", tmp_path / "store").error()
    assert told == f"error: {tmp_path / 'nowhere'}: no such folder of raw data\n"
    told = say("info", tmp_path / "nowhere").error()
    assert (
        told == f"error: {tmp_path / 'nowhere'}: no patch store here; brstnet prepare makes one\n"
    )
    told = say("prepare", made / "raw", tmp_path / "store", "--input_px", 8).error()
    assert told == "error: input_px must be from 16 to 4096 pixels, got 8\n"
    told = say("prepare", made / "raw", tmp_path / "store", "--held_out", "[BC9]").error()
    assert "held_out names BC9, not among the patients: BC90001" in told
    told = say("demo-data", made).error()
    assert "wants a new or an empty folder" in told
    told = say("demo-data", tmp_path / "demo", "--patients", 2).error()
    assert "patients must lie in 6..99, got 2" in told
    assert list(tmp_path.iterdir()) == []


def test_faults_of_raw_data_are_listed_under_one_error(
    say: Callable[..., Said], tmp_path: Path, made: Path
) -> None:
    raw = Path(shutil.copytree(made / "raw", tmp_path / "raw"))
    for pattern in ("HE_*90001_C1.jpg", "BC*90002_C1_stdata.tsv.gz"):
        (path,) = raw.glob(pattern)
        path.write_bytes(path.read_bytes()[:500])
    told = say("prepare", raw, tmp_path / "store", *options(PREPARE)).error().splitlines()
    assert told[0] == f"error: {raw}: 2 fault(s) in the raw data:"
    assert [line[:4] for line in told[1:]] == ["  - "] * 2
    assert not (tmp_path / "store").exists()


def test_the_notes_of_an_error_are_printed(
    say: Callable[..., Said], tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr("brstnet.data.prepare.write_section", full)
    told = say("prepare", made / "raw", tmp_path / "store", *options(PREPARE)).error().splitlines()
    assert "No space left on device" in told[0]
    assert "the disk is full; finished sections are kept" in told[1]


SETTINGS_FILES = {
    "missing": (None, "does not exist"),
    "not YAML": ("training: [1", "Problems parsing config"),
    "a list": ("- 3\n", "Unexpected config"),
    "a group that is a number": ("training: 3\n", "training must be a mapping of settings, got 3"),
    "a null": ("training:\n  epochs:\n", "epochs must have a value, got None"),
    "a wrong type": ("training:\n  epochs: many\n", 'training.epochs":\n  Expected a <class'),
    "out of range": ("protocol:\n  folds: 1\n", "folds must be at least 2, got 1"),
    "misspelt": ("training:\n  epocs: 1\n", "did you mean training.epochs"),
}


@pytest.mark.parametrize("fault", SETTINGS_FILES)
def test_faults_of_a_settings_file(
    say: Callable[..., Said], tmp_path: Path, made: Path, fault: str
) -> None:
    text, told = SETTINGS_FILES[fault]
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    said = say("train", made / "store", "--config", path, "--out", tmp_path / "out")
    error = said.error()
    assert told in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], 'expected "subcommand" to be one of {prepare,info,train,evaluate,score, ...}'),
        (["prepar"], "invalid choice: 'prepar'"),
        (["prepare", "raw"], "arguments are required: prepare.store"),
        (["prepare", "raw", "store", "--layout", "visium"], "Got value: visium"),
        (["info", "store", "--verbose"], "valid names: json, verify"),
    ],
    ids=["nothing", "no command", "no store", "layout", "option"],
)
def test_wrong_command_lines(say: Callable[..., Said], argv: Sequence[str], told: str) -> None:
    assert told in say(*argv).error()


def test_stopping_by_hand_returns_130(
    say: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_demo", stop)
    said = say("demo-data", tmp_path / "raw")
    assert said.code == 130
    assert said.err.endswith("stopped\n")  # nothing is kept, so nothing is promised
    monkeypatch.setattr("brstnet.data.prepare.prepare", stop)
    said = say("prepare", tmp_path, tmp_path / "store")
    assert said.code == 130
    assert said.err.endswith("the same command goes on at the section it was at\n")


def test_our_own_mistakes_are_not_dressed_up(
    say: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(cli, "make_demo", mistake)
    with pytest.raises(AssertionError, match="a bug"):
        say("demo-data", tmp_path / "raw")


def test_as_a_module(made: Path) -> None:
    """As `python -m brstnet` starts it; info needs no torch, which takes seconds to import."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "runpy.run_module('brstnet', run_name='__main__', alter_sys=True)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "info", str(made / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(brstnet.__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert "6 patients, 6 sections" in run.stdout


# --- training


def write_settings(settings: Settings, path: Path) -> Path:
    path.write_text(to_yaml(settings))
    return path


def command(store: Store, config: Path, out: Path) -> list[str]:
    """The words of a training after `brstnet`."""
    words = ["train", store.path, "--config", config, "--out", out, "--device", "cpu"]
    return [str(word) for word in words]


def test_train_says_the_score_and_where_the_checkpoint_is(
    say: Callable[..., Said], demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    config = write_settings(settings, tmp_path / "run.yaml")
    said = say(*command(demo_store, config, tmp_path / "out"))
    fold = tmp_path / "out" / settings.fingerprint() / "fold_0"
    result = finished(fold)
    assert said.code == 0
    assert result is not None
    assert said.out.splitlines() == [
        settings.protocol.line(),
        f"score {result.score:.4f} on the validation sections (epoch 1)",
        f"checkpoint {fold / 'last'}",
    ]
    assert "76/76" in said.err  # patches of two epochs, to the last
    assert "of the time in steps" in said.err
    assert say(*command(demo_store, config, tmp_path / "out")).out == said.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_stopped_by_hand_goes_on_at_the_step_it_was_at(
    say: Callable[..., Said],
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The signal comes within the eighth step, which is done to its end."""
    steps: list[int] = []

    def signalled(*args: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 8:
            os.kill(os.getpid(), number)
        return train_step(*args)

    monkeypatch.setattr("brstnet.training.step.train_step", signalled)
    argv = command(demo_store, write_settings(settings, tmp_path / "run.yaml"), tmp_path / "out")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    said = say(*argv)
    assert said.code == 130
    assert said.err.endswith("\nstopped; the same command goes on at the step it was at\n")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    fold = tmp_path / "out" / settings.fingerprint() / "fold_0"
    assert read_progress(fold / "position").step == 3
    assert say(*argv).code == 0
    assert len(steps) == 10
    assert same_bits(fold / "last", train(demo_store, settings, tmp_path / "whole").folder)


def test_a_second_ctrl_c_stops_at_once() -> None:
    with cli.Stopper() as stop:
        stop.if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.if_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def process(*words: str, **more: str) -> subprocess.Popen[str]:
    """`python -m` these words, on one thread, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(brstnet.__file__).parents[1],
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more},
    )


def ended(run: subprocess.Popen[str]) -> Said:
    try:
        out, err = run.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    return Said(run.returncode, out, err)


def wait_for(file: Path, run: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if file.exists():
            return
        assert run.poll() is None, ended(run)
        time.sleep(0.05)
    raise TimeoutError(file)


def saved_epoch(folder: Path) -> int:
    try:
        return read_progress(folder).epoch
    except FileNotFoundError:  # it is being replaced
        return -1


@pytest.mark.slow
@pytest.mark.parametrize("stops", [1, pytest.param(3, marks=pytest.mark.drill)])
def test_ctrl_c_in_a_terminal_and_the_same_command_again_give_the_same_bits(
    demo_store: Store, settings: Settings, tmp_path: Path, stops: int
) -> None:
    """Stopped at whatever step it is at when its first, third and fifth epoch are saved."""
    settings = with_training(settings, epochs=12, dropout=0.2)
    argv = command(demo_store, write_settings(settings, tmp_path / "run.yaml"), tmp_path / "out")
    fold = tmp_path / "out" / settings.fingerprint() / "fold_0"
    for stop in range(stops):
        run = process("brstnet", *argv)
        wait_for(fold / "last", run)
        while run.poll() is None and saved_epoch(fold / "last") < 2 * stop:
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGINT)
        said = ended(run)
        assert said.code == 130, said
        assert said.err.endswith("stopped; the same command goes on at the step it was at\n")
        assert "Traceback" not in said.err
        assert (fold / "position").is_dir()
    assert ended(process("brstnet", *argv)).code == 0
    assert not (fold / "position").exists()
    assert same_bits(fold / "last", train(demo_store, settings, tmp_path / "whole").folder)


@pytest.mark.slow
def test_torchrun_trains_with_two_workers(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """One result, said once, by the leading worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = command(demo_store, write_settings(settings, tmp_path / "run.yaml"), tmp_path / "out")
    run = process(
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "-m",
        "brstnet",
        *argv,
    )
    said = ended(run)
    assert said.code == 0, said
    fold = tmp_path / "out" / settings.fingerprint() / "fold_0"
    result = finished(fold)
    assert result is not None
    assert said.out.count("score ") == 1
    assert f"score {result.score:.4f}" in said.out
    assert read_facts(result.folder)["machine"]["workers"] == 2
