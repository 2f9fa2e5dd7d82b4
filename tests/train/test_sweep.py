"""Several dictionaries from one read: the bits of each, what is read, interruption, which ones, the frontier."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from activations_cache.selection import Selection
from sae.base import SAEConfig
from sae.config import parse_config
from sae.errors import ConfigError
from sae.world import World
from tests.train.test_train_sae import HOOK, write
from train.checkpoint import complete, newest_common
from train.frontier import Point, as_svg, as_table, frontier, own_seconds, read_sweep, write_sweep
from train.groups import make_groups
from train.plan import TrainConfig
from train.run import Run, train_saes
from train.side_by_side import SideBySide
from train.sweep import Member, make_members
from train.trainer import METRICS, Trainer, TrainingError, train_together

WEIGHTS = "weights.safetensors"
BASE = parse_config(SAEConfig, {"kind": "batch_topk", "d_sae": 32, "k": 2}, where="test")
TRAIN = TrainConfig(rows=6400, batch_size=128, checkpoint_every=10, log_every=10)
OVERRIDES: list[dict[str, Any]] = [
    {"sae.k": 4},
    {"sae.kind": "topk", "sae.d_sae": 48},
    {"seed": 7},
    {"train.lr": 3e-4},
    {"sae.kind": "jumprelu"},
    {"sae.kind": "jumprelu", "sae.k": 4},
    {"sae.kind": "topk", "sae.d_sae": 48, "sae.k": 5},
]
MEMBERS = make_members(BASE, TRAIN, 0, OVERRIDES)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Members that are trained side by side share the threads; here as many as each gets."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread_again(one_thread):
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(plant_rows, tmp_path_factory):
    planted = plant_rows(6000, d_in=16, features=24, l0=2)
    return write(tmp_path_factory.mktemp("store") / "activations.zarr", planted.x.numpy())


def train(store: Path, members: tuple[Member, ...], folder: Path, progress: Any = None) -> None:
    runs = [Run(m.sae, m.train, m.seed, folder / m.name, folder / "work" / m.name) for m in members]
    given = {} if progress is None else {"progress": progress}
    train_saes(store, runs, hook=HOOK, row_seed=0, world=World(), **given)


def weights(folder: Path) -> dict[str, bytes]:
    return {m.name: (folder / m.name / WEIGHTS).read_bytes() for m in MEMBERS}


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    torch.set_deterministic_debug_mode("error")
    train(store, MEMBERS, folder)
    return folder


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_member_has_the_bits_that_it_has_alone(member, swept, store, tmp_path):
    train(store, (member,), tmp_path)
    assert (tmp_path / member.name / WEIGHTS).read_bytes() == weights(swept)[member.name]


def test_side_by_side_members_have_the_bits_that_they_have_one_after_the_other(swept, store, tmp_path):
    torch.set_num_threads(2)
    with SideBySide(len(MEMBERS), World()) as members:
        assert members.workers == 2
        assert members.each(lambda _: torch.get_num_threads(), MEMBERS) == [1] * len(MEMBERS)
    train(store, MEMBERS, tmp_path)
    assert torch.get_num_threads() == 2
    assert weights(tmp_path) == weights(swept)


def test_small_ones_of_one_configuration_are_stacked(small, trainer, tmp_path, monkeypatch):
    def make(number: int, **sae: Any) -> Trainer:
        given = {"kind": "topk", "d_sae": 40, "k": 3, **sae}
        return trainer(small, tmp_path / str(number), sae=given, batch_size=32, rows=320)

    def sizes(trainers: list[Trainer], workers: int) -> list[int]:
        return [len(group.trainers) for group in make_groups(trainers, workers=workers)]

    alike = [make(i) for i in range(5)]
    assert sizes(alike, 1) == [5]
    assert sizes(alike[:4], 2) == [4], "so small ones are not spread over threads"
    assert sizes(alike, 2) == [3, 2]
    monkeypatch.setattr("train.groups.TINY_PRODUCT", 0)
    assert sizes(alike, 2) == [3, 2], "each of those who work at once has a share"
    assert sizes(alike, 8) == [1] * 5
    monkeypatch.setattr("train.groups.STACK_ENTRIES", 2 * 32 * 40)
    assert sizes(alike, 1) == [1, 2, 2]
    monkeypatch.undo()
    assert sizes([make(0), make(1, k=4), make(2), make(3, kind="lista")], 1) == [3, 1]
    assert sizes([make(0, kind="hierarchical_topk"), make(1, kind="hierarchical_topk", k=4)], 1) == [1, 1]
    assert sizes([make(0, kind="lista"), make(1, kind="lista")], 1) == [1, 1]
    other = make(1)
    other.plan = replace(other.plan, lr=1e-5)
    assert sizes([make(0), other], 1) == [2]
    other.sae.precision = "bf16"
    assert sizes([make(0), other], 1) == [1, 1]
    other = make(1)
    other.plan = replace(other.plan, dead_after_rows=7)
    assert sizes([make(0), other], 1) == [2]
    other.plan = replace(other.plan, clip_norm=1.0)
    assert sizes([make(0), other], 1) == [1, 1]


def test_stacks_that_work_at_once_have_as_much_to_do(small, trainer, tmp_path):
    def make(k: int) -> Trainer:
        sae = {"kind": "topk", "d_sae": 40, "k": k}
        return trainer(small, tmp_path / str(k), sae=sae, batch_size=32, rows=320)

    groups = make_groups([make(k) for k in (16, 1, 2, 3, 4, 6, 8, 12)], workers=2)
    assert [[trainer.sae.config.k for trainer in group.trainers] for group in groups] == [
        [1, 4, 6, 16],
        [2, 3, 8, 12],
    ]


def test_large_ones_are_not_stacked(small, trainer, tmp_path, monkeypatch):
    settings = {"sae": {"kind": "topk", "d_sae": 40, "k": 3}, "batch_size": 32, "rows": 320}
    pair = [trainer(small, tmp_path / name, **settings) for name in "ab"]
    monkeypatch.setattr("train.groups.SMALL_PRODUCT", 32 * 40 * pair[0].sae.d_in - 1)
    assert [len(group.trainers) for group in make_groups(pair, workers=1)] == [1, 1]


def test_a_stack_knows_who_was_silent_before(small, trainer, tmp_path):
    def pair(folder: Path) -> list[Trainer]:
        found: list[Trainer] = [
            trainer(
                small, folder / str(i), seed=i, sae={"kind": "topk", "d_sae": 40, "k": k, "k_aux": 30},
                batch_size=32, rows=320, dead_after_rows=window,
            )
            for i, (k, window) in enumerate([(3, 64), (5, 32)])
        ]  # fmt: skip
        # as after a checkpoint; the last ten are dead by the window of the second only
        for i, run in enumerate(found):
            run.state.silent_rows[5 * i : 20] = run.plan.dead_after_rows
            run.state.silent_rows[30:] = 40
        return found

    alone, together = pair(tmp_path / "alone"), pair(tmp_path / "together")
    batch, position = alone[0].inputs.peek(), alone[0].inputs.loader.state_dict()
    (group,) = make_groups(together, workers=1)
    found = group.apart(group.step(batch, position))
    for run, member, losses in zip(alone, together, found, strict=True):
        expected = run.step(batch, position)
        assert expected.parts["auxk"] > 0
        torch.testing.assert_close(losses.parts["auxk"], expected.parts["auxk"])
        assert member.state.silent_rows.equal(run.state.silent_rows)
        assert (member.state.step, member.state.rows) == (run.state.step, run.state.rows) == (1, 32)


def test_a_stack_is_clipped_member_by_member(small, trainer, tmp_path):
    settings = {
        "sae": {"kind": "topk", "d_sae": 40, "k": 3},
        "batch_size": 32,
        "rows": 320,
        "clip_norm": 1e-3,
    }

    def runs(folder: Path) -> list[Trainer]:
        found: list[Trainer] = [
            trainer(small, folder / str(i), seed=i, lr=lr, **settings) for i, lr in enumerate((1e-3, 3e-3))
        ]
        for run in found:
            run.inputs = found[0].inputs
        return found

    together = runs(tmp_path / "together")
    with SideBySide(1, World()) as members:
        train_together(together, members)
    for i, member in enumerate(together):
        alone = runs(tmp_path / f"alone{i}")[i]
        alone.fit()
        for name, value in alone.sae.state_dict().items():
            torch.testing.assert_close(member.sae.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_what_a_member_raises_comes_when_all_have_ended():
    ended = []

    def work(i: int) -> int:
        if i == 1:
            raise ValueError("the second")
        time.sleep(0.1)
        ended.append(i)
        return i

    torch.set_num_threads(3)
    with SideBySide(4, World()) as members, pytest.raises(ValueError, match="the second"):
        members.each(work, range(4))
    assert sorted(ended) == [0, 2, 3]


def test_members_differ(swept):
    assert len(set(weights(swept).values())) == len(MEMBERS)


def test_the_store_is_read_as_often_as_for_one(store, tmp_path, monkeypatch):
    rows: list[int] = []
    read = Selection.read

    def counted(self, piece, buffers, at):
        rows.append(piece[2])
        return read(self, piece, buffers, at)

    monkeypatch.setattr(Selection, "read", counted)
    train(store, MEMBERS[:1], tmp_path / "one")
    alone = sum(rows)
    rows.clear()
    train(store, MEMBERS, tmp_path / "all")
    assert sum(rows) == alone > 0


class PowerCutError(Exception):
    pass


def cut_at(step: int) -> Any:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise PowerCutError

    return progress


def test_interrupted_and_continued_it_has_the_bits_of_one_that_was_not(swept, store, tmp_path):
    with pytest.raises(PowerCutError):
        train(store, MEMBERS, tmp_path, cut_at(40))
    kept = {path.parent.name: complete(path) for path in tmp_path.glob("work/*/checkpoints")}
    assert len(kept) == len(MEMBERS)
    assert all(places for places in kept.values())
    train(store, MEMBERS, tmp_path)
    assert weights(tmp_path) == weights(swept)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / MEMBERS[1].name / METRICS).read_text().splitlines()
    ]
    assert steps == list(range(10, 51, 10))


def test_all_continue_from_the_newest_step_that_all_have(swept, store, tmp_path):
    with pytest.raises(PowerCutError):
        train(store, MEMBERS, tmp_path, cut_at(40))
    # as if the machine had died before this member's last checkpoint was whole
    newest = tmp_path / "work" / MEMBERS[2].name / "checkpoints" / "step-0000000030"
    (newest / "index.json").unlink(missing_ok=True)
    texts: list[str] = []
    train(store, MEMBERS, tmp_path, lambda done, total, text: texts.append(text))
    assert "8 dictionaries" in texts[0]
    assert "continuing at step 20" in texts[0]
    assert weights(tmp_path) == weights(swept)


def test_a_member_that_diverges_is_named(small, trainer, tmp_path):
    settings = {"batch_size": 32, "rows": 32 * 40, "checkpoint_every": 10}
    sae = {"kind": "topk", "d_sae": 40, "k": 3}
    runs: list[Trainer] = [
        trainer(small, tmp_path / name, sae=sae, lr=lr, **settings)
        for name, lr in (("fine", 1e-3), ("wild", 1e30))
    ]
    runs[1].inputs = runs[0].inputs
    with (
        SideBySide(1, World()) as members,
        pytest.raises(TrainingError, match=r"topk of 40 features, k 3, learning rate 1e\+30"),
    ):
        train_together(runs, members)
    assert newest_common([run.checkpoints for run in runs]) == 1, "both stand before the same step"


def test_runs_of_other_batches_are_refused(store, tmp_path):
    other = TRAIN.model_copy(update={"rows": 3200})
    runs = [Run(BASE, c, 0, tmp_path / "a", tmp_path / "b") for c in (TRAIN, other)]
    with pytest.raises(ConfigError, match="3200 rows in batches of 128; 6400 rows"):
        train_saes(store, runs, hook=HOOK, row_seed=0, world=World())


def test_a_grid_has_every_combination_and_the_base_first():
    members = make_members(BASE, TRAIN, 0, {"sae.k": [1, 2], "seed": [0, 1]})
    assert [m.name for m in members] == [
        "batch_topk-32-2-0",
        "batch_topk-32-1-0",
        "batch_topk-32-1-1",
        "batch_topk-32-2-1",
    ]
    assert [(m.sae.k, m.seed) for m in members] == [(2, 0), (1, 0), (1, 1), (2, 1)]
    assert [m.name for m in MEMBERS][4:] == [
        "batch_topk-32-2-0-lr-0.0003",
        "jumprelu-32-2-0",
        "jumprelu-32-4-0",
        "topk-48-5-0",
    ]


def test_auto_rows_are_the_most_that_any_member_would_take_alone():
    members = make_members(BASE, TrainConfig(), 0, {"sae.d_sae": [32, 4096]})
    assert {(m.train.rows, m.train.batch_size) for m in members} == {(25_000 * 4096 // 2, 4096)}
    alone = make_members(BASE, TrainConfig(), 0)
    assert [(m.name, m.train) for m in alone] == [("batch_topk-32-2-0", TrainConfig())]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"train.rows": [1, 2]}, "train.rows cannot differ"),
        ({"sae.k": [2]}, "no member besides"),
        ({"sae.k": [4, 64]}, "k = 64 exceeds"),
        ({"sae.kk": [4]}, "kk: unknown key"),
        ({"sae.kind": ["topkk"]}, "unknown kind"),
        ([{"sae.k": 4}, {"sae.k": 4}], "member 2: batch_topk-32-4-0 is there already"),
        ({"seed": [-1]}, "seed is no number from 0"),
        ({"seed": [2**32]}, "seed is no number from 0 to 4294967295"),
        ({"train.lr": ["fast"]}, "train"),
        (
            [{"train.batch_size": 3}, {"sae.k": 0}],
            r"(?s)train.batch_size cannot differ.*k: Input should be greater",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep, message):
    with pytest.raises(ConfigError, match=message):
        make_members(BASE, TRAIN, 0, sweep)


POINTS = [
    Point("a", 0.5, 2.0, 0.0, 1.0),
    Point("b<", 0.3, 4.0, 0.1, 1.0),
    Point("c", 0.4, 5.0, 0.0, 1.0),
    Point("d", 0.1, 8.0, 0.0, 1.0),
]


def test_the_frontier_leaves_out_what_another_beats():
    assert [point.name for point in frontier(POINTS[::-1])] == ["a", "b<", "d"]


def test_table_and_drawing_hold_every_member(tmp_path):
    write_sweep(POINTS, "confirm", tmp_path / "sweep.json")
    assert read_sweep(tmp_path / "sweep.json") == (POINTS, "confirm")
    assert as_table(POINTS, "confirm").row_count == 4
    drawing = ElementTree.fromstring(as_svg(POINTS, "confirm"))
    texts = {element.text for element in drawing.iter() if element.tag.endswith("text")}
    assert {point.name for point in POINTS} <= texts
    circles = [e for e in drawing.iter() if e.tag.endswith("circle")]
    # more active features lie to the right, less unexplained lies below
    assert float(circles[0].get("cx", 0)) < float(circles[3].get("cx", 0))
    assert float(circles[0].get("cy", 0)) < float(circles[3].get("cy", 0))
    assert as_svg(POINTS[:1], "confirm")


def test_figures_that_are_not_finite_cost_the_others_nothing(tmp_path):
    lost = [
        Point("e", math.nan, 1.0, 0.0, 1.0),
        Point("f", math.inf, 0.5, 0.0, 1.0),
        Point("g", 0.0, math.nan, 0.0, 1.0),
    ]
    points = [*lost, *POINTS]
    assert frontier(points) == frontier(POINTS)
    assert as_svg(points, "confirm") == as_svg(POINTS, "confirm")
    assert as_svg(lost, "confirm")
    write_sweep(points, "confirm", tmp_path / "sweep.json")
    assert "NaN" not in (tmp_path / "sweep.json").read_text()
    back = {point.name: point for point in read_sweep(tmp_path / "sweep.json")[0]}
    assert math.isnan(back["e"].fvu) and back["d"] == POINTS[3] and len(back) == len(points)
    assert as_table(points, "confirm").row_count == len(points)


def test_seconds_are_those_of_a_members_own_steps(swept):
    own = [own_seconds(swept / member.name / METRICS) for member in MEMBERS]
    last = json.loads((swept / MEMBERS[0].name / METRICS).read_text().splitlines()[-1])
    assert all(seconds > 0 for seconds in own)
    assert sum(own) <= last["seconds"]
