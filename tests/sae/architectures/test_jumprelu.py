"""JumpReLU: straight-through gradients against a dense statement of the paper, and L0 held where it was asked."""

import math

import pytest
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.config import parse_config
from sae.jump import jump, step
from sae.metrics import Firing
from sae.world import World

WORLD = World()


def build(d_in, d_sae, k, **options):
    config = parse_config(SAEConfig, {"kind": "jumprelu", "d_sae": d_sae, "k": k, **options}, where="test")
    return config.build(d_in, generator=torch.Generator().manual_seed(0))


def randomised(d_in=5, d_sae=13, k=3, *, bandwidth=0.8):
    sae = build(d_in, d_sae, k, bandwidth=bandwidth).double()
    generator = torch.Generator().manual_seed(1)
    for p in sae.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    sae.threshold.data.abs_().add_(bandwidth / 2)
    return sae


def draw(rows, d_in=5, seed=2):
    return 2 * torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_gradients(sae, x):
    """The paper's estimator by hand, entry by entry of the whole [rows, d_sae]: no autograd, no sparsity."""
    width, penalty = sae.bandwidth, math.exp(float(sae.log_penalty))
    W_enc, b_enc, W_dec, b_dec, theta = (
        p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    )
    centred = x - b_dec
    pre = centred @ W_enc.T + b_enc
    on = (pre > theta).double()
    z = pre * on
    residual = z @ W_dec + b_dec - x
    by_x_hat = 2 * residual / x.numel()
    by_z = by_x_hat @ W_dec.T
    by_pre = by_z * on
    band = ((pre - theta).abs() < width / 2).double()
    by_theta = -(theta / width) * band * by_z - band / width * penalty / (sae.config.k * len(x))
    loss = residual.square().mean() + penalty * on.sum() / len(x) / sae.config.k
    return loss, {
        "W_enc": by_pre.T @ centred,
        "b_enc": by_pre.sum(0),
        "W_dec": z.T @ by_x_hat,
        "b_dec": by_x_hat.sum(0) - (by_pre @ W_enc).sum(0),
        "threshold": by_theta.sum(0),
    }


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("bandwidth", [1e-9, 0.3, 0.8, 4.0])
def test_gradients_are_the_papers_on_every_entry(rows, bandwidth):
    sae, x = randomised(bandwidth=bandwidth), draw(rows)
    losses = sae.losses(Batch(x), dead=torch.zeros(13, dtype=torch.bool), world=WORLD)
    loss, wanted = dense_gradients(sae, x)
    torch.testing.assert_close(losses.total.detach(), loss)
    names = [name for name, _ in sae.named_parameters()]
    found = dict(zip(names, torch.autograd.grad(losses.total, list(sae.parameters())), strict=True))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_codes_of_a_batch_are_those_of_inference_and_strictly_above():
    sae, x = randomised(), draw(30)
    losses = sae.losses(Batch(x), dead=torch.zeros(13, dtype=torch.bool), world=WORLD)
    codes = sae.encode(x)
    assert torch.equal(losses.codes.features, codes.features)
    assert torch.equal(losses.codes.offsets, codes.offsets)
    torch.testing.assert_close(losses.codes.values, codes.values.detach())


def test_an_entry_exactly_at_its_threshold_is_off():
    sae = build(1, 3, 1)
    sae.W_enc.data.fill_(1)
    sae.threshold.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert sae.encode(torch.tensor([[2.0], [3.5]])).to_dense(3).tolist() == [[2, 0, 0], [3.5, 3.5, 3.5]]


def test_the_estimators_elementwise():
    values = torch.tensor([0.0, 0.85, 0.95, 1.0, 1.05, 1.15, 3.0], dtype=torch.float64, requires_grad=True)
    thresholds = torch.ones(7, dtype=torch.float64, requires_grad=True)
    z, on = (f(values, thresholds, bandwidth=0.2) for f in (jump, step))
    assert z.tolist() == [0, 0, 0, 0, 1.05, 1.15, 3.0]
    assert on.tolist() == [0, 0, 0, 0, 1, 1, 1]
    to_values, to_thresholds = torch.autograd.grad(z.sum(), [values, thresholds], retain_graph=True)
    assert to_values.tolist() == [0, 0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(to_thresholds, torch.tensor([0, 0, -5.0, -5, -5, 0, 0], dtype=torch.float64))
    (to_thresholds,) = torch.autograd.grad(on.sum(), [thresholds])
    torch.testing.assert_close(to_thresholds, torch.tensor([0, 0, -5.0, -5, -5, 0, 0], dtype=torch.float64))


def planted(rows, *, d_in=24, features=64, l0=4, seed=0):
    """Scaled rows that are sparse sums of unit directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d_in, generator=generator), dim=1)
    active = torch.rand(rows, features, generator=generator) < l0 / features
    x = (active * (1 + torch.rand(rows, features, generator=generator))) @ directions
    return (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()


@pytest.mark.parametrize(("k", "lr"), [(3, 3e-3), (8, 3e-4)])
def test_the_controller_brings_l0_to_k(k, lr):
    x = planted(20_000)
    sae = build(24, 64, k)
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    none = torch.zeros(64, dtype=torch.bool)
    for at in range(400):
        rows = x[at * 128 % 19_968 :][:128]
        optimiser.zero_grad()
        losses = sae.losses(Batch(rows), dead=none, world=WORLD)
        losses.total.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step(losses, world=WORLD)
    assert l0(sae, x) == pytest.approx(k, rel=0.1)
    sae.settle(x[:12_800].split(128), world=WORLD)
    assert l0(sae, x) == pytest.approx(k, rel=0.02)


def l0(sae, x):
    firing = Firing.empty(64)
    firing.update(sae.encode(x))
    return firing.l0


def test_penalty_and_thresholds_rise_while_l0_is_too_high_and_fall_while_it_is_too_low():
    for k, rises in ((2, True), (12, False)):
        sae = build(24, 64, k)
        sae.threshold.data.fill_(1.5)
        losses = sae.losses(Batch(planted(256)), dead=torch.zeros(64, dtype=torch.bool), world=WORLD)
        assert (len(losses.codes.values) > k * 256) == rises
        before = float(sae.log_penalty)
        sae.after_step(losses, world=WORLD)
        assert (float(sae.log_penalty) > before) == rises
        assert ((sae.threshold > 1.5) == rises).all()


def test_thresholds_stay_above_the_band_and_start_where_k_features_fire():
    sae = build(24, 640, 10)
    x = torch.randn(2000, 24, generator=torch.Generator().manual_seed(3))
    assert len(sae.encode(x).values) / 2000 == pytest.approx(10, rel=0.2)
    sae.threshold.data.fill_(-3)
    losses = sae.losses(Batch(x[:8]), dead=torch.zeros(640, dtype=torch.bool), world=WORLD)
    sae.after_step(losses, world=WORLD)
    assert (sae.threshold == sae.bandwidth / 2).all()
