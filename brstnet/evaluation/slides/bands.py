"""Intervals round the predictions of a new slide, from the file that `evaluate` wrote of them.

Shape letters: N spots, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from brstnet.evaluation.certainty import conformal


@dataclass(frozen=True, kw_only=True, eq=False)
class Bands:
    """How far the truth may lie from a prediction, in log units, with a chance of `level`.

    `half_width_G` is infinite where there were too few patients for the level, NaN where a gene was
    never measured; `patients` is the least number that a gene's rests on; `warnings` are what a
    reader must know of them.
    """

    source: str
    level: float
    patients: int
    half_width_G: np.ndarray
    warnings: Sequence[str]

    def around(self, pred_NG: np.ndarray) -> dict[str, np.ndarray]:
        """Layers `lower` and `upper`, float32 (N, G).

        What is predicted is log(1 + count), which is never below 0: cutting an interval there loses
        nothing that it could hold.
        """
        ends = {"lower": pred_NG - self.half_width_G, "upper": pred_NG + self.half_width_G}
        return {name: np.maximum(end, 0).astype(np.float32) for name, end in ends.items()}


def read_bands(path: Path, level: float, genes: pd.Index, target: str) -> Bands:
    """The half-widths of these genes at a level.

    Args:
        path: what `conformal.Intervals.write` wrote.
        level: one that the file has.
        genes: the model's; those that were never measured have no interval.
        target: what the model predicts, log_normalised or log_counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table, of another target, lacks the level, or has none of the
            genes.
    """
    found = conformal.read(path, target)
    at_level = np.isclose(found.table["level"], level)
    if not at_level.any():
        there = ", ".join(f"{each:g}" for each in found.levels)
        raise ValueError(f"{path}: has no level {level:g}, but {there}: give --level")
    table = found.table[at_level & found.table["gene"].isin(genes)]
    if table.empty:
        raise ValueError(
            f"{path}: has none of the model's {len(genes)} genes at level {level:g}: intervals are "
            "of the models that they were calibrated with"
        )
    half_width_G = table.set_index("gene")["half_width"].reindex(genes).to_numpy(float)
    notes = []
    if endless := int(np.isinf(half_width_G).sum()):
        notes.append(
            f"the {level:.0%} interval is infinite for {endless} of {len(genes)} genes: it says "
            "nothing of them"
        )
    if unknown := int(np.isnan(half_width_G).sum()):
        notes.append(f"{unknown} of {len(genes)} genes have no interval in {path.name}")
    return Bands(
        source=path.name,
        level=level,
        patients=int(table["patients"].min()),
        half_width_G=half_width_G,
        warnings=[*notes, *conformal.Intervals(table=table).notes()],
    )
