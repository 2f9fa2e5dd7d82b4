"""How a command ends where the machine, and not the program, is at fault."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from assay import cli
from sae.errors import StoreError, UserError

ROOT = Path(__file__).resolve().parents[2]


def chained() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/part")
    except OSError as error:
        raise RuntimeError("the writer's thread failed") from error


def told_by_us() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise StoreError("no space left, the same command continues") from error


def ours_in_a_handler() -> None:
    try:
        raise MemoryError
    except MemoryError:
        raise ValueError("ours")  # noqa: B904


def circle() -> None:
    first, second = ValueError("first"), ValueError("ours")
    first.__cause__ = second
    raise second from first


def raising(error: Exception):
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "code", "says"),
    [
        (raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/part")), 1, "/full/part"),
        (raising(OSError(errno.EFBIG, os.strerror(errno.EFBIG))), 1, "disk is full"),
        (raising(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))), 1, "disk is full"),
        (chained, 1, "disk is full"),
        (raising(MemoryError()), 1, "too little memory"),
        (told_by_us, 1, "no space left"),
        (lambda: np.empty(2**50), 1, "too little memory"),
        (lambda: torch.empty(2**55), 1, "too little memory"),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")), 1, "CUDA out of memory. Tried)"),
        (raising(PermissionError(errno.EACCES, "Permission denied", "/closed/x")), 2, "/closed/x"),
        (raising(OSError(errno.EROFS, "Read-only file system", "/cdrom/x")), 2, "/cdrom/x"),
        ((Path(__file__) / "x").mkdir, 2, "Not a directory"),
        (lambda: Path("~no-such-user/x").expanduser(), 2, "~"),
        (raising(UserError("wrong input")), 2, "wrong input"),
    ],
)
def test_what_the_user_can_mend_is_one_message(monkeypatch, command, tmp_path, fail, code, says):
    monkeypatch.setattr(cli, "_inspect", lambda _: fail())
    got, _, said = command("inspect", ".", cwd=tmp_path)
    assert got == code
    assert said.startswith("assay: ") and says in said
    assert ("the same command continues" in said) == (code == 1)


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (raising(ValueError("ours")), ValueError),
        (raising(FileNotFoundError(errno.ENOENT, "No such file", "x")), FileNotFoundError),
        (raising(PermissionError("no name")), PermissionError),
        (ours_in_a_handler, ValueError),
        (circle, ValueError),
    ],
)
def test_what_is_ours_keeps_its_traceback(monkeypatch, tmp_path, fail, kind):
    monkeypatch.setattr(cli, "_inspect", lambda _: fail())
    monkeypatch.setattr(cli, "_handle_signals", lambda _: None)
    with pytest.raises(kind):
        cli.main(["inspect", "."])


SPEAKS = """
import sys
from assay import cli
from assay.console import Console

def speak(_):
    for _ in range(3):
        Console().say("x" * 100_000)
    print("went on", file=sys.stderr)

cli._inspect = speak
cli.main(["inspect", "."])
"""


def test_a_command_goes_on_when_the_reader_of_its_output_has_gone(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "went on\n")
