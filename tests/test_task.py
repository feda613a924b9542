"""What a fold is trained on, and how it begins."""

import numpy as np
import pytest
import timm
import torch
from trainings import CPU, with_training

from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training.fitted import training_rows
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
