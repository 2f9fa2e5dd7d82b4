"""The training kernels against the dense oracle, and both against what the contract says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.codes import SparseCodes, concatenate, from_dense
from sae.errors import ConfigError
from sae.kernels import cpu, find_kernels
from sae.world import World

WORLD = World()
CPU, REFERENCE = find_kernels("cpu"), find_kernels("reference")


def problem(rows, d_in, d_sae, seed, *, rounded=False):
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(rows, d_in, generator=generator), torch.randn(d_sae, d_in, generator=generator)
    b = torch.randn(d_sae, generator=generator) - 0.5
    # small integers make many exact ties, and products that are the same in any order of summation
    return (x.round(), W.round(), b.round()) if rounded else (x.double(), W.double(), b.double())


def same(a: SparseCodes, b: SparseCodes):
    assert torch.equal(a.offsets, b.offsets)
    assert torch.equal(a.features, b.features)
    torch.testing.assert_close(a.values, b.values)


@given(
    rows=st.integers(1, 40),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 33),
    k=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    rounded=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_selections_agree_with_the_oracle(rows, d_in, d_sae, k, seed, rounded):
    x, W, b = problem(rows, d_in, d_sae, seed, rounded=rounded)
    same(CPU.select_rows(x, W, b, k=k), REFERENCE.select_rows(x, W, b, k=k))
    same(CPU.select_batch(x, W, b, k=k, world=WORLD), REFERENCE.select_batch(x, W, b, k=k, world=WORLD))
    for threshold in (torch.tensor(0.0), torch.tensor(1.0), b.abs().float()):
        above = threshold.to(x.dtype)
        same(CPU.select_above(x, W, b, threshold=above), REFERENCE.select_above(x, W, b, threshold=above))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE])
def test_ties_go_to_the_lower_feature(kernels):
    x, W, b = torch.ones(3, 1), torch.ones(6, 1), torch.tensor([0.0, 1, 0, 1, 1, 0])
    codes = kernels.select_rows(x, W, b, k=2)
    assert codes.features.tolist() == [1, 3] * 3
    codes = kernels.select_rows(x, W, b, k=4)
    assert codes.features.tolist() == [0, 1, 3, 4] * 3
    batch = kernels.select_batch(x, W, b, k=2, world=WORLD)
    assert batch.features.tolist() == [1, 3, 4, 1, 3, 4]
    assert batch.offsets.tolist() == [0, 3, 6, 6]


@pytest.mark.parametrize("kernels", [CPU, REFERENCE])
def test_only_positive_entries_are_kept(kernels):
    x, W, b = torch.eye(2), torch.tensor([[1.0, -1], [-1, -1], [2, -3]]), torch.zeros(3)
    for codes in (kernels.select_rows(x, W, b, k=3), kernels.select_batch(x, W, b, k=3, world=WORLD)):
        assert codes.features.tolist() == [0, 2]
        assert codes.offsets.tolist() == [0, 2, 2]
    strict = kernels.select_above(x, W, b, threshold=torch.tensor(1.0))
    assert strict.features.tolist() == [2]


@pytest.mark.parametrize("kernels", [CPU, REFERENCE])
def test_nan_is_not_hidden(kernels):
    x, W, b = torch.ones(2, 2), torch.tensor([[1.0, 1], [float("nan"), 1], [2, 1]]), torch.zeros(3)
    for codes in (kernels.select_rows(x, W, b, k=1), kernels.select_batch(x, W, b, k=2, world=WORLD)):
        assert codes.values.isnan().any()


def test_chunks_do_not_change_the_result(monkeypatch):
    x, W, b = problem(50, 6, 31, 0)
    whole = CPU.select_rows(x, W, b, k=4), CPU.select_batch(x, W, b, k=4, world=WORLD)
    monkeypatch.setattr(cpu, "ROWS_PER_CHUNK", 7)
    same(whole[0], CPU.select_rows(x, W, b, k=4))
    same(whole[1], CPU.select_batch(x, W, b, k=4, world=WORLD))


def test_batch_selection_survives_a_misleading_sample():
    x, W, b = problem(128, 6, 31, 0)
    x[::4] *= 100  # exactly the rows that the guess is made from
    same(CPU.select_batch(x, W, b, k=3, world=WORLD), REFERENCE.select_batch(x, W, b, k=3, world=WORLD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_products_agree_with_the_oracle(dtype, density):
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(13, 29, generator=generator) * (torch.rand(13, 29, generator=generator) < density)
    codes = from_dense(dense.to(dtype))
    W, g = (
        torch.randn(29, 5, generator=generator, dtype=dtype),
        torch.randn(13, 5, generator=generator, dtype=dtype),
    )
    torch.testing.assert_close(CPU.decode(codes, W), REFERENCE.decode(codes, W))
    torch.testing.assert_close(CPU.value_gradients(codes, g, W), REFERENCE.value_gradients(codes, g, W))
    torch.testing.assert_close(CPU.weight_gradient(codes, g, 29), REFERENCE.weight_gradient(codes, g, 29))


def test_dense_round_trip_and_concatenation():
    dense = torch.tensor([[0.0, 2, 0], [0, 0, 0], [1, 0, 3]])
    codes = from_dense(dense)
    assert torch.equal(codes.to_dense(3), dense)
    assert codes.row_ids().tolist() == [0, 2, 2]
    same(concatenate([from_dense(dense[:1]), from_dense(dense[1:])]), codes)
    assert from_dense(torch.zeros(2, 3)).to_dense(3).shape == (2, 3)


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="reference"):
        find_kernels("cuda")
