"""A finished labels folder in memory, arranged as the pages read it."""

from __future__ import annotations

import hashlib
import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from label.provenance import configuration
from label.tables import read_summary, read_table

Record = dict[str, Any]


class ByFeature:
    """Rows of a table by feature, turned into records only when asked for: examples can be many."""

    def __init__(self, table: pa.Table) -> None:
        order = pc.sort_indices(table, sort_keys=[("feature", "ascending")])
        self._table = table.take(order).combine_chunks()
        self._feature = self._table["feature"].to_numpy()
        self.columns: list[str] = self._table.column_names

    def __getitem__(self, feature: int) -> list[Record]:
        start, end = np.searchsorted(self._feature, [feature, feature + 1])
        rows: list[Record] = self._table.slice(start, end - start).to_pylist()
        return rows


@dataclass(frozen=True)
class Labels:
    """What a labelling found.

    Attributes
    ----------
    summary
        summary.json.
    features, concepts, groups
        Rows of the tables.
    associations, examples, histograms, effects
        Rows of the tables by feature, in the tables' order.
    run, evaluation
        What the run folder and the dictionary's evaluation say; empty where they are not there.
    show_id
        How an entity is called on the pages.
    """

    summary: Record
    features: list[Record]
    concepts: list[Record]
    groups: list[Record]
    associations: ByFeature
    examples: ByFeature
    histograms: ByFeature
    effects: ByFeature
    run: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    show_id: Callable[[str], str]

    @staticmethod
    def read(
        folder: Path, run: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None, *, hash_ids: bool
    ) -> Labels:
        """Read every table of a labels folder.

        Raises
        ------
        ConfigError
            A table is missing or damaged, or of another format version.
        """

        def plain(name: str) -> list[Record]:
            rows: list[Record] = read_table(folder, name).to_pylist()
            return rows

        def grouped(name: str) -> ByFeature:
            return ByFeature(read_table(folder, name))

        return Labels(
            summary=read_summary(folder),
            features=plain("features"),
            concepts=plain("concepts"),
            groups=plain("groups"),
            associations=grouped("associations"),
            examples=grouped("examples"),
            histograms=grouped("histograms"),
            effects=grouped("effects"),
            run=run or {},
            evaluation=evaluation or {},
            show_id=hashed_id(secrets.token_bytes(16)) if hash_ids else str,
        )

    @cached_property
    def labelled(self) -> list[Record]:
        """Labelled features, in the order of their number."""
        return [f for f in self.features if f["status"] == "labelled"]

    @cached_property
    def pages(self) -> dict[int, str]:
        """File names of the features that have a page, from the report's root."""
        width = max(4, len(str(max((f["feature"] for f in self.features), default=0))))
        return {f["feature"]: f"features/{f['feature']:0{width}d}.html" for f in self.labelled}

    @cached_property
    def by_concept(self) -> dict[str, list[Record]]:
        """Features whose best concept on discover this is, labelled or not."""
        found: dict[str, list[Record]] = defaultdict(list)
        for feature in self.features:
            if feature["concept"] is not None:
                found[feature["concept"]].append(feature)
        return dict(found)

    @cached_property
    def _made_with(self) -> dict[str, Any]:
        return configuration(self.run)

    @cached_property
    def concept_text(self) -> dict[str, str]:
        """What each concept says; its id where nothing is said."""
        return {c["concept"]: c["text"] or c["concept"] for c in self.concepts}

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.get("name") or self.config("name") or "Feature dictionary")

    def config(self, *path: str) -> Any:
        """Return one value of the configuration that the run was made with, or None."""
        value: Any = self._made_with
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def hashed_id(key: bytes) -> Callable[[str], str]:
    """Return a function that replaces ids by short hashes under a key.

    The key is drawn anew for each report and kept nowhere: ids can usually be enumerated, so that a hash
    without a secret would hide nothing.
    """
    return lambda name: hashlib.blake2b(name.encode(), key=key, digest_size=4).hexdigest()
