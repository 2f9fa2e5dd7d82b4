"""Twenty kill -9 at random times of a training job: of single ranks, which torchrun replaces, and of the whole job.

    python -m tests.benchmarks.kill_train [--kills 20] [--steps 4000] [--feature 2] [--seed 0] [--folder DIR]

The final weights are those of the undisturbed job, to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from tests.distributed.pool import free_port

RANKS = 2
RESTARTS = 1000
WHOLE_JOB = 0.3
"""Share of the kills that hit the launcher and all ranks."""


def start(folder: Path, steps: int, feature: int) -> subprocess.Popen[bytes]:
    """Start the job under torchrun, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--max-restarts", str(RESTARTS), "--monitor-interval", "0.1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "tests.distributed.job", str(folder), "--steps", str(steps), "--feature", str(feature)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ranks(folder: Path) -> list[int]:
    """Return the process ids of the ranks that train at the moment."""
    found = [int(path.read_text() or 0) for path in folder.glob("pid-*")]
    return [pid for pid in found if pid and Path(f"/proc/{pid}").exists()]


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--feature", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    chance, began = random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        assert start(whole, args.steps, args.feature).wait() == 0
        job, kills, jobs = start(broken, args.steps, args.feature), 0, 0
        while kills < args.kills:
            while len(ranks(broken)) < RANKS:
                assert job.poll() is None, "the job ended before it was killed often enough: take more steps"
                time.sleep(0.05)
            time.sleep(chance.uniform(0.0, 3.0))
            assert job.poll() is None, "the job ended before it was killed often enough: take more steps"
            alive = ranks(broken)
            kills += 1
            if chance.random() < WHOLE_JOB:
                jobs += 1
                for pid in (job.pid, *alive):
                    kill(pid)
                job.wait()
                job = start(broken, args.steps, args.feature)
            elif alive:
                kill(chance.choice(alive))
            # the next life writes its own
            for path in broken.glob("pid-*"):
                path.unlink(missing_ok=True)
        assert job.wait() == 0
        a, b = (load_file(folder / "weights.safetensors") for folder in (whole, broken))
        assert all((a[key] == b[key]).all() for key in a), "the weights differ"
        print(
            f"{kills} kill -9 ({jobs} of the whole job), {RANKS} ranks, {args.steps:,} steps: "
            f"the same bits; {time.perf_counter() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
