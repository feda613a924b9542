"""Checkpoints on spots: log units for every spot and gene; of several models, mean and spread.

Shape letters: M members, N spots, B batch, G genes, H W C rows, columns and channels.
"""

from collections.abc import Callable, Iterator, Sequence
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

SYMMETRIES = 8
"""Of a square: what a patch may be turned and flipped to."""

Seen = tuple[np.ndarray, np.ndarray | None]
"""One model's prediction in log units (B, G), and its deviation over the 8 symmetries if asked."""

OfPatches = Callable[[torch.Tensor], Seen]
"""Patches uint8 (B, H, W, C) on the model's device, of the size it takes, to what it sees."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How to predict.

    Args:
        views: how many of a patch's 8 symmetries are averaged: 1, or 8 for test-time augmentation;
            None takes what each model was judged by in training, its `training.views`.
        spread: give the deviation over members too; it costs memory alone.
        symmetries: give the deviation over the 8 symmetries too, whatever is averaged; 8 passes.
    """

    views: int | None = None
    spread: bool = False
    symmetries: bool = False

    def __post_init__(self) -> None:
        """Raise a ValueError where `views` cannot be."""
        if self.views not in (None, 1, SYMMETRIES):
            raise ValueError(
                f"views must be 1 or {SYMMETRIES}, the symmetries of a patch, got {self.views}"
            )


PLAIN = How()
"""The mean alone, as the models were judged in training."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predictions in log units, float32 (N, G) each; None is what was not asked for.

    Attributes:
        mean_NG: over members, and over the views of each.
        member_spread_NG: standard deviation over members (M - 1); None of one member.
        symmetry_spread_NG: standard deviation over the 8 symmetries of a patch, which are all there
            are (by 8, not 7), averaged over members.
    """

    mean_NG: np.ndarray
    member_spread_NG: np.ndarray | None = None
    symmetry_spread_NG: np.ndarray | None = None


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
    found = [p for path in paths for p in find_checkpoints(path)]
    return as_ensemble([checkpoint.load(path, device) for path in found])


def as_ensemble(members: Sequence[Checkpoint]) -> Ensemble:
    """Loaded checkpoints that belong together, as one.

    Raises:
        ValueError: their protocols differ.
    """
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


def on_patches(member: Checkpoint, genes: pd.Index, how: How = PLAIN) -> OfPatches:
    """One model as a function of patches: what everything that predicts goes through.

    The model is made fast where it is, in place. `genes` are those wanted, in this order.
    """
    training = member.settings.training
    views = how.views or training.views
    device = next(member.model.parameters()).device
    units = Units.of(member.fitted, training, device)
    precision = choose_precision(training, device)
    fit_to(member.model, device, precision)
    shift, scale = target_scale(member.fitted, training.aux_target)
    columns = member.fitted.genes.index.get_indexer(genes)

    @torch.inference_mode()
    def predict(x_BHWC: torch.Tensor) -> Seen:
        preds = []
        for view in range(SYMMETRIES if how.symmetries else views):
            symmetry_B = torch.full((len(x_BHWC),), view, device=device)
            x_BCHW = units.image(turn(x_BHWC, symmetry_B))
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                preds.append(units.whole(member.model(x_BCHW)).float())
        mean_BG: np.ndarray = torch.stack(preds[:views]).mean(0).cpu().numpy()
        mean_BG = (mean_BG * scale + shift)[:, columns]
        if not how.symmetries:
            return mean_BG, None
        spread_BG: np.ndarray = torch.stack(preds).std(0, correction=0).cpu().numpy()
        return mean_BG, (spread_BG * scale)[:, columns]

    return predict


def together(seen: Sequence[Seen], *, spread: bool = False) -> Predictions:
    """What several models see in the same patches, as one.

    Args:
        seen: of each model.
        spread: give their standard deviation too, if there are several.
    """
    means_MBG = np.stack([mean_BG for mean_BG, _ in seen])
    total_BG = means_MBG.sum(axis=0, dtype=np.float64)
    member_spread: np.ndarray | None = None
    symmetry_spread: np.ndarray | None = None
    if spread and len(seen) > 1:
        member_spread = means_MBG.std(axis=0, ddof=1, dtype=np.float64).astype(np.float32)
    turned = [spread_BG for _, spread_BG in seen if spread_BG is not None]
    if turned:
        symmetry_spread = np.stack(turned).mean(axis=0, dtype=np.float64).astype(np.float32)
    return Predictions(
        mean_NG=(total_BG / len(seen)).astype(np.float32),
        member_spread_NG=member_spread,
        symmetry_spread_NG=symmetry_spread,
    )


def predict(
    member: Checkpoint, store: Store, sections: Sequence[str], how: How = PLAIN
) -> pd.DataFrame:
    """Predictions of one model in its log units, a row per spot, a column per gene."""
    genes = member.fitted.genes.index
    parts = [mean for ((mean, _),) in _batches([member], store, sections, genes, how)]
    return pd.DataFrame(np.concatenate(parts), columns=genes)


def predict_ensemble(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    how: How = PLAIN,
    *,
    genes: pd.Index | None = None,
    progress: bool = True,
) -> Predictions:
    """The members' mean prediction, and how far they, and the symmetries of a patch, are apart.

    Every batch of patches goes through all members before the next is read, so that of each number
    asked for one float32 (N, G) is held, and of a batch what M members give: for 30,000 spots and
    6,000 genes 0.7 GB for the mean and 0.7 GB for each spread, beside the counts that `load_spots`
    brings (0.4 GB).

    Args:
        ensemble: the members.
        store: where the sections are.
        sections: in the order of the rows.
        how: over how many symmetries, and which deviations are wanted.
        genes: ids that all members predict; by default the ensemble's, in its order.
        progress: draw a progress bar.

    Raises:
        ValueError: the store's patches are not what a member was trained on.
    """
    genes = ensemble.genes.index if genes is None else genes
    spots = sum(store.sections[name]["spots_kept"] for name in sections)
    found: dict[str, np.ndarray] = {}
    start = 0
    with tqdm(desc="predicting", total=spots, unit=" spots", disable=not progress) as bar:
        for seen in _batches(ensemble.members, store, sections, genes, how):
            part = together(seen, spread=how.spread)
            for name, values in vars(part).items():
                if values is None:
                    continue
                if name not in found:
                    found[name] = np.empty((spots, len(genes)), np.float32)
                found[name][start : start + len(values)] = values
            start += len(part.mean_NG)
            bar.update(len(part.mean_NG))
    return Predictions(**found)


def _batches(
    members: Sequence[Checkpoint],
    store: Store,
    sections: Sequence[str],
    genes: pd.Index,
    how: How,
) -> Iterator[list[Seen]]:
    """What each member sees in each batch of spots; patches are read once for members alike."""
    for member in members:
        check_store(member, store)
    device = next(members[0].model.parameters()).device
    sides = [member.settings.training.input_px or store.input_px for member in members]
    spots = {
        side: load_spots(store, sections, members[sides.index(side)].fitted, device, side)
        for side in dict.fromkeys(sides)
    }
    predictors = [on_patches(member, genes, how) for member in members]
    rows = torch.from_numpy(spots[sides[0]].rows).to(device)
    for rows_B in rows.split(EVAL_BATCH):
        x_BHWC = {side: found.patches(rows_B) for side, found in spots.items()}
        yield [one(x_BHWC[side]) for one, side in zip(predictors, sides, strict=True)]


def predict_mean(
    ensemble: Ensemble,
    store: Store,
    sections: Sequence[str],
    how: How = PLAIN,
    *,
    progress: bool = True,
) -> np.ndarray:
    """The members' mean prediction of the ensemble's genes, float32 (N, G), in log units."""
    return predict_ensemble(ensemble, store, sections, how, progress=progress).mean_NG
