"""The Triton kernels against the dense oracle: on a GPU where there is one, else in Triton's interpreter.

conftest.py switches the interpreter on.
"""

from functools import partial

import pytest
import torch

from sae import operators
from sae.codes import SparseCodes, from_dense
from sae.errors import ConfigError
from sae.kernels import find_kernels, portable

pytest.importorskip("triton")

from sae.kernels import triton as gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON, REFERENCE = gpu.TritonKernels(), find_kernels("reference")
D_SAE = 600


def problem(rows=21, d_in=20, d_sae=D_SAE, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    return [t.to(DEVICE, dtype) for t in (draw(rows, d_in), draw(d_sae, d_in), draw(d_sae))]


def same(a: SparseCodes, b: SparseCodes):
    assert torch.equal(a.offsets, b.offsets)
    assert torch.equal(a.features, b.features)
    torch.testing.assert_close(a.values, b.values, equal_nan=True)


@pytest.fixture
def redone(monkeypatch):
    """Count the rows that the tiles could not decide."""
    rows = []
    for name in ("leading", "exceeding"):
        inner = getattr(portable.PortableKernels, name)

        def counted(self, x, *args, inner=inner):
            rows.append(len(x))
            return inner(self, x, *args)

        monkeypatch.setattr(portable.PortableKernels, name, counted)
    return rows


@pytest.mark.parametrize("shape", [(21, 20, D_SAE), (1, 3, 130), (130, 70, 257)])
def test_selections_come_out_of_the_tiles_and_agree_with_the_oracle(shape, redone):
    x, W, b = problem(*shape)
    same(TRITON.select_rows(x, W, b, k=3), REFERENCE.select_rows(x, W, b, k=3))
    same(TRITON.select_largest(x, W, b, k=3), REFERENCE.select_largest(x, W, b, k=3))
    same(TRITON.select_rows(x, W, b - 100, k=3), REFERENCE.select_rows(x, W, b - 100, k=3))
    high = (x @ W.T + b).quantile(0.99).clamp(min=0)
    for limit in (high, high + b.abs()):
        same(TRITON.select_above(x, W, b, threshold=limit), REFERENCE.select_above(x, W, b, threshold=limit))
    theirs = REFERENCE.select_batch(x, W, b, k=2)
    same(TRITON.select_batch(x, W, b, k=2), theirs)
    assert sum(redone) <= shape[0] / 4


def test_rows_that_overflow_a_tile_are_done_again(redone):
    x, W, b = problem()
    tiles = -(-D_SAE // gpu.TILE)
    b[::tiles] += 50  # the strongest features share a tile
    same(TRITON.select_rows(x, W, b, k=9), REFERENCE.select_rows(x, W, b, k=9))
    limit = torch.tensor(30.0, device=DEVICE)
    same(TRITON.select_above(x, W, b, threshold=limit), REFERENCE.select_above(x, W, b, threshold=limit))
    assert sum(redone) == 2 * len(x)


def test_neighbouring_features_fall_into_different_tiles(redone):
    x, W, b = problem()
    b[:9] += 50
    same(TRITON.select_rows(x, W, b, k=9), REFERENCE.select_rows(x, W, b, k=9))
    assert not redone


@pytest.mark.parametrize("k", [1, 4, 100, 1000])
def test_ties_and_k_of_any_size(k):
    x, W, b = (t.round() for t in problem(d_in=3))
    same(TRITON.select_rows(x, W, b, k=k), REFERENCE.select_rows(x, W, b, k=k))
    same(TRITON.select_largest(x, W, b, k=k), REFERENCE.select_largest(x, W, b, k=k))
    theirs = REFERENCE.select_batch(x, W, b, k=k)
    same(TRITON.select_batch(x, W, b, k=k), theirs)


def test_nan_is_not_hidden():
    x, W, b = problem()
    W[77] = torch.nan
    for codes in (TRITON.select_rows(x, W, b, k=1), TRITON.select_batch(x, W, b, k=2)):
        assert codes.values.isnan().any()
    x, W, b = problem()
    x[3] = torch.nan
    rows = TRITON.select_rows(x, W, b, k=2)
    assert rows.values.isnan().tolist() == (rows.row_ids() == 3).tolist()


def test_a_bf16_product_proposes_and_full_precision_decides():
    x, W, b = problem(60, 32, 1500)
    found = gpu.TritonKernels(bf16=True).select_rows(x, W, b, k=4)
    exact = REFERENCE.select_rows(x, W, b, k=4)
    dense, truth = found.to_dense(1500), exact.to_dense(1500)
    agreed = (dense != 0) & (truth != 0)
    assert agreed.sum() > 0.99 * len(exact.values)
    torch.testing.assert_close(dense[agreed], truth[agreed], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5])
def test_products_agree_with_the_oracle(dtype, density):
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(13, 60, generator=generator) < density
    shown[4] = False  # a row without codes, and below a feature without rows
    shown[:, 7] = False
    codes = SparseCodes(
        *(t.to(DEVICE) for t in from_dense(torch.rand(13, 60, generator=generator).to(dtype) * shown))
    )
    W = torch.randn(60, 133, generator=generator, dtype=dtype).to(DEVICE)
    g = torch.randn(13, 133, generator=generator, dtype=dtype).to(DEVICE)
    torch.testing.assert_close(TRITON.decode(codes, W), REFERENCE.decode(codes, W))
    torch.testing.assert_close(TRITON.value_gradients(codes, g, W), REFERENCE.value_gradients(codes, g, W))
    ours, theirs = TRITON.weight_gradient(codes, g, 60), REFERENCE.weight_gradient(codes, g, 60)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours, TRITON.weight_gradient(codes, g, 60))


def test_gradients_equal_those_of_a_dense_mask():
    x, W_enc, b_enc = problem(9, 5, 140, dtype=torch.float64)
    W_dec, b_dec = torch.randn_like(W_enc), torch.randn_like(x[0])
    inputs = [t.requires_grad_() for t in (x, W_enc, b_enc, W_dec, b_dec)]
    select = partial(TRITON.select_rows, k=3)
    codes = operators.encode(x, W_enc, b_enc, b_dec, select=select, kernels=TRITON)
    sparse = (operators.decode(codes, W_dec, b_dec, kernels=TRITON) - x).square().sum()
    z = ((x - b_dec) @ W_enc.T + b_enc) * (codes.to_dense(140) > 0)
    dense = (z @ W_dec + b_dec - x).square().sum()
    for ours, theirs in zip(
        torch.autograd.grad(sparse, inputs), torch.autograd.grad(dense, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_explanations_agree_with_the_oracle():
    x, W_enc, b_enc = problem(9, 5, 40)
    residual, W_dec, _ = problem(9, 5, 40, seed=1)
    ours, theirs = (
        kernels.explain(x, residual, (W_enc, b_enc, W_dec), k=7) for kernels in (TRITON, REFERENCE)
    )
    for name, value in theirs._asdict().items():
        torch.testing.assert_close(getattr(ours, name), value, msg=name, rtol=1e-4, atol=1e-4)


def test_it_is_chosen_for_gpus_only():
    assert isinstance(find_kernels("triton", device=DEVICE), gpu.TritonKernels)
    assert isinstance(find_kernels("auto", device=torch.device("cuda")), gpu.TritonKernels)
    with pytest.raises(ConfigError, match="GPU"):
        find_kernels("triton", device=torch.device("mps"))
