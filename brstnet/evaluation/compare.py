"""Two judged models side by side: is one better, on the same spots, genes and patients?

It reads what `brstnet evaluate`, `brstnet score` and `sweeps/evaluate.py` wrote, so that anybody's
model is compared with any other, or with a control of either (PATH@colour_ridge).

Shape letters: G genes, P patients, S sections.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from brstnet import metrics
from brstnet.data.guarded import inside, read_json, read_table
from brstnet.evaluation import plots
from brstnet.evaluation.certainty import uncertainty
from brstnet.evaluation.evaluate import PANELS
from brstnet.evaluation.scores import COLUMNS, MODEL, TRUTH
from brstnet.evaluation.tables import NAMES, members, section_table, within

COMPARED = ("pcc", "partial_pcc")


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One predictor of one evaluation.

    Attributes:
        name: for tables and figures.
        scores: of the panel's genes, each fold its own.
        predictor: model, or a control.
        genes: index gene; symbol.
        protocol: of the evaluation.
    """

    name: str
    scores: pd.DataFrame
    predictor: str
    genes: pd.DataFrame
    protocol: dict[str, Any]

    def sections(self, metric: str) -> pd.DataFrame:
        """One metric: a row per gene, a column per (patient, section)."""
        return section_table(self.scores, self.predictor, metric, self.genes.index)

    def spots(self) -> pd.Series:
        """How many spots each section was judged on."""
        mine = self.scores[(self.scores["metric"] == "pcc") & (self.scores["section"] != "")]
        counts: pd.Series = mine.groupby("section")["n"].first()
        return counts


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What was found of each side against the first.

    Attributes:
        overall: a row a side and metric: both values, their difference with its interval, p, and
            how many genes are higher than the first's. (Medians over genes may differ little where
            most genes differ.)
        patients: a row a patient, a column a side: median PCC over genes.
        genes: a row a side and gene: difference, patients in which it is better, p adjusted.
        notes: what a reader must know.
    """

    overall: pd.DataFrame
    patients: pd.DataFrame
    genes: pd.DataFrame
    notes: tuple[str, ...]

    def describe(self) -> str:
        """In lines for people."""
        row = "  {:<36} {:>6} {:>6} {:>10}  {:<28} {:>7} {:>7} {:>13}"
        names = ("PCC", "first", "this", "difference", "", "p", "Holm", "genes higher")
        lines = [row.format(*names)]
        for metric in COMPARED:
            if metric == "partial_pcc":
                lines.append("given total")
            for found in self.overall[self.overall["metric"] == metric].to_dict("records"):
                values = (f"{found[k]:.3f}" for k in ("first", "this"))
                p = (f"{found[k]:.4f}" for k in ("p", "p_holm"))
                difference = (f"{found['difference']:+.3f}", found["interval"])
                higher = f"{found['genes_higher']} of {found['genes']}"
                lines.append(row.format(found["name"], *values, *difference, *p, higher))
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def read_side(place: str) -> Side:
    """An evaluation's folder, or one of its controls: FOLDER or FOLDER@colour_ridge.

    Raises:
        FileNotFoundError: it is no folder of an evaluation.
        ValueError: a file of it is damaged, or it has no such predictor.
    """
    folder, _, predictor = place.partition("@")
    path, predictor = Path(folder), predictor or MODEL
    if not (path / "scores.parquet").is_file():
        raise FileNotFoundError(
            f"{path}: must be the folder that `brstnet evaluate` or `brstnet score` wrote, with "
            "scores.parquet"
        )
    scores, genes = (read_table(inside(path, name)) for name in ("scores.parquet", PANELS))
    lacking = ({*COLUMNS} - {*scores}) | ({"fold", "gene", "symbol", "panel"} - {*genes})
    if lacking:
        raise ValueError(f"{path}: its tables lack {', '.join(sorted(lacking))}: judge it again")
    known = [p for p in dict.fromkeys(scores["predictor"]) if p != TRUTH]
    if predictor not in known:
        raise ValueError(f"{place}: there is no {predictor} in it, but {', '.join(known)}")
    genes = genes.set_index("gene")
    mine = genes.loc[members(genes, "panel"), "symbol"]
    end = "" if predictor == MODEL else f", {NAMES.get(predictor, predictor)}"
    return Side(
        name=f"{path.resolve().name}{end}",
        scores=within(scores, genes, "panel"),
        predictor=predictor,
        genes=mine[~mine.index.duplicated()].to_frame(),
        protocol=read_json(inside(path, "protocol.json")),
    )


def compare(sides: Sequence[Side], *, seed: int = 0) -> Comparison:
    """Each side against the first, patients as the unit.

    The value is the median over genes of the mean over patients of the mean of their sections, as
    everywhere. p is that of the exchange test of `uncertainty.paired_bootstrap`, adjusted by Holm
    over the sides that are compared. Genes are compared by a two-sided sign test over patients.

    Raises:
        ValueError: there are fewer than two, or they were not judged on the same truth.
    """
    if len(sides) < 2:
        raise ValueError(f"a comparison needs at least two evaluations, got {len(sides)}")
    first, notes, rows, per_gene = sides[0], [], [], []
    patients = {_unique(first.name, []): _by_patient(first, first)[0]}
    for other in sides[1:]:
        notes += [n for n in check_same(first, other) if n not in notes]
        name = _unique(other.name, list(patients))
        for metric in COMPARED:
            row, genes = _compare(first, other, metric, seed)
            rows.append({"name": name, "metric": metric, **row})
            if metric == "pcc":
                per_gene.append(genes.assign(name=name))
        patients[name] = _by_patient(first, other)[1]
    overall = pd.DataFrame(rows)
    for metric in COMPARED:
        mine = overall["metric"] == metric
        overall.loc[mine, "p_holm"] = uncertainty.holm(overall.loc[mine, "p"].to_numpy(float))
    return Comparison(
        overall=overall,
        patients=pd.DataFrame(patients).rename_axis("patient"),
        genes=pd.concat(per_gene).reset_index(names="gene"),
        notes=tuple(notes),
    )


def check_same(first: Side, other: Side) -> list[str]:
    """Check that both were judged on the same truth; return what else differs, in lines.

    Raises:
        ValueError: the target differs, no section is judged by both, or not on the same spots.
    """
    targets = [side.protocol["protocol"]["target"] for side in (first, other)]
    if targets[0] != targets[1]:
        raise ValueError(
            f"{first.name} was judged on {targets[0]} and {other.name} on {targets[1]}: what was "
            "measured differs, and so do the numbers; judge both with one protocol"
        )
    here, there = first.spots(), other.spots()
    common = here.index.intersection(there.index)
    if common.empty:
        raise ValueError(f"{first.name} and {other.name}: no section was judged by both")
    if len(differ := common[here[common].to_numpy() != there[common].to_numpy()]):
        name = differ[0]
        raise ValueError(
            f"section {name} was judged on {here[name]} spots by {first.name} and on {there[name]} "
            f"by {other.name}: only the same spots can be compared; judge both on one store"
        )
    notes = []
    if only := len(here.index.union(there.index)) - len(common):
        notes.append(f"{only} sections were judged by one alone, and are left out")
    if first.protocol["store"] != other.protocol["store"]:
        notes.append(
            f"{first.name} and {other.name} were judged on stores of different content, with the "
            "same number of spots: make sure that they hold the same tissue"
        )
    return notes


def _paired(first: Side, other: Side, metric: str) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Scores (G, P) of both on the genes and sections that both have; genes and patients."""
    tables = [side.sections(metric) for side in (first, other)]
    genes = tables[0].index.intersection(tables[1].index)
    columns = tables[0].columns.intersection(tables[1].columns)
    values = [table.loc[genes, columns].to_numpy(float) for table in tables]
    unpaired = np.isnan(values[0]) != np.isnan(values[1])
    patients = [str(p) for p in columns.get_level_values("patient")]
    a_GP, b_GP = (
        uncertainty.patient_table(np.where(unpaired, np.nan, side), patients) for side in values
    )
    frame = pd.DataFrame(a_GP, genes, list(dict.fromkeys(patients)))
    return a_GP, b_GP, frame


def _compare(
    first: Side, other: Side, metric: str, seed: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    a_GP, b_GP, frame = _paired(first, other, metric)
    how = uncertainty.Bootstrap(seed=seed)
    found = uncertainty.paired_bootstrap(b_GP, a_GP, how=how)
    interval, genes = found.interval, _gene_tests(b_GP - a_GP, frame.index).join(first.genes)
    known = np.isfinite(interval.low)
    row = {
        "this": float(uncertainty.median_of_means(b_GP)),
        "first": float(uncertainty.median_of_means(a_GP)),
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "p": found.p,
        "smallest_p": found.smallest_p,
        "patients": frame.shape[1],
        "genes": len(frame),
        "genes_higher": int((genes["difference"] > 0).sum()),
        "interval": (
            f"({100 * how.level:g} %: {interval.low:+.3f} to {interval.high:+.3f})"
            if known
            else f"(no interval: {uncertainty.several(frame.shape[1], 'patient')})"
        ),
    }
    return row, genes


def _gene_tests(difference_GP: np.ndarray, genes: pd.Index) -> pd.DataFrame:
    """Two-sided sign tests of each gene over patients, adjusted by Holm and Benjamini-Hochberg."""
    higher, lower = (uncertainty.gene_tests(side) for side in (difference_GP, -difference_GP))
    p_G = np.minimum(1, 2 * np.minimum(higher.p_G, lower.p_G))
    return pd.DataFrame(
        {
            "difference": uncertainty.nanmean(difference_GP),
            "patients": higher.patients_G,
            "better": higher.positive_G,
            "worse": lower.positive_G,
            "p": p_G,
            "p_holm": uncertainty.holm(p_G),
            "p_bh": uncertainty.benjamini_hochberg(p_G),
        },
        genes,
    )


def _by_patient(first: Side, other: Side) -> tuple[pd.Series, pd.Series]:
    """Median PCC over genes of each patient, of both."""
    a_GP, b_GP, frame = _paired(first, other, "pcc")
    sides = ([metrics.nanmedian(column) for column in side.T] for side in (a_GP, b_GP))
    one, two = (pd.Series(values, frame.columns) for values in sides)
    return one, two


def _unique(name: str, taken: Sequence[str]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def plot_comparison(found: Comparison) -> Figure:
    """Draw a comparison: a line a patient, and the genes' differences, of each side."""
    names = list(found.patients)
    figure = Figure(figsize=(3 + 2.2 * len(names), 8), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for patient, values in found.patients.iterrows():
        top.plot(names, values, marker="o", markersize=4, linewidth=1, label=str(patient))
    top.set_ylabel("a patient's median PCC")
    top.axhline(0, color="black", linewidth=0.6)
    if len(found.patients) <= 12:
        top.legend(
            frameon=False, fontsize=8, title="patient", loc="center left", bbox_to_anchor=(1, 0.5)
        )
    parts = [found.genes[found.genes["name"] == name]["difference"].dropna() for name in names[1:]]
    bottom.hist(parts, bins=30, histtype="step", linewidth=1.6, label=names[1:])
    bottom.axvline(0, color="black", linewidth=0.6)
    bottom.set_xlabel(f"a gene's PCC less that of {names[0]} (mean over patients)")
    bottom.set_ylabel("genes")
    bottom.legend(frameon=False, fontsize=8)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    top.tick_params(axis="x", labelrotation=15)
    return figure


def write(found: Comparison, sides: Sequence[Side], out: Path) -> None:
    """comparison.csv, patients.csv, genes.csv, protocol.json and comparison.png."""
    out.mkdir(parents=True, exist_ok=True)
    found.overall.drop(columns="interval").to_csv(out / "comparison.csv", index=False)
    found.patients.to_csv(out / "patients.csv")
    found.genes.to_csv(out / "genes.csv", index=False)
    facts = {
        "sides": [{"name": s.name, "predictor": s.predictor, **s.protocol} for s in sides],
        "notes": found.notes,
        "interval": asdict(uncertainty.USUAL),
    }
    (out / "protocol.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    plots.save(plot_comparison(found), out / "comparison.png")
