"""The temporal kind: the contrast of adjacent positions against a dense statement, and what it is for."""

import pytest
import torch
import torch.nn.functional as F

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.codes import from_dense
from sae.config import parse_config
from sae.contrast import adjacent_contrast, pick_rows
from sae.errors import ConfigError
from sae.kernels import find_kernels
from sae.world import World

WORLD = World()
NONE = torch.zeros(13, dtype=torch.bool)


def build(d_in=5, d_sae=13, k=4, **options):
    config = parse_config(SAEConfig, {"kind": "temporal", "d_sae": d_sae, "k": k, **options}, where="test")
    return config.build(d_in, generator=torch.Generator().manual_seed(0)).double()


def draw(rows, d_in=5, seed=2):
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_contrast(z, follows, temperature, blocks):
    """InfoNCE of every row with the one before it, block by block, on dense codes."""
    rows = follows.nonzero().squeeze(1)
    total = z.new_zeros(())
    for block in rows.tensor_split(blocks):
        a, b = (F.normalize(z[i], dim=1, eps=1e-100) for i in (block, block - 1))
        exp = (a @ b.T / temperature).exp()
        own = exp.diagonal()
        total = total - ((own / exp.sum(1)).log() + (own / exp.sum(0)).log()).sum() / 2
    return total / max(1, len(rows))


@pytest.mark.parametrize(("pairs", "blocks"), [(256, 1), (3, 3), (2, 4)])
def test_the_contrast_and_its_gradient_are_those_of_dense_codes(pairs, blocks):
    values = (draw(12, 9) * (draw(12, 9, seed=3) > 0)).clamp(min=0)
    values[4] = 0
    follows = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    dense = values.clone().requires_grad_()
    sparse = from_dense(values)
    leaf = sparse.values.clone().requires_grad_()
    found = adjacent_contrast(
        sparse._replace(values=leaf),
        follows,
        d_sae=9,
        pairs_at_once=pairs,
        temperature=0.5,
        kernels=find_kernels("reference"),
        world=WORLD,
    )
    wanted = dense_contrast(dense, follows, 0.5, blocks)
    torch.testing.assert_close(found, wanted)
    (g,), (dense_g,) = torch.autograd.grad(found, [leaf]), torch.autograd.grad(wanted, [dense])
    torch.testing.assert_close(g, dense_g[values > 0])


def test_a_batch_without_pairs_costs_nothing():
    sae = build()
    for rows in (1, 6):
        losses = sae.losses(Batch(draw(rows), torch.zeros(rows, dtype=torch.bool)), dead=NONE, world=WORLD)
        assert losses.parts["contrast"] == 0
        torch.testing.assert_close(losses.total.detach(), losses.parts["nested"])
        losses.total.backward()


def test_only_lasting_features_learn_from_the_contrast():
    sae = build(lasting_share=0.4, contrast_alpha=1.0)
    batch = Batch(draw(12), torch.arange(12) % 2 == 1)
    with_contrast = sae.losses(batch, dead=NONE, world=WORLD)
    without = build(lasting_share=0.4, contrast_alpha=0.0)
    plain = without.losses(batch, dead=NONE, world=WORLD)
    assert with_contrast.parts["contrast"] > 0
    (a,), (b,) = (
        torch.autograd.grad(loss.total, [s.W_enc]) for loss, s in ((with_contrast, sae), (plain, without))
    )
    assert sae.prefixes == (5, 13)
    torch.testing.assert_close(a[5:], b[5:])
    assert not torch.allclose(a[:5], b[:5])


def test_rows_that_do_not_say_what_follows_what_are_refused():
    with pytest.raises(ConfigError, match="run_length"):
        build().losses(Batch(draw(4)), dead=NONE, world=WORLD)


def test_rows_are_picked_in_order_and_more_than_once():
    dense = torch.tensor([[0.0, 1], [2, 3], [0, 0], [4, 0]])
    picked = pick_rows(from_dense(dense), torch.tensor([3, 2, 1, 1]))
    assert torch.equal(picked.to_dense(2), dense[[3, 2, 1, 1]])


def lasting_and_fleeting(pairs):
    """Rows in pairs: 12 directions stay on or off within a pair, 12 are drawn anew in each of its rows."""
    generator = torch.Generator().manual_seed(7)
    directions = F.normalize(torch.randn(24, 16, generator=generator), dim=1)
    lasting = (torch.rand(pairs, 1, 12, generator=generator) < 0.1).expand(pairs, 2, 12)
    fleeting = torch.rand(pairs, 2, 12, generator=generator) < 0.1
    active = torch.cat([lasting, fleeting], dim=2).float().view(2 * pairs, 24)
    x = (active * (1 + torch.rand(active.shape, generator=generator))) @ directions
    return (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt(), directions


def test_lasting_features_find_what_lasts():
    x, directions = lasting_and_fleeting(4000)
    follows, none = torch.arange(128) % 2 == 1, torch.zeros(24, dtype=torch.bool)
    gaps = []
    for alpha in (0.0, 0.3):
        sae = build(16, 24, 3, lasting_share=0.5, contrast_alpha=alpha).float()
        optimiser = torch.optim.Adam(sae.parameters(), lr=5e-3)
        for at in range(300):
            optimiser.zero_grad()
            losses = sae.losses(Batch(x[at * 128 % 7936 :][:128], follows), dead=none, world=WORLD)
            losses.total.backward()
            sae.before_step()
            optimiser.step()
            sae.after_step(losses, world=WORLD)
        lasts = ((sae.W_dec @ directions.T).abs().argmax(dim=1) < 12).float()
        gaps.append(float(lasts[:12].mean() - lasts[12:].mean()))
    assert gaps[1] > max(0.4, gaps[0] + 0.2)
