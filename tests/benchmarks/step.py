"""The time of one training step of every kind, relative to the dense encoder product that it cannot avoid.

    python -m tests.benchmarks.step [--rounds N] [--kinds KIND,...] [--peers VENV] [--device cuda] [SIZE ...]

SIZE is d_in/d_sae/k/batch. A step is everything the loop does for a batch: losses, gradients, projection, Adam, unit rows,
dead counters, on memory kept as training keeps it. Contenders are interleaved, so that a disturbance hits all alike; ratios
are to the fp32 product, in a process of its own, of the best and of the median. A run during which other processes used more
than 0.2 of a core is invalid and says so. With --peers the steps of sae-lens, sparsify and dictionary_learning are timed in
the same run, by a process in their own environment, which is made where it does not exist. Peak memory is that of a fresh
process.

On a GPU the yardstick is a roofline: the product at the rate of a large bf16 product, and the bytes that selection,
decoding, gradients and Adam have to move at the rate of a large copy, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.config import parse_config
from sae.kernels import find_precision
from sae.world import World
from tests.benchmarks import peer_steps
from tests.benchmarks.peer_steps import BATCHES, FLOOR, PEERS, Step, rows, synchronise
from train.allocation import kept_memory
from train.optim import make_adam
from train.plan import TrainConfig, make_plan
from train.state import TrainState
from train.step import train_step

SIZES = {
    "cpu": ("128/2048/16/4096", "512/16384/32/2048", "768/24576/64/2048"),
    "cuda": ("2048/65536/64/8192", "4096/131072/64/8192"),
}
DEAD_SHARE = 0.1
PAUSE = 0.02
"""Seconds after a step in another process, for its idle threads to go to sleep."""


def own(kind: str, dead: float, precision: str, x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """One of our kinds, with a share of its features held dead so that AuxK works."""
    device = x[0].device
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": d_sae, "k": k}, where="benchmark")
    sae = config.build(x[0].shape[1], generator=torch.Generator(device).manual_seed(0))
    sae.precision = precision
    plan = make_plan(TrainConfig(rows=10**9, batch_size=len(x[0]), lr=1e-4, dead_after_rows=2**62), config)
    world = World(device=device)
    optimiser, state = make_adam(sae), TrainState.start(d_sae, device)
    asleep = torch.arange(d_sae, device=device) < dead * d_sae
    follows = torch.arange(len(x[0]), device=device) % 2 == 1

    def step(i: int) -> object:
        state.silent_rows = torch.where(asleep, 2**62, 0)
        return train_step(sae, optimiser, state, Batch(x[i % BATCHES], follows), plan=plan, world=world)

    return step


def contenders(kinds: list[str], x: list[torch.Tensor], d_sae: int, k: int) -> dict[str, Step]:
    """Our kinds, in fp32 and, where the processor has it, in bf16; with and without dead features."""
    found = {}
    for kind in kinds:
        for precision in dict.fromkeys(["fp32", find_precision("auto", x[0].device)]):
            for dead in (0.0, DEAD_SHARE):
                name = f"{kind}{', bf16' * (precision == 'bf16')}{f', {dead:.0%} dead' * (dead > 0)}"
                found[name] = own(kind, dead, precision, x, d_sae, k)
    return found


class Others:
    """Steps that are timed in a process of their own.

    Parameters
    ----------
    python
        Its interpreter.
    names
        Whose steps.
    """

    def __init__(self, python: Path, names: Iterable[str]) -> None:
        command = [str(python), str(Path(peer_steps.__file__))]
        self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names = list(names)
        self.cpu = 0.0

    def ask(self, **question: Any) -> dict[str, Any]:
        """Put one question and wait for the answer."""
        assert self.worker.stdin and self.worker.stdout
        print(json.dumps(question), file=self.worker.stdin, flush=True)
        line = self.worker.stdout.readline()
        if not line:
            raise SystemExit(f"the other process ended with code {self.worker.wait()}; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self, name: str, i: int) -> float:
        """Let one of them take a step; return its seconds."""
        answer = self.ask(name=name, step=i)
        self.cpu += answer["cpu"]
        time.sleep(PAUSE)
        return float(answer["seconds"])


def peer_environment(venv: Path) -> Path:
    """Return the interpreter of an environment with the peers; it is made, with what pip finds, if need be."""
    python = venv / "bin" / "python"
    if not python.exists():
        torch_version = torch.__version__.split("+")[0]
        pip = [str(python), "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        packages = [f"torch=={torch_version}", *peer_steps.PACKAGES.values()]
        subprocess.run([*pip, "install", "--quiet", *packages], check=True)
        # they pull it in, use none of it, and it loads beside one build of torch only
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", "torchvision"], check=True)
    return python


@contextmanager
def open_others(venv: Path | None) -> Iterator[list[Others]]:
    """Start the floor's process and, if any, the peers', and end them."""
    others = [Others(Path(sys.executable), [FLOOR])]
    if venv:
        others.append(Others(peer_environment(venv), PEERS))
    try:
        yield others
    finally:
        for other in others:
            other.worker.kill()
            other.worker.wait()


def machine_seconds() -> float:
    """Return the processor seconds of all processes since the machine started; 0 where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = (int(n) for n in stat.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(size: str, rounds: int, kinds: list[str], device: str, others: list[Others]) -> dict[str, object]:
    """Time every contender at one size."""
    d_in, d_sae, k, batch = (int(part) for part in size.split("/"))
    x = rows(batch, d_in, device)
    steps = contenders(kinds, x, d_sae, k)
    for step in steps.values():
        step(0)
    about: dict[str, Any] = {"versions": {}}
    for other in others:
        told = other.ask(size=[d_in, d_sae, k, batch], device=device, names=other.names)
        about["versions"] |= told["versions"]
    times: dict[str, list[float]] = {
        name: [] for name in [*(name for other in others for name in other.names), *steps]
    }
    machine, mine, wall = machine_seconds(), time.process_time(), time.perf_counter()
    theirs = sum(other.cpu for other in others)
    for i in range(1, rounds + 1):
        for name, step in steps.items():
            synchronise(device)
            started = time.perf_counter()
            step(i)
            synchronise(device)
            times[name].append(time.perf_counter() - started)
        for other in others:
            for name in other.names:
                times[name].append(other.step(name, i))
    used = time.process_time() - mine + sum(other.cpu for other in others) - theirs
    busy = max(0.0, (machine_seconds() - machine - used) / (time.perf_counter() - wall))
    best, median = min(times[FLOOR]), statistics.median(times[FLOOR])
    result = {
        "size": size,
        "valid": busy <= 0.2,
        "cores_used_by_others": round(busy, 2),
        "rounds": rounds,
        "milliseconds": {name: round(1e3 * min(ts), 1) for name, ts in times.items()},
        "ratio_of_best": {name: round(min(ts) / best, 2) for name, ts in times.items()},
        "ratio_of_median": {name: round(statistics.median(ts) / median, 2) for name, ts in times.items()},
        **about,
    }
    if device != "cpu":
        least = roofline(d_in, d_sae, k, batch)
        result["roofline_milliseconds"] = round(1e3 * least, 2)
        result["ratio_to_roofline"] = {name: round(min(ts) / least, 2) for name, ts in times.items()}
    return result


def roofline(d_in: int, d_sae: int, k: int, batch: int) -> float:
    """Return the seconds of the product at the measured matmul rate and of the bytes at the copy rate.

    Bytes: the weights read in fp32 and written in bf16 for the product; k rows of W_dec per row of the batch
    for decoding and again for the gradients of the values, the batch's rows k times for each weight gradient,
    and both of these written; Adam reads four tensors and writes three.
    """
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    flops = 2 * 8192**3 / _fastest(lambda: a @ b)
    rate = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    matrix, gathered = 4 * d_sae * d_in, 4 * batch * k * d_in
    moved = 1.5 * matrix + 4 * gathered + 2 * matrix + 2 * 7 * matrix
    return 2 * batch * d_in * d_sae / flops + moved / rate


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def peak_memory(size: str, kind: str, device: str) -> dict[str, object]:
    """Take three steps with dead features; return the peak, and its ratio to what cannot be avoided.

    That is parameters, gradients, Adam's state and one `[batch, d_sae]` in bf16.
    """
    d_in, d_sae, k, batch = (int(part) for part in size.split("/"))
    small = rows(64, 32, device)
    own(kind, DEAD_SHARE, "fp32", small, 256, 4)(0)  # what libraries allocate once is not the step's
    x = rows(batch, d_in, device)
    before = _resident(device)
    step = own(kind, DEAD_SHARE, find_precision("auto", x[0].device), x, d_sae, k)
    for i in range(3):
        step(i)
    least = 4 * 4 * (2 * d_sae * d_in + d_sae + d_in) + 2 * batch * d_sae
    peak = _peak(device) - before
    return {"size": size, "kind": kind, "peak_mib": round(peak / 2**20), "ratio": round(peak / least, 2)}


def _resident(device: str) -> int:
    """Return the bytes held now, and start a new peak."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Print the machine, then one JSON object per size, then one per size for the memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trainable = sorted(name for name, config in SAEConfig.kinds.items() if config.trainable)
    parser.add_argument("sizes", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", default=",".join(trainable))
    parser.add_argument("--peers", type=Path, metavar="VENV")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--memory", metavar="KIND", help="measure the peak of one kind in this process, no times"
    )
    options = parser.parse_args()
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the command does
    sizes = options.sizes or SIZES[options.device]
    if options.memory:
        with kept_memory(parameters=0):
            print(json.dumps(peak_memory(sizes[0], options.memory, options.device)))
        return
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.processor()}
    print(json.dumps(about | {"bf16": find_precision("auto", torch.device(options.device)) == "bf16"}))
    with open_others(options.peers) as others, kept_memory(parameters=0):
        for size in sizes:
            found = measure(size, options.rounds, options.kinds.split(","), options.device, others)
            print(json.dumps(found, indent=1), flush=True)
    for size in sizes:
        command = [sys.executable, "-m", "tests.benchmarks.step", size, "--device", options.device]
        subprocess.run([*command, "--memory", "topk"], check=True)


if __name__ == "__main__":
    main()
