"""How fast the activation store writes and reads, against raw system calls on the same bytes in the same run.

    python -m tests.benchmarks.store [--rows N] [--width D] [--dtype float16] [--block-rows N] [--repeats 5]

Contenders take turns; a ratio is formed within each turn, and the median and the best of the turns are shown,
with the CPU seconds that each took. Writing: raw is one write() per file of a shard's size, fsync and rename.
The layout is that of a store nobody gave one, unless --block-rows does; a block is written while the next one is
filled, so there are several.
Reading: raw is pread() of every chunk in random order by two threads into reused buffers, whose memory is new the
first time, as the loader's is in its first epoch; each epoch is held against the raw read before it. The store's
figure includes checksums (on first touch) and the gather of permuted batches of 4096 rows, served in the format on
disk; a third epoch shows what it costs to read them as float32 on the same two cores.
Cold means that the kernel was told to forget the files.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.world import World

READ_THREADS = 2

Turns = dict[str, list[tuple[float, float]]]


def busy_seconds() -> float:
    """CPU time of the whole machine."""
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def make_rows(rows: int, width: int, dtype: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    few = rng.standard_normal((4096, width), np.float32)
    acts = np.tile(few, (-(-rows // 4096), 1))[:rows].astype("float32" if dtype == "bfloat16" else dtype)
    i = np.arange(rows)
    return acts, {"entity": i // 30, "position": i % 30, "time": i % 30, "split": np.zeros(rows, np.int64)}


def raw_write(folder: Path, acts: np.ndarray, shard_rows: int) -> None:
    folder.mkdir()
    for i in range(0, len(acts), shard_rows):
        fd = os.open(folder / f"{i}.partial", os.O_WRONLY | os.O_CREAT)
        os.write(fd, acts[i : i + shard_rows].data.cast("B"))
        os.fsync(fd)
        os.close(fd)
        (folder / f"{i}.partial").replace(folder / str(i))
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def store_write(folder: Path, acts: np.ndarray, columns: dict[str, np.ndarray], layout: StoreLayout) -> None:
    with StoreWriter(folder, hooks={"h": acts.shape[1]}, layout=layout, seed=0, provenance={}) as writer:
        for i in range(0, len(acts), 8192):
            part = {name: column[i : i + 8192] for name, column in columns.items()}
            writer.append({"h": acts[i : i + 8192]}, **part, cursor=i)


def forget(folder: Path) -> None:
    """Tell the kernel to drop what it caches of the files in a folder; what is not on disk yet stays."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        # the writer removes files meanwhile
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def raw_read(store: ActivationStore, buffers: list[bytearray]) -> None:
    table = store.chunks("fit")
    reader = store.reader(0, "fit", "h")
    step = store.description.geometry.chunk_rows * reader.spec.row_bytes
    if not buffers:
        buffers += [bytearray(step) for _ in range(64)]
    places = [reader.locate(int(c)) for c in np.random.default_rng(0).permutation(table.chunk)]

    def read(i: int) -> None:
        path, offset = places[i]
        fd = os.open(path, os.O_RDONLY)
        os.preadv(fd, [buffers[i % len(buffers)]], offset)
        os.close(fd)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(read, range(len(places))))


def loader_of(store: ActivationStore, window_rows: int) -> ShuffledLoader:
    config = LoaderConfig(window_rows=window_rows, threads=READ_THREADS)
    return ShuffledLoader(store, "h", "fit", batch_size=4096, seed=0, world=World(), settings=config)


def drain(loader: ShuffledLoader, *, as_float32: bool = False) -> None:
    for batch in loader:
        if as_float32:
            _ = batch.x


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start, own = time.perf_counter(), own_seconds()
    work()
    return time.perf_counter() - start, own_seconds() - own


def measure_writes(folder: Path, args: argparse.Namespace) -> Turns:
    acts, columns = make_rows(args.rows, args.width, args.dtype)
    layout = StoreLayout(dtype=args.dtype, block_rows=args.block_rows)
    unshuffled = layout.model_copy(update={"shuffle": False})
    shard_rows = layout.geometry({"h": args.width}).shard_rows
    turns: Turns = {"raw": [], "write": [], "write, shuffled": []}
    for turn in range(args.repeats + 1):
        work = {
            "raw": partial(raw_write, folder / "raw", acts, shard_rows),
            "write": partial(store_write, folder / "a", acts, columns, unshuffled),
            "write, shuffled": partial(store_write, folder / "b", acts, columns, layout),
        }
        # who comes first changes: a disk may be quick for some gigabytes and slow afterwards
        names = [*work]
        for name in names[turn % 3 :] + names[: turn % 3]:
            os.sync()
            took = measure(work[name])
            if turn:
                turns[name].append(took)
        for name in ("raw", "a", *(("b",) if turn < args.repeats else ())):
            shutil.rmtree(folder / name)
    seal(folder / "b")
    return turns


def measure_reads(folder: Path, args: argparse.Namespace, *, cold: bool) -> Turns:
    turns: Turns = {
        "raw": [],
        "first epoch": [],
        "raw, again": [],
        "second epoch": [],
        "third, as float32": [],
    }
    window = args.rows // 4
    for turn in range(args.repeats + 1):
        store = ActivationStore.open(folder / "b")
        loader = loader_of(store, window)
        epoch = partial(drain, loader)
        raw = partial(raw_read, store, [])
        work = {"raw": raw, "first epoch": epoch, "raw, again": raw, "second epoch": epoch}
        work["third, as float32"] = partial(drain, loader, as_float32=True)
        for name, one in work.items():
            if cold:
                os.sync()
                forget(folder / "b")
            took = measure(one)
            if turn:
                turns[name].append(took)
        loader.close()
    return turns


def show(title: str, turns: Turns, n_bytes: int) -> None:
    raw = [wall for wall, _ in turns["raw"]]
    print(f"{title:<22}{'median s':>10}{'CPU s':>8}{'GB/s':>8}{'ratio med':>11}{'best':>7}")
    for name, took in turns.items():
        if name == "raw, again":
            raw = [wall for wall, _ in took]
        walls, cpu = [wall for wall, _ in took], statistics.median(cpu for _, cpu in took)
        middle = statistics.median(walls)
        ratio = statistics.median(r / t for r, t in zip(raw, walls, strict=True))
        rate = n_bytes / middle / 1e9
        print(
            f"  {name:<20}{middle:>10.3f}{cpu:>8.2f}{rate:>8.2f}{ratio:>11.2f}{min(raw) / min(walls):>7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1048576)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--block-rows", type=int, default=0, help="0: as a user gets it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    n_bytes = args.rows * args.width * (4 if args.dtype == "float32" else 2)
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    print(f"{args.rows} x {args.width} {args.dtype}, {n_bytes / 1e6:.0f} MB, {args.repeats} turns")
    began, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        show("write + fsync", measure_writes(folder, args), n_bytes)
        show("shuffled read, warm", measure_reads(folder, args, cold=False), n_bytes)
        show("shuffled read, cold", measure_reads(folder, args, cold=True), n_bytes)
    wall = time.perf_counter() - began
    others = (busy_seconds() - busy - own_seconds() + own) / wall
    print(f"other processes used {others:.2f} cores: {'INVALID' if others > 0.2 else 'valid'}")


if __name__ == "__main__":
    main()
