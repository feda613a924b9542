"""What a preset comes to on held-out tissue, over seeds, beside the colour ridge.

    python -m brstnet prepare RAW STORE --layout her2st
    python -m benchmarks.accuracy STORE --arms paper --epochs 20 --seeds 0 1 2
    python -m benchmarks.accuracy WIDE_STORE --arms best best+depth=nuisance --epochs 20

The protocol is that of sweeps/her2st.yaml: sections C2 to C5 of one patient are the four folds,
patient B is held out, targets are log_normalised. An arm is a preset's training, maybe with other
settings (`+name=value`); for each seed its four fold models are trained and their mean is judged
on B. What is finished under `--out` is not repeated. A preset wants the store that its `prepare`
makes; the ridge sees the same store's patches.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

from brstnet.config import Settings, build, preset, read_yaml
from brstnet.data.store import Store
from brstnet.evaluation.evaluate import evaluate
from brstnet.launch import pick_device, restart_with_allocator
from brstnet.training.train import fit

HER2ST = Path(__file__).parents[1] / "sweeps" / "her2st.yaml"

COLUMNS = {
    "cross_validated": "folds within C",
    "median_pcc": "B, median PCC",
    "median_partial_pcc": "B, given total",
    "median_pcc_colour_ridge": "ridge",
    "median_partial_pcc_colour_ridge": "ridge, given total",
    "seconds": "seconds to train",
}


def settings_of(arm: str, seed: int, args: argparse.Namespace) -> Settings:
    """The settings of one run."""
    name, *changes = arm.split("+")
    training: dict[str, Any] = {
        key.removeprefix("training."): value for key, value in preset(name, "training").items()
    }
    training |= {key: yaml.safe_load(value) for key, value in (c.split("=") for c in changes)}
    training |= {"seed": seed, "epochs": args.epochs or training["epochs"]}
    if args.input_px:
        training["input_px"] = args.input_px
    values = {"protocol": read_yaml(HER2ST)["protocol"], "training": training}
    return build(Settings, values, f"{arm}, seed {seed}")


def run(arm: str, seed: int, store: Store, args: argparse.Namespace) -> dict[str, Any]:
    """Train the folds of an arm with a seed and judge their mean on B."""
    settings, device = settings_of(arm, seed, args), pick_device(args.device)
    out = args.out / f"{arm}_{settings.training.epochs}_{settings.fingerprint()}"
    results = []
    for fold in tqdm(range(settings.protocol.folds), f"{arm}, seed {seed}", unit="fold"):
        folder = out / f"fold_{fold}"
        results.append(fit(store, settings, fold, folder, device=device, on_epoch=lambda _: None))
    summary = evaluate(
        [r.folder for r in results], store, ["B"], out / "B", device=device, progress=False
    ).summary
    return {
        "arm": arm,
        "epochs": settings.training.epochs,
        "seed": seed,
        "cross_validated": float(np.mean([r.score for r in results])),
        "seconds": sum(r.seconds for r in results),
        **{name: summary[name] for name in COLUMNS if name in summary},
    }


def main() -> None:
    """Train, judge, print a table: mean and spread (standard deviation) over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--arms", nargs="+", default=["paper", "best"])
    parser.add_argument("--epochs", type=int, help="of all arms; default: each preset's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--input_px", type=int, help="of all arms; default: each preset's own")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    store = Store(args.store)
    rows = [run(arm, seed, store, args) for seed in args.seeds for arm in args.arms]
    table = pd.DataFrame(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / f"{'_'.join(args.arms)}_{args.epochs or 'own'}.csv", index=False)
    print("| arm | epochs | " + " | ".join(COLUMNS.values()) + " |")
    print("|" + "---|" * (len(COLUMNS) + 2))
    for (arm, epochs), part in table.groupby(["arm", "epochs"], sort=False):
        cells = [f"{part[c].mean():.3f} ± {part[c].std():.3f}" for c in COLUMNS if c != "seconds"]
        print(f"| {arm} | {epochs} | {' | '.join(cells)} | {part['seconds'].mean():.0f} |")


if __name__ == "__main__":
    if sys.platform == "linux":
        restart_with_allocator("benchmarks.accuracy")
    main()
