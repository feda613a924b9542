"""What a fold is trained on, and how it begins."""

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from trainings import CPU, with_training

from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training.epoch import validate
from brstnet.training.fitted import drawn_rows, training_rows
from brstnet.training.folds import make_folds
from brstnet.training.model import build_model
from brstnet.training.task import prepare_task


def test_a_task_trains_on_spots_that_are_not_white_and_validates_on_all(
    demo_store: Store, settings: Settings
) -> None:
    task, _ = prepare_task(demo_store, settings, 0, CPU)
    table = demo_store.spots(task.fold.train)
    allowed = np.flatnonzero(training_rows(table, settings.protocol))
    assert task.train.rows.tolist() == allowed.tolist()
    assert len(allowed) < len(table)
    assert len(task.validation.rows) == len(demo_store.spots(task.fold.validation))
    assert [f"{p}_C1" for p in task.patients] == list(task.fold.validation)
    assert task.facts["leak_report"]["checks"]["panel"]["ok"]


def test_poor_spots_are_left_out_of_the_training_and_of_nothing_else(
    demo_store: Store, settings: Settings
) -> None:
    """Everything fitted, and the validation in its own units, are the same bits."""
    least = int(demo_store.spots(list(demo_store.sections))["total_counts"].median())
    every, richer = (
        prepare_task(demo_store, with_training(settings, min_counts=n, depth="nuisance"), 0, CPU)[0]
        for n in (0, least)
    )
    totals = demo_store.spots(every.fold.train)["total_counts"].to_numpy()
    kept = every.train.rows[totals[every.train.rows] >= least]
    assert richer.train.rows.tolist() == kept.tolist()
    assert 2 < len(kept) < len(every.train.rows)
    assert richer.steps < every.steps
    pd.testing.assert_frame_equal(richer.fitted.genes, every.fitted.genes, check_exact=True)
    assert richer.fitted.facts() == every.fitted.facts()
    assert richer.facts["leak_report"] == every.facts["leak_report"]
    assert richer.validation is not None
    assert every.validation is not None
    assert richer.validation.rows.tolist() == every.validation.rows.tolist()
    rows = torch.from_numpy(every.validation.rows)
    one, other = richer.validation.batch(rows), every.validation.batch(rows)
    for made in ("input", "target", "goal"):
        assert torch.equal(getattr(richer.units, made)(one), getattr(every.units, made)(other))


def test_a_spot_with_exactly_the_least_counts_trains(demo_store: Store, settings: Settings) -> None:
    fold = make_folds(demo_store, settings.protocol)[0]
    spots = demo_store.spots(fold.train)
    allowed = training_rows(spots, settings.protocol)
    richest = np.sort(spots["total_counts"][allowed])[-5:]
    rows = drawn_rows(demo_store, fold, with_training(settings, min_counts=int(richest[0])))
    assert sorted(spots["total_counts"][rows]) == richest.tolist()
    np.testing.assert_array_equal(drawn_rows(demo_store, fold, settings), allowed)


@pytest.mark.parametrize("left", [0, 1])
def test_too_few_spots_to_train_on_are_told(
    demo_store: Store, settings: Settings, left: int
) -> None:
    fold = make_folds(demo_store, settings.protocol)[1]
    spots = demo_store.spots(fold.train)
    allowed = training_rows(spots, settings.protocol)
    richest = int(spots["total_counts"][allowed].max())
    assert (spots["total_counts"][allowed] == richest).sum() == 1
    told = (
        rf"fold 1 has {left} training spots with at least {richest + 1 - left} counts.*lower "
        rf"training\.min_counts \(the richest spot has {richest}\)"
    )
    with pytest.raises(ValueError, match=told):
        prepare_task(demo_store, with_training(settings, min_counts=richest + 1 - left), 1, CPU)


@pytest.mark.parametrize("augmentation", ["none", "symmetries", "colour"])
def test_validation_patches_are_never_jittered(
    demo_store: Store, settings: Settings, augmentation: str
) -> None:
    asked = with_training(settings, augmentation=augmentation)
    task, model = prepare_task(demo_store, asked, 0, CPU)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    validate(task, model)
    assert task.validation is not None
    x_BHWC = task.validation.patches(torch.from_numpy(task.validation.rows))
    assert torch.equal(torch.cat(seen), task.units.image(x_BHWC))


def test_the_model_follows_from_the_seed_alone(demo_store: Store, settings: Settings) -> None:
    torch.manual_seed(5)
    task, model = prepare_task(demo_store, settings, 0, CPU)
    reference = build_model(settings.training, task.fitted, demo_store.input_px)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_an_input_larger_than_the_stores_patches_is_refused(
    demo_store: Store, settings: Settings
) -> None:
    with pytest.raises(ValueError, match=r"input_px \(64\) is above the store's patches \(32 px\)"):
        prepare_task(demo_store, with_training(settings, input_px=64), 0, CPU)


def test_image_statistics_of_the_weights_are_timms(demo_store: Store, settings: Settings) -> None:
    """Elsewhere they are those of the training patches."""
    cfg = timm.get_pretrained_cfg("test_vit")
    assert cfg is not None
    asked = with_training(settings, backbone="test_vit", image_statistics="weights")
    task, _ = prepare_task(demo_store, asked, 0, CPU)
    assert (task.fitted.image_mean, task.fitted.image_std) == (cfg.mean, cfg.std)
    np.testing.assert_allclose(task.units.image_mean.flatten() / 255, cfg.mean, rtol=1e-6)
    np.testing.assert_allclose(task.units.image_std.flatten() / 255, cfg.std, rtol=1e-6)
    assert task.facts["fitted"]["image_mean"] == list(cfg.mean)
    own, _ = prepare_task(demo_store, with_training(settings, backbone="test_vit"), 0, CPU)
    assert own.fitted.image_mean != task.fitted.image_mean
