"""What a study's trials say of its parameters: importances on each branch, and tables.

The sums are Optuna's; decided here is which trials each of them is given.
"""

import copy
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.importance import (
    BaseImportanceEvaluator,
    FanovaImportanceEvaluator,
    PedAnovaImportanceEvaluator,
    get_param_importances,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

COST = "cost_seconds"
"""The user attribute in which a trial says what it cost."""

FEWEST = 8
"""With fewer complete trials no importance is told: a forest of them would describe noise."""

STEADY = 5
"""Trials that PED-ANOVA's best group should hold at least (Optuna's documentation)."""

DEPTH = 8
"""Of fANOVA's trees. Optuna's 64 takes seven times as long with 1,000 trials, for the same shares
to 0.01."""

DRAWN = 200
"""Trials drawn as lines or interpolated between: a browser is slow with more."""

COLOURS = {TrialState.COMPLETE: "#2171b5", TrialState.PRUNED: "#f16913", TrialState.FAIL: "#cb181d"}

COLUMNS = ["branch", "parameter", "fanova", "ped_anova", "trials", "note"]


# Which trials: views of the study


def value_names(study: optuna.Study) -> list[str]:
    """The study's own names of its objectives; score, cost, value_2, ... if it has none."""
    known = ["score", "cost"]
    count = len(study.directions)
    return study.metric_names or [*known, *(f"value_{n}" for n in range(2, count))][:count]


def view(
    study: optuna.Study,
    values: Callable[[FrozenTrial], Sequence[float]],
    directions: Sequence[StudyDirection],
) -> optuna.Study:
    """A copy in memory in which complete trials have other values; numbers and times are kept.

    Optuna's functions take a `target` for that, and then draw no best so far, colour high scores
    as bad ones, and let PED-ANOVA look for low ones. A complete trial without finite values stands
    in the copy as failed.
    """
    copied = optuna.create_study(directions=directions)
    for trial in study.get_trials(deepcopy=False):
        other = copy.copy(trial)
        other.user_attrs = {}  # Optuna writes them into every hover text
        other.values = None
        if trial.state == TrialState.COMPLETE:
            found = [float(value) for value in values(trial)]
            finite = all(math.isfinite(value) for value in found)
            other.state = TrialState.COMPLETE if finite else TrialState.FAIL
            other.values = found if finite else None
        copied.add_trial(other)
    return copied


def score_view(study: optuna.Study) -> optuna.Study:
    """The study as if its first objective, the score, were all there is."""
    return view(study, lambda trial: trial.values[:1], study.directions[:1])


def tradeoff_view(study: optuna.Study) -> tuple[optuna.Study, list[str]]:
    """The study with all its objectives, or with the score and what a trial cost; their names."""
    names = value_names(study)
    costly = any(COST in trial.user_attrs for trial in complete(study))
    if len(names) > 1 or not costly:
        return view(study, lambda trial: trial.values, study.directions), names

    def score_and_cost(trial: FrozenTrial) -> list[float]:
        return [trial.values[0], trial.user_attrs.get(COST, math.nan)]

    both = [study.directions[0], StudyDirection.MINIMIZE]
    return view(study, score_and_cost, both), [*names, COST]


def early_view(study: optuna.Study) -> tuple[optuna.Study, str]:
    """The study as it stood at the trials' first report, those that were stopped later among them.

    What survived pruning is few and alike; at the first rung every trial has a score. Returns no
    trials where none was pruned, and the words that say when: steps are thousandths of a fold.
    """
    both = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    told = [trial for trial in both if trial.intermediate_values]
    early = optuna.create_study(direction=study.directions[0])
    if all(trial.state == TrialState.COMPLETE for trial in told):
        return early, " without pruning"
    step, _ = Counter(min(trial.intermediate_values) for trial in told).most_common(1)[0]
    for trial in told:
        score = trial.intermediate_values.get(step, math.nan)
        if math.isfinite(score):
            other = copy.copy(trial)
            other.user_attrs, other.intermediate_values = {}, {}
            other.state, other.values = TrialState.COMPLETE, [score]
            early.add_trial(other)
    return early, f" after {step / 1000:g} folds"


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def thinned(study: optuna.Study) -> optuna.Study:
    """At most DRAWN complete trials, evenly through their ranking and the best among them."""
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    ranking = sorted(complete(study), key=lambda trial: sign * trial.values[0])
    few = optuna.create_study(direction=study.direction)
    few.add_trials(ranking[:: math.ceil(len(ranking) / DRAWN) or 1])
    return few


# Importances


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Trials of a define-by-run study that can be judged together, by what they all drew."""

    label: str
    trials: list[FrozenTrial]
    params: list[str]


def branches(trials: list[FrozenTrial]) -> list[Branch]:
    """All trials by what every one drew; then, for what only some drew, those by what they share.

    Parameters that were drawn by the same trials have one branch.
    """
    groups: dict[frozenset[int], list[str]] = {}
    for name in sorted({name for trial in trials for name in trial.params}):
        drew = frozenset(trial.number for trial in trials if name in trial.params)
        groups.setdefault(drew, []).append(name)
    always = groups.pop(frozenset(trial.number for trial in trials), [])
    found = [Branch(label="all", trials=trials, params=always)]
    for drew, names in groups.items():
        inside = [trial for trial in trials if trial.number in drew]
        outside = [trial for trial in trials if trial.number not in drew]
        parents = conditions(inside, outside, names)
        label = " and ".join(f"{n} = {' or '.join(map(str, v))}" for n, v in parents.items())
        fixed = {name for name, values in parents.items() if len(values) == 1}
        shared = sorted(set.intersection(*(set(trial.params) for trial in inside)) - fixed)
        label = label or f"with {', '.join(names)}"
        found.append(Branch(label=label, trials=inside, params=shared))
    return found


def conditions(
    inside: list[FrozenTrial], outside: list[FrozenTrial], names: list[str]
) -> dict[str, list[Any]]:
    """The one or two choices that set trials apart from the others, none if there are no such.

    They are read off the trials, as a study does not know why a parameter was not drawn.
    """
    candidates: list[tuple[str, list[Any]]] = []
    for name, distribution in sorted(inside[0].distributions.items()):
        drawn = all(name in trial.params for trial in inside) and name not in names
        if drawn and isinstance(distribution, CategoricalDistribution):
            values = [trial.params[name] for trial in inside]
            candidates.append((name, [each for each in distribution.choices if each in values]))
    candidates.sort(key=lambda each: len(each[1]))

    def fits(trial: FrozenTrial, chosen: tuple[tuple[str, list[Any]], ...]) -> bool:
        return all(name in trial.params and trial.params[name] in own for name, own in chosen)

    for size in (1, 2):
        for chosen in itertools.combinations(candidates, size):
            if not any(fits(trial, chosen) for trial in outside):
                return dict(chosen)
    return {}


def importance_table(study: optuna.Study) -> pd.DataFrame:
    """What each parameter explains of the score, in all trials and in each branch.

    Where trials were pruned, also of the score that every trial had at its first report.
    Shares add to one in a branch; where there is nothing to tell they are NaN, and `note` is why.
    """
    early, when = early_view(study)
    rows = [
        {**row, "branch": f"{row['branch']}{words}"}
        for trials, words in ((complete(score_view(study)), ""), (complete(early), when))
        if trials or not words
        for branch in branches(trials)
        for row in sorted(assess(branch, study.directions[0]), key=_rank)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _rank(row: dict[str, Any]) -> float:
    return -float(np.nan_to_num([row["fanova"], row["ped_anova"]], nan=-1.0).sum())


def assess(branch: Branch, direction: StudyDirection) -> list[dict[str, Any]]:
    """The rows of one branch. What cannot be told has a note instead."""
    notes = {name: _unfit(branch.trials, name) for name in branch.params or [""]}
    fit = [name for name, reason in notes.items() if not reason]
    fanova: dict[str, float] = {}
    ped_anova: dict[str, float] = {}
    if len(fit) == 1:
        notes[fit[0]] = "the only parameter that varies: nothing to compare it with"
    elif fit:
        judged = _standard(branch.trials, fit, direction)
        best = min(max(0.1, STEADY / len(branch.trials)), 0.5)
        fanova = _shares(judged, FanovaImportanceEvaluator(max_depth=DEPTH, seed=0), fit)
        ped_anova = _shares(judged, PedAnovaImportanceEvaluator(target_quantile=best), fit)
        if not ped_anova:
            notes |= dict.fromkeys(fit, "PED-ANOVA: too many trials tie with the best")
    return [
        {
            "branch": branch.label,
            "parameter": name,
            "fanova": fanova.get(name, math.nan),
            "ped_anova": ped_anova.get(name, math.nan),
            "trials": len(branch.trials),
            "note": reason,
        }
        for name, reason in notes.items()
    ]


def _unfit(trials: list[FrozenTrial], name: str) -> str:
    """Why the importance of a parameter cannot be told, empty if it can."""
    if len(trials) < FEWEST:
        return f"not enough trials ({len(trials)}) to judge"
    if not name:
        return "no parameter that all of them drew"
    if len({trial.values[0] for trial in trials}) == 1:
        return "all scores are equal"
    if len({str(trial.distributions[name]) for trial in trials}) > 1:
        return "drawn from different ranges"
    if len({trial.params[name] for trial in trials}) == 1:
        return "one value only"
    return ""


def _standard(
    trials: list[FrozenTrial], names: list[str], direction: StudyDirection
) -> optuna.Study:
    """The trials as fANOVA should see them: scores standardised, log parameters as logarithms.

    Optuna's fANOVA averages over the plain range, nine tenths of which are a log range's last
    decade, and its forest does not split a variance below 1e-16.
    """
    scores = np.array([trial.values[0] for trial in trials])
    scores = scores / np.abs(scores).max()
    scores = (scores - scores.mean()) / scores.std()
    study = optuna.create_study(direction=direction)
    for trial, score in zip(trials, scores, strict=True):
        drawn = {n: _plain(trial.params[n], trial.distributions[n]) for n in names}
        params = {name: value for name, (value, _) in drawn.items()}
        distributions = {name: distribution for name, (_, distribution) in drawn.items()}
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=float(score))
        )
    return study


def _plain(value: Any, distribution: BaseDistribution) -> tuple[Any, BaseDistribution]:
    if not isinstance(distribution, FloatDistribution | IntDistribution) or not distribution.log:
        return value, distribution
    low, high = math.log10(distribution.low), math.log10(distribution.high)
    return min(max(math.log10(value), low), high), FloatDistribution(low, high)


def _shares(
    study: optuna.Study, evaluator: BaseImportanceEvaluator, names: list[str]
) -> dict[str, float]:
    """Importances that add to one; none where Optuna finds none (it would then call all equal)."""
    with warnings.catch_warnings():
        # `normalize` is marked as experimental: False is what the evaluator itself returns.
        warnings.filterwarnings("ignore", "Argument ``normalize``", ExperimentalWarning)
        # Too many ties: it is told in the table.
        warnings.filterwarnings("ignore", "Target and region quantiles", UserWarning)
        found = get_param_importances(study, evaluator=evaluator, params=names, normalize=False)
    total = sum(found.values())
    return {name: float(share / total) for name, share in found.items()} if total > 0 else {}


# Tables


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """One row a trial; a pruned one has the value that it had when it was stopped.

    A drawn None is written as the word, so that it is not taken for a parameter never drawn.
    """
    names = value_names(study)
    rows = [_row(trial, names) for trial in study.get_trials(deepcopy=False)]
    return pd.DataFrame(rows, dtype=object)


def _row(trial: FrozenTrial, names: list[str]) -> dict[str, Any]:
    values = trial.values or [None] * len(names)
    row = {"number": trial.number, "state": trial.state.name}
    row |= dict(zip(names, values, strict=True))
    row[COST] = trial.user_attrs.get(COST)
    row["duration_seconds"] = trial.duration.total_seconds() if trial.duration else None
    params = {name: "None" if v is None else v for name, v in sorted(trial.params.items())}
    return row | {f"params_{name}": value for name, value in params.items()}


def pareto_table(study: optuna.Study) -> pd.DataFrame:
    """The complete trials that none beats in all objectives at once, best score first.

    A study of the score alone is judged by the score and the trials' costs, or where none are told
    by the score, which leaves the best trial.
    """
    tradeoff, names = tradeoff_view(study)
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    front = sorted(tradeoff.best_trials, key=lambda trial: sign * trial.values[0])
    rows = []
    for trial in front:
        params = {name: v for name, v in _row(trial, names).items() if name.startswith("params_")}
        rows.append(
            {"number": trial.number, **dict(zip(names, trial.values, strict=True)), **params}
        )
    return pd.DataFrame(rows, columns=None if rows else ["number", *names], dtype=object)
