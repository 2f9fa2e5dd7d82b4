"""Machines as a handful of constants: a table out of data sheets, and a short probe of the one at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sae.kernels import find_precision

EFFICIENCY = 0.5
"""Share of a data sheet's rate that is reckoned with; an assumption, for no GPU of the table was measured."""

READ_RATE = 1e9
"""Bytes per second that one host reads from its store; an assumption, since stores differ by a factor of 20."""

LOCAL_RATE = 5e8
"""Bytes per second between processes of one host without GPUs (gloo over loopback); an assumption."""

USABLE = 0.9
"""Share of the memory that a rank may plan with; the rest is for the context, the allocator and libraries."""

_PRODUCT = 1024
_COPIED = 2**24


@dataclass(frozen=True)
class Machine:
    """What a rank computes with; rates are those of one rank alone, in what it is expected to reach.

    Attributes
    ----------
    name
        As it is shown.
    memory, host_memory
        Bytes on the rank's device, and its share of the host's memory; without a GPU the two are one.
    matmul
        Multiplications and additions per second of the encoder's product.
    bandwidth
        Bytes per second that the device's memory moves.
    local, remote
        Bytes per second that a rank sends to another on its host, and to one on another host.
    read
        Bytes per second that a host reads from the store.
    ranks
        Ranks of a host.
    bf16
        Whether the product is in bf16.
    device
        `cuda` or `cpu`: whether loader and checkpoints live in memory of their own.
    sources
        Where each constant comes from, by name: measured, data sheet, assumed.
    """

    name: str
    memory: float
    host_memory: float
    matmul: float
    bandwidth: float
    local: float
    remote: float
    read: float
    ranks: int
    bf16: bool
    device: str
    sources: dict[str, str]


def _from_data_sheet(
    name: str, gigabytes: int, tflops: int, terabytes: float, links: tuple[int, int]
) -> Machine:
    """Return a machine with 8 such GPUs a host; links are GB/s in one direction, within and between hosts."""
    sheet = f"data sheet x {EFFICIENCY:g}"
    sources = dict.fromkeys(("matmul", "bandwidth", "local", "remote"), sheet)
    return Machine(
        name=name,
        memory=gigabytes * 1e9,
        host_memory=2e12 / 8,
        matmul=EFFICIENCY * tflops * 1e12,
        bandwidth=EFFICIENCY * terabytes * 1e12,
        local=EFFICIENCY * links[0] * 1e9,
        remote=EFFICIENCY * links[1] * 1e9,
        read=READ_RATE,
        ranks=8,
        bf16=True,
        device="cuda",
        sources={"memory": "data sheet", **sources, "read": "assumed", "host_memory": "assumed: 2 TB a host"},
    )


GPUS = {
    "a100": _from_data_sheet("A100 SXM 80 GB", 80, 312, 2.039, (300, 25)),
    "h100": _from_data_sheet("H100 SXM 80 GB", 80, 989, 3.35, (450, 50)),
    "h200": _from_data_sheet("H200 SXM 141 GB", 141, 989, 4.8, (450, 50)),
}
"""NVIDIA's data sheets: dense bf16 products, HBM; NVLink; one 200 (A100) or 400 Gb/s adapter a GPU."""


def probe(device: torch.device, *, ranks: int) -> Machine:
    """Measure the machine at hand in about a second: a product and a copy; links and disk are assumed.

    Parameters
    ----------
    device
        What to measure.
    ranks
        Ranks that will share the host: without a GPU they share its memory, and its threads once there are more
        of them than cores.
    """
    bf16 = find_precision("auto", device) == "bf16"
    a, b = (torch.rand(_PRODUCT, _PRODUCT, device=device) for _ in range(2))
    if bf16:
        a, b = a.bfloat16(), b.bfloat16()
    source = torch.zeros(_COPIED, device=device)
    target = torch.empty_like(source)
    matmul = 2 * _PRODUCT**3 / _fastest(lambda: torch.mm(a, b), device)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    on_gpu = device.type == "cuda"
    share = share_of_threads(device, ranks)
    memory = float(torch.cuda.mem_get_info(device)[1]) if on_gpu else host / ranks
    name = (
        torch.cuda.get_device_name(device) if on_gpu else f"this machine, {torch.get_num_threads()} threads"
    )
    return Machine(
        name=name,
        memory=memory,
        host_memory=host / ranks,
        matmul=share * matmul,
        bandwidth=share * bandwidth,
        local=LOCAL_RATE,
        remote=LOCAL_RATE,
        read=READ_RATE,
        ranks=ranks,
        bf16=bf16,
        device=device.type,
        sources={
            **dict.fromkeys(("memory", "matmul", "bandwidth", "host_memory"), "measured"),
            **dict.fromkeys(("local", "remote", "read"), "assumed"),
        },
    )


def share_of_threads(device: torch.device, ranks: int) -> float:
    """Return the share of its threads that each of so many ranks of this host has for itself; of a GPU, all."""
    if device.type == "cuda":
        return 1.0
    return min(1.0, (os.cpu_count() or 1) / (ranks * torch.get_num_threads()))


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of five."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
