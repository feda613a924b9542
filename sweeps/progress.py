"""What the driver does as trials go: draw the progress, and write down how each trial ended."""

import json
import math
from typing import Any

from optuna.trial import TrialState
from ray.tune import Callback
from ray.tune.experiment import Trial
from tqdm import tqdm

from sweeps import tracking
from sweeps.search import COUNTER, state_of
from sweeps.space import NUMBER
from sweeps.trial import Job

STATES = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAILED",
}


class SweepProgress(Callback):
    """Told by Tune of every fold and every end. Holds nothing that cannot be pickled."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.best = -math.inf
        self.bar: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bar": None}

    def _line(self, text: str) -> None:
        if self.bar is None:
            folds = self.job.sweep.protocol.folds
            total = self.job.sweep.count * folds
            self.bar = tqdm(total=total, desc=f"sweep {self.job.sweep.name}", unit="fold")
        self.bar.write(text)
        self.bar.refresh()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """A fold is finished."""
        if not math.isfinite(result["score"]):
            return
        folds, done, score = self.job.sweep.protocol.folds, result[COUNTER], result["score"]
        self._line(f"trial {trial.config[NUMBER]}: {done} of {folds} folds, mean score {score:.4f}")
        if done == folds:
            self.best = max(self.best, score)
            self.bar.set_postfix_str(f"best {self.best:.4f}")
        self.bar.update(1)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """A trial has trained all its folds, was stopped by ASHA, or could not be trained."""
        self._ended(trial, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """A trial's process died or raised what it must not, more often than is forgiven."""
        if trial.status == Trial.ERROR:
            reason = (trial.get_error().__str__() or "error")[-2000:]
            self._ended(trial, {"reason": reason, **(trial.last_result or {})}, error=True)

    def _ended(self, trial: Trial, result: dict[str, Any], *, error: bool = False) -> None:
        folds = self.job.sweep.protocol.folds
        state = STATES[state_of(result, folds, error=error)]
        point = dict(trial.config)
        number = point.pop(NUMBER)
        folder = self.job.folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        scores = [result[f"score_fold_{n}"] for n in range(folds) if f"score_fold_{n}" in result]
        outcome = {
            "trial": number,
            "state": state,
            "config": point,
            "score": result.get("score") if state != "FAILED" else None,
            "scores": scores if state != "FAILED" else [],
            "cost_seconds": result.get("cost_seconds", 0.0),
            "reason": str(result.get("reason", "")),
        }
        scratch = folder / "outcome.tmp"
        scratch.write_text(json.dumps(outcome, indent=1))
        scratch.rename(folder / "outcome.json")
        client = tracking.connect(self.job.tracking_uri)
        tracking.end_trial(client, folder, state, outcome["reason"])
        reason = f": {outcome['reason'].strip().splitlines()[-1]}" if outcome["reason"] else ""
        self._line(f"trial {number}: {state}{reason}")
        self.bar.total -= folds - len(scores)
        self.bar.refresh()
