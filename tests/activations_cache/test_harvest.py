"""One harvest on one or many processes, interrupted or not, holds every row of the source once."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from activations_cache.harvest import HarvestConfig, HarvestProgress, estimate, harvest, probe
from activations_cache.schema import StoreLayout
from activations_cache.splits import hash_uniform
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.errors import StoreError
from sae.world import World

ROOT = Path(__file__).parents[2]
LAYOUT = StoreLayout(chunk_rows=64, shard_rows=512, block_rows=1000)
N, LENGTH = 240, 25


class Batch(NamedTuple):
    """What a source yields."""

    acts: dict[str, np.ndarray]
    entity: np.ndarray
    position: np.ndarray
    time: np.ndarray
    split: np.ndarray
    cursor: int


class Rows:
    """Entities of 25 rows whose every number is a function of who and when, ten entities to a batch."""

    def __init__(
        self, n: int = N, *, pause: float = 0.0, stop: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self.hooks, self.n_rows, self.n = {"h": 4}, n * LENGTH, n
        self.provenance = {"source": "rows", "entities": n}
        ids = [f"E{i}" for i in range(n)]
        self.entities = pa.table({"entity": np.arange(n), "id": ids})
        self._u = hash_uniform(0, "rank", ids)
        self._pause, self._stop = pause, stop

    def batches(self, world: World, cursor: int = 0) -> Iterator[Batch]:
        mine = np.flatnonzero(np.floor(self._u * world.size) == world.rank)
        for i, start in enumerate(range(0, len(mine), 10)):
            if i >= cursor:
                self._stop(world.rank, i)
                time.sleep(self._pause)
                codes = mine[start : start + 10]
                entity = np.repeat(codes, LENGTH)
                position = np.tile(np.arange(LENGTH), len(codes))
                yield Batch(
                    {"h": values(entity, position)}, entity, position, position + 7, entity % 3, i + 1
                )

    def write_truth(self, folder: Path) -> None:
        """Nothing is known."""


def values(entity: np.ndarray, position: np.ndarray) -> np.ndarray:
    key = entity * LENGTH + position
    return np.stack([key, -key, key % 11, key % 13], 1).astype(np.float32)


def check(path: Path, n: int = N) -> ActivationStore:
    """The list of rows is known without the store."""
    store = ActivationStore.open(path)
    assert store.verify() == [] and store.n_rows == n * LENGTH
    parts = [b for split in store.splits for b in store.rows("h", split)]
    entity, position = (np.concatenate([getattr(p, c) for p in parts]) for c in ("entity", "position"))
    assert np.array_equal(np.sort(entity * LENGTH + position), np.arange(n * LENGTH))
    np.testing.assert_array_equal(np.concatenate([p.acts for p in parts]), values(entity, position))
    return store


def of(rank: int, size: int) -> World:
    return World(rank=rank, size=size, axes={"data": size, "feature": 1})


def run(path: Path, source: Rows, *, world: World | None = None, parts: int = 0, **more) -> ActivationStore:
    return harvest(
        source, path, HarvestConfig(layout=LAYOUT, parts=parts), seed=0, world=world or World(), **more
    )


@pytest.mark.parametrize("parts", [0, 4, 7])
def test_one_process_harvests_every_part(tmp_path, parts):
    told: list[HarvestProgress] = []
    run(tmp_path / "a", Rows(), parts=parts, report=told.append)
    store = check(tmp_path / "a")
    assert len(store.groups) == max(parts, 1)
    assert [p.rows for p in told] == sorted(p.rows for p in told)
    assert told[-1].rows == told[-1].total == store.n_rows
    assert re.fullmatch(r"[\d,]+ rows/s, \d+ MB/s, model \d+%, copy \d+%, write \d+%", told[-1].text)
    again = run(tmp_path / "a", Rows())
    assert again.digest() == store.digest()


def test_the_time_is_estimated_from_the_first_batches():
    pause = 0.01
    source = Rows(pause=pause)
    assert probe(source, World(), seconds=0.1) == pytest.approx(N / 10 * pause, rel=0.5)
    assert probe(source, of(1, 4), seconds=0.02) < 0.5 * N / 10 * pause
    assert probe(Rows(0), World()) == 0


def test_other_versions_may_continue_what_was_begun(tmp_path):
    begun, later = Rows(stop=stop_at(0, 2)), Rows()
    begun.provenance, later.provenance = ({**begun.provenance, "versions": {"assay": v}} for v in "12")
    with pytest.raises(StoppedError):
        run(tmp_path / "a", begun)
    run(tmp_path / "a", later)
    assert check(tmp_path / "a").provenance["versions"] == {"assay": "1"}


def test_runs_stay_together_on_request(tmp_path):
    config = HarvestConfig(layout=LAYOUT, run_length=5)
    store = harvest(Rows(), tmp_path / "a", config, seed=0, world=World())
    entity, position, _ = store.coordinates(next(iter(store.splits)))
    assert ((entity[1:] == entity[:-1]) & (position[1:] == position[:-1] + 1)).mean() > 0.7


def test_other_settings_are_refused(tmp_path):
    run(tmp_path / "a", Rows(), parts=2)
    with pytest.raises(StoreError, match="another number of parts"):
        run(tmp_path / "a", Rows(), parts=3)
    with pytest.raises(StoreError, match="begun with other settings"):
        run(tmp_path / "a", Rows(N + 1))


class StoppedError(Exception):
    """An interruption of our own."""


def stop_at(part: int, batch: int) -> Callable[[int, int], None]:
    def stop(rank: int, i: int) -> None:
        if (rank, i) == (part, batch):
            raise StoppedError

    return stop


@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1), (4, 3), (2, 5)])
def test_it_continues_on_another_number_of_processes(tmp_path, first, then):
    path = tmp_path / "a"
    for rank in range(first):
        with pytest.raises(StoppedError):
            run(path, Rows(stop=stop_at(rank, 5)), world=of(rank, first))
    begun = ActivationStore.open(path, allow_incomplete=True)
    assert begun.n_rows == first * 40 * LENGTH
    run(path, Rows(), world=of(then - 1, then))
    assert len(check(path).groups) == first


def bytes_of(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"
    }


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_interrupted_and_continued_it_has_the_bits_of_one_that_was_not(tmp_path, batch):
    def interrupt(_: int, i: int) -> None:
        if i == batch:
            raise KeyboardInterrupt

    run(tmp_path / "a", Rows())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", Rows(stop=interrupt))
    run(tmp_path / "b", Rows())
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "a")


def test_a_part_that_another_process_holds_is_waited_for(tmp_path):
    path, told = tmp_path / "a", []
    source = Rows()
    options = {"hooks": source.hooks, "layout": LAYOUT, "seed": 0, "provenance": source.provenance}
    held = StoreWriter(path, writer=1, **options)

    def report(progress: HarvestProgress) -> None:
        told.append(progress.text)
        if "waits" in progress.text:
            held.close()

    run(path, source, world=of(0, 3), report=report)
    assert any("waits for other processes: part 1" in text for text in told)
    check(path)


def test_space_counts_what_is_left_to_write(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with pytest.raises(StoppedError):
        run(path, Rows(stop=stop_at(0, 20)))
    whole = estimate(Rows(), LAYOUT, path).bytes
    free = {"n": whole // 2}
    monkeypatch.setattr(
        "activations_cache.places.local.shutil.disk_usage", lambda _: type("Usage", (), {"free": free["n"]})
    )
    assert estimate(Rows(), LAYOUT, path).free == whole // 2
    free["n"] = whole // 20
    with pytest.raises(StoreError, match="would not fit"):
        estimate(Rows(), LAYOUT, path)


CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("source_of_rows", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
print("ready", flush=True)
input()
module.run(Path(sys.argv[2]), module.Rows(int(sys.argv[3]), pause=float(sys.argv[4])), world=module.World.from_env("cpu"))
"""


def start(path: Path, rank: int, size: int, *, n: int, pause: float) -> subprocess.Popen[str]:
    """A process as torchrun would start it."""
    command = [sys.executable, "-c", CHILD, __file__, str(path), str(n), str(pause)]
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.dist
def test_kill_9_of_three_of_four_writers_loses_and_doubles_nothing(tmp_path):
    path, n, chance = tmp_path / "a", 1000, random.Random(1)
    children = [start(path, rank, 4, n=n, pause=0.05) for rank in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for child in chance.sample(children, 3):
        time.sleep(chance.uniform(0.1, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    codes = sorted(child.returncode for child in children if child.returncode is not None)
    assert codes == [-9, -9, -9]
    (last,) = (child for child in children if child.returncode is None)
    assert last.communicate(timeout=60)[1] == "" and last.returncode == 0
    assert len(check(path, n).groups) == 4
    assert not list(path.rglob("*.partial"))
