"""Which entity is used for what: a hash decides, so that it never changes with the data around it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from sae.config import Config

Purpose = Literal["split", "rank", "control", "early_stop"]
SPLITS = ("fit", "discover", "confirm", "out_of_time")


class SplitConfig(Config):
    """How entities are divided; each part is a share of the entities."""

    seed: int = 0
    """Seed of the hash, independent of the run's seed, so that two runs judge on the same entities."""
    fit: float = Field(default=0.6, gt=0, lt=1)
    """Share of entities that train the model and the dictionary."""
    discover: float = Field(default=0.2, gt=0, lt=1)
    """Share that finds candidates, thresholds and groups; the rest confirms them, once."""
    early_stop: float = Field(default=0.1, gt=0, lt=1)
    """Share of the fit entities that decides when the model has been trained enough."""
    out_of_time: int | str | None = None
    """First period ('YYYY-MM' or the period's number) whose rows leave their split and become `out_of_time`."""

    @model_validator(mode="after")
    def _leaves_some_to_confirm(self) -> SplitConfig:
        if self.fit + self.discover >= 1:
            raise ValueError(f"fit + discover is {self.fit + self.discover:g}, which leaves none to confirm")
        return self


def hash_uniform(seed: int, purpose: str, entities: Sequence[str]) -> Float[np.ndarray, " entities"]:
    """Return u(purpose, entity) in [0, 1): 64 bits of blake2b over 'seed|purpose|entity'.

    The purposes are independent of one another: knowing the split of an entity says nothing of its rank.
    """
    prefix = f"{seed}|{purpose}|".encode()
    digests = b"".join(hashlib.blake2b(prefix + e.encode(), digest_size=8).digest() for e in entities)
    # 53 bits: a double holds them exactly, so the result stays below 1
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(11)).astype(np.float64) / 2.0**53


def assign_splits(config: SplitConfig, entities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return each entity's split, as an index into SPLITS, and whether it belongs to the early-stopping part."""
    u = hash_uniform(config.seed, "split", entities)
    split = np.where(u < config.fit, 0, np.where(u < config.fit + config.discover, 1, 2)).astype(np.int8)
    inner = (split == 0) & (hash_uniform(config.seed, "early_stop", entities) < config.early_stop)
    return split, inner
