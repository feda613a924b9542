"""What a sweep asks for: its settings, the space it searches, and the points it tries first."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import optuna

from brstnet.config import Protocol, Settings, Training, build, plain
from brstnet.training.model import timm_name

NUMBER = "number"
"""Where a trial's configuration says which of the sweep's trials it is."""

UNFAIR = {
    "stopping": "early stopping scores a fold by its best epoch, fixed by its last",
    "seed": "the champion would be the luckiest seed",
}
"""Training settings that would make the scores of trials incomparable, and why."""

SEARCHABLE = tuple(f.name for f in fields(Training) if f.name not in UNFAIR)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep. A trial is one configuration, trained on all folds one after the other.

    Args:
        name: of the sweep; a second run with the same name resumes.
        preset: paper, code or best: what protocol and training take where nothing else is said.
        protocol: the same for every trial, so that their scores can be compared.
        training: settings of every trial, where the space does not say otherwise.
        space: name of a training setting -> list of choices, or {low, high, log: bool}.
        points: configurations to try first; the paper's own setting is always the very first.
        search: grid (every combination of the lists), tpe, or random.
        trials: how many; null with a grid means all of it.
        pruning: asha stops trials whose mean score over the folds so far is low.
        grace_folds: asha: no trial is stopped before so many folds.
        reduction_factor: asha: one in so many goes on at each rung.
        workers_per_trial: above 1, a trial is trained by a Ray Train worker group.
        cpus_per_worker: logical CPUs a worker takes, and its threads.
        gpus_per_worker: may be a fraction (small trials share a GPU); null takes 1 if there is one.
        concurrent_trials: trials at once; null takes what fits the cluster as it is. An autoscaling
            cluster that begins without a GPU needs it, and gpus_per_worker, to be told.
        seed: of the search.
    """

    name: str
    preset: str | None = None
    protocol: Protocol = field(default_factory=Protocol)
    training: Training = field(default_factory=Training)
    space: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    search: Literal["grid", "tpe", "random"] = "tpe"
    trials: int | None = None
    pruning: Literal["asha", "none"] = "asha"
    grace_folds: int = 1
    reduction_factor: int = 2
    workers_per_trial: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    concurrent_trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_space(self)

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.trials if self.trials is not None else len(first_points(self))

    def settings(self, point: Mapping[str, Any]) -> Settings:
        """The settings of a trial at a point of the space.

        Raises:
            ValueError: the point does not make valid settings.
        """
        training = {**plain(self.training), **point}
        return build(
            Settings, {"protocol": plain(self.protocol), "training": training}, f"trial {point}"
        )


def check_space(sweep: Sweep) -> None:
    """Check that every point of the space makes settings that can be trained.

    Raises:
        ValueError: a name is no training setting, a range is wrong, a value is not valid.
    """
    _check_numbers(sweep)
    for name, values in sweep.space.items():
        if name not in SEARCHABLE:
            hint = " (it is protocol: the same for all trials)" if hasattr(Protocol, name) else ""
            hint = f" ({UNFAIR[name]})" if name in UNFAIR else hint
            raise ValueError(
                f"space.{name} cannot be searched{hint}; valid names: {', '.join(SEARCHABLE)}"
            )
        _check_range(name, values, grid=sweep.search == "grid")
    _check_values(sweep)
    for point in first_points(sweep):
        if unknown := set(point) - set(sweep.space):
            raise ValueError(f"points: {sorted(unknown)} are not in the space: {list(sweep.space)}")
        sweep.settings(point)


def _check_numbers(sweep: Sweep) -> None:
    if not sweep.name or set(sweep.name) & set("/\\'\" "):
        raise ValueError(f"name must be usable as a folder, got {sweep.name!r}")
    lowest = {"workers_per_trial": 1, "cpus_per_worker": 1, "grace_folds": 1, "reduction_factor": 2}
    for name, least in lowest.items():
        if getattr(sweep, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(sweep, name)}")
    if sweep.grace_folds > sweep.protocol.folds:
        raise ValueError(
            f"grace_folds ({sweep.grace_folds}) must not exceed protocol.folds "
            f"({sweep.protocol.folds})"
        )
    if sweep.trials is None and sweep.search != "grid":
        raise ValueError(f"trials must be given for search: {sweep.search}")
    if sweep.trials is not None and sweep.trials < 1:
        raise ValueError(f"trials must be at least 1, got {sweep.trials}")


def _check_values(sweep: Sweep) -> None:
    """Every choice of every list, and both ends of every range, alone and without AuxNet."""
    branches: list[dict[str, Any]] = [{}]
    if False in sweep.space.get("auxnet", []):
        branches.append({"auxnet": False})
    for name, values in sweep.space.items():
        for value in values if isinstance(values, list) else (values["low"], values["high"]):
            for branch in branches:
                timm_name(sweep.settings({**branch, name: value}).training.backbone)


def _check_range(name: str, values: object, *, grid: bool) -> None:
    if isinstance(values, list) and values:
        return
    if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        if grid:
            raise ValueError(f"space.{name}: a grid needs a list of choices, got {values}")
        if not values["low"] < values["high"] or (values.get("log") and values["low"] <= 0):
            raise ValueError(f"space.{name}: low must be below high, and above 0 if log: {values}")
        return
    raise ValueError(
        f"space.{name} must be a list of choices or {{low: , high: , log: true}}, got {values!r}"
    )


def first_points(sweep: Sweep) -> list[dict[str, Any]]:
    """The points to try first: the paper's own setting as far as the space reaches, then the rest.

    A grid is nothing but its points.
    """
    paper = {
        name: getattr(Training(), name)
        for name, values in sweep.space.items()
        if contains(values, getattr(Training(), name))
    }
    points = [paper, *sweep.points]
    if sweep.search == "grid":
        names = list(sweep.space)
        grid = [dict(zip(names, p, strict=True)) for p in itertools.product(*sweep.space.values())]
        points = [*(p for p in points if p in grid), *grid]
    unique: list[dict[str, Any]] = []
    for point in points:
        if point not in unique:
            unique.append(point)
    return unique


def contains(values: list[Any] | dict[str, Any], value: object) -> bool:
    """Whether a list of choices or a range holds a value."""
    if isinstance(values, list):
        return value in values
    return isinstance(value, int | float) and values["low"] <= value <= values["high"]


def suggest(trial: optuna.Trial, space: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a point of the space (Optuna, define by run). Without AuxNet its weight is not drawn.

    Returns what goes beside the drawn values into the trial's configuration: its number.
    """
    names = sorted(space, key=lambda name: name != "auxnet")
    for name in names:
        values = space[name]
        if name in ("aux_weight", "aux_target") and trial.params.get("auxnet") is False:
            continue
        if isinstance(values, list):
            trial.suggest_categorical(name, values)
        elif isinstance(values["low"], int) and isinstance(values["high"], int):
            trial.suggest_int(name, values["low"], values["high"], log=values.get("log", False))
        else:
            trial.suggest_float(name, values["low"], values["high"], log=values.get("log", False))
    return {NUMBER: trial.number}
