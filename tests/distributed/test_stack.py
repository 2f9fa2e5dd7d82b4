"""Members of a stack on a mesh learn what they learn there one by one, with the collectives of one."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.base import SAEConfig
from sae.world import ProcessWorld, World
from tests.train.runs import make_trainer, plant
from train.checkpoint import complete, newest_common
from train.groups import Group, make_groups
from train.parallel import gather_whole
from train.side_by_side import SideBySide
from train.trainer import Trainer, TrainingError, train_together

KINDS = ["batch_topk", "frozen_decoder", "hierarchical_topk", "jumprelu", "matryoshka", "topk"]
MORE = {"matryoshka": {"detached": True, "by_rate": True}, "frozen_decoder": {"min_cosine": 0.8}}
ONE_K = {"hierarchical_topk"}
BATCH, STEPS = 32, 12
# k, learning rate, silent rows until a feature is dead: nothing of one would do for another
MEMBERS = [(2, 1e-3, 64), (6, 3e-3, 96), (3, 3e-4, 640), (3, 1e-3, 64)]


def make(world: World, work: Path, kind: str, number: int, **changed: Any) -> Trainer:
    k, lr, window = MEMBERS[number % len(MEMBERS)]
    given = {
        "batch_size": BATCH, "rows": BATCH * STEPS, "lr": lr, "dead_after_rows": window, "clip_norm": 0.05,
        "checkpoint_every": 100, "log_every": 1, **changed,
    }  # fmt: skip
    sae = {"kind": kind, "d_sae": 48, "k": 3 if kind in ONE_K else k, "k_aux": 7, **MORE.get(kind, {})}
    rows = plant(800, d_in=12, features=24, l0=3)
    run = make_trainer(rows, work / str(number), sae=sae, world=world, **given)
    # directions of its own, rows that all share
    fresh = run.sae.config.build(12, generator=torch.Generator().manual_seed(number), world=world)
    run.sae.load_state_dict(fresh.state_dict())
    # as after a checkpoint: other features of each are dead
    run.state.silent_rows[5 * number : 20] = window
    return run


def together(runs: list[Trainer]) -> None:
    """Train as a stack."""
    for run in runs:
        run.inputs = runs[0].inputs
    with SideBySide(len(runs), runs[0].world) as members:
        train_together(runs, members)
    assert len({run.sae.W_enc.untyped_storage().data_ptr() for run in runs}) == 1


def outcome(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a run ends with, whole."""
    silent = torch.cat(run.world.all_gather(run.state.silent_rows, axis="feature"))
    whole = gather_whole(run.sae, run.world)
    return {"silent_rows": silent, **({} if whole is None else whole.state_dict())}


def compare(world: World, work: Path, kind: str, precision: str) -> list[float]:
    """Let members learn one by one and together; return the most that the loss of dead features was, for each."""
    alone, stacked = (
        [make(world, work / name, kind, n) for n in range(len(MEMBERS))] for name in ("alone", "together")
    )
    for run in [*alone, *stacked]:
        run.sae.precision = precision
    for run in alone:
        run.fit()
    together(stacked)
    for one, member in zip(alone, stacked, strict=True):
        assert (member.state.step, member.state.rows) == (STEPS, STEPS * BATCH)
        expected = outcome(one)
        for name, value in outcome(member).items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    if not world.is_main:
        return []
    revived = []
    for one, member in zip(alone, stacked, strict=True):
        theirs, mine = (
            [json.loads(line) for line in (run.work / "metrics.jsonl").read_text().splitlines()]
            for run in (one, member)
        )
        for a, b in zip(mine, theirs, strict=True):
            for name in ("step", "rows", "loss", "mse", "auxk", "fvu", "l0", "dead", "lr"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (name, a["step"])
        revived.append(max(record["auxk"] for record in theirs))
    return revived


@pytest.mark.parametrize(
    ("kind", "mesh", "precision"),
    [
        *((kind, (2, 1), "fp32") for kind in KINDS),
        *((kind, (1, 2), "fp32") for kind in ("jumprelu", "matryoshka", "topk")),
        ("matryoshka", (2, 2), "fp32"),
        ("batch_topk", (2, 1), "bf16"),
    ],
)
def test_members_learn_what_they_learn_one_by_one(kind, mesh, precision, pool_of, tmp_path):
    revived = pool_of(mesh).run(compare, tmp_path, kind, precision, mesh=mesh)[0]
    assert all(value > 0 for value in revived)


def test_the_kinds_are_all_that_may_be_stacked():
    built = {kind: config for kind, config in SAEConfig.kinds.items() if config.trainable}
    found = {
        kind
        for kind, config in built.items()
        if config(kind=kind, d_sae=8, k=2).build(4, generator=torch.Generator()).stackable
    }
    assert found == set(KINDS)


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Count the collectives, which do what they do."""
    calls: Counter[tuple[str, str]] = Counter()
    call = ProcessWorld._call

    def count(self, name, value, axis, collective):
        calls[axis or "all", name] += 1
        call(self, name, value, axis, collective)

    ProcessWorld._call = count
    try:
        yield calls
    finally:
        ProcessWorld._call = call


def count_step(world: World, work: Path, kind: str, members: int, stacked: bool) -> Counter[tuple[str, str]]:
    """Return the collectives of one step, some features of all members being dead."""
    runs = [make(world, work, kind, n, dead_after_rows=64) for n in range(members)]
    for run in runs:
        run.inputs = runs[0].inputs
        run.state.silent_rows[::5] = 10**7
    groups = make_groups(runs, workers=1) if stacked else [Group([run]) for run in runs]
    assert len(groups) == (1 if stacked else members)
    batch, position = runs[0].inputs.next(), runs[0].inputs.loader.state_dict()
    with counted() as calls:
        for group in groups:
            group.step(batch, position)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_eight_members_has_the_collectives_of_one(kind, pool_of, tmp_path):
    def counts(members: int, stacked: bool) -> Counter[tuple[str, str]]:
        found = pool_of((2, 1)).run(count_step, tmp_path, kind, members, stacked, mesh=(2, 1))
        assert found[0] == found[1]
        return found[0]

    one = counts(1, True)
    assert counts(8, True) == one
    assert counts(8, False) == Counter({name: 8 * n for name, n in one.items()})
    assert one["all", "all_gather"] <= 1
    assert sum(one.values()) <= 9


def stop(world: World, work: Path, step: int) -> int:
    """Train a stack until the last rank gets a signal after `step`; return the signal that ended it."""
    runs = [make(world, work, "batch_topk", n) for n in range(len(MEMBERS))]
    poll = runs[-1].checkpoints.poll

    def signalled() -> None:
        poll()
        if runs[-1].state.step == step and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    runs[-1].checkpoints.poll = signalled
    try:
        together(runs)
    except KeyboardInterrupt as interrupt:
        return int(interrupt.args[0])
    return 0


def finish(world: World, work: Path, stacked: bool) -> list[dict[str, torch.Tensor]]:
    """Train to the end, as a stack or one by one."""
    runs = [make(world, work, "batch_topk", n) for n in range(len(MEMBERS))]
    if stacked:
        together(runs)
    else:
        for run in runs:
            run.fit()
    return [outcome(run) for run in runs]


def test_a_stack_that_is_stopped_continues_with_the_same_bits_and_its_members_by_themselves(
    pool_of, tmp_path
):
    mesh = (2, 1)
    pool = pool_of(mesh)
    undisturbed = pool.run(finish, tmp_path / "whole", True, mesh=mesh)[0]
    for folder in ("stack", "apart"):
        assert pool.run(stop, tmp_path / folder, 5, mesh=mesh) == [signal.SIGTERM] * 2
        places = [complete(tmp_path / folder / str(n) / "checkpoints")[-1] for n in range(len(MEMBERS))]
        assert {place.name for place in places} == {"step-0000000005"}
    continued = pool.run(finish, tmp_path / "stack", True, mesh=mesh)[0]
    apart = pool.run(finish, tmp_path / "apart", False, mesh=mesh)[0]
    for expected, same, close in zip(undisturbed, continued, apart, strict=True):
        for name, value in expected.items():
            assert torch.equal(same[name], value), name
            torch.testing.assert_close(close[name], value, rtol=1e-4, atol=1e-5)


def poison(world: World, work: Path, whose: int | None) -> str:
    """Spoil a member's direction, or a row, on the last rank only; return what the stack says."""
    runs = [make(world, work, "batch_topk", n) for n in range(len(MEMBERS))]
    feed = runs[0].inputs.loader.next_batch

    def poisoned():
        rows = feed()
        if runs[0].state.step == 5 and world.rank == world.size - 1:
            if whose is None:
                rows.x[3] = float("nan")
            else:
                runs[whose].sae.b_enc.data[7] = float("nan")
        return rows

    runs[0].inputs.loader.next_batch = poisoned
    with pytest.raises(TrainingError) as caught:
        together(runs)
    assert newest_common([run.checkpoints for run in runs]) == 5
    return str(caught.value)


@pytest.mark.parametrize(("whose", "said"), [(None, r"rows [19] of it"), (1, "k 6, learning rate 0.003")])
def test_a_loss_that_is_not_finite_on_one_rank_stops_the_stack_on_all(whose, said, pool_of, tmp_path):
    messages = pool_of((2, 1)).run(poison, tmp_path, whose, mesh=(2, 1))
    assert all("step 5 is not finite" in message and said in message for message in messages)
