"""Hosts on one machine: each has its own address, sshd, disk folder, /dev/shm and process space.

The namespaces have no names: they live as long as the host's first process, which dies with this
one. So there is nothing to clean up but a folder. The bridge between the hosts lies in the
laptop's namespace: the machine itself gets no interface, no route and no listener.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEBIAN = Path(sys.prefix) / "debian"
"""Where `make` has unpacked sshd and rsync, if the system has none."""

ADDRESSES = {
    "laptop": "10.77.0.254",
    "h1": "10.77.0.1",
    "h2": "10.77.0.2",
    "h3": "10.77.0.3",
}
NEEDED = ("ip", "nsenter", "unshare", "setpriv", "ssh", "ssh-keygen")
SHARED_SIZE = "600m"
TCP_LISTENS = "0A"

SSHD_CONFIG = """\
ListenAddress {address}
HostKey /run/sshd/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxSessions 50
MaxStartups 50
PidFile none
Subsystem sftp internal-sftp
"""


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    if absent := [name for name in NEEDED if shutil.which(name) is None]:
        return f"hosts in network namespaces need {', '.join(absent)}"
    system = all(shutil.which(name, path=search_path()) for name in ("sshd", "rsync"))
    if not system and not (DEBIAN / "usr/sbin/sshd").is_file():
        why = DEBIAN / "why"
        return why.read_text().strip() if why.is_file() else "no sshd here: run `make test`"
    words = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc"]
    made = subprocess.run([*words, "ip", "link"], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"namespaces are not allowed here: {made.stderr.strip()}"
    return ""


def search_path() -> str:
    """PATH with the folders of administrators' programs."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def wait_for(
    what: Callable[[], object],
    seconds: float,
    name: str,
    every: float = 0.25,
    said: Callable[[], str] = str,
) -> float:
    """Seconds until something came true; what was `said` meanwhile is told if it did not.

    Raises:
        TimeoutError: it did not.
    """
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{name}: not after {seconds:g} s\n{said()}")
        time.sleep(every)
    return time.monotonic() - began


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of a host, with its number on this machine."""

    pid: int
    title: str


@dataclass(frozen=True, kw_only=True)
class Socket:
    """A TCP socket that listens."""

    address: str
    port: int
    title: str


@dataclass
class Host:
    """One host: `start` is the power button, `power_cut` the plug."""

    name: str
    folder: Path
    keys: Path
    rack: int
    first: subprocess.Popen[bytes] | None = None
    pid: int = 0
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Its address."""
        return ADDRESSES[self.name]

    def install(self) -> None:
        """The host's disk, as a fresh system has it."""
        for part in ("root/.ssh", "tmp", "run", "etc", "usr/local/bin"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").chmod(0o1777)
        (self.folder / "root/.ssh").chmod(0o700)
        shutil.copy(self.keys / "user.pub", self.folder / "root/.ssh/authorized_keys")
        (self.folder / "root/.profile").write_text(". ~/.bashrc\n")
        (self.folder / "root/.bashrc").touch()
        # The machine's own Python is the one that made the environment of the tests.
        (self.folder / "usr/local/bin/python3").symlink_to(f"{sys.base_prefix}/bin/python3")
        etc = self.folder / "etc"
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "resolv.conf").touch()
        users = Path("/etc/passwd").read_text()
        for name, number in (("sshd", 64022), ("postgres", 64032)):
            if f"\n{name}:" not in users:
                users += f"{name}:x:{number}:65534::/nonexistent:/usr/sbin/nologin\n"
        (etc / "passwd").write_text(users)
        shutil.copy("/etc/group", etc / "group")
        (etc / "sshd_config").write_text(SSHD_CONFIG.format(address=self.address))
        shutil.copy(self.keys / "host", etc / "host_key")

    def start(self) -> None:
        """Power on: namespaces, mounts, sshd as the first process."""
        for part in ("tmp", "run"):  # what a boot empties
            shutil.rmtree(self.folder / part)
            (self.folder / part).mkdir()
        (self.folder / "tmp").chmod(0o1777)
        hidden = [Path(p) for p in (sys.base_prefix, ROOT)]
        visible = [str(p) for p in hidden if p.parts[1] in ("root", "tmp", "run")]
        layers = [f for f in (self.folder / "usr", DEBIAN / "usr", Path("/usr")) if f.is_dir()]
        environment = {
            "PATH": search_path(),
            "NAME": self.name,
            "ADDRESS": self.address,
            "FOLDER": str(self.folder),
            "SHARED": str(self.keys.with_name("shared")),
            "KEYS": str(self.keys),
            "LAYERS": ":".join(map(str, layers)),
            "VISIBLE": " ".join(visible),
        }
        # Whatever ends this process ends the host: both die with their parent.
        words = ["setpriv", "--pdeathsig", "KILL", "nsenter", "-t", str(self.rack), "-m", "unshare"]
        words += ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child"]
        words += ["--mount-proc"]
        with (self.folder / "sshd.log").open("ab") as log:
            self.first = subprocess.Popen(
                [*words, "bash", str(Path(__file__).with_name("host.sh"))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        wait_for(self.booted, 20, f"{self.name} boots ({self.folder / 'sshd.log'})", every=0.05)

    def booted(self) -> bool:
        """Whether the host has its first process, which then waits to be plugged in."""
        if self.first is None or self.first.poll() is not None:
            raise RuntimeError((self.folder / "sshd.log").read_text())
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text()
        self.pid = int(children or 0)
        return self.pid > 0

    def power_cut(self) -> None:
        """The first process dies, and all others of the host with it; the disk stays."""
        if self.first is not None and self.first.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.first.wait()
        for process in self.background:
            process.wait()
        self.background.clear()

    def words(self, command: str, seconds: float) -> list[str]:
        """What runs a command in the host, in a login shell."""
        inside = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "--"]
        inside += ["env", "-i", "HOME=/root", "USER=root", "TERM=dumb", f"PATH={search_path()}"]
        shell = ["bash", "--login", "-c", f"cd ~; {command}"]
        return [*inside, "timeout", "--kill-after=5", f"{seconds:g}", *shell]

    def run(self, command: str, *, seconds: float = 60, check: bool = True) -> str:
        """Run a command; all it wrote.

        Raises:
            RuntimeError: it failed, or took longer.
        """
        done = subprocess.run(
            self.words(command, seconds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if check and done.returncode:
            said = done.stdout[-4000:]
            raise RuntimeError(f"{self.name}: exit code {done.returncode} of {command}\n{said}")
        return done.stdout

    def begin(self, command: str, log: Path, *, seconds: float = 3600) -> subprocess.Popen[bytes]:
        """Begin a command, and leave it running."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.words(f"exec {command}", seconds),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.background.append(process)
        return process

    # Processes

    def path(self, path: str) -> Path:
        """A file of the host, as this machine finds it."""
        return Path(f"/proc/{self.pid}/root{path}")

    def processes(self, *parts: str) -> list[Process]:
        """What runs in the host, but for its first process and the dead; with such a title."""
        if self.first is None or self.first.poll() is not None:
            return []
        mine = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has gone
                if int(folder.name) == self.pid or (folder / "ns/pid").readlink() != mine:
                    continue
                title = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and (not parts or any(part in title for part in parts)):
                    found.append(Process(pid=int(folder.name), title=title))
        return sorted(found, key=lambda process: process.pid)

    def signal(self, number: int, *parts: str) -> list[Process]:
        """Signal what has such a title; whom."""
        found = self.processes(*parts)
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        return found

    def kill(self, *parts: str) -> None:
        """Kill what has such a title, or all but sshd, and what follows it."""
        wait_for(
            lambda: not self.signal(signal.SIGKILL, *parts), 20, f"{parts or 'all'} die", every=0.1
        )

    # Network

    def listening(self) -> list[Socket]:
        """The TCP sockets that listen in the host, with who holds them."""
        holders: dict[str, str] = {}
        everybody = [*self.processes(), Process(pid=self.pid, title="sshd")]
        for process in everybody:
            with suppress(OSError):
                for link in Path(f"/proc/{process.pid}/fd").iterdir():
                    with suppress(OSError):
                        holders[str(link.readlink())] = process.title
        found = []
        for file in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{file}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == TCP_LISTENS:
                    address, _, port = local.partition(":")
                    holder = holders.get(f"socket:[{rest[5]}]", "")
                    found.append(
                        Socket(address=readable(address), port=int(port, 16), title=holder)
                    )
        return sorted(found, key=lambda socket: socket.port)

    def holders(self, port: int) -> list[str]:
        """Who listens on a port."""
        return [socket.title for socket in self.listening() if socket.port == port]


def readable(address: str) -> str:
    """An address as /proc/net/tcp writes it, as people do; "*" if it is every interface."""
    if set(address) == {"0"}:
        return "*"
    if len(address) > 8:
        if address.startswith("0000000000000000FFFF0000"):
            return readable(address[24:])
        return "::1" if address == "00000000000000000000000001000000" else address
    return ".".join(str(part) for part in reversed(bytes.fromhex(address)))


@dataclass
class Hosts:
    """The laptop, the head h1, the workers h2 and h3, and the switch between them."""

    folder: Path
    host: dict[str, Host] = field(default_factory=dict)
    rack: subprocess.Popen[bytes] | None = None

    def __getattr__(self, name: str) -> Host:
        try:
            return self.__dict__["host"][name]
        except KeyError as error:
            raise AttributeError(name) from error

    @property
    def shared(self) -> Path:
        """The file system that all hosts see as /mnt/brstnet, as this machine finds it."""
        return self.host["laptop"].path("/mnt/brstnet")

    def make(self) -> None:
        """Make and start all hosts."""
        keys, shared = self.folder / "keys", self.folder / "shared"
        for part in (keys, shared):
            part.mkdir(parents=True)
        # The hosts' mounts begin as those of a process that has one more: the shared file system.
        mount = f"mount --make-rprivate / && mount -t tmpfs -o size={SHARED_SIZE} tmpfs {shared}"
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c"]
        self.rack = rack = subprocess.Popen([*words, f"{mount} && exec sleep infinity"])
        wait_for(lambda: mounts(rack, shared), 10, "the shared file system", every=0.05)
        for name in ("user", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
            subprocess.run(words, check=True)
        for name in ADDRESSES:
            disk = self.folder / "disks" / name
            self.host[name] = Host(name=name, folder=disk, keys=keys, rack=rack.pid)
            self.host[name].install()
            self.start(name)
        home = self.folder / "disks" / "laptop" / "root"
        shutil.copy(keys / "user", home / ".ssh" / "key")

    def start(self, name: str) -> None:
        """Power a host on and plug it in."""
        host = self.host[name]
        host.start()
        if name == "laptop":
            self.switch("ip link set lo up")
            self.switch("ip link add br0 type bridge")
            self.switch(f"ip addr add {host.address}/24 dev br0")
            self.switch("ip link set br0 up")
        else:
            plug = f"name eth0 netns {host.pid}"
            self.switch(f"ip link add v-{name} type veth peer {plug}")
            self.switch(f"ip link set v-{name} master br0 up")
            for words in ("link set lo up", f"addr add {host.address}/24 dev eth0"):
                in_net(host.pid, f"ip {words}")
            in_net(host.pid, "ip link set eth0 up")
        wait_for(lambda: host.holders(22), 10, f"{name}'s sshd listens", every=0.05)

    def switch(self, command: str) -> None:
        """A command where the bridge is."""
        in_net(self.host["laptop"].pid, command)

    def cut(self, name: str) -> None:
        """Pull a host's network cable."""
        self.switch(f"ip link set v-{name} down")

    def heal(self, name: str) -> None:
        """Put it back."""
        self.switch(f"ip link set v-{name} up")

    def down(self) -> None:
        """End all hosts; of their disks stays what a person may want to read, but no secret."""
        for host in reversed(self.host.values()):
            host.power_cut()
            for part in (".ssh", ".ray", ".brstnet"):
                shutil.rmtree(host.folder / "root" / part, ignore_errors=True)
            (host.folder / "root/ray_bootstrap_key.pem").unlink(missing_ok=True)
            (host.folder / "etc/host_key").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "keys", ignore_errors=True)
        if self.rack is not None:
            self.rack.kill()
            self.rack.wait()


def mounts(process: subprocess.Popen[bytes], place: Path) -> bool:
    """Whether something is mounted at a place, as a process sees it."""
    lines = Path(f"/proc/{process.pid}/mounts").read_text().splitlines()
    return any(line.split()[1] == str(place) for line in lines)


def in_net(pid: int, command: str) -> None:
    """A command in a host's network, on this machine's disk.

    Raises:
        RuntimeError: it failed.
    """
    words = ["nsenter", "-t", str(pid), "-n", "--", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr}")


@contextmanager
def running(folder: Path) -> Iterator[Hosts]:
    """All hosts, until the end."""
    hosts = Hosts(folder)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.down()
