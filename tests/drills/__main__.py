"""Kill a small real sweep's processes at random moments and compare what it comes to.

    PYTHONPATH=tests python -m drills --seed 1

Three sweeps are left alone; others of the same settings are disturbed, each several times, and
must come to the same. Exit code 1 if one does not. Everything is kept in the folder, which is
removed if all went well.
"""

import secrets
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from brstnet.config import Prepare
from brstnet.data.prepare import prepare
from brstnet.data.synthetic import Demo, make_demo
from drills.compare import differences, facts, faults
from drills.drill import Kill, at_random, disturb
from drills.kinds import KINDS
from drills.sweep import VARIANTS, Drilled, Server, Sweep, serving

EACH = 4
"""Kills that a sweep is given; it is too short for many more."""


TRIES = 3
"""Sweeps in which a kill may come too late."""


def dealt(kills: int, rng: Random) -> dict[str, list[Kill]]:
    """The kills of each variant: every kind as often as others, give or take one."""
    kinds = list(KINDS) * (kills // len(KINDS))
    kinds += rng.sample(list(KINDS), kills - len(kinds))
    rng.shuffle(kinds)
    room = dict(zip(VARIANTS, (2, 2, 1), strict=True))  # a sweep of groups takes twice as long
    deck = [v for v in VARIANTS for _ in range(round(kills * room[v] / 5))]
    hands: dict[str, list[Kill]] = {variant: [] for variant in VARIANTS}
    for kind in sorted(kinds, key=lambda k: len(KINDS[k].variants)):
        able = [v for v in deck if v in KINDS[kind].variants] or list(KINDS[kind].variants)
        variant = rng.choice(able)
        hands[variant].append(at_random(kind, rng))
        if variant in deck:
            deck.remove(variant)
    return hands


def demo_store(folder: Path) -> Path:
    """Demo tissue of six patients, as a store."""
    make_demo(
        folder / "raw", Demo(patients=6, sections_per_patient=1, spots_per_section=24, genes=150)
    )
    settings = Prepare(layout="stnet", window_px=64, input_px=32, held_out=("BC90006",))
    return prepare(folder / "raw", folder / "store", settings, progress=False).path


def drill(variant: str, kills: list[Kill], folder: Path, store: Path, server: Server) -> None:
    """One variant: undisturbed, then in as many sweeps as it takes to deal the kills."""
    rng = Random(variant)
    calm = Sweep(variant, f"{variant}-calm", folder / f"{variant}-calm", store, server.uri)
    began = time.monotonic()
    try:
        calm.run_to_the_end()
    finally:
        calm.end()
    expected = facts(calm)
    say(f"{calm.name}: {time.monotonic() - began:.0f} s, {summary(calm, expected)}")
    for number in count(1):
        if not kills:
            return
        hand, kills = kills[:EACH], kills[EACH:]
        hand.sort(key=lambda plan: plan.phase == "end")
        name = f"{variant}-{number}"
        sweep = Sweep(variant, name, folder / name, store, server.uri)
        began = time.monotonic()
        left: list[Kill] = []
        try:
            left = disturb(sweep, hand, server, rng)
            found = [*faults(sweep), *differences(expected, facts(sweep))]
        except Drilled as error:
            found = [str(error)]
        finally:
            sweep.end()
        for plan in hand:
            plan.differ = len(found) if plan not in left else 0
        for plan in left:
            plan.tries += 1
            plan.moment_s /= 2  # it came too late
            if plan.tries == TRIES:
                plan.faults.append(f"nobody to kill in {TRIES} sweeps")
        kills = [*(plan for plan in left if plan.tries < TRIES), *kills]
        same = "the same" if not found else f"{len(found)} differences"
        say(f"{name}: {time.monotonic() - began:.0f} s, {sweep.starts} starts, {same}")
        for line in found[:20]:
            say(f"    {line}")


def summary(sweep: Sweep, known: dict[str, Any]) -> str:
    """How a sweep's trials ended."""
    states = [trial["state"].lower() for trial in known["trials"].values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    return f"{counts}; champion {known['champion']}; {faults(sweep) or 'nothing twice'}"


def table(kills: Sequence[Kill]) -> str:
    """A line a kill."""
    rows = [
        "| kind | sweep | when | driver | ended, s | left behind, s | on again, s "
        "| epochs repeated | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in kills:
        after = {"start": "a start", "training": "an epoch", "end": "the last trial"}[plan.phase]
        lived = "lived" if plan.code is None else f"exit {plan.code}"
        times = " | ".join(
            f"{s:.1f}" if s else "-" for s in (plan.ended_s, plan.left_s, plan.went_on_s)
        )
        verdict = "the same" if not plan.differ else f"{plan.differ} DIFFERENCES"
        verdict += f", {len(plan.faults)} FAULTS" if plan.faults else ""
        rows.append(
            f"| {plan.kind} | {plan.sweep} | {plan.moment_s:.1f} s after {after} | {lived} "
            f"| {times} | {plan.repeated} | {verdict} |"
        )
    return "\n".join(rows)


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)  # noqa: T201 - a command's output


def run(options: Namespace, folder: Path) -> list[Kill]:
    """All variants; every kill and what came of it."""
    hands = dealt(options.kills, Random(options.seed))
    store = demo_store(folder)
    with serving(folder / "server") as server:
        for variant, kills in hands.items():
            if kills and variant in (options.only or VARIANTS):
                drill(variant, list(kills), folder, store, server)
    return [plan for kills in hands.values() for plan in kills if plan.sweep]


def main() -> int:
    """Run the drills."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="of the sweeps' variants")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # what was started is ended
        signal.signal(number, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="brstnet-drills-"))
    say(f"seed {options.seed}, {folder}")
    began = time.monotonic()
    kills = run(options, folder)
    say(f"\nseed {options.seed}, {(time.monotonic() - began) / 60:.0f} minutes\n{table(kills)}")
    bad = [plan for plan in kills if plan.faults or plan.differ]
    for plan in bad:
        say(f"\n{plan.kind} in {plan.sweep}:" + "".join(f"\n  {line}" for line in plan.faults[:9]))
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
