"""What each leak is worth: the same model, judged on the same spots, with and without it.

    python -m benchmarks.leaks --demo                       # demo tissue, stain target included
    python -m benchmarks.leaks --store STORE --group section --side_px 64     # her2st: C2-C5, B4
    python -m benchmarks.leaks --store STORE --group section --raw RAW --layout her2st --parts stain

Each comparison has two arms, and what is not the leak is equal in both: the judged spots; the
genes (but where the gene list is the leak: then the model is the same); the number of training
spots, drawn from the arm's pool at random; the network's steps, batch and seed; what expression is
measured in (the honest arm's). The store's own stain target is the same in both arms, whoever's it
is, but where it is the leak. `--group patient` judges each patient by models of the others;
`section` each section by models of all others, where a store has too few patients: its arms are
then "honest" in the one regard alone that is compared.

    sections    other sections of the judged patient are in the pool
    spots       so is the half of the judged section that is not judged; `by patient` against an arm
                of other patients, `by section` against one that has the patient's other sections
    panel       genes with the highest mean on all spots, against on training spots
    best genes  the quarter that was predicted best on the judged spots, against the quarter that a
                ridge predicts best on training sections it has not seen
    statistics  means and deviations of targets and colours, from all spots
    stain       the stain target is of the judged, against of a training patient or section
    champion    of K configurations the best on the judged spots, against the best on a validation
    epoch       the same of a network's epochs, mean over K networks

and three that are no leaks but protocols, which move the same number:

    pooled      all sections' spots in one PCC, against the mean over sections
    log_counts  log1p of raw counts, which leaves the spot's depth in
    smoothed    prediction, or both sides, averaged over 3 x 3 array positions

Predictors: the colour ridge; a small network trained by `brstnet.training`; `memory`, the mean of
the four nearest training spots, which looks at no patch; for log_counts `depth`, which is told the
judged spot's total.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from benchmarks.arms import (
    JUDGED,
    VALIDATION,
    Network,
    Target,
    Tissue,
    by_depth,
    by_memory,
    by_network,
    by_ridge,
    course,
    gene_scores,
    groups_of,
    mean_known,
    summarise,
)
from brstnet.config import Prepare
from brstnet.data.prepare import prepare
from brstnet.data.store import Store
from brstnet.data.synthetic import Demo, make_demo

PARTS = ("split", "genes", "statistics", "stain", "champion", "protocol")
BEST = 4
"""One gene in so many is among the best."""
RIDGES = 30
Predictor = Callable[[Tissue, np.ndarray, np.ndarray, Target], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, in a form that goes to another process.

    Attributes:
        store: folder of the store.
        stains: folders of stores that differ in the stain target alone, by the group it is of.
        group: patient or section: what is judged at a time.
        parts: of PARTS.
        panel: how many genes.
        configurations: networks among which a champion is chosen.
        network: how they are trained.
    """

    store: Path
    stains: Mapping[str, Path]
    group: str
    parts: Sequence[str]
    panel: int
    configurations: int
    network: Network

    @property
    def predictors(self) -> dict[str, Predictor]:
        """Ridge and network, alike to call; each network gets a folder of its own."""
        return {"ridge": by_ridge, "network": self._network}

    def _network(
        self, tissue: Tissue, train: np.ndarray, judged: np.ndarray, target: Target
    ) -> np.ndarray:
        with tempfile.TemporaryDirectory() as scratch:
            return by_network(tissue, train, judged, target, self.network, Path(scratch))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One group: its spots are judged, all others' may train."""

    name: str
    number: int
    judged: np.ndarray
    train: np.ndarray


Found = dict[str, Any]
"""One arm of one comparison: leak, fold, predictor, arm, what `summarise` gives, genes, spots."""


def parts_of(tissue: Tissue, group: str) -> list[Part]:
    """Each group of a tissue, judged in turn."""
    of = tissue.patient_N if group == "patient" else tissue.section_N
    return [
        Part(
            name=name,
            number=number,
            judged=np.flatnonzero(of == name),
            train=np.flatnonzero((of != name) & tissue.allowed_N),
        )
        for number, name in enumerate(sorted(set(of)))
    ]


def pair(
    leak: str,
    predictor: str,
    part: Part,
    spots: int,
    honest: Mapping[str, float],
    leaky: Mapping[str, float],
    genes: int,
) -> list[Found]:
    """The two arms of a comparison as records; `spots` trained."""
    about = {"leak": leak, "fold": part.name, "predictor": predictor}
    return [
        {**about, "arm": arm, **numbers, "genes": genes, "spots": spots}
        for arm, numbers in (("honest", honest), ("leaky", leaky))
    ]


# Who trains --------------------------------------------------------------------------------------


def split(tissue: Tissue, part: Part, plan: Plan) -> Iterator[Found]:
    """Half of the group's first section is judged; who trains is drawn from three pools."""
    section = tissue.section_N[part.judged[0]]
    patient = tissue.patient_N[part.judged[0]]
    rng = np.random.default_rng([plan.network.seed, part.number])
    here = rng.permutation(np.flatnonzero(tissue.section_N == section))
    judged, rest = np.sort(here[::2]), here[1::2]
    rest = rest[tissue.allowed_N[rest]]
    own = (tissue.patient_N == patient) & tissue.allowed_N
    others = np.flatnonzero(tissue.allowed_N & ~own)
    sections = np.flatnonzero(tissue.allowed_N & (tissue.section_N != section))
    pools = {"patient": others, "section": sections, "spots": np.append(sections, rest)}
    alone = len(sections) == len(others)
    for honest, leaks in (("patient", ("section", "spots")), ("section", ("spots",))):
        count = len(pools[honest])
        if alone and honest == "section":
            continue
        target = Target.fitted_on(
            tissue, pools[honest], tissue.top_genes(pools[honest], plan.panel)
        )
        true_NG = target.measure(tissue, judged)
        for name, predict in {**plan.predictors, "memory": by_memory}.items():
            found = {}
            for pool in (honest, *leaks):
                train = np.sort(rng.choice(pools[pool], count, replace=False))
                pred_NG = predict(tissue, train, judged, target)
                found[pool] = summarise(gene_scores(tissue, judged, pred_NG, true_NG))
            for leak in leaks:
                if alone and leak == "section":
                    continue
                what = "sections" if leak == "section" else f"spots, by {honest}"
                yield from pair(what, name, part, count, found[honest], found[leak], plan.panel)


# Genes, statistics, protocols --------------------------------------------------------------------


def genes(tissue: Tissue, part: Part, plan: Plan) -> Iterator[Found]:
    """Which genes are scored; the model and its predictions are the same."""
    everyone = np.append(part.train, part.judged)
    mine = tissue.top_genes(part.train, plan.panel)
    theirs = tissue.top_genes(everyone, plan.panel)
    columns = np.union1d(mine, theirs)
    target = Target.fitted_on(tissue, part.train, columns)
    true_NG = target.measure(tissue, part.judged)
    lists = [np.flatnonzero(np.isin(columns, chosen)) for chosen in (mine, theirs)]
    count = plan.panel // BEST
    known = left_out(tissue, part.train, target)[lists[0]]
    by_training = lists[0][np.argsort(-known, kind="stable")[:count]]
    for name, predict in plan.predictors.items():
        scores = gene_scores(
            tissue, part.judged, predict(tissue, part.train, part.judged, target), true_NG
        )
        spots = len(part.train)
        honest, leaky = (summarise(scores, chosen) for chosen in lists)
        yield from pair("panel", name, part, spots, honest, leaky, plan.panel)
        order = np.argsort(-np.nan_to_num(scores["pcc"][lists[0]]), kind="stable")
        honest = summarise(scores, by_training)
        leaky = summarise(scores, lists[0][order[:count]])
        yield from pair("best genes", name, part, spots, honest, leaky, count)


def left_out(tissue: Tissue, rows: np.ndarray, target: Target) -> np.ndarray:
    """PCC (G,) of a ridge on training sections that it has not seen, mean over them."""
    groups = groups_of(tissue, rows)
    found = []
    for group in np.unique(groups):
        here = rows[groups == group]
        pred_NG = by_ridge(tissue, rows[groups != group], here, target)
        found.append(gene_scores(tissue, here, pred_NG, target.measure(tissue, here))["pcc"])
    return np.nan_to_num(mean_known(found))


def statistics(tissue: Tissue, part: Part, plan: Plan) -> Iterator[Found]:
    """Means and deviations of targets and colours, from training spots or from all."""
    everyone, columns = np.append(part.train, part.judged), tissue.top_genes(part.train, plan.panel)
    target = Target.fitted_on(tissue, part.train, columns)
    of_all = Target.fitted_on(tissue, everyone, columns)
    honest = {n: p(tissue, part.train, part.judged, target) for n, p in plan.predictors.items()}
    with tempfile.TemporaryDirectory() as scratch:
        leaky = {
            "ridge": by_ridge(tissue, part.train, part.judged, of_all, everyone),
            "network": by_network(
                tissue,
                part.train,
                part.judged,
                target,
                plan.network,
                Path(scratch),
                statistics_on_all=True,
            ),
        }
    yield from compared("statistics", tissue, part, target, honest, leaky)


def compared(
    leak: str,
    tissue: Tissue,
    part: Part,
    target: Target,
    honest: Mapping[str, np.ndarray],
    leaky: Mapping[str, np.ndarray],
) -> Iterator[Found]:
    """Records of two predictions (N, G) by predictor of the same spots and genes."""
    true_NG = target.measure(tissue, part.judged)
    for name in honest:
        without, with_it = (
            summarise(gene_scores(tissue, part.judged, pred_NG, true_NG))
            for pred_NG in (honest[name], leaky[name])
        )
        genes = len(target.columns)
        yield from pair(leak, name, part, len(part.train), without, with_it, genes)


def protocol(tissue: Tissue, part: Part, plan: Plan) -> Iterator[Found]:
    """Depth left in the target; smoothing. `pooled` wants all folds: `log_units` of this one."""
    columns = tissue.top_genes(np.arange(len(tissue.spots)), plan.panel)  # for all folds the same
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind in ("log_normalised", "log_counts"):
        target = Target.fitted_on(tissue, part.train, columns, kind)
        true_NG = target.measure(tissue, part.judged)
        for name, predict in {**plan.predictors, "depth": by_depth}.items():
            pred_NG = predict(tissue, part.train, part.judged, target)
            found.setdefault(name, {})[kind] = pred_NG
            scores = {"": gene_scores(tissue, part.judged, pred_NG, true_NG)}
            if kind == "log_counts":
                first = Target.fitted_on(tissue, part.train, columns)
                before = gene_scores(
                    tissue,
                    part.judged,
                    found[name]["log_normalised"],
                    first.measure(tissue, part.judged),
                )
                arms = summarise(before), summarise(scores[""])
                yield from pair("log_counts", name, part, len(part.train), *arms, plan.panel)
            elif name != "depth":
                for how in ("smoothed prediction", "smoothed"):
                    scores[how] = gene_scores(tissue, part.judged, pred_NG, true_NG, how)
                    arms = summarise(scores[""]), summarise(scores[how])
                    yield from pair(how, name, part, len(part.train), *arms, plan.panel)
                yield {
                    "leak": "pooled",
                    "predictor": name,
                    "judged": part.judged,
                    "pred_NG": pred_NG * target.std_G + target.mean_G,
                    "true_NG": true_NG * target.std_G + target.mean_G,
                    "spots": len(part.train),
                }


def pooled(tissue: Tissue, parts: Sequence[Found]) -> Iterator[Found]:
    """All folds' predictions by section, and as one."""
    for name in dict.fromkeys(p["predictor"] for p in parts):
        mine = [p for p in parts if p["predictor"] == name]
        judged, pred_NG, true_NG = (
            np.concatenate([p[key] for p in mine]) for key in ("judged", "pred_NG", "true_NG")
        )
        apart, as_one = (
            summarise(gene_scores(tissue, judged, pred_NG, true_NG, how)) for how in ("", "pooled")
        )
        everyone, spots = Part(name="all", number=0, judged=judged, train=judged), mine[0]["spots"]
        yield from pair("pooled", name, everyone, spots, apart, as_one, pred_NG.shape[1])


# Stain target, choices ---------------------------------------------------------------------------


def stain(plan: Plan, part: Part) -> Iterator[Found]:
    """The stain target is of the next group, or of the judged one."""
    names = sorted(plan.stains)
    other = names[(names.index(part.name) + 1) % len(names)]
    honest, leaky = (Tissue.of(Store(plan.stains[name])) for name in (other, part.name))
    allowed = honest.allowed_N & leaky.allowed_N
    part = replace(part, train=part.train[allowed[part.train]])
    target = Target.fitted_on(honest, part.train, honest.top_genes(part.train, plan.panel))
    arms = (
        {n: p(t, part.train, part.judged, target) for n, p in plan.predictors.items()}
        for t in (honest, leaky)
    )
    yield from compared("stain", honest, part, target, *arms)


def champion(tissue: Tissue, part: Part, plan: Plan, validation: Part) -> Iterator[Found]:
    """The best of many on the judged spots, or on the next group's, which then trains nobody."""
    train = np.setdiff1d(part.train, validation.judged)
    target = Target.fitted_on(tissue, train, tissue.top_genes(train, plan.panel))
    where = {VALIDATION: validation.judged, JUDGED: part.judged}
    true = {who: target.measure(tissue, rows) for who, rows in where.items()}

    def score(preds: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
        return {
            who: summarise(gene_scores(tissue, where[who], preds[who], true[who])) for who in where
        }

    ridges = [score(p) for p in random_ridges(tissue, train, where, target)]
    networks = []
    for one in configurations(plan):
        with tempfile.TemporaryDirectory() as scratch:
            rows = {**where, "train": train}
            networks.append([score(p) for p in course(tissue, rows, target, one, Path(scratch))])
    about = part, len(train)
    for name, tried in (("ridge", ridges), ("network", [epochs[-1] for epochs in networks])):
        what = f"champion of {len(tried)}"
        yield from pair(what, name, *about, *chosen(tried), plan.panel)
    arms = zip(*(chosen(epochs) for epochs in networks), strict=True)
    honest, leaky = (
        {key: float(np.mean([one[key] for one in arm])) for key in arm[0]} for arm in arms
    )
    yield from pair("epoch", "network", *about, honest, leaky, plan.panel)


def chosen(
    tried: Sequence[Mapping[str, dict[str, float]]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Judged scores of what is best on the validation, and of what is best on the judged."""
    by_validation, by_judged = (
        max(tried, key=lambda one: one[who]["pcc"]) for who in (VALIDATION, JUDGED)
    )
    return by_validation[JUDGED], by_judged[JUDGED]


def random_ridges(
    tissue: Tissue, train: np.ndarray, where: Mapping[str, np.ndarray], target: Target
) -> Iterator[dict[str, np.ndarray]]:
    """Ridges on random halves of the colour statistics, with random penalties."""
    rng = np.random.default_rng(0)
    y_NG, features = target.measure(tissue, train), tissue.features_NF
    for _ in range(RIDGES):
        half = rng.permutation(features.shape[1])[: features.shape[1] // 2]
        scaler = StandardScaler().fit(features[train][:, half])
        x_NF = scaler.transform(features[:, half])
        ridge = Ridge(10.0 ** rng.uniform(0, 4)).fit(x_NF[train], y_NG)
        yield {who: ridge.predict(x_NF[rows]) for who, rows in where.items()}


def configurations(plan: Plan) -> Iterator[Network]:
    """Networks with learning rate, weight decay and seed at random."""
    rng = np.random.default_rng(plan.network.seed)
    for number in range(plan.configurations):
        yield replace(
            plan.network,
            learning_rate=float(10 ** rng.uniform(-3.5, -1.5)),
            weight_decay=float(10 ** rng.uniform(-2, 0.5)),
            seed=plan.network.seed + number,
        )


# Together ----------------------------------------------------------------------------------------


def measure(plan: Plan, number: int) -> list[Found]:
    """All comparisons with one group judged."""
    torch.set_num_threads(1)
    tissue = Tissue.of(Store(plan.store))
    parts = parts_of(tissue, plan.group)
    part, following = parts[number], parts[(number + 1) % len(parts)]
    todo: dict[str, Callable[[], Iterator[Found]]] = {
        "split": lambda: split(tissue, part, plan),
        "genes": lambda: genes(tissue, part, plan),
        "statistics": lambda: statistics(tissue, part, plan),
        "stain": lambda: stain(plan, part),
        "champion": lambda: champion(tissue, part, plan, following),
        "protocol": lambda: protocol(tissue, part, plan),
    }
    return [found for name in plan.parts for found in todo[name]()]


def measure_all(plan: Plan, jobs: int) -> pd.DataFrame:
    """A row per arm, fold, predictor and comparison."""
    tissue = Tissue.of(Store(plan.store))
    count = len(parts_of(tissue, plan.group))
    spawn = multiprocessing.get_context("spawn")  # a forked child could wait for torch's threads
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        futures = [pool.submit(measure, plan, number) for number in range(count)]
        found = [row for f in tqdm(futures, "judged", unit=plan.group) for row in f.result()]
    rows = [row for row in found if row["leak"] != "pooled"]
    return pd.DataFrame(rows + list(pooled(tissue, [r for r in found if r["leak"] == "pooled"])))


def describe(table: pd.DataFrame) -> str:
    """Both arms side by side, and what the leak is worth: mean ± deviation over the folds."""
    lines = [
        "| leak | predictor | folds | training spots | median PCC, honest | leaky | worth | "
        "worth, given total | worth, mean PCC | genes > 0, honest | leaky |",
        "|" + "---|" * 11,
    ]
    for (leak, predictor), rows in table.groupby(["leak", "predictor"], sort=False):
        honest, leaky = (rows[rows["arm"] == a].set_index("fold") for a in ("honest", "leaky"))
        spots = sorted(set(honest["spots"]))
        trained = str(spots[0]) if len(spots) == 1 else f"{spots[0]}-{spots[-1]}"
        worth = [_spread(leaky[key] - honest[key]) for key in ("pcc", "partial", "mean")]
        above = [f"{arm['above'].mean():.0f}" for arm in (honest, leaky)]
        cells = [
            *(leak, predictor, str(len(honest)), trained),
            *(f"{arm['pcc'].mean():.3f}" for arm in (honest, leaky)),
            *worth,
            f"{above[0]} of {honest['genes'].iloc[0]}",
            above[1],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _spread(values: pd.Series) -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():+.3f}{spread}"


def demo_stores(folder: Path, args: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """A store of demo tissue, and one for each patient as the stain target."""
    demo = Demo(
        patients=args.patients,
        sections_per_patient=2,
        spots_per_section=args.spots,
        genes=max(200, args.panel),
    )
    make_demo(folder / "raw", demo)
    common = Prepare(layout="stnet", window_px=64, input_px=64)
    prepare(folder / "raw", folder / "store", common, progress=False)
    return folder / "store", stain_stores(folder, folder / "raw", Store(folder / "store"), args)


def stain_stores(
    folder: Path, raw: Path, store: Store, args: argparse.Namespace
) -> dict[str, Path]:
    """A store for each group, prepared as `store` was, with the group's first section as target."""
    if "stain" not in args.parts:
        return {}
    made = store.index["prepare"]
    common = {key: made[key] for key in ("min_counts", "window_px", "input_px")}
    layout: Any = "stnet" if args.demo else args.layout
    found: dict[str, Path] = {}
    for name, entry in store.sections.items():
        group = entry["patient"] if args.group == "patient" else name
        if group in found:
            continue
        found[group] = folder / f"stain_{group}"
        settings = Prepare(layout=layout, stain=made["stain"], stain_target=name, **common)
        prepare(raw, found[group], settings, progress=False)
    return found


def main() -> None:
    """Measure, print the table, append the arms to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="demo tissue, made here")
    parser.add_argument("--store", type=Path, help="tissue of your own")
    parser.add_argument("--raw", type=Path, help="what it was prepared from, for the stain target")
    parser.add_argument("--layout", choices=("stnet", "her2st"), default="her2st")
    parser.add_argument("--group", choices=("patient", "section"), default="patient")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--panel", type=int, default=100)
    parser.add_argument("--patients", type=int, default=6, help="of the demo")
    parser.add_argument("--spots", type=int, default=80, help="a section of the demo")
    parser.add_argument("--configurations", type=int, default=5)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--side_px", type=int, default=32, help="of what the network sees")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="append the arms to this file, a JSON line each")
    args = parser.parse_args()
    if args.demo == (args.store is not None):
        parser.error("give either --demo or --store")
    if args.store and not args.raw and "stain" in args.parts:
        sys.stderr.write("stain: not measured, as it needs the raw slides (--raw)\n")
        args.parts = [part for part in args.parts if part != "stain"]
    with tempfile.TemporaryDirectory() as scratch:
        if args.demo:
            store, stains = demo_stores(Path(scratch), args)
        else:
            store = args.store
            stains = stain_stores(Path(scratch), args.raw, Store(store), args)
        plan = Plan(
            store=store,
            stains=stains,
            group=args.group,
            parts=args.parts,
            panel=args.panel,
            configurations=args.configurations,
            network=Network(
                backbone=args.backbone, side_px=args.side_px, steps=args.steps, seed=args.seed
            ),
        )
        table = measure_all(plan, args.jobs)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in table.to_dict("records"))
    print(describe(table))


if __name__ == "__main__":
    main()
