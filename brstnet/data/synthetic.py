"""Demo tissue in the `stnet` raw layout: H&E-like slides whose morphology drives planted genes.

Three morphology drivers are measured in each drawn slide, in a window around each spot. The share
of the counts that a planted gene takes follows one driver; that of a null gene is constant.

Shapes: S array spots of all sections; G genes; H, W slide pixels; 2 stains; C colours (RGB).
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
DRIVERS = ["nuclear_fraction", "nucleus_diameter", "eosin"]
# Range of relative shares by (block, group). "high" never meets "rest", so it is the top by mean;
# the tail of the rest is so rare that a section may lack a gene altogether.
SHARES = {
    ("high", "planted"): (1.0, 3.0),
    ("high", "null"): (1.0, 3.0),
    ("rest", "planted"): (0.02, 0.3),
    ("rest", "null"): (1e-4, 0.3),
}
HIGH_GENES = 120
# Log share per standard deviation of the driver, and negative binomial dispersion: together they
# put the ceiling of the high planted genes near 0.8.
EFFECTS = (0.35, 0.65)
DISPERSION = 0.08
MEDIAN_COUNTS = 8000
SHALLOW = 0.02  # of the spots fail, with a twentieth of the counts: something for the spot ledger
MIN_COUNTS = 1000  # the paper's spot filter; a ceiling is that of the spots which pass it
# Optical density of haematoxylin and eosin, read off nuclei and stroma of her2st C2 and B4.
STAINS_2C = np.array([[0.67, 0.67, 0.33], [0.24, 0.87, 0.42]])


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What to draw. On one machine the same settings give the same bytes."""

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
        """Spots along a side of the array, about a third of which lies off the tissue."""
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
    """Write slides, counts and their truth to `folder`; `progress` hears of each section drawn.

    `truth.parquet`: gene, block, group, driver, effect, ceiling (no driver, no ceiling for a null).
    `truth_spots.parquet`: section, spot, standardised drivers, library_size, of spots under tissue.

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
            section = f"BC{90000 + patient}_C{replicate}"
            slides[section], drawn[section] = draw_section(demo, patient, replicate)
            progress(section)
    spots = pd.concat(drawn, names=["section", "spot"])
    standardised = (spots[DRIVERS] - spots[DRIVERS].mean()) / spots[DRIVERS].std()
    spots[DRIVERS] = standardised.fillna(0.0)  # off the tissue, or no nucleus in the window
    genes, expected_SG, counts_SG = plant_counts(demo, spots)
    rows = []
    for number, (section, jpeg) in enumerate(slides.items()):
        here = (table.loc[[section]].droplevel("section") for table in (spots, counts_SG))
        files = section_files(section, jpeg, *here)
        patient_id, replicate_id = section.split("_")
        subtype = SUBTYPES[number // demo.sections_per_patient % len(SUBTYPES)]
        row = {"type": subtype, "patient": patient_id, "replicate": replicate_id}
        rows.append(row | {column: name for column, (name, _) in files.items()})
        yield from files.values()
    yield "metadata.csv", pd.DataFrame(rows).to_csv(index=False).encode()
    scored = spots["under_tissue"] & (counts_SG.sum(axis=1) >= MIN_COUNTS)
    ceiling = ceilings(expected_SG[scored], counts_SG[scored])
    genes["ceiling"] = np.where(genes["group"] == "planted", ceiling, np.nan)
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
    density, size, fibre, chromatin, haze = (  # uniform in 0..1; the last two drive no gene
        special.ndtr(smooth_field(rng, demo.size_px, 65 * scale)) for _ in range(5)
    )
    nuclei, haematoxylin = draw_nuclei(rng, tissue, density, size, chromatin, scale)
    eosin = draw_fibres(rng, fibre, scale)
    spots[DRIVERS] = measure(demo, spots, nuclei, tissue, haematoxylin > 0, eosin)
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
    return spots["Y"].to_numpy().astype(np.intp), spots["X"].to_numpy().astype(np.intp)


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
    lymphocytes, to large with a dark rim around a pale core, like tumour cells.
    """
    step = 5 * scale
    y, x = np.mgrid[: len(tissue) : step, : len(tissue) : step].reshape(2, -1)
    x, y = ((c + rng.uniform(0, step, c.shape)).clip(0, len(tissue) - 1) for c in (x, y))
    row, column = y.astype(int), x.astype(int)
    large = size[row, column]
    minor = scale * (2.3 + 4.7 * large) * rng.uniform(0.88, 1.12, x.shape)
    major = minor * rng.uniform(1.05, 1.5, x.shape)
    wanted = (0.05 + 0.4 * density[row, column]) * step**2 / (np.pi * minor * major)
    wanted *= (1 + 0.8 * large) * tissue[row, column]  # large ones are refused more often below
    canvas, drawn = np.zeros(tissue.shape, np.uint8), []
    for i in rng.permutation(np.flatnonzero(rng.random(x.shape) < wanted)):
        if canvas[row[i], column[i]]:
            continue  # nuclei hardly overlap
        centre, angle = (round(16 * x[i]), round(16 * y[i])), rng.uniform(0, 180)
        rim = rng.uniform(0.9, 1.1) * (110 + 40 * chromatin[row[i], column[i]])
        for shrink, shade in ((1, rim), (0.7, rim * (1 - 0.65 * large[i]))):
            axes = round(16 * shrink * major[i]), round(16 * shrink * minor[i])
            cv2.ellipse(  # the last argument, 4: coordinates come in sixteenths of a pixel
                canvas, centre, axes, angle, 0, 360, shade, cv2.FILLED, cv2.LINE_AA, 4
            )
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
    streaks = ndimage.gaussian_filter(streaks, 1.1 * scale)
    return (0.12 + 0.7 * strength) * (1 + 0.3 * streaks / streaks.std()).clip(0.2, 2)


def measure(
    demo: Demo, spots: pd.DataFrame, nuclei: Array, tissue: Mask, nuclear: Mask, eosin: Array
) -> Array:
    """The drivers (spots, 3) in the window around each spot; NaN off the tissue.

    They are nuclear area as a fraction of the tissue, mean diameter (px) of the nuclei centred in
    the window, and mean eosin (optical density) of the tissue between nuclei.
    """
    drivers = np.full((len(spots), len(DRIVERS)), np.nan)
    half = demo.window_px // 2
    for i in np.flatnonzero(spots["under_tissue"]):
        x, y = spots["X"].iloc[i], spots["Y"].iloc[i]
        window = np.s_[int(y) - half : int(y) + half, int(x) - half : int(x) + half]
        inside = np.abs(nuclei[:, :2] - [x, y]).max(axis=1) < half
        seen, stained = tissue[window], nuclear[window]
        drivers[i, 0] = (seen & stained).sum() / seen.sum()
        drivers[i, 1] = nuclei[inside, 2].mean() if inside.any() else np.nan
        drivers[i, 2] = eosin[window][seen & ~stained].mean()
    return drivers


def shift_stains(stains_2C: Array, rng: np.random.Generator, spread: float) -> Array:
    """The stains as another bath would give them: colours off by `spread`, strengths by thrice."""
    return (stains_2C + rng.normal(0, spread, (2, 3))) * np.exp(rng.normal(0, 3 * spread, (2, 1)))


def render(
    rng: np.random.Generator,
    tissue: Mask,
    haematoxylin: Array,
    eosin: Array,
    haze: Array,
    stains_2C: Array,
) -> Array:
    """Light passed (H, W, C), 1 where the slide is empty, by the Beer-Lambert law."""
    soft = ndimage.gaussian_filter(tissue.astype(float), 1.2)
    nuclear = ndimage.gaussian_filter(haematoxylin, 0.7)
    nuclear *= 1 + 0.12 * rng.normal(size=nuclear.shape)
    blue = soft * (0.05 + 0.12 * haze + nuclear)
    pink = soft * eosin * (1 - 0.45 * nuclear.clip(0, 1))
    light = np.exp(-np.stack([blue, pink], axis=-1) @ stains_2C)
    return light + rng.normal(0, 0.006, light.shape)


# Genes, counts, files ----------------------------------------------------------------------------


def plant_counts(demo: Demo, spots: pd.DataFrame) -> tuple[pd.DataFrame, Array, pd.DataFrame]:
    """Genes with their truth, expected counts (S, G) and negative binomial counts (S, G).

    Each block and group keeps its total share in every spot, whatever its genes do, so that a null
    gene stays null when counts are divided by the spot total.
    """
    rng = np.random.default_rng(demo.seed)
    ids = rng.permutation(demo.genes) + 99900000001  # no real gene is so named
    tables, shares = [], []
    for (block, group), (low, high) in SHARES.items():
        both = HIGH_GENES if block == "high" else demo.genes - HIGH_GENES
        number = np.arange(both // 2 if group == "planted" else both - both // 2)
        base = np.exp(rng.uniform(np.log(low), np.log(high), len(number)))
        effect = rng.uniform(*EFFECTS, len(number)) * (-1) ** (number // 3) * (group == "planted")
        share = base * np.exp(effect * spots[DRIVERS].to_numpy()[:, number % 3])
        shares.append(share * base.sum() / share.sum(axis=1, keepdims=True))
        driver = [DRIVERS[i % 3] if group == "planted" else None for i in number]
        table = {"block": block, "group": group, "driver": driver, "effect": effect}
        tables.append(pd.DataFrame(table))
    genes = pd.concat(tables, ignore_index=True)
    genes.insert(0, "gene", [f"ENSG{i}" for i in ids])
    share_SG = np.hstack(shares) / np.hstack(shares).sum(axis=1, keepdims=True)
    expected_SG = spots["library_size"].to_numpy()[:, None] * share_SG
    noise_SG = rng.gamma(1 / DISPERSION, DISPERSION, expected_SG.shape)
    counts = rng.poisson(expected_SG * noise_SG)
    return genes, expected_SG, pd.DataFrame(counts, index=spots.index, columns=genes["gene"])


def ceilings(expected_SG: Array, counts_SG: pd.DataFrame) -> Array:
    """Correlation of the noiseless with the measured target by gene (G), averaged over sections.

    The target is log1p(count / spot total * median total); the noiseless one has expected counts.
    A gene that a section lacks is left out of that section's average.
    """
    totals = counts_SG.sum(axis=1).median()
    by_section = []
    for _, counts in counts_SG.groupby(level="section"):
        expected = expected_SG[counts_SG.index.get_indexer(counts.index)]
        a, b = (
            np.log1p(c / c.sum(axis=1, keepdims=True) * totals)
            for c in (expected, counts.to_numpy())
        )
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        with np.errstate(invalid="ignore"):  # 0 / 0 where a section lacks a gene
            by_section.append(
                (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
            )
    return pd.DataFrame(by_section).mean().to_numpy()


def section_files(
    section: str, jpeg: bytes, spots: pd.DataFrame, counts: pd.DataFrame
) -> dict[str, tuple[str, bytes]]:
    """File name and content for each column of metadata.csv, with the quirks of the real files."""
    under = spots[spots["under_tissue"]]
    pixels_csv = under[["X", "Y"]].to_csv(index_label="")
    counts_tsv = counts.loc[:, counts.any()].to_csv(sep="\t", index_label="")
    other = section.replace("BC", "BT")  # both prefixes occur within a section
    slide = other if int(section[-1]) % 2 else section
    return {
        "histology_image": (f"HE_{slide}.jpg", jpeg),
        "spot_coordinates": (f"spots_{other}.csv.gz", zipped(pixels_csv)),
        "count_matrix": (f"{section}_stdata.tsv.gz", zipped(counts_tsv)),
        "tumor_annotation": (f"{section}_Coords.tsv.gz", zipped(tumour_labels(under))),
    }


def tumour_labels(spots: pd.DataFrame) -> str:
    """Labels as in the real files: CR line ends, 4 names over 5 columns, some x and y not whole.

    Tumour is where nuclei are larger and denser than on average.
    """
    lines = ["xcoord\tycoord\tlab\ttumor"]
    tumour = (spots[["nuclear_fraction", "nucleus_diameter"]] > 0).all(axis=1)
    for i, (spot, is_tumour) in enumerate(tumour.items(), start=1):
        x, y = (int(c) + (0.02 if i % 7 == 0 else 0) for c in str(spot).split("x"))
        lines.append(f"{i}\t{x}\t{y}\tL1\t{'tumor' if is_tumour else 'non'}")
    return "\r".join([*lines, ""])


def zipped(text: str) -> bytes:
    """Gzip without the time of day, so that the same text gives the same bytes."""
    return gzip.compress(text.encode(), mtime=0)
