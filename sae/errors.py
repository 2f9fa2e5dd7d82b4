"""The errors a user can cause; each says what, got, expected and what to do, and ends the program with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is all the user sees.

    Parameters
    ----------
    what
        What is wrong, one sentence, naming the file or key.
    got, expected, do
        What was found, what would have been right, and what to do about it; empty parts are left out.
    """

    def __init__(self, what: str, *, got: str = "", expected: str = "", do: str = "") -> None:
        parts = [what]
        parts += [
            f"  {name}: {text}" for name, text in (("got", got), ("expected", expected), ("do", do)) if text
        ]
        super().__init__("\n".join(parts))


class ConfigError(UserError):
    """A configuration file or an override is wrong."""


class PanelError(UserError):
    """The panel does not hold what the configuration says, or cannot be trusted."""


class StoreError(UserError):
    """An activation store is damaged, incomplete, or does not hold what was asked of it."""


class CheckpointError(UserError):
    """Saved weights or a saved state are damaged or belong to something else."""


class ConceptError(UserError):
    """A concept file is wrong, unsafe, or looks ahead."""
