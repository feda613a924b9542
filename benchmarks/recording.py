"""Learning curves of a sweep that stopped nobody: recorded to two small tables, and read again.

`NAME.parquet` has a row per trial, fold and epoch; `NAME-sections.parquet` one per trial, fold and
validation section of a finished fold.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from brstnet.config import Settings, build, read_yaml

EPOCHS = ["trial", "fold", "epoch", "score", "seconds"]
SECTIONS = ["trial", "fold", "section", "pcc"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is run in one go: a configuration on all folds, or on one."""

    config: int
    fold: int
    running: np.ndarray
    """What a trial reports after each epoch: mean of the finished folds and the current one."""
    seconds: np.ndarray
    ran: int
    """Epochs after which it ends; fewer than `running` has if its training failed."""
    sections: tuple[dict[str, float], ...]
    """Median PCC of the sections of the finished folds, after each fold."""

    @property
    def score(self) -> float:
        """What it comes to, NaN if its training failed."""
        return float(self.running[-1]) if self.ran == len(self.running) else np.nan


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A recording: learning curves (configurations, folds, epochs), NaN from a failure on."""

    name: str
    protocol: str
    score_CFE: np.ndarray
    seconds_CFE: np.ndarray
    sections: dict[tuple[int, int], dict[str, float]]

    def __post_init__(self) -> None:
        assert self.score_CFE.shape == self.seconds_CFE.shape

    @property
    def epochs(self) -> int:
        """Of a fold."""
        return int(self.score_CFE.shape[2])

    @property
    def folds(self) -> int:
        """Of a configuration."""
        return int(self.score_CFE.shape[1])

    @property
    def final_C(self) -> np.ndarray:
        """The true score of each configuration; NaN if its training failed."""
        final: np.ndarray = self.score_CFE[:, :, -1].mean(axis=1)
        return final

    def in_step(self) -> "Curves":
        """The same, as if every epoch of every configuration took a second."""
        return replace(self, seconds_CFE=np.where(np.isnan(self.seconds_CFE), np.nan, 1.0))

    def whole(self, config: int) -> Unit:
        """A configuration as sweeps run it: all folds, one after the other."""
        score_FE, before = self.score_CFE[config], np.arange(self.folds)
        finished_F = np.concatenate([[0], np.cumsum(score_FE[:-1, -1])])
        running = (finished_F[:, None] + score_FE) / (1 + before[:, None])
        known: list[dict[str, float]] = [{}]
        for fold in range(self.folds):
            known.append({**known[-1], **self.sections.get((config, fold), {})})
        return self._unit(config, 0, running, self.seconds_CFE[config], tuple(known))

    def single(self, config: int, fold: int) -> Unit:
        """One fold of a configuration as a trial of its own."""
        score, seconds = self.score_CFE[config, fold], self.seconds_CFE[config, fold]
        return self._unit(config, fold, score, seconds, ({}, {}))

    def _unit(
        self,
        config: int,
        fold: int,
        running: np.ndarray,
        seconds: np.ndarray,
        sections: tuple[dict[str, float], ...],
    ) -> Unit:
        missing = np.isnan(seconds.ravel())  # the epoch in which training failed, and all after
        usual = float(np.nanmedian(self.seconds_CFE))
        return Unit(
            config=config,
            fold=fold,
            running=running.ravel(),
            seconds=np.where(missing, usual, seconds.ravel()),
            ran=int(missing.argmax()) + 1 if missing.any() else len(missing),
            sections=sections,
        )


def record(folder: Path, out: Path) -> None:
    """Write a sweep's learning curves to `out`, and its sections' PCC beside them.

    Raises:
        ValueError: a trial was pruned, or folds differ in length.
    """
    rows: list[tuple[object, ...]] = []
    sections: list[tuple[object, ...]] = []
    settings = None
    for file in sorted((folder / "trials").glob("*/outcome.json")):
        outcome = json.loads(file.read_text())
        settings = build(Settings, read_yaml(file.parent / "settings.yaml"), str(file.parent))
        if outcome["state"] == "PRUNED" or settings.training.stopping != "fixed":
            raise ValueError(f"{file}: curves want pruning: none and stopping: fixed")
        rows += epochs_of(outcome, file.parent, settings)
        sections += sections_of(outcome["trial"], file.parent)
    if settings is None:
        raise ValueError(f"{folder}: no trial has ended here")
    table = pd.DataFrame(rows, columns=EPOCHS)
    table.attrs = {
        "protocol": settings.protocol.line(),
        "folds": settings.protocol.folds,
        "epochs": settings.training.epochs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    table.round(6).to_parquet(out, index=False)
    pd.DataFrame(sections, columns=SECTIONS).round(6).to_parquet(beside(out), index=False)


def beside(file: Path) -> Path:
    """Where the sections' PCC of a recording stands."""
    return file.with_name(f"{file.stem}-sections.parquet")


def epochs_of(
    outcome: dict[str, object], folder: Path, settings: Settings
) -> Iterator[tuple[object, ...]]:
    """Fold, epoch, score and seconds of a trial; NaN in the epoch in which its training failed."""
    for fold in range(settings.protocol.folds):
        file = folder / f"fold_{fold}" / "last" / "progress.json"
        history = json.loads(file.read_text())["history"] if file.is_file() else []
        for note in history:
            yield outcome["trial"], fold, int(note["epoch"]), note["score"], note["seconds"]
        if len(history) < settings.training.epochs:
            if outcome["state"] != "FAILED":
                raise ValueError(f"{file}: {len(history)} epochs of {settings.training.epochs}")
            yield outcome["trial"], fold, len(history), np.nan, np.nan
            return


def sections_of(trial: int, folder: Path) -> Iterator[tuple[int, int, str, float]]:
    """The median PCC of each section that a finished fold was validated on.

    NaN counts as 0, as in the score of a fold: the prediction of a gene was constant.
    """
    for file in sorted(folder.glob("fold_*/result.json")):
        table = pd.read_parquet(file.parent / "last" / "validation.parquet")
        for section, pcc in table["pcc"].fillna(0.0).groupby(table["section"]).median().items():
            yield trial, int(file.parent.name.removeprefix("fold_")), str(section), float(pcc)


def read_curves(file: Path) -> Curves:
    """A recording."""
    table, sections = pd.read_parquet(file), pd.read_parquet(beside(file))
    return curves_of(table, sections, file.stem)


def curves_of(table: pd.DataFrame, sections: pd.DataFrame, name: str) -> Curves:
    """A recording of its two tables; trials are numbered anew."""
    number = {trial: n for n, trial in enumerate(sorted(table["trial"].unique()))}
    shape = len(number), int(table["fold"].max()) + 1, int(table["epoch"].max()) + 1
    places = table["trial"].map(number).to_numpy(), table["fold"].to_numpy(), table["epoch"]
    score_CFE, seconds_CFE = np.full(shape, np.nan), np.full(shape, np.nan)
    score_CFE[places] = table["score"]
    seconds_CFE[places] = table["seconds"]
    by_fold: dict[tuple[int, int], dict[str, float]] = {}
    for trial, fold, section, pcc in sections[SECTIONS].itertuples(index=False, name=None):
        by_fold.setdefault((number[trial], int(fold)), {})[str(section)] = float(pcc)
    return Curves(
        name=name,
        protocol=table.attrs.get("protocol", ""),
        score_CFE=score_CFE,
        seconds_CFE=seconds_CFE,
        sections=by_fold,
    )
