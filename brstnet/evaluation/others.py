"""Other people's predictions, judged by the very same tables as a checkpoint's.

A file is an AnnData (.h5ad):

    X          predictions, dense or sparse (spots, genes), finite
    obs        columns `section` and `spot`: the store's names of both; each pair once
    var_names  the store's gene ids
    uns        "brstnet_units", unless the units are given by hand: one of UNITS
    uns        "brstnet_median_total": of log_normalised, what a spot's total was scaled to
    var        `mean` and `std`: of standardised, each gene's, in log units

Every spot of the judged sections that the store has kept must be there. What is there besides is
left alone if the store knows it: sections of other patients, spots that prepare has left out.

Shape letters: N spots, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from brstnet.data.store import Store, sha256
from brstnet.evaluation.cases import Case, describe_case, listed
from brstnet.evaluation.controls import Wanted
from brstnet.evaluation.evaluate import USUAL, Evaluation, judge, wanted
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.leaks.gate import check_unseen
from brstnet.evaluation.predict import load_ensemble
from brstnet.evaluation.yardstick import Yardstick, judged_genes, standardise

UNITS = ("log_normalised", "log_counts", "standardised")
"""log1p of the count scaled from the spot's total to a median; log1p of the count; the target's
distance from its training mean in training standard deviations."""
MOST_LOG = 14.0
"""log1p of more than a million counts: no log units."""
NEGATIVE = 0.1
"""A log of counts is never negative, but a linear prediction of it may be, in so many values."""
FAR = 4.0
"""Predictions whose mean is so many standard deviations from the training mean, in the median gene,
are in other units than they are said to be."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A file of predictions that was checked against the store.

    Attributes:
        path: of the file.
        values: a row per judged spot, in the store's order; a column per gene of the store's.
        units: one of UNITS.
        mean_G: of standardised units, if the file says it, by gene.
        std_G: likewise.
        median_total: what log_normalised scales to, if the file says it.
        left_alone: spots that are not judged.
    """

    path: Path
    values: pd.DataFrame
    units: str
    mean_G: pd.Series | None
    std_G: pd.Series | None
    median_total: float | None
    left_alone: int


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of predictions, and its units where it does not say them itself."""

    path: Path
    units: str | None = None


def score(
    predictions: File,
    store: Store,
    patients: Sequence[str],
    out: Path,
    yardstick: Yardstick,
    *,
    options: Judging = USUAL,
    fitting: Wanted | None = None,
) -> Evaluation:
    """Judge a file of predictions on these patients and write the tables under `out`.

    On whom the predicting model was trained is its authors' word: the file cannot show it.

    Args:
        predictions: .h5ad, as this module's docstring says.
        store: the store the patients are in.
        patients: whom to judge on.
        out: folder for the tables.
        yardstick: panel, units and training spots: `from_checkpoints` or `Yardstick.fitted_on`.
        options: panels, an encoder as a control, draws.
        fitting: of the controls, such as the device of the encoder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit the store, or its numbers cannot be in these units.
    """
    sections = store.of_patients(patients)
    found = read_predictions(predictions.path, store, sections, predictions.units)
    genes = judged_genes(yardstick, store, listed(options))
    genes = genes[genes.index.isin(found.values.columns)]
    if not genes["panel"].any():
        raise ValueError(
            f"{predictions.path}: none of the panel's {yardstick.protocol.panel_size} genes is "
            f"predicted; its ids begin {', '.join(found.values.columns[:3])}"
        )
    what = f"predictions of {predictions.path.name} ({found.units}); {yardstick.origin}"
    case = Case(
        yardstick=yardstick,
        store=store,
        sections=sections,
        genes=genes,
        pred_NG=in_standard_units(found, genes, yardstick),
    )
    about = {
        **describe_case([case], what),
        "predictions": {
            "file": predictions.path.name,
            "sha256": sha256(predictions.path),
            "units": found.units,
            "spots_left_alone": found.left_alone,
        },
    }
    usual = wanted(options, torch.device("cpu"), progress=True)
    return judge([case], about, out, options, fitting or usual)


def from_checkpoints(
    checkpoints: Sequence[Path], store: Store, patients: Sequence[str]
) -> Yardstick:
    """The yardstick of these checkpoints; none of the judged patients may be among theirs.

    Raises:
        LeakError: a patient to be judged was used in training or validation.
    """
    ensemble = load_ensemble(checkpoints, torch.device("cpu"))
    check_unseen(ensemble, store, store.of_patients(patients))
    return Yardstick.of(ensemble, store)


def read_predictions(
    path: Path, store: Store, sections: Sequence[str], units: str | None = None
) -> Predictions:
    """Read predictions of these sections and check them; all faults at once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no AnnData file, or not of this layout, or does not fit the store.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        adata = anndata.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as AnnData: {error}") from error
    if lacking := {"section", "spot"} - set(adata.obs):
        raise ValueError(
            f"{path}: obs must have the columns section and spot, and lacks "
            f"{', '.join(sorted(lacking))}; it has {', '.join(map(str, adata.obs)) or 'none'}"
        )
    stated = units or adata.uns.get("brstnet_units")
    keys = pd.MultiIndex.from_arrays([adata.obs[c].astype(str) for c in ("section", "spot")])
    rows, faults = _match(keys, store, sections)
    faults += _gene_faults(adata.var_names, store)
    if stated not in UNITS:
        faults.append(
            f"units must be stated as one of {', '.join(UNITS)} (--units, or "
            f"uns['brstnet_units']), got {stated}"
        )
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in faults))
    part = adata.X[rows]
    dense = np.asarray(part.toarray() if sparse.issparse(part) else part, np.float64)
    values = pd.DataFrame(dense, columns=adata.var_names)
    values = values.loc[:, values.columns.isin(store.genes.index)]
    statistics = {"mean", "std"} <= set(adata.var)
    median_total = adata.uns.get("brstnet_median_total")
    return Predictions(
        path=path,
        values=values,
        units=str(stated),
        mean_G=adata.var["mean"].astype(float) if statistics else None,
        std_G=adata.var["std"].astype(float) if statistics else None,
        median_total=None if median_total is None else float(median_total),
        left_alone=len(adata) - len(rows),
    )


def _match(
    keys: pd.MultiIndex, store: Store, sections: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Rows of the file in the order of the store's spots, and what is wrong with them."""
    faults = []
    named = set(keys.get_level_values(0))
    if unknown := sorted(named - set(store.sections)):
        faults.append(
            f"{len(unknown)} sections are not in the store: {_some(unknown)}; it has "
            f"{_some(list(store.sections))}"
        )
    if keys.has_duplicates:
        double = [f"{s} {spot}" for s, spot in keys[keys.duplicated()].unique()]
        faults.append(f"{len(double)} spots stand there more than once: {_some(double)}")
        return np.zeros(0, int), faults
    spots = store.spots(sections)
    wanted_ = pd.MultiIndex.from_arrays([spots[c].astype(str) for c in ("section", "spot")])
    rows = keys.get_indexer(wanted_)
    if (rows < 0).any():
        missing = [f"{s} {spot}" for s, spot in wanted_[rows < 0]]
        faults.append(
            f"{len(missing)} of {len(rows)} spots to be judged have no prediction: {_some(missing)}"
        )
    for section in (s for s in sections if s in named):
        here = keys[keys.get_level_values(0) == section].get_level_values(1)
        if strange := sorted(set(here) - set(store.ledger(section)["spot"].astype(str))):
            faults.append(
                f"{len(strange)} spots are none of section {section} in the store: {_some(strange)}"
            )
    return rows, faults


def _gene_faults(names: pd.Index, store: Store) -> list[str]:
    if names.has_duplicates:
        return [
            f"genes stand there more than once: {_some(list(names[names.duplicated()].unique()))}"
        ]
    if not names.isin(store.genes.index).any():
        return [
            f"none of its {len(names)} genes is in the store; its ids begin {_some(list(names))}, "
            f"the store's {_some(list(store.genes.index))}"
        ]
    return []


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def in_standard_units(found: Predictions, genes: pd.DataFrame, yardstick: Yardstick) -> np.ndarray:
    """Predictions (N, G) in the yardstick's training standard deviations.

    Raises:
        ValueError: the units cannot be brought to the yardstick's, or cannot be what they are said
            to be.
    """
    values_NG = found.values[genes.index].to_numpy()
    check_finite(found, values_NG, genes)
    if found.units == "standardised":
        scaled_NG = _restandardised(found, values_NG, genes)
    elif found.units != yardstick.target:
        raise ValueError(
            f"{found.path}: predictions are {found.units}, but the yardstick's target is "
            f"{yardstick.target}: to turn one into the other would take the spots' measured "
            f"totals, which a prediction must not know; judge by {found.units} (--protocol.target "
            f"{found.units}, or a checkpoint of that target)"
        )
    else:
        _check_log(found, values_NG)
        scaled_NG = standardise(_rescaled(found, values_NG, yardstick), genes)
    _check_near(found, scaled_NG, values_NG, genes)
    return scaled_NG


def check_finite(found: Predictions, values_NG: np.ndarray, genes: pd.DataFrame) -> None:
    """Name the first gene of which a prediction is no number.

    Raises:
        ValueError: there is one.
    """
    if not np.isfinite(values_NG).all():
        column = int(np.argwhere(~np.isfinite(values_NG))[0, 1])
        raise ValueError(
            f"{found.path}: {int((~np.isfinite(values_NG)).sum())} predictions are NaN or infinite,"
            f" the first of gene {genes.index[column]}"
        )


def _restandardised(found: Predictions, values_NG: np.ndarray, genes: pd.DataFrame) -> np.ndarray:
    """From the file's mean and deviation to the yardstick's; as they are, if these are the same."""
    if found.mean_G is None or found.std_G is None:
        return values_NG
    mean_G, std_G = (s.reindex(genes.index).to_numpy() for s in (found.mean_G, found.std_G))
    if not (np.isfinite(mean_G).all() and (std_G > 0).all()):
        raise ValueError(f"{found.path}: var's mean must be finite and its std above 0")
    same = np.allclose(mean_G, genes["mean"], rtol=1e-9) and np.allclose(
        std_G, genes["std"], rtol=1e-9
    )
    return values_NG if same else standardise(values_NG * std_G + mean_G, genes)


def _rescaled(found: Predictions, values_NG: np.ndarray, yardstick: Yardstick) -> np.ndarray:
    """log_normalised to another total: log1p(expm1(x) * ours / theirs), where theirs is said."""
    if found.units != "log_normalised" or found.median_total is None:
        return values_NG
    ratio = yardstick.median_total / found.median_total
    rescaled: np.ndarray = values_NG if ratio == 1 else np.log1p(np.expm1(values_NG) * ratio)
    return rescaled


def _check_log(found: Predictions, values_NG: np.ndarray) -> None:
    highest, negative = float(values_NG.max()), float((values_NG < 0).mean())
    if highest > MOST_LOG:
        raise ValueError(
            f"{found.path}: said to be {found.units}, but the highest value is {highest:.4g}, "
            "which would be over a million counts: are these raw counts? give their log1p"
        )
    if negative > NEGATIVE:
        raise ValueError(
            f"{found.path}: said to be {found.units}, but {100 * negative:.0f} % of the values are "
            "negative, and the log of counts never is: are these standardised?"
        )


def _check_near(
    found: Predictions, scaled_NG: np.ndarray, values_NG: np.ndarray, genes: pd.DataFrame
) -> None:
    """Are the predictions where the training spots are? Else the units are others."""
    far = float(np.median(np.abs(scaled_NG.mean(axis=0))))
    alone = found.units == "standardised" and found.mean_G is None
    positive = alone and bool((values_NG >= 0).all() and values_NG.any())
    if far <= FAR and not positive:
        return
    as_log = float(np.median(np.abs(standardise(values_NG, genes).mean(axis=0))))
    seen = (
        "no value is negative"
        if positive
        else f"the median gene's mean lies {far:.1f} standard deviations from the training mean"
    )
    likely = "log units" if found.units == "standardised" else "another scaling, or standardised"
    raise ValueError(
        f"{found.path}: said to be {found.units}, but {seen}: are these {likely}? (as log units "
        f"the median gene's mean would lie {as_log:.1f} away)"
    )
