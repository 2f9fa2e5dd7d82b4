"""From a dictionary of scaled activations to one of raw activations."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from .base import SAE
from .errors import CheckpointError


def fold(sae: SAE, mean: Float[Tensor, "d_in"], scale: float) -> SAE:
    """Return the dictionary that does on x what `sae` does on x' = (x - mean) / scale.

    b_dec ← s b_dec + mean, b_enc ← s b_enc, threshold ← s threshold; both matrices stay. Its codes are
    those of `sae` times s, for the same features, up to rounding; `decode` returns raw activations.

    Parameters
    ----------
    sae
        Left as it is.
    mean, scale
        Mean and scale of the activations it was trained on.

    Raises
    ------
    CheckpointError
        The dictionary is folded already, or the scale is not a positive number.
    """
    return fold_(copy.deepcopy(sae), mean, scale)


@torch.no_grad()
def fold_(sae: SAE, mean: Float[Tensor, "d_in"], scale: float) -> SAE:
    """Do what `fold` does in place, and return the dictionary."""
    if sae.folded:
        raise CheckpointError("the dictionary is folded already", do="fold the one that training left, once")
    if not 0 < scale < float("inf"):
        raise CheckpointError("cannot fold by this scale", got=str(scale), expected="a positive number")
    sae.b_dec.data = (scale * sae.b_dec.double() + mean.to(sae.b_dec.device).double()).to(sae.b_dec.dtype)
    sae.b_enc.data = (scale * sae.b_enc.double()).to(sae.b_enc.dtype)
    sae.scale_state_(scale)
    sae.folded = True
    return sae
