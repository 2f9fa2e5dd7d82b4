"""The geometry of a dictionary: unit rows, gradients tangent to them, where it starts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 512
"""Rows per chunk of the in-place passes: a chunk and its gradient stay in the cache."""

DRAWN_AT_ONCE = 2**24
"""Entries of the initial directions that are drawn at once (64 MiB)."""


def unit_rows(
    rows: int, d_in: int, *, generator: torch.Generator, part: range | None = None
) -> Float[Tensor, "part d_in"]:
    """Return directions drawn uniformly from the sphere.

    With `part`, only those of the rows: they have the same bits, and the others are drawn and forgotten some at a
    time, so that a shard never holds much more than itself.
    """
    part = range(rows) if part is None else part
    W = torch.empty(len(part), d_in, device=generator.device)
    at_once = max(1, DRAWN_AT_ONCE // d_in)
    for first in range(0, part.stop, at_once):
        drawn = torch.randn(min(at_once, rows - first), d_in, generator=generator, device=generator.device)
        low, high = max(first, part.start), min(first + len(drawn), part.stop)
        if low < high:
            kept = drawn[low - first : high - first]
            W[low - part.start : high - part.start] = kept / torch.linalg.vector_norm(
                kept, dim=1, keepdim=True
            )
    return W


def unit_directions(W: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
    """Return the rows of W scaled to norm 1, in float64 on the CPU, detached; a zero row stays zero."""
    W = W.detach().cpu().double()
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W / norms.clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def normalise_rows_(W: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale every row of W to norm 1, in place; a zero row stays zero."""
    norms = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    W.div_(norms.clamp(min=torch.finfo(W.dtype).tiny))


@torch.no_grad()
def project_rows_(g: Float[Tensor, "d_sae d_in"], W: Float[Tensor, "d_sae d_in"]) -> None:
    """Take out of each row of the gradient g its part along the unit row of W: g ← g - (g·w) w, in place."""
    for start in range(0, len(g), ROWS_AT_ONCE):
        gradient, direction = g[start : start + ROWS_AT_ONCE], W[start : start + ROWS_AT_ONCE]
        along = torch.linalg.vecdot(gradient, direction).unsqueeze(1)
        gradient.addcmul_(along, direction, value=-1)


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "rows d_in"], *, steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, "d_in"]:
    """Return the point with the least summed distance to the rows, by Weiszfeld's iteration in float64.

    Parameters
    ----------
    x
        The rows; a few thousand are enough.
    steps, tolerance
        At most so many iterations, or until the point moves by less than this share of the rows' spread.
    """
    points = x.double()
    median = points.mean(0)
    spread = torch.linalg.vector_norm(points - median, dim=1).mean()
    if spread == 0:
        return median.to(x.dtype)
    for _ in range(steps):
        distances = torch.linalg.vector_norm(points - median, dim=1).clamp(min=1e-12 * float(spread))
        weights = 1 / distances
        moved = (weights @ points) / weights.sum()
        done = torch.linalg.vector_norm(moved - median) < tolerance * spread
        median = moved
        if done:
            break
    return median.to(x.dtype)
