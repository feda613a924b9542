"""What a sweep asks for: its settings, the space it searches, and the points it tries first."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import optuna

from brstnet.config import Protocol, Settings, Training, build, plain, preset
from brstnet.training.model import timm_name

UNFAIR = {
    "stopping": "early stopping scores a fold by its best epoch, fixed by its last",
    "seed": "the champion would be the luckiest seed; the finalists' seeds are `seeds`",
}
"""Training settings that would make the scores of trials incomparable, and why."""

SEARCHABLE = (*(f.name for f in fields(Training) if f.name not in UNFAIR), "store")

IMPLIED: dict[str, dict[str, list[Any]]] = {
    "aux_weight": {"auxnet": [True]},
    "aux_target": {"auxnet": [True]},
    "momentum": {"optimizer": ["sgd"]},
    "warmup_epochs": {"frozen": [False]},
    "drop_path": {"frozen": [False]},
    "augmentation": {"frozen": [False]},
    "backbone_learning_rate": {"frozen": [False]},
}
"""Settings that do nothing on some branch: not drawn there, where the space has the branch."""

NUMBERS = {
    f.name: f.type in (int, int | None)
    for f in fields(Training)
    if f.type in (int, int | None, float, float | None)
}
"""What a range can be of, and whether it is of whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep. A trial is one configuration, trained on all folds one after the other.

    Args:
        name: of the sweep; a second run with the same name resumes.
        preset: paper, code or best: what protocol and training take where nothing else is said.
        protocol: the same for every trial, so that their scores can be compared.
        training: settings of every trial, where the space does not say otherwise.
        stores: name -> path of patch stores of the same spots, for a space that searches `store`
            (another window or stain); `--store` is the one that all others must agree with.
        space: name of a training setting -> list of choices, {low, high, log: bool}, or either
            with a condition: {choices: [...], when: {optimizer: adamw}}.
        points: configurations to try first, or the words paper, code, best (the presets') and
            champion (the registered one's); the paper's own setting is always the very first.
        search: grid (every combination of the lists), tpe, random, or cmaes (of numbers alone).
        objective: `score`, or `score_and_cost`: the search looks for what cannot be beaten in both.
        trials: how many; null with a grid means all of it.
        pruning: asha stops trials that fall behind others inside a fold and across folds.
        grace_folds: asha: no trial is stopped before so many folds, which may be a fraction.
        reduction_factor: asha: one in so many goes on at each rung.
        paired_p: a trial is stopped when a paired test over the validation sections says with this
            p that the best complete trial is better; null makes no such test.
        finalists: how many of the best configurations are trained again with other seeds.
        seeds: how many seeds a finalist has in the end; 1 trains nothing again.
        champion_rule: one_se takes a clearly cheaper configuration within one standard error of
            the best, best the highest score.
        refit: train the champion once more, on all training patients.
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
    stores: dict[str, str] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any] | str] = field(default_factory=list)
    search: Literal["grid", "tpe", "random", "cmaes"] = "tpe"
    objective: Literal["score", "score_and_cost"] = "score"
    trials: int | None = None
    pruning: Literal["asha", "none"] = "asha"
    grace_folds: float = 0.5
    reduction_factor: int = 3
    paired_p: float | None = 0.1
    finalists: int = 3
    seeds: int = 1
    champion_rule: Literal["one_se", "best"] = "one_se"
    refit: bool = False
    workers_per_trial: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    concurrent_trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_space(self)

    @property
    def count(self) -> int:
        """Number of trials that are searched; the finalists' repeats come on top."""
        if self.trials is not None and self.search != "grid":
            return self.trials
        whole = len(first_points(self))
        return whole if self.trials is None else min(self.trials, whole)

    def settings(self, point: Mapping[str, Any]) -> Settings:
        """The settings of a trial at a point of the space.

        Raises:
            ValueError: the point does not make valid settings.
        """
        training = {**plain(self.training), **point}
        training.pop("store", None)
        return build(
            Settings, {"protocol": plain(self.protocol), "training": training}, f"trial {point}"
        )

    def identity(self) -> dict[str, Any]:
        """What must not change while a sweep of one name goes on: what makes trials comparable."""
        free = {"trials", "points", "finalists", "seeds", "champion_rule", "refit"}
        free |= {"cpus_per_worker", "gpus_per_worker", "concurrent_trials", "preset"}
        return {key: value for key, value in plain(self).items() if key not in free}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One trial: a point of the space, and which repeat of it (0 is the search's own)."""

    number: int
    point: dict[str, Any]
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the trial's folder."""
        return f"{self.number:04d}" + (f"-seed{self.seed}" if self.seed else "")


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
    _check_stores(sweep)
    if sweep.search == "cmaes" and not any(choices(v) is None for v in sweep.space.values()):
        raise ValueError("search: cmaes needs a range {low: , high: } in the space; use tpe")
    if sweep.search == "cmaes" and sweep.objective != "score":
        raise ValueError(f"search: cmaes knows one objective, got {sweep.objective}; use tpe")
    drawing_order(sweep.space)
    _check_conditions(sweep.space)
    _check_values(sweep)
    _check_points(sweep)


def _check_points(sweep: Sweep) -> None:
    for point in sweep.points:
        if isinstance(point, str):
            continue
        if unknown := set(point) - set(sweep.space):
            raise ValueError(f"points: {sorted(unknown)} are not in the space: {list(sweep.space)}")
        for name, value in point.items():
            if not contains(sweep.space[name], value):
                raise ValueError(
                    f"points: {name} {value!r} is not in space.{name}: {sweep.space[name]}"
                )
        sweep.settings(point)
    for point in first_points(sweep):  # a grid has many, of values that were checked one by one
        training = {name: value for name, value in point.items() if name != "store"}
        try:
            Settings(protocol=sweep.protocol, training=replace(sweep.training, **training))
        except ValueError as error:
            raise ValueError(f"trial {point}: {error}") from error


def _check_conditions(space: Mapping[str, Any]) -> None:
    for name in space:
        for parent, wanted in _written(name, space).items():
            listed = choices(space[parent])
            if never := [value for value in wanted if value not in (listed or [])]:
                raise ValueError(
                    f"space.{name}: when {parent} is {never} can never hold: it must be among "
                    f"the choices of {parent}, which are {listed or 'a range'}"
                )


def _check_stores(sweep: Sweep) -> None:
    asked = choices(sweep.space.get("store", [])) or []
    if unknown := [name for name in asked if name not in sweep.stores]:
        raise ValueError(
            f"space.store: {unknown} must be among the sweep's stores, which are "
            f"{sorted(sweep.stores)}: add them as stores: {{NAME: PATH}}"
        )


def _check_numbers(sweep: Sweep) -> None:
    if not sweep.name or set(sweep.name) & set("/\\'\" "):
        raise ValueError(f"name must be usable as a folder, got {sweep.name!r}")
    lowest = {"workers_per_trial": 1, "cpus_per_worker": 1, "reduction_factor": 2}
    lowest |= {"finalists": 1, "seeds": 1}
    for name, least in lowest.items():
        if getattr(sweep, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(sweep, name)}")
    if not 0 < sweep.grace_folds <= sweep.protocol.folds:
        raise ValueError(
            f"grace_folds ({sweep.grace_folds}) must be above 0 and not exceed protocol.folds "
            f"({sweep.protocol.folds})"
        )
    if sweep.paired_p is not None and not 0 < sweep.paired_p < 1:
        raise ValueError(f"paired_p must be between 0 and 1, or null; got {sweep.paired_p}")
    if sweep.trials is None and sweep.search != "grid":
        raise ValueError(f"trials must be given for search: {sweep.search}")
    for name in ("trials", "concurrent_trials"):
        if (number := getattr(sweep, name)) is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if sweep.gpus_per_worker is not None and sweep.gpus_per_worker < 0:
        raise ValueError(f"gpus_per_worker must not be negative, got {sweep.gpus_per_worker}")


def _check_values(sweep: Sweep) -> None:
    """Every choice of every list, and both ends of every range, alone and without AuxNet."""
    branches: list[dict[str, Any]] = [{}]
    if False in (choices(sweep.space.get("auxnet", [])) or []):
        branches.append({"auxnet": False})
    for name, values in sweep.space.items():
        listed = choices(values)
        parents = {k: v[0] for k, v in condition(name, sweep.space).items()}
        for value in listed if listed is not None else (values["low"], values["high"]):
            for branch in branches:
                point = {**branch, **parents, name: value}
                timm_name(sweep.settings(point).training.backbone)


def _check_range(name: str, values: object, *, grid: bool) -> None:
    if isinstance(values, list) and values:
        return
    known = set(values) - {"when"} if isinstance(values, dict) else set()
    if isinstance(values, dict) and not isinstance(values.get("when", {}), dict):
        raise ValueError(f"space.{name}: when must be {{NAME: VALUE}}, got {values['when']!r}")
    if isinstance(values, dict) and known == {"choices"} and values["choices"]:
        if grid:
            raise ValueError(
                f"space.{name}: a grid has no branches; write its points, got {values}"
            )
        return
    if isinstance(values, dict) and {"low", "high"} <= known <= {"low", "high", "log"}:
        if grid:
            raise ValueError(f"space.{name}: a grid needs a list of choices, got {values}")
        if name not in NUMBERS:
            raise ValueError(f"space.{name} is no number: it must be a list of choices: {values}")
        if not values["low"] < values["high"] or (values.get("log") and values["low"] <= 0):
            raise ValueError(f"space.{name}: low must be below high, and above 0 if log: {values}")
        return
    raise ValueError(
        f"space.{name} must be a list of choices, {{low: , high: , log: true}} or {{choices: }}, "
        f"maybe with when: {{NAME: VALUE}}; got {values!r}"
    )


def choices(values: object) -> list[Any] | None:
    """The choices of an entry of the space, or None if it is a range of numbers."""
    listed = values.get("choices") if isinstance(values, dict) else values
    return listed if isinstance(listed, list) else None


def condition(name: str, space: Mapping[str, Any]) -> dict[str, list[Any]]:
    """On which branch a setting is drawn: the name of another -> the values it must have."""
    implied = {k: v for k, v in IMPLIED.get(name, {}).items() if k in space}
    return {**implied, **_written(name, space)}


def _written(name: str, space: Mapping[str, Any]) -> dict[str, list[Any]]:
    entry: Any = space[name]
    own: dict[str, Any] = entry.get("when", {}) if isinstance(entry, dict) else {}
    return {k: v if isinstance(v, list) else [v] for k, v in own.items()}


def drawing_order(space: Mapping[str, Any]) -> list[str]:
    """The names of the space, each after those that its condition asks about.

    Raises:
        ValueError: a condition names what is not in the space, or what depends on it in turn.
    """
    order: list[str] = []
    left = list(space)
    while left:
        ready = [name for name in left if set(condition(name, space)) <= set(order)]
        if not ready:
            names = ", ".join(f"{name} needs {sorted(condition(name, space))}" for name in left)
            raise ValueError(
                f"space: when must name other settings of the space, and not in a circle: {names}"
            )
        order += ready
        left = [name for name in left if name not in ready]
    return order


def is_drawn(name: str, space: Mapping[str, Any], drawn: Mapping[str, Any]) -> bool:
    """Whether a setting is drawn where these others were."""
    wanted = condition(name, space)
    return all(key in drawn and drawn[key] in values for key, values in wanted.items())


def first_points(sweep: Sweep, champion: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The points to try first: the paper's own setting as far as the space reaches, then the rest.

    A grid is nothing but its points. The word champion stands for nothing while there is none.
    """
    points = [within(asdict(Training()), sweep.space)]
    for point in sweep.points:
        if not isinstance(point, str):
            points.append(point)
        elif point == "champion":
            points += [within(champion, sweep.space)] if champion else []
        else:
            points.append(within(_training_of(point), sweep.space))
    if sweep.search == "grid":
        names = list(sweep.space)
        lists = [choices(values) or [] for values in sweep.space.values()]
        grid = [dict(zip(names, p, strict=True)) for p in itertools.product(*lists)]
        points = [*(p for p in points if p in grid), *grid]
    unique: list[dict[str, Any]] = []
    for point in points:
        if point not in unique:
            unique.append(point)
    return unique


def _training_of(name: str) -> dict[str, Any]:
    said = {k.removeprefix("training."): v for k, v in preset(name, "training").items()}
    return {**asdict(Training()), **said}


def within(training: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training the space reaches, without what is not drawn on its branch."""
    point: dict[str, Any] = {}
    for name in drawing_order(space):
        if not is_drawn(name, space, point) or name not in training:
            continue
        if contains(space[name], training[name]):
            point[name] = training[name]
    return {name: point[name] for name in space if name in point}


def contains(values: object, value: object) -> bool:
    """Whether a list of choices or a range holds a value."""
    listed = choices(values)
    if listed is not None:
        return value in listed
    assert isinstance(values, dict)
    return isinstance(value, int | float) and values["low"] <= value <= values["high"]


def suggest(trial: optuna.Trial, space: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a point of the space (Optuna, define by run): on each branch what does something there.

    A trial that was drawn in part before a crash keeps that part.
    """
    drawn: dict[str, Any] = {}
    for name in drawing_order(space):
        values = space[name]
        if not is_drawn(name, space, drawn):
            continue
        listed = choices(values)
        if listed is not None:
            drawn[name] = trial.suggest_categorical(name, listed)
            continue
        low, high, log = values["low"], values["high"], values.get("log", False)
        if NUMBERS[name]:
            drawn[name] = int(trial.suggest_int(name, low, high, log=log))
        else:  # a point to try first may say 1, and the study on disk 1.0
            drawn[name] = float(trial.suggest_float(name, low, high, log=log))
    return {name: drawn[name] for name in space if name in drawn}
