"""clusters/setup.sh as nodes run it, with stubs of Python, pip and tar."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "clusters/setup.sh"

PYTHON = """
case "$1 $2" in
*platform*) echo "${STUB_VERSION:-3.12.3 x86_64}" ;;
"-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp ~/bin/pip "$4/bin/pip" ;;
esac"""
PIP = """
echo "$PWD: $*" >> "$STUB_LOG"
sleep "${STUB_PIP_SLEEP:-0}"
exit "${STUB_PIP_EXIT:-0}" """
TAR = f"""
case "$1 ${{STUB_TAR:-}}" in
"-cf dies") echo half > "$2"; kill -9 $PPID ;;
"-cf fails") echo half > "$2"; exit 1 ;;
*) exec {shutil.which("tar")} "$@" ;;
esac"""


class Node:
    """A home as Ray's rsync leaves it on a new machine, and the shared file system."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.shared = root, root / "home", root / "shared"
        self.venv = self.home / "brstnet/.venv"
        self.shared.mkdir()
        self.new()

    def new(self) -> None:
        """Another machine with the same path for its home, as all nodes have it."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        for name, text in (("python3", PYTHON), ("pip", PIP), ("tar", TAR)):
            self.write(f"bin/{name}", f"#!/bin/sh\n{text}\n", 0o755)
        for name in ("pyproject.toml", "constraints.txt"):
            self.write(f"brstnet/{name}", "first")
        self.write(".ray/auth_token", "token")
        self.write(".brstnet/nodes.env", "SECRET='a b'\n")
        self.write(".brstnet/tracking.env", "MLFLOW_BACKEND_STORE_URI=db\n")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        file = self.home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(mode)

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "PATH": f"{self.home / 'bin'}:/usr/bin:/bin",
            "STUB_LOG": str(self.root / "pip.log"),
            "BRSTNET_SHARED": str(self.shared),
            **variables,
        }

    def setup(self, role: str = "worker", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SETUP), role],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
        )

    def shell(self, *options: str, say: str) -> str:
        """What a shell on this machine says."""
        command = ["bash", *options, "-c", f"echo {say}"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True)
        return done.stdout.strip()

    @property
    def installs(self) -> list[str]:
        log = self.root / "pip.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    @property
    def tarballs(self) -> list[Path]:
        return [file for file in (self.shared / "environments").glob("*") if file.name != "lock"]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SETUP], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("role", ["", "boss"])
def test_an_unknown_role_is_refused(node: Node, role: str) -> None:
    done = node.setup(role)
    assert done.returncode == 1
    assert "say 'head' or 'worker'" in done.stderr
    assert not node.installs


def test_installs_once_from_the_constraints(node: Node) -> None:
    expected = f"{node.home / 'brstnet'}: install -q -c constraints.txt -e .[cluster]"
    for _ in range(2):
        assert node.setup("head").returncode == 0
    assert node.installs == [expected]
    node.write("brstnet/constraints.txt", "second")
    assert node.setup("head").returncode == 0
    assert node.installs == [expected, expected]


def test_extras_are_a_part_of_what_the_environment_is(node: Node) -> None:
    node.setup()
    node.setup(BRSTNET_EXTRAS="cluster,gcp")
    assert [line.split()[-1] for line in node.installs] == [".[cluster]", ".[cluster,gcp]"]
    assert len(node.tarballs) == 2


def test_second_node_unpacks_and_never_calls_pip(node: Node) -> None:
    node.setup("head")
    node.new()
    done = node.setup("worker")
    assert done.returncode == 0
    assert "unpacking" in done.stdout
    assert len(node.installs) == 1
    assert (node.venv / "bin/pip").stat().st_mode & 0o111
    assert not node.venv.with_name(".venv.new").exists()


def test_another_python_gets_an_environment_of_its_own(node: Node) -> None:
    node.setup()
    node.new()
    node.setup(STUB_VERSION="3.13.1 x86_64")
    assert len(node.installs) == 2


def test_without_the_shared_folder_it_just_installs(node: Node) -> None:
    node.shared.rmdir()
    assert node.setup().returncode == 0
    assert len(node.installs) == 1
    assert not node.shared.exists()


def test_failed_install_is_tried_again(node: Node) -> None:
    assert node.setup(STUB_PIP_EXIT="1").returncode == 1
    assert not (node.venv / "installed").exists()
    assert not node.tarballs
    assert node.setup().returncode == 0
    assert len(node.installs) == 2
    assert len(node.tarballs) == 1


def test_killed_while_it_packs(node: Node) -> None:
    """The node is ready all the same, and the next one finds neither half a tarball nor a lock."""
    assert node.setup(STUB_TAR="dies").returncode == -9
    assert [file.suffix for file in node.tarballs] == [".part"]
    assert node.setup().returncode == 0
    assert len(node.installs) == 1
    node.new()
    assert node.setup().returncode == 0
    assert len(node.installs) == 2
    assert [file.suffix for file in node.tarballs] == [".tar"]


def test_a_full_shared_disk_does_not_stop_the_node(node: Node) -> None:
    done = node.setup(STUB_TAR="fails")
    assert done.returncode == 0
    assert "disk full?" in done.stderr
    assert not node.tarballs


def test_a_broken_tarball_is_made_again(node: Node) -> None:
    node.setup()
    (tarball,) = node.tarballs
    tarball.write_bytes(tarball.read_bytes()[:700])
    node.new()
    assert node.setup().returncode == 0
    assert len(node.installs) == 2
    node.new()
    assert node.setup().returncode == 0
    assert len(node.installs) == 2


def test_two_nodes_at_once_install_once(node: Node) -> None:
    """Both homes have one path, as on two machines: each process mounts its own there."""
    command = 'mount --bind "$OWN" "$HOME" && exec bash "$0" worker'
    unshare = ["unshare", "--mount", "--map-root-user", "bash", "-c"]
    homes = [node.root / name for name in ("one", "two")]
    for home in homes:
        shutil.copytree(node.home, home)
    if subprocess.run([*unshare, 'mount --bind "$0" "$0"', str(node.home)], check=False).returncode:
        pytest.skip("this machine allows no mount namespaces")
    nodes = []
    for home in homes:
        variables = node.environment(OWN=str(home), STUB_PIP_SLEEP="1.5")
        nodes.append(subprocess.Popen([*unshare, command, str(SETUP)], env=variables))
        time.sleep(0.3)
    assert [process.wait(timeout=60) for process in nodes] == [0, 0]
    assert len(node.installs) == 1
    notes = [(home / "brstnet/.venv/installed").read_text(encoding="utf-8") for home in homes]
    assert notes[0] == notes[1]


def test_a_lock_that_is_held_for_too_long_names_itself(node: Node) -> None:
    node.write("bin/flock", "#!/bin/sh\nexit 1\n", 0o755)
    done = node.setup()
    assert done.returncode == 1
    assert f"{node.shared}/environments/lock: another node has held it" in done.stderr


def test_secrets_are_closed_and_the_server_s_stay_on_the_head(node: Node) -> None:
    secrets = [node.home / name for name in (".ray/auth_token", ".brstnet/nodes.env")]
    tracking = node.home / ".brstnet/tracking.env"
    node.setup("head")
    assert {file.stat().st_mode & 0o777 for file in [*secrets, tracking]} == {0o600}
    assert (node.home / ".brstnet").stat().st_mode & 0o777 == 0o700
    node.setup("worker")
    assert not tracking.exists()
    assert all(file.exists() for file in secrets)


SHELLS = [("--login",), ("-i",), ("--login", "-i")]
RETURNS = 'case $- in *i*) ;; *) return ;; esac\necho "from bashrc" >&2\n'


@pytest.mark.parametrize("options", SHELLS, ids="".join)
@pytest.mark.parametrize("profile", [None, ".profile", ".bash_profile"])
def test_every_shell_has_what_ray_and_sweeps_need(
    node: Node, options: tuple[str, ...], profile: str | None
) -> None:
    """Also where a profile does not read ~/.bashrc, and ~/.bashrc returns where nobody types."""
    node.write(".bashrc", RETURNS)
    if profile:
        node.write(profile, "echo from profile >&2\n")
    node.setup("head", BRSTNET_CACHE="/nvme/cache")
    names = "RAY_AUTH_MODE BRSTNET_RUNS BRSTNET_CACHE MLFLOW_TRACKING_URI SECRET"
    said = node.shell(*options, say="; echo ".join(f'"${name}"' for name in names.split()))
    runs = str(node.shared / "runs")
    assert said.splitlines() == ["token", runs, "/nvme/cache", "http://127.0.0.1:5000", "a b"]
    path = node.shell(*options, say='"$PATH"').split(":")
    assert path[0] == str(node.venv / "bin")
    assert path.count(path[0]) == 1


def test_another_python_in_bashrc_does_not_come_before_ours(node: Node) -> None:
    node.write(".bashrc", 'PATH="/somewhere/shims:$PATH"\n')
    node.setup("head")
    assert node.shell("-i", say='"$PATH"').split(":")[0] == str(node.venv / "bin")


def test_the_server_is_named_where_there_is_one(node: Node) -> None:
    node.setup("head")
    uri = '"$MLFLOW_TRACKING_URI"'
    node.write(".brstnet/tracking.env", "MLFLOW_BACKEND_STORE_URI=db\nMLFLOW_HOST=10.0.0.10\n")
    assert node.shell("--login", say=uri) == "http://10.0.0.10:5000"
    node.write(
        ".brstnet/tracking.env",
        "MLFLOW_BACKEND_STORE_URI=db\nMLFLOW_HOST=0.0.0.0\nMLFLOW_PORT=5001\n",
    )
    assert node.shell("--login", say=uri) == "http://127.0.0.1:5001"
    (node.home / ".brstnet/tracking.env").unlink()
    assert node.shell("--login", say=uri) == ""
    node.new()
    node.setup("worker")
    assert node.shell("--login", say=uri) == ""


def test_shells_are_written_once(node: Node) -> None:
    node.write(".bashrc", "mine")
    for _ in range(2):
        node.setup("head")
    line = "if [ -r ~/.brstnet/shell.sh ]; then . ~/.brstnet/shell.sh; fi\n"
    assert (node.home / ".bashrc").read_text(encoding="utf-8") == f"{line}mine\n{line}"
    assert (node.home / ".profile").read_text(encoding="utf-8") == f"{line}\n{line}"
    node.setup("head", BRSTNET_SHARED=str(node.root / "elsewhere"))
    assert node.shell("-i", say="$BRSTNET_RUNS") == str(node.root / "elsewhere/runs")


def test_no_secret_is_copied_or_said(node: Node) -> None:
    node.write(".brstnet/tracking.env", "MLFLOW_TRACKING_PASSWORD=hunter2hunter2\n")
    done = node.setup("head")
    written = [file for file in node.home.rglob("*") if file.is_file()]
    telling = [file for file in written if b"hunter2" in file.read_bytes()]
    assert telling == [node.home / ".brstnet/tracking.env"]
    assert "hunter2" not in done.stdout + done.stderr
