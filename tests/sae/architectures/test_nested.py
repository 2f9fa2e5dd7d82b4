"""Nested reconstructions and the kinds made of them against dense autograd, in float64."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.checkpoint import load_sae, save_sae
from sae.codes import from_dense
from sae.config import parse_config
from sae.errors import ConfigError
from sae.nested import cut_by_feature, cut_by_group, cut_by_rank
from sae.world import World

WORLD = World()


def build(kind, *, d_in, d_sae, k, **options):
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": d_sae, "k": k, **options}, where="test")
    sae = config.build(d_in, generator=torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    for p in sae.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return sae


def draw(rows, d_in, seed=2):
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse_values(rows, d_sae, seed, *, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that many are equal
    values = torch.randint(1, 4, (rows, d_sae), generator=generator).double()
    return values * (torch.rand(rows, d_sae, generator=generator) < share)


@given(rows=st.integers(1, 6), d_sae=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=60, deadline=None)
def test_cuts_keep_every_code_in_the_part_it_belongs_to(rows, d_sae, seed, data):
    dense = sparse_values(rows, d_sae, seed)
    inner = data.draw(st.sets(st.integers(0, d_sae), max_size=4))
    borders = sorted(inner | {d_sae})
    codes = from_dense(dense)
    by_feature = cut_by_feature(codes, borders).to_dense(d_sae).view(rows, len(borders), d_sae)
    by_rank = cut_by_rank(codes, borders, world=WORLD).to_dense(d_sae).view(rows, len(borders), d_sae)
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=d_sae, max_size=d_sae)))
    by_group = cut_by_group(codes, groups, 4).to_dense(d_sae).view(rows, 4, d_sae)
    for row in range(rows):
        ranked = sorted((-float(v), j) for j, v in enumerate(dense[row]) if v > 0)
        for part, (low, high) in enumerate(zip([0, *borders[:-1]], borders, strict=True)):
            wanted = {j: float(v) for j, v in enumerate(dense[row]) if low <= j < high and v > 0}
            assert nonzero(by_feature[row, part]) == wanted
            assert nonzero(by_rank[row, part]) == {j: -v for v, j in ranked[low:high]}
        for part in range(4):
            wanted = {j: float(v) for j, v in enumerate(dense[row]) if groups[j] == part and v > 0}
            assert nonzero(by_group[row, part]) == wanted


def nonzero(row):
    return {int(j): float(row[j]) for j in row.nonzero()[:, 0]}


def dense_codes(sae, x, *, per_row):
    """What TopK or BatchTopK keeps, by sorting all pre-activations."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if per_row:
        last = pre.sort(dim=1, descending=True).values[:, min(sae.config.k, pre.shape[1]) - 1][:, None]
    else:
        last = pre.flatten().sort(descending=True).values[min(sae.config.k * len(x), pre.numel()) - 1]
    return pre * ((pre >= last) & (pre > 0))


def dense_matryoshka(sae, x, z, prefixes):
    errors = []
    for p in prefixes:
        inside = torch.arange(z.shape[1]) < p
        errors.append((x - (z * inside) @ sae.W_dec - sae.b_dec).square().sum() / x.numel())
    return sum(errors) / len(errors)


def dense_detached(sae, x, z, prefixes):
    """The same errors, of which all but the last see the parts before their own as constants."""
    errors, before = [], sae.b_dec
    for low, high in zip([0, *prefixes], prefixes[:-1], strict=False):
        own = torch.arange(z.shape[1])
        x_hat = before + (z * ((own >= low) & (own < high))) @ sae.W_dec
        errors.append((x - x_hat).square().sum() / x.numel())
        before = x_hat.detach()
    errors.append((x - z @ sae.W_dec - sae.b_dec).square().sum() / x.numel())
    return sum(errors) / len(errors)


def dense_hierarchy(sae, x, z, budgets):
    errors = []
    for budget in budgets:
        kept = torch.zeros_like(z).scatter(1, z.argsort(dim=1, descending=True)[:, :budget], 1.0)
        errors.append((x - (z * kept) @ sae.W_dec - sae.b_dec).square().sum() / x.numel())
    return sum(errors) / len(errors)


def same_gradients(sae, loss, oracle):
    torch.testing.assert_close(loss, oracle)
    parameters = [p for p in sae.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(oracle, parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


# (rows, d_in, d_sae, k): odd sizes, one row, k above what is positive, one feature
SHAPES = [(7, 5, 13, 3), (1, 3, 7, 2), (4, 2, 9, 9), (3, 4, 1, 1)]


@pytest.mark.parametrize(("rows", "d_in", "d_sae", "k"), SHAPES)
@pytest.mark.parametrize("detached", [False, True])
def test_matryoshka_is_the_mean_over_dense_prefixes(rows, d_in, d_sae, k, detached):
    prefixes = sorted({1, d_sae // 2 or 1, d_sae})
    given = {"d_in": d_in, "d_sae": d_sae, "k": k, "prefixes": prefixes, "detached": detached}
    sae, x = build("matryoshka", **given), draw(rows, d_in)
    losses = sae.losses(Batch(x), dead=torch.zeros(d_sae, dtype=torch.bool), world=WORLD)
    z = dense_codes(sae, x, per_row=False)
    oracle = dense_detached if detached else dense_matryoshka
    same_gradients(sae, losses.total, oracle(sae, x, z, prefixes))
    torch.testing.assert_close(losses.x_hat, z @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(losses.parts["mse"], (x - losses.x_hat).square().mean().detach())


@pytest.mark.parametrize(("rows", "d_in", "d_sae", "k"), SHAPES)
def test_hierarchical_topk_is_the_mean_over_dense_budgets(rows, d_in, d_sae, k):
    sae, x = build("hierarchical_topk", d_in=d_in, d_sae=d_sae, k=k), draw(rows, d_in)
    losses = sae.losses(Batch(x), dead=torch.zeros(d_sae, dtype=torch.bool), world=WORLD)
    z = dense_codes(sae, x, per_row=True)
    same_gradients(sae, losses.total, dense_hierarchy(sae, x, z, sae.budgets))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("given", "oracle"),
    [
        ({"detached": False, "prefixes": [4, 7, 13]}, dense_matryoshka),
        ({"prefixes": [4, 7, 13]}, dense_detached),
        ({"prefixes": [13]}, dense_detached),
        # a quarter of the training done: 2 (1 + 2/3 · 3/4) = 3 features per row
        ({"prefixes": [4, 7, 13], "k": 2, "k_start": 5 / 3}, dense_detached),
    ],
)
def test_lista_is_iterative_shrinkage_on_dense_pre_activations(steps, given, oracle):
    given = {"k": 3, "k_start": 1, **given}
    sae, x = build("lista", d_in=5, d_sae=13, steps=steps, step_size=0.4, **given), draw(7, 5)
    losses = sae.losses(Batch(x, progress=0.25), dead=torch.zeros(13, dtype=torch.bool), world=WORLD)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    for _ in range(steps):
        last = pre.sort(dim=1, descending=True).values[:, 2:3]
        z = pre * ((pre >= last) & (pre > 0))
        pre = pre + 0.4 * (x - sae.b_dec - z @ sae.W_dec) @ sae.W_enc.T
    z = pre * ((pre >= pre.flatten().sort(descending=True).values[20]) & (pre > 0))
    same_gradients(sae, losses.total, oracle(sae, x, z, given["prefixes"]))


def test_prefixes_by_rate_hold_what_fired_most_often_of_late():
    sae = build("matryoshka", d_in=5, d_sae=12, k=3, prefixes=[4, 7, 12], detached=True, by_rate=True)
    dead, rates = torch.zeros(12, dtype=torch.bool), torch.zeros(12, dtype=torch.float64)
    orders = set()
    for step in range(40):
        x = draw(9, 5, seed=step) + step % 2
        order = sorted(range(12), key=lambda j: (-float(rates[j]), j))
        losses, z = sae.losses(Batch(x), dead=dead, world=WORLD), dense_codes(sae, x, per_row=False)
        # the same dictionary with its features laid out in that order
        laid = SimpleNamespace(W_dec=sae.W_dec[order], b_dec=sae.b_dec)
        expected = dense_detached(laid, x, z[:, order], [4, 7, 12])
        same_gradients(sae, losses.total, expected)
        sae.after_step(losses, world=WORLD)
        rates = 0.99 * rates + 0.01 * (z > 0).double().mean(0)
        orders.add(tuple(order))
    assert len(orders) > 10
    torch.testing.assert_close(sae.rates.double(), rates, rtol=1e-4, atol=1e-6)


def test_one_prefix_is_batch_topk_and_one_budget_is_topk():
    x, dead = draw(8, 5), torch.arange(13) < 4
    for kind, plain, options in (
        ("matryoshka", "batch_topk", {"prefixes": [13]}),
        ("hierarchical_topk", "topk", {"budgets": [3]}),
    ):
        losses = [
            build(name, d_in=5, d_sae=13, k=3, k_aux=2, **given).losses(Batch(x), dead=dead, world=WORLD)
            for name, given in ((kind, options), (plain, {}))
        ]
        torch.testing.assert_close(losses[0].total, losses[1].total)


def test_features_of_a_later_prefix_learn_nothing_from_an_earlier_one():
    sae, x = build("matryoshka", d_in=5, d_sae=12, k=4, prefixes=[6, 12]), draw(20, 5)
    losses = sae.losses(Batch(x), dead=torch.zeros(12, dtype=torch.bool), world=WORLD)
    last = (x - sae.decode(sae._compete(x))).square().mean() / 2
    (whole,), (outer,) = (torch.autograd.grad(loss, [sae.W_dec]) for loss in (losses.total, last))
    torch.testing.assert_close(whole[6:], outer[6:])
    assert not torch.allclose(whole[:6], outer[:6])


def test_defaults_and_refusals():
    assert build("matryoshka", d_in=4, d_sae=768, k=2).prefixes == (24, 72, 168, 360, 768)
    assert build("matryoshka", d_in=4, d_sae=1, k=1).prefixes == (1,)
    assert build("hierarchical_topk", d_in=4, d_sae=40, k=12).budgets == (1, 2, 4, 8, 12)
    assert build("hierarchical_topk", d_in=4, d_sae=40, k=8).budgets == (1, 2, 4, 8)
    assert build("hierarchical_topk", d_in=4, d_sae=40, k=1).budgets == (1,)
    for kind in ("matryoshka", "lista"):
        for wrong in ([], [0, 40], [20, 10, 40], [10, 10, 40], [10, 20], [10, 50]):
            with pytest.raises(ConfigError, match="prefixes have to ascend"):
                build(kind, d_in=4, d_sae=40, k=8, prefixes=wrong)
    for wrong in ([], [0, 8], [4, 2, 8], [4], [9]):
        with pytest.raises(ConfigError, match="budgets have to ascend"):
            build("hierarchical_topk", d_in=4, d_sae=40, k=8, budgets=wrong)


def test_a_lista_dictionary_of_before_these_settings_is_read_as_it_was(tmp_path):
    now = parse_config(SAEConfig, {"kind": "lista", "d_sae": 24, "k": 3, "by_rate": False}, where="test")
    sae = now.build(8, generator=torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    for name in ("detached", "by_rate", "k_start"):
        del header["sae"][name]
    (tmp_path / "config.json").write_text(json.dumps(header))
    back = load_sae(tmp_path)
    assert (back.config.detached, back.config.by_rate) == (False, False)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back.encode(x).features, sae.encode(x).features)
