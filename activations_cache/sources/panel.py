"""A panel, read by the run's model: CreditTransformer, or any module with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow.parquet as pq
from torch import nn

from activations_cache.inputs import PanelAdapter
from activations_cache.models import module_hash
from activations_cache.panel import Panel
from activations_cache.reference.histories import credit_inputs

from .base import ActivationSource, HarvestInputs, SourceConfig
from .reading import HistoryFeed, ModelSource


class PanelSourceConfig(SourceConfig):
    """The run's panel, read by the run's model."""

    needs: ClassVar[tuple[str, ...]] = ("panel", "model")
    reads_panel: ClassVar[bool] = True
    version: ClassVar[int] = 2

    kind: Literal["panel"] = "panel"

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source."""
        assert inputs.panel is not None and inputs.model is not None
        model = inputs.model.load(inputs.fitted).to(inputs.device)
        provenance = {"model": inputs.model.to_dict(), "weights": module_hash(model)}
        return PanelSource(
            inputs.panel,
            model,
            inputs.hooks,
            provenance=provenance | inputs.provenance,
            seed=inputs.split.seed,
            to_inputs=inputs.model.adapter(),
        )


class PanelSource(ModelSource):
    """Activations of a model over a panel's histories."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        hooks: Sequence[str],
        *,
        provenance: dict[str, Any],
        seed: int,
        to_inputs: PanelAdapter = credit_inputs,
    ) -> None:
        self.panel = Panel.open(folder)
        entities = pq.read_table(folder / "entities.parquet", columns=["entity", "id"])
        n_rows = len(self.panel.time) if to_inputs is credit_inputs else None
        feed = HistoryFeed(self.panel, entities, to_inputs, seed=seed, n_rows=n_rows)
        super().__init__(feed, model, hooks, provenance=provenance)
