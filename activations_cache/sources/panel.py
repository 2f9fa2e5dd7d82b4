"""A panel read by CreditTransformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from activations_cache.hooks import capture, resolve_hooks
from activations_cache.panel import Panel
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.reference.histories import batches_by_length, collate
from activations_cache.splits import hash_uniform
from sae.world import World

from .base import ActivationBatch, SourceConfig

BATCH_ROWS = 8192
"""Padded positions of one forward pass: large enough to keep two cores busy, small enough for their cache."""


class PanelSourceConfig(SourceConfig):
    """The run's panel, read by the run's model."""

    kind: Literal["panel"] = "panel"


class PanelSource:
    """Activations of a model over a panel's histories, several hooks in one pass.

    Entities are ordered by a hash, then by length within stretches, so that padding is little and yet every
    stretch of the store is a fair sample of the book.
    """

    def __init__(
        self, folder: Path, model: CreditTransformer, hooks: Sequence[str], *, provenance: dict[str, Any], seed: int
    ) -> None:
        self.panel = Panel.open(folder)
        self.model = model.eval()
        self.names = resolve_hooks(model, hooks)
        self.entities = pq.read_table(folder / "entities.parquet", columns=["entity", "id"])
        self.provenance = provenance
        self.n_rows = len(self.panel.time)
        self._rank = hash_uniform(seed, "rank", self.entities["id"].to_pylist())
        self.hooks = self._widths()

    def batches(self, world: World, cursor: int = 0) -> Iterator[ActivationBatch]:
        """Yield this rank's batches from `cursor` on."""
        for index, codes in enumerate(self._plan(world)):
            if index >= cursor:
                yield self._forward(codes, index + 1)

    def write_truth(self, folder: Path) -> None:
        """Write nothing: what a real model encodes is not known."""

    def _plan(self, world: World) -> Iterator[np.ndarray]:
        mine = np.flatnonzero(np.floor(self._rank * world.size) == world.rank)
        order = mine[np.argsort(self._rank[mine], kind="stable")]
        mean_length = max(1.0, self.n_rows / self.panel.n_entities)
        stretch = max(1, int(16 * BATCH_ROWS / mean_length))
        for start in range(0, len(order), stretch):
            yield from batches_by_length(self.panel, order[start : start + stretch], BATCH_ROWS)

    def _forward(self, codes: np.ndarray, cursor: int) -> ActivationBatch:
        histories = collate(self.panel, codes)
        device = next(self.model.parameters()).device
        with torch.inference_mode(), capture(self.model, self.names) as seen:
            self.model(histories.values.to(device), histories.gap.to(device))
        real = histories.real
        acts = {name: x[real.to(x.device)].float().cpu().numpy() for name, x in seen.items()}
        rows = histories.rows[real].numpy()
        return ActivationBatch(
            acts=acts,
            entity=self.panel.entity[rows],
            position=rows - self.panel.offsets[self.panel.entity[rows]],
            time=self.panel.time[rows],
            split=self.panel.split[rows],
            cursor=cursor,
        )

    def _widths(self) -> dict[str, int]:
        batch = self._forward(np.array([0]), 0)
        return {name: batch.acts[name].shape[1] for name in self.names}
