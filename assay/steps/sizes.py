"""Settling `sae.d_sae: auto` and `sae.k: auto` by the harvested rows."""

from __future__ import annotations

import json
from pathlib import Path

from assay.config import RunConfig
from assay.stages import Context
from train.sizes import measure_sizes

FORMAT_VERSION = 1


def make_sizes(context: Context, out: Path) -> None:
    """Find what the rows support and write it down."""
    config = context.config
    assert config.train is not None
    store = context.folder / "activations.zarr"
    found = measure_sizes(store, context.hook, seed=config.seed, settings=config.train.loader)
    how = "fourth moments" if found.from_moments else "principal components"
    context.console.note(
        f"effective rank of the rows {found.effective_rank:.1f}; by their {how} they support "
        f"d_sae {found.d_sae:,} and k {found.k}"
    )
    out.write_text(json.dumps({"format_version": FORMAT_VERSION, **found._asdict()}, indent=1))


def settle_sizes(config: RunConfig, file: Path) -> RunConfig:
    """Return the configuration with what was found in the place of `auto`."""
    found = json.loads(file.read_text())
    return config.sized(found["d_sae"], found["k"])
