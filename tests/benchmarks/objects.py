"""How fast a store on an object store is read, by threads, against one HTTP range request after the other.

    python -m tests.benchmarks.objects [--rows N] [--width D] [--repeats 5] [--latency 0.03] [--url URL]

Without a URL the server is moto's on loopback, one Python process that shares the machine: the limit of what it
can send is its own, and a latency before each answer, such as a real object store has, shows that requests
overlap. A turn reads all chunks of one hook in random order, whole, checksum included, by 1, 8 and 32 threads,
and batches of a loader; the median of the turns is shown. Provisional where the machine is shared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version

import numpy as np
import pytest

from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.world import World
from tests.activations_cache.store.s3_server import new_bucket, running_server

THREADS = (1, 8, 32)


def fill(url: str, rows: int, width: int) -> float:
    """Write the store and return the seconds it took."""
    acts = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    i = np.arange(rows)
    columns = {"entity": i // 30, "position": i % 30, "time": i % 30, "split": np.zeros(rows, np.int64)}
    layout = StoreLayout(block_rows=16384)
    began = time.perf_counter()
    with StoreWriter(url, hooks={"h": width}, layout=layout, seed=0, provenance={}) as writer:
        for k in range(0, rows, 4096):
            part = {name: column[k : k + 4096] for name, column in columns.items()}
            writer.append({"h": acts[k : k + 4096]}, **part, cursor=k + 4096)
    seal(url)
    return time.perf_counter() - began


def read_chunks(url: str, threads: int) -> None:
    store = ActivationStore.open(url)
    table = store.chunks("fit")

    def one(c: int) -> None:
        out = np.empty((int(table.rows[c]), store.hooks["h"]), np.float32)
        store.reader(int(table.writer[c]), "fit", "h").read(int(table.chunk[c]), 0, out)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, np.random.default_rng(1).permutation(len(table.rows)).tolist()))


def read_batches(url: str) -> None:
    store = ActivationStore.open(url)
    loader = ShuffledLoader(
        store,
        ["h"],
        "fit",
        batch_size=4096,
        seed=0,
        world=World(),
        settings=LoaderConfig(window_rows=store.n_rows // 4),
    )
    for _ in loader.batches(loader.batches_per_epoch):
        pass
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--latency", type=float, default=0.0, help="seconds before each answer of moto's server"
    )
    parser.add_argument("--url", default="", help="instead of a new bucket on moto's server")
    args = parser.parse_args()
    with ExitStack() as stack:
        if not args.url:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name, value in stack.enter_context(running_server(args.latency)).items():
                patch.setenv(name, value)
        url = args.url or f"{new_bucket()}/bench"
        megabytes = args.rows * args.width * 4 / 1e6
        print(
            f"python {platform.python_version()}, obstore {version('obstore')}, {megabytes:.0f} MB at {url}, "
            f"written at {megabytes / fill(url, args.rows, args.width):.0f} MB/s"
        )
        contenders: dict[str, Callable[[], None]] = {
            f"chunks by {n} threads": lambda n=n: read_chunks(url, n) for n in THREADS
        }
        contenders["batches of a loader"] = lambda: read_batches(url)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.repeats):
            for name, read in contenders.items():
                began = time.perf_counter()
                read()
                seconds[name].append(time.perf_counter() - began)
        for name, taken in seconds.items():
            print(
                f"{name:22s} {megabytes / statistics.median(taken):6.0f} MB/s, best {megabytes / min(taken):.0f}"
            )


if __name__ == "__main__":
    main()
