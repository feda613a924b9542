"""What a section holds, as fingerprints of its spots: the same tissue is known by any name.

Shape letters: N spots, H and W pixels, C colours, L levels of brightness.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from brstnet.config import Protocol
from brstnet.data.store import Store
from brstnet.training.fitted import training_rows

FEWEST_COUNTS = 100
"""Two spots may have the same few counts by chance; spots with fewer are not compared."""

TOGETHER = 64
"""Patches whose pixels are counted in one go."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A section's spots without their names.

    Attributes:
        patches: digests of its patches; those of a single colour, such as empty glass, left out.
        counts: digests of its spots' counts, genes by name.
        levels_CL: how many pixels of the spots that may train have each level of each colour.
    """

    patches: frozenset[bytes]
    counts: frozenset[bytes]
    levels_CL: np.ndarray


@lru_cache(maxsize=256)  # the folds of a cross-validated evaluation look at the same sections
def look(store: Store, section: str, protocol: Protocol) -> Contents:
    """The contents of a section; each patch is read once."""
    patches = store.patches(section)
    rows = training_rows(store.spots([section]), protocol)
    levels_CL = np.zeros((3, 256), np.int64)
    seen = set()
    for start in range(0, len(patches), TOGETHER):
        some_NHWC = np.asarray(patches[start : start + TOGETHER])
        seen |= {_digest(p.tobytes()) for p in some_NHWC if (p != p[0, 0]).any()}
        training = some_NHWC[rows[start : start + TOGETHER]]
        for colour in range(3):
            levels_CL[colour] += np.bincount(training[..., colour].ravel(), minlength=256)
    return Contents(patches=frozenset(seen), counts=_counted(store, section), levels_CL=levels_CL)


def _counted(store: Store, section: str) -> frozenset[bytes]:
    """Digests of the spots' counts, whatever the order of the store's genes."""
    counts = store.counts([section])
    counts = counts[:, np.argsort(store.genes.index.to_numpy(str), kind="stable")].tocsr()
    counts.eliminate_zeros()
    counts.sort_indices()
    ends = counts.indptr
    return frozenset(
        _digest(counts.indices[a:b].tobytes() + counts.data[a:b].astype(np.int64).tobytes())
        for a, b in pairwise(ends)
        if counts.data[a:b].sum() >= FEWEST_COUNTS
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def colour_statistics(levels_CL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each colour in 0..1, (C,) each, from counted levels."""
    level_L = np.arange(levels_CL.shape[1]) / (levels_CL.shape[1] - 1)
    pixels_C = levels_CL.sum(axis=1)
    mean_C = levels_CL @ level_L / pixels_C
    apart_CL = level_L - mean_C[:, None]
    return mean_C, np.sqrt((levels_CL * apart_CL**2).sum(axis=1) / pixels_C)
