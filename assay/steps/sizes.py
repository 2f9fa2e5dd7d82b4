"""Settling `sae.d_sae: auto` and `sae.k: auto` by the harvested rows."""

from __future__ import annotations

import json
from pathlib import Path

from assay.config import RunConfig
from assay.stages import Context
from sae.errors import UserError
from train.sizes import measure_sizes

FORMAT_VERSION = 1


def make_sizes(context: Context, out: Path) -> None:
    """Find what the rows support and write it down."""
    config = context.config
    assert config.train is not None
    store = context.folder / "activations.zarr"
    found = measure_sizes(store, context.hook, seed=config.seed, settings=config.train.loader)
    rank = f"effective rank of the rows {found.effective_rank:.1f}"
    if found.told_by == "nothing":
        context.console.note(
            f"{rank}: their variance is spread over so much (more than a quarter of the dimensions, or of the rows there "
            "are) that it tells no sizes, so what is usual is taken where none is given, "
            f"d_sae {found.d_sae:,} and k {found.k}; "
            "a sweep over sae.k shows what reconstruction costs"
        )
    else:
        context.console.note(
            f"{rank}; by their {found.told_by} they support d_sae {found.d_sae:,} and k {found.k}"
        )
    if config.sweep is not None and config.sized(found.d_sae, found.k).sweep is None:
        context.console.note("the sweep asks for no other dictionary than this one")
    out.write_text(json.dumps({"format_version": FORMAT_VERSION, **found._asdict()}, indent=1))


def settle_sizes(config: RunConfig, file: Path) -> RunConfig:
    """Return the configuration with what was found in the place of `auto`.

    Raises
    ------
    UserError
        The file is damaged, or of another version.
    ConfigError
        Other settings do not go with the numbers.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version, d_sae, k = found["format_version"], int(found["d_sae"]), int(found["k"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged", got=repr(error), do="remove it; it is made anew") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} was written by another version",
            got=str(version),
            expected=str(FORMAT_VERSION),
            do="remove it; it is made anew",
        )
    return config.sized(d_sae, k)
