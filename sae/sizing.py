"""How many features a dictionary of some rows needs, and how many of them a row: a suggestion from a sample."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

FEATURES_PER_DIRECTION = 1.75
"""Independent directions that fire at unlike rates count for less than one each; fitted, see docs/benchmarks.md."""

FEATURES_PER_COMPONENT = 8
"""Features for each of a row's k where principal components decide; fitted, see docs/benchmarks.md."""

HELD = 0.9
"""Share of the variance in as many principal components as a row has active features; fitted likewise."""

SPARSE = 0.25
"""Most active features of a row that are a sparse code, as a share of d_in, and of all directions by fourth moments."""

USUAL_K, USUAL_SHARE, USUAL_EXPANSION = 32, 1 / 8, 8
"""Where rows tell no sparse code: the k of Gao et al. 2024 (arXiv 2406.04093) or, of few dimensions, a share of these, and
the expansion that is most common in published dictionaries."""

CLOUD = 0.5
"""Most directions, as a share of those that rows of one shape and varying norms pretend to, at which they are believed."""

TOO_FAR = 2
"""Given numbers that are so many times off what a sample supports are worth a word."""

COMPARED_AT_ONCE = 128
"""Rows that are compared with all others at once; the products stay in a CPU's cache."""

MULTIPLE = 64
"""Numbers of features are rounded up to it, so that ranks can share them evenly."""


class Sizes(NamedTuple):
    """What a sample supports.

    Attributes
    ----------
    d_sae, k
        Features, and active ones per row.
    effective_rank
        Participation ratio of the rows' spectrum.
    told_by
        What tells both numbers: fourth moments, where the rows are like sparse sums of independent directions; principal
        components, where few hold most of the variance; or nothing, and they are what is usual.
    """

    d_sae: int
    k: int
    effective_rank: float
    told_by: Literal["fourth moments", "principal components", "nothing"]

    def supports(self, d_sae: int, k: int) -> bool:
        """Return whether a dictionary is not far wider than this, and k neither far above nor far below."""
        if self.told_by == "nothing":
            return True
        return d_sae < TOO_FAR * self.d_sae and self.k < TOO_FAR * k and k < TOO_FAR * self.k


class Directions(NamedTuple):
    """Independent directions that would explain the fourth moments of some rows.

    Attributes
    ----------
    per_row
        Active ones of a row; negative where the norms vary less than those of Gaussian rows.
    total
        How many there are, as a participation ratio; infinite where noise leaves nothing to tell them by.
    cloud
        What `total` is where there are none, and rows of one Gaussian shape merely vary in norm.
    """

    per_row: float
    total: float
    cloud: float


def suggest_sizes(x: Float[Tensor, "rows d_in"]) -> Sizes:
    """Return the d_sae and k that a few thousand rows support.

    If the rows' fourth moments are those of sparse sums of independent directions (see `independent_directions`:
    1 <= per_row <= min(total, d_in) / 4 and total < cloud / 2), k = per_row and d_sae = 1.75 total. A covariance could
    not tell: sums of 5 or of 20 of 768 directions have the same. Otherwise, where at most d_in / 4 principal components,
    and no more than a quarter of the rows have, hold 90% of the variance, k is their number rounded up to a power of
    two, and d_sae = 8 k. These are the least that reconstructs about as well as more does, and say nothing about what
    features mean; docs/benchmarks.md says how they fare. Where the variance is spread over more, no k that is a sparse
    code reconstructs nearly all of it, or the rows are too few to tell, and both are
    what is usual: k = 32, at most d_in / 8, and d_sae = 8 d_in. d_sae is a multiple of 64.
    """
    variances, d_in = spectrum(x), x.shape[1]
    rank = effective_rank(variances)
    per_row, total, cloud = independent_directions(x, variances)
    if 1 <= per_row <= SPARSE * min(total, d_in) and total < CLOUD * cloud:
        features = round_up(math.ceil(FEATURES_PER_DIRECTION * total))
        return Sizes(features, round(per_row), rank, "fourth moments")
    components = principal_components(variances, HELD)
    # few rows have few components whatever they are
    if components <= max(1, SPARSE * min(d_in, len(x) - 1)):
        k = 1 << (components - 1).bit_length()
        return Sizes(round_up(FEATURES_PER_COMPONENT * k), k, rank, "principal components")
    return Sizes(
        round_up(USUAL_EXPANSION * d_in), max(1, min(USUAL_K, int(USUAL_SHARE * d_in))), rank, "nothing"
    )


def round_up(features: int) -> int:
    """Return the next multiple of 64."""
    return MULTIPLE * -(-features // MULTIPLE)


def spectrum(x: Float[Tensor, "rows d_in"]) -> Float64[Tensor, " d_in"]:
    """Return the eigenvalues of the covariance of the rows, largest first."""
    x = x - x.mean(0, dtype=torch.float64)
    variances: Tensor = torch.linalg.eigvalsh(x.T @ x / len(x))
    return variances.clamp(min=0).flip(0)


def effective_rank(variances: Float64[Tensor, " d_in"]) -> float:
    """Return the participation ratio (Σλ)² / Σλ² of a spectrum.

    From 1, where all variance is in one direction, to d_in; NaN where there is none.
    """
    return float(variances.sum().square() / variances.square().sum())


def principal_components(variances: Float64[Tensor, " d_in"], share: float) -> int:
    """Return how many principal components hold a share of the variance; 1 where there is none."""
    return int((variances.cumsum(0) < share * variances.sum()).sum()) + 1


def independent_directions(x: Float[Tensor, "rows d_in"], variances: Float64[Tensor, " d_in"]) -> Directions:
    """Return how many directions there are if x - μ = Σ_i c_i d_i with independent c_i and unit d_i.

    Let κ_i be the fourth cumulant of c_i and Σ the covariance of x. Then Var |x - μ|² = Σ_i κ_i + 2 tr Σ², and the
    fourth cumulant C of x has ‖C‖² = Σ_ij κ_i κ_j (d_i · d_j)⁴, about Σ_i κ_i² where directions are far apart.

        per_row = (tr Σ)² / Σ_i κ_i        total = (Σ_i κ_i)² / ‖C‖²

    A c_i that is a rarely and 0 otherwise has variance p a² and κ_i about p a⁴, so per_row = Σ_i p_i; sizes that vary
    make it smaller by E[a²]² / E[a⁴], commoner ones larger. Time grows with the square of the rows.

    Rows x - μ = s z whose norms vary, z Gaussian and s independent of it, have C = Var(s²) (Σ_ij Σ_kl + Σ_ik Σ_jl +
    Σ_il Σ_jk) if E s² = 1, but no directions. With tr Σ = 1, p = tr Σ² and q = tr Σ⁴, Σ_ij C_iijj = Var(s²) (1 + 2p) and
    ‖C‖² = Var(s²)² (3p² + 6q), whatever the s, so that

        cloud = (1 + 2p)² / (3p² + 6q)

    which is d_in (d_in + 2) / 3 at most. Sums of directions come near it only where these are too many to tell apart.

    ‖C‖² = E (x·y)⁴ - 6 E (x·y)² (x·z)² + 3 (E (x·y)²)² + 6 tr Σ⁴ for independent centred rows x, y, z; E goes over
    pairs and triples of different rows, since a row with itself would add far more than ‖C‖². So are tr Σ² and tr Σ⁴ taken
    from different rows: the spectrum of a sample is wider than that of Σ. Both follow from what cumulants of sums of
    independent variables are (McCullagh 1987, Tensor Methods in Statistics, section 2.4); a participation ratio of them
    as a count of directions is ours.
    """
    n = len(x)
    if n <= 3:
        return Directions(math.inf, math.inf, math.inf)
    x = x - x.mean(0, dtype=torch.float64)
    scale = variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    variances = variances / scale
    norms = x.square().sum(1) / scale
    x = x / scale.sqrt()
    cycles = _sum_over_cycles(x)
    x = x.float()
    pairs = triples = fourth = 0.0
    for start in range(0, n, COMPARED_AT_ONCE):
        squares = (x[start : start + COMPARED_AT_ONCE] @ x.T).square()
        squares.diagonal(start).zero_()
        sums = squares.sum(1, dtype=torch.float64)
        own = squares.square().sum(1, dtype=torch.float64)
        pairs += float(sums.sum())
        fourth += float(own.sum())
        triples += float((sums.square() - own).sum())
        cycles -= float((2 * sums.square() - own).sum())
    pairs, fourth = pairs / (n * (n - 1)), fourth / (n * (n - 1))
    triples /= n * (n - 1) * (n - 2)
    q = cycles / (n * (n - 1) * (n - 2) * (n - 3))
    squared = fourth - 6 * triples + 3 * pairs**2 + 6 * q
    excess = float(norms.var()) - 2 * pairs
    return Directions(
        1 / excess if excess else math.inf,
        excess**2 / squared if squared > 0 else math.inf,
        (1 + 2 * pairs) ** 2 / (3 * pairs**2 + 6 * max(q, 0.0)) if pairs else math.inf,
    )


def _sum_over_cycles(x: Float64[Tensor, "rows d_in"]) -> float:
    """Return Σ (x_i · x_j) (x_j · x_k) (x_k · x_l) (x_l · x_i) over rows of which neighbours differ.

    It is tr (X Xᵀ - N)⁴ with the squared norms N on the diagonal, in products of the size of Σ.
    """
    norms = x.square().sum(1)
    gram = x.T @ x
    images, weighed = x @ gram, (x.T * norms) @ x
    total = (gram @ gram).square().sum() + 2 * weighed.square().sum() - 3 * norms.pow(4).sum()
    total += 4 * (norms.square() * (images * x).sum(1)).sum() - 4 * (norms * images.square().sum(1)).sum()
    return float(total)
