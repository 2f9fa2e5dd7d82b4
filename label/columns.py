"""Features as columns for other models: their values on a panel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from activations_cache.models import weights_hash
from activations_cache.reference.shape import load_model
from activations_cache.sources.panel import PanelSource
from sae.checkpoint import load_sae
from sae.errors import CheckpointError, PanelError
from sae.world import World

from .bundle import read_bundle


def feature_columns(
    bundle: Path, model: Path, panel: Path, *, features: Sequence[int] | None = None
) -> pa.Table:
    """Return the activations of a bundle's features on every row of a panel.

    Parameters
    ----------
    bundle
        An exported dictionary.
    model
        Folder of the CreditTransformer whose activations the dictionary reads.
    panel
        Folder of a prepared panel (`activations_cache.panel.prepare`); its splits play no part here.
    features
        Which features; None for all labelled ones.

    Returns
    -------
    pa.Table
        `entity` (the user's id), `time` (period index), and a float32 column per feature, rows in the
        panel's order. A feature fires strictly above the `threshold` in its field's metadata.

    Raises
    ------
    CheckpointError
        The bundle is damaged, or the model is not the one it was made for.
    PanelError
        The panel's columns are not those that the model reads.
    """
    dictionary = read_bundle(bundle)
    sae = load_sae(bundle)
    records = _chosen(bundle, features)
    source = _source(dictionary, model, panel)
    rows = source.n_rows
    values = np.zeros((len(records), rows), dtype=np.float32)
    place = np.full(sae.d_sae, -1)
    place[[r["feature"] for r in records]] = np.arange(len(records))
    hook = source.names[0]
    with torch.inference_mode():
        for batch in source.batches(World.single()):
            codes = sae.encode(torch.from_numpy(batch.acts[hook]))
            row = (source.panel.offsets[batch.entity] + batch.position)[codes.row_ids().numpy()]
            column = place[codes.features.numpy()]
            values[column[column >= 0], row[column >= 0]] = codes.values.numpy()[column >= 0]
    ids = source.entities.sort_by("entity")["id"].take(pa.array(source.panel.entity))
    fields = [pa.field("entity", pa.string()), pa.field("time", pa.int64()), *map(_field, records)]
    arrays = [ids.combine_chunks(), pa.array(source.panel.time), *map(pa.array, values)]
    return pa.table(arrays, schema=pa.schema(fields))


def _chosen(bundle: Path, features: Sequence[int] | None) -> list[dict[str, Any]]:
    keep = ["feature", "status", "column", "description", "threshold", "concept", "low", "high"]
    records: list[dict[str, Any]] = pq.read_table(bundle / "features.parquet", columns=keep).to_pylist()
    if features is None:
        return [r for r in records if r["status"] == "labelled"]
    by_number = {r["feature"]: r for r in records}
    unknown = sorted(set(features) - by_number.keys())
    if unknown:
        raise CheckpointError(f"{bundle} has no feature {unknown[0]}", expected=f"0 to {len(records) - 1}")
    return [by_number[j] for j in dict.fromkeys(features)]


def _source(dictionary: dict[str, Any], model: Path, panel: Path) -> PanelSource:
    expected = dictionary["provenance"]["model"]["weights"]
    got = weights_hash(model)
    if expected is not None and got != expected:
        raise CheckpointError(
            f"{model} is not the model that this dictionary reads",
            got=f"weights {got}",
            expected=f"weights {expected}",
            do="give the model folder of the run that the dictionary was exported from",
        )
    network = load_model(model)
    source = PanelSource(panel, network, [dictionary["hook"]], provenance={}, seed=0)
    if list(source.panel.columns) != list(network.config.columns):
        raise PanelError(
            f"the panel in {panel} has other columns than the model reads",
            got=", ".join(source.panel.columns),
            expected=", ".join(network.config.columns),
        )
    return source


def _field(record: dict[str, Any]) -> pa.Field:
    facts = {"description": record["description"], "threshold": json.dumps(record["threshold"])}
    return pa.field(record["column"], pa.float32(), metadata=facts)
