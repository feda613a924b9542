"""What the paper's tables are made of: each model's scores on who was held out, and in training.

Shape letters: N spots, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from brstnet import metrics
from brstnet.config import plain
from brstnet.data.store import Store
from brstnet.evaluation.controls import depth_only
from brstnet.evaluation.export import to_anndata
from brstnet.evaluation.leaks.gate import check_unseen
from brstnet.evaluation.paper import printed
from brstnet.evaluation.predict import Ensemble, load_ensemble, predict, predict_mean
from brstnet.evaluation.scores import MODEL, Where, tidy_rows
from brstnet.evaluation.tables import section_table
from brstnet.evaluation.yardstick import measured, scored_genes, standardise
from brstnet.training import checkpoint
from brstnet.training.fitted import training_rows

DEPTH = "depth_only"
"""The control that knows a spot's total count alone, by its name in every table of scores."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A row of the paper's tables: a configuration, and what is known of it.

    Attributes:
        backbone: by the paper's ten names, or timm's.
        auxnet: whether AuxNet predicts the other genes.
        missing: why there are no numbers; empty if there are.
        score: of the cross-validation, mean over folds.
        seconds: that all folds took, from start to end.
        genes: index gene; symbol, panel (is it scored?), papers (is it among the paper's ten?).
        test: scores on the held-out patient, as in `scores.COLUMNS`, of MODEL and of DEPTH.
        training: mae and rmse of each fold's model on its own training spots; None if not asked.
    """

    backbone: str
    auxnet: bool
    missing: str = ""
    score: float = float("nan")
    seconds: float = float("nan")
    genes: pd.DataFrame = field(default_factory=pd.DataFrame)
    test: pd.DataFrame = field(default_factory=pd.DataFrame)
    training: pd.DataFrame | None = None

    @property
    def key(self) -> tuple[str, bool]:
        """How the paper's tables name it."""
        return self.backbone, self.auxnet

    @property
    def label(self) -> str:
        """What the paper calls it."""
        return label(self.backbone, auxnet=self.auxnet)

    @property
    def panel(self) -> pd.Index:
        """The genes that are scored; none of a model that is missing."""
        return (
            self.genes.index[self.genes["panel"].to_numpy(bool)]
            if len(self.genes)
            else pd.Index([])
        )

    def pcc(self, predictor: str = MODEL) -> pd.Series:
        """Median over sections of every gene's PCC; a constant prediction counts as 0."""
        table = section_table(self.test, predictor, "pcc", self.genes.index)
        return table.median(axis=1).rename("pcc")


def label(backbone: str, *, auxnet: bool) -> str:
    """What the paper calls a model."""
    return printed.NAMES.get(backbone, backbone) + (" + AuxNet" if auxnet else "")


def judge(
    checkpoints: Sequence[Path], store: Store, patients: Sequence[str], device: torch.device
) -> tuple[anndata.AnnData, pd.DataFrame]:
    """The mean of the fold models on held-out patients: predictions, and their scores.

    Genes are the panel's and the paper's ten where they are not in it. `var` says which is which.

    Raises:
        LeakError: a patient was used in training or validation.
        ValueError: models and store do not fit.
    """
    ensemble = load_ensemble(checkpoints, device)
    sections = store.of_patients(patients)
    check_unseen(ensemble, store, sections)
    genes, spots = wanted_genes(ensemble, store), store.spots(sections)
    columns = ensemble.genes.index.get_indexer(genes.index)
    predicted = predict_mean(ensemble, store, sections, progress=False)[:, columns]
    pred_NG = standardise(predicted, genes).astype(np.float32).astype(np.float64)
    true_NG = standardise(measured(ensemble, store, sections, genes), genes)
    totals = spots["total_counts"].to_numpy(float)
    every = {MODEL: pred_NG, DEPTH: standardise(depth_only(genes, totals), genes)}
    fold = ",".join(str(member.fold.number) for member in ensemble.members)
    parts = [
        section_scores(pred, true_NG, spots, genes.index, (fold, name))
        for name, pred in every.items()
    ]
    protocol = ensemble.members[0].settings.protocol
    facts = {"line": protocol.line(), **plain(protocol)}
    adata = to_anndata(pred_NG, true_NG, spots, genes, facts)
    adata.var = genes[["symbol", "mean", "std", "panel", "papers"]]
    return adata, pd.concat(parts, ignore_index=True)


def wanted_genes(ensemble: Ensemble, store: Store) -> pd.DataFrame:
    """The panel's genes that the store has measured, and the paper's ten that are predicted.

    Columns `panel` and `papers` say which a gene is of; of several genes with one symbol, the one
    with the highest mean count is the paper's.
    """
    panel = scored_genes(ensemble, store).index
    here = ensemble.genes[ensemble.genes.index.isin(store.genes.index)]
    papers = here["symbol"].isin(printed.table_1().index) & ~here["symbol"].duplicated()
    here = here.assign(panel=here.index.isin(panel), papers=papers)
    return here[here["panel"] | here["papers"]]


def section_scores(
    pred_NG: np.ndarray,
    true_NG: np.ndarray,
    spots: pd.DataFrame,
    genes: pd.Index,
    whose: tuple[str, str],
) -> pd.DataFrame:
    """PCC, CCC, MAE and RMSE of each gene on each section, as in `scores.COLUMNS`.

    Args:
        pred_NG: predictions, standardised.
        true_NG: what was measured.
        spots: section and patient of each row.
        genes: of each column.
        whose: fold and predictor.
    """
    parts = []
    for section, part in spots.reset_index(drop=True).groupby("section", sort=False, observed=True):
        pred, true = pred_NG[part.index], true_NG[part.index]
        found = {
            "pcc": metrics.pearson(pred, true),
            "ccc": metrics.concordance(pred, true),
            "mae": metrics.mean_absolute_error(pred, true),
            "rmse": metrics.root_mean_square_error(pred, true),
        }
        where = Where(str(section), str(part["patient"].iloc[0]), *whose, len(part))
        parts.append(tidy_rows(found, genes, where))
    return pd.concat(parts, ignore_index=True)


def training_errors(
    checkpoints: Sequence[Path], store: Store, genes: pd.Index, device: torch.device
) -> pd.DataFrame:
    """Each fold's model on its own training spots: mae and rmse, by the fold's own deviations.

    Spots are those that batches were drawn from. A section at a time: predictions of all genes of
    all sections would take gigabytes.
    """
    parts = []
    for path in checkpoints:
        member = checkpoint.load(path, device)
        scale, settings = member.fitted, member.settings
        chosen = scale.genes.loc[genes]
        for section in member.fold.train:
            spots = store.spots([section])
            enough = (spots["total_counts"] >= settings.training.min_counts).to_numpy()
            rows = training_rows(spots, settings.protocol) & enough
            if not rows.any():
                continue
            predicted = predict(member, store, [section])[genes].to_numpy()
            pred_NG = standardise(predicted, chosen)
            true_NG = standardise(measured(scale, store, [section], chosen), chosen)
            whose = (str(member.fold.number), MODEL)
            parts.append(section_scores(pred_NG[rows], true_NG[rows], spots[rows], genes, whose))
    table = pd.concat(parts, ignore_index=True)
    return table[table["metric"].isin(["mae", "rmse"])]
