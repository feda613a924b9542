"""Pruning: which trials are stopped before they have trained all their folds.

Two rules. Successive halving (Li et al. 2020, "A system for massively parallel hyperparameter
tuning"; its stopping variant): a trial goes on past a rung if it is among the best of those that
have been there. The rungs stand inside folds and across them, on a counter of finished folds plus
the share of the current one. And a paired test: at the end of a fold the trial's sections are
compared with those of the best complete trial (the idea of Optuna's WilcoxonPruner), which tells a
worse configuration from an easy patient.

Neither Ray nor torch is known here: the sweep's scheduler and the benchmark use the same code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from sweeps.space import Sweep

FORMAT = "brstnet-pruning 1"
SLACK = 1e-9
"""How far below a rung a counter made of floating-point epochs still counts as there."""
SIMULATED = 2000
"""Trials that are simulated for the plan, in sweeps of the size that is asked about."""

SHARES = {2: "half", 3: "third", 4: "quarter"}


def ladder(folds: int, grace_folds: float, reduction_factor: int) -> tuple[float, ...]:
    """The rungs: the grace period times powers of the reduction factor, below the last fold's end.

    Raises:
        ValueError: they would not climb.
    """
    if not grace_folds > 0:
        raise ValueError(f"grace_folds must be above 0, got {grace_folds}")
    if reduction_factor < 2:
        raise ValueError(f"reduction_factor must be at least 2, got {reduction_factor}")
    rungs = []
    while grace_folds < folds - SLACK:
        rungs.append(float(grace_folds))
        grace_folds *= reduction_factor
    return tuple(rungs)


@dataclass
class Record:
    """What is known of one trial: up to where it was judged, why it was stopped, if it is whole."""

    judged: float = 0.0
    stop: str = ""
    complete: bool = False


class Pruner:
    """Judges trials as they report; what it decided is on disk before the trial hears of it.

    Args:
        folds: of a complete trial.
        grace_folds: the first rung; no trial is stopped before. May be a fraction of a fold.
        reduction_factor: one in so many goes on at each rung, and the next is so many times higher.
        paired_p: a trial that is worse than the best complete one with a smaller p-value than this
            is stopped at the end of a fold; null leaves the test out.
        ledger: a file of JSON lines with every decision, from which a new Pruner goes on.

    Raises:
        ValueError: the settings do not make sense, or the ledger is another sweep's.
    """

    def __init__(
        self,
        *,
        folds: int,
        grace_folds: float,
        reduction_factor: int,
        paired_p: float | None,
        ledger: Path | None = None,
    ) -> None:
        if paired_p is not None and not 0 < paired_p < 1:
            raise ValueError(f"paired_p must be between 0 and 1, or null, got {paired_p}")
        self.rungs = ladder(folds, grace_folds, reduction_factor)
        self._folds, self._grace, self._factor = folds, grace_folds, reduction_factor
        self._paired_p = paired_p
        self._scores: dict[float, dict[int, float]] = {rung: {} for rung in self.rungs}
        self._trials: dict[int, Record] = {}
        self._best: tuple[int, float, dict[str, float]] | None = None
        self._ledger = ledger
        if ledger is not None:
            self._open(ledger)

    def due(self, before: float, done: float) -> bool:
        """Whether a trial that goes from `before` to `done` folds passes a rung."""
        return self._passed(before, done) is not None

    def judge(self, number: int, done: float, score: float, sections: Mapping[str, float]) -> str:
        """Why a trial is stopped, in a sentence for people; empty if it goes on.

        A trial that was stopped stays so, and what it reports again after a restart is not judged
        again.

        Args:
            number: of the trial.
            done: finished folds, and the share of the current one's epochs.
            score: mean of the finished folds' scores and the current one's at this epoch.
            sections: median PCC of each validation section of the finished folds.
        """
        record = self._trials.setdefault(number, Record())
        rung = self._passed(record.judged, done)
        fold_end = self._tested(record.judged, done)
        at_the_end = record.complete or done >= self._folds - SLACK
        if record.stop or at_the_end or (rung is None and not fold_end):
            return record.stop
        stop = "" if rung is None else self._at_rung(rung, number, done, score)
        if not stop and fold_end:
            stop = self._against_best(sections)
        self._write(
            {"judged": number, "done": done, "rung": rung, "score": float(score), "stop": stop}
        )
        return stop

    def complete(self, number: int, score: float, sections: Mapping[str, float]) -> None:
        """A trial has trained all its folds: the best of them is what others are tested against."""
        if not self._trials.setdefault(number, Record()).complete:
            known = {section: float(pcc) for section, pcc in sections.items()}
            self._write({"complete": number, "score": float(score), "sections": known})

    def _passed(self, before: float, done: float) -> float | None:
        """The highest rung in (before, done]; lower ones are left out, their moment is over."""
        passed = [rung for rung in self.rungs if before < rung - SLACK <= done]
        return passed[-1] if passed else None

    def _tested(self, before: float, done: float) -> bool:
        """Whether the paired test is due: a fold has ended, and the grace period is over."""
        whole = abs(done - round(done)) < SLACK and done - before > SLACK
        return self._paired_p is not None and whole and done >= self._grace - SLACK

    def _at_rung(self, rung: float, number: int, done: float, score: float) -> str:
        """Successive halving: the trial's score among those that have been at the rung."""
        scores = {**self._scores[rung], number: score}
        ranked = sorted((s for s in scores.values() if math.isfinite(s)), reverse=True)
        keep = max(1, len(scores) // self._factor)
        cutoff = ranked[min(keep, len(ranked)) - 1] if ranked else -math.inf
        if score >= cutoff or not ranked:
            return ""
        share = SHARES.get(self._factor, f"1 in {self._factor}")
        best = "best" if keep == 1 else f"best {share}"
        mean = f"mean {score:.3f} over {done:.3g} folds"
        return f"{mean} is below the {cutoff:.3f} of the {best} of {len(scores)} trials"

    def _against_best(self, sections: Mapping[str, float]) -> str:
        """The paired test against the best complete trial, on the sections that both have."""
        if self._best is None or self._paired_p is None:
            return ""
        number, _, theirs = self._best
        shared = sorted(sections.keys() & theirs.keys())
        differences = np.array([sections[s] - theirs[s] for s in shared])
        p = paired_p_value(differences)
        if p >= self._paired_p:
            return ""
        less = f"{-float(np.nanmean(differences)):.3f} below trial {number}"
        return f"{less} over {len(shared)} shared sections (paired test, p {p:.3f})"

    def _write(self, line: dict[str, Any]) -> None:
        """A decision: first to disk, then in force."""
        if self._ledger is not None:
            with self._ledger.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        """A decision comes into force: made now, or read from the ledger."""
        if "complete" in line:
            self._trials.setdefault(line["complete"], Record()).complete = True
            score = line["score"]
            if math.isfinite(score) and (self._best is None or score > self._best[1]):
                self._best = (line["complete"], score, line["sections"])
            return
        record = self._trials.setdefault(line["judged"], Record())
        record.judged, record.stop = line["done"], line["stop"]
        if line["rung"] is not None:
            self._scores[line["rung"]][line["judged"]] = line["score"]

    def _open(self, ledger: Path) -> None:
        """Go on from a ledger, or begin one.

        Raises:
            ValueError: it was made with other rungs, or is damaged before its last line.
        """
        head = {"format": FORMAT, "folds": self._folds, "rungs": list(self.rungs)}
        lines = read_ledger(ledger) if ledger.is_file() else []
        if not lines:
            ledger.parent.mkdir(parents=True, exist_ok=True)
            ledger.write_text(json.dumps(head) + "\n")
            return
        if lines[0] != head:
            raise ValueError(f"{ledger}: begins with {lines[0]}, this sweep's would with {head}")
        for line in lines[1:]:
            self._take(line)


def read_ledger(ledger: Path) -> list[dict[str, Any]]:
    """The lines of a ledger. One that a dying process left unfinished is cut off the file.

    Raises:
        ValueError: another line is damaged.
    """
    raw = ledger.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        with ledger.open("r+b") as file:
            file.truncate(whole)
    lines = []
    for number, line in enumerate(raw[:whole].splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{ledger}: line {number} is damaged: {error}") from error
    return lines


def paired_p_value(differences: np.ndarray) -> float:
    """How likely differences as low as these were, if there were none (Wilcoxon, one-sided).

    1 where the mean is not below 0 or fewer than two pairs are defined: never a reason to stop.
    """
    defined = differences[np.isfinite(differences)]
    if len(defined) < 2 or not defined.mean() < 0:
        return 1.0
    return float(stats.wilcoxon(defined, alternative="less", zero_method="zsplit").pvalue)


def expected_share(folds: int, grace_folds: float, reduction_factor: int, trials: int) -> float:
    """The share of a sweep's fold-epochs that the rungs let be spent: simulated with a Pruner.

    The simulated trials come one after the other and keep their order from rung to rung. The first
    few have nobody to be compared with, so that a sweep of few trials spends a larger share. The
    paired test, which stops more, is left out.
    """
    rng, repeats = np.random.default_rng(0), max(1, SIMULATED // trials)
    spent = [
        folds_spent(rng.permutation(trials), folds, grace_folds, reduction_factor)
        for _ in range(repeats)
    ]
    return float(np.mean(spent)) / (trials * folds)


def folds_spent(scores: np.ndarray, folds: int, grace_folds: float, reduction_factor: int) -> float:
    """Folds that trials train which score the same at every rung."""
    pruner = Pruner(
        folds=folds, grace_folds=grace_folds, reduction_factor=reduction_factor, paired_p=None
    )
    stopped = [
        next((rung for rung in pruner.rungs if pruner.judge(number, rung, score, {})), folds)
        for number, score in enumerate(scores.tolist())
    ]
    return float(sum(stopped))


def pruner_of(sweep: "Sweep", ledger: Path | None = None) -> Pruner:
    """A sweep's rule; the driver's one keeps a ledger, a trial's only knows where to report."""
    return Pruner(
        folds=sweep.protocol.folds,
        grace_folds=sweep.grace_folds,
        reduction_factor=sweep.reduction_factor,
        paired_p=sweep.paired_p,
        ledger=ledger,
    )
