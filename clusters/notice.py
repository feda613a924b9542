"""Waits, beside Ray on a spot machine, for the cloud's word that it will take the machine back.

    python -m clusters.notice          # ends with Ray's own process on this machine

AWS gives two minutes' notice, Google thirty seconds. Then Ray is told, so that it starts nothing
more here, and the file `$BRSTNET_LEAVING` (`/tmp/brstnet-leaving`) is made: trainings that see it
save their position every few seconds, so the machine's end costs these.
"""

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from http.client import HTTPException
from pathlib import Path
from typing import TextIO
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

POLL_S = 5.0
"""AWS's own advice."""

GOOGLE_S = 30.0
"""Google says only that, not when."""

RAY_STARTS_S = 120.0
"""The watch may be started just before Ray."""

METADATA = "http://169.254.169.254"
"""Where both clouds tell a machine about itself; `BRSTNET_METADATA_URL` for tests."""

OPEN = build_opener(ProxyHandler({}))  # no proxy may answer for the machine

Ask = Callable[[], float | None]
"""Seconds until the machine goes, or nothing if no notice was given."""


@dataclass(frozen=True, kw_only=True)
class Raylet:
    """Ray's process on this machine."""

    pid: int
    node: str
    head: str


def say(text: str) -> None:
    """Tell the log."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"{now} {text}", flush=True)  # noqa: T201 - the log


def read(url: str, headers: dict[str, str], method: str = "GET", timeout_s: float = 3) -> str:
    """What the metadata service says.

    Raises:
        OSError: it does not answer, or refuses (HTTPError is one).
    """
    try:
        with OPEN.open(Request(url, headers=headers, method=method), timeout=timeout_s) as answer:
            return str(answer.read().decode())
    except HTTPException as error:
        raise OSError(f"{url}: {error}") from error


def aws(base: str) -> Ask:
    """AWS's notice; every question needs a token, as the machines are set to demand one.

    Raises:
        OSError: this is no machine of AWS.
    """

    def new_token() -> dict[str, str]:
        lives = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        return {"X-aws-ec2-metadata-token": read(f"{base}/latest/api/token", lives, "PUT")}

    token = new_token()

    def ask() -> float | None:
        nonlocal token
        try:
            said = json.loads(read(f"{base}/latest/meta-data/spot/instance-action", token))
        except HTTPError as error:
            if error.code == 401:  # the token's six hours are over
                token = new_token()
            elif error.code != 404:
                raise
            return None
        end = datetime.fromisoformat(said["time"])
        return max(0.0, (end - datetime.now(UTC)).total_seconds())

    return ask


def google(base: str) -> Ask:
    """Google's notice.

    Raises:
        OSError: this is no machine of Google.
    """
    flavour = {"Metadata-Flavor": "Google"}
    preempted = f"{base}/computeMetadata/v1/instance/preempted"

    def ask() -> float | None:
        return GOOGLE_S if read(preempted, flavour).strip() == "TRUE" else None

    ask()
    return ask


def cloud(base: str) -> Ask | None:
    """Whoever answers, or nobody."""
    for name, kind in (("AWS", aws), ("Google", google)):
        try:
            ask = kind(base)
        except OSError:
            continue  # the other one, or a machine of one's own
        say(f"on {name}: waiting for a notice")
        return ask
    return None


def raylets() -> list[Raylet]:
    """The processes of Ray on this machine that belong to this user."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid != os.getuid():
                continue
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if not words[0].endswith("/raylet"):
            continue
        flags = dict(word.lstrip("-").split("=", 1) for word in words[1:] if "=" in word)
        node = flags.get("node-id") or flags.get("node_id")
        head = flags.get("gcs-address") or flags.get("gcs_address")
        if node and head:
            found.append(Raylet(pid=int(process.name), node=node, head=head))
    return found


def own_raylet(node: str | None, patience_s: float = RAY_STARTS_S) -> Raylet | None:
    """This machine's, which may be starting; None if it does not come."""
    deadline = time.monotonic() + patience_s
    while True:
        for raylet in raylets():
            if node in (None, raylet.node):
                return raylet
        if time.monotonic() > deadline:
            return None
        time.sleep(1)


def lives(raylet: Raylet) -> bool:
    """Whether it is still there."""
    return raylet in raylets()


def drain(raylet: Raylet, seconds: float) -> bool:
    """Tell Ray's head that this node goes; whether it was heard."""
    words = ["--address", raylet.head, "--node-id", raylet.node]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    words += ["--deadline-remaining-seconds", str(int(seconds))]
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words],
        env={**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        say(f"the head was not told: {done.stdout.strip()[-500:]}")
    return done.returncode == 0


def taken(lock: TextIO, patience_s: float = 4 * POLL_S) -> bool:
    """Take the lock; the watch of a Ray that was stopped just now gives it back by and by."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(1)
        else:
            return True


def watch(ask: Ask, raylet: Raylet, leaving: Path) -> None:
    """Ask until there is a notice, or Ray has gone; then do what the notice needs."""
    while (seconds := _asked(ask)) is None:
        time.sleep(POLL_S)
        if not lives(raylet):
            say("Ray has ended here, and so does the watch")
            return
    leaving.touch()
    say(f"notice: this machine goes in {seconds:.0f} s; {leaving} is there")
    end = time.monotonic() + seconds
    while not drain(raylet, max(1.0, end - time.monotonic())):
        if time.monotonic() > end or not lives(raylet):
            return
        time.sleep(2)
    say("the head knows")


def _asked(ask: Ask) -> float | None:
    try:
        return ask()
    except (URLError, OSError) as error:  # one question lost of many
        say(f"no answer: {error}")
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the watch, one a machine."""
    parser = ArgumentParser("python -m clusters.notice", description=__doc__)
    parser.add_argument("--node-id", help="of Ray's node, where a machine has several (tests)")
    options = parser.parse_args(argv)
    leaving = Path(os.environ.get("BRSTNET_LEAVING", "/tmp/brstnet-leaving"))
    with leaving.with_name(f"{leaving.name}.lock").open("w") as lock:
        if not taken(lock):
            say("another watch runs on this machine")
            return 0
        leaving.unlink(missing_ok=True)
        ask = cloud(os.environ.get("BRSTNET_METADATA_URL", METADATA))
        if ask is None:
            say("no cloud tells this machine anything: nothing to wait for")
            return 0
        raylet = own_raylet(options.node_id)
        if raylet is None:
            say(f"no Ray here after {RAY_STARTS_S:g} s: nothing to watch")
            return 1
        watch(ask, raylet, leaving)
    return 0


if __name__ == "__main__":
    sys.exit(main())
