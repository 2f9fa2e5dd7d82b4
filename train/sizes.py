"""`sae.d_sae: auto` and `sae.k: auto`: numbers that the configuration leaves to the rows, and how they are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PositiveInt, model_validator

from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.store import ActivationStore
from sae.base import SAEConfig
from sae.config import Config, parse_config
from sae.sizing import FEATURES_PER_COMPONENT, Sizes, round_up, suggest_sizes
from sae.world import World

from .plan import Auto
from .run import SPLIT, varying_moments
from .trainer import SAMPLE_ROWS

ANY_SIZE = (2**20, 1)
"""A d_sae and k to check a configuration by before there are rows; only what `ENDS_AT` names is at odds with them."""

ENDS_AT = {"prefixes": "d_sae", "budgets": "k"}
"""Lists that end at one of the numbers, which has to be given with them."""


class AutoSAEConfig(Config):
    """A dictionary whose `d_sae`, `k` or both are `auto`; the other keys are those of its kind."""

    model_config = ConfigDict(extra="allow")

    d_sae: PositiveInt | Auto
    """auto = what the rows support, see `sae.sizing`; where the k given is more than they do, at least 8 k."""
    k: PositiveInt | Auto
    """auto = what the rows support; at most d_sae."""

    @model_validator(mode="before")
    @classmethod
    def _all_else_is_right(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Raise what a dictionary with numbers would, in the same words."""
        for name, end in ENDS_AT.items():
            if given.get(end) == "auto" and given.get(name, "auto") != "auto":
                raise ValueError(f"{name} end at {end}: give {end} a number, or leave {name} at auto")
        sizes = dict(zip(("d_sae", "k"), ANY_SIZE, strict=True))
        given_open = {name: size for name, size in sizes.items() if given.get(name) == "auto"}
        SAEConfig.model_validate({**given, **given_open})
        return given

    def sized(self, d_sae: int, k: int) -> SAEConfig:
        """Return the dictionary with these in the place of `auto`.

        Raises
        ------
        ConfigError
            Other keys do not go with the numbers.
        """
        return parse_config(SAEConfig, self._with(d_sae, k), where="section sae")

    def _with(self, d_sae: int, k: int) -> dict[str, Any]:
        if self.d_sae != "auto":
            d_sae = self.d_sae
        elif self.k != "auto" and self.k > k:
            d_sae = max(d_sae, round_up(FEATURES_PER_COMPONENT * self.k))
        k = min(k, d_sae) if self.k == "auto" else self.k
        return {**self.to_dict(), "d_sae": d_sae, "k": k}


def measure_sizes(store_path: Path, hook: str, *, seed: int, settings: LoaderConfig) -> Sizes:
    """Return what 4,096 rows of the split support, or all where it has fewer; the same for any number of processes.

    They are the first of an epoch in batches of that size without runs: what a training sees first where its kind
    reads no row before, and the split fits the loader's window.

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
    loader = _loader(store, hook, SAMPLE_ROWS, seed, settings)
    try:
        if loader.rows_per_epoch < SAMPLE_ROWS:
            # a batch that goes on into the next epoch holds rows twice, which fourth moments take for structure
            loader.close()
            loader = _loader(store, hook, loader.rows_per_epoch, seed, settings)
        return suggest_sizes(loader.next_batch().x)
    finally:
        loader.close()


def _loader(
    store: ActivationStore, hook: str, rows: int, seed: int, settings: LoaderConfig
) -> ShuffledLoader:
    world = World.single("cpu")
    return ShuffledLoader(store, hook, SPLIT, batch_size=rows, seed=seed, world=world, settings=settings)
