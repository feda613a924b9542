"""How to judge: a setting a line, for the command line and for the record. No torch here."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How to judge; whatever is chosen here, the panel's scores stay the same.

    Args:
        gene_groups: parquet with columns gene, group and maybe ceiling, to be summed up apart.
        gene_list: text file of gene ids or symbols, one a line: a panel of your own.
        encoder: a frozen network whose features are given to a ridge, as one more control: a timm
            name, hf-hub:OWNER/NAME or local-dir:FOLDER.
        encoder_weights: `timm` loads what belongs to that name; else a file.
        views: symmetries of a patch that are averaged: 1 or 8; by default as in training.
        symmetries: also the spread over the 8 symmetries, which costs 8 passes.
        draws: of each permutation null.
        thinnings: of the counts, for the noise ceiling.
        seed: of all that is drawn.
    """

    gene_groups: Path | None = None
    gene_list: Path | None = None
    encoder: str | None = None
    encoder_weights: str | None = "timm"
    views: int | None = None
    symmetries: bool = False
    draws: int = 200
    thinnings: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a ValueError that says which setting cannot be."""
        for name in ("draws", "thinnings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
