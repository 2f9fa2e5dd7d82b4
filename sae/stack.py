"""Several dictionaries of one configuration, but for k, as one, so that a step calls what it computes with once for all."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import SAE, Losses, SAEConfig
from .codes import split


def shape(sae: SAE) -> SAEConfig:
    """Return what dictionaries have to have in common to be stacked: the configuration, of most kinds without k."""
    return sae.config.model_copy(update={"k": 1}) if sae.mixes_k else sae.config


def stack(saes: Sequence[SAE]) -> SAE:
    """Return dictionaries laid end to end: their parameters are those of the stack from now on, seen in part.

    A stack reads the members' batches one after another, [members * batch, d_in]; codes, dead features and
    gradients are numbered through all members, and losses come one for each. A member learns what it learns alone, to
    rounding.

    Parameters
    ----------
    saes
        At least two of one `shape` whose kind is stackable, not folded; each whole, or of each the same shard.
    """
    first = saes[0]
    assert first.stackable
    assert all(shape(s) == shape(first) and s.d_in == first.d_in for s in saes)
    assert not first._non_persistent_buffers_set
    whole = copy.copy(first)
    whole._parameters, whole._buffers = {}, {}
    whole.ks, whole.d_sae = tuple(s.config.k for s in saes), len(saes) * first.d_sae
    for name, value in first.named_parameters():
        joined = nn.Parameter(_join([s.get_parameter(name) for s in saes]), value.requires_grad)
        whole.register_parameter(name, joined)
    for name, _ in first.named_buffers():
        whole.register_buffer(name, _join([s.get_buffer(name) for s in saes]))
    return whole


def unstack_gradients(whole: SAE, saes: Sequence[SAE]) -> None:
    """Let the members' gradients be their parts of the stack's."""
    for name, value in whole.named_parameters():
        if value.grad is not None:
            for sae, part in zip(saes, value.grad.chunk(len(saes)), strict=True):
                sae.get_parameter(name).grad = part


def unstack_losses(whole: SAE, losses: Losses) -> list[Losses]:
    """Return each member's losses, with its own numbers of features."""
    width = whole.d_sae // whole.members
    shares = zip(split(losses.codes, whole.members), losses.x_hat.chunk(whole.members), strict=True)
    return [
        Losses(
            losses.total[m],
            {name: part[m] for name, part in losses.parts.items()},
            codes._replace(features=codes.features - m * width),
            x_hat,
        )
        for m, (codes, x_hat) in enumerate(shares)
    ]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors end to end in new memory, scalars as a vector, and let each be its part of it."""
    joined = torch.cat([part.detach().reshape(-1, *part.shape[1:]) for part in parts])
    for part, own in zip(parts, joined.chunk(len(parts)), strict=True):
        part.data = own.view_as(part)
    return joined
