"""One pool of processes for each number of them, shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.distributed.pool import Mesh, Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/distributed" in item.path.as_posix():
            item.add_marker(pytest.mark.dist)
            item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[[Mesh], Pool]]:
    """The pool that a mesh needs."""
    pools: dict[int, Pool] = {}

    def get(mesh: Mesh) -> Pool:
        size = mesh[0] * mesh[1]
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """What the entry point switches on."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")
