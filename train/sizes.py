"""`sae.d_sae: auto` and `sae.k: auto`: numbers that the configuration leaves to the rows, and how they are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, PositiveInt, model_validator

from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.store import ActivationStore
from sae.base import SAEConfig
from sae.config import Config, parse_config
from sae.sizing import Sizes, suggest_sizes
from sae.world import World

from .plan import Auto
from .run import SPLIT, varying_moments
from .trainer import SAMPLE_ROWS

ANY_SIZE = (2**20, 1)
"""A d_sae and k that are at odds with nothing else, to check a configuration by before there are rows."""


class AutoSAEConfig(Config):
    """A dictionary whose `d_sae`, `k` or both are `auto`; the other keys are those of its kind."""

    model_config = ConfigDict(extra="allow")

    d_sae: PositiveInt | Auto
    """auto = what the rows support, see `sae.sizing`; at least k."""
    k: PositiveInt | Auto
    """auto = what the rows support; at most d_sae."""

    @model_validator(mode="after")
    def _other_keys_are_right(self) -> Self:
        SAEConfig.model_validate(self._with(*ANY_SIZE))
        return self

    def sized(self, d_sae: int, k: int) -> SAEConfig:
        """Return the dictionary with these in the place of `auto`.

        Raises
        ------
        ConfigError
            Other keys do not go with the numbers.
        """
        return parse_config(SAEConfig, self._with(d_sae, k), where="section sae")

    def _with(self, d_sae: int, k: int) -> dict[str, Any]:
        d_sae = d_sae if self.d_sae == "auto" else self.d_sae
        k = k if self.k == "auto" else self.k
        if self.k == "auto":
            k = min(k, d_sae)
        elif self.d_sae == "auto":
            d_sae = max(k, d_sae)
        return {**self.to_dict(), "d_sae": d_sae, "k": k}


def measure_sizes(store_path: Path, hook: str, *, seed: int, settings: LoaderConfig) -> Sizes:
    """Return what the first rows that a training would see support; the same for any number of processes.

    Parameters
    ----------
    store_path, hook
        The activations.
    seed
        Of the order of rows.
    settings
        How they are read.

    Raises
    ------
    StoreError
        The store is damaged or lacks the hook or the split, or its rows do not vary.
    """
    store = ActivationStore.open(store_path)
    varying_moments(store, hook)
    world = World.single("cpu")
    loader = ShuffledLoader(
        store, hook, SPLIT, batch_size=SAMPLE_ROWS, seed=seed, world=world, settings=settings
    )
    try:
        return suggest_sizes(loader.next_batch().x)
    finally:
        loader.close()
