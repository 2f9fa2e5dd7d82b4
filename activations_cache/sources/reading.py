"""Reading a model: a feed says what it is called with, hooks say what is kept; how most sources are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.batching import batches_by_length
from activations_cache.hooks import intercept, resolve_hooks
from activations_cache.inputs import ModelInputs, PanelAdapter
from activations_cache.panel import Panel
from activations_cache.splits import SPLITS, SplitConfig, assign_splits, hash_uniform
from sae.errors import ConfigError
from sae.world import World

from .base import ActivationBatch

BATCH_ROWS = 8192
"""Padded positions of one forward pass: large enough to keep two cores busy, small enough for their cache."""
_HASHED = 1 << 18


class Feed(Protocol):
    """What a model is called with, in a fixed order."""

    entities: pa.Table
    """`entity` int64 and `id` text."""
    n_rows: int
    """Real places of all calls together, over all ranks."""

    def plan(self, world: World) -> Iterator[Any]:
        """Yield this rank's calls in order, as anything cheap that `load` understands."""
        ...

    def load(self, step: Any) -> ModelInputs:
        """Return one call."""
        ...

    def split(
        self, entity: Int[np.ndarray, " rows"], time: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " rows"]:
        """Return the split of rows, as indices into SPLITS."""
        ...


class ModelSource:
    """Activations that hooks read off a model while a feed runs through it, several hooks in one pass."""

    def __init__(
        self, feed: Feed, model: nn.Module, hooks: Sequence[str], *, provenance: dict[str, Any]
    ) -> None:
        self.feed = feed
        self.model = model.eval()
        self.names = resolve_hooks(model, hooks)
        self.entities = feed.entities
        self.n_rows = feed.n_rows
        self.provenance = provenance
        tensors = [*model.parameters(), *model.buffers()]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        first = next(feed.plan(World()), None)
        if first is None:
            raise ConfigError("the source holds nothing to read", do="check that what it names is not empty")
        self.hooks = {name: x.shape[1] for name, x in self._read(feed.load(first)).items()}

    def batches(self, world: World, cursor: int = 0) -> Iterator[ActivationBatch]:
        """Yield this rank's batches from `cursor` on; a call without real places yields none."""
        for index, step in enumerate(self.feed.plan(world)):
            if index < cursor:
                continue
            inputs = self.feed.load(step)
            real = inputs.real
            if real.any():
                entity, position, time = (a[real] for a in (inputs.entity, inputs.position, inputs.time))
                split = self.feed.split(entity, time)
                yield ActivationBatch(self._read(inputs), entity, position, time, split, index + 1)

    def write_truth(self, folder: Path) -> None:
        """Write nothing: what a real model encodes is not known."""

    def _read(self, inputs: ModelInputs) -> dict[str, Float[np.ndarray, "rows d_in"]]:
        """Call the model and return the activations at real places."""
        args, kwargs = _on(inputs.args, self._device), _on(inputs.kwargs, self._device)
        found: dict[str, dict[str, np.ndarray]] = {}

        def take(name: str, x: Tensor) -> None:
            # at once, for what comes after may work in place
            found[name] = at_real_places(name, x, inputs)

        with (
            torch.inference_mode(),
            intercept(self.model, {name: partial(take, name) for name in self.names}),
        ):
            self.model(*args, **kwargs)
        lost = [name for name in self.names if name not in found]
        if lost:
            raise ConfigError(
                f"the model's forward pass never came to the hook(s) {', '.join(lost)}",
                do="name a module that is called, and a call (@N) that is made",
            )
        return {key: rows for name in self.names for key, rows in found[name].items()}


def at_real_places(name: str, x: Tensor, inputs: ModelInputs) -> dict[str, Float[np.ndarray, "rows d_in"]]:
    """Return copies of an activation's rows that are no padding, as float32; with fields, one array per field.

    Raises
    ------
    ConfigError
        The activation does not have one vector per place (and field).
    """
    real = torch.from_numpy(inputs.real).to(x.device)
    if x.is_nested:
        # torch's TransformerEncoder packs sequences that are padded on the right
        x = x.to_padded_tensor(0.0, (*real.shape, x.size(-1)))
    n_fields, extra = len(inputs.fields), x.ndim - real.ndim
    if n_fields and extra == 2:
        x = x.movedim(inputs.fields_axis, -2)
    fits = extra == 1 or (n_fields > 0 and extra == 2 and x.shape[-2] == n_fields)
    if not fits or tuple(x.shape[: real.ndim]) != tuple(real.shape):
        places = ", ".join(map(str, real.shape))
        with_fields = f" or ({places}, {n_fields} fields, d)" if n_fields else ""
        raise ConfigError(
            f"the activation at {name} does not fit the coordinates that came with it",
            got=f"shape {tuple(x.shape)}",
            expected=f"({places}, d){with_fields}",
            do="let the adapter give coordinates in the activation's own layout, or read another hook",
        )
    rows = x[real].float().cpu()
    if extra == 1:
        return {name: rows.numpy()}
    return {f"{name}#{field}": rows[:, i].contiguous().numpy() for i, field in enumerate(inputs.fields)}


class HistoryFeed:
    """The histories of a panel, or of anything that is laid out like one, through an adapter.

    Entities are ordered by a hash, then by length within stretches, so that padding is little and yet every
    stretch of the store is a fair sample of the book; a rank takes a range of the hash.

    Parameters
    ----------
    entities
        `entity` and `id`.
    to_inputs
        The adapter.
    seed
        Of the hash.
    n_rows
        Real places of all calls; None counts them, which calls the adapter once for every entity.
    """

    def __init__(
        self,
        panel: Panel,
        entities: pa.Table,
        to_inputs: PanelAdapter,
        *,
        seed: int,
        n_rows: int | None = None,
    ) -> None:
        self.panel, self.entities, self._to_inputs = panel, entities, to_inputs
        self._rank = hash_uniform(seed, "rank", entities["id"].to_pylist())
        late = panel.time[panel.split == SPLITS.index("out_of_time")]
        self._cut = int(late.min()) if len(late) else None
        if n_rows is None:
            n_rows = sum(int(self.load(codes).real.sum()) for codes in self.plan(World()))
        self.n_rows = n_rows

    def plan(self, world: World) -> Iterator[Int[np.ndarray, " batch"]]:
        """Yield entity codes, so many that their padded histories fill a batch."""
        mine = np.flatnonzero(np.floor(self._rank * world.size) == world.rank)
        order = mine[np.argsort(self._rank[mine], kind="stable")]
        mean_length = max(1.0, len(self.panel.time) / self.panel.n_entities)
        stretch = max(1, int(16 * BATCH_ROWS / mean_length))
        for start in range(0, len(order), stretch):
            yield from batches_by_length(self.panel, order[start : start + stretch], BATCH_ROWS)

    def load(self, step: Int[np.ndarray, " batch"]) -> ModelInputs:
        """Return the call for these entities."""
        inputs = self._to_inputs(self.panel, step)
        shapes = {np.shape(a) for a in (inputs.entity, inputs.position, inputs.time, inputs.real)}
        if len(shapes) > 1:
            raise ConfigError(
                "the adapter's entity, position, time and real differ in shape", got=str(sorted(shapes))
            )
        return inputs

    def split(
        self, entity: Int[np.ndarray, " rows"], time: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " rows"]:
        """Return the split of each row's entity, or `out_of_time` from the cut on."""
        split = self.panel.entity_split[entity].astype(np.int64)
        return split if self._cut is None else np.where(time >= self._cut, SPLITS.index("out_of_time"), split)


class EntitySplits:
    """Splits and ranks of entities that are no panel's, by the hash of their ids (in order of their codes)."""

    def __init__(self, config: SplitConfig, ids: pa.Array) -> None:
        if isinstance(config.out_of_time, str):
            raise ConfigError("source.split.out_of_time must be a number here", got=config.out_of_time)
        self.cut = config.out_of_time
        self.of_entity, self.rank = np.empty(len(ids), np.int64), np.empty(len(ids))
        for start in range(0, len(ids), _HASHED):
            # a stretch at a time, because text is large as Python objects
            names, here = ids[start : start + _HASHED].to_pylist(), slice(start, start + _HASHED)
            self.of_entity[here] = assign_splits(config, names)[0]
            self.rank[here] = hash_uniform(config.seed, "rank", names)

    def of(
        self, entity: Int[np.ndarray, " rows"], time: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " rows"]:
        """Return the split of each row's entity, or `out_of_time` from the cut on."""
        split = self.of_entity[entity]
        return split if self.cut is None else np.where(time >= self.cut, SPLITS.index("out_of_time"), split)


def _on(value: Any, device: torch.device) -> Any:
    """Return arguments with every tensor on the device, inside tuples, lists and mappings too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on(item, device) for item in value)
    return value
