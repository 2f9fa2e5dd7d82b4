"""Collectives through which gradients flow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .world import World


class DataGather(torch.autograd.Function):
    """Rows of all ranks along `data`; what each rank's copy is worth is summed for the rank they come from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: World) -> Tensor:
        """Gather."""
        parts = world.all_gather(value, axis="data")
        start = sum(len(part) for part in parts[: world.coordinate("data")])
        ctx.world, ctx.own = world, slice(start, start + len(value))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Sum over the ranks, and keep this one's rows."""
        return ctx.world.all_reduce(gradients[0], axis="data")[ctx.own], None


class FeatureSum(torch.autograd.Function):
    """The sum of the shards' parts; each part is worth what the sum is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: World) -> Tensor:
        """Sum."""
        return world.all_reduce(value, axis="feature")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Pass on."""
        return gradients[0], None


class FeatureShared(torch.autograd.Function):
    """What all shards hold; it is worth what all of them make of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: World) -> Tensor:
        """Pass on."""
        ctx.world = world
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Sum."""
        return ctx.world.all_reduce(gradients[0], axis="feature"), None
