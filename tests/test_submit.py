"""A sweep that is sent to a cluster's job server, a real one on this machine."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from brstnet.config import build
from sweeps import submit
from sweeps.run import make_parser, parse
from sweeps.space import Sweep

ROOT = Path(__file__).parents[1]
SPACE = {"space": {"learning_rate": [0.1, 0.01], "aux_weight": [1.0, 10.0]}, "trials": 2}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "sent.yaml"
    file.write_text(yaml.safe_dump(SPACE))
    return file


def test_every_option_is_sent_or_done_here() -> None:
    own = {f"--{name}" for name in Sweep.__dataclass_fields__}
    options = {o for a in make_parser(None)._actions for o in a.option_strings if o[:2] == "--"}
    rest = {o for o in options if o.split(".")[0] not in own} - {"--help", "--print_config"}
    rest = {o for o in rest if not o.startswith("--no_") and not o.endswith("+")}
    assert rest == {*submit.SENT, *submit.HERE}


def test_what_was_typed_goes_there_and_nothing_else(config: Path) -> None:
    words = [str(config), "--store", "s3://b/s", "--only", "learning_rate", "--dry-run"]
    words += ["--deadline", "2030-01-02T03:04+00:00", "--training.epochs", "3", "--name", "x"]
    plan, options = parse(words)
    line = submit.entrypoint(options, words)
    assert line.startswith("python -m sweeps.run sweep.yaml --address auto --store s3://b/s")
    assert "--dry-run" in line.split()
    assert "--deadline" in line
    assert not any(w in line for w in ("--only", "--out", "--tracking_uri", "--name", "epochs"))
    again, there = parse([str(config), *shlex.split(line)[4:], "--name=a"])
    assert there.deadline == options.deadline
    assert again.name == "a"
    assert list(plan.space) == ["learning_rate"]


def test_yaml_that_is_sent_is_the_sweep_that_was_read(config: Path, tmp_path: Path) -> None:
    plan, _ = parse([str(config), "--training.epochs", "3", "--only", "aux_weight"])
    (tmp_path / submit.FILE).write_text(submit.to_yaml(plan))
    assert parse([str(tmp_path / submit.FILE)])[0] == plan
    assert build(Sweep, yaml.safe_load(submit.to_yaml(plan)), "sent") == plan


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--store is missing"),
        (["--store", "stores/a"], "--store stores/a: must be a place that the cluster knows"),
        (["--store", "s3://b/s", "--out", "runs"], "--out runs: must"),
        (["--store", "/s", "--stores", "{wide: stores/wide}"], "stores: wide stores/wide: must"),
    ],
)
def test_places_of_this_machine_are_refused(config: Path, words: list[str], said: str) -> None:
    plan, options = parse([str(config), *words])
    with pytest.raises(ValueError, match=said):
        submit.submit(plan, options, words, "http://127.0.0.1:9")


def test_address_of_a_job_server_and_of_ray() -> None:
    assert submit.is_remote("http://127.0.0.1:8265")
    assert not any(submit.is_remote(a) for a in (None, "auto", "10.0.0.5:6379"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head with a token and a job server, and the variables of who knows the token."""
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    runs = {"HOME": str(home), "PATH": path, "BRSTNET_RUNS": str(home), "PYTHONPATH": str(ROOT)}
    environment = {**kept, **runs, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": "/tmp"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*ray, "get-auth-token", "--generate"], env=environment, check=True, **quiet)
    port = free_port()
    words = ["start", "--head", "--block", "--num-cpus=0", f"--port={free_port()}"]
    words += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    words += ["--node-ip-address=127.0.0.1", "--dashboard-agent-listen-port", str(free_port())]
    head = subprocess.Popen([*ray, *words], env=environment, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert head.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", environment
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.drill
@pytest.mark.cluster
@pytest.mark.slow
def test_sweep_is_sent_followed_and_stopped(
    server: tuple[str, dict[str, str]], config: Path, tmp_path: Path
) -> None:
    address, environment = server
    sent = ["sweeps/run.py", str(config), "--store", "/no/such/store", "--address", address]
    done = run({**environment, "HOME": str(tmp_path)}, *sent)
    assert done.returncode == 2, done.stderr  # without the token
    assert "no token here" in done.stderr

    done = run(environment, *sent, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert "/no/such/store" in done.stdout  # the driver has read the YAML, and missed the store

    code = f"""
import sys
from sweeps import submit
from sweeps.run import parse
words = {[str(config), "--store", "/no/such/store"]!r}
plan, options = parse(words)
submit.entrypoint = lambda *_: "echo begun; sleep 300"
job = submit.submit(plan, options, words, {address!r}, after="echo ended with $?")
try:
    submit.submit(plan, options, words, {address!r})
except ValueError as error:
    print("refused:", error)
print("found:", submit.find({address!r}, "sent").submission_id == job)
print("stopped:", submit.stop_all({address!r}) == [job])
print("now:", submit.follow({address!r}, job).status)
"""
    done = run(environment, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "refused: sweep sent runs on the cluster already" in done.stdout
    assert "found: True" in done.stdout
    assert "stopped: True" in done.stdout
    assert "STOPPED" in done.stdout
    ended = [x for x in done.stdout.splitlines() if x.startswith("ended with")]
    assert not ended  # --down-when-done does nothing after a stop
