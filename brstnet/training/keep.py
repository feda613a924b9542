"""What a run leaves on disk, and takes up again: `best/`, `last/`, `position/`, `result.json`."""

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import safetensors.torch

from brstnet import metrics
from brstnet.config import Training
from brstnet.data.guarded import inside, read_json
from brstnet.training import checkpoint, distributed
from brstnet.training.task import Progress, Run, Task

ORIGIN = ("settings", "fold", "store")
"""What a run must share with a checkpoint to go on from it."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fold came to: the checkpoint that stands for it, and its score on the validation.

    The score is NaN where nobody validated; on disk it is null then.
    """

    folder: Path
    score: float
    epoch: int
    epochs: int
    seconds: float


def resume(run: Run) -> None:
    """Go on from `last/`, or from the `position/` within the epoch after it, if there is one.

    Raises:
        ValueError: it was made with other settings or from another store.
    """
    here = run.task.here
    distributed.barrier(here)
    if here.leads:
        for name in ("best", "last", "position"):
            checkpoint.settle(run.out / name)
        (run.out / "leaving").unlink(missing_ok=True)
        if run.task.backbone is not None:
            file = run.out / "backbone.safetensors"  # checkpoints link to it: never written into
            run.out.mkdir(parents=True, exist_ok=True)
            weights = checkpoint.on_host(run.task.backbone.state_dict())
            safetensors.torch.save_file(weights, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
    distributed.barrier(here)
    found = [run.out / n for n in ("last", "position") if (run.out / n / "progress.json").is_file()]
    if not found:
        return
    newest = max(found, key=lambda folder: position(read_progress(folder)))
    facts, asked = checkpoint.read_facts(newest), json.loads(json.dumps(run.task.facts))
    check_same(newest, [facts[key] for key in ORIGIN], [asked[key] for key in ORIGIN])
    run.judged.load_state_dict(checkpoint.read_tensors(newest, "model.safetensors"))
    moving = None if run.average is None else run.model
    checkpoint.restore_state(newest, run.optimizer, moving)
    run.progress = read_progress(newest)
    run.rate.restore(run.progress.schedule)


def read_progress(folder: Path) -> Progress:
    """Where a run was when it was saved."""
    return Progress(**json.loads((folder / "progress.json").read_text()))


def position(progress: Progress) -> tuple[int, int]:
    """How far a run is: whole epochs, and steps of the next."""
    return progress.epoch + 1, progress.step


def check_same(folder: Path, made: Sequence[object], asked: Sequence[object]) -> None:
    """Refuse to take up what another run has left.

    Args:
        folder: the checkpoint that is there.
        made: settings, fold and store that it was made with.
        asked: those of this run.

    Raises:
        ValueError: one of them differs.
    """
    for key, then, now in zip(ORIGIN, made, asked, strict=True):
        if then != now:
            raise ValueError(
                f"{folder}: made with another {key}; choose another folder or remove it"
            )


def save(run: Run, sections: list[metrics.Moments]) -> None:
    """Write `best/` if this epoch is the best, then `last/`, from which training can go on.

    A copy is taken here; the writing is done while training goes on.
    """
    scores = {name: or_null(value) for name, value in run.progress.history[-1].items()}
    table = validation_table(run.task, sections) if sections else None
    contents = contents_of(run, run.progress, {"engine": run.engine, "scores": scores}, table)
    best = bool(sections) and run.progress.best_epoch == run.progress.epoch

    def write() -> None:
        if best:
            alone = dataclasses.replace(contents, state=None, progress=None)
            checkpoint.save(run.out / "best", alone)
        checkpoint.save(run.out / "last", contents)
        shutil.rmtree(run.out / "position", ignore_errors=True)

    run.saver.submit(write)


def save_position(run: Run, progress: Progress) -> None:
    """Write `position/`: from here training can go on within an epoch."""
    contents = contents_of(run, progress, {"engine": run.engine})
    run.saver.submit(lambda: checkpoint.save(run.out / "position", contents))


def contents_of(
    run: Run,
    progress: Progress,
    facts: Mapping[str, object],
    validation: pd.DataFrame | None = None,
) -> checkpoint.Contents:
    """A copy of everything that a checkpoint of this moment holds."""
    moving = None if run.average is None else run.model
    return checkpoint.Contents(
        weights=checkpoint.on_host(run.judged.state_dict()),
        genes=run.task.fitted.genes,
        facts={**run.task.facts, **facts},
        validation=validation,
        state=checkpoint.training_state(run.optimizer, moving),
        progress=json.loads(json.dumps(dataclasses.asdict(progress))),
        backbone=None if run.task.backbone is None else run.out / "backbone.safetensors",
    )


def validation_table(task: Task, sections: list[metrics.Moments]) -> pd.DataFrame:
    """The panel's correlations: a row per gene and validation section."""
    panel = task.fitted.genes[task.fitted.genes["panel"]]
    parts = [
        pd.DataFrame(
            {
                "gene": panel.index,
                "symbol": panel["symbol"].to_numpy(),
                "section": section,
                "patient": patient,
                "pcc": metrics.correlation(moments),
                "n": int(moments.n),
            }
        )
        for section, patient, moments in zip(
            task.fold.validation, task.patients, sections, strict=True
        )
    ]
    return pd.concat(parts, ignore_index=True)


def conclude(run: Run) -> FitResult:
    """Say which checkpoint stands for the fold; from here on the fold is finished."""
    progress, training = run.progress, run.task.training
    early = training.stopping == "early"
    chosen = progress.best_epoch if early else progress.epoch
    values = {
        "checkpoint": "best" if early else "last",
        "score": or_null(progress.history[chosen]["score"]),
        "epoch": chosen,
        "epochs": progress.epoch + 1,
        "seconds": progress.seconds,
    }
    if run.task.here.leads:
        scratch = run.out / "result.json.tmp"
        scratch.write_text(json.dumps(values))
        scratch.rename(run.out / "result.json")
    distributed.barrier(run.task.here)
    result = finished(run.out)
    assert result is not None
    return result


def finished(out: Path) -> FitResult | None:
    """The result of a fold that is finished, or None."""
    file = out / "result.json"
    if not file.is_file():
        return None
    values = read_json(inside(out, file.name))
    if values["score"] is None:
        values["score"] = math.nan
    return FitResult(folder=inside(out, values.pop("checkpoint")), **values)


def or_null(value: float) -> float | None:
    """The value as JSON can say it: NaN is null."""
    return None if math.isnan(value) else value


def micro_batch(out: Path, training: Training, here: distributed.World) -> int:
    """Patches that this worker takes at a time: what was asked for, or what did fit in `out`."""
    share = training.batch_size // here.size
    asked = min(training.micro_batch or share, share)
    file = out / "micro_batch.json"
    return min(asked, json.loads(file.read_text())) if file.is_file() else asked


def halve(out: Path, taken: int, batch_size: int, error: RuntimeError | MemoryError) -> None:
    """Note in `out` that half of the micro-batch that was taken is to be tried.

    Raises:
        RuntimeError, MemoryError: the error itself, where nothing smaller is left, or others wait
            for this worker: the whole group must begin anew.
    """
    if taken == 1:
        raise error
    out.mkdir(parents=True, exist_ok=True)
    (out / "micro_batch.json").write_text(json.dumps(taken // 2))
    if distributed.world().size > 1:
        raise error
    warnings.warn(
        f"{out}: {taken} patches of training.batch_size {batch_size} do not fit the memory at a "
        f"time, going on with {taken // 2}; their gradients are summed to the same batch",
        stacklevel=3,
    )
