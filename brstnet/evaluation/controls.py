"""What a network must beat: predictors that know little, each judged in the same table as it.

`depth_only` knows a spot's total count; `training_mean` nothing; `tumour_mean` the pathologist's
label; `colour_ridge` 53 colour and texture statistics of the patch; `encoder_ridge` the features of
a frozen network; `shuffled_ridge` is the colour ridge with the labels shuffled within the training
sections. `oracle_neighbour_mean` is no predictor but an oracle: it has read the truth beside each
spot, and says how far smoothness in space alone would carry.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from brstnet import metrics
from brstnet.config import Training
from brstnet.data.store import Store
from brstnet.evaluation.scores import array_average
from brstnet.evaluation.yardstick import Yardstick, measured, standardise
from brstnet.training.batches import Units
from brstnet.training.features import load_features
from brstnet.training.fitted import training_rows
from brstnet.training.model import build_backbone, choose_precision, colours

ALPHAS = tuple(float(a) for a in 10.0 ** np.arange(-1, 6))
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
TUMOUR = ("tumor", "tumour", "invasive cancer", "cancer in situ")
"""Labels that mean tumour: of the stnet layout, and of her2st."""
UNSAID = ("", "undetermined", "nan")
"""Labels that say nothing; any other means normal tissue."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen network whose features a ridge is fitted on.

    Attributes:
        name: a timm name, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        weights: `timm` loads what belongs to the name; else a file of weights; None: random.
    """

    name: str
    weights: str | None = "timm"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is optional of the controls.

    Attributes:
        encoder: a frozen network, if its ridge is wanted.
        device: where that network runs.
        seed: of the shuffling.
        progress: draw progress bars.
    """

    encoder: Encoder | None = None
    device: torch.device = CPU
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Predictions of the controls, standardised (N, G) by name, and how each came to be.

    `facts` has an entry for each: a text beginning "not available" where there is none.
    """

    predictions: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]

    @property
    def not_available(self) -> dict[str, str]:
        """Why, by control."""
        return {
            name: fact
            for name, fact in self.facts.items()
            if isinstance(fact, str) and fact.startswith("not available")
        }


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The spots that controls are fitted on: sections, which rows, section of each, targets."""

    sections: Sequence[str]
    rows: np.ndarray
    section_N: np.ndarray
    label_N: np.ndarray
    y_NG: np.ndarray


def predict_controls(
    yardstick: Yardstick,
    store: Store,
    sections: Sequence[str],
    genes: pd.DataFrame,
    true_NG: np.ndarray,
    wanted: Wanted,
) -> Controls:
    """All controls on these sections, fitted on the yardstick's training spots.

    Args:
        yardstick: the training spots, and the units.
        store: where all of them are.
        sections: to be judged.
        genes: which.
        true_NG: what was measured, standardised; only the oracle reads it.
        wanted: what is optional.
    """
    spots = store.spots(sections)
    totals = spots["total_counts"].to_numpy(float)
    found = {
        "depth_only": standardise(depth_only(genes, totals), genes),
        "training_mean": np.zeros((len(spots), len(genes))),
        "oracle_neighbour_mean": array_average(spots, itself=False) @ true_NG,
    }
    facts: dict[str, Any] = {
        "depth_only": "line on the log of the total count, fitted on the training spots",
        "training_mean": "the mean of the training spots, everywhere",
        "oracle_neighbour_mean": "mean of what was measured at the up to 8 neighbours on the array",
    }
    if len(yardstick.train) < 2:
        why = "not available: the training sections are not in this store, or only one is"
        return Controls(
            predictions=found,
            facts=facts | dict.fromkeys(("colour_ridge", "tumour_mean", "shuffled_ridge"), why),
        )
    train = _training(yardstick, store, genes)
    fitted = {"tumour_mean": _tumour(train, spots), **_ridges(train, store, sections, wanted)}
    if wanted.encoder is not None:
        fitted["encoder_ridge"] = _encoder(wanted.encoder, train, store, sections, wanted.device)
    facts |= {name: fact for name, (_, fact) in fitted.items()}
    found |= {
        name: prediction for name, (prediction, _) in fitted.items() if prediction is not None
    }
    return Controls(predictions=found, facts=facts)


def _training(yardstick: Yardstick, store: Store, genes: pd.DataFrame) -> Fitting:
    spots = store.spots(yardstick.train)
    rows = training_rows(spots, yardstick.protocol)
    y_NG = standardise(measured(yardstick, store, yardstick.train, genes), genes)
    return Fitting(
        sections=yardstick.train,
        rows=rows,
        section_N=spots["section"].to_numpy()[rows],
        label_N=tissue(spots["label"])[rows],
        y_NG=y_NG[rows],
    )


def tissue(labels: pd.Series) -> np.ndarray:
    """Pathologist's labels as tumour, normal or "" (nothing is known), (N,)."""
    words = labels.astype(str).str.strip().str.lower()
    kind = np.where(words.isin(TUMOUR), "tumour", "normal")
    return np.where(words.isin(UNSAID), "", kind)


def _tumour(train: Fitting, spots: pd.DataFrame) -> tuple[np.ndarray | None, Any]:
    """The training mean of tumour or of normal spots; where there is no label, of all."""
    known = {kind: int((train.label_N == kind).sum()) for kind in ("tumour", "normal")}
    if not all(known.values()):
        return None, "not available: training spots have no labels of both tumour and normal tissue"
    here = tissue(spots["label"])
    if not (here != "").any():
        return None, "not available: the judged spots have no labels"
    prediction = np.zeros((len(spots), train.y_NG.shape[1]))
    for kind in known:
        prediction[here == kind] = train.y_NG[train.label_N == kind].mean(axis=0)
    return prediction, {"training_spots": known, "unlabelled_spots": int((here == "").sum())}


def _ridges(
    train: Fitting, store: Store, sections: Sequence[str], wanted: Wanted
) -> dict[str, tuple[np.ndarray | None, Any]]:
    """The colour ridge, and the same with labels shuffled, at the same alpha."""
    features = colour_features(store, train.sections, progress=wanted.progress)[train.rows]
    here = colour_features(store, sections, progress=wanted.progress)
    ridge = fit_colour_ridge(features, train.y_NG, train.section_N)
    shuffled_NG = train.y_NG[shuffled_within(train.section_N, wanted.seed)]
    chance = _ridge(ridge.alpha).fit(features, shuffled_NG)
    facts = _ridge_facts(ridge, train)
    return {
        "colour_ridge": (ridge.predict(here), facts),
        "shuffled_ridge": (chance.predict(here), {"alpha": ridge.alpha, "seed": wanted.seed}),
    }


def _ridge_facts(ridge: "ColourRidge", train: Fitting) -> dict[str, Any]:
    return {
        "alpha": ridge.alpha,
        "left_out_median_pcc": ridge.cross_validated,
        "sections": list(train.sections),
        "spots": int(train.rows.sum()),
    }


def shuffled_within(section_N: np.ndarray, seed: int) -> np.ndarray:
    """Rows (N,) in which each section's are permuted among themselves; all genes move together."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(section_N))
    for section in np.unique(section_N):
        rows = np.flatnonzero(section_N == section)
        order[rows] = rng.permutation(rows)
    return order


def _encoder(
    encoder: Encoder,
    train: Fitting,
    store: Store,
    sections: Sequence[str],
    device: torch.device,
) -> tuple[np.ndarray | None, Any]:
    """A ridge on a frozen network's features, or why there is none."""
    try:
        seen = [encoder_features(encoder, store, s, device) for s in (train.sections, sections)]
    except (OSError, ValueError, RuntimeError) as error:
        return None, f"not available: {encoder.name}: {error}"
    ridge = fit_colour_ridge(seen[0][train.rows], train.y_NG, train.section_N)
    facts = {"encoder": encoder.name, "weights": encoder.weights, "features": seen[0].shape[1]}
    return ridge.predict(seen[1]), facts | _ridge_facts(ridge, train)


def encoder_features(
    encoder: Encoder, store: Store, sections: Sequence[str], device: torch.device = CPU
) -> np.ndarray:
    """Features of every spot of these sections, (N, F): the mean over the patch's 8 symmetries.

    Colours are standardised as the network was trained; what is computed is kept in the store's
    derived/, as for training.

    Raises:
        OSError: the weights cannot be had.
        ValueError: the network is unknown, or cannot take patches of this size.
    """
    training = Training(backbone=encoder.name, weights=encoder.weights, frozen=True)
    torch.manual_seed(0)  # only what has no weights is drawn
    backbone = build_backbone(training, store.input_px).to(device).eval().requires_grad_(False)  # noqa: FBT003
    mean, std = (torch.tensor(c, device=device).view(1, 3, 1, 1) * 255 for c in colours(backbone))
    nothing = torch.zeros(0, device=device)
    units = Units(
        image_mean=mean,
        image_std=std,
        target_mean_G=nothing,
        target_std_G=nothing,
        depth_slope_G=None,
        depth_scale=1.0,
    )
    precision = choose_precision(training, device)
    features_VNF = load_features(store, sections, backbone, units, precision, store.input_px)
    mean_NF: np.ndarray = features_VNF.mean(axis=0, dtype=np.float64)
    return mean_NF


def depth_only(genes: pd.DataFrame, totals: np.ndarray) -> np.ndarray:
    """What a spot's total count (N,) alone predicts, (N, G): the line fitted on training spots."""
    depth = np.log1p(totals)[:, None]
    line: np.ndarray = depth * genes["depth_slope"].to_numpy() + genes["depth_intercept"].to_numpy()
    return line


def colour_statistics(patch: np.ndarray) -> np.ndarray:
    """53 colour, stain and texture statistics of one uint8 RGB patch (H, W, 3)."""
    gray = cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY).astype(np.float32)
    lab = cv2.cvtColor(patch, cv2.COLOR_RGB2LAB).astype(np.float32)
    density = -np.log((patch.astype(np.float32) + 1) / 256)
    stains = density @ np.linalg.inv(RUIFROK).astype(np.float32)[:, :2]
    channels = np.concatenate([patch.astype(np.float32), lab, stains], axis=2).reshape(-1, 8)
    spread = np.percentile(channels, (10, 50, 90), axis=0)
    texture = [s for blur in (0, 1, 2) for s in _texture(gray, blur)]
    levels = np.histogram(gray, bins=4, range=(0, 256))[0] / gray.size
    return np.concatenate(
        [channels.mean(0), channels.std(0), spread.ravel(), texture, levels, density.std((0, 1))]
    )


def _texture(gray: np.ndarray, blur: int) -> tuple[float, float]:
    """Mean gradient and spread of the Laplacian at one scale (Gaussian of `blur` pixels)."""
    smooth = cv2.GaussianBlur(gray, (0, 0), blur) if blur else gray
    gradient = cv2.magnitude(
        cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    )
    return float(gradient.mean()), float(cv2.Laplacian(smooth, cv2.CV_32F).std())


def colour_features(store: Store, sections: Sequence[str], *, progress: bool = True) -> np.ndarray:
    """`colour_statistics` of every spot of these sections, (N, 53)."""
    bar = tqdm(sections, "colour statistics", unit="section", disable=not progress)
    return np.concatenate([_section_colours(store, section) for section in bar])


@functools.lru_cache(maxsize=256)
def _section_colours(store: Store, section: str) -> np.ndarray:
    """Of one section: the folds of a cross-validated evaluation want each several times."""
    return np.array([colour_statistics(patch) for patch in store.patches(section)])


@dataclass(frozen=True, kw_only=True)
class ColourRidge:
    """A fitted ridge: features (N, 53) of the patch's colours to standardised targets (N, G).

    An encoder's ridge is the same, with as many features as it has.
    """

    model: Pipeline
    alpha: float
    cross_validated: dict[float, float]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Standardised targets, (N, G)."""
        predicted: np.ndarray = self.model.predict(features)
        return predicted


def fit_colour_ridge(features: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray) -> ColourRidge:
    """Fit the ridge on training spots, alpha by leaving one section out inside them.

    The alpha with the highest median PCC on the left-out sections is taken, so that the floor is as
    high as this kind of model allows.

    Raises:
        ValueError: there are fewer than two training sections.
    """
    sections = np.unique(section_N)
    if len(sections) < 2:
        raise ValueError(f"leaving one section out needs at least 2 sections, got {len(sections)}")
    scores = {alpha: _left_out(alpha, features, y_NG, section_N) for alpha in ALPHAS}
    best = max(ALPHAS, key=lambda alpha: scores[alpha])
    return ColourRidge(model=_ridge(best).fit(features, y_NG), alpha=best, cross_validated=scores)


def _ridge(alpha: float) -> Pipeline:
    return make_pipeline(StandardScaler(), Ridge(alpha))


def _left_out(alpha: float, features: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray) -> float:
    parts = [
        metrics.pearson(_ridge(alpha).fit(features[a], y_NG[a]).predict(features[b]), y_NG[b])
        for a, b in LeaveOneGroupOut().split(features, groups=section_N)
    ]
    return float(np.nan_to_num(np.mean([metrics.nanmedian(r) for r in parts]), nan=-1.0))
