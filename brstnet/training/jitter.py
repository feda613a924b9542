"""A patch's stains a little stronger or weaker, as another day in the laboratory gives them.

Colour deconvolution (Ruifrok and Johnston 2001, Anal. Quant. Cytol. Histol. 23:291) of a pixel's
optical density OD gives its stains s = OD M^-1. Tellez et al. 2018 (IEEE TMI 37:2126, doi
10.1109/TMI.2018.2820199) draw s' = (1 + a) s + b for each patch and stain; Tellez et al. 2019
(Med. Image Anal. 58:101544, doi 10.1016/j.media.2019.101544) compare how much. There and back is
one affine map of the optical density: OD' = OD M^-1 diag(1 + a) M + b M.

Shape letters: B batch, C channels, H and W pixels, P pixels of a patch; 43 are the three rows of
the map's matrix, then its shift.
"""

import numpy as np
import torch
from torch import Tensor

HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""M: optical density in red, green, blue (columns) of haematoxylin, eosin, DAB (rows); the numbers
of Ruifrok and Johnston's plugin, as in scikit-image's `rgb_from_hed`."""

SIGMA = 0.05
"""a and b are uniform in -SIGMA..SIGMA, b in natural units of optical density (Tellez et al. 2019:
HED-light)."""


def draw_jitter(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A map for each of `shape` patches, float32 (*shape, 4, 3)."""
    a, b = np.moveaxis(generator.uniform(-SIGMA, SIGMA, (*shape, 2, 3)), -2, 0)
    return stain_map(a, b)


def stain_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What stains (1 + a) s + b, (..., 3) each, do to optical density: float32 (..., 4, 3)."""
    matrix = np.linalg.inv(HED) * (1 + a)[..., None, :] @ HED
    return np.concatenate([matrix, (b @ HED)[..., None, :]], axis=-2).astype(np.float32)


def jitter(x_BHWC: Tensor, jitter_B43: Tensor) -> Tensor:
    """Patches uint8 (B, H, W, C) through their maps: float32 (B, H, W, C), in levels of 0..255.

    A level is added before the logarithm and taken away in the end, so that black has one too.
    """
    od_BPC = -torch.log((x_BHWC.flatten(1, 2).float() + 1) / 256)
    od_BPC = torch.baddbmm(jitter_B43[:, 3:], od_BPC, jitter_B43[:, :3])
    return (torch.exp(-od_BPC) * 256 - 1).clamp(0, 255).view(x_BHWC.shape)
