"""A finished grid sweep read for the paper's tables: each trial judged once, and kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import torch
from tqdm import tqdm

from brstnet.config import build, fingerprint, read_yaml
from brstnet.data.store import Store, sha256
from brstnet.evaluation.paper import models as paper
from brstnet.evaluation.paper import printed
from brstnet.evaluation.paper.models import Model
from brstnet.training.keep import finished
from brstnet.training.leaks import LeakError
from sweeps.choice import Outcome
from sweeps.gather import WHOLE
from sweeps.space import Sweep, choices

ROWS = ("backbone", "auxnet")
"""What the paper's tables have a row for, and all that the grid may search."""

CACHE = 1
"""Number of what is kept of a trial: scores of another are not read."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What every trial is judged with; what was found of one is kept in `cache`."""

    sweep: Sweep
    store: Store
    patients: tuple[str, ...]
    device: torch.device
    cache: Path
    training: bool


def read_sweep(runs: Path, name: str) -> Sweep:
    """The settings of a sweep that was run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no grid over backbone and auxnet.
    """
    file = runs / name / "sweep.yaml"
    if not file.is_file():
        there = sorted(f.parent.name for f in runs.glob("*/sweep.yaml"))
        raise FileNotFoundError(
            f"{file}: no such sweep; {runs} has {', '.join(there) or 'none'} (--runs says where)"
        )
    sweep = build(Sweep, read_yaml(file), str(file))
    others = sorted(set(sweep.space) - set(ROWS))
    if sweep.search != "grid" or others:
        raise ValueError(
            f"{file}: must be a grid over backbone and auxnet, which are the rows of the paper's "
            f"tables, but search is {sweep.search}, and the space has "
            f"{', '.join(others or sweep.space) or 'nothing'}: run sweeps/paper.yaml; "
            f"dashboards/leaderboard.py --sweep {name} shows this one"
        )
    return sweep


def grid(sweep: Sweep) -> list[tuple[str, bool]]:
    """The backbones with and without AuxNet that the sweep trains."""
    own = {name: getattr(sweep.training, name) for name in ROWS}
    lists = [choices(sweep.space.get(name, [own[name]])) or [] for name in ROWS]
    return [(str(backbone), bool(auxnet)) for backbone, auxnet in product(*lists)]


def rows(sweep: Sweep) -> list[tuple[str, bool]]:
    """The paper's twenty rows, and after each half those that the sweep alone has."""
    others = [key for key in grid(sweep) if key[0] not in printed.NAMES]
    return [
        key
        for auxnet in (True, False)
        for key in (*((name, auxnet) for name in printed.NAMES), *others)
        if key[1] == auxnet
    ]


def read_models(judge: Judge, outcomes: Sequence[Outcome]) -> list[Model]:
    """All rows, judged; those that cannot be say why."""
    ended = by_row(judge.sweep, outcomes)
    trained = grid(judge.sweep)
    models = []
    for key in tqdm(rows(judge.sweep), "judging", unit="model"):
        if key not in trained:
            reason = "not in this sweep's grid"
        elif key not in ended:
            reason = "its trial has not ended: the sweep's own command goes on"
        else:
            models.append(read_model(judge, key, ended[key]))
            continue
        models.append(Model(backbone=key[0], auxnet=key[1], missing=reason))
    return models


def read_model(judge: Judge, key: tuple[str, bool], outcome: Outcome) -> Model:
    """One trial, judged.

    Raises:
        LeakError: it was trained or chosen on a patient that it is to be judged on.
    """
    none, trial = Model(backbone=key[0], auxnet=key[1]), f"trial {outcome['trial']}"
    if outcome["state"] != "COMPLETE":
        reason = str(outcome["reason"]).strip().partition("\n")[0] or "no reason is known"
        return replace(none, missing=f"{trial} {str(outcome['state']).lower()}: {reason}")
    try:
        genes, test, training = judged(judge, checkpoints(outcome, judge.sweep))
    except LeakError:
        raise
    except (ValueError, OSError) as error:
        return replace(none, missing=f"{trial} cannot be judged: {error}")
    return replace(
        none,
        score=float(outcome["score"]),
        seconds=float(outcome["cost_seconds"]) / judge.sweep.workers_per_trial,
        genes=genes,
        test=test,
        training=training,
    )


def checkpoints(outcome: Outcome, sweep: Sweep) -> list[Path]:
    """What stands for each fold of a trial.

    Raises:
        FileNotFoundError: a fold's is not here.
    """
    folder = Path(outcome["folder"])
    found = []
    for number in range(sweep.protocol.folds):
        done = finished(folder / f"fold_{number}")
        if done is None or not all((done.folder / name).is_file() for name in WHOLE):
            raise FileNotFoundError(
                f"{folder}: no checkpoint of fold {number} is here; bring the folder back from "
                "where the trial was trained"
            )
        found.append(done.folder)
    return found


def judged(
    judge: Judge, paths: Sequence[Path]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
    """Genes, scores on the held-out patient, training errors: as kept, or found now and kept."""
    scores, predictions, training = kept(judge, paths)
    if not scores.is_file():
        adata, table = paper.judge(paths, judge.store, judge.patients, judge.device)
        whole(predictions, adata.write_h5ad)
        whole(scores, table.to_parquet)
    genes = anndata.read_h5ad(predictions, backed="r").var
    if not judge.training:
        return genes, pd.read_parquet(scores), None
    if not training.is_file():
        panel = genes.index[genes["panel"].to_numpy(bool)]
        table = paper.training_errors(paths, judge.store, panel, judge.device)
        whole(training, table.to_parquet)
    return genes, pd.read_parquet(scores), pd.read_parquet(training)


def kept(judge: Judge, paths: Sequence[Path]) -> tuple[Path, Path, Path]:
    """Where a trial's scores, predictions and training errors are kept, by what they follow from.

    Checkpoints are known by their `checkpoint.json`, which has their scores to the last digit.
    """
    hashes = [sha256(path / "checkpoint.json") for path in paths]
    sections = judge.store.of_patients(judge.patients)
    key = fingerprint([CACHE, hashes, judge.store.digest, sections])
    scores, predictions, training = (
        judge.cache / f"{key}.{ending}" for ending in ("parquet", "h5ad", "training.parquet")
    )
    return scores, predictions, training


def whole(file: Path, write: Any) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.tmp")
    write(scratch)
    scratch.rename(file)


def by_row(sweep: Sweep, outcomes: Sequence[Outcome]) -> dict[tuple[str, bool], Outcome]:
    """The search's own trial of each row."""
    own = {name: getattr(sweep.training, name) for name in ROWS}
    return {
        (str(point["backbone"]), bool(point["auxnet"])): outcome
        for outcome in outcomes
        if outcome["seed"] == 0
        for point in [{**own, **outcome["config"]}]
    }
