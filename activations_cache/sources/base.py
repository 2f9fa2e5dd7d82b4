"""What a source of activations must offer: batches of rows with who and when, from any point on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from sae.config import Family
from sae.world import World


class SourceConfig(Family):
    """What is read."""

    kind: str = "panel"


class ActivationBatch(NamedTuple):
    """Rows of activations, padding dropped."""

    acts: dict[str, Float[np.ndarray, "rows d_in"]]
    """Per hook, float32; hooks of one batch share the rows."""
    entity: Int[np.ndarray, " rows"]
    position: Int[np.ndarray, " rows"]
    time: Int[np.ndarray, " rows"]
    split: Int[np.ndarray, " rows"]
    """Index into `activations_cache.splits.SPLITS`."""
    cursor: int
    """Where to start again so that the next batch is the one after this."""


class ActivationSource(Protocol):
    """Anything that yields activations in a fixed order and can start again from a cursor."""

    hooks: dict[str, int]
    """Hook -> d_in."""
    n_rows: int
    """Rows that all batches hold together, over all ranks."""
    entities: pa.Table
    """`entity` int64 and `id` text."""
    provenance: dict[str, Any]
    """What the activations come from: model, hashes, data."""

    def batches(self, world: World, cursor: int = 0) -> Iterator[ActivationBatch]:
        """Yield this rank's batches from `cursor` on; the same batches in the same order on every call."""
        ...

    def write_truth(self, folder: Path) -> None:
        """Write what is known of the activations, where anything is; sources of real data write nothing."""
        ...
