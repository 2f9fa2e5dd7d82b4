"""Dictionaries in the formats of other libraries, one file each; importing this package finds them all."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from pathlib import Path

from sae.base import SAE
from sae.errors import CheckpointError, ConfigError

from .format import Format, Origin

__all__ = ["FORMATS", "Format", "Origin", "export", "load"]

PARTIAL = ".partial"
"""Where an export is written, in its folder."""

FORMATS: dict[str, Format] = {}
"""By name."""

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    if hasattr(_module, "FORMAT"):
        FORMATS[_module.FORMAT.name] = _module.FORMAT


def load(folder: Path, format_: str = "auto") -> SAE:
    """Read a dictionary of any known format; it reads raw activations.

    Parameters
    ----------
    folder
        What the library's own loader takes.
    format_
        A name in `FORMATS`; auto tells it by the files that are there.

    Raises
    ------
    ConfigError
        No format of that name.
    CheckpointError
        No dictionary in the folder, a damaged one, or one that cannot be expressed here.
    """
    if format_ == "auto":
        found = [f for f in FORMATS.values() if f.holds(folder)]
        if len(found) != 1:
            raise CheckpointError(
                f"no dictionary of a known format in {folder}"
                if not found
                else f"{folder} holds dictionaries of several formats",
                got=", ".join(f.name for f in found),
                expected="one of "
                + "; ".join(f"{f.name}: {' and '.join(f.files)}" for f in FORMATS.values()),
            )
        return found[0].read(folder)
    return _find(format_).read(folder)


def export(sae: SAE, folder: Path, format_: str, *, origin: Origin) -> None:
    """Write a folded dictionary in another library's format; an earlier export there is replaced once it is whole.

    Raises
    ------
    ConfigError
        No format of that name, or the folder holds something else.
    CheckpointError
        The dictionary is not folded, or the format cannot express it.
    """
    target = _find(format_)
    if not sae.folded:
        raise CheckpointError(
            "the dictionary reads scaled activations", do="fold it first; training saves it folded"
        )
    ours = {*target.files, PARTIAL}
    others = [] if not folder.is_dir() else sorted({p.name for p in folder.iterdir()} - ours)
    if others or folder.is_file():
        raise ConfigError(
            f"{folder} holds something other than a dictionary for {format_}",
            got=", ".join(others[:5]) or "a file",
            expected="an empty folder, or an earlier export",
            do="choose another place",
        )
    partial = folder / PARTIAL
    # left by an export that was killed
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        target.write(sae, partial, origin)
        settings, *weights = target.files
        # they go first and come last, so that they never lie beside the weights of another dictionary
        (folder / settings).unlink(missing_ok=True)
        for name in (*weights, settings):
            (partial / name).replace(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError("unknown format of dictionaries", got=repr(name), expected=", ".join(FORMATS))
    return FORMATS[name]
