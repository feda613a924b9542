"""What the driver does as trials go: take in how they stand, tell of it, and show it."""

import fcntl
import json
import math
import os
import signal
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeps.board import Board, Running
from sweeps.courier import STATUS
from sweeps.events import FILE, Events, last
from sweeps.nodes import FILE as NODES
from sweeps.nodes import Nodes, forget_places, read_place, storage_full
from sweeps.search import last_error, last_line, name_of_trial
from sweeps.trial import drop_models, got_nowhere

LOOK_SECONDS = 5.0
"""How often the sweep's folder is looked at: the room that is left, the machines to avoid."""


class SweepProgress(Callback):
    """Told by Tune of every report and every end."""

    def __init__(self, board: Board, events: Events) -> None:
        self.board, self.events = board, events
        self.view = View(board)
        pruned = [name for name, o in board.outcomes.items() if o["state"] == "PRUNED"]
        self._stopped = [board.out / "trials" / name for name in pruned]
        self.nodes, self._looked = Nodes(board.out), 0.0
        self._avoided = self.nodes.broken().keys()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it, and never loads it here

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """A trial reports; the board has its standing from the scheduler."""
        name = name_of_trial(trial)
        self.view.reported(name, result)
        folder = self.board.out / "trials" / name
        if not result.get("reason") and not got_nowhere(folder):  # finished folds report again
            self.nodes.went_on(name, folder)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """A trial's process died or raised what it must not; it is tried again."""
        name, error = name_of_trial(trial), last_error(trial)
        folder = self.board.out / "trials" / name
        place = read_place(folder, 0)
        forget_places(folder)
        where = "" if place is None else f" on {place['host']}"
        self.view.line(
            f"trial {name}: tried again after its process ended{where}: {last_line(error)}"
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """A trial has trained all its folds, was stopped, or could not be trained."""
        self._ended(name_of_trial(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """A trial's process died or raised what it must not, more often than is forgiven."""
        if trial.status == Trial.ERROR:
            error = trial.get_error()
            self._ended(name_of_trial(trial), (str(error) or "error")[-2000:])

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Tune has gone round once."""
        self.view.refresh()
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self.board.halted = self.board.halted or storage_full(self.board.out)
            self._tell_avoided()
        if self.board.halted:
            os.kill(os.getpid(), signal.SIGINT)  # the way a person stops it
        self._drop_stopped()

    def _tell_avoided(self) -> None:
        """Name the machines that trials are kept from since the last look."""
        broken = self.nodes.broken()
        for node in broken.keys() - self._avoided:
            self.view.line(
                f"{broken[node]}: avoided from now on, trials failed there at once "
                f"({self.board.out / NODES}); when it is mended start Ray there anew"
            )
            self.events.log("sweep", tags={"brstnet.avoided": ", ".join(broken.values())})
        self._avoided = broken.keys()

    def _drop_stopped(self) -> None:
        self._stopped = [folder for folder in self._stopped if not drop_if_free(folder)]

    def _ended(self, name: str, error: str = "") -> None:
        outcome = self.board.end(name, error)
        tell_end(self.events, self.board, name, outcome)
        if outcome["state"] == "PRUNED":
            self._stopped.append(self.board.out / "trials" / name)
        self.view.ended(name, outcome)

    def close(self) -> None:
        """After the last trial: what is shown stays, and what stopped trials left goes."""
        self._tell_avoided()
        self.view.close()
        self._drop_stopped()


def drop_if_free(folder: Path) -> bool:
    """Remove a stopped trial's weights, unless its process has not left the folder yet."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        drop_models(folder)
        return True


def tell_ends(events: Events, board: Board) -> None:
    """Tell how trials ended of which a driver that was killed has only kept the outcome."""
    for name, outcome in board.outcomes.items():
        tell_end(events, board, name, outcome)


def tell_end(events: Events, board: Board, name: str, outcome: dict[str, Any]) -> None:
    """Tell how a trial ended, and how the sweep stands by it."""
    key, state = f"{name}/trial", outcome["state"]
    tags = {"brstnet.sweep": board.sweep.name, "brstnet.protocol_line": board.sweep.protocol.line()}
    tags |= {"brstnet.trial": str(outcome["trial"]), "brstnet.seed": str(outcome["seed"])}
    events.start(key, f"trial {name}", "trial", tags, "sweep")  # where its process never came to it
    reason = {"brstnet.reason": outcome["reason"]} if outcome["reason"] else {}
    events.log(key, tags={"brstnet.state": state, **reason})
    close_runs(events, board.out / "trials" / name, "FAILED" if state == "FAILED" else "FINISHED")
    counts = [o["state"] for o in board.outcomes.values()]
    metrics: dict[str, float] = {
        f"trials_{state.lower()}": counts.count(state) for state in ("COMPLETE", "PRUNED", "FAILED")
    }
    metrics |= {"cost_hours": board.spent_hours()}
    if board.complete:
        best = board.complete[0]
        metrics |= {"best_score": best["score"], "best_trial": best["trial"]}
    events.log("sweep", metrics, step=len(counts))


def close_runs(events: Events, folder: Path, status: str) -> None:
    """End a trial's run, and before it that of a fold in training."""
    folds = {out.name for out in folder.glob("fold_*")}
    begun = last(folder / FILE, "start").get("run", "").rpartition("/")[2]
    if begun.startswith("fold_"):
        folds.add(begun)  # told of, but killed before it had a folder
    for fold in sorted(folds):
        if not (folder / fold / "told").exists():
            events.status(f"{folder.name}/{fold}", status)
    events.status(f"{folder.name}/trial", status)


class View:
    """What a person sees while a sweep goes: a live table on a terminal, else a line an event."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.console = Console(stderr=True)
        self.began = time.time()
        self._live: Live | None = None
        self._drawn = 0.0

    def refresh(self) -> None:
        """Draw the live table, at most once a second."""
        if not self.console.is_terminal or time.monotonic() - self._drawn < 1:
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(draw(self.board, self.began, time.time()), refresh=True)
        self._drawn = time.monotonic()

    def reported(self, name: str, note: dict[str, Any]) -> None:
        """A trial reports."""
        folds = self.board.sweep.protocol.folds
        if note["progress"] == note["folds_done"] and not note.get("reason"):
            score = f"mean score {note['score']:.4f}"
            self.line(f"trial {name}: {note['folds_done']} of {folds} folds, {score}")

    def ended(self, name: str, outcome: dict[str, Any]) -> None:
        """A trial has ended."""
        said = outcome["reason"].strip().splitlines()
        self.line(f"trial {name}: {outcome['state']}{f': {said[-1]}' if said else ''}")

    def line(self, text: str) -> None:
        """Say something that stays on the screen."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """End the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def draw(board: Board, began: float, now: float) -> Group:
    """The sweep as it stands: a few lines, and a row for each running trial."""
    table = Table(box=None, pad_edge=False)
    for heading in ("trial", "settings", "fold", "epoch", "score so far", "for", "left"):
        table.add_column(heading, no_wrap=heading != "settings")
    for name, trial in sorted(board.running.items()):
        table.add_row(*row(board, name, trial, now))
    return Group(Text(headline(board, now)), Text(tracking_line(board.out)), table)


def headline(board: Board, now: float) -> str:
    """Best score, trials by state, cost so far and the time it is expected to end."""
    states = [outcome["state"] for outcome in board.outcomes.values()]
    counts = ", ".join(
        f"{states.count(state)} {state.lower()}" for state in ("COMPLETE", "PRUNED", "FAILED")
    )
    best = board.complete[0] if board.complete else None
    score = f"best {best['score']:.4f} (trial {best['trial']})" if best else "no trial complete"
    each = board.expected_trial_seconds() / board.sweep.workers_per_trial
    left = max(0, board.goal - len(board.searched)) * each / max(1, board.concurrent)
    finish = datetime.fromtimestamp(now) + timedelta(seconds=left)
    limit = board.budget.gpu_hours
    budget = f" of {limit:g}" if limit is not None else ""
    return (
        f"sweep {board.sweep.name}: {score}; {counts}, {len(board.running)} running, of "
        f"{board.goal}; {board.spent_hours():.2f}{budget} hours spent; "
        f"about {timedelta(seconds=round(left))} left ({finish:%a %H:%M})"
    )


def tracking_line(out: Path) -> str:
    """Whether MLflow has all there is."""
    file = out / STATUS
    note = json.loads(file.read_text()) if file.is_file() else {}
    text = "MLflow: "
    if note.get("error"):
        text += (
            f"away ({note['error'].splitlines()[0][:80]}), {note['pending']} events wait on disk"
        )
    else:
        text += f"{note.get('pending', 0)} events on their way"
    return text + (f", {note['refused']} refused: refused.jsonl" if note.get("refused") else "")


def row(board: Board, name: str, trial: Running, now: float) -> list[str]:
    """One running trial."""
    event = last(board.out / "trials" / name / FILE)
    folds = board.sweep.protocol.folds
    epochs = trial.asked.point.get("epochs", board.sweep.training.epochs)
    _, _, run = event.get("run", "").rpartition("/")
    fold = int(run.removeprefix("fold_")) if run.startswith("fold_") else None
    epoch = event.get("step", 0) + 1 if fold is not None else 0
    done = (fold + epoch / epochs) / folds if fold is not None else 0.0
    seconds = now - trial.began
    left = timedelta(seconds=round(seconds * (1 - done) / done)) if done > 0 else "-"
    score = trial.note.get("score", math.nan)
    settings = ", ".join(f"{k}={short(v)}" for k, v in trial.asked.point.items())
    return [
        name,
        settings,
        "-" if fold is None else f"{fold + 1} of {folds}",
        "-" if fold is None else f"{epoch} of {epochs}",
        "-" if math.isnan(score) else f"{score:.4f}",
        str(timedelta(seconds=round(seconds))),
        str(left),
    ]


def short(value: object) -> str:
    """A setting's value in few letters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
