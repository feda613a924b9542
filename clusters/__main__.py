"""A cluster from this machine: up, sweeps that run there without it, their results home, down.

    python -m clusters up     CLUSTER.yaml         its head, and what else the YAML wants at once
    python -m clusters run    CLUSTER.yaml SWEEP.yaml --store s3://BUCKET/STORE [as sweeps/run.py]
    python -m clusters follow CLUSTER.yaml [JOB]   what it prints; Ctrl-C leaves it running
    python -m clusters stop   CLUSTER.yaml JOB     in order: the same `run` again resumes
    python -m clusters ui     CLUSTER.yaml         MLflow and Ray's dashboard, until Ctrl-C
    python -m clusters home   CLUSTER.yaml --to DIR    folders, MLflow's record, the champion
    python -m clusters down   CLUSTER.yaml         ends everything, says what it could not end

CLUSTER.yaml is cluster.yaml (AWS), clusters/gcp.yaml or clusters/ssh.yaml (machines of your own),
with your values in it. JOB is a job's id or its sweep's name. `COMMAND --help` says more.

Secrets lie in three files, made where they are missing, mode 600, and never on a command line:
  ~/.ray/auth_token        what all nodes and this machine share; Ray refuses whoever has it not
  ~/.brstnet/tracking.env  the MLflow server's database, artifacts and account; for the head alone
  ~/.brstnet/nodes.env     keys to the object storage, where machines have no rights of their own
"""

import os
import signal
import sys
import time
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from clusters.down import down, say
from clusters.fetch import home
from clusters.nodes import Cluster, read_cluster
from clusters.tracking import Refused
from clusters.tunnel import JOBS, MLFLOW, tunnel
from clusters.up import up
from sweeps import submit
from sweeps.run import parse

DOWN = "--down-when-done"


def command_up(cluster: Cluster, options: Namespace) -> int:
    """Bring it up, and say what comes next."""
    if code := up(cluster, restart=not options.no_restart):
        sys.stderr.write(
            f"error: `ray up` failed (exit code {code}); what it started may cost money: mend what "
            f"it says above and try again, or: python -m clusters down {options.cluster}\n"
        )
        return 2
    say(
        f"\n{cluster.name} is up: its head answers, workers come when a sweep needs them. Next:",
        f"  python -m clusters run {options.cluster} SWEEP.yaml --store s3://BUCKET/STORE",
        f"  python -m clusters down {options.cluster}",
    )
    return 0


def command_run(cluster: Cluster, options: Namespace) -> int:
    """Send a sweep there."""
    words = [word for word in options.words if word != DOWN]
    finish = options.down_when_done or DOWN in options.words
    plan, rest = parse(words)
    if rest.address:
        raise ValueError(
            f"--address {rest.address}: the cluster is {options.cluster}; leave it out"
        )
    with tunnel(cluster, JOBS) as address:
        after = "python -m clusters.off $?" if finish else ""
        job = submit.submit(plan, rest, words, address, after=after)
        if rest.dry_run:
            return ended(submit.follow(address, job))
    say(
        f"job {job} runs on {cluster.name}; this machine may be switched off",
        *(["  its head takes the cluster down when no sweep runs any more"] if finish else []),
        f"  python -m clusters follow {options.cluster} {job}",
        f"  python -m clusters stop {options.cluster} {job}",
        f"  python -m clusters home {options.cluster} --to DIR --sweep {plan.name}",
    )
    return 0


def command_follow(cluster: Cluster, options: Namespace) -> int:
    """Print what a job prints."""
    with tunnel(cluster, JOBS) as address:
        job = str(submit.find(address, options.job).submission_id)
        say(f"job {job}; Ctrl-C leaves it running")
        return ended(submit.follow(address, job))


def command_stop(cluster: Cluster, options: Namespace) -> int:
    """End a job in order."""
    with tunnel(cluster, JOBS) as address:
        job = str(submit.find(address, options.job).submission_id)
        say(f"job {job} is told to stop; it saves first")
        ended(submit.stop(address, job))
    return 0


def ended(job: submit.JobDetails) -> int:
    """Say how a job ended: 0 if well."""
    say(f"job {job.submission_id}: {submit.JobStatus(job.status).value.lower()}")
    return 0 if job.status == submit.JobStatus.SUCCEEDED else 1


def command_home(cluster: Cluster, options: Namespace) -> int:
    """Bring results here."""
    home(cluster, options.to, options.sweep, options.runs)
    return 0


def command_ui(cluster: Cluster, options: Namespace) -> int:
    """Show what runs on the head, until Ctrl-C."""
    del options
    with ExitStack() as stack:
        shown = 0
        for port, what in ((MLFLOW, "MLflow"), (JOBS, "Ray's dashboard")):
            try:
                address = stack.enter_context(tunnel(cluster, port, port))
            except OSError as error:
                say(f"{what}: {error}")
                continue
            shown += 1
            say(f"{what}: {address}")
        if not shown:
            return 2
        say("the dashboard asks for the token: `ray get-auth-token` prints it; Ctrl-C ends this")
        while True:
            time.sleep(3600)


def command_down(cluster: Cluster, options: Namespace) -> int:
    """End everything."""
    del options
    code = down(cluster)
    say(f"{cluster.name}: {'NOT all is down, see above' if code else 'all is down'}")
    return code


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        "python -m clusters",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, does: Callable[[Cluster, Namespace], int], text: str) -> ArgumentParser:
        command = commands.add_parser(
            name, help=text.split(". ")[0], description=text, allow_abbrev=False
        )
        command.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
        command.set_defaults(does=does)
        return command

    bring_up = add(
        "up",
        command_up,
        "Bring a cluster up. Again on one that is up: it brings this folder's code to the nodes "
        "and restarts Ray, which ends running sweeps as a crash would (their `run` resumes them).",
    )
    bring_up.add_argument(
        "--no-restart", action="store_true", help="bring code, but let running sweeps run on"
    )
    run = add(
        "run",
        command_run,
        "Run a sweep there. The YAML is checked here and sent; --store, --out and the space's "
        "stores are places that the nodes know: a URI, or an absolute path on their shared files.",
    )
    run.add_argument(
        DOWN,
        action="store_true",
        help="then take the cluster down from its own head: when the sweep is finished or has "
        "failed and no other runs, but not when it was stopped by hand",
    )
    run.add_argument(
        "words",
        nargs=REMAINDER,
        metavar="SWEEP.yaml ...",
        help="as for sweeps/run.py: --store, --name, --dry-run (shown here), --deadline ...",
    )
    watch = add("follow", command_follow, "Print what a sweep prints. Ctrl-C leaves it running.")
    watch.add_argument("job", nargs="?", metavar="JOB", help="default: the newest")
    end = add("stop", command_stop, "Stop a sweep in order. The same `run` again resumes it.")
    end.add_argument("job", metavar="JOB")
    add("ui", command_ui, "MLflow and Ray's dashboard on this machine. Until Ctrl-C.")
    fetch = add("home", command_home, "Bring results home. Again: what is new since then.")
    fetch.add_argument("--to", type=Path, required=True, metavar="DIR", help="as --runs elsewhere")
    fetch.add_argument("--sweep", metavar="NAME", help="default: all that MLflow there knows")
    fetch.add_argument("--runs", default="/mnt/brstnet/runs", help="the sweeps' folder on the head")
    add(
        "down",
        command_down,
        "Take a cluster down. Running sweeps are stopped in order first. Results lie on the shared "
        "file system, in the database and in the object storage: these stay.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is told in a few lines, with exit code 2."""
    options = make_parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a tunnel must be closed in any case
        signal.signal(number, signal.default_int_handler)
    os.environ["RAY_AUTH_MODE"] = "token"
    for name in ("no_proxy", "NO_PROXY"):  # tunnels begin on this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    try:
        return int(options.does(read_cluster(options.cluster), options))
    except (ValueError, OSError, RuntimeError, Refused) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
