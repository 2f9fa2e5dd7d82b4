"""Explicit sparse gradients against finite differences and against dense autograd, in float64."""

from functools import partial

import pytest
import torch

from sae import operators
from sae.kernels import find_kernels
from sae.losses import auxk, reconstruction
from sae.world import World

WORLD = World()
CPU = find_kernels("cpu")


def parameters(d_in=4, d_sae=9, rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    tensors = draw(rows, d_in), draw(d_sae, d_in), draw(d_sae), draw(d_sae, d_in), draw(d_in)
    return [t.requires_grad_() for t in tensors]


def rules(kernels):
    return {
        "rows": partial(kernels.select_rows, k=3),
        "batch": partial(kernels.select_batch, k=3),
        "above": partial(kernels.select_above, threshold=torch.tensor(0.3, dtype=torch.float64)),
        "all": partial(kernels.select_rows, k=100),
        "none": partial(kernels.select_above, threshold=torch.tensor(1e9, dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", ["cpu", "portable", "reference"])
@pytest.mark.parametrize("rule", ["rows", "batch", "above", "all", "none"])
def test_gradcheck_through_encoder_and_decoder(name, rule):
    kernels = find_kernels(name)

    def reconstruct(x, W_enc, b_enc, W_dec, b_dec):
        codes = operators.encode(x, W_enc, b_enc, b_dec, select=rules(kernels)[rule], kernels=kernels)
        return operators.decode(codes, W_dec, b_dec, kernels=kernels)

    assert torch.autograd.gradcheck(reconstruct, parameters(), atol=1e-7)


@pytest.mark.parametrize("rule", ["rows", "batch", "above", "all", "none"])
@pytest.mark.parametrize("shape", [(4, 9, 6), (7, 33, 1), (1, 5, 3)])
def test_gradients_equal_those_of_a_dense_mask(rule, shape):
    d_in, d_sae, rows = shape
    inputs = parameters(d_in, d_sae, rows)
    x, W_enc, b_enc, W_dec, b_dec = inputs
    kernels = find_kernels("cpu")
    codes = operators.encode(x, W_enc, b_enc, b_dec, select=rules(kernels)[rule], kernels=kernels)
    sparse = (operators.decode(codes, W_dec, b_dec, kernels=kernels) - x).square().sum() + codes.values.sum()
    pre = (x - b_dec) @ W_enc.T + b_enc
    z = pre * (codes.to_dense(d_sae) > 0)
    dense = (z @ W_dec + b_dec - x).square().sum() + z.sum()
    for a, b in zip(torch.autograd.grad(sparse, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(a, b)


def dense_auxk(x, x_hat, W_enc, b_enc, W_dec, b_dec, dead, k_aux):
    """The definition, on the whole dictionary, sharing no code with what it checks."""
    residual = (x - x_hat).detach()
    pre = (x - b_dec).detach() @ W_enc.T + b_enc
    ranked = pre.detach().masked_fill(~dead, -torch.inf)
    kept = torch.zeros_like(pre).scatter(1, ranked.argsort(dim=1, descending=True)[:, :k_aux], 1.0) * dead
    error = residual - (pre * kept) @ W_dec
    centred = residual - residual.mean(0)
    return min(int(dead.sum()) / k_aux, 1) * (error**2).sum() / (centred**2).sum()


@pytest.mark.parametrize("name", ["cpu", "portable", "reference"])
@pytest.mark.parametrize(("n_dead", "k_aux"), [(0, 3), (1, 3), (3, 3), (6, 3), (9, 1), (9, 100)])
def test_auxk_value_and_gradients(name, n_dead, k_aux):
    x, W_enc, b_enc, W_dec, b_dec = inputs = parameters()
    dead = torch.arange(9) < n_dead
    kernels = find_kernels(name)

    def both(revival):
        codes = operators.encode(x, W_enc, b_enc, b_dec, select=rules(kernels)["rows"], kernels=kernels)
        x_hat = operators.decode(codes, W_dec, b_dec, kernels=kernels)
        return reconstruction(x, x_hat, world=WORLD) + 0.5 * revival(x_hat)

    own = both(
        lambda x_hat: auxk(
            x, x_hat, (W_enc, b_enc, W_dec, b_dec), dead=dead, k_aux=k_aux, kernels=kernels, world=WORLD
        )
    )
    oracle = both(lambda x_hat: dense_auxk(x, x_hat, W_enc, b_enc, W_dec, b_dec, dead, k_aux))
    torch.testing.assert_close(own, oracle)
    for a, b in zip(torch.autograd.grad(own, inputs), torch.autograd.grad(oracle, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_auxk_reaches_dead_features_only_and_those_with_negative_pre_activations_too():
    x, W_enc, b_enc, W_dec, b_dec = parameters()
    dead = torch.arange(9) >= 7
    sunk = (b_enc - 100).detach().requires_grad_()
    weights = (W_enc, sunk, W_dec, b_dec)
    revival = auxk(x, torch.zeros_like(x), weights, dead=dead, k_aux=2, kernels=CPU, world=WORLD)
    for g in torch.autograd.grad(revival, [W_enc, sunk, W_dec]):
        touched = g.to_dense() != 0
        touched = touched.any(1) if touched.dim() == 2 else touched
        assert torch.equal(touched, dead)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_alike_leave_auxk_nothing_to_explain(rows):
    x, *weights = parameters(rows=1)
    alike, dead = x.repeat(rows, 1), torch.arange(9) < 3
    assert auxk(alike, 0 * alike, tuple(weights), dead=dead, k_aux=2, kernels=CPU, world=WORLD) == 0


def test_auxk_of_a_perfect_reconstruction_is_finite():
    x, W_enc, b_enc, W_dec, b_dec = parameters()
    dead = torch.ones(9, dtype=torch.bool)
    weights = (W_enc, b_enc * 0, W_dec, b_dec)
    assert torch.isfinite(auxk(x, x, weights, dead=dead, k_aux=2, kernels=CPU, world=WORLD))


@pytest.mark.parametrize("spread", [1e-2, 1e-3])
def test_auxk_of_a_residual_that_is_mostly_an_offset(spread):
    x, *weights = (p.detach().float() for p in parameters())
    x_hat = x - 1 - spread * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    dead = torch.arange(9) >= 5
    found = auxk(x, x_hat, tuple(weights), dead=dead, k_aux=2, kernels=CPU, world=WORLD)
    exact = dense_auxk(x.double(), x_hat.double(), *(p.double() for p in weights), dead, 2)
    # the residual itself is rounded to the eps of 1
    assert float(found) == pytest.approx(float(exact), rel=1e-2)


def test_gradients_repeat_bit_for_bit():
    torch.set_deterministic_debug_mode("error")
    try:
        runs = []
        for _ in range(3):
            generator = torch.Generator().manual_seed(0)
            x, W_enc, W_dec = (torch.randn(n, 32, generator=generator) for n in (600, 300, 300))
            leaves = [t.requires_grad_() for t in (W_enc, torch.zeros(300), W_dec, torch.zeros(32))]
            W_enc, b_enc, W_dec, b_dec = leaves
            kernels = find_kernels("cpu")
            select = partial(kernels.select_rows, k=8)
            x_hat = operators.decode(
                operators.encode(x, W_enc, b_enc, b_dec, select=select, kernels=kernels),
                W_dec,
                b_dec,
                kernels=kernels,
            )
            dead = torch.arange(300) % 7 == 0
            loss = reconstruction(x, x_hat, world=WORLD)
            loss = loss + auxk(x, x_hat, tuple(leaves), dead=dead, k_aux=16, kernels=kernels, world=WORLD)
            runs.append(torch.autograd.grad(loss, leaves))
        for other in runs[1:]:
            assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(runs[0], other, strict=True))
    finally:
        torch.set_deterministic_debug_mode("default")
