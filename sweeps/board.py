"""The sweep's ledger: which trials there are, how each ended, and which comes next.

What is known lies on disk, in the Optuna study and in the trials' folders, and nothing else is
needed to go on: the state that Tune keeps of an experiment is not read. So a sweep that was killed
at any moment goes on with the same trials, and a thousand of them are taken up in seconds.
"""

import fcntl
import json
import math
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sweeps.events import mend
from sweeps.pruning import pruner_of
from sweeps.space import Asked, Sweep, first_points, suggest

WAIT = "wait"
"""There is nothing to begin now, but there may be when a trial ends."""

ENOUGH = 5
"""So many trials must have ended before their mean cost says what others will cost."""

STATES = {
    "COMPLETE": TrialState.COMPLETE,
    "PRUNED": TrialState.PRUNED,
    "FAILED": TrialState.FAIL,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sweep may cost. When it is reached nothing new begins; what runs is finished.

    Args:
        gpu_hours: of all trials together, those of earlier starts too; in a sweep without GPUs, of
            workers.
        trials: begun in all, earlier starts included.
        deadline: nothing begins that is not expected to end before it.
    """

    gpu_hours: float | None = None
    trials: int | None = None
    deadline: datetime | None = None


@dataclass(kw_only=True)
class Running:
    """A trial that was handed out, since when, and what it last reported."""

    asked: Asked
    began: float = field(default_factory=time.time)
    note: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(kw_only=True)
class Board:
    """Hands out trials and takes in how they ended. One process has it: the driver.

    Args:
        sweep: what is asked.
        study: of Optuna, on disk.
        out: the sweep's folder.
        concurrent: trials at once.
        budget: where to stop.
        trial_seconds: what a trial is expected to take, until some have ended.
        gpus_per_worker: 1 where there is no GPU, so that hours are those of workers.

    `halted` says why the sweep must stop at once, trials in training included: they go on with the
    next start.
    """

    sweep: Sweep
    study: optuna.Study
    out: Path
    concurrent: int = 1
    budget: Budget = field(default_factory=Budget)
    trial_seconds: float = 0.0
    gpus_per_worker: float = 1.0
    running: dict[str, Running] = field(default_factory=dict, init=False)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    stopped_by: str = field(default="", init=False)
    halted: str = field(default="", init=False)

    def __post_init__(self) -> None:
        ledger = self.out / "rungs.jsonl"
        self._pruner = None if self.sweep.pruning == "none" else pruner_of(self.sweep, ledger)
        self._trials: dict[int, optuna.Trial] = {}
        self._unfinished: list[FrozenTrial] = []
        self.outcomes |= {name_of(o): o for o in load_outcomes(self.out)}
        for outcome in self.complete:  # the driver may have been killed between two notes
            self._tell_pruner(outcome)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            known = self.outcomes.get(Asked(number=trial.number, point={}).name)
            if known is None:
                self._unfinished.append(trial)
            else:
                self._trials[trial.number] = optuna.Trial(self.study, trial._trial_id)
                self._tell(known)
        self._begun = len(self.searched) + len(self._unfinished)

    @property
    def searched(self) -> list[dict[str, Any]]:
        """The outcomes of the search, without the finalists' repeats."""
        return [outcome for outcome in self.outcomes.values() if not outcome["seed"]]

    @property
    def complete(self) -> list[dict[str, Any]]:
        """The complete trials of the search, best first."""
        found = [outcome for outcome in self.searched if outcome["state"] == "COMPLETE"]
        return sorted(found, key=lambda outcome: (-outcome["score"], outcome["trial"]))

    @property
    def goal(self) -> int:
        """Trials that are searched in the end, as far as is known."""
        limit = self.budget.trials
        return self.sweep.count if limit is None else min(self.sweep.count, limit)

    @property
    def done(self) -> bool:
        """Whether nothing is left to be trained."""
        return not self._unfinished and len(self.searched) >= self.goal and not self._repeats()

    def next(self) -> Asked | str | None:
        """The next trial to begin; WAIT if there is none now; None if there will be none."""
        if len(self.running) >= self.concurrent:
            return WAIT
        asked = self._resumed() or self._drawn() or self._repeated()
        if asked is not None:
            self.running[asked.name] = Running(asked=asked)
            return asked
        if self.running:
            return WAIT
        self.stopped_by = self._reached()
        return None

    def _resumed(self) -> Asked | None:
        if not self._unfinished:
            return None
        left = self._unfinished.pop(0)
        self.study.sampler = TrialSampler(self.sweep, left.number)
        return self._asked(optuna.Trial(self.study, left._trial_id))

    def _drawn(self) -> Asked | None:
        if self._begun >= self.goal or self._too_much():
            return None
        self.study.sampler = TrialSampler(self.sweep, self._begun)
        trial = self.study.ask()
        self._begun += 1
        return self._asked(trial)

    def _asked(self, trial: optuna.Trial) -> Asked:
        self._trials[trial.number] = trial
        return Asked(number=trial.number, point=suggest(trial, self.sweep.space))

    def _repeated(self) -> Asked | None:
        """A finalist with another seed, once every trial of the search has ended."""
        if any(trial.asked.seed == 0 for trial in self.running.values()):
            return None
        left = [asked for asked in self._repeats() if asked.name not in self.running]
        return left[0] if left and not self._too_much() else None

    def _repeats(self) -> list[Asked]:
        """The finalists' repeats that have not ended."""
        all_of_them = [
            Asked(number=outcome["trial"], point=outcome["config"], seed=seed)
            for seed in range(1, self.sweep.seeds)
            for outcome in self.complete[: self.sweep.finalists]
        ]
        return [asked for asked in all_of_them if asked.name not in self.outcomes]

    def _too_much(self) -> str:
        """Why one more trial is not expected to stay within the budget, beside those that run."""
        each, limit = self.expected_trial_seconds(), self.budget.gpu_hours
        hours = self.spent_hours() + each * (len(self.running) + 1) * self._per_hour
        if limit is not None and hours > limit:
            return f"the budget of {limit:g} GPU-hours leaves no room for another trial"
        deadline, seconds = self.budget.deadline, each / self.sweep.workers_per_trial
        if deadline is not None and time.time() + seconds > deadline.timestamp():
            return f"no other trial would end before {deadline.isoformat(' ', 'minutes')}"
        return ""

    def _reached(self) -> str:
        """What ended the sweep, if it is not that all was trained."""
        if not self.done:
            return self._too_much()
        return f"{self.goal} trials were asked for" if self.goal < self.sweep.count else ""

    @property
    def _per_hour(self) -> float:
        return self.gpus_per_worker / 3600

    def expected_trial_seconds(self) -> float:
        """Seconds of all its workers that a trial takes: the mean so far, or what was planned."""
        costs = [outcome["cost_seconds"] for outcome in self.outcomes.values()]
        return float(np.mean(costs)) if len(costs) >= ENOUGH else self.trial_seconds

    def spent_hours(self) -> float:
        """GPU-hours of all trials that ended; of workers where there is no GPU."""
        return sum(o["cost_seconds"] for o in self.outcomes.values()) * self._per_hour

    def report(self, name: str, note: dict[str, Any]) -> str:
        """Take in a trial's standing; a reason to stop it, or nothing."""
        trial = self.running[name]
        trial.note = note
        number, score = trial.asked.number, note["score"]
        if trial.asked.seed or note.get("reason"):
            return ""
        if self.sweep.objective == "score" and math.isfinite(score):
            self._trials[number].report(score, round(1000 * note["progress"]))
        if self._pruner is not None and note["folds_done"] < self.sweep.protocol.folds:
            trial.reason = self._pruner.judge(number, note["progress"], score, note["sections"])
        return trial.reason

    def end(self, name: str, error: str = "") -> dict[str, Any]:
        """Take in that a trial has ended, on disk first; its outcome."""
        trial = self.running.pop(name)
        note, asked = trial.note, trial.asked
        state = state_of(note, self.sweep.protocol.folds, error=error)
        outcome = {
            "trial": asked.number,
            "seed": asked.seed,
            "state": state,
            "config": asked.point,
            "score": None if state == "FAILED" else finite(note["score"]),
            "scores": note.get("scores", []),
            "sections": note.get("sections", {}),
            "cost_seconds": note.get("cost_seconds", 0.0),
            "reason": error or note.get("reason", "") or trial.reason,
        }
        self.outcomes[name] = outcome
        write_outcome(self.out / "trials" / name, outcome)
        if not asked.seed:
            self._tell(outcome)
            self._tell_pruner(outcome)
        return outcome

    def _tell_pruner(self, outcome: Mapping[str, Any]) -> None:
        if outcome["state"] == "COMPLETE" and self._pruner is not None:
            self._pruner.complete(outcome["trial"], outcome["score"], outcome["sections"])

    def _tell(self, outcome: Mapping[str, Any]) -> None:
        """Tell Optuna; a trial that was stopped keeps what it reported, and has no value."""
        trial, cost = self._trials.pop(outcome["trial"]), outcome["cost_seconds"]
        trial.set_user_attr("cost_seconds", cost)
        both = self.sweep.objective == "score_and_cost"
        values = [outcome["score"], cost] if both else outcome["score"]
        state = STATES[outcome["state"]]
        complete = state == TrialState.COMPLETE
        self.study.tell(trial, values if complete else None, state=state)


def state_of(note: Mapping[str, Any], folds: int, error: str = "") -> str:
    """What became of a trial: COMPLETE with all folds, PRUNED with fewer, FAILED by its fault."""
    if error or not note or note.get("reason"):
        return "FAILED"
    if note["folds_done"] < folds:
        return "PRUNED"
    return "COMPLETE" if math.isfinite(note["score"]) else "FAILED"


def name_of(outcome: Mapping[str, Any]) -> str:
    """The name of a trial's folder."""
    return Asked(number=outcome["trial"], point={}, seed=outcome["seed"]).name


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder for this process.

    Raises:
        ValueError: another process has it.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is running this sweep") from error
        yield


def load_outcomes(out: Path) -> list[dict[str, Any]]:
    """How each ended trial of a sweep came out, by its folder's name."""
    return [read_outcome(file) for file in sorted((out / "trials").glob("*/outcome.json"))]


def read_outcome(file: Path) -> dict[str, Any]:
    """How a trial ended; a fold's or a section's score that is null on disk is NaN."""
    outcome: dict[str, Any] = json.loads(file.read_text())
    sections = outcome.get("sections", {}).items()
    return {
        **outcome,
        "scores": [math.nan if score is None else score for score in outcome["scores"]],
        "sections": {name: math.nan if pcc is None else pcc for name, pcc in sections},
    }


def write_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Note how a trial ended, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = [finite(score) for score in outcome["scores"]]
    sections = {name: finite(pcc) for name, pcc in outcome["sections"].items()}
    scratch = folder / "outcome.tmp"
    scratch.write_text(json.dumps({**outcome, "scores": scores, "sections": sections}, indent=1))
    scratch.rename(folder / "outcome.json")


def finite(value: float) -> float | None:
    """The value as JSON can say it: what is no finite number is null."""
    return value if math.isfinite(value) else None


def open_study(
    sweep: Sweep, folder: Path, champion: Mapping[str, Any] | None = None
) -> optuna.Study:
    """The study in the sweep's folder, made on first use, with the points to try first in it.

    Args:
        sweep: what is asked.
        folder: of the sweep.
        champion: the training settings of the registered champion, for the point of that name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ExperimentalWarning)  # TPE's `group`, chosen knowingly
    warnings.filterwarnings("ignore", message="The reported value is ignored")  # of resumed folds
    journal = folder / "optuna.jsonl"
    mend(journal)
    Path(f"{journal}.lock").unlink(missing_ok=True)  # a killed driver's; the folder is this one's
    storage = JournalStorage(JournalFileBackend(str(journal)))
    both = sweep.objective == "score_and_cost"
    study = optuna.create_study(
        storage=storage,
        study_name=sweep.name,
        directions=["maximize", "minimize"] if both else ["maximize"],
        load_if_exists=True,
    )
    known = [t.system_attrs.get("fixed_params") for t in study.get_trials(deepcopy=False)]
    points = [p for p in first_points(sweep, champion) if p not in known]
    for point in points[: max(0, sweep.count - len(known))]:
        study.enqueue_trial(point)
    return study


class TrialSampler(BaseSampler):
    """The sampler of one trial: a resumed sweep draws what it would have.

    What is drawn together has the trial's seed, and what is drawn alone one of its own: a driver
    that was killed between two settings of a trial leaves the next the same numbers.
    """

    def __init__(self, sweep: Sweep, number: int) -> None:
        self._sweep, self._number = sweep, number
        self._together = make_sampler(sweep, number)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What is drawn together."""
        found: dict[str, BaseDistribution] = self._together.infer_relative_search_space(
            study, trial
        )
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw it."""
        drawn: dict[str, Any] = self._together.sample_relative(study, trial, search_space)
        return drawn

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one setting alone."""
        alone = make_sampler(self._sweep, self._number, param_name)
        return alone.sample_independent(study, trial, param_name, param_distribution)


def make_sampler(sweep: Sweep, number: int, name: str = "") -> BaseSampler:
    """The search's sampler, seeded by the number of a trial and the name of a setting."""
    entropy = [sweep.seed, number, zlib.crc32(name.encode())]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    if sweep.search == "tpe":
        return TPESampler(
            n_startup_trials=min(10, max(2, sweep.count // 3)),  # Optuna's 10 may be all
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed,
        )
    if sweep.search == "cmaes":
        return CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return RandomSampler(seed=seed)  # a grid is all first points: nothing is drawn
