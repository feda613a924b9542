"""A cluster as its YAML describes it, and commands on its hosts."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brstnet.config import read_yaml

ROOT = Path(__file__).resolve().parents[1]
"""Where Ray's commands are run: the YAML's file_mounts are relative to it."""

TOKEN = Path("~/.ray/auth_token")
TRACKING = Path("~/.brstnet/tracking.env")
NODES = Path("~/.brstnet/nodes.env")
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""The YAML as Ray leaves it on the head, with its private key beside it."""

NO_ANSWER = 255
"""What ssh ends with if it could not reach the host; any other code is the command's own."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster's YAML."""

    file: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the cluster, by which Ray and the cloud's tags know it."""
        return str(self.config["cluster_name"])

    @property
    def on_premise(self) -> bool:
        """Hosts that are there, reached by SSH; else machines that a cloud makes and ends."""
        return self.config["provider"]["type"] == "local"

    @property
    def head(self) -> str:
        """Address of an on-premise cluster's head, as this machine reaches it."""
        provider = self.config["provider"]
        return str(provider.get("external_head_ip") or provider["head_ip"])

    @property
    def workers(self) -> list[str]:
        """Addresses of an on-premise cluster's workers."""
        return [str(address) for address in self.config["provider"].get("worker_ips", [])]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of Ray's commands: the token is on, and no other cluster is meant."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        if self.on_premise:
            # Ray's new autoscaler starts only one of several plain SSH hosts.
            kept["RAY_UP_enable_autoscaler_v2"] = "0"
        return {**kept, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    def words(self, command: str, *words: str) -> list[str]:
        """The command line of one of Ray's commands on this cluster."""
        return [sys.executable, "-m", "ray.scripts.scripts", command, *words]

    def ray(self, command: str, *words: str) -> int:
        """Run one of Ray's commands, such as up, exec or down; its exit code."""
        return subprocess.run(
            self.words(command, *words), cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL
        ).returncode

    def ssh(self, host: str, command: str, timeout_s: float = 120) -> tuple[int, str]:
        """Run a command in a login shell of an on-premise host: its exit code and what it printed.

        A host that cannot be reached, or does not end the command in time, is code `NO_ANSWER`.
        The options are those of Ray's own connections, without one that is kept open.
        """
        auth = self.config["auth"]
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": os.devnull,
        }
        if proxy := auth.get("ssh_proxy_command"):
            options["ProxyCommand"] = proxy
        line = ["ssh", *(w for k, v in options.items() for w in ("-o", f"{k}={v}"))]
        if key := auth.get("ssh_private_key"):
            line += ["-i", str(Path(key).expanduser())]
        line += [f"{auth['ssh_user']}@{host}", f"bash --login -c {shlex.quote(command)}"]
        try:
            done = subprocess.run(
                line,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return NO_ANSWER, f"no end after {timeout_s:g} s"
        return done.returncode, (done.stdout + done.stderr).strip()


def read_cluster(file: Path) -> Cluster:
    """The cluster that a YAML describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML of Ray's cluster launcher, or has places still to fill in.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if re.search(r"^kind:\s*Ray", text, flags=re.MULTILINE):
        raise ValueError(
            f"{file}: a manifest for Kubernetes; kubectl does what these commands do: "
            f"kubectl apply -f {file}, kubectl delete -f {file}; its job server takes sweeps by "
            "python sweeps/run.py SWEEP.yaml --address http://..."
        )
    read = read_yaml(file)
    config = read if isinstance(read, dict) else {}
    needed = {"cluster_name": str, "provider": dict, "auth": dict}
    wrong = [k for k, kind in needed.items() if not isinstance(config.get(k), kind)]
    if wrong or "type" not in config["provider"]:
        raise ValueError(
            f"{file}: a YAML for `ray up` must have cluster_name, provider: {{type: ...}} and "
            f"auth, got {', '.join(config) or 'nothing'}"
        )
    if config["provider"]["type"] == "local" and "head_ip" not in config["provider"]:
        raise ValueError(f"{file}: provider of type local must have head_ip and worker_ips")
    lines = enumerate(text.splitlines(), start=1)
    left = [f"  line {n}: {line.strip()}" for n, line in lines if "REPLACE" in value(line)]
    if left:
        raise ValueError(f"{file}: write your own values for REPLACE in\n" + "\n".join(left))
    return Cluster(file=file.resolve(), config=config)


def value(line: str) -> str:
    """A line of YAML without its comment."""
    return re.split(r"(?:^|\s)#", line, maxsplit=1)[0]
