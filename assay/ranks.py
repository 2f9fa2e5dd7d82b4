"""How the processes of one command go through its stages: the first decides, the others join where all work.

The first process says of each stage that is everybody's whether it runs or is fresh, and at last that it has
ended. The others only listen, so one that is late, or dead, holds nobody up. They talk through the key-value store
that `torchrun` keeps for its processes, which is new at every start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore

from sae.rendezvous import shared_store
from sae.world import World

Word = Literal["runs", "is fresh"]

_END = "end"
_POLL_SECONDS = 0.1
_MEETING_SECONDS = 60.0


class Ranks:
    """What the first process says and the others hear; a single process speaks to nobody.

    Parameters
    ----------
    world
        Who takes part.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Tell the others at the end of the block, however it ends, that there is nothing more to come."""
        try:
            yield
        finally:
            self._tell(_END, "")

    def say(self, stage: str, word: Word) -> None:
        """Tell the others what becomes of a stage."""
        self._tell(stage, word)

    def hear(self, stage: str) -> Word | None:
        """Wait until the first process says what becomes of a stage; None if it has ended instead."""
        try:
            while not self._store.check([stage]):
                if self._store.check([_END]):
                    return None
                time.sleep(_POLL_SECONDS)
            return "runs" if self._store.get(stage) == b"runs" else "is fresh"
        except distributed.DistNetworkError:
            # it took the store with it; whoever started us sees how it ended
            return None

    def _tell(self, key: str, word: str) -> None:
        if self._world.size > 1:
            self._store.set(key, word)

    @cached_property
    def _store(self) -> Any:
        return PrefixStore(
            "assay", shared_store(self._world.rank, self._world.size, timeout=_MEETING_SECONDS)
        )
