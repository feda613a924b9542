"""The noise ceiling: the best PCC that a perfect predictor could have, as counts are noisy.

A section's raw counts are thinned into two halves, each count c into Binomial(c, 1/2) and the rest.
If counts are Poisson given the rate, the halves are independent given it (count splitting: Neufeld
et al. 2024, Biostatistics 25:270; binomial thinning: Gerard 2020, BMC Bioinf. 21:206), so what they
share is signal. Their correlation r gives the reliability of the whole, 2r / (1 + r) (Spearman
1910, Brown 1910, both Brit. J. Psychol. 3), and its square root is the correlation of the whole
with the noiseless rate.

Three limits. (1) Only the noise of counting is judged: what differs between neighbouring spots for
biological reasons that no image shows counts as signal, and overdispersion within a spot does too.
(2) log1p of half the counts is not a linear function of log1p of all of them, so Spearman-Brown is
approximate: measured on log-normal rates at 0.5 to 50 counts a spot, 300 spots, the median ceiling
is off by -0.02 to +0.04, most where depth varies and a gene has about 3 counts. (3) Spots differ in
depth, and a target that still depends on it finds its halves alike for that reason: with
`log_counts` most of the ceiling is library size. The partial ceiling, each half corrected for its
own total, is the one to set goals by; it goes with the partial PCC.

Shape letters: N spots, G genes, K thinnings.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse, stats

from brstnet import metrics

ToUnits = Callable[[sparse.csr_matrix, np.ndarray], Any]
"""Raw counts (N, G) and the spots' totals (N,) to target units (N, G), column by column; such as
`functools.partial(transform, target=..., median_total=...)` of `brstnet.training.fitted`."""

CHANCE = 0.05
"""A gene's halves agree beyond chance at this one-sided level."""
JUDGED_SHARE = 0.25
"""A section is too shallow if no larger a share of its varying genes agrees beyond chance."""
MIN_SPOTS = 5
"""A gene with counts in fewer spots is not judged: its halves agree on one spot, perhaps."""
GENES_AT_ONCE = 512
"""Genes that are dense in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The ceiling of each gene of one section, from K thinnings; (G,) each.

    Attributes:
        spots: how many there are.
        thinnings: K.
        half_G: correlation of the halves, mean of the thinnings; NaN where most are not defined.
        spread_G: its standard deviation over the thinnings.
        ceiling_G: best PCC; NaN where the halves are not correlated at all, or not defined.
    """

    spots: int
    thinnings: int
    half_G: np.ndarray
    spread_G: np.ndarray
    ceiling_G: np.ndarray

    @property
    def chance(self) -> float:
        """What `half_G` exceeds in 5 % of the genes without signal; see `chance_limit`."""
        return chance_limit(self.spots, self.thinnings)

    @property
    def judged_G(self) -> np.ndarray:
        """Genes whose halves agree beyond chance: only these have a share of the ceiling."""
        judged: np.ndarray = np.nan_to_num(self.half_G, nan=-1.0) > self.chance
        return judged

    @property
    def median_ceiling(self) -> float:
        """Over the genes that vary. Negative reliability is 0 here: left out, it would flatter."""
        varying = ~np.isnan(self.half_G)
        return metrics.nanmedian(np.nan_to_num(self.ceiling_G)[varying])

    @property
    def counts(self) -> dict[str, int]:
        """Genes in all, judged, with negative and with undefined reliability."""
        undefined = np.isnan(self.half_G)
        return {
            "genes": len(self.half_G),
            "judged": int(self.judged_G.sum()),
            "negative": int((np.isnan(self.ceiling_G) & ~undefined).sum()),
            "undefined": int(undefined.sum()),
        }

    @property
    def too_shallow(self) -> str:
        """Why the section cannot be judged; empty if it can.

        The rule: at most a quarter of the genes that vary have halves that agree beyond the chance
        of 1 in 20. At a quarter, a fifth of those would be there by chance. A quarter, and not the
        median gene, since many genes may follow nothing in a section that is deep enough. It is the
        agreement that is looked at, not the spread over thinnings, which does not know how few
        spots there are (without signal it is half of the variance), nor the counts, which are many
        or few only beside the number of spots and the strength of the signal. A section where
        nothing varies cannot be told from a shallow one, nor can a model be judged on it.
        """
        found, varying = self.counts, int((~np.isnan(self.half_G)).sum())
        if varying and found["judged"] > JUDGED_SHARE * varying:
            return ""
        return (
            f"halves of the counts agree beyond chance (r > {self.chance:.2f}, {self.spots} spots) "
            f"in {found['judged']} of {varying} genes, and more than {100 * JUDGED_SHARE:g} % are "
            "needed"
        )


@dataclass(frozen=True, kw_only=True)
class SectionCeiling:
    """Both ceilings of a section, and what its depth was.

    Attributes:
        plain: of the PCC.
        partial: of the partial PCC given the log total.
        median_total: counts of the median spot, over all genes.
        median_gene_count: mean count a spot of the median gene.
    """

    plain: Ceiling
    partial: Ceiling
    median_total: float
    median_gene_count: float

    def scores(self) -> dict[str, np.ndarray]:
        """By name, (G,) each: rows for `tables.tidy`."""
        return {
            "ceiling": self.plain.ceiling_G,
            "ceiling_partial": self.partial.ceiling_G,
            "half_pcc": self.plain.half_G,
            "half_partial_pcc": self.partial.half_G,
        }


@dataclass(frozen=True, kw_only=True)
class Share:
    """A score beside its ceiling, over the genes that can be judged.

    Attributes:
        share_G: PCC over ceiling; NaN where the gene cannot be judged. Not clipped: noise can put
            it above 1.
        genes: how many can.
        median_pcc: over these genes.
        median_ceiling: over these genes.
        share: the ratio of the medians, which one gene with a low ceiling cannot upset.
    """

    share_G: np.ndarray
    genes: int
    median_pcc: float
    median_ceiling: float
    share: float


def noise_ceiling(
    counts_NG: sparse.csr_matrix,
    totals_N: np.ndarray,
    to_units: ToUnits,
    *,
    thinnings: int = 10,
    seed: int = 0,
) -> SectionCeiling:
    """Ceiling of each gene on one section, plain and given depth.

    Each half is put into target units by its own total. Genes that were left out of `counts_NG` are
    thinned as one, through the totals. A spot of which a half is empty is left out of that
    thinning. A gene that is constant, or that fewer than 5 spots have, is NaN and counted.

    Args:
        counts_NG: raw counts of the genes that are scored.
        totals_N: each spot's total over all genes.
        to_units: what makes the target of raw counts.
        thinnings: over how many the correlation is averaged, before anything is made of it.
        seed: of the thinning.

    Raises:
        ValueError: counts are no whole numbers, or totals are smaller than their counts.
    """
    counts_NG, totals_N = _checked(counts_NG, totals_N)
    rng = np.random.default_rng(seed)
    each = [_halves_agree(*thin(counts_NG, totals_N, rng), to_units) for _ in range(thinnings)]
    means_G = np.asarray(counts_NG.mean(axis=0)).ravel()
    rare_G = counts_NG.getnnz(axis=0) < MIN_SPOTS
    plain, partial = (
        ceiling_of(np.where(rare_G, np.nan, r_KG), len(totals_N))
        for r_KG in zip(*each, strict=True)
    )
    return SectionCeiling(
        plain=plain,
        partial=partial,
        median_total=float(np.median(totals_N)),
        median_gene_count=float(np.median(means_G)),
    )


def ceiling_of(r_KG: np.ndarray, spots: int) -> Ceiling:
    """Correlations of halves (K, G) to the ceiling: mean, Spearman-Brown, square root.

    The mean comes first: reliabilities of single thinnings are often negative, and what is left out
    before a mean makes it too high.
    """
    known_G = (~np.isnan(r_KG)).sum(axis=0)
    often_G = 2 * known_G > len(r_KG)
    total_G = np.where(np.isnan(r_KG), 0, r_KG).sum(axis=0)
    half_G = np.where(often_G, total_G / np.maximum(known_G, 1), np.nan)
    apart_KG = np.where(np.isnan(r_KG), 0, r_KG - half_G)
    spread_G = np.sqrt((apart_KG**2).sum(axis=0) / np.maximum(known_G - 1, 1))
    return Ceiling(
        spots=spots,
        thinnings=len(r_KG),
        half_G=half_G,
        spread_G=np.where(often_G & (known_G > 1), spread_G, np.nan),
        ceiling_G=np.sqrt(spearman_brown(half_G)),
    )


def spearman_brown(half: np.ndarray) -> np.ndarray:
    """Reliability of the whole from the correlation of its halves; NaN where that is negative."""
    half = np.where(half < 0, np.nan, half)
    return 2 * half / (1 + half)


def chance_limit(spots: int, thinnings: int) -> float:
    """Upper 5 % point of the mean correlation of halves that share nothing.

    One thinning of N spots has a variance of 1 / (N - 1). Half of that goes with the counts and
    half with the thinning, whatever the mean count m: the mean over all thinnings is that of
    (V - m) / (V + m) with V the counts' variance, and V - m has the variance 2 m^2 / (N - 1) if the
    counts are Poisson. So K thinnings leave (1 + 1/K) / (2 (N - 1)).
    """
    variance = (1 + 1 / thinnings) / (2 * max(spots - 1, 1))
    return float(stats.norm.isf(CHANCE) * np.sqrt(variance))


def share_of_ceiling(pcc_G: np.ndarray, ceiling: Ceiling) -> Share:
    """A model's PCC (G,) on a section as a share of its ceiling, over the genes that can be judged.

    Those were chosen for halves that agree, so their ceilings are a little high, and the share a
    little low.
    """
    use_G = ceiling.judged_G & ~np.isnan(pcc_G)
    share_G = np.full(len(pcc_G), np.nan)
    share_G[use_G] = pcc_G[use_G] / ceiling.ceiling_G[use_G]
    median_pcc = metrics.nanmedian(pcc_G[use_G])
    median_ceiling = metrics.nanmedian(ceiling.ceiling_G[use_G])
    return Share(
        share_G=share_G,
        genes=int(use_G.sum()),
        median_pcc=median_pcc,
        median_ceiling=median_ceiling,
        share=median_pcc / median_ceiling,
    )


def shallow_sections(ceilings: Mapping[str, SectionCeiling], *, partial: bool = False) -> list[str]:
    """The sections that cannot be judged, one line each: name, depth and why."""
    named = []
    for name, found in ceilings.items():
        why = (found.partial if partial else found.plain).too_shallow
        if why:
            depth = f"{found.median_total:g} counts in the median spot"
            named.append(f"{name}: too shallow to judge ({depth}): {why}")
    return named


def thin(
    counts_NG: sparse.csr_matrix, totals_N: np.ndarray, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Two halves of the counts, (N, G) each, and the total of each, (N,).

    What the totals have beyond these genes is thinned as one count, which has the same
    distribution as if it were thinned gene by gene.
    """
    first = rng.binomial(counts_NG.data, 0.5)
    a, b = counts_NG.copy(), counts_NG.copy()
    a.data, b.data = first, counts_NG.data - first
    rest_N = totals_N - _row_sums(counts_NG)
    rest_a_N = rng.binomial(rest_N, 0.5)
    return a, b, _row_sums(a) + rest_a_N, _row_sums(b) + rest_N - rest_a_N


def _row_sums(counts_NG: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(counts_NG.sum(axis=1)).ravel()


def _checked(
    counts_NG: sparse.csr_matrix, totals_N: np.ndarray
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Counts and totals as whole numbers."""
    counts_NG = sparse.csr_matrix(counts_NG)
    whole = counts_NG.data.astype(np.int64)
    if (whole != counts_NG.data).any() or (whole < 0).any():
        raise ValueError("only raw counts can be thinned: whole numbers, not negative")
    counts_NG = sparse.csr_matrix(
        (whole, counts_NG.indices, counts_NG.indptr), shape=counts_NG.shape
    )
    counts_NG.eliminate_zeros()
    totals_N = np.rint(np.asarray(totals_N, np.float64)).astype(np.int64)
    if totals_N.shape != (counts_NG.shape[0],):
        raise ValueError(
            f"there must be one total a spot ({counts_NG.shape[0]}), got {totals_N.shape}"
        )
    if short := int((totals_N < _row_sums(counts_NG)).sum()):
        raise ValueError(
            f"{short} spots have a total below the sum of their counts: give the total over all "
            "genes, of raw counts"
        )
    return counts_NG, totals_N


def _halves_agree(
    a: sparse.csr_matrix,
    b: sparse.csr_matrix,
    total_a_N: np.ndarray,
    total_b_N: np.ndarray,
    to_units: ToUnits,
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of two halves in target units, plain and given depth, (G,) each."""
    full = (total_a_N > 0) & (total_b_N > 0)
    if full.sum() < 3:
        return np.full(a.shape[1], np.nan), np.full(a.shape[1], np.nan)
    sides = [(a[full].tocsc(), total_a_N[full]), (b[full].tocsc(), total_b_N[full])]
    plain, partial = [], []
    for columns in _blocks(a.shape[1]):
        dense = [_dense(to_units(half[:, columns].tocsr(), total)) for half, total in sides]
        plain.append(metrics.pearson(*dense))
        left = [metrics.residual(d, np.log1p(t)) for d, (_, t) in zip(dense, sides, strict=True)]
        r_G = metrics.pearson(*left)
        partial.append(np.where(np.isnan(plain[-1]), np.nan, r_G))
    return np.concatenate(plain), np.concatenate(partial)


def _blocks(genes: int) -> Iterator[slice]:
    return (slice(i, i + GENES_AT_ONCE) for i in range(0, genes, GENES_AT_ONCE))


def _dense(units_NG: Any) -> np.ndarray:
    return np.asarray(units_NG.toarray() if sparse.issparse(units_NG) else units_NG, np.float64)
