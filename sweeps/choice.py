"""Which configuration is the champion, and why: chosen on the folds alone.

The highest of many noisy scores is partly luck. So whoever is within one standard error of it, and
is not shown to be worse by a paired test, counts as good as the best, and the cheapest of them is
taken: the one-standard-error rule (Breiman, Friedman, Olshen and Stone 1984; Hastie, Tibshirani
and Friedman, The Elements of Statistical Learning, 7.10), here of paired differences, because all
configurations meet the same sections.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

RULES = ("one_se", "best")
"""Take the cheapest that is as good as the best, or the best whatever it costs."""

WORSE = 0.05
"""Below this p a one-sided paired Wilcoxon test says that a configuration is worse."""

MATERIAL = 0.8
"""A cost is lower than another only below this share of it: seconds are noisy too."""

FEWEST_SECTIONS = 3
"""With fewer shared sections folds are compared."""

DECIDABLE = 5
"""With fewer pairs no paired test can give a p below WORSE (2 ** -4 is .06): the best is taken."""

Outcome = dict[str, Any]
"""What a trial's outcome.json says, and `folder`, where it lies."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration that completed all folds: means over its training seeds.

    `outcomes` has one a seed, the search's own first: its checkpoints stand for the configuration.
    `sections` has no NaN; `cost` is the seconds (times workers) of one training of all folds.
    """

    trial: int
    outcomes: tuple[Outcome, ...]
    score: float
    folds: tuple[float, ...]
    sections: Mapping[str, float]
    cost: float

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie that stand for it."""
        return Path(self.outcomes[0]["folder"])

    @property
    def seed(self) -> int:
        """The training seed of those checkpoints."""
        return int(self.outcomes[0]["seed"])

    @property
    def spread(self) -> float:
        """Standard deviation of the score over the training seeds; NaN of one."""
        scores = [o["score"] for o in self.outcomes]
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a configuration is below the best: mean of the paired differences, its error, p."""

    difference: float
    error: float
    p: float
    n: int
    over: str

    @property
    def as_good(self) -> bool:
        """Whether it is within one standard error, and a test that could does not call it worse."""
        return self.n >= DECIDABLE and self.difference <= self.error and self.p >= WORSE

    def __str__(self) -> str:
        return (
            f"difference {self.difference:.3f} ± {self.error:.3f} over {self.n} {self.over}, "
            f"p = {self.p:.2f}"
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The configuration that was chosen, the one with the highest score, and why.

    `rule` is one of RULES, or `hand`. `table` has a row a candidate, by falling score. `searched`
    counts the search's trials by state.
    """

    chosen: Candidate
    best: Candidate
    rule: str
    reason: str
    table: pd.DataFrame
    searched: Mapping[str, int]


def choose(outcomes: Sequence[Outcome], rule: str = "one_se") -> Choice:
    """The champion of a sweep. Where some were trained with several seeds, it is one of these.

    Raises:
        ValueError: no trial completed all folds, or there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"the rule must be one of {', '.join(RULES)}, got {rule!r}")
    every = complete(outcomes)
    repeated = [c for c in every if len(c.outcomes) > 1]
    candidates = by_score(repeated or every)
    best = candidates[0]
    compared = {c.trial: compare(best, c) for c in candidates}
    others = [c for c in candidates[1:] if compared[c.trial].as_good]
    chosen = cheapest(best, others) if rule == "one_se" else best
    if chosen is best:
        pairs = compared[best.trial].n
        reason = _why_best(best, others, len(candidates), "best" if pairs < DECIDABLE else rule)
        if rule != "best" and pairs < DECIDABLE and len(candidates) > 1:
            over = compared[best.trial].over
            reason += f"; over {pairs} {over} no test could tell a cheaper one from a worse one"
    else:
        reason = _why_cheaper(chosen, best, compared[chosen.trial])
    return Choice(
        chosen=chosen,
        best=best,
        rule=rule,
        reason=reason + _of_seeds(chosen),
        table=_table(candidates, compared),
        searched=count_states(outcomes),
    )


def by_hand(outcomes: Sequence[Outcome], trial: int) -> Choice:
    """Somebody's own choice of a trial, with what the rule would have said.

    Raises:
        ValueError: there is no such trial, or it did not complete all folds.
    """
    ended = {o["trial"]: o["state"] for o in outcomes if o["seed"] == 0}
    ready = {c.trial: c for c in complete(outcomes)}
    if trial not in ready:
        state = f"is {ended[trial]}" if trial in ended else "is not there, or has not ended"
        raise ValueError(
            f"trial {trial} {state}: a champion needs all folds trained; COMPLETE are "
            f"{', '.join(map(str, sorted(ready)))}"
        )
    ruled, chosen = choose(outcomes), ready[trial]
    reason = (
        f"trial {trial}: promoted by hand, with a mean score of {chosen.score:.3f}"
        f"{_of_seeds(chosen)}. The rule takes {ruled.reason}"
    )
    return Choice(
        chosen=chosen,
        best=ruled.best,
        rule="hand",
        reason=reason,
        table=ruled.table,
        searched=ruled.searched,
    )


def complete(outcomes: Sequence[Outcome]) -> list[Candidate]:
    """The configurations that completed all folds, by trial.

    Raises:
        ValueError: there is none.
    """
    ready = [o for o in outcomes if o["state"] == "COMPLETE" and known(o["score"])]
    if not ready:
        where = f"{Path(outcomes[0]['folder']).parents[1]}: " if outcomes else ""
        reasons = sorted({o["reason"] or o["state"] for o in outcomes}) or ["none has ended"]
        raise ValueError(f"{where}no trial completed all folds: {'; '.join(reasons)}")
    return [
        _candidate(trial, [o for o in ready if o["trial"] == trial])
        for trial in sorted({o["trial"] for o in ready})
    ]


def _candidate(trial: int, outcomes: list[Outcome]) -> Candidate:
    outcomes = sorted(outcomes, key=lambda o: int(o["seed"]))
    names = dict.fromkeys(name for o in outcomes for name in o["sections"])
    found = {
        name: [o["sections"][name] for o in outcomes if known(o["sections"].get(name))]
        for name in names
    }
    return Candidate(
        trial=trial,
        outcomes=tuple(outcomes),
        score=float(np.mean([o["score"] for o in outcomes])),
        folds=tuple(np.mean([o["scores"] for o in outcomes], axis=0).tolist()),
        sections={name: float(np.mean(values)) for name, values in found.items() if values},
        cost=float(np.mean([o["cost_seconds"] for o in outcomes])),
    )


def known(score: float | None) -> bool:
    """Whether a score is a number; on disk NaN is null."""
    return score is not None and math.isfinite(score)


def by_score(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By falling score, ties by trial."""
    return sorted(candidates, key=lambda c: (-c.score, c.trial))


def count_states(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many of the search's trials came to each state; repeats with other seeds not counted."""
    return dict(Counter(str(o["state"]) for o in outcomes if o["seed"] == 0))


def compare(best: Candidate, other: Candidate) -> Comparison:
    """Differences best - other over the sections that both have, or over the folds.

    Sections of one patient are more alike than those of two, so that the error over sections is
    rather too small than too large: the rule then leans to the best.
    """
    shared = [name for name in best.sections if name in other.sections]
    if len(shared) >= FEWEST_SECTIONS:
        over, pairs = "sections", [(best.sections[n], other.sections[n]) for n in shared]
    else:
        over, pairs = "folds", list(zip(best.folds, other.folds, strict=True))
    differences = np.round([one - two for one, two in pairs], 12)  # rounding is no difference
    n = len(differences)
    test = wilcoxon(differences, alternative="greater").pvalue if differences.any() else 1.0
    return Comparison(
        difference=float(differences.mean()),
        error=float(differences.std(ddof=1) / math.sqrt(n)),
        p=float(test),
        n=n,
        over=over,
    )


def cheapest(best: Candidate, others: Sequence[Candidate]) -> Candidate:
    """The cheapest, if it is materially cheaper than the best; of equally cheap the better one."""
    cheaper = [c for c in others if c.cost <= MATERIAL * best.cost and c.cost < best.cost]
    if not cheaper:
        return best
    least = min(c.cost for c in cheaper)
    return by_score(c for c in cheaper if MATERIAL * c.cost <= least)[0]


def _why_best(best: Candidate, others: Sequence[Candidate], count: int, rule: str) -> str:
    head = f"trial {best.trial}: highest mean score over the folds, {best.score:.3f}"
    if count == 1:
        return f"{head}, as the only configuration that was compared"
    head += f" of {count} configurations"
    if rule == "best":
        return f"{head}, whatever it costs"
    if not others:
        return f"{head}; no other is within one standard error of it"
    are = "other is" if len(others) == 1 else "others are"
    limit = f"none for at most {MATERIAL:.0%} of its cost"
    return f"{head}; {len(others)} {are} within one standard error of it, {limit}"


def _why_cheaper(chosen: Candidate, best: Candidate, comparison: Comparison) -> str:
    return (
        f"trial {chosen.trial}: within one standard error of trial {best.trial} "
        f"({chosen.score:.3f} against {best.score:.3f}, {comparison}) at "
        f"{chosen.cost / best.cost:.0%} of its cost"
    )


def _of_seeds(candidate: Candidate) -> str:
    count = len(candidate.outcomes)
    return f" (means of {count} training seeds)" if count > 1 else ""


def _table(candidates: Sequence[Candidate], compared: Mapping[int, Comparison]) -> pd.DataFrame:
    rows = [
        {
            "trial": c.trial,
            "seeds": len(c.outcomes),
            "score": c.score,
            "cost_seconds": c.cost,
            "difference": compared[c.trial].difference,
            "error": compared[c.trial].error,
            "p": compared[c.trial].p,
            "n": compared[c.trial].n,
            "over": compared[c.trial].over,
            "as_good": compared[c.trial].as_good,
        }
        for c in candidates
    ]
    return pd.DataFrame(rows)
