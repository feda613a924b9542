"""How Tune is led: the board hands out the trials, and says which of them stop."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.board import WAIT, Board
from sweeps.nodes import FILE, Nodes, forget_places, is_broken_node, read_place, storage_full
from sweeps.space import Asked
from sweeps.trial import got_nowhere

LOOK_SECONDS = 5.0
"""How often waiting trials are looked at."""

STRANDED_SECONDS = 600.0
"""How long a trial waits for machines that have gone: an autoscaler may bring others."""


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
    """Tune's scheduler: first come, first served, until the board says stop.

    Args:
        board: the sweep's ledger.
        bundle: what a trial's actor takes of a node where it trains itself; None where it leads a
            worker group, which finds its own places.
    """

    def __init__(self, board: Board, bundle: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.board, self.bundle = board, bundle
        self.nodes = Nodes(board.out)
        self._selected: dict[str, dict[str, str]] = {}
        self._looked = self._had_room = time.monotonic()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A new trial starts on no machine that is known to be broken.

        Tune also calls this when it has queued a trial after an error, by the place that it got
        there: another one now would leave the trial in two queues.
        """
        name = name_of_trial(trial)
        if name not in self._selected:
            forget_places(self.board.out / "trials" / name)
            self._place(trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial's process died or raised: find out whose fault that is, before it goes on."""
        name, error = name_of_trial(trial), last_error(trial)
        folder = self.board.out / "trials" / name
        if full := storage_full(self.board.out):
            self.board.halted = full
            return
        broken, place = is_broken_node(error), read_place(folder, 0)
        if self.bundle and place is not None and (broken or got_nowhere(folder)):
            self.nodes.failed(name, place, error, broken=broken)
        self._place(trial)
        if broken and not self._selector(name):
            self.board.halted = (
                f"no other machine is left for trial {name}: {last_line(error)}: mend it or add "
                "others, and the same command goes on"
            )

    def _place(self, trial: Trial) -> None:
        """Ask for a node that is not avoided."""
        if self.bundle is None:
            return
        name = name_of_trial(trial)
        selector = self._selected[name] = self._selector(name)
        bundle = dict(self.bundle)
        trial.update_resources(
            PlacementGroupFactory([bundle], bundle_label_selector=[selector])
            if selector
            else PlacementGroupFactory([bundle])
        )

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """First come, first served; what waits for machines that have gone ends the sweep in time.

        Tune cannot ask anew for another place.
        """
        now = time.monotonic()
        if self.bundle and now - self._looked > LOOK_SECONDS:
            self._looked = now
            names = [
                name_of_trial(t) for t in tune_controller.get_trials() if t.status == "PENDING"
            ]
            stranded = [n for n in names if self._selected.get(n) and not self._selector(n)]
            if not stranded:
                self._had_room = now
            elif now - self._had_room > STRANDED_SECONDS:
                self.board.halted = (
                    f"trial {', '.join(stranded)}: no machine has been left but those on which it "
                    f"failed at once ({self.board.out / FILE}): mend them or add others, and the "
                    "same command goes on"
                )
        return super().choose_trial_to_run(tune_controller)

    def _selector(self, name: str) -> dict[str, str]:
        return {} if self.bundle is None else self.nodes.selector(name, self.bundle)

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


def last_error(trial: Trial) -> str:
    """What a trial failed of last. Tune appends it to a file here, and copies that away later."""
    file = trial.error_file
    text = Path(file).read_text() if file and Path(file).is_file() else ""
    return text.rpartition("Failure # ")[2]


def last_line(text: str) -> str:
    """What a traceback comes to."""
    return (text.strip().splitlines() or ["its process died"])[-1]


def name_of_trial(trial: Trial) -> str:
    """The board's name for one of Tune's trials."""
    return Asked(**trial.config).name
