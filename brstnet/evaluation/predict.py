"""Checkpoints on spots: log units for every spot and gene; of several models, the mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from brstnet.config import Prepare
from brstnet.data.store import Store
from brstnet.training import checkpoint
from brstnet.training.batches import Units, load_spots, turn
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.epoch import EVAL_BATCH
from brstnet.training.fitted import target_scale
from brstnet.training.keep import finished
from brstnet.training.model import choose_precision, fit_to


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Several fold models as one, and the one scale on which they are judged.

    `genes` are those that all members predict, by falling mean count: index gene; symbol;
    mean_count, mean, std, depth_slope, depth_intercept averaged over the members; panel marks the
    first `panel_size`. `median_total` is the mean of the members' medians.
    """

    members: Sequence[Checkpoint]
    genes: pd.DataFrame
    median_total: float

    @property
    def target(self) -> str:
        """What is predicted: log_normalised or log_counts."""
        return self.members[0].settings.protocol.target


def find_checkpoints(path: Path) -> list[Path]:
    """Checkpoint folders at `path`: itself, the one of a finished fold, or those in its folders.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a fold is not finished, so that no checkpoint stands for it yet.
    """
    if (path / "checkpoint.json").is_file():
        return [path]
    if (done := finished(path)) is not None:
        return [done.folder]
    if (path / "last").is_dir():
        raise ValueError(f"{path}: this fold is not finished: train on, or name its best/ or last/")
    below = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    found = [
        c
        for p in below
        if any((p / f).exists() for f in ("checkpoint.json", "result.json", "last"))
        for c in find_checkpoints(p)
    ]
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint here, nor in the folders in it")
    return found


def load_ensemble(paths: Sequence[Path], device: torch.device) -> Ensemble:
    """Load checkpoints that belong together.

    Raises:
        ValueError: their protocols differ.
    """
    members = [checkpoint.load(p, device) for path in paths for p in find_checkpoints(path)]
    first = members[0]
    for other in members[1:]:
        if other.settings.protocol != first.settings.protocol:
            raise ValueError(
                f"{other.path} and {first.path} have different protocols: only models that were "
                "judged alike can be averaged"
            )
    shared = set.intersection(*(set(m.fitted.genes.index) for m in members))
    tables = [m.fitted.genes[m.fitted.genes.index.isin(shared)] for m in members]
    numbers = ["mean_count", "mean", "std", "depth_slope", "depth_intercept"]
    order = tables[0].index
    mean = np.mean([t.loc[order, numbers].to_numpy(float) for t in tables], axis=0)
    genes = pd.DataFrame(mean, order, numbers)
    genes = genes.sort_values("mean_count", ascending=False, kind="stable")
    genes.insert(0, "symbol", tables[0].loc[genes.index, "symbol"])
    genes["panel"] = np.arange(len(genes)) < first.settings.protocol.panel_size
    medians = [m.fitted.median_total for m in members]
    return Ensemble(members=members, genes=genes, median_total=float(np.mean(medians)))


def check_store(member: Checkpoint, store: Store) -> None:
    """Check that a store's patches are what the model was trained on.

    Raises:
        ValueError: window or input size differ.
    """
    for key in ("window_px", "input_px", "stain", "luminosity"):
        before = getattr(Prepare(), key)  # what stores did that do not say it yet
        trained = member.facts["store"]["prepare"].get(key, before)
        here = store.index["prepare"].get(key, before)
        if trained != here:
            raise ValueError(
                f"{store.path}: prepared with {key} {here}, but {member.path} was trained on "
                f"{trained}: prepare the store with --{key} {trained}"
            )


@torch.inference_mode()
def predict(member: Checkpoint, store: Store, sections: Sequence[str]) -> pd.DataFrame:
    """Predictions of one model in its log units, a row per spot, a column per gene."""
    check_store(member, store)
    device = next(member.model.parameters()).device
    training = member.settings.training
    spots = load_spots(store, sections, member.fitted, device, training.input_px)
    units = Units.of(member.fitted, training, device)
    precision = choose_precision(training, device)
    fit_to(member.model, device, precision)
    parts = []
    for rows_B in torch.from_numpy(spots.rows).to(device).split(EVAL_BATCH):
        x_BHWC = spots.patches(rows_B)
        preds = []
        for view in range(training.views):
            x_BCHW = units.image(turn(x_BHWC, torch.full_like(rows_B, view)))
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                preds.append(units.whole(member.model(x_BCHW)))
        parts.append(torch.stack(preds).mean(0).cpu().numpy())
    shift, scale = target_scale(member.fitted, training.aux_target)
    return pd.DataFrame(np.concatenate(parts) * scale + shift, columns=member.fitted.genes.index)


def predict_mean(
    ensemble: Ensemble, store: Store, sections: Sequence[str], *, progress: bool = True
) -> np.ndarray:
    """The members' mean prediction of the ensemble's genes, float32 (N, G), in log units."""
    total = np.zeros(())
    for member in tqdm(ensemble.members, "predicting", unit="model", disable=not progress):
        total = total + predict(member, store, sections)[ensemble.genes.index].to_numpy()
    mean: np.ndarray = (total / len(ensemble.members)).astype(np.float32)
    return mean
