"""A finished fold on its own validation sections: a table per gene, and a map of the best genes."""

from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from brstnet.config import plain
from brstnet.data.store import Store
from brstnet.evaluation import plots
from brstnet.evaluation.export import to_anndata
from brstnet.evaluation.predict import load_ensemble, predict_mean
from brstnet.evaluation.yardstick import measured, scored_genes, standardise


def gene_table(checkpoint: Path) -> pd.DataFrame:
    """The panel's correlations of a checkpoint: a row per gene, a column per validation section."""
    table = pd.read_parquet(checkpoint / "validation.parquet")
    wide = table.pivot(index=["gene", "symbol"], columns="section", values="pcc")
    wide = wide.assign(mean=wide.mean(axis=1)).rename_axis(columns=None)
    return wide.sort_values("mean", ascending=False).reset_index()


def gene_map(checkpoint: Path, store: Store, device: torch.device) -> Figure:
    """Measured and predicted expression of the best genes on the first validation section."""
    ensemble = load_ensemble([checkpoint], device)
    member = ensemble.members[0]
    section, protocol = member.fold.validation[0], member.settings.protocol
    genes = scored_genes(ensemble, store)
    predicted = predict_mean(ensemble, store, [section], progress=False)
    columns = ensemble.genes.index.get_indexer(genes.index)
    pred_NG = standardise(predicted[:, columns], genes)
    true_NG = standardise(measured(ensemble, store, [section], genes), genes)
    facts = {"line": protocol.line(), **plain(protocol)}
    adata = to_anndata(pred_NG, true_NG, store.spots([section]), genes, facts)
    table = pd.read_parquet(checkpoint / "validation.parquet")
    pcc = table[table["section"] == section].set_index("gene")["pcc"]
    best = list(pcc.sort_values(ascending=False).index[: plots.MAPPED_GENES])
    titles = {gene: f"{genes['symbol'][gene]}\nPCC {pcc[gene]:.2f}" for gene in best}
    heading = f"validation section {section} of fold {member.fold.number}; {protocol.line()}"
    return plots.plot_map(plots.map_info(adata, section, best), titles, heading)
