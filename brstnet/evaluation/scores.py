"""Every score of every predictor in one tidy table, so that a model is never seen alone.

A row is (gene, section, patient, fold, predictor, metric, value, n). The predictor is `model`, a
control, or `truth` for what is known of the measurement alone. A score over all sections' spots has
the section "" (and the patient "", unless they are all of one); one over genes has the gene "".
A score that is not defined (a gene is constant) is NaN, and stays in the table.

Shape letters: N spots, G genes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from brstnet import metrics
from brstnet.evaluation.certainty.ceiling import SectionCeiling, share_of_ceiling

MODEL, TRUTH = "model", "truth"
COLUMNS = ["gene", "section", "patient", "fold", "predictor", "metric", "value", "n"]

GENE_METRICS = {
    "pcc": "Pearson correlation of prediction and measurement over the section's spots",
    "partial_pcc": "the same given the log of the spot's total count",
    "spearman": "Spearman's rank correlation",
    "ccc": "Lin's concordance correlation",
    "r2": "1 - squared error / squared error of the training mean",
    "mae": "mean absolute error, in training standard deviations of the gene",
    "rmse": "root mean square error, in training standard deviations of the gene",
    "mae_log": "mean absolute error, in log units of the target",
    "rmse_log": "root mean square error, in log units of the target",
    "pcc_smoothed": "PCC, prediction and measurement both averaged over 3 x 3 array positions",
    "pcc_smoothed_prediction": "PCC, the prediction alone averaged over 3 x 3 array positions",
}
CORRELATIONS = (
    "pcc",
    "partial_pcc",
    "spearman",
    "pcc_smoothed",
    "pcc_smoothed_prediction",
    "pcc_pooled",
    "partial_pcc_pooled",
    "spearman_pooled",
    "pcc_smoothed_pooled",
    "pcc_smoothed_prediction_pooled",
)
"""A constant prediction has none of these, and counts as 0 where scores are summed up."""
SPOT_METRICS = {
    "spot_pcc": "Pearson correlation over the panel's genes in standardised units, median of spots",
    "spot_pcc_log": "the same in log units, where the genes' means alone give a high value",
}
TRUTH_METRICS = {
    "ceiling": "best PCC of a perfect predictor, as counts are noisy (binomial thinning)",
    "ceiling_partial": "the same of the partial PCC",
    "half_pcc": "PCC of two halves of the counts, in target units",
    "half_partial_pcc": "the same, each half given its own total",
}
SHARES = {
    "share_of_ceiling": "PCC / ceiling, of genes whose halves agree beyond chance",
    "share_of_ceiling_partial": "the same of the partial PCC",
}
METRICS = {
    **GENE_METRICS,
    **{f"{name}_pooled": f"{why}; all sections as one" for name, why in GENE_METRICS.items()},
    **SPOT_METRICS,
    **TRUTH_METRICS,
    **SHARES,
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Predictions beside the truth, in standardised units, (N, G) each.

    Attributes:
        spots: a row a spot: section, patient, array_x, array_y, total_counts.
        genes: a row a gene: index gene; std (log units of one standard deviation), mean, panel.
        true_NG: what was measured.
        predictions: by predictor, the model first.
        fold: which folds the model is of.
    """

    spots: pd.DataFrame
    genes: pd.DataFrame
    true_NG: np.ndarray
    predictions: Mapping[str, np.ndarray]
    fold: str = ""

    @property
    def log_total_N(self) -> np.ndarray:
        """Log of each spot's total count."""
        return np.log1p(self.spots["total_counts"].to_numpy(float))

    def sections(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Name, patient and rows (N,) bool of each section."""
        for section, part in self.spots.groupby("section", sort=False, observed=True):
            rows = (self.spots["section"] == section).to_numpy()
            yield str(section), str(part["patient"].iloc[0]), rows


def gene_scores(
    pred_NG: np.ndarray,
    true_NG: np.ndarray,
    log_total_N: np.ndarray,
    std_G: np.ndarray,
    average_NN: sparse.csr_matrix | None = None,
) -> dict[str, np.ndarray]:
    """All scores of one predictor on some spots, (G,) each.

    Args:
        pred_NG: predictions, in standardised units.
        true_NG: what was measured.
        log_total_N: log of each spot's total count.
        std_G: a gene's training standard deviation, in log units.
        average_NN: averages over 3 x 3 array positions; without, there is no smoothed PCC.
    """
    mae = metrics.mean_absolute_error(pred_NG, true_NG)
    rmse = metrics.root_mean_square_error(pred_NG, true_NG)
    scores = {
        "pcc": metrics.pearson(pred_NG, true_NG),
        "partial_pcc": metrics.partial_pearson(pred_NG, true_NG, log_total_N),
        "spearman": metrics.spearman(pred_NG, true_NG),
        "ccc": metrics.concordance(pred_NG, true_NG),
        "r2": metrics.r2_against(pred_NG, true_NG, 0.0),
        "mae": mae,
        "rmse": rmse,
        "mae_log": mae * std_G,
        "rmse_log": rmse * std_G,
    }
    if average_NN is not None:
        smooth_NG = average_NN @ pred_NG
        scores["pcc_smoothed"] = metrics.pearson(smooth_NG, average_NN @ true_NG)
        scores["pcc_smoothed_prediction"] = metrics.pearson(smooth_NG, true_NG)
    return scores


def array_average(spots: pd.DataFrame, *, itself: bool) -> sparse.csr_matrix:
    """What averages over the 3 x 3 array positions around each spot of its section, CSR (N, N).

    Rows sum to 1; without `itself` a spot that has no neighbour has a row of zeros. Only spots that
    are there are averaged. (ST-Net: He et al. 2020, Nat. Biomed. Eng. 4:827, smooths so.)
    """
    pairs = [
        _neighbours(np.flatnonzero(spots["section"] == section), spots, itself=itself)
        for section in dict.fromkeys(spots["section"])
    ]
    to, source = (np.concatenate(side) for side in zip(*pairs, strict=True))
    found = np.bincount(to, minlength=len(spots))
    shape = (len(spots), len(spots))
    return sparse.csr_matrix((1.0 / found[to], (to, source)), shape=shape)


def _neighbours(
    rows: np.ndarray, spots: pd.DataFrame, *, itself: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows of one section that lie within one step of each other on the array."""
    array = spots[["array_x", "array_y"]].to_numpy(float)[rows]
    at_N2 = np.rint(array).astype(np.int64) - np.rint(array.min(axis=0)).astype(np.int64) + 1
    grid = np.full(at_N2.max(axis=0) + 2, -1)
    grid[tuple(at_N2.T)] = np.arange(len(rows))
    to, source = [], []
    for step in np.ndindex(3, 3):
        if step == (1, 1) and not itself:
            continue
        beside = grid[tuple((at_N2 + np.array(step) - 1).T)]
        there = np.flatnonzero(beside >= 0)
        to.append(rows[there])
        source.append(rows[beside[there]])
    return np.concatenate(to), np.concatenate(source)


def score_table(
    judged: Judged, ceilings: Mapping[str, SectionCeiling] | None = None
) -> pd.DataFrame:
    """Every score of every predictor: per section, pooled, per spot, and beside the ceiling."""
    average_NN = array_average(judged.spots, itself=True)
    std_G, log_total_N = judged.genes["std"].to_numpy(float), judged.log_total_N
    patients = set(judged.spots["patient"])
    places = [*judged.sections()]
    parts = []
    for section, patient, rows in places:
        average = average_NN[rows][:, rows]
        ceiling = (ceilings or {}).get(section)
        for name, pred_NG in judged.predictions.items():
            pred, true = pred_NG[rows], judged.true_NG[rows]
            found = gene_scores(pred, true, log_total_N[rows], std_G, average)
            found |= {} if ceiling is None else shares(found, ceiling)
            where = Where(section, patient, judged.fold, name, int(rows.sum()))
            parts.append(tidy_rows(found, judged.genes.index, where))
        if ceiling is not None:
            where = Where(section, patient, judged.fold, TRUTH, int(rows.sum()))
            parts.append(tidy_rows(ceiling.scores(), judged.genes.index, where))
    everywhere = patients.pop() if len(patients) == 1 else ""
    for name, pred_NG in judged.predictions.items():
        found = gene_scores(pred_NG, judged.true_NG, log_total_N, std_G, average_NN)
        pooled = {f"{metric}_pooled": values for metric, values in found.items()}
        where = Where("", str(everywhere), judged.fold, name, len(judged.spots))
        parts.append(tidy_rows(pooled, judged.genes.index, where))
    return pd.concat([*parts, _spot_medians(spot_table(judged), judged.fold)], ignore_index=True)


@dataclass(frozen=True)
class Where:
    """What the rows of one predictor have in common; `n` is the number of spots."""

    section: str
    patient: str
    fold: str
    predictor: str
    n: int


def tidy_rows(scores: Mapping[str, np.ndarray], genes: pd.Index, where: Where) -> pd.DataFrame:
    """A row per gene and metric."""
    wide = pd.DataFrame(dict(scores), index=genes.rename("gene"))
    long = wide.reset_index().melt("gene", var_name="metric", value_name="value")
    return long.assign(
        section=where.section,
        patient=where.patient,
        fold=where.fold,
        predictor=where.predictor,
        n=where.n,
    )[COLUMNS]


def shares(found: Mapping[str, np.ndarray], ceiling: SectionCeiling) -> dict[str, np.ndarray]:
    """A predictor's PCC and partial PCC as shares of what noise allows, (G,) each."""
    return {
        "share_of_ceiling": share_of_ceiling(found["pcc"], ceiling.plain).share_G,
        "share_of_ceiling_partial": share_of_ceiling(found["partial_pcc"], ceiling.partial).share_G,
    }


def spot_table(judged: Judged) -> pd.DataFrame:
    """A row per spot and predictor: spot_pcc and spot_pcc_log, over the fold's panel.

    Both are PCCs over genes, in standardised and in log units; NaN where one side is constant.
    """
    panel = judged.genes["panel"].to_numpy(bool)
    mean_G, std_G = (judged.genes[c].to_numpy(float)[panel] for c in ("mean", "std"))
    true_NG = judged.true_NG[:, panel]
    parts = [
        judged.spots[["section", "patient", "spot"]].assign(
            predictor=name,
            spot_pcc=metrics.spot_pearson(pred_NG[:, panel], true_NG),
            spot_pcc_log=metrics.spot_pearson(
                pred_NG[:, panel] * std_G + mean_G, true_NG * std_G + mean_G
            ),
            genes=int(panel.sum()),
        )
        for name, pred_NG in judged.predictions.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _spot_medians(spots: pd.DataFrame, fold: str) -> pd.DataFrame:
    """The median spot of each section and predictor, as rows with the gene ""."""
    names = list(SPOT_METRICS)
    keys = ["section", "patient", "predictor"]
    by = spots.groupby(keys, sort=False, observed=True)[names]
    median, known = (
        table.reset_index().melt(keys, var_name="metric", value_name=name)
        for table, name in ((by.median(), "value"), (by.count(), "n"))
    )
    return median.assign(n=known["n"], gene="", fold=fold)[COLUMNS]
