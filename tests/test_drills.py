"""Three of the drills (`make drills` has them all), and what they are made of."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from drills.__main__ import dealt, table
from drills.compare import differences, facts, faults
from drills.drill import at_random, disturb
from drills.kinds import KINDS
from drills.processes import Family
from drills.sweep import Server, Sweep, serving, wait_for

from brstnet.config import Protocol, Training
from brstnet.data.store import Store
from sweeps.pruning import pruner_of
from sweeps.space import Asked
from sweeps.space import Sweep as Plan
from sweeps.trial import Job, train_folds


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("tracking")) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(
    demo_store: Store, tracking: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("calm") / "out"
    sweep = Sweep("search", "calm", out, demo_store.path, tracking.uri)
    try:
        sweep.run_to_the_end()
    finally:
        sweep.end()
    assert not faults(sweep)
    known = facts(sweep)
    states = Counter(trial["state"] for trial in known["trials"].values())
    assert states["COMPLETE"] >= 3
    assert states["FAILED"] >= 1
    return known


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "driver",
        pytest.param("trial actor", marks=pytest.mark.drill),
        pytest.param("tracking server", marks=pytest.mark.drill),
    ],
)
def test_a_sweep_comes_to_the_same_whatever_is_killed(
    kind: str,
    undisturbed: dict[str, Any],
    demo_store: Store,
    tracking: Server,
    tmp_path: Path,
) -> None:
    name = kind.replace(" ", "-")
    sweep = Sweep("search", name, tmp_path / "out", demo_store.path, tracking.uri)
    plan = at_random(kind, Random(kind), "training")
    try:
        assert not disturb(sweep, [plan], tracking, Random(kind)), "it ended before the kill"
        found = [*plan.faults, *faults(sweep), *differences(undisturbed, facts(sweep))]
    finally:
        sweep.end()
    assert not found, table([plan])
    assert sweep.starts == (2 if kind == "driver" else 1)


@pytest.mark.slow
def test_a_rung_that_was_missed_is_reported_as_it_would_have_been(
    demo_store: Store, tmp_path: Path
) -> None:
    """A process is killed when an epoch is on disk and its driver has not heard of it."""
    asked, rungs = Asked(number=0, point={"learning_rate": 0.02}), []
    plan = rung_plan()

    def report(note: dict[str, Any]) -> None:
        rungs.append((note["progress"], note["score"], note["scores"]))

    def report_and_die(note: dict[str, Any]) -> None:
        if note["progress"] == 0.5:
            raise ConnectionError
        report(note)

    def job(out: str) -> Job:
        stores = {"": demo_store.path}
        return Job(sweep=plan, stores=stores, out=tmp_path / out, gpus_per_worker=0, session="a")

    train_folds(asked, job("whole"), report)
    whole = rungs.copy()
    assert [done for done, *_ in whole] == [0.25, 0.5, 1.0, 2.0]
    rungs.clear()
    with pytest.raises(ConnectionError):
        train_folds(asked, job("killed"), report_and_die)
    assert rungs == whole[:1]
    rungs.clear()
    train_folds(asked, job("killed"), report)
    assert rungs == whole  # the board ignores those that it has judged


def rung_plan() -> Plan:
    plan = Plan(
        name="rungs",
        protocol=Protocol(held_out=("BC90006",), folds=2, panel_size=40),
        training=Training(
            backbone="test_resnet",
            genes=60,
            epochs=4,
            batch_size=8,
            schedule="cosine",
            stopping="fixed",
        ),
        space={"learning_rate": [0.02]},
        grace_folds=0.25,
        reduction_factor=2,
        trials=1,
    )
    assert pruner_of(plan).rungs == (0.25, 0.5, 1.0)
    return plan


def test_a_family_is_known_after_its_elder_has_died() -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    elder = subprocess.Popen([sys.executable, "-c", code])
    family = Family(elder.pid)
    assert wait_for(lambda: len(family.see()) == 2, 20)
    elder.kill()
    elder.wait()
    (child,) = family.see()
    assert child.title == "sleep 60"
    family.kill()
    assert wait_for(lambda: not family.see(), 5)


def test_twenty_kills_are_of_all_kinds_and_the_same_for_a_seed() -> None:
    hands = dealt(20, Random(7))
    kills = [(variant, plan) for variant, plans in hands.items() for plan in plans]
    counts = Counter(plan.kind for _, plan in kills)
    assert sum(counts.values()) == 20
    assert set(counts) == set(KINDS)
    assert set(counts.values()) <= {2, 3}
    assert all(variant in KINDS[plan.kind].variants for variant, plan in kills)
    assert hands == dealt(20, Random(7)) != dealt(20, Random(8))


def test_what_differs_is_said_where_it_is() -> None:
    one = {"trials": {"0000": {"score": 0.5}, "0001": {}}, "rungs": [1, float("nan")]}
    other = {"trials": {"0000": {"score": 0.25}}, "rungs": [1, float("nan")]}
    assert list(differences(one, one)) == []
    assert list(differences(one, other)) == [
        "/trials/0000/score: 0.5, then 0.25",
        "/trials/0001 is only in the first",
    ]
