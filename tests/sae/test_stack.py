"""A stack learns what its members learn alone."""

import copy
import itertools
import math

import pytest
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.checkpoint import load_sae, save_sae
from sae.config import parse_config
from sae.stack import shape, stack, unstack_gradients, unstack_losses
from sae.world import World

WORLD = World()
D_IN, D_SAE, K, ROWS, MEMBERS = 12, 64, 4, 40, 3
ONE_K, MIXED_K = (K, K, K), (2, 9, 9)
# prefixes that teach one another are those of hierarchical_topk
MORE = {"matryoshka": {"detached": True, "by_rate": True}}


def build(kind, seed, **options):
    given = {"kind": kind, "d_sae": D_SAE, "k": K, **MORE.get(kind, {}), **options}
    config = parse_config(SAEConfig, given, where="test")
    return config.build(D_IN, generator=torch.Generator().manual_seed(seed))


KINDS = [
    kind for kind, config in sorted(SAEConfig.kinds.items()) if config.trainable and build(kind, 0).stackable
]


MIXING = [kind for kind in KINDS if build(kind, 0).mixes_k]


def rows(seed, n=ROWS):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 2


def dead_features():
    """Many of the first member, none of the second, fewer than take part in one row of the third."""
    dead = torch.zeros(MEMBERS, D_SAE, dtype=torch.bool)
    dead[0, ::3] = True
    dead[2, 5:8] = True
    return dead


def steps(one, dead, x, optimisers, each):
    """Take some steps; return the last losses."""
    for number in range(1 if one.kernel_name == "triton" else 3):
        one.zero_grad()
        losses = one.losses(Batch(x(number)), dead=dead, world=WORLD)
        losses.total.sum().backward()
        one.before_step()
        each()
        for optimiser in optimisers:
            optimiser.step()
        one.after_step(losses, world=WORLD)
    return losses


def descent(one):
    """Plain descent: Adam makes a whole step of a gradient that is mere rounding."""
    return torch.optim.SGD(one.parameters(), lr=0.1)


def test_the_kinds_that_most_sweeps_are_of_are_stackable():
    assert {"topk", "batch_topk", "matryoshka", "jumprelu"} <= set(MIXING) < set(KINDS)


def test_members_agree_in_all_but_k_where_their_kind_mixes_it():
    assert shape(build("topk", 0)) == shape(build("topk", 1, k=K + 1)) != shape(build("topk", 0, k_aux=3))
    assert shape(build("topk", 0)) != shape(build("topk", 0, d_sae=2 * D_SAE))
    budgets = [shape(build("hierarchical_topk", 0, k=k)) for k in (4, 5)]
    assert budgets[0] != budgets[1], "its losses are counted by k"


# the interpreter of Triton is slow, so one kind of each way to select
@pytest.mark.parametrize(
    ("kind", "kernels", "precision", "ks"),
    [
        *itertools.product(KINDS, ["cpu", "portable"], ["fp32", "bf16"], [ONE_K]),
        *itertools.product(MIXING, ["cpu", "portable"], ["fp32", "bf16"], [MIXED_K]),
        ("topk", "triton", "fp32", ONE_K),
        ("topk", "triton", "fp32", MIXED_K),
        ("jumprelu", "triton", "bf16", ONE_K),
    ],
)
def test_members_learn_what_they_learn_alone(kind, kernels, precision, ks, monkeypatch):
    # chunks that hold two members, so that the third is left over
    monkeypatch.setattr("sae.kernels.portable.ROWS_PER_CHUNK", 2 * ROWS)
    saes = [build(kind, seed, k=k, k_aux=6) for seed, k in enumerate(ks)]
    for number, member in enumerate(saes):
        member.kernel_name, member.precision = kernels, precision
        member.b_dec.data.fill_(0.1 * number)
    alone = copy.deepcopy(saes)
    expected = [
        steps(lone, dead, rows, [descent(lone)], lambda: None)
        for lone, dead in zip(alone, dead_features(), strict=True)
    ]
    whole = stack(saes)
    found = steps(
        whole,
        dead_features().flatten(),
        lambda number: rows(number).repeat(MEMBERS, 1),
        [descent(member) for member in saes],
        lambda: unstack_gradients(whole, saes),
    )
    for own, other, member, lone in zip(unstack_losses(whole, found), expected, saes, alone, strict=True):
        assert own.codes.features.equal(other.codes.features)
        assert own.codes.offsets.equal(other.codes.offsets)
        for a, b in ((own.codes.values, other.codes.values), (own.x_hat, other.x_hat)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert own.parts.keys() == other.parts.keys()
        for name in own.parts:
            torch.testing.assert_close(own.parts[name], other.parts[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own.total, other.total)
        for (name, a), (_, b) in zip(member.state_dict().items(), lone.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_no_chunk_holds_are_taken_apart(kind, monkeypatch):
    saes = [build(kind, seed) for seed in range(MEMBERS)]
    alone = [
        sae.losses(Batch(rows(0)), dead=torch.zeros(D_SAE, dtype=torch.bool), world=WORLD) for sae in saes
    ]
    monkeypatch.setattr("sae.kernels.portable.ROWS_PER_CHUNK", 7)
    whole = stack(saes)
    dead = torch.zeros(MEMBERS * D_SAE, dtype=torch.bool)
    found = whole.losses(Batch(rows(0).repeat(MEMBERS, 1)), dead=dead, world=WORLD)
    for own, other in zip(unstack_losses(whole, found), alone, strict=True):
        assert own.codes.features.equal(other.codes.features)
        torch.testing.assert_close(own.total, other.total)


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_is_its_part_of_the_stack_and_is_saved_without_the_others(kind, tmp_path):
    saes = [build(kind, seed) for seed in range(MEMBERS)]
    before = copy.deepcopy(saes[1]).state_dict()
    whole = stack(saes)
    assert all(value.equal(before[name]) for name, value in saes[1].state_dict().items())
    with torch.no_grad():
        for value in [*whole.parameters(), *whole.buffers()]:
            value.add_(1)
    assert all(value.equal(before[name] + 1) for name, value in saes[1].state_dict().items())
    save_sae(saes[1], tmp_path)
    assert (tmp_path / "weights.safetensors").stat().st_size < 1.5 * 4 * D_SAE * (2 * D_IN + 2)
    assert all(v.equal(before[n] + 1) for n, v in load_sae(tmp_path).state_dict().items())


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu"])
def test_a_member_without_codes_does_not_disturb_the_others(kind):
    saes = [build(kind, seed) for seed in range(2)]
    saes[0].b_enc.data.fill_(-100)
    before = saes[0].threshold.detach().clone()
    whole = stack(saes)
    losses = whole.losses(
        Batch(rows(0).repeat(2, 1)), dead=torch.zeros(2 * D_SAE, dtype=torch.bool), world=WORLD
    )
    assert len(unstack_losses(whole, losses)[0].codes.values) == 0
    whole.after_step(losses, world=WORLD)
    if kind == "batch_topk":
        assert saes[0].threshold.equal(before)
        assert saes[1].threshold > 0
    else:
        # lowered by as much as a step may, however few are active
        lowered = (before * math.exp(-0.02)).clamp(min=saes[0].bandwidth / 2)
        torch.testing.assert_close(saes[0].threshold.detach(), lowered)
        assert torch.isfinite(saes[1].threshold).all()
