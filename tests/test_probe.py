"""What training costs, measured on a store."""

import dataclasses
import math
from pathlib import Path

import pytest
from trainings import CPU, with_training

from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training.task import prepare_task
from sweeps import probe as probes
from sweeps.probe import STEPS, Speed, measure
from sweeps.space import Sweep


def sweep(settings: Settings, **changes: object) -> Sweep:
    values = {"name": "s", "trials": 3, "protocol": settings.protocol}
    return Sweep(**{**values, "training": settings.training, **changes})  # type: ignore[arg-type]


def check_measured(speed: Speed) -> None:
    numbers = dataclasses.asdict(speed)
    for name in ("setup_seconds", "step_seconds", "validation_seconds", "patches_per_second"):
        assert math.isfinite(numbers[name])
        assert numbers[name] > 0, name
    assert speed.error == ""


def test_a_kind_is_measured_on_what_it_would_train(demo_store: Store, settings: Settings) -> None:
    point = {"backbone": "test_resnet"}
    before = sorted(demo_store.path.rglob("*"))
    speed = measure(demo_store, settings, point)
    check_measured(speed)
    assert sorted(demo_store.path.rglob("*")) == before  # nothing is left
    task, model = prepare_task(demo_store, settings, 0, CPU)
    assert (speed.steps, speed.epochs, speed.point) == (task.steps, 2, point)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    assert weights <= speed.model_mb < 1.2 * weights
    assert speed.patches_per_second == pytest.approx(8 / speed.step_seconds)
    each = speed.steps * speed.step_seconds + speed.validation_seconds
    assert speed.fold_seconds() == pytest.approx(speed.setup_seconds + 2 * each)


def test_an_epoch_of_fewer_steps_than_are_timed(demo_store: Store, settings: Settings) -> None:
    few = with_training(settings, batch_size=60)
    assert prepare_task(demo_store, few, 0, CPU)[0].steps <= STEPS
    check_measured(measure(demo_store, few, {}))


def test_a_kind_that_cannot_be_trained_is_told_and_does_not_end_the_others(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    plan = sweep(settings, space={"genes": [60, 9999]})
    speed = probes._probe(plan, demo_store.path, {"genes": 9999})
    assert "9999" in speed.error
    assert "store" in probes._probe(plan, tmp_path / "none", {"genes": 60}).error
    check_measured(probes._probe(plan, demo_store.path, {"genes": 60}))


def test_a_worker_of_several_is_measured_on_its_share_of_a_batch(
    demo_store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def see(store: Store, settings: Settings, point: dict) -> Speed:
        seen.append(settings)
        return measure(store, settings, point)

    monkeypatch.setattr(probes, "measure", see)
    plan = sweep(settings, workers_per_trial=4)
    speed = probes._probe(plan, demo_store.path, {})
    check_measured(speed)
    assert [s.training.batch_size for s in seen] == [2]
    whole = measure(demo_store, settings, {})
    assert abs(speed.steps - whole.steps) <= 1  # four workers take as many steps as one
