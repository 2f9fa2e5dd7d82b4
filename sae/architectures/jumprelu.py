"""JumpReLU: a learned threshold per feature, and a controller that holds the number of active features."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from sae.base import SAE, Batch, Losses, SAEConfig
from sae.codes import SparseCodes, subset, sums
from sae.jump import jump, step
from sae.losses import global_rows, reconstruction
from sae.world import ALONE, World

BAND = 0.2
"""Bandwidth as a share of sqrt(d_in / k), the size of a code when k of them explain a scaled row."""
SHIFT = 0.02
"""By how much of log(L0 / k) a step moves the logarithm of all thresholds."""
RATE = 0.005
"""By how much of log(L0 / k) a step moves the logarithm of the penalty."""


class JumpReLUConfig(SAEConfig):
    """Features with a threshold of their own; k active ones on average."""

    kind: Literal["jumprelu"] = "jumprelu"
    bandwidth: PositiveFloat | Literal["auto"] = Field("auto")
    """Width around a threshold within which values move it, in units of the scaled input; auto = 0.2 sqrt(d_in / k)."""

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> JumpReLU:
        """Return a freshly initialised JumpReLU dictionary."""
        return JumpReLU(self, d_in, generator=generator, world=world)


class JumpReLU(SAE):
    """z_j = v_j H(v_j - θ_j) for v = (x - b_dec) W_encᵀ + b_enc, with the loss mse + λ L0 / k + aux_alpha · AuxK.

    Values and thresholds learn as in `sae.jump`, from the entries that are active or less than half a bandwidth
    below their threshold. θ itself is the parameter, not its logarithm, and stays at half a bandwidth at
    least, so that the band never reaches negative values.

    After every step, with e = log(L0 / k) of the batch cut to [-1, 1], all thresholds are multiplied by
    exp(0.02 e), which holds L0 at k whatever the learning rate, and λ by exp(0.005 e), until the gradient no
    longer works against that. When training ends, `settle` multiplies all thresholds by the one factor that
    leaves k features active per row.

    Attributes
    ----------
    threshold : Float[Tensor, "d_sae"]
        In units of the input, so folding scales it. It starts where a random direction exceeds it on k rows in
        d_sae, given scaled inputs.
    log_penalty : Float[Tensor, ""]
        log λ.

    References
    ----------
    arXiv 2407.14435, sections 3 and 4. Deviations: thresholds are learned directly, which moves them at the
    pace of the other parameters; L0 is given and λ found rather than the reverse; AuxK revives the dead.
    """

    stackable = True
    mixes_k = True
    threshold: nn.Parameter
    log_penalty: Tensor
    config: JumpReLUConfig

    def __init__(
        self, config: JumpReLUConfig, d_in: int, *, generator: torch.Generator, world: World
    ) -> None:
        super().__init__(config, d_in, generator=generator, world=world)
        rate = min(config.k / config.d_sae, 0.5)
        start = max(NormalDist().inv_cdf(1 - rate), self._bandwidth(config.k) / 2)
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, start))
        penalty = config.k * start**2 / d_in
        self.register_buffer("log_penalty", torch.tensor(math.log(penalty), device=generator.device))

    @property
    def bandwidth(self) -> float | Float[Tensor, "d_sae"]:
        """Width of the band around a threshold, with `auto` resolved; each feature's where members differ."""
        widths = [self._bandwidth(k) for k in self.ks]
        if len(set(widths)) == 1:
            return widths[0]
        return self.threshold.new_tensor(widths).repeat_interleave(self.d_sae // self.members)

    def select(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Keep the entries strictly above their threshold."""
        return self.kernels.select_above(x, W, b, threshold=self.threshold.detach())

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return mean squared error + λ L0 / k + aux_alpha · AuxK."""
        x = batch.x
        near = self._encode(x, self._select_near)
        gates = self.threshold.index_select(0, near.features)
        bandwidth = self.bandwidth
        if isinstance(bandwidth, Tensor):
            bandwidth = bandwidth.index_select(0, near.features)
        z = jump(near.values, gates, bandwidth=bandwidth)
        active = sums(step(near.values, gates, bandwidth=bandwidth), near, self.members)
        x_hat = self.decode(near._replace(values=z))
        error = reconstruction(x, x_hat, world=world, members=self.members)
        l0 = world.feature_sum(active) / (global_rows(x, world) // self.members)
        penalty = self.log_penalty.exp()
        parts = {"mse": error.detach(), "penalty": penalty / world.axes["data"]}
        codes = subset(near._replace(values=z.detach()), ~(z <= 0))
        total = error + penalty * self._share_of_k(l0)
        return self._revive(x, Losses(total, parts, codes, x_hat), dead, world)

    @torch.no_grad()
    def after_step(self, losses: Losses, *, world: World) -> None:
        """Restore unit decoder rows, bring L0 closer to k, and keep thresholds above half the bandwidth."""
        super().after_step(losses, world=world)
        codes = losses.codes
        active = codes.offsets[:: codes.rows // self.members].diff().float().view_as(self.log_penalty)
        l0 = world.all_reduce(active) / (global_rows(losses.x_hat, world) // self.members)
        excess = self._share_of_k(l0).clamp(math.exp(-1), math.e).log()
        self.log_penalty.add_(RATE * excess)
        factors = (SHIFT * excess).exp().view(self.members, 1)
        self.threshold.view(self.members, -1).mul_(factors)
        self.threshold.clamp_(min=self.bandwidth / 2)

    @torch.no_grad()
    def settle(self, batches: Iterable[Tensor], *, world: World) -> None:
        """Multiply all thresholds by the factor that leaves k features active per row of the batches."""
        W, b = self.W_enc / self.threshold[:, None], self.b_enc / self.threshold
        factors = []
        for x in batches:
            codes = self.kernels.select_batch(x - self.b_dec, W, b, k=self.config.k)
            values = torch.cat([codes.values, codes.values.new_full((1,), torch.inf)])
            factors.append(world.all_reduce(values.min(), "min"))
        found = torch.stack(factors)
        found = found[torch.isfinite(found)]
        if len(found):
            self.threshold.mul_(found.mean())

    @torch.no_grad()
    def scale_state_(self, scale: float) -> None:
        """Scale the thresholds."""
        self.threshold.mul_(scale)

    def _bandwidth(self, k: int) -> float:
        if self.config.bandwidth == "auto":
            return BAND * math.sqrt(self.d_in / k)
        return self.config.bandwidth

    def _share_of_k(self, l0: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return l0 / k; of a stack, each member's."""
        return l0 / l0.new_tensor(self.ks).view_as(l0)

    def _select_near(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        lowest = (self.threshold.detach() - self.bandwidth / 2).clamp(min=0)
        return self.kernels.select_above(x, W, b, threshold=lowest)
