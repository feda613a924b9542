"""Demo tissue in the `stnet` raw layout: drawn H&E-like slides whose morphology drives planted genes.

Three morphology drivers are measured in each drawn slide, in a window around each spot. The share
of the counts that a planted gene takes follows one driver; that of a null gene is constant.

Shapes: S array spots of all sections; G genes; H, W slide pixels, also written (H, W).
"""

import gzip
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import ndimage, special

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SUBTYPES = ("HER2_luminal", "HER2_non_luminal", "Luminal_A", "Luminal_B", "TNBC")
DRIVERS = ("nuclear_fraction", "nucleus_diameter", "eosin")
# Range of relative shares by (block, group). "high" never overlaps "rest", so it is the top by
# mean; the tail of the rest is so rare that a section may lack a gene altogether.
SHARES = {
    ("high", "planted"): (1.0, 3.0),
    ("high", "null"): (1.0, 3.0),
    ("rest", "planted"): (0.02, 0.3),
    ("rest", "null"): (1e-4, 0.3),
}
HIGH_GENES = 120
# Log share per standard deviation of the driver, and negative binomial dispersion: together they
# set the ceiling of the high planted genes near 0.8.
EFFECTS = (0.35, 0.65)
DISPERSION = 0.08
MEDIAN_COUNTS = 8000
SHALLOW = 0.02  # of the spots under tissue fail: a twentieth of the counts, for the spot ledger
MIN_COUNTS = 1000  # the paper's spot filter: a ceiling is that of the spots which pass it
# Optical density of haematoxylin, eosin in red, green, blue: read off her2st slides C2 and B4.
STAINS_2C = np.array([[0.67, 0.67, 0.33], [0.24, 0.87, 0.42]])


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What to draw; the same settings give the same bytes."""

    patients: int = 7
    sections_per_patient: int = 2
    spots_per_section: int = 110
    pitch_px: int = 72
    genes: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a ValueError that names every setting out of range, with its range."""
        ranges = {
            "patients": (6, 99),
            "sections_per_patient": (1, 9),
            "spots_per_section": (12, 1000),
            "pitch_px": (36, 300),
            "genes": (HIGH_GENES + 20, 30000),
            "seed": (0, 2**32 - 1),
        }
        faults = [
            f"{name} must lie in {low}..{high}, got {getattr(self, name)}"
            for name, (low, high) in ranges.items()
            if not low <= getattr(self, name) <= high
        ]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def array_side(self) -> int:
        """Spots along a side of the array, a third of which lies off the tissue."""
        return int(np.ceil(np.sqrt(1.5 * self.spots_per_section)))

    @property
    def size_px(self) -> int:
        """Height and width of a slide: the array and a margin of 5/6 of a pitch all around."""
        return round((self.array_side + 2 / 3) * self.pitch_px)

    @property
    def window_px(self) -> int:
        """Side of the window in which the drivers are measured: 64 px at a pitch of 72 px."""
        return round(self.pitch_px * 8 / 9)


def make_demo(
    folder: Path,
    demo: Demo | None = None,
    progress: Callable[[str], object] = lambda section: None,
) -> None:
    """Write demo slides, counts and their truth to `folder`; `progress` hears of each slide drawn.

    `truth.parquet`: gene, block, group, driver, effect, ceiling (no driver, no ceiling for a null).
    `truth_spots.parquet`: section, spot, standardised drivers, library_size of spots under tissue.

    Raises:
        FileExistsError: `folder` is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"the demo wants a new or an empty folder: {folder} is neither")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        half_done = Path(scratch, folder.name)
        half_done.mkdir()
        for name, content in demo_files(demo or Demo(), progress):
            (half_done / name).write_bytes(content)
        half_done.replace(folder)


def demo_files(demo: Demo, progress: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """Names and contents; all slides first, as the drivers are standardised over all of them."""
    slides, drawn = {}, {}
    for patient in range(1, demo.patients + 1):
        for replicate in range(1, demo.sections_per_patient + 1):
            name = f"BC{90000 + patient}_C{replicate}"
            slides[name], drawn[name] = draw_section(demo, patient, replicate)
            progress(name)
    spots = pd.concat(drawn, names=["section", "spot"])
    drivers = (spots[list(DRIVERS)] - spots[list(DRIVERS)].mean()) / spots[list(DRIVERS)].std()
    spots[list(DRIVERS)] = drivers.fillna(0.0)  # off the tissue, or no nucleus in the window
    genes, expected, counts = plant_counts(demo, spots)
    rows = []
    for number, name in enumerate(slides):
        files = section_files(number, name, slides[name], spots.loc[name], counts.loc[name])
        subtype = SUBTYPES[number // demo.sections_per_patient % len(SUBTYPES)]
        row = dict(zip(("patient", "replicate"), name.split("_"), strict=True))
        rows.append({"type": subtype} | row | {column: file for column, (file, _) in files.items()})
        yield from files.values()
    yield "metadata.csv", pd.DataFrame(rows).to_csv(index=False).encode()
    genes["ceiling"] = ceilings(expected, counts, spots["under_tissue"])
    genes.loc[genes["group"] == "null", "ceiling"] = np.nan
    yield "truth.parquet", genes.to_parquet(index=False)
    truth = spots.loc[spots["under_tissue"], [*DRIVERS, "library_size"]].reset_index()
    yield "truth_spots.parquet", truth.to_parquet(index=False)


# A slide -----------------------------------------------------------------------------------------


def draw_section(demo: Demo, patient: int, replicate: int) -> tuple[bytes, pd.DataFrame]:
    """The slide as JPEG, and its array spots: X, Y (px), under_tissue, drivers, library_size."""
    # Replicates count from 1: numpy gives [seed, patient] and [seed, patient, 0] the same stream.
    rng = np.random.default_rng([demo.seed, patient, replicate])
    of_patient = np.random.default_rng([demo.seed, patient])
    scale = demo.pitch_px / 72
    spots = array_spots(demo, rng)
    tissue, spots["under_tissue"] = draw_outline(demo, spots, rng)
    density, size, fibre, chromatin, haze = (  # each uniform in 0..1
        special.ndtr(smooth_field(rng, demo.size_px, 65 * scale)) for _ in range(5)
    )
    nuclei, haematoxylin = draw_nuclei(rng, tissue, density, size, chromatin, scale)
    eosin = draw_fibres(rng, fibre, scale)
    spots[list(DRIVERS)] = measure(demo, spots, nuclei, tissue, haematoxylin, eosin)
    depth = 0.35 * smooth_field(rng, demo.size_px, 100 * scale)[pixels(spots)]
    depth += rng.normal(0, 0.25, len(spots)) + of_patient.normal(0, 0.15)
    depth += np.log(0.05) * (rng.random(len(spots)) < SHALLOW)
    depth += np.log(0.005) * ~spots["under_tissue"]  # what diffuses out of the tissue
    spots["library_size"] = MEDIAN_COUNTS * np.exp(depth)
    stains_2C = shift_stains(shift_stains(STAINS_2C, of_patient, 0.03), rng, 0.01)
    image = of_patient.uniform(236, 248) * render(rng, tissue, haematoxylin, eosin, haze, stains_2C)
    bgr = image[..., ::-1].clip(0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes(), spots


def array_spots(demo: Demo, rng: np.random.Generator) -> pd.DataFrame:
    """All spots of the array: index "XxY" (column x row, from 1), pixel column X and row Y."""
    row, column = np.indices((demo.array_side, demo.array_side)).reshape(2, -1)
    centres = (np.stack([column, row], axis=1) + 5 / 6) * demo.pitch_px
    centres += rng.normal(0, 0.02 * demo.pitch_px, centres.shape)
    names = [f"{x + 1}x{y + 1}" for x, y in zip(column, row, strict=True)]
    return pd.DataFrame(centres.round(2), index=pd.Index(names, name="spot"), columns=["X", "Y"])


def pixels(spots: pd.DataFrame) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of each spot, to index an image (H, W)."""
    return spots["Y"].to_numpy(np.intp), spots["X"].to_numpy(np.intp)


def smooth_field(rng: np.random.Generator, size_px: int, sigma_px: float) -> Array:
    """Smooth Gaussian noise (H, W), standardised; made on a coarse grid, as it has no detail."""
    side = int(4 * size_px / sigma_px) + 2
    coarse = ndimage.gaussian_filter(rng.normal(size=(side, side)), 4)
    field = cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / field.std()


def draw_outline(demo: Demo, spots: pd.DataFrame, rng: np.random.Generator) -> tuple[Mask, Mask]:
    """Tissue (H, W) with clefts, and which spots lie inside: exactly the number asked for."""
    y, x = np.abs(np.linspace(-1, 1, demo.size_px)[np.indices((demo.size_px,) * 2)])
    level = 0.15 * smooth_field(rng, demo.size_px, 1.4 * demo.pitch_px) - (x**4 + y**4) ** 0.25
    level += 0.02 * smooth_field(rng, demo.size_px, 0.2 * demo.pitch_px)
    level -= 5 * (np.maximum(x, y) - 0.9).clip(0)  # keep off the rim of the slide
    at_spot = level[pixels(spots)]
    cut = np.sort(at_spot)[-demo.spots_per_section]
    clefts = smooth_field(rng, demo.size_px, 0.12 * demo.pitch_px) > 2.2
    return (level >= cut) & ~clefts, at_spot >= cut


def draw_nuclei(
    rng: np.random.Generator,
    tissue: Mask,
    density: Array,
    size: Array,
    chromatin: Array,
    scale: float,
) -> tuple[Array, Array]:
    """Nuclei drawn (x, y, diameter in px; one a row) and their haematoxylin (H, W), else zero.

    The area they cover follows `density`, whatever their `size`; they go from small and dark, like
    lymphocytes, to large and pale with a darker rim, like tumour cells.
    """
    step = 5 * scale
    y, x = np.mgrid[: len(tissue) : step, : len(tissue) : step].reshape(2, -1)
    x, y = ((c + rng.uniform(0, step, c.shape)).clip(0, len(tissue) - 1) for c in (x, y))
    row, column = y.astype(int), x.astype(int)
    large = size[row, column]
    minor = scale * (2.3 + 4.7 * large) * rng.uniform(0.88, 1.12, x.shape)
    major = minor * rng.uniform(1.05, 1.5, x.shape)
    wanted = (0.05 + 0.4 * density[row, column]) * (1 + 0.8 * large)
    wanted *= step**2 / (np.pi * minor * major)
    wanted[~tissue[row, column]] = 0
    canvas, drawn = np.zeros(tissue.shape, np.uint8), []
    for i in rng.permutation(np.flatnonzero(rng.random(x.shape) < wanted)):
        if canvas[row[i], column[i]]:
            continue  # nuclei hardly overlap
        centre, angle = (round(16 * x[i]), round(16 * y[i])), rng.uniform(0, 180)
        dark = rng.uniform(0.9, 1.1) * (110 + 40 * chromatin[row[i], column[i]])
        for shrink, shade in ((16, dark), (11, dark * (1 - 0.65 * large[i]))):
            axes = (round(shrink * major[i]), round(shrink * minor[i]))  # shift=4: in 1/16 px
            cv2.ellipse(canvas, centre, axes, angle, 0, 360, shade, -1, cv2.LINE_AA, 4)
        drawn.append((x[i], y[i], 2 * np.sqrt(minor[i] * major[i])))
    return np.array(drawn), canvas / 100


def draw_fibres(rng: np.random.Generator, strength: Array, scale: float) -> Array:
    """Eosin (H, W) as strong as `strength`, in streaks whose direction drifts over the slide."""
    noise = rng.normal(size=strength.shape)
    direction = np.pi * special.ndtr(smooth_field(rng, len(noise), 120 * scale))
    reach = round(11 * scale)
    streaks = np.zeros_like(noise)
    for angle in np.pi / 4 * np.arange(4):
        line = np.zeros((2 * reach + 1, 2 * reach + 1))
        dx, dy = round(reach * np.cos(angle)), round(reach * np.sin(angle))
        cv2.line(line, (reach - dx, reach - dy), (reach + dx, reach + dy), 1.0)
        streaks += np.cos(direction - angle) ** 8 * cv2.filter2D(noise, -1, line / line.sum())
    streaks = cv2.GaussianBlur(streaks, (0, 0), 1.1 * scale)
    return (0.18 + 0.5 * strength) * (1 + 0.3 * streaks / streaks.std()).clip(0.2, 2)


def measure(
    demo: Demo, spots: pd.DataFrame, nuclei: Array, tissue: Mask, haematoxylin: Array, eosin: Array
) -> Array:
    """The drivers (spots, 3) in the window around each spot, NaN off the tissue.

    They are nuclear area as a fraction of the tissue, mean diameter (px) of the nuclei centred in
    the window, and mean eosin (optical density) of the tissue between nuclei.
    """
    drivers = np.full((len(spots), len(DRIVERS)), np.nan)
    half = demo.window_px // 2
    for i in np.flatnonzero(spots["under_tissue"]):
        x, y = spots["X"].iloc[i], spots["Y"].iloc[i]
        window = np.s_[int(y) - half : int(y) + half, int(x) - half : int(x) + half]
        inside = np.abs(nuclei[:, :2] - [x, y]).max(axis=1) < half
        nuclear = haematoxylin[window] > 0
        drivers[i, 0] = nuclear.sum() / tissue[window].sum()
        if inside.any():
            drivers[i, 1] = nuclei[inside, 2].mean()
        drivers[i, 2] = eosin[window][tissue[window] & ~nuclear].mean()
    return drivers


def shift_stains(stains_2C: Array, rng: np.random.Generator, spread: float) -> Array:
    """The stains as another bath would give them: colours off by `spread`, strengths by more."""
    return (stains_2C + rng.normal(0, spread, (2, 3))) * np.exp(rng.normal(0, 4 * spread, (2, 1)))


def render(
    rng: np.random.Generator,
    tissue: Mask,
    haematoxylin: Array,
    eosin: Array,
    haze: Array,
    stains_2C: Array,
) -> Array:
    """Light passed (H, W, RGB), 1 for the empty slide, by the Beer-Lambert law."""
    soft = cv2.GaussianBlur(tissue.astype(float), (0, 0), 1.2)
    nuclear = cv2.GaussianBlur(haematoxylin, (0, 0), 0.7)
    nuclear *= 1 + 0.12 * rng.normal(size=nuclear.shape)  # chromatin
    stained = np.stack(
        [0.05 + 0.15 * haze + nuclear, eosin * (1 - 0.45 * nuclear.clip(0, 1))], axis=-1
    )
    light = np.exp(-(soft[..., None] * stained) @ stains_2C)
    return light + rng.normal(0, 0.006, light.shape)


# Genes, counts, files ----------------------------------------------------------------------------


def plant_counts(demo: Demo, spots: pd.DataFrame) -> tuple[pd.DataFrame, Array, pd.DataFrame]:
    """Genes with their truth, expected counts (S, G) and negative binomial counts (S, G).

    Each block and group keeps a constant total share whatever its genes do, so a null gene stays
    null once counts are divided by the spot total.
    """
    rng = np.random.default_rng(demo.seed)
    ids = iter(rng.permutation(demo.genes) + 99900000001)
    tables, shares = [], []
    for (block, group), (low, high) in SHARES.items():
        size = HIGH_GENES if block == "high" else demo.genes - HIGH_GENES
        number = np.arange(size // 2 if group == "planted" else size - size // 2)
        base = np.exp(rng.uniform(np.log(low), np.log(high), len(number)))
        planted = group == "planted"
        effect = rng.uniform(*EFFECTS, len(number)) * (-1) ** (number // 3) * planted
        share = base * np.exp(effect * spots[list(DRIVERS)].to_numpy()[:, number % 3])
        shares.append(share * base.sum() / share.sum(axis=1, keepdims=True))
        table = {"gene": [f"ENSG{next(ids)}" for _ in number], "block": block, "group": group}
        driver = [DRIVERS[i % 3] if planted else None for i in number]
        tables.append(pd.DataFrame(table | {"driver": driver, "effect": effect}))
    genes = pd.concat(tables, ignore_index=True)
    share = np.hstack(shares)
    library = spots["library_size"].to_numpy()[:, None]
    expected = library * share / share[0].sum()
    counts = rng.poisson(expected * rng.gamma(1 / DISPERSION, DISPERSION, expected.shape))
    return genes, expected, pd.DataFrame(counts, index=spots.index, columns=genes["gene"])


def ceilings(expected: Array, counts: pd.DataFrame, inside: pd.Series) -> Array:
    """Correlation, by gene, of the noiseless with the measured target; mean over sections.

    The target is log1p(count / spot total * median total); noiseless, it has the expected count.
    """
    totals = counts.sum(axis=1).to_numpy()
    scored = inside.to_numpy() & (totals >= MIN_COUNTS)
    median = np.median(totals[scored])
    noiseless = np.log1p(expected / expected.sum(axis=1, keepdims=True) * median)
    measured = np.log1p(counts.to_numpy() / totals.clip(1)[:, None] * median)
    sections = counts.index.get_level_values("section")
    by_section = []
    for name in sections.unique():
        rows = scored & (sections == name)
        a, b = (t[rows] - t[rows].mean(axis=0) for t in (noiseless, measured))
        with np.errstate(invalid="ignore"):  # a constant target has no correlation: NaN
            by_section.append(
                (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
            )
    return np.nanmean(by_section, axis=0)


def section_files(
    number: int, name: str, jpeg: bytes, spots: pd.DataFrame, counts: pd.DataFrame
) -> dict[str, tuple[str, bytes]]:
    """File name and content by column of metadata.csv; the BT and BC prefixes mixed as in the real set."""
    inside = spots[spots["under_tissue"]]
    tumour = (inside[["nuclear_fraction", "nucleus_diameter"]] > 0).all(axis=1)
    lines = ["xcoord\tycoord\tlab\ttumor"]  # four names over five columns, as in the real set
    for i, (spot, is_tumour) in enumerate(tumour.items(), start=1):
        x, y = (float(c) for c in str(spot).split("x"))
        shift = 0.02 if i % 7 == 0 else 0.0  # some coordinates are not whole numbers
        lines.append(f"{i}\t{x + shift:g}\t{y - shift:g}\tL1\t{'tumor' if is_tumour else 'non'}")
    expressed = counts.loc[:, counts.any()]
    slide = name.replace("BC", "BT") if number % 3 else name
    listed = name.replace("BC", "BT") if number % 2 else name
    return {
        "histology_image": (f"HE_{slide}.jpg", jpeg),
        "spot_coordinates": (
            f"spots_{listed}.csv.gz",
            zipped(inside[["X", "Y"]].to_csv(index_label="")),
        ),
        "count_matrix": (
            f"{name}_stdata.tsv.gz",
            zipped(expressed.to_csv(sep="\t", index_label="")),
        ),
        "tumor_annotation": (f"{name}_Coords.tsv.gz", zipped("\r".join(lines) + "\r")),
    }


def zipped(text: str) -> bytes:
    """Gzip without the time of day, so that the same text gives the same bytes."""
    return gzip.compress(text.encode(), mtime=0)
