"""What a source of activations must offer: batches of rows with who and when, from any point on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from activations_cache.models import ModelConfig
from activations_cache.splits import SplitConfig
from sae.config import Family
from sae.world import World


@dataclass(frozen=True)
class HarvestInputs:
    """What a run lays before a source; each kind takes what it needs.

    Attributes
    ----------
    hooks
        Places to read, as configured.
    device
        Where the model computes.
    model
        The configured model; None where activations come ready made.
    fitted
        Folder of the model that the run fitted, or of its twin.
    panel
        Folder of the canonical panel.
    split
        How the panel's entities were divided.
    provenance
        What the run knows of panel and fitted model; kept in the store.
    """

    hooks: Sequence[str] = ("layers.2",)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: ModelConfig | None = None
    fitted: Path | None = None
    panel: Path | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    provenance: dict[str, Any] = field(default_factory=dict)


class SourceConfig(Family):
    """What is read."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Sections of the configuration that this kind cannot do without."""
    reads_panel: ClassVar[bool] = False
    """Whether its entities and times are those of the run's panel."""
    version: ClassVar[int] = 1
    """Raised when the same settings would give other rows or splits than before."""

    kind: str = "panel"

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source.

        Raises
        ------
        UserError
            What is configured cannot be read.
        """
        raise NotImplementedError

    def files(self) -> Sequence[Path]:
        """Return the user's files that are read, so that a change of them is noticed."""
        return ()


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
