"""From panel rows to the padded batches that CreditTransformer reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations_cache.inputs import ModelInputs
from activations_cache.panel import Panel


class Histories(NamedTuple):
    """A batch of whole histories, padded on the right to the longest."""

    values: Float[Tensor, "batch time columns"]
    gap: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    """False where a position is padding."""
    rows: Int[Tensor, "batch time"]
    """The panel row of each position; padding repeats the last one."""

    def to(self, device: torch.device) -> Histories:
        """Return the batch on another device."""
        return Histories(*(part.to(device) for part in self))


def collate(
    panel: Panel, entities: Int[np.ndarray, " batch"], *, stop: np.ndarray | None = None
) -> Histories:
    """Gather whole histories.

    Parameters
    ----------
    panel
        The rows.
    entities
        Codes of the entities, in the order of the batch.
    stop
        Per panel entity, the row at which its history ends early (such as a time cut); default its last.
    """
    start = panel.offsets[entities]
    end = (panel.offsets[1:] if stop is None else stop)[entities]
    length = end - start
    steps = np.arange(int(length.max()))
    rows = np.minimum(start[:, None] + steps, end[:, None] - 1)
    real = steps < length[:, None]
    gap = np.where(steps > 0, panel.time[rows] - panel.time[np.maximum(rows - 1, start[:, None])] - 1, 0)
    return Histories(
        torch.from_numpy(panel.values[rows]),
        torch.from_numpy(np.maximum(gap, 0)),
        torch.from_numpy(real),
        torch.from_numpy(rows),
    )


def credit_inputs(panel: Panel, entities: Int[np.ndarray, " batch"]) -> ModelInputs:
    """Return the call of CreditTransformer for whole histories."""
    histories = collate(panel, entities)
    return ModelInputs.at_rows(panel, histories.rows, histories.real, histories.values, histories.gap)
