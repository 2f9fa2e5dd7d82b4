"""Training on a mesh is training on one process: weights, counters, checkpoints, interruptions, traffic."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.base import SAEConfig
from sae.errors import ConfigError
from sae.world import World
from tests.train.runs import Planted, make_trainer, plant
from train.checkpoint import complete
from train.parallel import gather_whole
from train.trainer import Trainer, TrainingError

MESHES = [(2, 1), (1, 2), (2, 2)]
UNTRAINED = {"gated", "relu"}
KINDS = sorted(set(SAEConfig.kinds) - UNTRAINED)
# several blocks of pairs for the ranks to share out
MORE = {"temporal": {"contrast_pairs": 4, "lasting_share": 0.5}, "lista": {"k_start": 2}}
DICTIONARY = {"d_sae": 48, "k": 3, "k_aux": 7, "start": "geometric_median"}
STEPS = 50
# most features die soon, so that AuxK has candidates in every shard
RUN = {"batch_size": 32, "rows": 32 * STEPS, "dead_after_rows": 64, "lr": 1e-3, "clip_norm": 0.5}
RUN |= {"checkpoint_every": 20, "log_every": 10}


def rows() -> Planted:
    return plant(800, d_in=12, features=24, l0=3)


def trainer(world: World, work: Path, kind: str, **changed: Any) -> Trainer:
    return make_trainer(
        rows(),
        work,
        sae={"kind": kind, **DICTIONARY, **MORE.get(kind, {})},
        world=world,
        **{**RUN, **changed},
    )


def outcome(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a run ends with, whole."""
    run.sae.settle((run.inputs.next().x for _ in range(4)), world=run.world)
    whole = gather_whole(run.sae, run.world)
    silent = torch.cat(run.world.all_gather(run.state.silent_rows, axis="feature"))
    return {} if whole is None else {**whole.state_dict(), "silent_rows": silent}


def train(world: World, work: Path, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, str]:
    run = trainer(world, work, kind)
    run.fit()
    assert run.state.rows == 32 * STEPS
    return outcome(run), run.sae.b_dec.detach(), (work / "metrics.jsonl").read_text()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm((found - expected).double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process learns, by kind."""
    known: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor, str]] = {}

    def get(kind: str):
        if kind not in known:
            known[kind] = train(World(), tmp_path_factory.mktemp("alone"), kind)
        return known[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [*((kind, mesh) for kind in KINDS for mesh in MESHES), ("batch_topk", (4, 1)), ("batch_topk", (1, 4))],
)
def test_weights_are_those_of_one_process(kind, mesh, pool_of, alone, tmp_path):
    expected, _, lines = alone(kind)
    found = pool_of(mesh).run(train, tmp_path, kind, mesh=mesh)
    weights = found[0][0]
    assert weights.keys() == expected.keys()
    apart = {name: relative(weights[name], expected[name]) for name in expected}
    assert max(apart.values()) < 1e-5, apart
    # what is replicated never drifts apart
    assert all(torch.equal(b_dec, found[0][1]) for _, b_dec, _ in found)
    mine, theirs = ([json.loads(line) for line in text.splitlines()] for text in (found[0][2], lines))
    for a, b in zip(mine, theirs, strict=True):
        for name in ("step", "rows", "loss", "mse", "auxk", "fvu", "l0", "dead", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (name, a["step"])
    assert any(record["auxk"] > 0 for record in theirs)


def stop(world: World, work: Path, kind: str, step: int, number: int) -> int:
    """Train until the last rank gets a signal after `step`; return the signal that ended the run."""
    run = trainer(world, work, kind, log_every=1)
    write = run.checkpoints.poll

    def poll() -> None:
        write()
        if run.state.step == step and world.rank == world.size - 1:
            os.kill(os.getpid(), number)

    run.checkpoints.poll = poll
    try:
        run.fit()
    except KeyboardInterrupt as interrupt:
        assert run.state.step == step
        return int(interrupt.args[0])
    return 0


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu"])
def test_a_run_that_is_stopped_and_continued_on_the_same_mesh_has_the_same_bits(kind, pool_of, tmp_path):
    mesh = (2, 2)
    pool = pool_of(mesh)
    undisturbed = pool.run(train, tmp_path / "whole", kind, mesh=mesh)[0][0]
    for step, number in ((15, signal.SIGTERM), (33, signal.SIGINT)):
        # one rank is told, all stop after the same step
        assert pool.run(stop, tmp_path / "broken", kind, step, number, mesh=mesh) == [number] * 4
        assert complete(tmp_path / "broken" / "checkpoints")[-1].name == f"step-{step:010d}"
    continued = pool.run(train, tmp_path / "broken", kind, mesh=mesh)[0][0]
    assert all(torch.equal(continued[name], value) for name, value in undisturbed.items())
    assert len(complete(tmp_path / "broken" / "checkpoints")) == 2


def test_a_run_continues_on_other_meshes_with_the_same_batches(pool_of, alone, tmp_path):
    steps = iter((10, 20, 30, 40))
    for mesh in ((2, 2), (1, 2), (4, 1), (1, 4)):
        pool_of(mesh).run(stop, tmp_path, "batch_topk", next(steps), signal.SIGTERM, mesh=mesh)
    weights, _, lines = train(World(), tmp_path, "batch_topk")
    expected = alone("batch_topk")[0]
    assert max(relative(weights[name], expected[name]) for name in expected) < 1e-5
    assert [json.loads(line)["step"] for line in lines.splitlines()][-1] == STEPS


def poison(world: World, work: Path) -> str:
    run = trainer(world, work, "topk")
    feed = run.inputs.loader.next_batch

    def poisoned():
        rows = feed()
        if run.state.step == 30 and world.rank == world.size - 1:
            rows.x[3] = float("nan")
        return rows

    run.inputs.loader.next_batch = poisoned
    with pytest.raises(TrainingError) as caught:
        run.fit()
    assert all(torch.isfinite(p).all() for p in run.sae.parameters())
    return str(caught.value)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_the_row(pool_of, tmp_path):
    messages = pool_of((2, 1)).run(poison, tmp_path, mesh=(2, 1))
    assert all("step 30 is not finite" in message and "rows [19]" in message for message in messages)
    assert complete(tmp_path / "checkpoints")[-1].name == "step-0000000030"


def count_traffic(world: World, work: Path, kind: str, sizes: dict[str, int], batch: int) -> dict[str, int]:
    """Return the bytes that a rank sends in a step, by axis."""
    run = make_trainer(
        plant(600, d_in=12, features=24, l0=3), work, world=world,
        sae={"kind": kind, **sizes}, batch_size=batch, rows=batch * 30, dead_after_rows=10**6,
        lr=1e-4, log_every=10**6, checkpoint_every=10**6,
    )  # fmt: skip
    for _ in range(10):
        run.step(run.inputs.next(), run.inputs.loader.state_dict())
    world.traffic.clear()
    for _ in range(10):
        run.step(run.inputs.next(), run.inputs.loader.state_dict())
    sent = dict.fromkeys(("data", "feature", "all"), 0)
    for (axis, _), count in world.traffic.items():
        sent[axis] += count // 10
    return sent


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_traffic_along_features_grows_with_the_batch_and_not_with_the_dictionary(kind, pool_of, tmp_path):
    mesh, d_in, k = (1, 2), 12, 3

    def sent(d_sae: int, batch: int) -> int:
        sizes = {"d_sae": d_sae, "k": k}
        counts = pool_of(mesh).run(
            count_traffic, tmp_path / f"{d_sae}-{batch}", kind, sizes, batch, mesh=mesh
        )
        assert counts[0] == counts[1]
        return counts[0]["feature"] + counts[0]["all"]

    small = sent(48, 64)
    assert sent(768, 64) == small
    # what does not grow with the batch: counts, b_dec's gradient, and for batch_topk its search
    grown = sent(48, 512) - small
    assert grown <= (512 - 64) * (k + d_in) * 4 * 1.1


def uneven(world: World, work: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        make_trainer(rows(), work, sae={"kind": "topk", "d_sae": 46, "k": 3}, world=world, **RUN)
    return str(caught.value)


def test_features_that_cannot_be_spread_evenly_are_refused(pool_of, tmp_path):
    assert all("sae.d_sae = 48" in text for text in pool_of((1, 4)).run(uneven, tmp_path, mesh=(1, 4)))
