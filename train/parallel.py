"""What the ranks of a mesh owe each other in a step: gradients summed, norms of all, the whole dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sae.base import SAE
from sae.world import World

TOGETHER = 2**16
"""Gradients of fewer entries travel in one message."""

ROWS_AT_ONCE = 4096
"""Rows of a matrix that are gathered at once, so that no rank but one ever holds the whole."""


@torch.no_grad()
def sum_gradients_(sae: SAE, loss: Tensor, world: World) -> Tensor:
    """Sum every gradient along `data`, in place, and return the sum of the ranks' losses.

    A parameter that got no gradient takes part with zeros.
    """
    total = loss.detach().clone().view(-1)
    small = [total]
    for _, parameter in _trained(sae):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.numel() >= TOGETHER:
            world.sum_(parameter.grad, axis="data")
        else:
            small.append(parameter.grad)
    if world.axes["data"] == 1:
        return total
    message = torch.cat([part.flatten() for part in small])
    world.sum_(message, axis="data")
    for part, summed in zip(small, torch.split(message, [g.numel() for g in small]), strict=True):
        part.copy_(summed.view_as(part))
    return total


@torch.no_grad()
def clip_gradients_(saes: Sequence[SAE], limit: float | None, world: World) -> None:
    """Scale all gradients of a dictionary down together where their norm over all shards exceeds `limit`, in place.

    Each of several dictionaries by itself, and all by one collective.
    """
    if limit is None:
        return
    own, shared = torch.zeros(2, len(saes), dtype=torch.float64, device=world.device)
    for number, sae in enumerate(saes):
        sharded = sae.per_feature()
        for name, gradient in _gradients(sae):
            (own if name in sharded else shared)[number] += gradient.double().square().sum()
    norms = (world.all_reduce(own, axis="feature") + shared).sqrt()
    for sae, norm in zip(saes, norms, strict=True):
        for _, gradient in _gradients(sae):
            gradient.mul_((limit / norm.clamp(min=limit)).to(gradient.dtype))


@torch.no_grad()
def gather_whole(sae: SAE, world: World) -> SAE | None:
    """Return the dictionary with the features of all shards, on the CPU, on the main rank; elsewhere None."""
    sharded = sae.per_feature()
    tensors: dict[str, Tensor] = {}
    for name, value in sae.state_dict().items():
        if name not in sharded:
            tensors[name] = value.detach().cpu().clone()
            continue
        if world.is_main:
            tensors[name] = torch.empty((sae.config.d_sae, *value.shape[1:]), dtype=value.dtype)
        for start in range(0, sae.d_sae, ROWS_AT_ONCE):
            rows = value[start : start + ROWS_AT_ONCE]
            for shard, part in enumerate(world.stack(rows, axis="feature")):
                if world.is_main:
                    tensors[name][shard * sae.d_sae + start :][: len(part)].copy_(part)
    if not world.is_main:
        return None
    whole = sae.config.build(sae.d_in, generator=torch.Generator())
    whole.load_state_dict(tensors, assign=True)
    return whole


def _trained(sae: SAE) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in sae.named_parameters() if value.requires_grad]


def _gradients(sae: SAE) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(sae):
        assert parameter.grad is not None
        yield name, parameter.grad
