"""Two hosts that are two network namespaces: one torchrun each, and one of them cut off in the middle of a training.

    sudo python -m tests.benchmarks.two_hosts [--steps N] [--cut-at STEP] [--seconds S] [--folder DIR]

Needs root and iproute2. Each host has an address of its own on a virtual cable; the ranks meet and talk over it (gloo). At
a step the cable of the second host is taken down and put back S seconds later, longer than the ranks wait for each other.
Every process that fails has to end by itself; then each host's torchrun is started again with the same command, as a
scheduler would, until the job ends. Its weights are those of an undisturbed job, to the bit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

HOSTS = {"assay-a": "10.97.0.1", "assay-b": "10.97.0.2"}
PORT = 29533
STARTS = 8
"""How often a host's command is started at most."""


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_namespaces() -> Iterator[None]:
    """Make two namespaces and the cable between them; remove both afterwards."""
    a, b = HOSTS
    made = []
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            made.append(host)
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in made:
            ip("netns", "delete", host)


def start(host: str, number: int, folder: Path, steps: int, timeout: float) -> subprocess.Popen[bytes]:
    """Start a host's torchrun, with one rank, in its namespace."""
    first = next(iter(HOSTS.values()))
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(len(HOSTS)),
        "--node-rank",
        str(number),
    ]
    run += [
        "--nproc-per-node",
        "1",
        "--master-addr",
        first,
        "--master-port",
        str(PORT),
        "--monitor-interval",
        "0.5",
    ]
    run += ["-m", "tests.distributed.job", str(folder), "--steps", str(steps), "--timeout", str(timeout)]
    with (folder.parent / f"{folder.name}-{host}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *run],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
            stdout=log, stderr=log,
        )  # fmt: skip


def latest(folder: Path) -> int:
    """Return the step of the newest complete checkpoint."""
    found = sorted(folder.glob("checkpoints/step-*/index.json"))
    return int(found[-1].parent.name.removeprefix("step-")) if found else 0


class Job:
    """One job on both hosts; a host's command is started again until it ends well."""

    def __init__(self, folder: Path, steps: int, timeout: float) -> None:
        folder.mkdir()
        self.folder, self.steps, self.timeout = folder, steps, timeout
        self.starts, self.done = dict.fromkeys(HOSTS, 0), dict.fromkeys(HOSTS, False)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.codes: list[str] = []
        for host in HOSTS:
            self._start(host)

    def poll(self) -> bool:
        """Start again what has failed; return whether all have ended well."""
        for host, process in list(self.running.items()):
            code = process.poll()
            if code is None or self.done[host]:
                continue
            if code == 0:
                self.done[host] = True
                continue
            self.codes.append(f"{host} {code}")
            self._start(host)
        return all(self.done.values())

    def close(self) -> None:
        """End what still runs."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
                process.wait()

    def _start(self, host: str) -> None:
        assert self.starts[host] < STARTS, f"{host} was started {STARTS} times; logs beside {self.folder}"
        self.starts[host] += 1
        number = list(HOSTS).index(host)
        self.running[host] = start(host, number, self.folder, self.steps, self.timeout)


def train(folder: Path, args: argparse.Namespace, *, cut: bool) -> Job:
    """Run a job to its end; with `cut`, take the second host's cable down for a while."""
    job, down, cut_at = Job(folder, args.steps, args.timeout), 0.0, 0
    try:
        while not job.poll():
            if cut and not down and latest(folder) >= args.cut_at:
                ip("-n", "assay-b", "link", "set", "cable", "down")
                down, cut_at = time.perf_counter(), latest(folder)
                print(f"cut off at step {cut_at}", flush=True)
            if cut and down and down < float("inf") and time.perf_counter() - down > args.seconds:
                assert latest(folder) < args.steps, "the job ended before the cable was back: take more steps"
                ip("-n", "assay-b", "link", "set", "cable", "up")
                print(
                    f"back after {args.seconds:g} s, at step {latest(folder)}, ended: {job.codes}", flush=True
                )
                down = float("inf")
            time.sleep(0.05)
    finally:
        job.close()
    assert not cut or job.codes, "nobody noticed that the cable was down"
    return job


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cut-at", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as name, two_namespaces():
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        train(whole, args, cut=False)
        job = train(broken, args, cut=True)
        a, b = (load_file(folder / "weights.safetensors") for folder in (whole, broken))
        assert all((a[key] == b[key]).all() for key in a), "the weights differ"
    print(
        f"{args.steps:,} steps on 2 hosts, one cut off for {args.seconds:g} s: the same bits; "
        f"starts {job.starts}, ended before: {job.codes}; {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
