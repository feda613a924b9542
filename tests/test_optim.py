"""Optimiser, learning rate and moving average: against numbers worked out by hand."""

import copy
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from brstnet.config import Training
from brstnet.training.model import BrSTNet
from brstnet.training.optim import Rate, make_average, make_optimizer


class Backbone(nn.Module):
    """A convolution and BatchNorm, pooled."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.norm(self.conv(x_BCHW)).mean((2, 3))
        return pooled


def tiny() -> BrSTNet:
    torch.manual_seed(0)
    return BrSTNet(Backbone(), main_genes=3, aux_genes=2)


# Groups ------------------------------------------------------------------------------------------


def of(optimizer: torch.optim.Optimizer, model: BrSTNet) -> dict[str, dict[str, Any]]:
    """The group of each parameter, by the parameter's name."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("slow", [None, 0.0, 0.001])
def test_backbone_and_heads_have_their_own_rates(optimizer: Any, slow: float | None) -> None:
    training = Training(optimizer=optimizer, learning_rate=0.1, backbone_learning_rate=slow)
    groups = of(made := make_optimizer(model := tiny(), training), model)
    assert len(groups) == sum(len(g["params"]) for g in made.param_groups) == 8
    backbone = 0.1 if slow is None else slow
    for name, group in groups.items():
        assert group["lr"] == (backbone if name.startswith("backbone.") else 0.1), name
    Rate(training, 4).set(made, 0)
    assert {group["lr"] for group in made.param_groups} == {0.1, backbone}


def test_adamw_leaves_biases_and_norms_undecayed_and_sgd_does_not() -> None:
    model = tiny()
    decayed = {"backbone.conv.weight", "main.weight", "aux.weight"}
    groups = of(make_optimizer(model, Training(optimizer="adamw", weight_decay=0.5)), model)
    assert {name for name, group in groups.items() if group["weight_decay"] == 0.5} == decayed
    assert {g["weight_decay"] for n, g in groups.items() if n not in decayed} == {0.0}
    groups = of(make_optimizer(model, Training(optimizer="sgd", weight_decay=0.5)), model)
    assert {group["weight_decay"] for group in groups.values()} == {0.5}


def test_adamw_by_hand() -> None:
    """Loshchilov and Hutter's algorithm 2, in numpy; vectors only without decay."""
    training = Training(optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
    model = tiny()
    optimizer = make_optimizer(model, training)
    rng = np.random.default_rng(0)
    state = {n: [p.detach().double().numpy(), 0.0, 0.0] for n, p in model.named_parameters()}
    for t in range(1, 4):
        for name, parameter in model.named_parameters():
            g = rng.normal(size=parameter.shape)
            parameter.grad = torch.from_numpy(g).float()
            w, m, v = state[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - 0.01 * (0.1 if g.ndim > 1 else 0.0) * w
            w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            state[name] = [w, m, v]
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach(), state[name][0], atol=1e-6)


# The rate ----------------------------------------------------------------------------------------


def rates(training: Training, losses: list[float]) -> list[float]:
    """The learning rate of each epoch, given the validation losses after each."""
    rate, optimizer = Rate(training, steps=3), make_optimizer(tiny(), training)
    found = []
    for epoch, loss in enumerate(losses):
        for step in range(3):
            rate.set(optimizer, 3 * epoch + step)
        (one,) = {group["lr"] for group in optimizer.param_groups}
        found.append(one)
        rate.after_epoch(loss)
    return found


def test_plateau_lowers_the_rate_after_patience_and_not_below_the_lowest() -> None:
    training = Training(
        schedule="plateau",
        learning_rate=0.1,
        plateau_factor=0.1,
        plateau_patience=2,
        min_learning_rate=0.005,
    )
    losses = [1.0, 0.9, 0.9, 0.95, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8]
    # no lower loss in epochs 2, 3, 4: 0.01 from epoch 5; none in 6, 7, 8: 0.005 from epoch 9
    expected = [0.1] * 5 + [0.01] * 4 + [0.005]
    assert rates(training, losses) == pytest.approx(expected)


@pytest.mark.parametrize(("period", "length"), [(None, 8), (5, 5)])
def test_cosine_goes_down_over_its_period_and_up_again(period: int | None, length: int) -> None:
    training = Training(
        schedule="cosine",
        learning_rate=0.1,
        min_learning_rate=0.001,
        epochs=8,
        cosine_period=period,
    )
    epochs = np.arange(8)
    expected = 0.001 + 0.099 * (1 + np.cos(np.pi * epochs / length)) / 2
    assert rates(training, [1.0] * 8) == pytest.approx(expected.tolist())


def test_without_a_schedule_the_rate_stays() -> None:
    assert rates(Training(schedule="none", learning_rate=0.3), [1, 2, 3]) == [0.3] * 3


def test_warm_up_climbs_step_by_step_and_meets_the_schedule() -> None:
    """Two epochs of 3 steps up; cosine over 4 epochs, which the warm-up is a share of."""
    training = Training(
        schedule="cosine",
        learning_rate=0.6,
        backbone_learning_rate=0.06,
        min_learning_rate=0.0,
        epochs=4,
        warmup_epochs=2,
    )
    optimizer, rate = make_optimizer(tiny(), training), Rate(training, steps=3)
    heads, backbone = [], []
    for step in range(12):
        rate.set(optimizer, step)
        low, high = sorted({group["lr"] for group in optimizer.param_groups})
        heads.append(high)
        backbone.append(low)
        if step % 3 == 2:
            rate.after_epoch(1.0)
    cosine = 0.6 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    share = np.minimum(np.arange(1, 13) / 6, 1)
    np.testing.assert_allclose(heads, np.repeat(cosine, 3) * share, rtol=1e-12)
    np.testing.assert_allclose(backbone, np.array(heads) / 10, rtol=1e-12)
    np.testing.assert_allclose(heads[:3], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "none"])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_the_rate_goes_on_from_its_state_in_json(schedule: Any, epochs: int) -> None:
    """From the very beginning too, where no schedule has moved yet."""
    training = Training(schedule=schedule, plateau_patience=1, learning_rate=0.1, epochs=6)
    rate, again = Rate(training, 3), Rate(training, 3)
    for _ in range(epochs):
        rate.after_epoch(1.0)
    again.restore(json.loads(json.dumps(rate.state())))
    for _ in range(4):
        assert again.now == rate.now
        rate.after_epoch(1.0)
        again.after_epoch(1.0)


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "none"])
def test_before_the_first_epoch_is_whole_there_is_no_state_to_go_on_from(schedule: Any) -> None:
    """What a position within the first epoch holds: `Progress.schedule` is still empty."""
    rate = Rate(Training(schedule=schedule, learning_rate=0.1), 3)
    rate.restore({})
    assert rate.now == 0.1


def test_no_schedule_warns_of_its_order() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(Training(schedule="cosine"), [1.0, 1.0])


# The moving average ------------------------------------------------------------------------------


def test_the_moving_average_is_the_one_written_by_hand() -> None:
    """Decay of step t: min(decay, 1 - (1 + t)^(-2/3)) with t from 0, where it is a copy."""
    training = Training(ema_decay=0.6)
    model = tiny()
    average = make_average(model, training)
    assert average is not None
    by_hand: dict[str, np.ndarray] = {}
    decays = []
    for step in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model.train()(torch.randn(4, 3, 5, 5))
        average.update(model, step + 1)
        decays.append(min(0.6, 1 - (1 + step) ** (-2 / 3)))
        for name, value in model.state_dict().items():
            now = value.double().numpy()
            old = by_hand.get(name, now)
            floats = value.is_floating_point()
            by_hand[name] = decays[-1] * old + (1 - decays[-1]) * now if floats else now
    assert decays[0] == 0
    assert decays[-1] == 0.6
    assert 0 < decays[1] < decays[2] < 0.6
    for name, value in average.module.state_dict().items():
        np.testing.assert_allclose(value, by_hand[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_without_a_decay_there_is_no_average() -> None:
    assert make_average(tiny(), Training()) is None


def test_the_average_is_a_copy_in_evaluation_mode() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    average = make_average(model, Training(ema_decay=0.9))
    assert average is not None
    assert not average.module.training
    with torch.no_grad():
        model.main.weight.zero_()
    assert torch.equal(average.module.main.weight, before["main.weight"])
