"""Checkpoints of a run: all that the next step depends on, written beside and renamed, the last two kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from sae.base import SAE
from sae.checkpoint import write_atomically
from sae.errors import CheckpointError

from .state import TrainState

FORMAT_VERSION = 1
KEPT = 2
_PREFIX = "step-"
_FROM_ADAM = "adam."
_FROM_SAE = "sae."


def save_checkpoint(
    folder: Path,
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    state: TrainState,
    *,
    loader: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> Path:
    """Write `folder/step-N` and remove all but the last two.

    Parameters
    ----------
    folder
        The checkpoints of one run.
    sae, optimiser, state
        What the next step depends on.
    loader
        The loader's position, JSON values.
    identity
        What the run is, JSON values; a checkpoint continues only a run of the same identity.
    """
    tensors = {_FROM_SAE + name: value for name, value in sae.state_dict().items()}
    tensors |= {f"{_FROM_ADAM}{i}.{name}": value for i, name, value in _adam_tensors(optimiser)}
    tensors["silent_rows"] = state.silent_rows
    content = dump_tensors({name: value.detach().contiguous().cpu() for name, value in tensors.items()})
    record = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "rows": state.rows,
        "loader": dict(loader),
        "identity": dict(identity),
        "tensors_blake2b": _digest(content),
    }
    place = folder / f"{_PREFIX}{state.step:010d}"
    temporary = folder / f".{place.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_atomically(temporary / "state.safetensors", content)
    write_atomically(temporary / "state.json", json.dumps(record, indent=2).encode())
    shutil.rmtree(place, ignore_errors=True)
    temporary.replace(place)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return place


def load_checkpoint(
    place: Path,
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    *,
    identity: Mapping[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """Put a checkpoint back into `sae` and `optimiser`; return the state and the loader's position.

    Raises
    ------
    CheckpointError
        The checkpoint is damaged, or belongs to another run.
    """
    remove = f"remove {place} to continue from the one before, or its folder to start again"
    try:
        record = json.loads((place / "state.json").read_text())
        content = (place / "state.safetensors").read_bytes()
        if record["format_version"] != FORMAT_VERSION or record["tensors_blake2b"] != _digest(content):
            raise ValueError("the checksum or the format version does not match")
        tensors = parse_tensors(content)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {place} is damaged", got=str(error), do=remove) from error
    known, mine = record["identity"], json.loads(json.dumps(dict(identity)))
    differ = [name for name in sorted(known | mine) if known.get(name) != mine.get(name)]
    if differ:
        raise CheckpointError(
            f"the checkpoint {place} belongs to another run",
            got="; ".join(f"{name} {mine.get(name)}" for name in differ),
            expected="; ".join(f"{name} {known.get(name)}" for name in differ),
            do="remove its folder to start again",
        )
    device = sae.W_dec.device
    own = {
        name.removeprefix(_FROM_SAE): value for name, value in tensors.items() if name.startswith(_FROM_SAE)
    }
    sae.load_state_dict(own)
    _load_adam(optimiser, {name: value for name, value in tensors.items() if name.startswith(_FROM_ADAM)})
    state = TrainState(tensors["silent_rows"].to(device), step=record["step"], rows=record["rows"])
    return state, dict(record["loader"])


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def _adam_tensors(optimiser: torch.optim.Optimizer) -> list[tuple[int, str, Tensor]]:
    state = optimiser.state_dict()["state"]
    return [(i, name, value) for i, slots in state.items() for name, value in slots.items()]


def _load_adam(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.removeprefix(_FROM_ADAM).split(".")
        slots.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
