"""A dictionary on disk: `config.json` and `weights.safetensors`, written beside and renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file

from . import architectures  # noqa: F401 - registers the kinds
from .base import SAE, SAEConfig
from .config import parse_config
from .errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"

EARLIER = {"lista": {"detached": False, "by_rate": False}}
"""What a header means that was written before a kind had these settings, where that is not their default."""


def save_sae(sae: SAE, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write a dictionary; `config.json`, renamed last, names the weights by their hash.

    Parameters
    ----------
    sae
        Its parameters and buffers are saved in their own dtype.
    folder
        Created where missing; a dictionary in it is replaced.
    extra
        JSON values to keep with it: where it came from, how it was trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous().cpu() for name, value in sae.state_dict().items()}
    written = _beside(folder / WEIGHTS)
    try:
        # straight from the tensors' memory: a dictionary may fill half of a host's
        save_file(weights, written)
        with written.open("r+b") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            os.fsync(file.fileno())
        written.replace(folder / WEIGHTS)
    finally:
        written.unlink(missing_ok=True)
    header = {
        "format_version": FORMAT_VERSION,
        "sae": sae.config.to_dict(),
        "d_in": sae.d_in,
        "folded": sae.folded,
        "weights": {"file": WEIGHTS, "blake2b": digest},
        "extra": dict(extra or {}),
    }
    write_atomically(folder / CONFIG, (json.dumps(header, indent=2) + "\n").encode())


def load_sae(folder: Path, device: torch.device | str = "cpu") -> SAE:
    """Read what `save_sae` wrote.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, the weights are not those the header names or do not fit it, or the
        format is newer than this program.
    """
    header = read_header(folder)
    path = folder / WEIGHTS
    try:
        content = path.read_bytes()
        tensors = parse_tensors(content)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}", got=str(error)) from error
    expected = header["weights"]["blake2b"]
    if _digest(content) != expected:
        raise CheckpointError(
            f"{path} is not what {CONFIG} describes",
            got=f"blake2b {_digest(content)}",
            expected=expected,
            do="copy both files again, from the same training run",
        )
    try:
        given = EARLIER.get(header["sae"].get("kind"), {}) | header["sae"]
        config = parse_config(SAEConfig, given, where=str(folder / CONFIG))
        sae = config.build(header["d_in"], generator=torch.Generator())
        sae.load_state_dict(tensors, assign=True)
    except (ConfigError, RuntimeError) as error:
        raise CheckpointError(f"the weights {path} do not fit their header", got=str(error)) from error
    sae.folded = header["folded"]
    return sae.to(device)


def read_header(folder: Path) -> dict[str, Any]:
    """Return the checked content of `config.json`: format_version, sae, d_in, folded, weights, extra.

    Raises
    ------
    CheckpointError
        It is missing, not JSON, lacks a key, or is of another format version.
    """
    path = folder / CONFIG
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no readable dictionary in {folder}", got=str(error), expected=f"{CONFIG} and {WEIGHTS}"
        ) from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of another format", got=f"format_version {version!r}", expected=str(FORMAT_VERSION)
        )
    kinds = {"sae": dict, "d_in": int, "folded": bool, "weights": dict, "extra": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(header.get(name), kind)]
    if wrong or not isinstance(header["weights"].get("blake2b"), str):
        raise CheckpointError(
            f"{path} is damaged", got=f"missing or wrong: {', '.join(wrong) or 'weights.blake2b'}"
        )
    return dict(header)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it."""
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
