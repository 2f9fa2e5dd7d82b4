"""Every kernel in plain dense torch: short enough to be believed, and what the others are compared to."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes, from_dense

from . import EachK
from .explanation import Explanation


class ReferenceKernels:
    """The oracle: holds the whole `[batch, d_sae]` and sorts it. See `Kernels` for the contract."""

    def select_rows(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row of x Wᵀ + b."""
        assert isinstance(k, int)
        pre = x @ W.T + b
        kept = pre.argsort(dim=1, descending=True, stable=True)[:, :k]
        return from_dense(torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept)))

    def select_largest(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k largest entries of each row of x Wᵀ + b, whatever their sign."""
        pre = x @ W.T + b
        features = pre.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
        offsets = torch.arange(len(x) + 1, device=x.device) * features.shape[1]
        return SparseCodes(pre.gather(1, features).flatten(), features.flatten(), offsets)

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries of x Wᵀ + b, over all rows together."""
        assert isinstance(k, int)
        pre = x @ W.T + b
        kept = pre.flatten().argsort(descending=True, stable=True)[: k * len(pre)]
        mask = torch.zeros_like(pre, dtype=torch.bool).flatten().scatter(0, kept, value=True)
        return from_dense(torch.where(mask.view_as(pre), pre, 0))

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Keep the entries of x Wᵀ + b strictly above a threshold >= 0: one for all or one per feature."""
        pre = x @ W.T + b
        return from_dense(torch.where(pre <= threshold, 0, pre))

    def decode(self, codes: SparseCodes, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return Z W for the codes Z."""
        return codes.to_dense(len(W)) @ W

    def value_gradients(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] for every code: the gradient of Z W with respect to the values of Z."""
        return (g @ W.T)[codes.row_ids(), codes.features]

    def weight_gradient(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], d_sae: int
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return Zᵀ g: the gradient of Z W with respect to W."""
        return codes.to_dense(d_sae).T @ g

    def explain(
        self,
        x: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        weights: tuple[Tensor, Tensor, Tensor],
        *,
        k: int,
    ) -> Explanation:
        """Explain a residual by the k largest entries of each row of x W_encᵀ + b_enc, whatever their sign."""
        W_enc, b_enc, W_dec = weights
        codes = self.select_largest(x, W_enc, b_enc, k=k)
        z = codes.to_dense(len(W_enc))
        difference = z @ W_dec - residual
        chosen = codes._replace(values=torch.ones_like(codes.values)).to_dense(len(W_enc))
        g = 2 * (difference @ W_dec.T) * chosen
        return Explanation(difference.square().sum(), g.T @ x, g.sum(0), 2 * z.T @ difference)
