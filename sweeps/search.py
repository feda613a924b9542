"""The search: Optuna through Tune, with the truth told about trials that were stopped."""

import json
import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from sweeps.space import Sweep, first_points, suggest

COUNTER = "folds_done"
"""What ASHA counts. Tune's own training_iteration starts again after a restore."""


def state_of(result: Mapping[str, Any] | None, folds: int, *, error: bool = False) -> TrialState:
    """What became of a trial: COMPLETE with all folds, PRUNED with fewer, FAIL without a score."""
    if error or not result or not math.isfinite(result.get("score", math.nan)):
        return TrialState.FAIL
    return TrialState.COMPLETE if result[COUNTER] >= folds else TrialState.PRUNED


class SweepSearch(OptunaSearch):
    """Ray's OptunaSearch, except that trials which ASHA stopped are told to Optuna as PRUNED.

    As shipped they are told as COMPLETE, with their early value, and the last step never arrives.
    """

    def __init__(self, folds: int, **options: Any) -> None:
        super().__init__(metric="score", mode="max", **options)
        self._folds = folds

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna the running mean after each fold."""
        if trial_id not in self._completed_trials and math.isfinite(result["score"]):
            self._ot_trials[trial_id].report(result["score"], result[COUNTER])

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001, FBT002 - Tune's signature
    ) -> None:
        """Tell Optuna how the trial ended."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial, state = self._ot_trials[trial_id], state_of(result, self._folds, error=error)
        if state != TrialState.FAIL and result is not None:
            trial.report(result["score"], result[COUNTER])
        value = result["score"] if state == TrialState.COMPLETE and result else None
        assert self._ot_study is not None
        self._ot_study.tell(trial, value, state=state)


class FoldASHA(ASHAScheduler):
    """ASHA over folds that knows the trials which ended before a restart: Tune saves no scheduler.

    Without it, whether a trial is stopped would depend on when somebody pressed Ctrl-C.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(time_attr=COUNTER, metric="score", mode="max", **options)
        self._folder = folder
        self._remembers = False

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Fill the rungs once, from what the ended trials left on disk."""
        super().on_trial_add(tune_controller, trial)
        if self._remembers:
            return
        self._remembers = True
        for file in sorted((self._folder / "trials").glob("*/outcome.json")):
            scores = json.loads(file.read_text())["scores"]
            for milestone, recorded in self._brackets[0]._rungs:
                if len(scores) >= milestone:
                    recorded[file.parent.name] = float(np.mean(scores[: int(milestone)]))


def make_search(sweep: Sweep, folder: Path) -> SweepSearch:
    """The searcher, its study in a database in the sweep's folder, the paper's values first."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ExperimentalWarning)  # TPE's `group`, chosen knowingly
    storage = RDBStorage(
        f"sqlite:///{folder.resolve() / 'optuna.db'}",
        engine_kwargs={"connect_args": {"timeout": 60}},
    )
    return SweepSearch(
        folds=sweep.protocol.folds,
        space=partial(suggest, space=sweep.space),
        points_to_evaluate=first_points(sweep)[: sweep.count],
        study_name=sweep.name,
        storage=storage,
        sampler=_sampler(sweep),
    )


def _sampler(sweep: Sweep) -> BaseSampler:
    if sweep.search == "tpe":
        return TPESampler(
            n_startup_trials=min(10, max(2, sweep.count // 3)),  # Optuna's 10 may be all
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=sweep.seed,
        )
    return RandomSampler(seed=sweep.seed)  # a grid is all first points: nothing is drawn


def make_scheduler(sweep: Sweep, folder: Path) -> TrialScheduler:
    """ASHA over the folds of a trial, or none."""
    if sweep.pruning == "none":
        return FIFOScheduler()
    return FoldASHA(
        folder,
        max_t=sweep.protocol.folds,
        grace_period=sweep.grace_folds,
        reduction_factor=sweep.reduction_factor,
    )
