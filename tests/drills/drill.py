"""One kill: when, whom, what the driver did, how long it took until training went on."""

import time
from dataclasses import dataclass, field
from random import Random

from drills.kinds import KINDS, Kind, kill
from drills.processes import Family, Process
from drills.sweep import AGENTS, LOOK_S, PATIENCE_S, Server, Sweep, wait_for

WINDOW_S = {"start": 25.0, "training": 8.0, "end": 5.0}
"""A kill comes at any moment up to so long after the driver was started, after an epoch was seen
to be told, after the last trial ended."""

ENDS_S, LEAVES_S, GOES_ON_S = 120.0, 60.0, 180.0
"""How long a driver may take to end that has lost its cluster; what a dead driver left behind, to
follow it; a sweep, to train again."""


@dataclass
class Kill:
    """What is to be done, and what came of it."""

    kind: str
    phase: str
    moment_s: float
    sweep: str = ""
    trial: str = ""
    code: int | None = None
    ended_s: float = 0.0
    left_s: float | None = None
    tries: int = 0
    went_on_s: float | None = None
    repeated: int = 0
    began: float = 0.0
    differ: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def done(self) -> Kind:
        """What kind it is."""
        return KINDS[self.kind]


def deal(sweep: Sweep, plan: Kill, server: Server, rng: Random) -> bool:
    """Wait for the moment and kill; see that the sweep goes on. False if it had ended before."""
    plan.sweep = sweep.name
    if not wait_for(lambda: reached(sweep, plan.phase)):
        plan.faults.append(f"never came to {plan.phase}: {sweep.log}")
        return True
    pause(sweep, plan.moment_s)
    victim = find(sweep, plan, server, rng)
    if victim is None:
        if sweep.code:
            plan.faults.append(f"exit code {sweep.code} before the kill: {sweep.said()}")
        return bool(sweep.code)
    plan.trial = next((t for t, p in sweep.training().items() if p.pid == victim.pid), "")
    told = sweep.epochs(plan.trial or None)
    kill(plan.done, victim, sweep, server)
    plan.began = time.monotonic()
    if plan.done.name == "tracking server":
        pause(sweep, rng.uniform(1, 6))
        server.start()
    elif plan.done.name != "courier":
        plan.repeated = sweep.unsaved(plan.trial)
    follow(sweep, plan, server, told)
    return True


def reached(sweep: Sweep, phase: str) -> bool:
    """Whether a start has come so far."""
    if sweep.has_stopped() or phase == "start" or sweep.all_ended():
        return True
    return phase == "training" and bool(sweep.training()) and sweep.epochs() > 0


def pause(sweep: Sweep, seconds: float) -> None:
    """Wait, with open eyes."""
    until = time.monotonic() + seconds
    wait_for(lambda: sweep.has_stopped() or time.monotonic() >= until)


def find(sweep: Sweep, plan: Kill, server: Server, rng: Random) -> Process | None:
    """The victim, as soon as it is there; None if the sweep ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not sweep.has_stopped() and time.monotonic() < deadline:
        if (victim := plan.done.victim(sweep, server, rng)) is not None:
            return victim
        time.sleep(LOOK_S)
    return None


def follow(sweep: Sweep, plan: Kill, server: Server, told: int) -> None:
    """See what becomes of the sweep: it goes on, or it ends and the same command goes on."""
    old = sweep.families[-1]
    if plan.done.ends:
        in_time = wait_for(sweep.has_stopped, ENDS_S)
    else:
        in_time = wait_for(lambda: goes_on(sweep, plan, server, told), GOES_ON_S)
    if not in_time:
        does = f"lives after {ENDS_S:g} s" if plan.done.ends else f"waits after {GOES_ON_S:g} s"
        plan.faults.append(f"the driver {does}: {sweep.log}")
        old.kill()
        wait_for(sweep.has_stopped)
    plan.code = sweep.code
    if plan.code is None:
        plan.went_on_s = time.monotonic() - plan.began
        return
    plan.ended_s = time.monotonic() - plan.began
    allowed = plan.done.ends or plan.phase != "training"
    early = sweep.said().rstrip().endswith("KeyboardInterrupt")  # while Python still imports
    if plan.code and not early and not (allowed and plan.code in plan.done.codes):
        plan.faults.append(f"exit code {plan.code}: {sweep.said()}")
    if plan.code:
        again(sweep, plan, server, old)
    if not wait_for(lambda: nobody_left(plan, old), LEAVES_S):
        plan.faults.append(f"left behind: {[p.title[:60] for p in old.see()]}")


def nobody_left(plan: Kill, old: Family) -> bool:
    """Whether all that a driver had started has ended too, but for Ray's agents; when it had."""
    if plan.left_s is None and all(p.title in AGENTS for p in old.see()):
        plan.left_s = time.monotonic() - plan.began - plan.ended_s
    return plan.left_s is not None


def again(sweep: Sweep, plan: Kill, server: Server, old: Family) -> None:
    """The same command; a driver that was killed before it trained is not waited for."""
    plan.repeated = max(plan.repeated, sweep.unsaved())
    if not wait_for(server.healthy):
        plan.faults.append("the tracking server does not come back")
    sweep.start()
    if plan.phase == "start":
        return
    told, plan.trial = sweep.epochs(), ""

    def trains() -> bool:
        nobody_left(plan, old)
        return goes_on(sweep, plan, server, told)

    if not wait_for(trains, GOES_ON_S):
        plan.faults.append(f"does not train after {GOES_ON_S:g} s: {sweep.said()}")
    plan.went_on_s = time.monotonic() - plan.began


def goes_on(sweep: Sweep, plan: Kill, server: Server, told: int) -> bool:
    """Whether a sweep has ended, or trains again, or has nothing left to train."""
    if sweep.has_stopped():
        return True
    if not server.healthy():
        return False
    if plan.phase == "start" or sweep.all_ended() or plan.trial in sweep.ended():
        return True
    return bool(sweep.training()) and sweep.epochs(plan.trial or None) > told


def disturb(sweep: Sweep, kills: list[Kill], server: Server, rng: Random) -> list[Kill]:
    """Run a sweep to its end with these kills; those that it was too short for."""
    sweep.start()
    left = [plan for plan in kills if not deal(sweep, plan, server, rng)]
    sweep.run_to_the_end()
    return left


def at_random(kind: str, rng: Random, phase: str | None = None) -> Kill:
    """A kill of a kind at some moment."""
    weights = {"start": 0.2, "training": 0.65, "end": 0.15}
    phases = KINDS[kind].phases
    picked = phase or rng.choices(phases, [weights[p] for p in phases])[0]
    return Kill(kind=kind, phase=picked, moment_s=rng.uniform(0, WINDOW_S[picked]))
