"""Brings a cluster up: the secrets that its YAML mounts, Ray's own `up`, a head that answers."""

import subprocess
from pathlib import Path

from clusters.nodes import NODES, TOKEN, TRACKING, Cluster
from clusters.tunnel import JOBS, tunnel

EMPTY_MEANS = {
    TRACKING: "no MLflow server is started: sweeps keep a database under --out",
    NODES: "nodes get no keys: stores and artifacts by the rights that the machines have",
}


def up(cluster: Cluster, *, restart: bool = True) -> int:
    """Bring the cluster up, or new code to one that is up; exit code of Ray's command.

    Raises:
        OSError: a secret cannot be made or closed, or the head does not answer.
        ValueError: a file that the YAML mounts is missing.
    """
    for line in make_secrets(cluster):
        print(line)  # noqa: T201 - the command line's output
    check_mounts(cluster)
    words = ["-y", "--no-config-cache", *([] if restart else ["--no-restart"])]
    if code := cluster.ray("up", *words, str(cluster.file)):
        return code
    with tunnel(cluster, JOBS):
        return 0


def mounted(cluster: Cluster, file: Path) -> bool:
    """Whether the YAML brings this file of the home folder to the nodes."""
    sources = [
        Path(source).expanduser() for source in cluster.config.get("file_mounts", {}).values()
    ]
    return file.expanduser() in sources


def make_secrets(cluster: Cluster) -> list[str]:
    """Make the secrets' files that are missing, close all to others; what was done, in words.

    The token is made by Ray. The other two are made empty, as a mounted file must be there.

    Raises:
        OSError: a file cannot be made or closed.
    """
    said = []
    if mounted(cluster, TOKEN) and not TOKEN.expanduser().is_file():
        # It prints the token too.
        make = cluster.words("get-auth-token", "--generate")
        subprocess.run(make, env=cluster.environment, stdout=subprocess.DEVNULL, check=False)
        if not TOKEN.expanduser().is_file():
            raise OSError(f"{TOKEN}: `ray get-auth-token --generate` made none")
        said.append(f"{TOKEN}: made, the secret that this machine shares with the nodes")
    for file, meaning in EMPTY_MEANS.items():
        path = file.expanduser()
        if not mounted(cluster, file):
            continue
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
        if not path.read_text(encoding="utf-8").strip():
            said.append(f"{file}: empty, so {meaning}")
    for file in (TOKEN, *EMPTY_MEANS):
        path = file.expanduser()
        if mounted(cluster, file) and path.stat().st_mode & 0o077:
            path.chmod(0o600)
            said.append(f"{file}: others could read it; closed (mode 600)")
    return said


def check_mounts(cluster: Cluster) -> None:
    """Refuse to begin with a file that is not there: Ray would say so only on the nodes.

    Raises:
        ValueError: it is missing.
    """
    root = Path(__file__).resolve().parents[1]
    sources = cluster.config.get("file_mounts", {}).values()
    missing = [source for source in sources if not (root / Path(source).expanduser()).exists()]
    if missing:
        raise ValueError(f"{cluster.file}: file_mounts: no such file: {', '.join(missing)}")
