"""What an adapter hands over: one call of a model, and who stands where in what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from .panel import Panel


class ModelInputs(NamedTuple):
    """One forward pass: `model(*args, **kwargs)`, and the coordinates of the activations that it leaves.

    The four arrays have one shape, the leading dimensions of every activation that is read: `[batch, time]`
    for most models, `[time, batch]` for time-first ones, `[batch]` for one vector per entity. Padding may be
    on either side, or anywhere: places that are not `real` are never stored, and their coordinates may hold
    anything.
    """

    args: tuple[Any, ...]
    """Positional arguments of the model; tensors are moved to its device."""
    kwargs: dict[str, Any]
    """Keyword arguments of the model, likewise."""
    entity: Int[np.ndarray, "*places"]
    """Entity codes."""
    position: Int[np.ndarray, "*places"]
    """Index of the row within its entity's sequence."""
    time: Int[np.ndarray, "*places"]
    """Period, day or whatever else concepts are joined on."""
    real: Bool[np.ndarray, "*places"]
    """False at padding."""
    fields: tuple[str, ...] = ()
    """Names along one more dimension of an activation (the columns of a field-level encoder, channels): every
    field becomes a hook of its own, HOOK#FIELD."""
    fields_axis: int = -2
    """Where that dimension is; -2 for `[batch, time, fields, d]`."""

    @staticmethod
    def at_rows(
        panel: Panel,
        rows: Int[np.ndarray, "*places"] | Int[Tensor, "*places"],
        real: Bool[np.ndarray, "*places"] | Bool[Tensor, "*places"],
        *args: Any,
        fields: tuple[str, ...] = (),
        **kwargs: Any,  # the model's own keyword arguments
    ) -> ModelInputs:
        """Return inputs whose places are rows of a panel; everything else is passed to the model."""
        at = np.asarray(rows)
        entity = panel.entity[at]
        position = at - panel.offsets[entity]
        return ModelInputs(args, kwargs, entity, position, panel.time[at], np.asarray(real), fields)


PanelAdapter = Callable[[Panel, Int[np.ndarray, " batch"]], ModelInputs]
"""Turns the histories of some entities into one call of a model."""
