"""What every format of dictionaries is, and the files that formats are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor

from sae.base import SAE
from sae.checkpoint import write_atomically
from sae.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """Where a dictionary comes from, for libraries that keep it beside the weights.

    Attributes
    ----------
    model, hook
        Names of the model and of the place in it; empty = unknown.
    context
        Longest sequence that was read; None = unknown.
    """

    model: str = ""
    hook: str = ""
    context: int | None = None


@dataclass(frozen=True)
class Format:
    """One library's folder.

    Attributes
    ----------
    name
        As the user gives it.
    files
        What a folder of this format holds: the settings first; the last one is of this format alone.
    write
        Writes a folded dictionary into an existing folder.
    read
        Reads one back, folded.
    """

    name: str
    files: tuple[str, ...]
    write: Callable[[SAE, Path, Origin], None]
    read: Callable[[Path], SAE]

    def holds(self, folder: Path) -> bool:
        """Return whether a folder is of this format."""
        return (folder / self.files[-1]).is_file()


def read_settings(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises
    ------
    CheckpointError
        There is no such file, or it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}", got=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged", got=type(value).__name__, expected="a JSON object")
    return value


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in float32 where they are real.

    Raises
    ------
    CheckpointError
        There is no such file, or it is damaged.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}", got=str(error)) from error
    return as_float32(tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    write_atomically(path, dump_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with real ones in float32: weights of less are exact in it."""
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def require(tensors: Mapping[str, Tensor], names: tuple[str, ...], *, where: Path) -> list[Tensor]:
    """Return the named tensors, which must be all there are.

    Raises
    ------
    CheckpointError
        Some are missing, or there are others, which would be ignored.
    """
    missing, others = set(names) - set(tensors), set(tensors) - set(names)
    if missing or others:
        raise CheckpointError(
            f"{where} does not hold the tensors of its architecture",
            got=", ".join(sorted(tensors)),
            expected=", ".join(names),
        )
    return [tensors[name] for name in names]
