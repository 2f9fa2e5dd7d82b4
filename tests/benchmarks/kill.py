"""Twenty kill -9 at random times among four processes that harvest one store; then every row is checked.

    python -m tests.benchmarks.kill [--kills 20] [--entities 40000] [--seed 0] [--folder DIR]

A killed process is replaced by a new one of the same rank. They take their time until the last kill, when all are
killed and replaced by ones that do not. The list of rows is known without the store.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

from tests.activations_cache.test_harvest import check, start

WRITERS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--entities", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    chance, began, kills = random.Random(args.seed), time.perf_counter(), 0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = Path(name) / "a.zarr"

        def begin(rank: int, pause: float = 0.1):
            child = start(path, rank, WRITERS, n=args.entities, pause=pause)
            child.stdin.write("\n")
            child.stdin.flush()
            return child

        children = [begin(rank) for rank in range(WRITERS)]
        while kills < args.kills:
            rank = chance.randrange(WRITERS)
            assert children[rank].stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 1.5))
            assert children[rank].poll() is None, "it ended before it was killed: take more entities"
            children[rank].send_signal(signal.SIGKILL)
            children[rank].communicate()
            kills += 1
            children[rank] = begin(rank)
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        children = [begin(rank, pause=0.0) for rank in range(WRITERS)]
        for child in children:
            assert child.communicate()[1] == "" and child.returncode == 0
        store = check(path, args.entities)
        assert not list(path.rglob("*.partial"))
        seconds = time.perf_counter() - began
        print(
            f"{kills + WRITERS} kill -9, {WRITERS} writers, {store.n_rows:,} rows: 0 lost, 0 doubled; {seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
