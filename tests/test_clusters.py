"""`python -m clusters` on this machine: what it refuses, makes, closes and says.

The real thing, over SSH, is tests/cluster.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray._common.utils import get_default_ray_temp_dir

from clusters import __main__ as commands
from clusters import down, fetch, off, tunnel
from clusters.nodes import NO_ANSWER, Cluster, read_cluster
from clusters.up import check_mounts, make_secrets

LOCAL = {
    "cluster_name": "tested",
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]},
    "auth": {"ssh_user": "me", "ssh_private_key": "~/.ssh/key"},
    "file_mounts": {
        "~/.ray/auth_token": "~/.ray/auth_token",
        "~/.brstnet/tracking.env": "~/.brstnet/tracking.env",
        "~/.brstnet/nodes.env": "~/.brstnet/nodes.env",
        "~/brstnet/README.md": "README.md",
    },
}
CLOUD = LOCAL | {"provider": {"type": "aws", "region": "there"}}


def written(folder: Path, config: dict) -> Cluster:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    return read_cluster(file)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A program on the PATH that notes its words, then runs a line of shell."""

    def make(name: str, line: str = "") -> Path:
        folder, log = tmp_path / "bin", tmp_path / f"{name}.log"
        folder.mkdir(exist_ok=True)
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "$@" >> {log}\n{line}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return log

    return make


@pytest.fixture
def fake_ray(
    stand_in: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    def make(line: str = "") -> Path:
        log = stand_in("ray", line)
        monkeypatch.setattr(Cluster, "words", lambda _, *words: ["ray", *words])
        return log

    return make


# The YAML


def test_yaml_with_places_to_fill_in_is_refused_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "# every REPLACE below\ncluster_name: a\nprovider: {type: aws, region: b}  # REPLACE\n"
        "auth: {ssh_user: c}\nimage: ami-REPLACE\n"
    )
    with pytest.raises(ValueError, match=r"REPLACE in\n  line 5: image: ami-REPLACE$"):
        read_cluster(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: RayCluster\nmetadata: {}\n", "kubectl"),
        ("provider: {type: aws}\n", "must have cluster_name"),
        ("[1, 2]\n", "must have cluster_name"),
        ("", "got nothing"),
        ("cluster_name: a\nprovider: {type: local}\nauth: {ssh_user: b}\n", "head_ip"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_cluster_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_cluster(file)


def test_missing_yaml_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert commands.main(["down", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such settings file" in capsys.readouterr().err


def test_old_autoscaler_for_hosts_alone_and_no_other_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    hosts, cloud = written(tmp_path, LOCAL), written(tmp_path, CLOUD)
    assert hosts.environment["RAY_UP_enable_autoscaler_v2"] == "0"
    assert "RAY_UP_enable_autoscaler_v2" not in cloud.environment
    for cluster in (hosts, cloud):
        assert cluster.environment["RAY_AUTH_MODE"] == "token"
        assert "RAY_ADDRESS" not in cluster.environment


# Secrets


def test_secrets_are_made_closed_and_never_said(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    cluster = written(tmp_path, LOCAL)
    said = "\n".join(make_secrets(cluster))
    token = (home / ".ray/auth_token").read_text()
    assert len(token) >= 32
    assert "no MLflow server" in said
    assert token not in said + "".join(capfd.readouterr())
    for name in (".ray/auth_token", ".brstnet/tracking.env", ".brstnet/nodes.env"):
        assert (home / name).stat().st_mode & 0o777 == 0o600
    check_mounts(cluster)
    (home / ".brstnet/nodes.env").write_text("A=b\n")
    (home / ".brstnet/nodes.env").chmod(0o644)
    said = "\n".join(make_secrets(cluster))
    assert "nodes.env: others could read it" in said
    assert (home / ".brstnet/nodes.env").read_text() == "A=b\n"
    assert (home / ".ray/auth_token").read_text() == token


def test_mount_that_is_not_there_is_refused(tmp_path: Path) -> None:
    cluster = written(tmp_path, LOCAL | {"file_mounts": {"~/x": "no/such/file"}})
    with pytest.raises(ValueError, match="no such file: no/such/file"):
        check_mounts(cluster)


# Tunnel


FORWARD = """exec {python} - "$@" << 'END'
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401); self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
END"""


def test_tunnel_opens_on_a_free_port_and_ends_with_the_block(
    tmp_path: Path, fake_ray: Callable[[str], Path]
) -> None:
    log = fake_ray(FORWARD.format(python=sys.executable))
    cluster = written(tmp_path, LOCAL)
    with tunnel.tunnel(cluster, 8265) as address:
        port = int(address.rpartition(":")[2])
        with socket.socket() as taken:
            assert taken.connect_ex(("127.0.0.1", port)) == 0
    assert log.read_text().split() == [
        *("dashboard", "--port", str(port), "--remote-port", "8265"),
        str(cluster.file),
    ]
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_tunnel_to_nobody_says_what_ray_said(
    tmp_path: Path, fake_ray: Callable[[str], Path]
) -> None:
    fake_ray("echo Head node of cluster not found; exit 1")
    with (
        pytest.raises(OSError, match=r"port 8265.*\n  Head node of cluster not found"),
        tunnel.tunnel(written(tmp_path, LOCAL), 8265),
    ):
        pass


def test_wanted_port_is_taken_if_it_is_free() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert tunnel.free_port(port) != port
    assert tunnel.free_port(port) == port


# Down


def test_hosts_are_asked_and_what_is_left_is_said(
    home: Path,
    tmp_path: Path,
    stand_in: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert home == tmp_path
    log = stand_in(
        "ssh",
        "case \"$*\" in *' -O '*) exit 1;; *10.0.0.1*) exit 1;; *10.0.0.2*) echo '77 raylet';;"
        " *) echo 'Connection timed out' >&2; exit 255;; esac",
    )
    monkeypatch.setattr(down, "end_sweeps", lambda _: "no sweep was running")
    cluster = written(tmp_path, LOCAL)
    assert commands.main(["down", str(cluster.file)]) == 1
    said = capsys.readouterr().out
    assert "10.0.0.1: nothing of Ray is left" in said
    assert "10.0.0.2: still there:\n  77 raylet" in said
    assert "10.0.0.3: no answer (Connection timed out)" in said
    assert "NOT all is down" in said
    calls = log.read_text()
    assert f"-i {home}/.ssh/key me@10.0.0.1" in calls
    assert calls.index("me@10.0.0.1") < calls.index("me@10.0.0.2")  # its autoscaler first
    assert calls.count("ray_bootstrap_key.pem") == 1


def test_stop_is_valid_shell_and_does_not_find_itself() -> None:
    for line in (down.STOP, down.STOP_HEAD, down.STOP_RAY):
        subprocess.run(["bash", "-n", "-c", line], check=True)
    search = ["bash", "-c", f"pgrep -f -l '{down.OURS}'; true"]
    found = subprocess.run(search, capture_output=True, text=True, check=True)
    assert "bash" not in found.stdout


def test_cloud_that_does_not_end_says_what_it_costs(
    tmp_path: Path,
    fake_ray: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    log = fake_ray("exit 1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(down, "end_sweeps", lambda _: "no sweep was running")
    assert commands.main(["down", str(written(tmp_path, CLOUD).file)]) == 1
    said = capsys.readouterr().out
    assert "STILL RUN AND COST MONEY" in said
    assert "ray-cluster-name = tested" in said
    assert log.read_text().count("down -y") == 3


def test_head_that_is_away_is_not_waited_for(
    tmp_path: Path, stand_in: Callable[[str, str], Path]
) -> None:
    stand_in("ssh", "exit 255")
    assert "no answer" in down.end_sweeps(written(tmp_path, LOCAL))


def test_this_machine_forgets_this_cluster_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(down.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = Path(get_default_ray_temp_dir())
    folder.mkdir(exist_ok=True)
    for name in ("tested", "other"):
        (folder / f"cluster-{name}.state").touch()
        (tmp_path / f"ray-config-{name}").write_text(json.dumps({"config": {"cluster_name": name}}))
    down.forget(written(tmp_path, LOCAL))
    assert not (folder / "cluster-tested.state").exists()
    assert not (tmp_path / "ray-config-tested").exists()
    assert (folder / "cluster-other.state").exists()
    assert (tmp_path / "ray-config-other").exists()


def test_ssh_that_hangs_is_no_answer(tmp_path: Path, stand_in: Callable[[str, str], Path]) -> None:
    stand_in("ssh", "exec sleep 30")
    assert written(tmp_path, LOCAL).ssh("h", "true", 0.5)[0] == NO_ANSWER


# Down when done


@pytest.mark.parametrize("code", off.BY_HAND)
def test_sweep_stopped_by_hand_keeps_the_cluster(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(off.subprocess, "Popen", lambda *_, **__: pytest.fail("went down"))
    assert off.main([str(code)]) == code
    assert "stays up" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 2, 137])
def test_sweep_that_ended_takes_it_down_from_a_process_of_its_own(
    code: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRSTNET_RUNS", str(home))
    started = []
    monkeypatch.setattr(off.subprocess, "Popen", lambda *a, **k: started.append((a, k)))
    assert off.main([str(code)]) == code
    ((words, options),) = started
    assert words[0][1:] == ["-m", "clusters.off"]
    assert options["start_new_session"]
    assert options["cwd"] == home
    assert (home / "cluster-off.log").exists()


def test_cloud_ends_workers_until_none_is_left_then_its_head(
    tmp_path: Path,
    home: Path,
    fake_ray: Callable[[str], Path],
    stand_in: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert home == tmp_path
    tries = tmp_path / "tries"
    log = fake_ray(f'[ "$1" = down ] || exit 0; echo x >> {tries}; [ $(wc -l < {tries}) -ge 3 ]')
    shut = stand_in("sudo", f"cp {log} {tmp_path}/before")
    busy = iter([True, False])
    monkeypatch.setattr(off, "others", lambda: next(busy))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    off.off(written(tmp_path, CLOUD))
    calls = (tmp_path / "before").read_text().splitlines()
    assert calls.count(f"down -y --workers-only {tmp_path / 'cluster.yaml'}") == 3
    assert calls[-1].startswith("down")
    assert shut.read_text().strip() == "shutdown -h now"
    assert not list(busy)


# Home


def test_folder_comes_without_weights_and_without_links(
    tmp_path: Path, fake_ray: Callable[[str], Path]
) -> None:
    log = fake_ray(f'cp "$2" {tmp_path}/sent.yaml')
    cluster, to = written(tmp_path, LOCAL), tmp_path / "to"
    fetch.folder(cluster, "/mnt/runs/a/", to)
    assert log.read_text().split()[2:] == ["/mnt/runs/a/", f"{to}/"]
    sent = yaml.safe_load((tmp_path / "sent.yaml").read_text())
    assert "/trials/**.safetensors" in sent["rsync_exclude"]
    assert sent["cluster_name"] == "tested"
    (to / "innocent").symlink_to("/etc")
    with pytest.raises(ValueError, match="innocent"):
        fetch.folder(cluster, "/mnt/runs/a/", to)
    assert not (to / "innocent").exists()


def test_home_without_a_server_says_where_the_record_is(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert home == tmp_path
    file = written(tmp_path, LOCAL).file
    assert commands.main(["home", str(file), "--to", str(tmp_path / "to")]) == 2
    assert "/mnt/brstnet/runs" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "run", "follow", "stop", "home", "ui", "down"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--help"])
    assert ended.value.code == 0
    assert "CLUSTER.yaml" in capsys.readouterr().out
