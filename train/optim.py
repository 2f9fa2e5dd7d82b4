"""The optimiser: one fused pass of Adam over fp32 parameters."""

from __future__ import annotations

import torch

from sae.base import SAE

BETAS = (0.9, 0.999)
EPSILON = 6.25e-10
"""As in arXiv 2406.04093: gradients of rarely active features come near the usual 1e-8."""


def make_adam(sae: SAE) -> torch.optim.Adam:
    """Return Adam over the dictionary's parameters; each step sets the rate."""
    return torch.optim.Adam(sae.parameters(), lr=0.0, betas=BETAS, eps=EPSILON, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimiser.param_groups:
        group["lr"] = lr
