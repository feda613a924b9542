"""What a network must beat: a predictor that knows only the spot's total, and a ridge on colour."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from brstnet import metrics
from brstnet.data.store import Store

ALPHAS = tuple(float(a) for a in 10.0 ** np.arange(-1, 6))
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""


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
    return np.concatenate([[colour_statistics(p) for p in store.patches(s)] for s in bar])


@dataclass(frozen=True, kw_only=True)
class ColourRidge:
    """A fitted colour ridge: features (N, 53) to standardised targets (N, G)."""

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
