"""What predictions are measured by: genes, units and training spots, never those of the judged.

A yardstick comes from checkpoints, or is fitted on training patients that are named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
from scipy import sparse

from brstnet import config
from brstnet.config import Settings, Training
from brstnet.data.store import Store
from brstnet.evaluation.predict import Ensemble
from brstnet.training.fitted import fit_statistics, transform
from brstnet.training.folds import ALL, Fold
from brstnet.training.leaks import LeakError

VARIABLE = 50
"""Genes of the panel of the most variable."""


class Scale(Protocol):
    """What both an ensemble and a yardstick know: genes with their statistics, and the units."""

    @property
    def genes(self) -> pd.DataFrame:
        """Index gene; symbol, mean, std (of the target), panel."""

    @property
    def target(self) -> str:
        """What is predicted: log_normalised or log_counts."""

    @property
    def median_total(self) -> float:
        """What log_normalised scales a spot's total to."""


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """Genes, units and training spots by which predictions are judged.

    Attributes:
        genes: as those of an `Ensemble`: index gene; symbol, mean_count, mean, std, depth_slope,
            depth_intercept, panel.
        target: log_normalised or log_counts.
        median_total: what log_normalised scales a spot's total to.
        protocol: what the panel was chosen by.
        train: sections that controls may be fitted on; empty if the store lacks one of them.
        fold: which folds the models are of, such as "0,1,2"; "all" for a refit.
        origin: where it comes from, in words.
    """

    genes: pd.DataFrame
    target: str
    median_total: float
    protocol: config.Protocol
    train: tuple[str, ...]
    fold: str
    origin: str

    @classmethod
    def of(cls, ensemble: Ensemble, store: Store) -> Self:
        """The yardstick that the models carry."""
        members = ensemble.members
        folds = ["all" if m.fold.number == ALL else str(m.fold.number) for m in members]
        return cls(
            genes=ensemble.genes,
            target=ensemble.target,
            median_total=ensemble.median_total,
            protocol=members[0].settings.protocol,
            train=tuple(_training_sections(ensemble, store)),
            fold=",".join(folds),
            origin=f"statistics of {len(members)} models",
        )

    @classmethod
    def fitted_on(
        cls,
        store: Store,
        patients: Sequence[str],
        judged: Sequence[str],
        protocol: config.Protocol,
    ) -> Self:
        """A yardstick fitted on these patients' spots, for predictions without a checkpoint.

        Raises:
            LeakError: one of them is to be judged.
            ValueError: a patient is unknown, or too few genes pass the filter.
        """
        if both := sorted(set(patients) & set(judged)):
            raise LeakError(
                f"{', '.join(both)} cannot be both judged and a training patient: panel, means and "
                "controls are fitted on training patients alone"
            )
        train = tuple(store.of_patients(patients))
        fold = Fold(
            number=ALL, train=train, validation=(), held_out=tuple(store.of_patients(judged))
        )
        settings = Settings(protocol=protocol, training=Training(genes=protocol.panel_size))
        fitted = fit_statistics(store, fold, settings, images=False)
        return cls(
            genes=fitted.genes,
            target=fitted.target,
            median_total=fitted.median_total,
            protocol=protocol,
            train=train,
            fold="",
            origin=f"statistics fitted on patients {', '.join(sorted(set(patients)))}",
        )


def _training_sections(ensemble: Ensemble, store: Store) -> list[str]:
    """The sections that any member trained or validated on, if this store still has them all."""
    seen: dict[str, str] = {}
    for member in ensemble.members:
        seen |= member.facts["store"]["sections"]
    same = [
        name
        for name, entry in store.sections.items()
        if seen.get(name) == entry["files"]["patches.npy"]
    ]
    return same if len(same) == len(seen) else []


def standardise(log_units: np.ndarray, genes: pd.DataFrame) -> np.ndarray:
    """Log units to training standard deviations of each gene, (N, G)."""
    scaled: np.ndarray = (log_units - genes["mean"].to_numpy()) / genes["std"].to_numpy()
    return scaled


def scored_genes(scale: Scale, store: Store) -> pd.DataFrame:
    """The panel's genes that the store has measured.

    Raises:
        ValueError: there is none.
    """
    panel = scale.genes[scale.genes["panel"]]
    here = panel[panel.index.isin(store.genes.index)]
    if here.empty:
        raise ValueError(
            f"{store.path}: none of the model's {len(panel)} genes is in this store; its ids begin "
            f"{', '.join(store.genes.index[:3])}, the model's {', '.join(panel.index[:3])}"
        )
    return here


def judged_genes(scale: Scale, store: Store, listed: Sequence[str] | None = None) -> pd.DataFrame:
    """The genes of every panel, those of the fold's first, with a column that says who is in which.

    `panel`: the fold's. `variable`: the 50 whose target has the largest standard deviation, in log
    units on the training spots, among all genes that are predicted. `listed`: the user's, by id or
    symbol.

    Raises:
        ValueError: no gene of the panel or of the list is to be had.
    """
    panel = scored_genes(scale, store)
    here = scale.genes[scale.genes.index.isin(store.genes.index)]
    variable = here["std"].sort_values(ascending=False, kind="stable").index[:VARIABLE]
    wanted = set(listed or ())
    mine = here.index.isin(wanted) | here["symbol"].isin(wanted)
    if wanted and not mine.any():
        raise ValueError(
            f"none of the {len(wanted)} listed genes is both predicted and measured; listed are "
            f"{', '.join(sorted(wanted)[:3])}, ids such as {', '.join(here.index[:3])} or symbols "
            f"such as {', '.join(here['symbol'][:3])} are known"
        )
    table = here.assign(
        panel=here.index.isin(panel.index), variable=here.index.isin(variable), listed=mine
    )
    table = table[table[["panel", "variable", "listed"]].any(axis=1)]
    return table.sort_values("panel", ascending=False, kind="stable")


def read_gene_list(path: Path) -> list[str]:
    """Gene ids or symbols, one a line; empty lines and what follows # are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no gene, or one twice.
    """
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    genes = [line for line in lines if line]
    if not genes:
        raise ValueError(f"{path}: names no gene; it must have one id or symbol a line")
    if double := sorted({g for g in genes if genes.count(g) > 1}):
        raise ValueError(f"{path}: names genes twice: {', '.join(double[:5])}")
    return genes


def raw_counts(store: Store, sections: Sequence[str], genes: pd.DataFrame) -> sparse.csr_matrix:
    """Raw counts of these genes, CSR (N, G)."""
    return store.counts(sections)[:, store.genes.index.get_indexer(genes.index)]


def measured(
    scale: Scale, store: Store, sections: Sequence[str], genes: pd.DataFrame
) -> np.ndarray:
    """What was measured, in log units on this scale, (N, G)."""
    totals = store.spots(sections)["total_counts"].to_numpy(float)
    counts = raw_counts(store, sections, genes)
    units: Any = transform(counts, totals, scale.target, scale.median_total)
    dense: np.ndarray = units.toarray()
    return dense
