"""The economy that every account shares: one path per seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .chain import BoolArray, FloatArray
from .config import ReferenceConfig


class Economy(NamedTuple):
    """Monthly series over the calendar, each of shape [months]."""

    u: FloatArray
    """Distance of the cycle from normal; about 2 in the recession."""
    recession: BoolArray
    uer: FloatArray
    """Unemployment rate in percent."""
    hpi: FloatArray
    """House price index, 1 in the first month."""
    policy: FloatArray
    """Percentage points that the lender's rates have risen since the first month."""


def simulate_economy(config: ReferenceConfig, length: int) -> Economy:
    """Draw the economy over `length` calendar months: u is AR(1), plus 2 in the recession."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, 0])))
    noise = rng.normal(0.0, 0.15, length)
    cycle = np.zeros(length)
    for t in range(1, length):
        cycle[t] = 0.85 * cycle[t - 1] + noise[t]
    months = np.arange(length)
    recession = (months >= config.recession.start) & (months < config.recession.stop)
    u = cycle + 2.0 * recession
    hpi = np.exp(np.cumsum(np.where(recession, -0.010, 0.003)))
    policy = 0.08 * np.minimum(months, 24)
    return Economy(u, recession, np.round(4.5 + u, 2), np.round(hpi / hpi[0], 4), policy)
