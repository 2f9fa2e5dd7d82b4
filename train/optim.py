"""The optimiser: one fused pass of Adam over fp32 parameters."""

from __future__ import annotations

import time

import torch

from sae.base import SAE

BETAS = (0.9, 0.999)
EPSILON = 6.25e-10
"""As in arXiv 2406.04093: gradients of rarely active features come near the usual 1e-8."""


_TIMED_ENTRIES = 2**22
"""Entries of each parameter at most."""


def make_adam(sae: SAE) -> torch.optim.Adam:
    """Return Adam over the dictionary's parameters; each step sets the rate."""
    return torch.optim.Adam(sae.parameters(), lr=0.0, betas=BETAS, eps=EPSILON, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def update_seconds(sae: SAE) -> float:
    """Return about how long an update takes, by one of copies of the first rows; changes nothing."""
    parameters = [p.detach() for p in sae.parameters() if p.requires_grad]
    copies = [p[: max(1, _TIMED_ENTRIES * len(p) // p.numel())].clone().requires_grad_() for p in parameters]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimiser = torch.optim.Adam(copies, lr=0.0, fused=True)
    for _ in range(2):
        started = time.perf_counter()
        optimiser.step()
        if copies[0].device.type == "cuda":
            torch.cuda.synchronize(copies[0].device)
    return (
        (time.perf_counter() - started) * sum(p.numel() for p in parameters) / sum(c.numel() for c in copies)
    )
