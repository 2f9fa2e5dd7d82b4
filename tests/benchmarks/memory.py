"""Peak memory of the writer and of the reader, each in a process of its own, against what they are allowed.

    python -m tests.benchmarks.memory [--rows N] [--width D] [--folder DIR]

Writer: one block and 2 shards. Reader: 2 windows and 3 batches. What counts is the peak of the process beyond what
it had after its imports; 32 MiB are for threads and heap. Meanwhile the kernel is told twenty times a second to
forget the store's pages, so both work as if the store were larger than the memory that is left to cache it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from activations_cache.schema import StoreLayout

from .store import forget

SLACK = 32 << 20
BATCH = 4096
BLOCK = 65536

CHILD = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.schema import StoreLayout
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.world import World
role, path, rows, width = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
batch, block = int(sys.argv[5]), int(sys.argv[6])
x = np.random.default_rng(0).standard_normal((batch, width)).astype(np.float16)
torch.from_numpy(x).float().sum()

def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) << 10

before = peak()
if role == "write":
    layout = StoreLayout(dtype="float16", block_rows=block)
    with StoreWriter(path, hooks={"h": width}, layout=layout, seed=0, provenance={}) as writer:
        for i in range(0, rows, batch):
            n = np.arange(i, i + batch)
            writer.append({"h": x}, entity=n // 30, position=n % 30, time=n, split=n * 0, cursor=i)
else:
    store = ActivationStore.open(path, allow_incomplete=True)
    config = LoaderConfig(window_rows=block)
    loader = ShuffledLoader(store, "h", "fit", batch_size=batch, seed=0, world=World(), settings=config)
    for _ in loader:
        pass
print(peak() - before)
"""


def used(role: str, path: Path, rows: int, width: int) -> int:
    """Peak bytes of a process beyond its imports."""
    numbers = [str(n) for n in (rows, width, BATCH, BLOCK)]
    command = [sys.executable, "-c", CHILD, role, str(path), *numbers]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while child.poll() is None:
        forget(path)
        time.sleep(0.05)
    assert child.returncode == 0 and child.stdout is not None
    return int(child.stdout.read())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8 * BLOCK)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    stored, served = args.width * 2 + 3 * 8, args.width * 4
    shard = StoreLayout(dtype="float16", block_rows=BLOCK).geometry({"h": args.width}).shard_rows * stored
    allowed = {"write": BLOCK * (stored + 16) + 2 * shard, "read": 2 * BLOCK * stored + 3 * BATCH * served}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for role, limit in allowed.items():
            peak = used(role, Path(name) / "a.zarr", args.rows, args.width)
            verdict = "fine" if peak <= limit + SLACK else "TOO MUCH"
            print(f"{role:<6} peak {peak / 2**20:6.0f} MiB, allowed {limit / 2**20:6.0f} + 32 MiB: {verdict}")


if __name__ == "__main__":
    main()
