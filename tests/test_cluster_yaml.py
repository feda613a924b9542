"""cluster.yaml against Ray's own preparation and schema, offline, and its setup lines as run."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
SECRETS = [
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS access key ids
    r"PRIVATE KEY",
    r"(?i)(password|passwd|secret_access_key|session_token)\s*[:=]",
    r"RAY_AUTH_TOKEN\s*[:=]",
    r"://[^/\s:@]+:[^/\s@]+@",  # user:password in a URI
    r"\b[0-9a-fA-F]{32,}\b",  # tokens, hashes
    r"\b\d{12}\b",  # AWS account numbers
]


def node(name: str) -> dict[str, Any]:
    return CONFIG["available_node_types"][name]


def ray_start(key: str) -> str:
    """The one line among those commands that starts Ray."""
    (line,) = [line for line in CONFIG[key] if "ray start" in line]
    return line


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no credentials."""

    def refuse(*_: object) -> None:
        raise AssertionError("cluster.yaml must be checked without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("offline")
def test_ray_prepares_and_accepts_it() -> None:
    prepared = prepare_config(copy.deepcopy(CONFIG))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    # Nothing of Ray's AWS defaults is left where they would hurt.
    commands = [line for key, lines in prepared.items() if "commands" in key for line in lines]
    assert not any("0.0.0.0" in line or "ray-wheels" in line for line in commands)
    assert (
        prepared["head_setup_commands"][: len(CONFIG["setup_commands"])]
        == (CONFIG["setup_commands"])
    )


@pytest.mark.usefixtures("offline")
def test_ray_refuses_a_misspelt_key() -> None:
    """The schema is looked at, so the test above means something."""
    prepared = prepare_config(copy.deepcopy(CONFIG) | {"idle_timeout": 10})
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepared)


@pytest.mark.parametrize("key", START_COMMANDS)
def test_token_is_switched_on_where_ray_starts(key: str) -> None:
    assert "RAY_AUTH_MODE=token ray start" in ray_start(key)


def test_token_is_on_for_login_shells_and_travels_as_a_file() -> None:
    assert any("export RAY_AUTH_MODE=token" in line for line in CONFIG["setup_commands"])
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_dashboard_is_bound_to_loopback() -> None:
    assert "--dashboard-host=127.0.0.1" in ray_start("head_start_ray_commands")


@pytest.mark.parametrize("pattern", SECRETS)
def test_no_secret_is_in_the_file(pattern: str) -> None:
    assert not re.search(pattern, TEXT)


def test_nothing_is_public() -> None:
    assert CONFIG["provider"]["use_internal_ips"] is True
    for name in CONFIG["available_node_types"]:
        # Without a group of one's own Ray makes one that opens SSH to everybody.
        assert node(name)["node_config"]["SecurityGroupIds"]
        assert node(name)["node_config"]["SubnetIds"]
        assert node(name)["node_config"]["IamInstanceProfile"]


def test_head_takes_no_training() -> None:
    assert CONFIG["head_node_type"] == "head"
    assert node("head")["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in ray_start("head_start_ray_commands")
    assert "InstanceMarketOptions" not in node("head")["node_config"]


def test_workers_are_spot_gpus_from_zero_to_eight() -> None:
    gpu = node("gpu")
    assert (gpu["min_workers"], gpu["max_workers"], CONFIG["max_workers"]) == (0, 8, 8)
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert gpu["resources"]["GPU"] == 1
    assert CONFIG["idle_timeout_minutes"] == 10


def test_all_nodes_have_one_image_an_encrypted_disk_and_tags() -> None:
    configs = [node(name)["node_config"] for name in CONFIG["available_node_types"]]
    assert len({config["ImageId"] for config in configs}) == 1
    for config in configs:
        (disk,) = config["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"]
        assert disk["Ebs"]["VolumeSize"] >= 150
        assert {tag["ResourceType"] for tag in config["TagSpecifications"]} == {
            "instance",
            "volume",
        }


def test_mounts_hold_the_packages_but_not_the_folder() -> None:
    """Ray reads all files below a mount, rsync_exclude or not: never mount what grows."""
    local = {Path(path) for path in CONFIG["file_mounts"].values() if not path.startswith("~")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    files = ["pyproject.toml", "constraints.txt", project["project"]["readme"]]
    assert local == {Path(name.rstrip("*")) for name in [*packages, *files]}
    assert all((ROOT / path).exists() for path in local)
    assert {".venv", "runs", "stores", ".git"} <= set(CONFIG["rsync_exclude"])


def test_all_commands_are_valid_bash() -> None:
    commands = [line for key, lines in CONFIG.items() if "commands" in key for line in lines]
    for line in commands:
        subprocess.run(["bash", "-n", "-c", line], check=True)


def stub(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home as after rsync, with an environment whose pip only notes that it was called."""
    stub(tmp_path / "bin/dpkg")
    stub(tmp_path / "brstnet/.venv/bin/pip", 'echo "$PWD: $*" >> ~/pip.log')
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / "brstnet" / name).write_text("first", encoding="utf-8")
    token = tmp_path / ".ray/auth_token"
    stub(token)
    return tmp_path


def run_setup(home: Path) -> list[str]:
    """Run the setup lines as Ray does, one shell each; the calls of pip so far."""
    environment = {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    for line in CONFIG["setup_commands"]:
        subprocess.run(["bash", "-c", line], check=True, env=environment)
    return (home / "pip.log").read_text(encoding="utf-8").splitlines()


def test_setup_installs_this_project_once_from_the_constraints(home: Path) -> None:
    expected = f"{home / 'brstnet'}: install -q -c constraints.txt -e . boto3 s3fs"
    assert run_setup(home) == [expected]
    assert run_setup(home) == [expected]
    (home / "brstnet/constraints.txt").write_text("second", encoding="utf-8")
    assert run_setup(home) == [expected, expected]


def test_setup_writes_bashrc_once_and_closes_the_token(home: Path) -> None:
    run_setup(home)
    run_setup(home)
    lines = (home / ".bashrc").read_text(encoding="utf-8").splitlines()
    assert lines == [
        'export PATH="$HOME/brstnet/.venv/bin:$PATH"',
        "export RAY_AUTH_MODE=token",
    ]
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_failed_install_is_tried_again(home: Path) -> None:
    stub(home / "brstnet/.venv/bin/pip", "exit 1")
    with pytest.raises(subprocess.CalledProcessError):
        run_setup(home)
    assert not (home / "brstnet/.venv/installed").exists()
