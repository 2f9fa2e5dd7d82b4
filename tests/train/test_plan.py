import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAEConfig
from sae.config import parse_config
from sae.errors import ConfigError
from train.plan import TrainConfig, make_plan
from train.schedule import learning_rate


def dictionary(d_sae=768, k=10):
    return parse_config(SAEConfig, {"kind": "topk", "d_sae": d_sae, "k": k}, where="test")


def test_auto_in_the_planted_setting():
    plan = make_plan(TrainConfig(), dictionary())
    assert (plan.rows, plan.batch_size, plan.lr) == (1_920_000, 256, 3e-3)
    assert plan.steps == 7500
    assert plan.dead_after_rows == 7680


@given(d_sae=st.integers(1, 2**20), ratio=st.integers(1, 4096), rows=st.none() | st.integers(1, 10**9))
def test_auto_is_sane_everywhere(d_sae, ratio, rows):
    plan = make_plan(TrainConfig(rows=rows or "auto"), dictionary(d_sae, max(1, d_sae // ratio)))
    assert 256 <= plan.batch_size <= 4096
    assert (plan.steps - 1) * plan.batch_size < plan.rows <= plan.steps * plan.batch_size
    assert 0 < plan.lr <= 3e-3
    assert 0 < plan.dead_after_rows <= max(1, plan.rows // 10)


def test_what_is_given_is_used():
    config = TrainConfig(rows=1000, batch_size=10, lr=0.5, warmup=0.1, decay=0.3, dead_after_rows=77)
    plan = make_plan(config, dictionary())
    assert (plan.rows, plan.batch_size, plan.steps, plan.lr) == (1000, 10, 100, 0.5)
    assert (plan.warmup_steps, plan.decay_steps, plan.dead_after_rows) == (10, 30, 77)


@pytest.mark.parametrize(
    ("rows", "batch", "batches"), [(10**6, 256, 128), (10**6, 4096, 8), (10**6, 10**5, 1), (900, 90, 10)]
)
def test_what_inference_uses_is_settled_on_as_many_rows_whatever_the_batch(rows, batch, batches):
    assert make_plan(TrainConfig(rows=rows, batch_size=batch), dictionary()).settle_batches == batches


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        make_plan(TrainConfig(rows=0, lr=-1.0, warmup=0.9, decay=0.9), dictionary(4, 5))
    for part in ("train.rows", "train.lr", "sae.k = 5", "train.warmup + train.decay"):
        assert part in str(caught.value)


def test_the_rate_rises_stays_and_falls():
    config = TrainConfig(rows=1000, batch_size=10, lr=1.0, warmup=0.1, decay=0.2)
    plan = make_plan(config, dictionary())
    rates = [learning_rate(step, plan) for step in range(plan.steps)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] == pytest.approx(1 / 11)
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == sorted(rates[80:], reverse=True) and rates[-1] == pytest.approx(1 / 21)
    assert min(rates) > 0
