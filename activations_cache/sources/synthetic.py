"""Oracle activations: known directions, a known concept per direction, noise; for testing what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from pydantic import Field
from safetensors.numpy import save_file

from activations_cache.splits import SplitConfig
from sae.config import Seed
from sae.world import World

from .base import ActivationBatch, ActivationSource, HarvestInputs, SourceConfig
from .reading import EntitySplits

HOOK = "oracle"
BATCH_ENTITIES = 200


class SyntheticSourceConfig(SourceConfig):
    """Activations whose directions and concepts are known."""

    version: ClassVar[int] = 2

    kind: Literal["synthetic"] = "synthetic"
    d_in: int = Field(default=64, ge=2)
    """Dimensions."""
    n_directions: int = Field(default=256, ge=1)
    """Unit directions, each with a concept of its own."""
    l0: float = Field(default=4.0, gt=0)
    """Mean number of directions active in a row."""
    prevalence: tuple[float, float] = (0.005, 0.10)
    """Rarest and commonest concept, as shares of rows."""
    entities: int = Field(default=4000, ge=10)
    """Number of entities."""
    rows_per_entity: int = Field(default=50, ge=1)
    """Rows of each entity."""
    persistence: float = Field(default=0.6, ge=0, lt=1)
    """Correlation of a concept between adjacent rows of an entity."""
    noise: float = Field(default=0.05, ge=0)
    """Standard deviation of the noise in each dimension; active directions have sizes 1 to 2."""
    seed: Seed = 0
    """Seed of directions, concepts and noise, below 2^32."""
    split: SplitConfig = SplitConfig()
    """How entities are divided."""

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source; it needs nothing of the run."""
        return SyntheticSource(self)


class SyntheticSource:
    """x = sum over active i of a_i d_i + noise, with each concept a stationary two-state chain along its entity."""

    def __init__(self, config: SyntheticSourceConfig) -> None:
        self.config = config
        self.hooks = {HOOK: config.d_in}
        self.n_rows = config.entities * config.rows_per_entity
        self.ids = [f"E{i:06d}" for i in range(config.entities)]
        self.entities = pa.table({"entity": np.arange(config.entities), "id": self.ids})
        self.provenance: dict[str, Any] = {"source": config.to_dict()}
        rng = self._rng(0)
        directions = rng.standard_normal((config.n_directions, config.d_in))
        self.directions: Float[np.ndarray, "n d_in"] = directions / np.linalg.norm(
            directions, axis=1, keepdims=True
        )
        self.prevalence = _prevalences(config)
        self._splits = EntitySplits(config.split, pa.array(self.ids))

    def batches(self, world: World, cursor: int = 0) -> Iterator[ActivationBatch]:
        """Yield this rank's batches from `cursor` on; the random numbers of a batch depend on its index alone."""
        config = self.config
        for index, start in enumerate(range(0, config.entities, BATCH_ENTITIES)):
            if index < cursor:
                continue
            codes = np.arange(start, min(start + BATCH_ENTITIES, config.entities))
            _, acts = self._draw(index, len(codes))
            mine = np.floor(self._splits.rank[codes] * world.size) == world.rank
            entity = np.repeat(codes, config.rows_per_entity)
            time = np.tile(np.arange(config.rows_per_entity), len(codes))
            keep = np.repeat(mine, config.rows_per_entity)
            entity, time = entity[keep], time[keep]
            split = self._splits.of(entity, time)
            yield ActivationBatch({HOOK: acts[keep]}, entity, time, time, split, index + 1)

    def write_truth(self, folder: Path) -> None:
        """Write concepts.parquet (entity id, t, one column per direction) and directions.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        active = np.concatenate(
            [
                self._draw(i, min(BATCH_ENTITIES, config.entities - start))[0]
                for i, start in enumerate(range(0, config.entities, BATCH_ENTITIES))
            ]
        )
        table: dict[str, Any] = {
            "entity_id": np.repeat(self.ids, config.rows_per_entity),
            "t": np.tile(np.arange(config.rows_per_entity), config.entities),
        }
        table |= {f"direction_{i:03d}": active[:, i] for i in range(config.n_directions)}
        pq.write_table(pa.table(table), folder / "concepts.parquet")
        save_file({"directions": self.directions.astype(np.float32)}, folder / "directions.safetensors")

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.config.seed, index])))

    def _draw(self, index: int, n: int) -> tuple[Bool[np.ndarray, "rows n"], Float[np.ndarray, "rows d_in"]]:
        config = self.config
        rng = self._rng(index + 1)
        shape = (n, config.rows_per_entity, config.n_directions)
        active = np.empty(shape, dtype=bool)
        # keep the last state with probability `persistence`, else draw anew: stationary at the prevalence
        fresh = rng.random(shape, dtype=np.float32) < self.prevalence.astype(np.float32)
        keep = rng.random(shape, dtype=np.float32) < config.persistence
        active[:, 0] = fresh[:, 0]
        for step in range(1, config.rows_per_entity):
            active[:, step] = np.where(keep[:, step], active[:, step - 1], fresh[:, step])
        flat = active.reshape(-1, config.n_directions)
        size = rng.uniform(1.0, 2.0, flat.shape).astype(np.float32)
        x = (flat * size) @ self.directions.astype(np.float32)
        x += config.noise * rng.standard_normal(x.shape, dtype=np.float32)
        return flat, x


def _prevalences(config: SyntheticSourceConfig) -> Float[np.ndarray, " n"]:
    """Return prevalences between the two bounds whose sum is `l0`: log-prevalence is a power of the rank."""
    low, high = config.prevalence
    rank = np.linspace(0, 1, config.n_directions)

    def at(power: float) -> np.ndarray:
        return low * (high / low) ** (rank**power)

    lowest, highest = at(60.0).sum(), at(1 / 60.0).sum()
    target = float(np.clip(config.l0, lowest, highest))
    from scipy.optimize import brentq

    power = brentq(lambda q: at(float(np.exp(q))).sum() - target, -np.log(60.0), np.log(60.0))
    return at(float(np.exp(power)))
