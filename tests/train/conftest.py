"""Rows made of known directions, and runs over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.train.runs import Planted, make_trainer, plant
from train.trainer import Trainer


@pytest.fixture(scope="session")
def plant_rows() -> Callable[..., Planted]:
    return plant


@pytest.fixture(scope="session")
def small() -> Planted:
    """3,000 rows of 24 directions in 12 dimensions."""
    return plant(3000, d_in=12, features=24, l0=3)


@pytest.fixture(scope="session")
def trainer() -> Callable[..., Trainer]:
    """A trainer over rows in memory."""
    return make_trainer


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    """What the entry point switches on."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")
