"""One pass over the training spots, and one over the validation's.

Shape letters: B batch, S steps, G genes.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from brstnet import metrics
from brstnet.training import distributed
from brstnet.training.batches import rng
from brstnet.training.step import loss_parts
from brstnet.training.task import Run, Task

EVAL_BATCH = 64
"""Patches a forward pass takes when nothing is learned."""

AfterStep = Callable[[int, Tensor], None]


class Clock:
    """How much of the time goes into steps; on a GPU by its own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.began = time.perf_counter()
        self.busy = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.events.append(pair)
            pair[0].record()
        else:
            self.entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.busy += time.perf_counter() - self.entered

    def read(self) -> tuple[float, float]:
        """Seconds in all, and in steps; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        all_seconds = time.perf_counter() - self.began
        return all_seconds, self.busy + sum(a.elapsed_time(b) for a, b in self.events) / 1000


def train_epoch(run: Run, after_step: AfterStep | None = None) -> tuple[float, Clock]:
    """The rest of the epoch that the run is in: the mean loss, and the clock.

    Nothing waits for the device inside.

    Args:
        run: at the beginning of an epoch, or within it (`progress.step`).
        after_step: called with the number of steps done in this epoch and the sum of their
            losses over all workers.
    """
    task, progress = run.task, run.progress
    here, seed = task.here, task.training.seed
    epoch, first = progress.epoch + 1, progress.step
    plan = task.plan(epoch)
    total = torch.full((), progress.loss_sum, device=task.device)
    clock = Clock(task.device)
    run.network.train()
    for step, drawn in enumerate(task.train.feed(plan.part(first)), first):
        since_start = epoch * task.steps + step
        run.rate.set(run.optimizer, since_start)
        torch.manual_seed(int(rng(seed, epoch, step, here.rank).integers(2**63)))  # dropout
        with clock:
            total += distributed.total(run.learn(drawn), here)
        if run.average is not None:
            run.average.update(run.model, since_start + 1)
        if after_step is not None:
            after_step(step + 1, total)
    return float(total) / (len(plan.rows_SB) * here.size), clock


@torch.inference_mode()
def validate(
    task: Task, model: nn.Module, views: int | None = None
) -> tuple[float, list[metrics.Moments]]:
    """Loss on the validation spots, and the panel's moments per section, over all workers.

    Metrics stream: no prediction outlives its batch. Where nobody validates the loss is NaN, and
    there is no section.

    Args:
        task: the fold.
        model: to be judged.
        views: how many symmetries of a patch are averaged; by default as the settings say.
    """
    spots = task.validation
    if spots is None:
        return float("nan"), []
    views = views or task.training.views
    model.eval()
    panel = np.flatnonzero(task.fitted.genes["panel"])
    panel_G = torch.from_numpy(panel).to(task.device)
    zero_G = torch.zeros(len(panel), dtype=torch.float64, device=task.device)
    loss, sections = torch.zeros((), dtype=torch.float64, device=task.device), []
    for number in range(len(spots.maps)):
        part = metrics.Moments(0, zero_G, zero_G, zero_G, zero_G, zero_G)
        rows = spots.rows[spots.section_N[spots.rows] == number][task.here.rank :: task.here.size]
        for start in range(0, len(rows), EVAL_BATCH):  # a small section may have none for this rank
            rows_B = torch.from_numpy(rows[start : start + EVAL_BATCH]).to(task.device)
            batch_loss, pred_BG, y_BG = predict_batch(task, model, rows_B, views)
            loss += batch_loss * len(rows_B)
            found = metrics.moments(pred_BG[:, panel_G].double(), y_BG[:, panel_G].double())
            part = metrics.merge(part, found)
        sections.append(distributed.merge_everywhere(part, task.here))
    mean_loss = float(distributed.total(loss, task.here)) / len(spots.rows)
    return mean_loss, [_on_host(m) for m in sections]


def predict_batch(
    task: Task, model: nn.Module, rows_B: Tensor, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of validation spots: loss and predictions (B, G), means over the views; targets (B, G)."""
    units, spots = task.units, task.validation
    assert spots is not None
    losses, preds = [], []
    for view in range(views):
        batch = spots.batch(rows_B, torch.full_like(rows_B, view) if view else None)
        with torch.autocast(
            task.device.type, task.precision, enabled=task.precision != torch.float32
        ):
            main, aux, outputs = loss_parts(model, units.input(batch), units.goal(batch))
        losses.append(main + task.training.aux_weight * aux)
        preds.append(units.whole(outputs))
    return torch.stack(losses).mean(), torch.stack(preds).mean(0), units.target(batch)


def _on_host(m: metrics.Moments) -> metrics.Moments:
    return metrics.Moments(m.n, *(v.cpu().numpy() for v in (m.mx, m.my, m.sxx, m.syy, m.sxy)))
