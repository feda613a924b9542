"""Seconds that a slide without counts takes, part by part, beside what no program could leave out.

    python -m benchmarks.predict                                  # EfficientNet-b0, CPU
    python -m benchmarks.predict --every                          # all windows, not those on tissue
    python -m benchmarks.predict --device cuda

The slide is a real one of her2st where it is there, else demo tissue of 9,500 px square. The limit
is decoding the file and one bare forward pass of its patches, timed in the same process; weights
are those of one epoch on demo tissue, which cost the same time as any.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from benchmarks.train_step import HELD_OUT, make_store
from brstnet.config import Protocol, Settings, Training
from brstnet.data.patches import read_slide
from brstnet.data.sections import ARRAY_PITCH_UM
from brstnet.data.synthetic import Demo, make_demo
from brstnet.evaluation.predict import Ensemble, load_ensemble
from brstnet.evaluation.slides import new_slide, tissue
from brstnet.evaluation.slides.new_slide import Asked
from brstnet.evaluation.slides.scale import geometry, model_input
from brstnet.evaluation.slides.slide import Slide, open_slide
from brstnet.launch import pick_device, restart_with_allocator
from brstnet.training.batches import Units
from brstnet.training.epoch import EVAL_BATCH
from brstnet.training.model import choose_precision
from brstnet.training.train import fit

T = TypeVar("T")

HER2ST = Path(__file__).parents[2] / "shared" / "data" / "her2st" / "images" / "C2.jpg"
UM_PER_PX = 0.688
SIDE_PX = 9500
WINDOW_PX = 224


class Parts:
    """Seconds of each part, in the order they were taken, and the memory peak until the limit."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_gb = 0.0

    def time(self, part: str, work: Callable[[], T]) -> T:
        """Do the work, and note how long it took."""
        began = time.perf_counter()
        result = work()
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - began
        return result


def peak_gb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def make_model(folder: Path, backbone: str, device: torch.device) -> None:
    """A model of 224 px patches after one epoch on a little demo tissue."""
    store = make_store(folder / "store")
    settings = Settings(
        protocol=Protocol(held_out=(HELD_OUT,), folds=2, panel_size=50),
        training=Training(backbone=backbone, genes=50, epochs=1, stopping="fixed"),
    )
    fit(store, settings, 0, folder / "model", device=device, on_epoch=lambda _: None)


def make_apart(folder: Path, backbone: str, device: str) -> None:
    """The model made by a process of its own: training's memory is not prediction's."""
    argv = [sys.executable, "-m", "benchmarks.predict", "--backbone", backbone, "--device", device]
    subprocess.run([*argv, "--make-model", str(folder)], check=True)


def make_slide(folder: Path) -> Path:
    """Demo tissue beside itself until the slide is as large as a real one."""
    make_demo(folder / "raw", Demo(patients=6, sections_per_patient=1))
    image = np.asarray(Image.open(min((folder / "raw").glob("HE_*.jpg"))))
    times = -(-SIDE_PX // min(image.shape[:2]))
    file = folder / "slide.jpg"
    Image.fromarray(np.tile(image, (times, times, 1))[:SIDE_PX, :SIDE_PX]).save(file, quality=90)
    return file


def forward_bare(ensemble: Ensemble, ready: list[torch.Tensor], device: torch.device) -> None:
    """One pass of patches that lie ready, standardised, through the network, and nothing else."""
    member = ensemble.members[0]
    precision = choose_precision(member.settings.training, device)
    with torch.inference_mode(), torch.autocast(device.type, precision):
        for x_BCHW in ready:
            member.model(x_BCHW)
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    ensemble: Ensemble, path: Path, out: Path, device: torch.device, *, every: bool
) -> tuple[Parts, int, Slide]:
    """What `predict_slide` does, part by part: the seconds, how many spots, and the slide."""
    parts = Parts()
    asked = Asked(
        um_per_px=UM_PER_PX, model_um_per_px=UM_PER_PX, min_tissue=1e-9 if every else None
    )
    model = replace(model_input(ensemble.members, UM_PER_PX), window_px=WINDOW_PX)
    slide = parts.time("read", lambda: open_slide(path))
    shape = geometry(slide, model, asked.pitch_um, asked.um_per_px)
    found = parts.time("colours", lambda: tissue.survey(slide))
    look = parts.time(
        "stain and tissue",
        lambda: tissue.fit_look(slide, found, model.target, lightness=model.lightness),
    )
    spots, _ = new_slide.choose_spots(slide, shape, None)
    least = 0.0 if every else new_slide.least_tissue(asked, ensemble)
    cuts = tissue.cut_patches(slide, look, spots, shape.window_px, model.input_px, least)
    batches = parts.time("patches", lambda: list(tissue.batches(cuts, EVAL_BATCH)))
    predict = new_slide.predictor(ensemble.members[0], ensemble.genes.index)
    predict(batches[0].x_BHWC)  # the first call chooses kernels
    means = parts.time("network", lambda: [predict(b.x_BHWC) for b in batches])
    rows, shares = (
        np.concatenate([getattr(b, n) for b in batches]) for n in ("rows_B", "tissue_B")
    )
    predicted = new_slide.Predicted(
        spots=spots.iloc[rows].assign(tissue_fraction=shares),
        mean_NG=np.concatenate(means),
        spread_NG=None,
        mean_colour=np.full(3, 0.5),
    )
    expected = new_slide.expected_pcc(ensemble)
    drawn = new_slide.genes_to_draw(ensemble.genes["symbol"], expected, ())

    def write() -> None:
        about = new_slide.describe(ensemble, slide, shape, model, look, [])
        pictured = new_slide.picture(found, slide, shape)
        adata = new_slide.to_anndata(predicted, ensemble, expected, about, pictured)
        new_slide.write(out, adata, drawn, slide, found, shape, asked)

    parts.time("write, 4 maps", write)
    parts.peak_gb = peak_gb()
    units = Units.of(ensemble.members[0].fitted, ensemble.members[0].settings.training, device)
    ready = [units.image(torch.from_numpy(b.x_BHWC).to(device)) for b in batches]
    parts.time("limit: forward", lambda: forward_bare(ensemble, ready, device))
    parts.time("limit: decode", lambda: read_slide(path))
    return parts, len(rows), slide


def main() -> None:
    """Print a table: seconds of each part, the limit, the share of it, memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--slide", type=Path, help="an image; by default a real slide, or demo")
    parser.add_argument("--backbone", default="efficientnet_b0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--every", action="store_true", help="every window of the grid")
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.make_model:
        make_model(args.make_model, args.backbone, device)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_apart(folder, args.backbone, args.device)
        ensemble = load_ensemble([folder / "model"], device)
        path = args.slide or (HER2ST if HER2ST.is_file() else make_slide(folder))
        before = peak_gb()
        load = os.getloadavg()[0]
        parts, spots, slide = measure(ensemble, path, folder / "out", device, every=args.every)
    limits = {k: v for k, v in parts.seconds.items() if k.startswith("limit")}
    own = {k: v for k, v in parts.seconds.items() if k not in limits}
    total, limit = sum(own.values()), sum(limits.values())
    width, height = slide.full_px
    print(
        f"{path.name}, {width} x {height} px, {spots} spots at {ARRAY_PITCH_UM:.0f} um, "
        f"{args.backbone} on {device} ({torch.get_num_threads()} threads), load {load:.1f} before "
        f"and {os.getloadavg()[0]:.1f} after; memory peak {parts.peak_gb:.1f} GB "
        f"({before:.1f} before)\n"
    )
    names = [*own, "in all", "limit (decode + forward)", "limit / in all"]
    values = [*own.values(), total, limit]
    cells = [*(f"{v:.2f}" for v in values), f"{limit / total:.2f}"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n| {' | '.join(cells)} |")


if __name__ == "__main__":
    restart_with_allocator("benchmarks.predict")
    main()
