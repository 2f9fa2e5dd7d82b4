"""Several trainings of one process, side by side on its threads or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch

from sae.world import World

Item = TypeVar("Item")
Found = TypeVar("Found")


class SideBySide:
    """Does the same for each of several items, while it is open.

    One process on a CPU shares its threads out, each item at work getting as many: two products on one thread each
    are done sooner than one after the other on two. On a GPU, and where several processes have to meet in the same
    order, the items take turns.

    Parameters
    ----------
    items
        How many there will be.
    world
        Who computes.

    Attributes
    ----------
    workers
        How many are at work at once.
    """

    def __init__(self, items: int, world: World) -> None:
        self._threads = torch.get_num_threads()
        alone = world.size == 1 and world.device.type == "cpu"
        self.workers = min(items, self._threads) if alone else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> SideBySide:
        if self.workers > 1:
            # a thread's number of threads is its own
            share = self._threads // self.workers
            self._pool = ThreadPoolExecutor(self.workers, "assay-member", torch.set_num_threads, (share,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            # threads made from now on get as many as this one again
            torch.set_num_threads(self._threads)

    def each(self, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """Return what `work` makes of each item; what the first in their order raises is raised when all have ended."""
        if self._pool is None:
            return [work(item) for item in items]
        futures = [self._pool.submit(work, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]
