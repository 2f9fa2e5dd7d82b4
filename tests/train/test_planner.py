"""What the planner foretells, against closed forms, counted traffic, and a real training's memory."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAEConfig
from sae.config import parse_config
from sae.errors import ConfigError
from train.calibration import calibrate
from train.machines import GPUS, probe, share_of_threads
from train.plan import TrainConfig
from train.planner import Job, Mesh, choose, describe, estimate, layouts, smallest


def job(*, d_in: int = 4096, kind: str = "topk", **settings: object) -> Job:
    own = {name: settings.pop(name) for name in ("k_start", "by_rate") if name in settings}
    sae = parse_config(SAEConfig, {"kind": kind, "d_sae": 2**20, "k": 64, **own}, where="test")
    given = {"rows": 10**9, "batch_size": 8192, **settings}
    return describe(sae, parse_config(TrainConfig, given, where="test"), d_in=d_in)


def test_a_million_features_are_shared_out_without_being_made():
    found = estimate(job(), Mesh(2, 32), GPUS["h200"])
    shard = 4 * (2 * 2**15 * 4096 + 2**15 + 4096)
    assert found.device["gradients"] == shard
    assert found.device["Adam's moments"] == 2 * shard
    assert found.device["parameters"] == pytest.approx(shard, rel=1e-3)
    assert found.host["checkpoint copy"] == pytest.approx(3 * shard, rel=1e-3)
    # the whole dictionary is saved by the first rank
    assert found.peak_host == found.end > 4 * 2 * 2**20 * 4096


def test_a_frozen_decoder_has_no_gradient_and_no_moments():
    usual, frozen = (
        estimate(job(kind=kind), Mesh(1, 32), GPUS["h200"]) for kind in ("topk", "frozen_decoder")
    )
    assert frozen.device["gradients"] < 0.51 * usual.device["gradients"]
    assert frozen.device["parameters"] == pytest.approx(usual.device["parameters"])


def test_the_chosen_mesh_is_the_quickest_that_fits_and_can_be_laid_out():
    chosen, weighed = choose(job(d_in=1024), GPUS["h200"], 64)
    assert chosen.fits and chosen.mesh.ranks == 64
    assert {found.mesh.data for found in weighed} == {1, 2, 4, 8, 16}, "16 lanes share out no further"
    assert all(chosen.step_seconds <= found.step_seconds for found in weighed if found.fits)
    wide = job(loader={"lanes": 64})
    assert max(mesh.data for mesh in layouts(wide, 64)) == 64


def test_what_cannot_fit_is_refused_with_the_smallest_mesh_that_does():
    wide, machine = job(), replace(GPUS["h100"], host_memory=1e12)
    least = smallest(wide, machine)
    assert least is not None and estimate(wide, least, machine).fits
    smaller = [mesh for ranks in range(1, least.ranks) for mesh in layouts(wide, ranks)]
    assert smaller and not any(estimate(wide, mesh, machine).fits for mesh in smaller)
    with pytest.raises(ConfigError, match=f"data {least.data} x feature {least.feature} is the smallest"):
        choose(wide, machine, 1)
    with pytest.raises(ConfigError, match="no mesh of 7 ranks"):
        choose(wide, machine, 7)
    with pytest.raises(ConfigError, match="no mesh holds it"):
        choose(wide, replace(machine, host_memory=1e9), 8)


def test_links_are_those_of_the_host_until_the_mesh_leaves_it():
    inside, outside = (estimate(job(d_in=1024), Mesh(d, 4), GPUS["h100"]) for d in (2, 4))
    assert inside.sent["data"] / inside.seconds["data axis"] == pytest.approx(GPUS["h100"].local)
    assert outside.sent["data"] / outside.seconds["data axis"] == pytest.approx(GPUS["h100"].remote)
    assert outside.sent["feature"] / outside.seconds["feature axis"] == pytest.approx(GPUS["h100"].local)


def test_the_probe_measures_and_says_what_it_assumes():
    machine = probe(torch.device("cpu"), ranks=2)
    assert 1e8 < machine.matmul < 1e15 and 1e8 < machine.bandwidth < 1e13
    assert machine.memory * 2 == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assert machine.sources["matmul"] == "measured" and machine.sources["read"] == "assumed"


@pytest.mark.parametrize(("d_in", "ranks"), [(128, 1), (4096, 1), (128, 64)])
def test_rates_are_those_that_a_step_like_the_planned_one_reaches(d_in, ranks, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "train.calibration._step_seconds", lambda config, like, device: timed.append(like) or 3.0
    )
    device, wide = torch.device("cpu"), job(d_in=d_in)
    machine = probe(device, ranks=ranks)
    found = calibrate(machine, wide, device, ranks=ranks)
    (like,) = timed
    assert (like.d_in, like.work) == (d_in, wide.work)
    assert like.plan.batch_size <= wide.plan.batch_size // ranks
    assert like.plan.batch_size * like.d_sae * d_in <= 2**30
    assert like.d_sae >= 32 * like.work.active
    # this process measures with threads that so many ranks would share
    expected = 3.0 / share_of_threads(device, ranks)
    assert estimate(like, Mesh(1, 1), found, dead_share=0.0).step_seconds == pytest.approx(expected)
    assert found.matmul / machine.matmul == pytest.approx(found.bandwidth / machine.bandwidth)
    assert (
        replace(found, matmul=machine.matmul, bandwidth=machine.bandwidth, sources=machine.sources) == machine
    )


def test_a_real_step_is_timed():
    device = torch.device("cpu")
    small = describe(
        parse_config(SAEConfig, {"kind": "batch_topk", "d_sae": 64, "k": 8}, where="test"),
        parse_config(TrainConfig, {"rows": 10**6, "batch_size": 32}, where="test"),
        d_in=16,
    )
    machine = probe(device, ranks=1)
    found = calibrate(machine, small, device, ranks=1)
    assert 0 < found.matmul < machine.matmul, "calling costs more than so small products"
    assert "that a step of 64 features reaches" in found.sources["matmul"]


def test_the_copies_of_a_product_in_bf16_are_planned_for_where_it_is_asked_for():
    usual, given = (estimate(job(precision=name), Mesh(2, 32), GPUS["h200"]) for name in ("auto", "bf16"))
    assert usual == given
    exact = estimate(job(precision="fp32"), Mesh(2, 32), GPUS["h200"])
    copies = given.device["pre-activations"] - exact.device["pre-activations"]
    assert copies == 2 * (2**15 + 8192 / 2) * 4096


def test_a_falling_k_is_planned_for_where_it_is_largest():
    first, last = (estimate(job(kind="lista", k_start=k), Mesh(2, 4), GPUS["h200"]) for k in (2.5, 1))
    assert first.device["codes"] == 2.5 * last.device["codes"]
    assert first.sent["feature"] - last.sent["feature"] == 3 * 4 * 4096 * 1.5 * 64, "candidates of the look"
    assert first.sent["all"] - last.sent["all"] == 7 * 4 * 1.5 * 16 * 96, "the sample"
    assert job(kind="lista", k_start=2.5).work.active == 160
    assert job(kind="lista").work.active == 64


def test_a_look_holds_codes_rows_and_two_more_gradients():
    looked, usual = (
        estimate(job(kind=kind, by_rate=True), Mesh(1, 32), GPUS["h200"]) for kind in ("lista", "matryoshka")
    )
    assert looked.device["gradients"] - usual.device["gradients"] == 2 * 4 * 2**15 * 4096
    assert looked.device["batch"] - usual.device["batch"] == 4 * 8192 * 4096
    assert looked.device["codes"] - usual.device["codes"] == pytest.approx(12 * 8192 * 64 / 32)


def test_rates_are_exchanged_by_all_ranks():
    rated, usual = (
        estimate(job(kind="matryoshka", by_rate=by), Mesh(2, 4), GPUS["h200"]) for by in (True, False)
    )
    assert rated.sent["feature"] - usual.sent["feature"] == 3 * 4 * 2**18
    assert rated.sent["data"] - usual.sent["data"] == 8 * 2**18


# most of it blocks of a batch, which lie in the heap twice, most of it parameters, and a kind with looks
@pytest.mark.parametrize(
    ("kind", "size", "more"),
    [
        ("batch_topk", "192/2048/8/2048", {}),
        ("lista", "128/1024/8/1024", {"k_start": 2}),
        ("topk", "256/8192/16/512", {}),
    ],
)
def test_memory_is_within_15_percent_of_a_real_training(kind, size, more, tmp_path):
    from tests.benchmarks.planner import measure

    def planned_over_measured(run: int) -> float:
        job, peak, _ = measure(kind, size, 8, tmp_path / str(run), more=more)
        return estimate(job, Mesh(1, 1), machine, dead_share=0.0).peak_host / peak

    machine = probe(torch.device("cpu"), ranks=1)
    # one run differs from the next by a tenth, as holes in the heap depend on what threads ask for meanwhile, so the
    # median of three counts; two that agree decide it
    found = [planned_over_measured(run) for run in range(2)]
    if len({_within(ratio) for ratio in found}) == 2:
        found.append(planned_over_measured(2))
    assert sum(map(_within, found)) >= 2, found


def _within(ratio: float) -> bool:
    return 0.85 < ratio < 1.15
