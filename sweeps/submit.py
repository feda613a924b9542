"""Sends a sweep to a cluster as a job of Ray's, by the address of the cluster's job server.

The YAML goes with the job, as it was read and checked here; the driver runs on the cluster's head,
and goes on when this machine is switched off.
"""

import asyncio
import os
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from brstnet.config import to_yaml
from sweeps.space import Sweep

FILE = "sweep.yaml"
SWEEP = "sweep"
"""The job's metadata: the sweep's name."""

SENT = (
    "--store",
    "--out",
    "--tracking_uri",
    "--dry-run",
    "--budget-gpu-hours",
    "--max-trials",
    "--deadline",
    "--price",
)
"""Options that mean the same on the cluster, sent if they were given."""

HERE = ("--config", "--only", "--address", "--promote")
"""Options whose work is done before the sweep is sent."""

STOP_S = 150
"""How long a driver may take to end in order; Ray's own patience on the head is 120 s."""


def is_remote(address: str | None) -> bool:
    """Whether an address is that of a cluster's job server, and not of Ray itself."""
    return str(address).startswith(("http://", "https://"))


def client(address: str) -> JobSubmissionClient:
    """A client of a cluster's job server.

    Raises:
        ValueError: it does not answer, or refuses the token.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray would rather take these than the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(
            f"{address}: no token here: ~/.ray/auth_token must be that of the cluster"
        ) from error
    except (RuntimeError, ConnectionError) as error:
        raise ValueError(f"{address}: the cluster's job server says: {error}") from error


def submit(
    plan: Sweep, options: Namespace, words: Sequence[str], address: str, *, after: str = ""
) -> str:
    """Send the sweep; the id of its job.

    Args:
        plan: as it was read here.
        options: the rest of the command line, read.
        words: the command line as typed: only what was typed is sent.
        address: of the job server.
        after: a command that follows the sweep's on the head, with its exit code as `$?`.

    Raises:
        ValueError: a store or folder is not the cluster's, the sweep runs there already, or the
            job server does not take it.
    """
    check_places(plan, options, words)
    command = entrypoint(options, words)
    there = client(address)
    same = (job for job in jobs(there) if running(job) and name_of(job) == plan.name)
    if (job := next(same, None)) and not options.dry_run:
        raise ValueError(
            f"sweep {plan.name} runs on the cluster already, as job {job.submission_id}: follow "
            "or stop that one, or choose another --name"
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_text(to_yaml(plan), encoding="utf-8")
        try:
            return there.submit_job(
                entrypoint=f"{command}; {after}" if after else command,
                submission_id=re.sub(r"[^\w.-]", "-", plan.name) + time.strftime("-%Y%m%d-%H%M%S"),
                runtime_env={"working_dir": folder},
                metadata={} if options.dry_run else {SWEEP: plan.name},
            )
        except RuntimeError as error:
            raise ValueError(f"{address}: the cluster does not take the job: {error}") from error


def send(plan: Sweep, options: Namespace, words: Sequence[str]) -> int:
    """Send the sweep to `--address` and say how to go on; a dry run's output is shown here.

    Raises:
        ValueError: as `submit`.
        OSError: the connection is lost.
    """
    job = submit(plan, options, words, options.address)
    if options.dry_run:
        return 0 if follow(options.address, job).status == JobStatus.SUCCEEDED else 2
    ray = f"RAY_AUTH_MODE=token ray job {{}} --address {options.address} {{}}{job}"
    print(f"job {job} runs on the cluster; this machine may be switched off")  # noqa: T201
    print(f"  follow  {ray.format('logs', '--follow ')}")  # noqa: T201 - the command line's output
    print(f"  stop    {ray.format('stop', '')}")  # noqa: T201
    return 0


def check_places(plan: Sweep, options: Namespace, words: Sequence[str]) -> None:
    """Refuse places that only this machine can mean.

    Raises:
        ValueError: a store is missing or relative, or --out is relative.
    """
    if options.store is None:
        raise ValueError(
            "--store is missing: the patch store to train on, such as s3://BUCKET/STORE"
        )
    places = {"--store": options.store, **{f"stores: {k}": v for k, v in plan.stores.items()}}
    if "--out" in typed(words):
        places["--out"] = options.out
    for what, place in places.items():
        if "://" not in str(place) and not Path(place).is_absolute():
            raise ValueError(
                f"{what} {place}: must be a place that the cluster knows, a URI such as "
                "s3://BUCKET/STORE or an absolute path of its nodes"
            )


def typed(words: Sequence[str]) -> set[str]:
    """The options that a command line names."""
    return {word.split("=")[0] for word in words if word.startswith("--")}


def entrypoint(options: Namespace, words: Sequence[str]) -> str:
    """The command of the sweep's driver on the head."""
    line = ["python", "-m", "sweeps.run", FILE, "--address", "auto"]
    for name in SENT:
        if name not in typed(words):
            continue
        value = options[name.strip("-").replace("-", "_")]
        line += [name] if value is True else [name, str(value)]
    return shlex.join(line)


def jobs(there: JobSubmissionClient) -> list[JobDetails]:
    """The sweeps' jobs that the cluster knows, the newest first."""
    found = [job for job in there.list_jobs() if name_of(job)]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def name_of(job: JobDetails) -> str:
    """The name of a job's sweep, or nothing."""
    return (job.metadata or {}).get(SWEEP, "")


def running(job: JobDetails) -> bool:
    """Whether a job is not over."""
    return not JobStatus(job.status).is_terminal()


def find(address: str, wanted: str | None = None) -> JobDetails:
    """A sweep's job by its id or its sweep's name; the newest, if nothing is said.

    Raises:
        ValueError: there is none.
    """
    there = jobs(client(address))
    for job in there:
        if wanted in (None, job.submission_id, name_of(job)):
            return job
    known = ", ".join(str(job.submission_id) for job in there) or "none at all"
    raise ValueError(f"no job {wanted or 'of a sweep'} on this cluster; there is {known}")


def follow(address: str, job: str) -> JobDetails:
    """Print what the job prints, from its beginning to its end; how it ended.

    Raises:
        OSError: the connection is lost, which the job does not mind.
    """
    there = client(address)

    async def tail() -> None:
        async for text in there.tail_job_logs(job):
            print(text, end="", flush=True)  # noqa: T201 - the job's output

    try:
        asyncio.run(tail())
        return there.get_job_info(job)
    except RuntimeError as error:
        raise OSError(f"connection lost, {job} goes on; follow it again: {error}") from error


def stop(address: str, job: str) -> JobDetails:
    """Ask a job to end, and wait until it has; how it ended.

    Raises:
        OSError: it did not end in time.
    """
    there = client(address)
    there.stop_job(job)
    deadline = time.monotonic() + STOP_S
    while running(info := there.get_job_info(job)):
        if time.monotonic() > deadline:
            raise OSError(f"{job} still ends after {STOP_S} s: look at its log")
        time.sleep(1)
    return info


def stop_all(address: str) -> list[str]:
    """Stop every sweep that runs; their jobs.

    Raises:
        OSError: one did not end in time.
    """
    names = [str(job.submission_id) for job in jobs(client(address)) if running(job)]
    for name in names:
        stop(address, name)
    return names
