"""Folders that are written beside their place and renamed, and never take the place of something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.errors import ConfigError


@contextmanager
def replaced_folder(out: Path, marker: str, kind: str) -> Iterator[Path]:
    """Give an empty folder to fill; on success it takes the place of `out`, otherwise it is removed.

    Parameters
    ----------
    out
        The folder's final place; what is there may only be empty, or of the same kind.
    marker, kind
        JSON file whose `kind` tells what the folder is; whoever fills the folder writes it.

    Raises
    ------
    ConfigError
        `out` is a file, a folder of something else, or one that the program was started in.
    """
    check_place(out, marker, kind)
    # a link stays, and what it leads to is replaced
    out = out.resolve()
    if Path.cwd().is_relative_to(out):
        raise ConfigError(
            f"{out} is where you are, and would be replaced",
            do=f"go elsewhere first, and name the {kind} from there",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if out.exists():
            out.rename(old)
        beside.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_place(out: Path, marker: str, kind: str) -> None:
    """Raise ConfigError where `out` holds something other than a folder of this kind."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file", expected=f"a folder for the {kind}", do="choose another place")
    if (out / marker).is_file():
        try:
            if json.loads((out / marker).read_text(encoding="utf-8")).get("kind") == kind:
                return
        except (ValueError, AttributeError):
            pass
    elif not any(out.iterdir()):
        return
    raise ConfigError(
        f"{out} holds something that is not a {kind}",
        got=", ".join(sorted(p.name for p in out.iterdir())[:5]) or "nothing",
        expected=f"an empty folder, or an earlier {kind}",
        do="choose another place, or remove it yourself",
    )
