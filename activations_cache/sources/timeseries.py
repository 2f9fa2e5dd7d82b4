"""A panel laid on its calendar, read by a Hugging Face model: PatchTST or TimeSeriesTransformer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from activations_cache.inputs import ModelInputs, PanelAdapter
from activations_cache.models import module_hash
from activations_cache.panel import Panel
from activations_cache.splits import SPLITS
from sae.errors import ConfigError

from .base import ActivationSource, HarvestInputs, SourceConfig
from .reading import HistoryFeed, ModelSource


class TimeSeriesSourceConfig(SourceConfig):
    """Windows of the run's panel, as long as the model's context, from each entity's last period backwards.

    Periods without a row, and those before an entity's first, are missing values that the model is told of.
    PatchTST embeds every channel on its own: its activations become hooks HOOK#COLUMN, and a patch joins at
    its last period, if the panel has a row there. TimeSeriesTransformer has a row per period; its encoder is
    read.
    """

    needs: ClassVar[tuple[str, ...]] = ("panel", "model")
    reads_panel: ClassVar[bool] = True
    version: ClassVar[int] = 3

    kind: Literal["timeseries"] = "timeseries"
    columns: tuple[str, ...] | None = None
    """Panel columns in the order of the model's channels; None: all, in the panel's order."""

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source."""
        assert inputs.panel is not None and inputs.model is not None
        model = inputs.model.load(inputs.fitted).to(inputs.device)
        make_steady(model)
        panel = Panel.open(inputs.panel)
        adapter = adapter_of(getattr(model, "config", None), panel, self.columns)
        entities = pq.read_table(inputs.panel / "entities.parquet", columns=["entity", "id"])
        provenance = {
            "source": self.to_dict(),
            "model": inputs.model.to_dict(),
            "weights": module_hash(model),
        }
        feed = HistoryFeed(panel, entities, adapter, seed=inputs.split.seed)
        return ModelSource(feed, model, inputs.hooks, provenance=provenance | inputs.provenance)


def make_steady(model: nn.Module) -> None:
    """Switch off what makes an activation depend on chance or on the batch it is in.

    That is random masking, which is for pretraining, and the scale of a channel that a window never
    observed: the average over the batch becomes 1.
    """
    for module in model.modules():
        if getattr(module, "do_mask_input", False):
            module.do_mask_input, module.masking = False, nn.Identity()  # type: ignore[assignment]
        if getattr(module, "default_scale", 1.0) is None:
            module.default_scale = 1.0  # type: ignore[assignment]


def adapter_of(config: Any, panel: Panel, columns: tuple[str, ...] | None) -> PanelAdapter:
    """Return the adapter for a model's Hugging Face configuration.

    Raises
    ------
    ConfigError
        The model is of another type, or wants other inputs than the panel's columns and the calendar give.
    """
    names = tuple(panel.columns) if columns is None else columns
    lost = [name for name in names if name not in panel.columns]
    if lost:
        raise ConfigError(
            f"source.columns: the panel has no {', '.join(lost)}", expected=", ".join(panel.columns)
        )
    kind = getattr(config, "model_type", type(config).__name__)
    channels = {"patchtst": "num_input_channels", "time_series_transformer": "input_size"}
    if kind not in channels:
        raise ConfigError(
            f"source timeseries cannot call a model of type {kind}",
            expected=" or ".join(channels),
            do="use source.kind=panel with model.kind=module and an adapter",
        )
    if getattr(config, channels[kind]) != len(names):
        raise ConfigError(
            f"the model reads {getattr(config, channels[kind])} channel(s)",
            got=f"{len(names)}: {', '.join(names)}",
            do="name them, in the model's order, with source.columns",
        )
    if kind == "patchtst":
        return PatchAdapter(config, names)
    return PeriodAdapter(config, names)


class Windows(NamedTuple):
    """Stretches of the calendar, and which panel row lies at each period."""

    rows: Int[np.ndarray, "windows periods"]
    """Panel rows; -1 where the entity has none."""
    served: Bool[np.ndarray, "windows periods"]
    """Whether the row is this window's to serve, and not there for its context alone."""
    periods: Int[np.ndarray, "windows periods"]
    age: Int[np.ndarray, "windows periods"]
    """Periods since the entity's first, not below 0."""

    def values(self, panel: Panel, names: tuple[str, ...]) -> Float[np.ndarray, "windows periods columns"]:
        """Return the columns; NaN where there is no row or no value."""
        columns = [panel.columns.index(name) for name in names]
        found = panel.values[:, columns][np.maximum(self.rows, 0)]
        return np.where((self.rows >= 0)[..., None], found, np.float32(np.nan))


def windows_of(panel: Panel, entities: Int[np.ndarray, " batch"], length: int, before: int = 0) -> Windows:
    """Lay windows of `length` periods end to end, backwards from each entity's last to its first.

    Rows before the time cut and those after it have windows of their own: a model that looks both ways shows no row
    before the cut what came after it.

    Parameters
    ----------
    before
        Periods to show ahead of each window besides.
    """
    begin, stop = panel.offsets[entities], panel.offsets[entities + 1]
    here = np.concatenate([np.arange(a, b) for a, b in zip(begin, stop, strict=True)])
    member = np.repeat(np.arange(len(entities)), stop - begin)
    late = panel.split[here] == SPLITS.index("out_of_time")
    cut = stop - np.bincount(member[late], minlength=len(entities))
    # per entity the stretch before the cut and that after it, where there are rows
    start, end = (np.stack(pair, axis=1).ravel() for pair in ((begin, cut), (cut, stop)))
    stretch = np.flatnonzero(end > start)
    first, last = panel.time[start[stretch]], panel.time[end[stretch] - 1]
    count = (last - first) // length + 1
    window = np.repeat(np.arange(len(stretch)), count)
    number = np.arange(len(window)) - np.repeat(np.cumsum(count) - count, count)
    owner = stretch[window] // 2
    periods = (last[window] - number * length)[:, None] + np.arange(1 - length - before, 1)
    # rows are sorted by entity and time, so one key finds them; windows may reach outside the panel's periods
    time = panel.time[here]
    low = min(int(time.min()), int(periods.min()))
    span = max(int(time.max()), int(periods.max())) - low + 1
    keys, wanted = member * span + (time - low), owner[:, None] * span + (periods - low)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    rows = np.where(keys[at] == wanted, here[at], -1)
    age = np.maximum(periods - panel.time[begin][owner][:, None], 0)
    return Windows(rows, rows >= start[stretch][window][:, None], periods, age)


class PatchAdapter:
    """Calls of PatchTST: `[windows, periods, channels]`; activations are `[windows, channels, patches, d]`."""

    def __init__(self, config: Any, names: tuple[str, ...]) -> None:
        self.names, self.length = names, int(config.context_length)
        patches = (max(self.length, config.patch_length) - config.patch_length) // config.patch_stride + 1
        # the first periods are left out where patches do not fill the context
        start = self.length - (config.patch_length + config.patch_stride * (patches - 1))
        self.ends = start + config.patch_length - 1 + config.patch_stride * np.arange(patches)
        self.cls = bool(config.use_cls_token)

    def __call__(self, panel: Panel, entities: Int[np.ndarray, " batch"]) -> ModelInputs:
        """Return the call for these entities."""
        windows = windows_of(panel, entities, self.length)
        values = windows.values(panel, self.names)
        rows, served = windows.rows[:, self.ends], windows.served[:, self.ends]
        if self.cls:
            rows, served = (np.pad(a, ((0, 0), (1, 0))) for a in (rows, served))
        inputs = ModelInputs.at_rows(
            panel,
            np.maximum(rows, 0),
            served,
            fields=self.names,
            past_values=torch.from_numpy(np.nan_to_num(values)),
            past_observed_mask=torch.from_numpy(np.isfinite(values)),
        )
        return inputs._replace(fields_axis=1)


class PeriodAdapter:
    """Calls of TimeSeriesTransformer; time features are month and age, as its published examples use."""

    def __init__(self, config: Any, names: tuple[str, ...]) -> None:
        self.names, self.length = names, int(config.context_length)
        self.before, self.ahead = max(config.lags_sequence), int(config.prediction_length)
        self.n_features = int(config.num_time_features)
        unmet = [
            name
            for name in (
                "num_dynamic_real_features",
                "num_static_categorical_features",
                "num_static_real_features",
            )
            if getattr(config, name)
        ]
        if unmet or not 1 <= self.n_features <= 2:
            got = ", ".join(f"{n}={getattr(config, n)}" for n in (*unmet, "num_time_features"))
            raise ConfigError(
                "the model wants inputs that a panel's columns and calendar do not give",
                got=got,
                expected="num_time_features 1 (month) or 2 (month, age) and nothing else",
                do="use source.kind=panel with model.kind=module and an adapter",
            )

    def __call__(self, panel: Panel, entities: Int[np.ndarray, " batch"]) -> ModelInputs:
        """Return the call for these entities; the future it needs is blank, and the encoder never sees it."""
        windows = windows_of(panel, entities, self.length, self.before)
        values = windows.values(panel, self.names)
        if len(self.names) == 1:
            values = values[..., 0]
        past = self._features(windows.periods, windows.age)
        ahead = np.arange(1, self.ahead + 1)
        future = self._features(windows.periods[:, -1:] + ahead, windows.age[:, -1:] + ahead)
        rows, served = (a[:, -self.length :] for a in (windows.rows, windows.served))
        return ModelInputs.at_rows(
            panel,
            np.maximum(rows, 0),
            served,
            past_values=torch.from_numpy(np.nan_to_num(values)),
            past_observed_mask=torch.from_numpy(np.isfinite(values)),
            past_time_features=past,
            future_values=torch.zeros(len(rows), self.ahead, *values.shape[2:]),
            future_time_features=future,
        )

    def _features(self, periods: np.ndarray, age: np.ndarray) -> torch.Tensor:
        month, grown = (periods % 12) / 11 - 0.5, np.log10(2.0 + age)
        return torch.from_numpy(np.stack([month, grown][: self.n_features], axis=-1).astype(np.float32))
