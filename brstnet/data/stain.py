"""Stain normalisation: every slide is brought to the brightness and the stains of one target.

`staintools` runs the library that the paper used. `vahadane` is the same chain solved once per
distinct colour: every step (lightness, tissue mask, optical density, sparse codes, percentiles,
reconstruction) depends on a pixel's 24-bit colour alone, and a slide of 92 million pixels holds
some 235 000 colours. StainTools also stops its dictionary after one second of wall clock, so that
its stains change with the machine's load; here it is fitted until it stands still.

Formulas: Vahadane et al. 2016 (IEEE TMI 35(8)); the constants are those of StainTools 2.1.2.
Shapes: H W rows and columns, K distinct colours, 2 stains (haematoxylin, eosin), 3 RGB.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

N_CODES = 1 << 24
TILE_PX = 1 << 20  # pixels handled at a time; bounds the temporaries to some 20 MB
TISSUE_LIGHTNESS = 0.8
WHITE_PERCENTILE, STAIN_PERCENTILE = 95, 99
DICTIONARY_PENALTY, CONCENTRATION_PENALTY = 0.1, 0.01
# Start of the dictionary (Macenko et al. 2009); other starts ended in the same stains on her2st.
REFERENCE_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
MAX_ITERATIONS, TOLERANCE = 2000, 1e-7  # her2st slides need 60 to 100 iterations
MIN_ANGLE_DEG = 2.0  # her2st has 13 to 20 degrees; a StainTools fit that failed silently 0.8
TOO_LITTLE_STAIN = (
    "the 99th percentile of each stain's concentration must be above 0, got {maxima}: "
    "each stain must colour 1 % of the pixels, so crop the image to its tissue"
)


@dataclass(frozen=True, kw_only=True, eq=False)  # eq=False: arrays have no single truth value
class StainTarget:
    """What slides are normalised to; raises ValueError where its stains cannot be told apart.

    Attributes:
        method: "vahadane" or "staintools": what fitted it, and what `normalise` will use.
        stain_matrix: (2, 3) rows haematoxylin, eosin: RGB optical densities of unit length.
        max_concentrations: (2,) 99th percentile of each stain's concentration over all pixels.
    """

    method: str
    stain_matrix: Float
    max_concentrations: Float

    def __post_init__(self) -> None:
        _check_method(self.method)
        _check_stain_matrix(self.stain_matrix)
        _check_max_concentrations(self.max_concentrations)

    def to_json(self) -> dict[str, Any]:
        """Return a string and lists of floats, which JSON stores exactly."""
        matrix, maxima = self.stain_matrix.tolist(), self.max_concentrations.tolist()
        return {"method": self.method, "stain_matrix": matrix, "max_concentrations": maxima}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StainTarget":
        """Read what `to_json` wrote."""
        matrix = np.array(fields["stain_matrix"], np.float64)
        maxima = np.array(fields["max_concentrations"], np.float64)
        return cls(method=fields["method"], stain_matrix=matrix, max_concentrations=maxima)


def fit_target(image: UInt8, *, method: str) -> StainTarget:
    """Standardise the lightness of a (H, W, 3) RGB image and fit its stains.

    Raises:
        ValueError: no uint8 RGB image, no tissue, a stain that is missing or too like the other,
            or a dictionary that does not converge.
    """
    _check_method(method)
    _check_image(image)
    if method == "staintools":
        return _fit_with_staintools(image)
    _, rgb_K3, pixels_K = count_colours(image)
    with threadpool_limits(limits=1, user_api="blas"):  # more threads are slower, and vary
        rgb_K3 = standardise_lightness(rgb_K3, pixels_K)
        matrix, _, maxima = _fit_colours(rgb_K3, pixels_K)
    return StainTarget(method=method, stain_matrix=matrix, max_concentrations=maxima)


def normalise(
    image: UInt8,
    target: StainTarget,
    *,
    source_matrix: Float | None = None,
    lightness: bool = True,
    out: UInt8 | None = None,
) -> UInt8:
    """Return a (H, W, 3) RGB image with its lightness standardised and the target's stains.

    `source_matrix` holds the (2, 3) stains of the image once standardised; None fits them. Without
    `lightness` that of the image stays as it is (the authors' code). `out` is written and returned;
    `image` itself saves a copy. Raises ValueError as `fit_target`.
    """
    _check_image(image)
    if source_matrix is not None:
        _check_stain_matrix(source_matrix)
    out = np.empty_like(image) if out is None else out
    if out.shape != image.shape or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 {image.shape}, got {out.dtype} {out.shape}")
    if target.method == "staintools":
        out[...] = _transform_with_staintools(image, target, source_matrix, lightness=lightness)
        return out
    code_K, rgb_K3, pixels_K = count_colours(image)
    rgb_K3, _ = normalise_colours(rgb_K3, pixels_K, target, source_matrix, lightness=lightness)
    table = colour_table(code_K, rgb_K3)
    for rows in _tiles(image):
        out[rows] = recolour(image[rows], table)
    return out


def normalise_colours(
    rgb_K3: UInt8,
    pixels_K: Int,
    target: StainTarget,
    source_matrix: Float | None = None,
    *,
    lightness: bool = True,
) -> tuple[UInt8, Float]:
    """Return what a slide's distinct colours become, (K, 3), and its own stains, (2, 3).

    All that `normalise` needs to know of an image are its colours and how often each is there.
    """
    with threadpool_limits(limits=1, user_api="blas"):  # more threads are slower, and vary
        if lightness:
            rgb_K3 = standardise_lightness(rgb_K3, pixels_K)
        matrix, conc_K2, maxima = _fit_colours(rgb_K3, pixels_K, source_matrix)
        conc_K2 *= target.max_concentrations / maxima
        return (255 * np.exp(-conc_K2 @ target.stain_matrix)).astype(np.uint8), matrix


def colour_table(code_K: Int, rgb_K3: UInt8) -> npt.NDArray[np.uint32]:
    """Return the code of what each colour becomes, (2^24,); colours not in `code_K` become 0."""
    table = np.zeros(N_CODES, "<u4")
    table[code_K] = _codes(rgb_K3[None])[0]
    return table


def recolour(image: UInt8, table: npt.NDArray[np.uint32]) -> UInt8:
    """Return a (H, W, 3) RGB image with each colour replaced as `colour_table` says."""
    rgba_HW4 = np.take(table, _codes(image))[..., None].view(np.uint8)
    return np.asarray(cv2.cvtColor(rgba_HW4, cv2.COLOR_RGBA2RGB), np.uint8)


def count_colours(image: UInt8) -> tuple[Int, UInt8, Int]:
    """Return the (K,) codes, (K, 3) RGB and (K,) numbers of pixels of the distinct colours."""
    pixels = np.zeros(N_CODES, np.int64)
    for rows in _tiles(image):
        np.add.at(pixels, _codes(image[rows]).ravel(), 1)  # half the time of bincount
    code_K = np.flatnonzero(pixels)
    rgb_K3 = np.stack([code_K & 255, code_K >> 8 & 255, code_K >> 16], axis=1).astype(np.uint8)
    return code_K, rgb_K3, pixels[code_K]


def standardise_lightness(rgb_K3: UInt8, pixels_K: Int) -> UInt8:
    """Stretch the lightness so that its 95th percentile is white (LuminosityStandardizer)."""
    lab_1K3 = cv2.cvtColor(rgb_K3[None], cv2.COLOR_RGB2LAB)
    lightness_K = lab_1K3[0, :, 0].astype(np.float64)
    white = weighted_percentile(lightness_K, pixels_K, WHITE_PERCENTILE)
    if white == 0:
        raise ValueError("an image must have light, got 95 % black pixels: check how it was read")
    lab_1K3[0, :, 0] = np.clip(255 * lightness_K / white, 0, 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(lab_1K3, cv2.COLOR_LAB2RGB)[0], np.uint8)


def tissue_mask(rgb_K3: UInt8) -> npt.NDArray[np.bool_]:
    """Mark the (K,) colours darker than a lightness of 0.8; raise ValueError if there is none."""
    lightness_K = cv2.cvtColor(rgb_K3[None], cv2.COLOR_RGB2LAB)[0, :, 0] / 255.0
    if lightness_K.min() >= TISSUE_LIGHTNESS:
        found = f"lightness {lightness_K.min():.3f} and above, not below {TISSUE_LIGHTNESS}"
        raise ValueError(f"an image must hold tissue, got {found}: leave this slide out")
    return np.asarray(lightness_K < TISSUE_LIGHTNESS)


def optical_density(rgb: UInt8) -> Float:
    """Return -ln(RGB / 255), with 0 read as 1 and no density below 1e-6 (StainTools)."""
    density_of_byte = np.maximum(-np.log(np.maximum(np.arange(256), 1) / 255), 1e-6)
    return np.asarray(density_of_byte[rgb], np.float64)


def sparse_code(od_K3: Float, stain_matrix: Float, penalty: float) -> Float:
    """Return the (K, 2) concentrations c >= 0 that minimise |od - c M|^2 / 2 + penalty * sum(c).

    Two stains of non-negative density need no solver: where the free minimum has a negative
    concentration that stain is 0, and the other is fitted alone.
    """
    (hh, he), (_, ee) = stain_matrix @ stain_matrix.T
    h_K, e_K = (od_K3 @ stain_matrix.T - penalty).T
    free_h_K = (ee * h_K - he * e_K) / (hh * ee - he * he)
    free_e_K = (hh * e_K - he * h_K) / (hh * ee - he * he)
    conc_h_K = np.where(free_e_K < 0, np.maximum(h_K, 0) / hh, np.maximum(free_h_K, 0))
    conc_e_K = np.where(free_h_K < 0, np.maximum(e_K, 0) / ee, np.maximum(free_e_K, 0))
    return np.stack([conc_h_K, conc_e_K], axis=1)


def learn_stain_matrix(
    od_K3: Float, pixels_K: Int, *, max_iterations: int = MAX_ITERATIONS
) -> Float:
    """Fit (2, 3) stains by alternating sparse codes and stains over all pixels.

    Minimises the mean of |od - c M|^2 / 2 + 0.1 * sum(c) with c >= 0, M >= 0 and rows of M no
    longer than 1 (Vahadane 2016 as posed by StainTools); raises ValueError if it cannot.
    """
    weight_K = pixels_K / pixels_K.sum()
    matrix = _unit_rows(REFERENCE_STAINS)
    for _ in range(max_iterations):
        conc_K2 = sparse_code(od_K3, matrix, DICTIONARY_PENALTY)
        weighted_2K = (conc_K2 * weight_K[:, None]).T
        previous, matrix = matrix, _update(matrix, weighted_2K @ conc_K2, weighted_2K @ od_K3)
        _check_stain_matrix(matrix)
        if np.abs(matrix - previous).max() < TOLERANCE:
            # Haematoxylin first: it absorbs the red light that eosin lets pass.
            return _unit_rows(matrix if matrix[0, 0] >= matrix[1, 0] else matrix[::-1])
    raise ValueError(
        f"stains must stand still (changes below {TOLERANCE}), got changes of "
        f"{np.abs(matrix - previous).max():.2g} after {max_iterations} iterations: use more tissue"
    )


def weighted_percentile(value_K: Float, weight_K: Int, percent: float) -> float:
    """Return `np.percentile(np.repeat(value_K, weight_K), percent)` to the last bit."""
    order_K = np.argsort(value_K, kind="stable")
    end_K = np.cumsum(weight_K[order_K])
    position = percent / 100 * (end_K[-1] - 1)
    ranks = np.array([np.floor(position), np.ceil(position)])
    low, high = value_K[order_K[np.searchsorted(end_K, ranks, side="right")]]
    part = position - np.floor(position)  # numpy interpolates from the nearer end
    return float(low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part))


def _fit_colours(
    rgb_K3: UInt8, pixels_K: Int, matrix: Float | None = None
) -> tuple[Float, Float, Float]:
    """Return (2, 3) stains, fitted where None, (K, 2) concentrations and their (2,) maxima."""
    if matrix is None:
        tissue_K = tissue_mask(rgb_K3)
        matrix = learn_stain_matrix(optical_density(rgb_K3[tissue_K]), pixels_K[tissue_K])
    conc_K2 = sparse_code(optical_density(rgb_K3), matrix, CONCENTRATION_PENALTY)
    maxima = [weighted_percentile(conc_K, pixels_K, STAIN_PERCENTILE) for conc_K in conc_K2.T]
    _check_max_concentrations(np.array(maxima))
    return matrix, conc_K2, np.array(maxima)


def _update(matrix: Float, conc_conc_22: Float, conc_od_23: Float) -> Float:
    """Return better stains for fixed codes, one by one (Mairal et al. 2009, algorithm 2)."""
    if not conc_conc_22.diagonal().all():
        raise ValueError(
            "tissue must show two stains, got one that no pixel uses: is this H&E, in RGB order?"
        )
    matrix = matrix.copy()
    for _ in range(10):  # cheap beside the codes
        for k in range(2):
            step_3 = (conc_od_23[k] - conc_conc_22[k] @ matrix) / conc_conc_22[k, k]
            row_3 = np.maximum(matrix[k] + step_3, 0)
            matrix[k] = row_3 / max(1.0, float(np.linalg.norm(row_3)))
    return matrix


def _unit_rows(matrix: Float) -> Float:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def _tiles(image: UInt8) -> list[slice]:
    rows = max(1, TILE_PX // image.shape[1])
    return [slice(top, top + rows) for top in range(0, image.shape[0], rows)]


def _codes(rgb_HW3: UInt8) -> npt.NDArray[np.uint32]:
    """Return (H, W) numbers R + 256 G + 65536 B."""
    rgba_HW4 = cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2RGBA)
    rgba_HW4[..., 3] = 0
    return np.asarray(rgba_HW4.view("<u4")[..., 0], np.uint32)


def _fit_with_staintools(image: UInt8) -> StainTarget:
    normaliser, standardised = _staintools(image)
    normaliser.fit(standardised)
    matrix, maxima = normaliser.stain_matrix_target, normaliser.maxC_target.reshape(2)
    return StainTarget(method="staintools", stain_matrix=matrix, max_concentrations=maxima)


def _transform_with_staintools(
    image: UInt8, target: StainTarget, matrix: Float | None, *, lightness: bool
) -> UInt8:
    normaliser, standardised = _staintools(image, lightness=lightness)
    normaliser.stain_matrix_target = target.stain_matrix
    normaliser.maxC_target = target.max_concentrations.reshape(1, 2)
    if matrix is None:
        matrix = normaliser.extractor.get_stain_matrix(standardised)
        _check_stain_matrix(matrix)  # the library would go on with two equal stains
    normaliser.extractor = SimpleNamespace(get_stain_matrix=lambda _: matrix)
    try:
        with np.errstate(divide="raise"):
            return normaliser.transform(standardised)
    except FloatingPointError as fault:
        raise ValueError(TOO_LITTLE_STAIN.format(maxima="0")) from fault


def _staintools(image: UInt8, *, lightness: bool = True) -> tuple[Any, UInt8]:
    """Return the library's Vahadane normaliser and the image with its lightness standardised."""
    try:
        import staintools
    except ImportError as fault:
        message = "stain method 'staintools' needs the library: pip install brstnet[staintools]"
        raise ImportError(message) from fault
    standardised = staintools.LuminosityStandardizer.standardize(image) if lightness else image
    tissue_mask(standardised.reshape(-1, 3))
    return staintools.StainNormalizer("vahadane"), standardised


def _check_method(method: str) -> None:
    if method not in ("vahadane", "staintools"):
        raise ValueError(f"method must be 'vahadane' or 'staintools', got {method!r}")


def _check_image(image: UInt8) -> None:
    given = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
    if not given.startswith("uint8") or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be a uint8 RGB array of (H, W, 3), got {given}")


def _check_stain_matrix(matrix: Float) -> None:
    if matrix.shape != (2, 3) or not (np.isfinite(matrix) & (matrix >= 0)).all():
        raise ValueError(f"stain matrix must be (2, 3), finite and not negative, got {matrix}")
    cosine = np.clip(np.prod(_unit_rows(matrix), axis=0).sum(), -1, 1)
    angle_deg = np.degrees(np.arccos(cosine))
    if not angle_deg >= MIN_ANGLE_DEG:
        raise ValueError(
            f"stains must be {MIN_ANGLE_DEG} degrees apart, got {angle_deg:.2f}: use an image with "
            f"more tissue, stained with both haematoxylin and eosin; rows {matrix.tolist()}"
        )


def _check_max_concentrations(maxima: Float) -> None:
    if maxima.shape != (2,) or not (np.isfinite(maxima) & (maxima > 0)).all():
        raise ValueError(TOO_LITTLE_STAIN.format(maxima=maxima.tolist()))
