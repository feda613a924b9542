"""How Tune is led: the board hands out the trials, and says which of them stop."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.board import WAIT, Board
from sweeps.space import Asked


class BoardSearch(Searcher):
    """Tune's searcher: asks the board. What a trial came to is told by `SweepProgress`."""

    def __init__(self, board: Board) -> None:
        super().__init__(metric="score", mode="max")
        self.board = board

    def suggest(self, trial_id: str) -> Any:
        """The next trial's configuration; None for not now, FINISHED for never again."""
        asked = self.board.next()
        if asked is None:
            return Searcher.FINISHED
        if asked == WAIT:
            return None
        assert isinstance(asked, Asked)
        return {"number": asked.number, "point": asked.point, "seed": asked.seed}

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001, FBT002 - Tune's signature
    ) -> None:
        """Nothing: `SweepProgress` is told with the reason, which a searcher is not."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the board is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: Tune's own state is not read."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "board": None}  # Tune pickles it, and never loads it here


class BoardScheduler(FIFOScheduler):
    """Tune's scheduler: first come, first served, until the board says stop."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.board = board

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Hand a trial's standing to the board."""
        sections = {
            key.removeprefix("sections/"): value
            for key, value in result.items()
            if key.startswith("sections/")
        }
        reason = self.board.report(name_of_trial(trial), {**result, "sections": sections})
        decision: str = TrialScheduler.STOP if reason else TrialScheduler.CONTINUE
        return decision

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "board": None}


def name_of_trial(trial: Trial) -> str:
    """The board's name for one of Tune's trials."""
    return Asked(**trial.config).name
