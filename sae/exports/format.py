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

Layout = Mapping[str, tuple[str, ...]]
"""By name what a tensor's dimensions count, such as ("d_sae", "d_in"); () is a single number."""


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


def require(tensors: Mapping[str, Tensor], layout: Layout, *, where: Path) -> list[Tensor]:
    """Return the tensors of a layout, in its order; they must be all there are.

    Raises
    ------
    CheckpointError
        Some are missing, or there are others, which would be ignored; their sizes do not fit together; some hold
        what is not finite.
    """
    if set(layout) != set(tensors):
        raise CheckpointError(
            f"{where} does not hold the tensors of its architecture",
            got=", ".join(sorted(tensors)),
            expected=", ".join(layout),
        )
    if not _fit_together(tensors, layout):
        raise CheckpointError(
            f"the tensors in {where} do not fit together",
            got=", ".join(f"{name} {list(tensors[name].shape)}" for name in layout),
            expected=", ".join(f"{name} [{', '.join(axes)}]" for name, axes in layout.items()),
        )
    require_finite(tensors, where=where)
    return [tensors[name] for name in layout]


def _fit_together(tensors: Mapping[str, Tensor], layout: Layout) -> bool:
    """Return whether all have the dimensions they should, and what these count is the same number everywhere, not 0."""
    sizes: set[tuple[str, int]] = set()
    for name, axes in layout.items():
        tensor = tensors[name]
        if tensor.ndim != len(axes) and (axes or tensor.numel() != 1):
            return False
        sizes.update(zip(axes, tensor.shape, strict=False))
    return len(dict(sizes)) == len(sizes) and all(size for _, size in sizes)


def require_finite(tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Refuse tensors with NaN or infinity in them.

    Raises
    ------
    CheckpointError
        There are some.
    """
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise CheckpointError(
            f"{where} holds weights that are not finite",
            got=f"NaN or infinity in {', '.join(wrong)}",
            do="train it again",
        )
