"""The paper's results as data: what `sweeps/paper.py` found, as tables for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brstnet import __version__
from brstnet.evaluation.evaluate import strict
from brstnet.evaluation.paper.figures import Map
from brstnet.evaluation.paper.models import Model
from brstnet.evaluation.paper.same_quantity import Verdict
from brstnet.evaluation.paper.tables import clock


@dataclass(kw_only=True)
class Results:
    """Everything that was found.

    Attributes:
        sweep: its name.
        line: the protocol in a line.
        store: what was trained on, in words.
        best: whose top genes, histogram and map are shown.
        models: a row each, the missing ones too.
        common: genes that Table 2 is over.
        table_1: as `paper_tables.table_1_info` made it; the others likewise.
        table_2: errors.
        table_3: times.
        figure_2: genes in each bin.
        figure_3: histogram.
        verdicts: by table or figure, whether it is the paper's quantity.
        figures: the drawn ones.
        map: what Fig. 4 shows.
    """

    sweep: str
    line: str
    store: str
    best: Model
    models: Sequence[Model]
    common: int
    table_1: pd.DataFrame
    table_2: pd.DataFrame
    table_3: pd.DataFrame
    figure_2: pd.DataFrame
    figure_3: pd.DataFrame
    verdicts: dict[str, Verdict]
    figures: dict[str, Path] = field(default_factory=dict)
    map: Map | None = None


def written(results: Results) -> dict[str, pd.DataFrame]:
    """The tables as they are written, ours and the paper's in columns side by side."""
    return {
        "table1": wide_1(results.table_1),
        "table2": results.table_2.drop(columns=["backbone", "auxnet"]),
        "table3": with_clock(results.table_3),
        "fig2": results.figure_2.drop(columns=["backbone", "auxnet"]),
        "fig3": results.figure_3,
    }


def wide_1(table: pd.DataFrame) -> pd.DataFrame:
    """Table 1 with a row a gene: a column a model, and one of printed values where there are any.

    A model that is missing has an empty column; why is in `results.json` and on the page.
    """
    genes = table.drop_duplicates("symbol")[["symbol", "gene", "rank", "papers"]]
    wide = genes.assign(rank=[f"{r:.0f}" if r > 0 else "" for r in genes["rank"]])
    wide = wide.reset_index(drop=True)
    for model, part in table.groupby("model", sort=False):
        wide[str(model)] = part["pcc"].to_numpy()
        if part["printed"].notna().any():
            wide[f"{model}, printed"] = part["printed"].to_numpy()
    return wide


def with_clock(table: pd.DataFrame) -> pd.DataFrame:
    """Table 3 with times as the paper has them, and the sum of all rows."""
    named = table.drop(columns=["backbone", "auxnet"])
    total = pd.DataFrame(
        {
            "model": ["all"],
            "seconds": [named["seconds"].sum()],
            "printed_seconds": [named["printed_seconds"].sum()],
            "note": [f"{named['seconds'].notna().sum()} of {len(named)} here, 20 in the paper"],
        }
    )
    both = pd.concat([named, total], ignore_index=True)
    both.insert(1, "time", both["seconds"].map(clock))
    both.insert(4, "printed_time", both["printed_seconds"].map(clock))
    return both


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, numbers with four digits after the point."""
    cells = [[str(name) for name in table.columns], ["---"] * len(table.columns)]
    cells += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def cell(value: object) -> str:
    """A value as text; nothing where there is none."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4f}"
    return str(value).replace("|", "\\|")


def as_json(results: Results) -> dict[str, Any]:
    """Everything as JSON can say it."""
    frames = {
        "table1": results.table_1,
        "table2": results.table_2,
        "table3": results.table_3,
        "fig2": results.figure_2,
        "fig3": results.figure_3,
    }
    shown = results.map
    found: dict[str, Any] = strict({
        "format": "brstnet-paper",
        "version": 1,
        "brstnet": __version__,
        "sweep": results.sweep,
        "protocol": results.line,
        "store": results.store,
        "best": results.best.label,
        "models": [
            {
                "model": model.label,
                "backbone": model.backbone,
                "auxnet": model.auxnet,
                "missing": model.missing,
                "validation_score": model.score,
                "genes": len(model.panel),
                "genes_without_pcc": None
                if model.missing
                else int(model.pcc()[model.panel].isna().sum()),
            }
            for model in results.models
        ],
        "genes_in_table2": results.common,
        **{name: frame.to_dict("records") for name, frame in frames.items()},
        "fig4": None
        if shown is None
        else {"section": shown.section, "gene": shown.symbol, "pcc": shown.pcc},
        "comparable": {
            name: {"same": verdict.same, "line": verdict.line, **asdict(verdict)}
            for name, verdict in results.verdicts.items()
        },
    })  # fmt: skip
    return found
