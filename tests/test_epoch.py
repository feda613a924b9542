"""An epoch: against plain autograd on the same draws, and a validation at once."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import CPU, Stop, with_training

from brstnet import metrics
from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training import epoch
from brstnet.training.batches import Batch, epoch_plan, turn
from brstnet.training.epoch import train_epoch, validate
from brstnet.training.jitter import jitter
from brstnet.training.keep import validation_table
from brstnet.training.task import prepare_task
from brstnet.training.train import run_epoch, start


@pytest.mark.parametrize("augmentation", ["symmetries", "none", "colour"])
def test_an_epoch_is_the_steps_of_its_plan(
    demo_store: Store, settings: Settings, tmp_path: Path, augmentation: str
) -> None:
    """By hand: draw, turn, jitter, standardise, plain SGD with plain autograd."""
    settings = with_training(
        settings, backbone="test_vit", momentum=0.0, aux_weight=2.0, precision="float32"
    )
    settings = with_training(settings, augmentation=augmentation)
    run = start(*prepare_task(demo_store, settings, 0, CPU), tmp_path)
    task, model, by_hand = run.task, run.model, copy.deepcopy(run.model)
    run.progress.epoch = 2
    mean_loss, clock = train_epoch(run)
    assert 0 < clock.read()[1] <= clock.read()[0]
    losses = []
    plan = epoch_plan(task.train.rows, 8, task.training.seed, 3, augmentation="colour")
    for rows, symmetry, maps in zip(*map(torch.from_numpy, plan), strict=True):
        x_BHWC = task.train.patches(rows)
        if augmentation != "none":
            x_BHWC = turn(x_BHWC, symmetry)
        x_BCHW = task.units.image(jitter(x_BHWC, maps) if augmentation == "colour" else x_BHWC)
        main, aux, _ = by_hand(x_BCHW)
        y_BG = task.units.target(task.train.batch(rows))
        loss = ((main - y_BG[:, :60]) ** 2).mean() + 2.0 * ((aux - y_BG[:, 60:]) ** 2).mean()
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.02 * gradient
        losses.append(float(loss.detach()))
    assert mean_loss == pytest.approx(np.mean(losses), rel=1e-5)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_validation_streams_what_the_whole_would_give(
    demo_store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch, "EVAL_BATCH", 7)
    settings = with_training(settings, aux_weight=5.0, precision="float32")
    task, model = prepare_task(demo_store, settings, 0, CPU)
    loss, sections = validate(task, model)
    assert not model.training
    everyone = task.validation.batch(torch.from_numpy(task.validation.rows))
    x_BCHW, y_NG = task.units.input(everyone), task.units.target(everyone).double().numpy()
    with torch.inference_mode():
        main, aux = (part.double().numpy() for part in model(x_BCHW)[:2])
    expected = ((main - y_NG[:, :60]) ** 2).mean() + 5.0 * ((aux - y_NG[:, 60:]) ** 2).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    for number, moments in enumerate(sections):
        here = task.validation.section_N == number
        assert moments.n == here.sum()
        np.testing.assert_allclose(
            metrics.correlation(moments),
            metrics.pearson(main[here, :40], y_NG[here, :40]),
            atol=1e-4,
        )
    table = validation_table(task, sections)
    assert list(table) == ["gene", "symbol", "section", "patient", "pcc", "n"]
    assert len(table) == 40 * len(task.fold.validation)
    assert table["section"].unique().tolist() == list(task.fold.validation)
    assert table["gene"][:40].tolist() == list(task.fitted.genes.index[:40])


@pytest.mark.parametrize("frozen", [False, True])
def test_validation_with_views_is_the_mean_over_all_symmetries(
    demo_store: Store, settings: Settings, tmp_path: Path, frozen: bool
) -> None:
    """Losses and predictions of the eight views by hand, with a depth head."""
    store = Store(shutil.copytree(demo_store.path, tmp_path / "store"))
    asked = with_training(
        settings, views=8, depth="nuisance", precision="float32", frozen=frozen, aux_weight=2.0
    )
    task, model = prepare_task(store, asked, 0, CPU)
    loss, sections = validate(task, model)
    rows = torch.from_numpy(task.validation.rows)
    losses, preds = [], []
    for view in range(8):
        batch = task.validation.batch(rows, torch.full_like(rows, view))
        with torch.inference_mode():
            outputs = model(task.units.input(batch))
        goal, main = task.units.goal(batch), task.fitted.main_genes
        errors = [(outputs.main - goal[:, :main]), outputs.depth - goal[:, -1:]]
        aux = (outputs.aux - goal[:, main:-1]).square().mean()
        losses.append(sum(e.square().mean() for e in errors) + 2.0 * aux)
        preds.append(task.units.whole(outputs))
    assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    pred_NG = torch.stack(preds).mean(0).double().numpy()
    y_NG = task.units.target(task.validation.batch(rows)).double().numpy()
    for number, moments in enumerate(sections):
        here = task.validation.section_N == number
        expected = metrics.pearson(pred_NG[here, :40], y_NG[here, :40])
        np.testing.assert_allclose(metrics.correlation(moments), expected, atol=1e-4)


@pytest.mark.parametrize("first", [1, 3, 5])
def test_the_rest_of_an_epoch_after_some_steps_is_the_same(
    demo_store: Store, settings: Settings, tmp_path: Path, first: int
) -> None:
    """Stopped after `first` steps and told where it was: the same loss and weights, bit for bit."""
    asked = with_training(settings, dropout=0.3, augmentation="colour")
    whole, parts = (start(*prepare_task(demo_store, asked, 0, CPU), tmp_path) for _ in range(2))
    steps: list[int] = []

    def stop(step: int, total: Tensor) -> None:
        steps.append(step)
        parts.progress.step, parts.progress.loss_sum = step, float(total)
        if step == first:
            raise Stop

    loss, _ = train_epoch(whole)
    with pytest.raises(Stop):
        train_epoch(parts, stop)
    rest, _ = train_epoch(parts, stop)
    assert steps == list(range(1, whole.task.steps + 1))
    assert rest == loss
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name


def test_the_moving_average_is_validated(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the weights that learn; by hand it has seen every step."""
    averaged = with_training(settings, ema_decay=0.5, epochs=1)
    run = start(*prepare_task(demo_store, averaged, 0, CPU), tmp_path)
    seen: list[nn.Module] = []
    true_validate = validate
    monkeypatch.setattr(
        "brstnet.training.train.validate", lambda *a: (seen.append(a[1]), true_validate(*a))[1]
    )
    names = [n for n, _ in run.model.named_parameters()]
    by_hand = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    learn, done = run.learn, 0
    assert run.average is not None

    def watched(batch: Batch) -> Tensor:
        nonlocal done
        if done:  # the step before this one
            decay = min(0.5, 1 - done ** (-2 / 3))
            for name, parameter in run.model.named_parameters():
                by_hand[name] = decay * by_hand[name] + (1 - decay) * parameter.detach()
        done += 1
        return learn(batch)

    run.learn = watched
    run_epoch(run)
    run.saver.wait()
    assert seen == [run.average.module]
    assert run.judged is run.average.module
    decay = min(0.5, 1 - done ** (-2 / 3))
    for name in names:
        last = run.model.get_parameter(name).detach()
        expected = decay * by_hand[name] + (1 - decay) * last
        torch.testing.assert_close(run.judged.get_parameter(name), expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(run.judged.get_parameter(name), last)
