"""Memory and speed that the planner foretells against those of a training in a process of its own, on this machine.

    python -m tests.benchmarks.planner [--kinds KIND,...] [--sae JSON] [--precisions NAME,...] [--steps N] [SIZE ...]

SIZE is d_in/d_sae/k/batch, JSON more settings of section sae. Training is told to report, as the command tells it, so that
the sizes which the rows support are estimated first. Memory is the peak of the resident set beyond what the process had
after its imports, as the kernel counts it; the split is small enough to be held in memory, and the run ends with a saved
dictionary, so the peak covers steps, checkpoints and the end. Rows per second are those of the median record of
metrics.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.writer import StoreWriter
from sae.base import SAEConfig
from sae.config import parse_config
from train.calibration import calibrate
from train.machines import probe
from train.plan import TrainConfig
from train.planner import Job, Mesh, describe, estimate

ROWS = 16384

CHILD = """
import json, sys
from pathlib import Path
import numpy as np, torch
import sae.architectures
from sae.base import SAEConfig
from sae.config import parse_config
from sae.world import World
from train.plan import TrainConfig
from train.run import train_sae
given = json.loads(sys.argv[1])
folder = Path(given["folder"])
a = torch.randn(64, 64, requires_grad=True)
(a @ a).sum().backward()
torch.optim.Adam([a], fused=True).step()

def status(field):
    return next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if field in l)

before = status("VmRSS")
config = parse_config(SAEConfig, given["sae"], where="benchmark")
train = parse_config(TrainConfig, given["train"], where="benchmark")
train_sae(folder / "a.zarr", config, train, folder / "out", hook="h", work=folder / "work", seed=0, world=World(),
          progress=lambda *_: None)
print(status("VmHWM") - before)
"""


def write_store(path: Path, d_in: int) -> None:
    """Write rows that are sparse sums of random directions."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((256, d_in)).astype(np.float32) / d_in**0.5
    codes = rng.random((ROWS, 256), dtype=np.float32) * (rng.random((ROWS, 256)) < 0.05)
    n = np.arange(ROWS)
    with StoreWriter(path, hooks={"h": d_in}, layout=StoreLayout(), seed=0, provenance={}) as writer:
        writer.append(
            {"h": codes @ directions}, entity=n, position=n * 0, time=n * 0, split=n * 0, cursor=ROWS
        )
    seal(path)


def measure(
    kind: str,
    size: str,
    steps: int,
    folder: Path,
    *,
    precision: str = "auto",
    more: Mapping[str, Any] | None = None,
) -> tuple[Job, int, float]:
    """Train in a process of its own; return what was planned for, the peak in bytes, and rows per second."""
    d_in, d_sae, k, batch = (int(part) for part in size.split("/"))
    write_store(folder / "a.zarr", d_in)
    sae: dict[str, Any] = {"kind": kind, "d_sae": d_sae, "k": k, **(more or {})}
    train = {
        "rows": steps * batch,
        "batch_size": batch,
        "lr": 1e-4,
        "precision": precision,
        "log_every": 2,
        "checkpoint_every": steps // 2,
    }
    # a tenth of the rows is at most what passes before features count as dead; later than the end here
    train["dead_after_rows"] = 10 * steps * batch
    given = {"folder": str(folder), "sae": sae, "train": train}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)], stdout=subprocess.PIPE, text=True, check=True
    )
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(record["rows_per_second"] for record in records)
    job = describe(
        parse_config(SAEConfig, sae, where="benchmark"),
        parse_config(TrainConfig, train, where="benchmark"),
        d_in=d_in, split_rows=ROWS,
    )  # fmt: skip
    return job, int(done.stdout.split()[-1]), speed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*", default=["512/8192/32/2048", "256/16384/32/1024"])
    parser.add_argument("--kinds", default="topk,batch_topk")
    parser.add_argument("--sae", type=json.loads, default={})
    parser.add_argument("--precisions", default="auto")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    device = torch.device("cpu")
    machine = probe(device, ranks=1)
    for size in args.sizes:
        for kind, precision in itertools.product(args.kinds.split(","), args.precisions.split(",")):
            with tempfile.TemporaryDirectory() as name:
                job, peak, speed = measure(
                    kind, size, args.steps, Path(name), precision=precision, more=args.sae
                )
            like = calibrate(machine, job, device, ranks=1)
            found = estimate(job, Mesh(1, 1), like, dead_share=0.0)
            planned, pace = found.peak_host, job.plan.batch_size / found.step_seconds
            print(
                f"{kind:<11} {size:<18} {precision:<4} memory {peak / 2**20:6.0f} MiB, planned {planned / 2**20:6.0f}: "
                f"{planned / peak:.2f};  rows/s {speed:8,.0f}, planned {pace:8,.0f}: {pace / speed:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
