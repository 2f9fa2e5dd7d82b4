"""Dictionaries that nobody trained: what a sparse autoencoder has to beat, with the same interface.

Each reads a row as components, linear or not. A component of either sign gives two features, one per sign, so that codes
are positive; of a row's features the k that weigh most in the reconstruction are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .base import SAE
from .codes import SparseCodes, from_dense
from .errors import ConfigError
from .geometry import unit_rows

Coder = Callable[[Tensor], Tensor]
"""Centred rows [batch, d_in] to components [batch, components]."""

MAX_ITERATIONS = 200
"""Of scikit-learn's iterations: enough for a baseline, which need not converge to the last digit."""

PASSES = 20
"""Of scikit-learn's methods that take the rows in small batches, over all rows."""


@dataclass(frozen=True)
class Product:
    """The linear coder x Wᵀ."""

    W: Float[Tensor, "components d_in"]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the components of centred rows."""
        return x @ self.W.T


class Baseline:
    """A dictionary of fixed directions.

    Parameters
    ----------
    mean
        What is subtracted before reading and added after writing.
    directions
        One row per component.
    coder
        Gives the components of centred rows.
    k
        Features kept per row.
    signed
        Whether components take both signs; then there are two features per component, 2i and 2i + 1.

    Attributes
    ----------
    W_dec : Float[Tensor, "d_sae d_in"]
        Write directions, not of unit length.
    b_dec : Float[Tensor, "d_in"]
        The mean.
    norms : Float[Tensor, "components"]
        Lengths of the directions.
    """

    folded = True

    def __init__(
        self,
        mean: Float[Tensor, "d_in"],
        directions: Float[Tensor, "components d_in"],
        coder: Coder,
        *,
        k: int,
        signed: bool = True,
    ) -> None:
        self.b_dec, self.coder, self.k, self.signed = mean, coder, k, signed
        both = torch.stack([directions, -directions], 1).flatten(0, 1) if signed else directions
        self.W_dec = both.contiguous()
        self.norms = torch.linalg.vector_norm(directions, dim=1)
        self.d_sae, self.d_in = self.W_dec.shape

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Return the k features of each row with the largest |z_j| |W_dec[j]|."""
        parts = self.coder(x - self.b_dec)
        sizes = parts.abs() if self.signed else parts.clamp(min=0)
        if self.k < sizes.shape[1]:
            kept = (sizes * self.norms).topk(self.k, dim=1, sorted=False).indices
            sizes = torch.zeros_like(sizes).scatter(1, kept, sizes.gather(1, kept))
        if not self.signed:
            return from_dense(sizes)
        negative = parts < 0
        return from_dense(torch.stack([sizes * ~negative, sizes * negative], 2).flatten(1))

    def decode(self, codes: SparseCodes) -> Float[Tensor, "batch d_in"]:
        """Return Z W_dec + mean."""
        return codes.to_dense(self.d_sae) @ self.W_dec + self.b_dec


def neurons(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read the coordinates themselves, as deviations from their means; `components` is d_in in any case."""
    return _linear(x, torch.eye(x.shape[1]), k=k)


def random_directions(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read projections on directions drawn uniformly from the sphere.

    Matching pursuit, `k` steps of it, decides which of them to use and how much of each: with more directions
    than dimensions projections alone would write the same thing many times.
    """
    D = unit_rows(components, x.shape[1], generator=torch.Generator().manual_seed(seed))
    return Baseline(x.mean(0), D, _pursuit(D, k), k=k)


def pca(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read the principal components, at most d_in of them."""
    centred = (x - x.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return _linear(x, vectors.T.flip(0)[:components].to(x.dtype), k=k)


def ica(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read the independent components that scikit-learn's FastICA finds, at most d_in of them."""
    from sklearn.decomposition import FastICA

    centred = _centred(x)
    n = min(components, int(np.linalg.matrix_rank(centred)))
    model = FastICA(n, whiten="unit-variance", max_iter=MAX_ITERATIONS, random_state=seed, tol=1e-3)
    _quietly(lambda: model.fit(centred))
    return Baseline(x.mean(0), _tensor(model.mixing_.T, x), Product(_tensor(model.components_, x)), k=k)


def sparse_pca(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read components with few non-zero coordinates, from scikit-learn's MiniBatchSparsePCA, at most d_in."""
    from sklearn.decomposition import MiniBatchSparsePCA

    scale = _scale(x)
    model = MiniBatchSparsePCA(
        min(components, x.shape[1]), alpha=1, max_iter=PASSES, batch_size=256, random_state=seed
    )
    _quietly(lambda: model.fit(_centred(x) / scale))
    D = model.components_[np.linalg.norm(model.components_, axis=1) > 0]
    # the components that reconstruct best: those of a row are not orthogonal
    read = np.linalg.solve(D @ D.T + 1e-6 * np.eye(len(D)), D)
    return Baseline(x.mean(0), _tensor(D, x), Product(_tensor(read, x)), k=k)


def dictionary_learning(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read by orthogonal matching pursuit over atoms that scikit-learn's MiniBatchDictionaryLearning finds."""
    from sklearn.decomposition import MiniBatchDictionaryLearning, sparse_encode

    scale = _scale(x)
    model = MiniBatchDictionaryLearning(
        components,
        alpha=1,
        max_iter=PASSES,
        batch_size=256,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        random_state=seed,
    )
    _quietly(lambda: model.fit(_centred(x) / scale))
    atoms = np.ascontiguousarray(model.components_, dtype=np.float64)

    def code(rows: Tensor) -> Tensor:
        given = rows.cpu().double().numpy()
        return _tensor(sparse_encode(given, atoms, algorithm="omp", n_nonzero_coefs=min(k, len(atoms))), rows)

    return Baseline(x.mean(0), _tensor(atoms, x), code, k=k)


def nmf(x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int) -> Baseline:
    """Read the parts of scikit-learn's NMF of [max(x - mean, 0), max(mean - x, 0)], at most 2 d_in of them.

    Splitting by sign makes any data non-negative and favours no coordinate, where a shift would let the
    smallest value ever seen decide. What a part writes is its first half minus its second.
    """
    from sklearn.decomposition import MiniBatchNMF, sparse_encode

    scale, d_in = _scale(x), x.shape[1]
    model = MiniBatchNMF(
        min(components, 2 * d_in), init="nndsvda", batch_size=1024, max_iter=MAX_ITERATIONS, random_state=seed
    )
    _quietly(lambda: model.fit(_by_sign(_centred(x) / scale)))
    parts = model.components_

    def code(rows: Tensor) -> Tensor:
        # their own transform stops for all rows of a batch together, so that a row's code would depend on the others
        split = _by_sign(rows.cpu().double().numpy() / scale)
        z = _quietly(
            lambda: sparse_encode(
                split, parts, algorithm="lasso_cd", alpha=1e-4, positive=True, max_iter=MAX_ITERATIONS
            )
        )
        return _tensor(z * scale, rows)

    return Baseline(x.mean(0), _tensor(parts[:, :d_in] - parts[:, d_in:], x), code, k=k, signed=False)


BASELINES: dict[str, Callable[..., Baseline]] = {
    "neurons": neurons,
    "random_directions": random_directions,
    "pca": pca,
    "ica": ica,
    "sparse_pca": sparse_pca,
    "dictionary_learning": dictionary_learning,
    "nmf": nmf,
}
"""By name, the cheap ones first."""


def fit_baseline(
    name: str, x: Float[Tensor, "rows d_in"], components: int, *, k: int, seed: int = 0
) -> Baseline:
    """Fit a baseline to rows.

    Parameters
    ----------
    name
        One of `BASELINES`.
    x
        A sample of raw activations; a few thousand rows per dimension are plenty.
    components
        How many directions, as far as the method can give so many; signed ones give two features each.
    k
        Features kept per row.
    seed
        Of methods that draw.

    Raises
    ------
    ConfigError
        No baseline of that name, or a number that is not positive.
    """
    if name not in BASELINES:
        raise ConfigError("unknown baseline", got=repr(name), expected=", ".join(BASELINES))
    if components < 1 or k < 1:
        raise ConfigError("a baseline needs components and k above 0", got=f"{components} and {k}")
    return BASELINES[name](x, components, k=k, seed=seed)


def as_topk(baseline: Baseline) -> SAE:
    """Return a linear baseline as the TopK dictionary that gives the same reconstructions, to save and to label.

    Its rows have unit length: codes are those of the baseline times the lengths of its directions.

    Raises
    ------
    ConfigError
        The baseline reads otherwise than by one product.
    """
    from .exports.plain import build

    if not isinstance(baseline.coder, Product) or not baseline.signed:
        raise ConfigError(
            "this baseline is no TopK dictionary",
            expected="neurons, pca, ica or sparse_pca, which are linear",
        )
    read = torch.stack([baseline.coder.W, -baseline.coder.W], 1).flatten(0, 1)
    norms = torch.linalg.vector_norm(baseline.W_dec, dim=1, keepdim=True)
    state = {
        "W_enc": read * norms,
        "b_enc": torch.zeros(baseline.d_sae),
        "W_dec": baseline.W_dec / norms,
        "b_dec": baseline.b_dec,
    }
    return build("topk", state, k=baseline.k, where=Path("baseline"))


def _linear(x: Tensor, directions: Tensor, *, k: int) -> Baseline:
    """Read and write along orthonormal directions."""
    return Baseline(x.mean(0), directions, Product(directions), k=k)


def _pursuit(D: Tensor, steps: int) -> Coder:
    """Return matching pursuit over unit rows: each step takes the direction that explains most of what is left."""

    def code(x: Tensor) -> Tensor:
        z, rest = x.new_zeros(len(x), len(D)), x
        for _ in range(steps):
            along = rest @ D.T
            best = along.abs().argmax(1, keepdim=True)
            size = along.gather(1, best)
            z = z.scatter_add(1, best, size)
            rest = rest - size * D[best[:, 0]]
        return z

    return code


def _centred(x: Tensor) -> np.ndarray:
    centred: np.ndarray = (x - x.mean(0)).cpu().double().numpy()
    return centred


def _scale(x: Tensor) -> float:
    """Return the root of the mean variance: penalties of scikit-learn are in units of the data."""
    return max(float((x - x.mean(0)).double().square().mean().sqrt()), 1e-12)


def _by_sign(centred: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(centred, 0), np.maximum(-centred, 0)], axis=1)


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)


def _quietly(work: Callable[[], Any]) -> Any:
    """Call scikit-learn; that it has not converged in so many steps is expected and no news."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return work()
