"""The cluster of clusters/ssh.yaml on three hosts, and sweeps on it, as a user runs them."""

import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import yaml

from cluster.hosts import ROOT, Hosts, Process, wait_for
from cluster.services import BUCKET, CREDENTIALS, DATABASE_URI, S3, Postgres

PROJECT = (
    "brstnet",
    "sweeps",
    "dashboards",
    "clusters",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
)
"""What a user has of it at home, copied: nothing that is edited meanwhile disturbs a test."""

PACKAGES = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
VENV = "/root/brstnet/.venv"
RAY = ("ray::", "/raylet", "/gcs_server", "ray/dashboard", "ray/_private", "ray/autoscaler")
WORKERS = ("h2", "h3")
PATIENCE_S = 600.0
"""The longest that a sweep is waited for, on a machine that has other things to do."""

SWEEP = """
name: {name}
protocol: {{held_out: [BC90006], folds: 2, panel_size: 40}}
search: random
pruning: none
trials: {trials}
seed: 2
concurrent_trials: {at_once}
cpus_per_worker: {cpus}
workers_per_trial: {workers}
champion_rule: best
finalists: 1
space: {{learning_rate: [0.01, 0.02, 0.03, 0.05]}}
points: [{{learning_rate: 0.02}}, {{learning_rate: 0.03}}, {{learning_rate: 0.05}}]
training:
  backbone: test_resnet
  genes: 60
  batch_size: 8
  schedule: cosine
  stopping: fixed
  epochs: {epochs}
"""


@dataclass
class Cluster:
    """Hosts, services and what the user has at home. Its YAML is the one that users get."""

    hosts: Hosts
    folder: Path

    def __post_init__(self) -> None:
        self.postgres = Postgres(self.hosts.h1, self.folder / "postgres.log")
        self.s3 = S3(self.hosts.laptop, self.folder / "s3.log")

    def prepare(self) -> None:
        """All that is there before `up`: services, Python on the machines, secrets at home."""
        at_home = f"export PATH={sys.prefix}/bin:$PATH RAY_AUTH_MODE=token\n"
        self.hosts.laptop.path("/root/.bashrc").write_text(at_home)
        for part in PROJECT:
            source, copy = ROOT / part, self.hosts.laptop.path(f"/root/brstnet/{part}")
            copy.parent.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
        self.s3.start()
        self.postgres.make()
        self.secrets()
        self.environment()
        self.hosts.laptop.path("/root/ssh.yaml").write_text(self.yaml())
        (self.hosts.shared / "runs").mkdir()

    def yaml(self) -> str:
        """clusters/ssh.yaml with this cluster's addresses, user and key, and small nodes."""
        config = yaml.safe_load((ROOT / "clusters/ssh.yaml").read_text())
        head, *workers = (self.hosts.host[name].address for name in ("h1", *WORKERS))
        before = config["provider"]["head_ip"]
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/key"}
        memory = "--object-store-memory=100000000"
        for key, more in (("head", memory), ("worker", f"{memory} --num-cpus=2")):
            commands = config[f"{key}_start_ray_commands"]
            commands[:] = [c.replace(before, head) for c in commands]
            commands[:] = [c.replace("ray start", f"ray start {more}") for c in commands]
        return yaml.safe_dump(config, width=1000)

    def secrets(self) -> None:
        """The files of secrets that a user writes once."""
        nodes = {
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": self.s3.endpoint,
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # else whatever else this machine does comes first
        }
        tracking = {
            "MLFLOW_BACKEND_STORE_URI": DATABASE_URI,
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_TRACKING_USERNAME": "sweeper",
            "MLFLOW_TRACKING_PASSWORD": "long-but-no-secret",
        }
        for name, values in (("nodes", nodes), ("tracking", tracking)):
            file = self.hosts.laptop.path(f"/root/.brstnet/{name}.env")
            file.parent.mkdir(exist_ok=True, mode=0o700)
            file.write_text("".join(f"{k}={v}\n" for k, v in values.items()))
            file.chmod(0o600)

    def environment(self) -> None:
        """What the first node would have installed and left for the others, as there is no network.

        It borrows the packages of the environment that runs the tests, but not the project itself.
        """
        functions = "sed '/^case $role in/,$d' clusters/setup.sh > ~/functions.sh"
        key = self.home(
            f"{functions}; . ~/functions.sh; python=/usr/local/bin/python3; environment_key"
        ).split()[-1]
        files = {
            "installed": f"{key}\n",
            "pyvenv.cfg": f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n",
            f"lib/{PACKAGES.parent.name}/site-packages/here.pth": f"/root/brstnet\n{PACKAGES}\n",
        }
        for file in filter(Path.is_file, (Path(sys.prefix) / "bin").iterdir()):
            with file.open("rb") as script:
                if not file.is_symlink() and script.read(2) == b"#!":
                    files[f"bin/{file.name}"] = file.read_text().replace(sys.prefix, VENV)
        folder = self.hosts.shared / "environments"
        folder.mkdir()
        with tarfile.open(folder / f"{key}.tar", "w") as tar:
            for name, text in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(text.encode()), 0o755
                tar.addfile(entry, BytesIO(text.encode()))
            for name in ("python", "python3"):
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, f"{sys.base_prefix}/bin/python3"
                tar.addfile(link)

    # Commands

    def home(self, words: str, *, seconds: float = 120, check: bool = True) -> str:
        """A command on the laptop, in the project's folder."""
        return self.hosts.laptop.run(f"cd ~/brstnet; {words}", seconds=seconds, check=check)

    def up(self) -> float:
        """Bring it up; seconds until all nodes are there."""
        began = time.monotonic()
        said = self.home("python -m clusters up ~/ssh.yaml", seconds=PATIENCE_S)
        (self.folder / "up.log").write_text(said)
        wait_for(self.whole, PATIENCE_S, "all nodes join", every=1, said=lambda: said)
        return time.monotonic() - began

    def whole(self) -> bool:
        """Whether all nodes are there."""
        return self.cpus() == 2 * len(WORKERS)

    def cpus(self) -> float:
        """CPUs that the cluster has for work."""
        words = self.status()
        found = [line.split() for line in words.splitlines() if line.strip().endswith("CPU")]
        return float(found[0][0].partition("/")[2]) if found else 0.0

    def status(self) -> str:
        """What `ray status` says."""
        return self.hosts.h1.run("ray status", seconds=60, check=False)

    def left_in_ray(self) -> str:
        """What a sweep has left in Ray: placement groups, requests for resources; or empty."""
        code = (
            "import ray; ray.init('auto', logging_level='ERROR'); "
            "groups = ray.util.placement_group_table().values(); "
            "print([g['bundles'] for g in groups if g['state'] != 'REMOVED'])"
        )
        groups = self.hosts.h1.run(f'python -c "{code}"').splitlines()[-1]
        asked = self.status().partition("From request_resources:")[2].split("Pending")[0].strip()
        found = {"placement groups": groups, "requests": asked}
        return ", ".join(f"{k}: {v}" for k, v in found.items() if v not in ("[]", "(none)"))

    # Sweeps

    def push(self, store: Path) -> str:
        """Bring a store to the object storage, from the laptop; its address."""
        uri = f"s3://{BUCKET}/store"
        kept = self.hosts.laptop.path("/root/store")
        shutil.copytree(store, kept, dirs_exist_ok=True)
        self.home(f"set -a; . ~/.brstnet/nodes.env; python -m brstnet push ~/store {uri}")
        return uri


def steps_told_twice(record: Mapping[str, dict]) -> list[str]:
    """Metrics of runs in MLflow that have a step more than once."""
    return [
        f"{key}: {name} {steps}"
        for key, run in record.items()
        for name, steps in run["steps"].items()
        if len(steps) != len(set(steps))
    ]


@dataclass
class Sweep:
    """One sweep, its driver on the head: begun as often as it takes, by the same command."""

    cluster: Cluster
    name: str
    store: str
    trials: int = 2
    epochs: int = 4
    workers: int = 2
    cpus: int = 1
    at_once: int = 2
    starts: int = 0
    driver: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.file.write_text(SWEEP.format(**vars(self)))

    @property
    def file(self) -> Path:
        """The sweep's YAML, on the head."""
        return self.cluster.hosts.h1.path(f"/root/{self.name}.yaml")

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.cluster.hosts.shared / "runs" / self.name

    @property
    def log(self) -> Path:
        """What the driver wrote, of this start."""
        return self.cluster.folder / f"{self.name}-{self.starts}.log"

    def start(self) -> None:
        """The command, the same each time."""
        self.starts += 1
        words = f"~/{self.name}.yaml --store {self.store} --address auto"
        command = f"bash -c 'cd ~/brstnet; exec python sweeps/run.py {words}'"
        self.driver = self.cluster.hosts.h1.begin(command, self.log)

    def processes(self) -> list[Process]:
        """The driver and its courier."""
        return self.cluster.hosts.h1.processes("python sweeps/run.py", "sweeps.courier")

    def tell(self, number: int) -> None:
        """Signal the driver itself."""
        self.cluster.hosts.h1.signal(number, f"python sweeps/run.py /root/{self.name}")

    def end(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the driver's end; its exit code."""
        assert self.driver is not None
        wait_for(lambda: self.driver.poll() is not None, seconds, "the driver ends", said=self.said)
        return self.driver.returncode

    def finish(self, seconds: float = PATIENCE_S) -> None:
        """Wait for a good end.

        Raises:
            AssertionError: it is none.
        """
        assert self.end(seconds) == 0, self.said()

    def said(self) -> str:
        """The end of what the driver wrote."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.is_file() else ""

    # What it has come to

    def events(self) -> Iterator[tuple[str, dict]]:
        """What the trials have told, whole lines alone: (trial, event)."""
        for file in sorted(self.folder.glob("trials/*/events.jsonl")):
            whole = file.read_bytes().rpartition(b"\n")[0]
            for line in whole.splitlines():
                yield file.parent.name, json.loads(line)

    def epochs_told(self) -> Counter[str]:
        """Epochs told so far, by trial."""
        return Counter(t for t, e in self.events() if "train_loss" in e.get("metrics", {}))

    def outcomes(self) -> dict[str, dict]:
        """How trials ended."""
        files = self.folder.glob("trials/*/outcome.json")
        return {file.parent.name: json.loads(file.read_text()) for file in files}

    def train_until(self, epochs: int, seconds: float = PATIENCE_S) -> None:
        """Wait until one of the trials has told so many epochs.

        Raises:
            AssertionError: the driver ended before.
        """

        def so_far() -> bool:
            assert self.driver is not None
            assert self.driver.poll() is None, self.said()
            return max(self.epochs_told().values(), default=0) >= epochs

        wait_for(so_far, seconds, f"{self.name} trains {epochs} epochs", said=self.said)

    def goes_on(self, *trials: str, seconds: float = PATIENCE_S) -> float:
        """Seconds until each of these trials, or any, has told one more epoch, or has ended."""
        before = self.epochs_told()

        def more() -> bool:
            now, ended = self.epochs_told(), self.outcomes()
            on = {t for t in now if now[t] > before[t]} | ended.keys()
            return on >= set(trials) if trials else now.total() > before.total()

        return wait_for(more, seconds, f"{self.name} goes on", said=self.said)

    def places(self) -> dict[str, set[str]]:
        """The hosts on which each trial's workers were last."""
        found: dict[str, set[str]] = {}
        for file in self.folder.glob("trials/*/node_*.json"):
            with suppress(json.JSONDecodeError):  # just being written
                place = json.loads(file.read_text())["host"]
                found.setdefault(file.parent.name, set()).add(place)
        return found

    def one_place(self) -> tuple[str, list[str]]:
        """A host where trials are training, and which."""
        running = {t: hosts for t, hosts in self.places().items() if t not in self.outcomes()}
        host = max(running[max(running, key=self.epochs_told().__getitem__)])
        return host, sorted(trial for trial, hosts in running.items() if host in hosts)

    def resumed_at(self) -> dict[str, int]:
        """Epochs that were on disk where a trial's last attempt began, if it was not its first."""
        found = {}
        for file in self.folder.glob("trials/*/attempts.json"):
            folds = json.loads(file.read_text())["place"][1]
            if folds:
                found[file.parent.name] = sum(epoch + 1 for _, epoch, _ in folds)
        return found

    def lost(self, before: Mapping[str, int], *hit: str) -> str:
        """What had been trained but was not on disk where work went on, in words.

        Args:
            before: epochs that each trial had told when something failed.
            hit: the trials that must have begun again, not at their beginning.

        Raises:
            AssertionError: one of them did not, or had lost all.
        """
        resumed = {trial: at for trial, at in self.resumed_at().items() if trial in before}
        assert resumed.keys() >= set(hit), (resumed, hit)
        assert all(resumed.values()), resumed
        epochs = sum(max(0, before[trial] - at) for trial, at in resumed.items())
        return f"{epochs} epochs of {len(resumed)} trials" if resumed else "nothing"

    def record(self) -> dict[str, dict]:
        """The sweep's runs as MLflow has them, by key: status, last values, metrics' steps."""
        tests = ROOT / "tests"
        words = f"cd ~/brstnet; PYTHONPATH={tests} python -m cluster.record {self.name}"
        return json.loads(self.cluster.hosts.h1.run(words, seconds=120).splitlines()[-1])
