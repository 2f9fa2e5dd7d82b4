"""What a command that failed says in place of a traceback, where the user can mend it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from sae.errors import UserError

USAGE = 2
CONTINUES = 1
_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_MEMORY = [os.strerror(errno.ENOMEM)]
_MEMORY_TYPES = {"MemoryError", "OutOfMemoryError", "OutOfMemoryException"}
"""Python's with NumPy's and Arrow's, torch's on a GPU, DuckDB's."""


def told(error: Exception) -> tuple[str, int] | None:
    """Return the message and exit code of what is not ours to mend, None of anything else.

    Wrong input and places that cannot be used are 2. A full disk and too little memory are 1, since the same command
    continues once there is more; libraries wrap them, so they are told by their words, and by what they came from.
    """
    short = _short(error)
    if isinstance(error, UserError):
        return str(error), CONTINUES if short else USAGE
    if isinstance(error, OSError) and error.errno in _PLACE and error.filename is not None:
        place = UserError(
            f"{os.fsdecode(error.filename)} cannot be used",
            got=error.strerror or "",
            do="check the path, and who may read and write there",
        )
        return str(place), USAGE
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return "a path begins with ~ and a name that is no user here", USAGE
    if short:
        return f"{short}; nothing finished is lost, the same command continues with more", CONTINUES
    return None


def _short(error: Exception) -> str:
    """Return what there was too little of, and the words of the error that says so, or nothing."""
    for cause in _causes(error):
        text = str(cause)
        names = {kind.__name__ for kind in type(cause).__mro__}
        what = "the disk is full" if any(words in text for words in _FULL) else ""
        if names & _MEMORY_TYPES or any(words in text for words in _MEMORY):
            what = "there is too little memory"
        if what:
            return f"{what} ({text.splitlines()[0]})" if text else what
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from; one met while another was handled may be our own mistake."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__
