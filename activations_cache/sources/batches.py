"""Calls of a model that the user prepares: any data, any layout, as a sequence of ModelInputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from pydantic import ConfigDict, Field

from activations_cache.inputs import ModelInputs
from activations_cache.models import import_object, module_hash, named_files, source_file
from activations_cache.splits import SplitConfig
from sae.errors import ConfigError
from sae.world import World

from .base import ActivationSource, HarvestInputs, SourceConfig
from .reading import EntitySplits, ModelSource


class BatchesSourceConfig(SourceConfig):
    """Batches that a function of the user's makes, read by the configured model."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)
    needs: ClassVar[tuple[str, ...]] = ("model",)
    version: ClassVar[int] = 2

    kind: Literal["batches"] = "batches"
    import_: str = Field(alias="import", pattern=r"^[\w.]+:[\w.]+$")
    """package.module:function that returns a sequence of ModelInputs (`len` and `[i]`), always the same; its
    attribute `ids`, if it has one, lists the user's id of every entity code."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function, such as a path."""
    split: SplitConfig = SplitConfig()
    """How entities are divided."""

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source."""
        assert inputs.model is not None
        model = inputs.model.load(inputs.fitted).to(inputs.device)
        batches = import_object(self.import_, "source.import")(**self.arguments)
        if not hasattr(batches, "__len__") or not hasattr(batches, "__getitem__"):
            raise ConfigError(
                f"source.import={self.import_} did not return a sequence",
                got=type(batches).__name__,
                expected="something with len() and [i] -> ModelInputs",
            )
        provenance = {
            "source": self.to_dict(),
            "model": inputs.model.to_dict(),
            "weights": module_hash(model),
        }
        return ModelSource(BatchesFeed(batches, self.split), model, inputs.hooks, provenance=provenance)

    def files(self) -> Sequence[Path]:
        """Return the source file of the function, and what its arguments name."""
        return sorted({source_file(self.import_), *named_files(self.arguments)})


class BatchesFeed:
    """A sequence of calls; each is one rank's, in turn. All are looked at once, to count rows and entities."""

    def __init__(self, batches: Sequence[ModelInputs], split: SplitConfig) -> None:
        self._batches = batches
        self.n_rows, seen = 0, np.empty(0, np.int64)
        for inputs in (batches[i] for i in range(len(batches))):
            self.n_rows += int(inputs.real.sum())
            seen = np.union1d(seen, inputs.entity[inputs.real])
        n_codes = int(seen[-1]) + 1 if len(seen) else 0
        ids = getattr(batches, "ids", None)
        if ids is not None and len(ids) < n_codes:
            raise ConfigError(
                "the batches' `ids` are too few", got=str(len(ids)), expected=f"at least {n_codes}"
            )
        names = pa.array([str(i) for i in (range(n_codes) if ids is None else ids)], pa.string())
        self.entities = pa.table({"entity": seen, "id": names.take(pa.array(seen))})
        self._splits = EntitySplits(split, names)

    def plan(self, world: World) -> Iterator[int]:
        """Yield every size-th call."""
        yield from range(world.rank, len(self._batches), world.size)

    def load(self, step: int) -> ModelInputs:
        """Return one call."""
        return self._batches[step]

    def split(
        self, entity: Int[np.ndarray, " rows"], time: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " rows"]:
        """Return the split of rows."""
        return self._splits.of(entity, time)
