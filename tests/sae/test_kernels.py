"""The training kernels against the dense oracle, and both against what the contract says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.codes import SparseCodes, concatenate, from_dense
from sae.errors import ConfigError
from sae.kernels import cpu, find_kernels, find_precision, portable

CPU, PORTABLE, REFERENCE = (find_kernels(name) for name in ("cpu", "portable", "reference"))


def problem(rows, d_in, d_sae, seed, *, rounded=False):
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(rows, d_in, generator=generator), torch.randn(d_sae, d_in, generator=generator)
    b = torch.randn(d_sae, generator=generator) - 0.5
    # products of multiples of 1/32 are the same in any order of summation; of small integers, many tie
    return tuple(t.round() if rounded else (32 * t).round() / 32 for t in (x, W, b))


def same(a: SparseCodes, b: SparseCodes):
    assert torch.equal(a.offsets, b.offsets)
    assert torch.equal(a.features, b.features)
    torch.testing.assert_close(a.values, b.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", [CPU, PORTABLE])
@given(
    rows=st.integers(1, 40),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 90),
    k=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    rounded=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_selections_agree_with_the_oracle(kernels, dtype, rows, d_in, d_sae, k, seed, rounded):
    x, W, b = (t.to(dtype) for t in problem(rows, d_in, d_sae, seed, rounded=rounded))
    same(kernels.select_rows(x, W, b, k=k), REFERENCE.select_rows(x, W, b, k=k))
    same(kernels.select_largest(x, W, b, k=k), REFERENCE.select_largest(x, W, b, k=k))
    same(kernels.select_batch(x, W, b, k=k), REFERENCE.select_batch(x, W, b, k=k))
    for threshold in (torch.tensor(0.0), torch.tensor(1.0), b.abs().float()):
        above = threshold.to(x.dtype)
        same(kernels.select_above(x, W, b, threshold=above), REFERENCE.select_above(x, W, b, threshold=above))


@given(k=st.integers(1, 8), d_sae=st.integers(16, 1500), seed=st.integers(0, 10**6), rounded=st.booleans())
@settings(max_examples=100, deadline=None)
def test_selection_by_tiles_agrees_with_the_oracle(k, d_sae, seed, rounded):
    x, W, b = problem(20, 3, d_sae, seed, rounded=rounded)
    same(CPU.select_rows(x, W, b, k=k), REFERENCE.select_rows(x, W, b, k=k))
    same(CPU.select_largest(x, W, b, k=k), REFERENCE.select_largest(x, W, b, k=k))


@given(
    places=st.lists(st.integers(0, 1999), max_size=40),
    odd=st.sampled_from([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-42, 3e38]),
    k=st.integers(1, 30),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_odd_numbers_are_ordered_as_the_oracle_orders_them(places, odd, k, seed):
    b = torch.randn(200, generator=torch.Generator().manual_seed(seed)).repeat(10, 1)
    b.view(-1)[places] = odd
    for row in b[:3]:
        given = torch.zeros(1, 1), torch.zeros(200, 1), row
        found, exact = (kernels.select_rows(*given, k=k) for kernels in (CPU, REFERENCE))
        assert torch.equal(found.features, exact.features)
        torch.testing.assert_close(found.values, exact.values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kernels", [CPU, PORTABLE, REFERENCE])
def test_ties_go_to_the_lower_feature(kernels):
    x, W, b = torch.ones(3, 1), torch.ones(6, 1), torch.tensor([0.0, 1, 0, 1, 1, 0])
    codes = kernels.select_rows(x, W, b, k=2)
    assert codes.features.tolist() == [1, 3] * 3
    codes = kernels.select_rows(x, W, b, k=4)
    assert codes.features.tolist() == [0, 1, 3, 4] * 3
    batch = kernels.select_batch(x, W, b, k=2)
    assert batch.features.tolist() == [1, 3, 4, 1, 3, 4]
    assert batch.offsets.tolist() == [0, 3, 6, 6]


@pytest.mark.parametrize("kernels", [CPU, PORTABLE, REFERENCE])
def test_only_positive_entries_are_kept(kernels):
    x, W, b = torch.eye(2), torch.tensor([[1.0, -1], [-1, -1], [2, -3]]), torch.zeros(3)
    for codes in (kernels.select_rows(x, W, b, k=3), kernels.select_batch(x, W, b, k=3)):
        assert codes.features.tolist() == [0, 2]
        assert codes.offsets.tolist() == [0, 2, 2]
    strict = kernels.select_above(x, W, b, threshold=torch.tensor(1.0))
    assert strict.features.tolist() == [2]


@pytest.mark.parametrize("kernels", [CPU, PORTABLE, REFERENCE])
def test_nan_is_not_hidden(kernels):
    x, W, b = torch.ones(2, 2), torch.tensor([[1.0, 1], [float("nan"), 1], [2, 1]]), torch.zeros(3)
    for codes in (kernels.select_rows(x, W, b, k=1), kernels.select_batch(x, W, b, k=2)):
        assert codes.values.isnan().any()


def test_chunks_do_not_change_the_result(monkeypatch):
    x, W, b = problem(50, 6, 31, 0)
    whole = CPU.select_rows(x, W, b, k=4), CPU.select_batch(x, W, b, k=4)
    monkeypatch.setattr(portable, "ROWS_PER_CHUNK", 7)
    same(whole[0], CPU.select_rows(x, W, b, k=4))
    same(whole[1], CPU.select_batch(x, W, b, k=4))


def test_batch_selection_survives_a_misleading_sample():
    x, W, b = problem(128, 6, 31, 0)
    x[::4] *= 100  # exactly the rows that the guess is made from
    same(CPU.select_batch(x, W, b, k=3), REFERENCE.select_batch(x, W, b, k=3))


@pytest.mark.parametrize("kernels", [CPU, PORTABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_products_agree_with_the_oracle(kernels, dtype, density):
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(13, 29, generator=generator) * (torch.rand(13, 29, generator=generator) < density)
    codes = from_dense(dense.to(dtype))
    W, g = (
        torch.randn(29, 5, generator=generator, dtype=dtype),
        torch.randn(13, 5, generator=generator, dtype=dtype),
    )
    torch.testing.assert_close(kernels.decode(codes, W), REFERENCE.decode(codes, W))
    torch.testing.assert_close(kernels.value_gradients(codes, g, W), REFERENCE.value_gradients(codes, g, W))
    torch.testing.assert_close(kernels.weight_gradient(codes, g, 29), REFERENCE.weight_gradient(codes, g, 29))


@pytest.mark.parametrize("kernels", [CPU, PORTABLE])
@pytest.mark.parametrize("k", [1, 2, 5, 30, 99])
@pytest.mark.parametrize("rounded", [False, True])
def test_explanations_agree_with_the_oracle(kernels, k, rounded):
    x, W_enc, b_enc = problem(37, 5, 30, 0, rounded=rounded)
    residual, W_dec = problem(37, 5, 30, 1)[:2]
    given = (W_enc, b_enc, W_dec.to(W_enc.dtype))
    ours = kernels.explain(x, residual.to(x.dtype), given, k=k)
    theirs = REFERENCE.explain(x, residual.to(x.dtype), given, k=k)
    for name, value in theirs._asdict().items():
        torch.testing.assert_close(getattr(ours, name), value, msg=name, rtol=1e-4, atol=1e-3)


def test_dense_round_trip_and_concatenation():
    dense = torch.tensor([[0.0, 2, 0], [0, 0, 0], [1, 0, 3]])
    codes = from_dense(dense)
    assert torch.equal(codes.to_dense(3), dense)
    assert codes.row_ids().tolist() == [0, 2, 2]
    same(concatenate([from_dense(dense[:1]), from_dense(dense[1:])]), codes)
    assert from_dense(torch.zeros(2, 3)).to_dense(3).shape == (2, 3)


@pytest.mark.parametrize("kernels", [find_kernels(name, precision="bf16") for name in ("cpu", "portable")])
def test_a_bf16_product_proposes_and_full_precision_decides(kernels):
    x, W, b = (t.float() for t in problem(300, 32, 512, 0))
    for found, exact in (
        (kernels.select_rows(x, W, b, k=8), REFERENCE.select_rows(x, W, b, k=8)),
        (kernels.select_largest(x, W, b, k=8), REFERENCE.select_largest(x, W, b, k=8)),
        (kernels.select_batch(x, W, b, k=8), REFERENCE.select_batch(x, W, b, k=8)),
        (
            kernels.select_above(x, W, b, threshold=b.abs() + 10),
            REFERENCE.select_above(x, W, b, threshold=b.abs() + 10),
        ),
    ):
        dense, truth = found.to_dense(512), exact.to_dense(512)
        assert len(found.values) == pytest.approx(len(exact.values), rel=1e-3)
        agreed = (dense != 0) & (truth != 0)
        assert agreed.sum() > 0.999 * len(exact.values)
        torch.testing.assert_close(dense[agreed], truth[agreed], rtol=1e-5, atol=1e-5)


def test_a_bf16_product_keeps_ties_and_nan():
    kernels = find_kernels("cpu", precision="bf16")
    x, W, b = problem(40, 5, 64, 0, rounded=True)  # small integers are exact in bf16
    same(kernels.select_rows(x, W, b, k=4), REFERENCE.select_rows(x, W, b, k=4))
    W[3] = torch.nan
    assert kernels.select_rows(x, W, b, k=4).values.isnan().any()


def test_a_bf16_product_of_what_is_not_finite_chooses_what_full_precision_does():
    kernels = find_kernels("cpu", precision="bf16")
    x, W, b = (t.float() for t in problem(40, 5, 64, 0))
    W[3], x[7] = -torch.nan, torch.inf
    for name, settled in {
        "select_rows": {"k": 4},
        "select_largest": {"k": 4},
        "select_above": {"threshold": torch.tensor(1.0)},
    }.items():
        found, exact = (getattr(k, name)(x, W, b, **settled) for k in (kernels, CPU))
        assert torch.equal(found.features, exact.features) and found.values.isnan().any()
    x, W, b = (t.float() for t in problem(40, 5, 64, 0))
    threshold = torch.where(torch.arange(64) == 5, -torch.nan, 1.0)
    found, exact = (k.select_above(x, W, b, threshold=threshold) for k in (kernels, CPU))
    assert torch.equal(found.features, exact.features) and (found.features == 5).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_fp32_is_selected_as_the_portable_kernels_do(dtype, precision):
    x, W, b = (t.to(dtype) for t in problem(40, 5, 640, 0))
    ours, theirs = (find_kernels(name, precision=precision) for name in ("cpu", "portable"))
    for rule, settled in {
        "select_rows": {"k": 4},
        "select_largest": {"k": 4},
        "select_batch": {"k": 4},
        "select_above": {"threshold": torch.tensor(1.0, dtype=dtype)},
    }.items():
        same(getattr(ours, rule)(x, W, b, **settled), getattr(theirs, rule)(x, W, b, **settled))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_threshold_of_negative_zero_is_zero(precision):
    x, W, b = problem(40, 5, 64, 0)
    kernels = find_kernels("cpu", precision=precision)
    for zero in (torch.tensor(-0.0), torch.full((64,), -0.0), torch.tensor([-0.0])):
        same(kernels.select_above(x, W, b, threshold=zero), REFERENCE.select_above(x, W, b, threshold=zero))


def test_rows_of_equal_candidates_leave_others_as_they_are():
    kernels = find_kernels("cpu", precision="bf16")
    x, W, b = (t.float() for t in problem(1200, 5, 640, 0))
    x[3], x[700], b[:] = 0.0, 0.0, 1.0
    for rule in ("select_rows", "select_largest"):
        same(getattr(kernels, rule)(x, W, b, k=4), getattr(REFERENCE, rule)(x, W, b, k=4))


def every_bf16() -> torch.Tensor:
    """All of its numbers, NaN left out."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
    return numbers[~numbers.isnan()]


@given(
    threshold=st.floats(0, 2.0**127, width=32),
    places=st.lists(st.integers(0, 65279), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_bf16_numbers_are_compared_exactly_with_a_threshold(threshold, places):
    numbers = every_bf16()
    for limits in (
        torch.tensor(threshold),
        numbers[places].float().abs().repeat(len(numbers))[: len(numbers)],
    ):
        found = find_kernels("cpu", precision="bf16").above(numbers[None].contiguous(), limits)
        assert torch.equal(found.features, (numbers.float() > limits).nonzero().squeeze(1))


@given(
    k=st.integers(1, 6),
    tiles=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    shift=st.sampled_from([0.0, -3.0, -30.0]),
    lowest=st.sampled_from([0.0, -torch.inf]),
)
@settings(max_examples=150, deadline=None)
def test_bf16_candidates_are_the_largest_and_few_more(k, tiles, seed, shift, lowest):
    pre = (torch.randn(20, 4 * tiles, generator=torch.Generator().manual_seed(seed)) + shift).bfloat16()
    k = min(k, pre.shape[1])
    found = cpu.candidates(pre, k, lowest)
    chosen = found._replace(values=torch.ones(len(found.features))).to_dense(pre.shape[1]) > 0
    exact = pre.float()
    wanted = (exact >= exact.topk(k).values[:, -1:]) & (exact > lowest)
    assert (chosen >= wanted).all()
    assert (exact[chosen] > lowest).all()
    # an eighth of k, and those that share a tile with one of the largest, come on top
    assert chosen.sum() <= wanted.sum() + 20 * (k * 9 / 8) * 4


@pytest.mark.parametrize("kernels", [find_kernels(name, precision="bf16") for name in ("cpu", "portable")])
@pytest.mark.parametrize(("k", "tolerance"), [(1, 0.1), (40, 0.03), (300, 0.01)])
def test_explanations_in_bf16_are_those_in_full_precision_to_rounding(kernels, k, tolerance):
    x, W_enc, b_enc = (t.float() for t in problem(1500, 32, 200, 0))
    residual, W_dec = (t.float() for t in problem(1500, 32, 200, 1)[:2])
    given = (W_enc, b_enc, W_dec / W_dec.norm(dim=1, keepdim=True))
    ours, theirs = (one.explain(x, residual, given, k=k) for one in (kernels, REFERENCE))
    for name, value in theirs._asdict().items():
        found = getattr(ours, name)
        assert found.dtype == torch.float32
        # of few entries, those that rounding exchanges weigh more
        assert (found - value).norm() < tolerance * value.norm(), name


def test_bf16_is_chosen_only_where_it_is_named_or_native():
    assert find_precision("bf16", torch.device("cpu")) == "bf16"
    assert find_precision("fp32", torch.device("cpu")) == "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert find_precision("auto", torch.device("cpu")) == ("bf16" if native else "fp32")
    assert find_precision("auto", torch.device("meta")) == "fp32"


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="reference"):
        find_kernels("cuda")
    with pytest.raises(ConfigError, match="need a CPU"):
        find_kernels("cpu", device=torch.device("meta"))
