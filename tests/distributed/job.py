"""A training job for torchrun, of which a rank can kill itself in its first life.

python -m torch.distributed.run --nproc-per-node N -m tests.distributed.job FOLDER [--steps N] [--feature N]
    [--timeout S] [--kill-rank R --kill-at STEP]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

from sae.world import World
from tests.train.runs import make_trainer, plant
from train.parallel import gather_whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--feature", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--kill-rank", type=int, default=-1)
    parser.add_argument("--kill-at", type=int, default=0)
    args = parser.parse_args()
    torch.set_deterministic_debug_mode("error")
    world = World.from_env("cpu", feature=args.feature, timeout=args.timeout)
    work(world, args.folder, args.steps, args.kill_rank, args.kill_at)


def work(world: World, folder: Path, steps: int, kill_rank: int = -1, kill_at: int = 0) -> None:
    """Train and save; the rank to be killed dies at its step, once."""
    folder.mkdir(parents=True, exist_ok=True)
    run = make_trainer(
        plant(600, d_in=12, features=24, l0=3), folder, world=world,
        sae={"kind": "batch_topk", "d_sae": 48, "k": 3, "k_aux": 7},
        batch_size=32, rows=32 * steps, dead_after_rows=64, checkpoint_every=10, log_every=10,
    )  # fmt: skip
    feed, mark = run.inputs.loader.next_batch, folder / "killed"

    def next_batch():
        if run.state.step == kill_at and world.rank == kill_rank and not mark.exists():
            mark.write_text(f"rank {world.rank} at step {run.state.step}")
            os.kill(os.getpid(), signal.SIGKILL)
        return feed()

    run.inputs.loader.next_batch = next_batch
    (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
    run.fit()
    whole = gather_whole(run.sae, world)
    if whole is not None:
        save_file(whole.state_dict(), folder / "weights.safetensors")


if __name__ == "__main__":
    main()
