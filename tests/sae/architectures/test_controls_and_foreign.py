"""The frozen control, and the kinds that are only read, against their definitions."""

import pytest
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.checkpoint import load_sae, save_sae
from sae.config import parse_config
from sae.world import World

WORLD = World()


def build(kind, d_in=6, d_sae=15, **options):
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": d_sae, **options}, where="test")
    return config.build(d_in, generator=torch.Generator().manual_seed(0))


def draw(rows, d_in=6, seed=2):
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed))


def train(sae, steps=40, lr=0.05):
    optimiser = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=lr)
    for seed in range(steps):
        optimiser.zero_grad()
        losses = sae.losses(Batch(draw(32, seed=seed)), dead=torch.arange(15) < 2, world=WORLD)
        losses.total.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step(losses, world=WORLD)
    return sae


def test_a_frozen_decoder_keeps_its_bits_while_the_rest_learns():
    sae, fresh = train(build("frozen_decoder", k=3)), build("frozen_decoder", k=3)
    assert torch.equal(sae.W_dec, fresh.W_dec)
    for name in ("W_enc", "b_enc", "b_dec", "threshold"):
        assert not torch.equal(getattr(sae, name), getattr(fresh, name))


@pytest.mark.parametrize("min_cosine", [0.8, 0.99])
def test_a_soft_frozen_decoder_moves_within_its_cone_only(min_cosine):
    sae, fresh = train(build("frozen_decoder", k=3, min_cosine=min_cosine)), build("frozen_decoder", k=3)
    cosines = (sae.W_dec * fresh.W_dec).sum(1)
    assert (cosines >= min_cosine - 1e-5).all()
    assert (cosines < min_cosine + 1e-5).any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(15))


def test_a_soft_frozen_decoder_keeps_its_cone_when_loaded(tmp_path):
    sae = train(build("frozen_decoder", k=3, min_cosine=0.9), steps=10)
    save_sae(sae, tmp_path)
    assert torch.equal(load_sae(tmp_path).W_start, sae.W_start)


def randomised(kind):
    sae = build(kind)
    generator = torch.Generator().manual_seed(3)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return sae


def test_relu_keeps_all_that_is_positive():
    sae, x = randomised("relu"), draw(20)
    wanted = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    torch.testing.assert_close(sae.encode(x).to_dense(15), wanted)
    torch.testing.assert_close(sae.decode(sae.encode(x)), wanted @ sae.W_dec + sae.b_dec)


def test_gated_sizes_what_its_gate_lets_through():
    sae, x = randomised("gated"), draw(200)
    gate = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    size = (x - sae.b_dec) @ (sae.W_enc * sae.r_mag.exp()[:, None]).T + sae.b_mag
    wanted = (gate > 0) * size.relu()
    assert ((gate > 0) & (size <= 0)).any()
    assert ((gate <= 0) & (size > 0)).any()
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(15), wanted, rtol=1e-4, atol=1e-4)
    assert (codes.values > 0).all()


def test_dictionaries_that_are_only_read_need_no_k():
    assert build("relu").config.k == 1
    assert build("gated").config.k == 1
