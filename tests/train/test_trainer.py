"""The loop: exact resumption, silent loggers, counters, alarms, interruption, planted directions."""

import json
import os
import signal
import sys
import types

import pytest
import torch

from sae.base import SAEConfig
from sae.codes import from_dense
from sae.config import parse_config
from sae.errors import CheckpointError
from sae.metrics import match
from sae.sizing import suggest_sizes
from sae.world import World
from train.checkpoint import complete
from train.groups import make_groups
from train.inputs import Inputs
from train.interrupt import Interrupt
from train.plan import TrainConfig, make_plan
from train.result import advise
from train.run import choose_hook
from train.state import TrainState
from train.trainer import SAMPLE_ROWS, TrainingError

SAE = {"kind": "batch_topk", "d_sae": 40, "k": 3, "k_aux": 4}
RUN = {"batch_size": 32, "rows": 32 * 60, "dead_after_rows": 200, "checkpoint_every": 25, "log_every": 10}


def bits(trainer):
    state = {**trainer.sae.state_dict(), "silent": trainer.state.silent_rows}
    return state | {
        f"adam.{i}.{name}": value
        for i, slots in trainer.optimiser.state_dict()["state"].items()
        for name, value in slots.items()
    }


def assert_same_bits(a, b):
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class StopError(Exception):
    pass


def stop_at(step):
    def progress(done, total, text):
        if done == step:
            raise StopError

    return progress


@pytest.mark.parametrize(
    "kind", [{"kind": "topk"}, {"kind": "batch_topk"}, {"kind": "lista", "k_start": 3, "prefixes": [10, 40]}]
)
def test_a_run_continued_from_a_checkpoint_has_the_bits_of_one_that_was_not_interrupted(
    kind, small, trainer, tmp_path
):
    sae = {**SAE, **kind, "start": "geometric_median"}
    whole = trainer(small, tmp_path / "whole", sae=sae, **RUN)
    whole.fit()
    broken = trainer(small, tmp_path / "broken", sae=sae, **RUN)
    with pytest.raises(StopError):
        broken.fit(stop_at(40))
    broken.checkpoints.finish()
    assert [p.name for p in complete(tmp_path / "broken" / "checkpoints")] == ["step-0000000025"]
    again = trainer(small, tmp_path / "broken", sae=sae, **RUN)
    again.fit()
    assert again.state.step == whole.state.step == 60
    assert again.state.rows == 60 * 32
    assert_same_bits(whole, again)
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert steps == [[10, 20, 30, 40, 50, 60]] * 2


def test_active_features_fall_evenly_from_a_multiple_of_k(small, trainer, tmp_path):
    sae = {**SAE, "kind": "lista", "k_start": 3}
    trainer(small, tmp_path, sae=sae, **RUN).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # after 9, 19, ... of 60 steps 3 (1 + 2 (60 - done) / 60) = 9 - done / 10
    assert {line["step"]: line["l0"] for line in lines} == {10: 8, 20: 7, 30: 6, 40: 5, 50: 4, 60: 3}


def test_a_finished_run_is_not_trained_again(small, trainer, tmp_path):
    first = trainer(small, tmp_path, sae=SAE, **RUN)
    first.fit()
    second = trainer(small, tmp_path, sae=SAE, **RUN)
    second.fit()
    assert_same_bits(first, second)


def test_logging_and_checkpoints_change_no_bit(small, trainer, tmp_path, monkeypatch):
    broken = types.SimpleNamespace(init=lambda **_: broken_run)
    broken_run = types.SimpleNamespace(log=raises, finish=raises)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    often = {**RUN, "log_every": 1, "checkpoint_every": 1, "wandb": {"project": "p"}}
    never = {**RUN, "log_every": 10**6, "checkpoint_every": 10**6}
    a, b = (trainer(small, tmp_path / n, sae=SAE, **run) for n, run in (("a", often), ("b", never)))
    a.fit()
    b.fit()
    assert_same_bits(a, b)
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 60
    assert len(complete(tmp_path / "a" / "checkpoints")) == 2


def raises(*_, **__):
    raise RuntimeError("no network")


def test_wandb_offline_writes_a_run(small, trainer, tmp_path):
    pytest.importorskip("wandb")
    trainer(small, tmp_path, sae=SAE, **{**RUN, "rows": 64}, wandb={"project": "assay-test"}).fit()
    assert list((tmp_path / "wandb").rglob("*.wandb"))


def test_a_wandb_that_cannot_start_is_left_alone(small, trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=raises))
    trainer(small, tmp_path, sae=SAE, **{**RUN, "rows": 64}, wandb={"project": "p"}).fit()
    assert "no network" in caplog.text


def test_dead_counters_count_global_rows():
    class TwoRanks(World):
        def all_reduce(self, value, op="sum", *, axis=None):
            assert (op, axis) == ("max", "data")
            return torch.maximum(value, torch.tensor([0, 0, 1], dtype=value.dtype))

    state = TrainState.start(3, torch.device("cpu"))
    mine = from_dense(torch.tensor([[1.0, 0, 0], [2, 0, 0]]))
    state.advance(mine, TwoRanks(rank=0, size=2, axes={"data": 2, "feature": 1}))
    assert state.silent_rows.tolist() == [0, 4, 0]
    state.advance(mine, World())
    assert state.silent_rows.tolist() == [0, 6, 2]
    assert (state.step, state.rows) == (2, 6)
    assert state.dead(6).tolist() == [False, True, False]


def test_the_time_told_beforehand_changes_nothing(small, trainer, tmp_path):
    run, untouched = (trainer(small, tmp_path / name, sae=SAE, **RUN) for name in ("a", "b"))
    (group,) = make_groups([run], workers=1)
    assert 0 < group.probe(run.inputs.peek()) < 60
    assert_same_bits(run, untouched)
    assert not run.optimiser.state and all(p.grad is None for p in run.sae.parameters())


def test_a_loss_that_is_not_finite_stops_with_the_batch_and_a_checkpoint(small, trainer, tmp_path):
    run = trainer(small, tmp_path, sae=SAE, **RUN)
    feed = run.inputs.loader.next_batch

    def poisoned():
        rows = feed()
        if run.state.step == 30:
            rows.x[3] = float("nan")
        return rows

    run.inputs.loader.next_batch = poisoned
    with pytest.raises(TrainingError, match=r"step 30 is not finite[\s\S]*rows \[3\]"):
        run.fit()
    assert complete(tmp_path / "checkpoints")[-1].name == "step-0000000030"
    assert all(torch.isfinite(p).all() and p.grad is None for p in run.sae.parameters())
    again = trainer(small, tmp_path, sae=SAE, **RUN)
    again.fit()
    whole = trainer(small, tmp_path / "whole", sae=SAE, **RUN)
    whole.fit()
    assert_same_bits(again, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(number, small, trainer, tmp_path):
    before = signal.getsignal(number)
    run = trainer(small, tmp_path, sae=SAE, **RUN)

    def interrupt(done, total, text):
        if done == 20:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt) as caught:
        run.fit(interrupt)
    assert caught.value.args == (number,)
    assert signal.getsignal(number) is before
    assert complete(tmp_path / "checkpoints")[-1].name == "step-0000000020"
    again = trainer(small, tmp_path, sae=SAE, **RUN)
    again.fit()
    whole = trainer(small, tmp_path / "whole", sae=SAE, **RUN)
    whole.fit()
    assert_same_bits(again, whole)


def test_a_signal_in_the_last_step_is_not_forgotten(small, trainer, tmp_path):
    run = trainer(small, tmp_path, sae=SAE, **RUN)

    def interrupt(done, total, text):
        if done == total:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as caught:
        run.fit(interrupt)
    assert caught.value.args == (signal.SIGTERM,)
    again = trainer(small, tmp_path, sae=SAE, **RUN)
    again.fit()
    assert again.state.step == 60


def test_a_signal_that_nobody_asked_for_acts_at_the_end():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not seen
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(small, trainer, tmp_path):
    """`auto` may mean another on the machine that takes over."""
    lines = []

    def stop(done, total, text):
        if done == 30:
            raise StopError

    run = trainer(small, tmp_path, sae=SAE, precision="fp32", **RUN)
    run.sae.precision = "bf16"
    with pytest.raises(StopError):
        run.fit(stop)
    again = trainer(small, tmp_path, sae=SAE, precision="fp32", **RUN)
    again.fit(lambda done, total, text: lines.append(text))
    assert again.sae.precision == "bf16"
    assert "continuing at step 25 in bf16, as it was begun" in lines[0]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(small, trainer, tmp_path):
    trainer(small, tmp_path, sae=SAE, **RUN).fit()
    with pytest.raises(CheckpointError, match=r"another run[\s\S]*plan"):
        trainer(small, tmp_path, sae=SAE, **{**RUN, "lr": 1e-4}).fit()
    tensors = complete(tmp_path / "checkpoints")[-1] / "shard-00000-of-00001.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(small, tmp_path, sae=SAE, **RUN).fit()
    tensors.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(small, tmp_path, sae=SAE, **RUN).fit()


def test_dead_features_and_slow_data_are_reported(small, trainer, tmp_path):
    run = trainer(small, tmp_path, sae={**SAE, "d_sae": 400, "aux_alpha": 0.0}, **RUN)
    inputs = run.inputs

    class Slow(type(inputs.loader)):
        def next_batch(self):
            self.wait_seconds += 10
            return super().next_batch()

    slow = Slow(inputs.loader.x, batch_size=32)
    run.inputs = Inputs(slow, inputs.mean, inputs.scale)
    result = run.fit()
    assert result.dead > 0.1
    assert result.waited > 0.1
    assert len(result.advice) == 2
    assert "sae.d_sae" in result.advice[0]


@pytest.mark.parametrize(
    ("d_sae", "dead", "says"), [(400, 0.5, "sae.d_sae=256 would hold the 200"), (40, 0.5, None)]
)
def test_no_larger_dictionary_is_advised_where_features_are_dead(d_sae, dead, says):
    plan = make_plan(parse_config(TrainConfig, RUN, where="test"), parse_config(SAEConfig, SAE, where="test"))
    (advice,) = advise(dead, 0.0, plan, d_sae=d_sae)
    assert says in advice if says else "d_sae" not in advice
    assert "raise sae.k" in advice


def test_rows_of_a_small_split_do_not_count_twice_for_what_they_support(
    small, trainer, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr("train.trainer.suggest_sizes", lambda x: seen.append(x) or suggest_sizes(x))
    # no two rows alike: some of those planted have no direction at all
    planted = small._replace(x=small.x + 0.01 * torch.randn(small.x.shape))
    run = trainer(planted, tmp_path, sae=SAE, **RUN)
    run.fit(lambda *_: None)
    (sample,) = seen
    assert len(sample) == run.inputs.loader.rows_per_epoch == len(sample.unique(dim=0)) < SAMPLE_ROWS
    trainer(small, tmp_path / "unseen", sae=SAE, **RUN).fit()
    assert len(seen) == 1, "nobody hears it"


def test_the_estimate_comes_before_the_first_step(small, trainer, tmp_path):
    lines = []
    trainer(small, tmp_path, sae=SAE, **RUN).fit(lambda done, total, text: lines.append((done, total, text)))
    assert lines[0][:2] == (0, 60)
    assert "1,920 rows in 60 steps; about" in lines[0][2]
    assert [done for done, _, _ in lines[1:]] == [10, 20, 30, 40, 50, 60]


def test_which_hook():
    assert choose_hook(TrainConfig(), {"a": 3}) == "a"
    assert choose_hook(TrainConfig(hook="b"), {"a": 3, "b": 4}) == "b"
    for config in (TrainConfig(), TrainConfig(hook="c")):
        with pytest.raises(Exception, match="a or b"):
            choose_hook(config, {"a": 3, "b": 4})


@pytest.mark.parametrize(("kind", "least"), [("topk", 0.95), ("batch_topk", 0.9)])
def test_planted_directions_are_found(kind, least, plant_rows, trainer, tmp_path):
    planted = plant_rows(30_000, d_in=32, features=48, l0=2)
    run = trainer(planted, tmp_path, sae={"kind": kind, "d_sae": 64, "k": 2}, rows=150_000)
    run.fit()
    assert match(run.sae.W_dec, planted.directions).mcc > least
