"""What `benchmarks.leaks` compares: tissue in memory, three predictors, scores; leaky where asked.

Nothing here is part of the product: `brstnet` refuses what these arms do. A network is trained by
the project's own code on a small store that holds just the spots of one arm.

Shape letters: N spots, G genes, F features.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from brstnet import metrics
from brstnet.config import Protocol, Settings, Training
from brstnet.data.index import SECTION_FILES, TABLE
from brstnet.data.store import Store, sha256
from brstnet.evaluation.controls import colour_features, fit_colour_ridge
from brstnet.evaluation.predict import predict
from brstnet.evaluation.scores import array_average
from brstnet.training.batches import Units, load_spots
from brstnet.training.checkpoint import Checkpoint
from brstnet.training.fitted import column_mean, column_mean_std, fit_statistics, transform
from brstnet.training.folds import ALL, Fold
from brstnet.training.task import Task, prepare_task
from brstnet.training.train import run_epoch, start

CPU = torch.device("cpu")
JUDGED, VALIDATION = "z_judged", "a_validation"
"""Pseudo-patients; the first by name validate in fold 0."""
NEAREST = 4


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """A store in memory.

    Attributes:
        store: where it comes from.
        spots: a row a spot.
        counts: raw, CSR (N, all genes of the store).
        features_NF: colour statistics.
        allowed_N: which spots may train (not too white).
    """

    store: Store
    spots: pd.DataFrame
    counts: sparse.csr_matrix
    features_NF: np.ndarray
    allowed_N: np.ndarray

    @classmethod
    def of(cls, store: Store) -> "Tissue":
        """The whole of a store."""
        sections = list(store.sections)
        spots = store.spots(sections)
        return cls(
            store=store,
            spots=spots,
            counts=store.counts(sections),
            features_NF=colour_features(store, sections, progress=False),
            allowed_N=(spots["white_fraction"] <= Protocol().max_white_fraction).to_numpy(),
        )

    @property
    def section_N(self) -> np.ndarray:
        """Section of each spot."""
        return self.spots["section"].to_numpy(str)

    @property
    def patient_N(self) -> np.ndarray:
        """Patient of each spot."""
        return self.spots["patient"].to_numpy(str)

    @property
    def total_N(self) -> np.ndarray:
        """Total count of each spot."""
        return self.spots["total_counts"].to_numpy(float)

    def top_genes(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Columns of the genes with the highest mean on these spots."""
        return np.argsort(-column_mean(self.counts[rows]), kind="stable")[:count]


@dataclass(frozen=True, kw_only=True)
class Target:
    """How expression is measured: units and standardisation, fitted on some spots."""

    kind: str
    columns: np.ndarray
    median_total: float
    mean_G: np.ndarray
    std_G: np.ndarray

    @classmethod
    def fitted_on(
        cls, tissue: Tissue, rows: np.ndarray, columns: np.ndarray, kind: str = "log_normalised"
    ) -> "Target":
        """The target of these genes, standardised on these spots."""
        totals = tissue.total_N[rows]
        median = float(np.median(totals))
        units = transform(tissue.counts[rows][:, columns], totals, kind, median)
        mean_G, std_G = column_mean_std(units)
        std_G = np.where(std_G > 0, std_G, 1.0)
        return cls(kind=kind, columns=columns, median_total=median, mean_G=mean_G, std_G=std_G)

    def measure(self, tissue: Tissue, rows: np.ndarray) -> np.ndarray:
        """What was measured, standardised (N, G)."""
        counts = tissue.counts[rows][:, self.columns]
        units = transform(counts, tissue.total_N[rows], self.kind, self.median_total)
        return (np.asarray(units.toarray()) - self.mean_G) / self.std_G


# Predictors: standardised (N, G) of the judged rows, from the training rows -----------------------


def by_ridge(
    tissue: Tissue,
    train: np.ndarray,
    judged: np.ndarray,
    target: Target,
    scaled_on: np.ndarray | None = None,
) -> np.ndarray:
    """The colour ridge; `scaled_on` are the spots whose features' mean and deviation are used."""
    features = tissue.features_NF
    scaler = StandardScaler().fit(features[train if scaled_on is None else scaled_on])
    x_NF, groups = scaler.transform(features), groups_of(tissue, train)
    ridge = fit_colour_ridge(features[train], target.measure(tissue, train), groups)
    model = Ridge(ridge.alpha).fit(x_NF[train], target.measure(tissue, train))
    predicted: np.ndarray = model.predict(x_NF[judged])
    return predicted


def groups_of(tissue: Tissue, rows: np.ndarray) -> np.ndarray:
    """What is left out in turn to choose alpha: sections, or quarters of the only one by column."""
    sections = tissue.section_N[rows]
    if len(set(sections)) > 1:
        return sections
    return pd.qcut(tissue.spots["array_x"].iloc[rows], 4, labels=False).to_numpy()


def by_memory(tissue: Tissue, train: np.ndarray, judged: np.ndarray, target: Target) -> np.ndarray:
    """Mean of the nearest training spots on the array; it never looks at a patch.

    Nearest are those of the same section, then of the same patient's others, then of anybody's.
    """
    at = tissue.spots[["array_x", "array_y"]].to_numpy(float)
    apart = np.linalg.norm(at[judged][:, None] - at[train][None], axis=2)
    apart += 1e3 * (tissue.section_N[judged][:, None] != tissue.section_N[train][None])
    apart += 1e6 * (tissue.patient_N[judged][:, None] != tissue.patient_N[train][None])
    nearest = np.argsort(apart, axis=1, kind="stable")[:, :NEAREST]
    return target.measure(tissue, train)[nearest].mean(axis=1)


def by_depth(tissue: Tissue, train: np.ndarray, judged: np.ndarray, target: Target) -> np.ndarray:
    """A line on the log of the spot's total count, which it has been told."""
    depth = np.log1p(tissue.total_N)
    y_NG, x_N = target.measure(tissue, train), depth[train] - depth[train].mean()
    slope = x_N @ y_NG / (x_N @ x_N)
    return (depth[judged] - depth[train].mean())[:, None] * slope + y_NG.mean(axis=0)


@dataclass(frozen=True, kw_only=True)
class Network:
    """How networks are trained: the same number of steps in every arm, of the same batch."""

    backbone: str = "test_resnet"
    side_px: int = 32
    steps: int = 120
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    def settings(self, genes: int, spots: int, kind: str) -> Settings:
        """The settings of a run on so many genes and training spots."""
        return Settings(
            protocol=Protocol(held_out=(JUDGED,), folds=2, panel_size=genes, target=kind),  # type: ignore[arg-type]
            training=Training(
                backbone=self.backbone,
                genes=genes,
                auxnet=False,
                optimizer="adamw",
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                batch_size=min(self.batch, spots),
                epochs=max(1, round(self.steps * self.batch / spots)),
                schedule="cosine",
                stopping="fixed",
                seed=self.seed,
            ),
        )


def by_network(
    tissue: Tissue,
    train: np.ndarray,
    judged: np.ndarray,
    target: Target,
    network: Network,
    scratch: Path,
    *,
    statistics_on_all: bool = False,
) -> np.ndarray:
    """A network of the project's own training, without validation: its last epoch.

    With `statistics_on_all` targets and colours are standardised on the judged spots too.
    """
    store = write_store(tissue, scratch, {"train": train, JUDGED: judged}, target, network.side_px)
    settings = network.settings(len(target.columns), len(train), target.kind)
    task, model = prepare_task(store, settings, ALL, CPU)
    if statistics_on_all:
        task = leaky_statistics(task, store)
    run = start(task, model, scratch / "run")
    for _ in range(settings.training.epochs):
        run_epoch(run)
    run.saver.wait()
    return predict_on(task, run.judged, store, target)


def leaky_statistics(task: Task, store: Store) -> Task:
    """The same task, with everything fitted on all spots of the store."""
    everyone = Fold(number=ALL, train=tuple(store.sections), validation=(), held_out=())
    fitted = fit_statistics(store, everyone, task.settings)
    return dataclasses.replace(
        task,
        fitted=fitted,
        units=Units.of(fitted, task.training, CPU),
        train=load_spots(store, task.fold.train, fitted, CPU),
    )


def course(
    tissue: Tissue,
    rows: Mapping[str, np.ndarray],
    target: Target,
    network: Network,
    scratch: Path,
) -> Iterator[dict[str, np.ndarray]]:
    """After each epoch of a training: standardised predictions on VALIDATION and JUDGED."""
    store = write_store(tissue, scratch, rows, target, network.side_px)
    settings = network.settings(len(target.columns), len(rows["train"]), target.kind)
    task, model = prepare_task(store, settings, 0, CPU)
    run = start(task, model, scratch / "run")
    for _ in range(settings.training.epochs):
        run_epoch(run)
        yield {
            who: predict_on(task, run.judged, store, target, who) for who in (VALIDATION, JUDGED)
        }
    run.saver.wait()


def predict_on(
    task: Task, model: nn.Module, store: Store, target: Target, patient: str = JUDGED
) -> np.ndarray:
    """Standardised predictions (N, G) on a pseudo-patient of a model in training, which is copied.

    In the order of the target's genes, which is the small store's.
    """
    member = Checkpoint(
        path=store.path,
        model=copy.deepcopy(model).eval(),  # type: ignore[arg-type]
        settings=task.settings,
        fold=task.fold,
        fitted=task.fitted,
        facts=task.facts,
    )
    log_units = predict(member, store, store.of_patients([patient]))[store.genes.index]
    predicted: np.ndarray = (log_units.to_numpy(float) - target.mean_G) / target.std_G
    return predicted


# A small store -----------------------------------------------------------------------------------


def write_store(
    tissue: Tissue, folder: Path, rows: Mapping[str, np.ndarray], target: Target, side_px: int
) -> Store:
    """A store of these spots and the target's genes alone; totals stay those over all genes.

    `rows` are sorted rows by pseudo-patient; each of their sections is a section here. Those of
    `train` are a pseudo-patient a section, as folds need two; a single one is cut in two.
    """
    names = tissue.store.genes.index[target.columns]
    entries = []
    for patient, part in rows.items():
        own = [
            (s, part[tissue.section_N[part] == s]) for s in dict.fromkeys(tissue.section_N[part])
        ]
        if patient == "train" and len(own) == 1:
            own = [(own[0][0], half) for half in np.array_split(own[0][1], 2)]
        for number, (section, of_section) in enumerate(own):
            name = f"{patient}_{number}_{section}"
            write_part(tissue, folder / "store" / name, section, of_section, target, side_px)
            who = name if patient == "train" else patient
            entries.append(entry_of(folder / "store" / name, who, len(of_section), len(names)))
    table = folder / "store" / TABLE
    tissue.store.genes.loc[names].to_parquet(table)
    index = {
        **tissue.store.index,
        "genes": len(names),
        "files": {TABLE: sha256(table)},
        "prepare": {**tissue.store.index["prepare"], "input_px": side_px},
        "stain_target": None,
        "sections": entries,
    }
    (folder / "store" / "index.json").write_text(json.dumps(index))
    return Store(folder / "store")


def write_part(
    tissue: Tissue, folder: Path, section: str, rows: np.ndarray, target: Target, side_px: int
) -> None:
    """The files of one section of a small store."""
    folder.mkdir(parents=True)
    first = int(np.flatnonzero(tissue.section_N == section)[0])
    np.save(folder / "patches.npy", tissue.store.patches(section, side_px)[rows - first])
    spots = tissue.spots.iloc[rows]
    adata = anndata.AnnData(
        X=sparse.csr_matrix(tissue.counts[rows][:, target.columns]),
        obs=spots.set_index("spot").drop(columns=["section", "patient"]),
        var=pd.DataFrame(index=tissue.store.genes.index[target.columns]),
    )
    adata.write_h5ad(folder / "spots.h5ad")
    ledger = spots[["spot", "total_counts", "pixel_x", "pixel_y"]].assign(status="kept")
    ledger.to_parquet(folder / "ledger.parquet")


def entry_of(folder: Path, patient: str, spots: int, genes: int) -> dict[str, Any]:
    """A section's entry of the index."""
    return {
        "section": folder.name,
        "patient": patient,
        "subtype": "",
        "spots_raw": spots,
        "spots_kept": spots,
        "genes": genes,
        "files": {name: sha256(folder / name) for name in SECTION_FILES},
    }


# Scores ------------------------------------------------------------------------------------------


def gene_scores(
    tissue: Tissue, judged: np.ndarray, pred_NG: np.ndarray, true_NG: np.ndarray, how: str = ""
) -> dict[str, np.ndarray]:
    """PCC and partial PCC given the log total of each gene, (G,): mean over the judged sections.

    A constant prediction counts as 0. `how`: `pooled` takes all spots as one section; `smoothed`
    averages prediction and measurement over 3 x 3 array positions, `smoothed prediction` the
    prediction alone.
    """
    sections = np.full(len(judged), "") if how == "pooled" else tissue.section_N[judged]
    if how.startswith("smoothed"):
        average = array_average(tissue.spots.iloc[judged].reset_index(drop=True), itself=True)
        pred_NG = average @ pred_NG
        true_NG = average @ true_NG if how == "smoothed" else true_NG
    depth = np.log1p(tissue.total_N[judged])
    pcc, partial = [], []
    for section in dict.fromkeys(sections):
        here = sections == section
        pred, true = pred_NG[here], true_NG[here]
        varies = np.ptp(true, axis=0) > 0
        pcc.append(_known(metrics.pearson(pred, true), varies))
        partial.append(_known(metrics.partial_pearson(pred, true, depth[here]), varies))
    return {"pcc": mean_known(pcc), "partial": mean_known(partial)}


def mean_known(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of each gene over what is not NaN, (G,); NaN where nothing is left."""
    known = np.isfinite(values := np.stack(parts))
    n = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def _known(r_G: np.ndarray, varies_G: np.ndarray) -> np.ndarray:
    """0 for what does not follow the truth at all, NaN only where the truth is constant."""
    return np.where(varies_G, np.nan_to_num(r_G), np.nan)


def summarise(
    scores: Mapping[str, np.ndarray], genes: np.ndarray | None = None
) -> dict[str, float]:
    """Median and mean PCC, median partial PCC, how many genes are above 0; of these genes alone.

    Half of the demo's genes follow no driver: its median lies between two heaps, and jumps.
    """
    chosen = np.s_[:] if genes is None else genes
    return {
        "pcc": metrics.nanmedian(scores["pcc"][chosen]),
        "partial": metrics.nanmedian(scores["partial"][chosen]),
        "mean": float(np.nanmean(scores["pcc"][chosen])),
        "above": float((scores["pcc"][chosen] > 0).sum()),
    }
