"""Selections, products and gradients over shards are those of one process, ties and extremes included."""

from __future__ import annotations

import math

import pytest
import torch

from sae.codes import SparseCodes
from sae.kernels.cpu import CpuKernels
from sae.kernels.reference import ReferenceKernels
from sae.kernels.sharded import ShardedKernels, kth_largest
from sae.losses import unexplained
from sae.world import World

MESHES = [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]
ROWS, D_IN, D_SAE = 24, 6, 40


def whole(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of which every process can make its part."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, D_IN, generator=generator)
    W = torch.randn(D_SAE, D_IN, generator=generator)
    b = torch.randn(D_SAE, generator=generator) / 10
    if case == "ties":
        # small integers: equal sums in every row, exact in floating point, over all borders
        x, W, b = x.round(), W.round(), b.round()
        x[ROWS // 2 :] = x[: ROWS // 2]
    if case == "negative":
        b -= 100
    if case == "uneven":
        # one shard holds nearly all that is large
        W[: D_SAE // 4] *= 50
    return x, W, b


def part(world: World, value: torch.Tensor, axis: str) -> torch.Tensor:
    return value.chunk(world.axes[axis])[world.coordinate(axis)]


def select(world: World, case: str, rule: str, k: int) -> tuple[int, int, torch.Tensor]:
    x, W, b = whole(case)
    x, W, b = part(world, x, "data"), part(world, W, "feature"), part(world, b, "feature")
    kernels = ShardedKernels(CpuKernels(), world)
    if rule == "rows":
        codes = kernels.select_rows(x, W, b, k=k)
    elif rule == "largest":
        few = candidates(len(W), world.axes["feature"], world.coordinate("feature"))
        codes = kernels.select_largest(x, W[:few], b[:few], k=k)
    else:
        codes = kernels.select_batch(x, W, b, k=k)
    assert (codes.features.diff()[codes.row_ids().diff() == 0] > 0).all()
    return world.coordinate("data"), world.coordinate("feature"), codes.to_dense(len(W))


def candidates(share: int, shards: int, shard: int) -> int:
    """How many of its features a shard has on offer: all, half, a third; and the last shard none."""
    return share // (shard + 1) if shard == 0 or shard + 1 < shards else 0


def assemble(parts: list[tuple[int, int, torch.Tensor]], mesh: tuple[int, int]) -> torch.Tensor:
    placed = {(d, f): dense for d, f, dense in parts}
    return torch.cat([torch.cat([placed[d, f] for f in range(mesh[1])], 1) for d in range(mesh[0])])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rule", ["rows", "largest", "batch"])
def test_selections_are_those_of_one_process(rule, mesh, pool_of):
    for case in ("plain", "ties", "negative", "uneven"):
        for k in (1, 3, 25, D_SAE + 5):
            found = assemble(pool_of(mesh).run(select, case, rule, k, mesh=mesh), mesh)
            x, W, b = whole(case)
            oracle = ReferenceKernels()
            if rule == "rows":
                expected = oracle.select_rows(x, W, b, k=k)
            elif rule == "largest":
                share = D_SAE // mesh[1]
                offered = torch.cat(
                    [torch.arange(candidates(share, mesh[1], s)) + s * share for s in range(mesh[1])]
                )
                few = oracle.select_largest(x, W[offered], b[offered], k=k)
                expected = few._replace(features=offered[few.features])
            else:
                expected = oracle.select_batch(x, W, b, k=k)
            torch.testing.assert_close(found, expected.to_dense(D_SAE), msg=f"{case}, k = {k}")


MEMBERS_K = (3, 1, 25, 3)


def select_stacked(world: World, case: str, rule: str, ks: tuple[int, ...]) -> tuple[int, int, torch.Tensor]:
    """Select for members of which each has the features of the one before, moved on by one, and as many rows."""
    x, W, b = whole(case)
    x = part(world, x, "data").repeat(len(ks), 1)
    W, b = (torch.cat([part(world, value.roll(m, 0), "feature") for m in range(len(ks))]) for value in (W, b))
    if case == "plain":
        # of one member nothing is found, whatever the guess
        b[: len(b) // len(ks)] -= 100
    kernels = ShardedKernels(CpuKernels(members=len(ks)), world, len(ks))
    k = ks[0] if len(set(ks)) == 1 else ks
    select = kernels.select_rows if rule == "rows" else kernels.select_batch
    dense = select(x, W, b, k=k).to_dense(len(W))
    rows, width = len(x) // len(ks), len(W) // len(ks)
    own = [dense[m * rows :][:rows, m * width :][:, :width] for m in range(len(ks))]
    assert dense.count_nonzero() == sum(m.count_nonzero() for m in own), "a row met another member's features"
    return world.coordinate("data"), world.coordinate("feature"), torch.stack(own)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("rule", ["rows", "batch"])
@pytest.mark.parametrize("ks", [MEMBERS_K, (3, 3, 3)])
def test_members_select_among_their_own_features_and_rows_of_all_ranks(rule, mesh, ks, pool_of):
    oracle = ReferenceKernels()
    for case in ("plain", "ties", "uneven"):
        parts = pool_of(mesh).run(select_stacked, case, rule, ks, mesh=mesh)
        x, W, b = whole(case)
        for m, k in enumerate(ks):
            found = assemble([(d, f, own[m]) for d, f, own in parts], mesh)
            bias = b - 100 if case == "plain" and m == 0 else b
            select = oracle.select_rows if rule == "rows" else oracle.select_batch
            expected = select(x, W.roll(m, 0), bias.roll(m, 0), k=k).to_dense(D_SAE)
            torch.testing.assert_close(found, expected, msg=f"{case}, member {m}")


def extremes(world: World) -> tuple[float, int]:
    """Shards whose largest values are 10 and 2, of which the 20 largest are wanted."""
    rank = world.rank
    values = torch.linspace(0.001, 1, 300) * (10 if rank == 0 else 2)
    found = kth_largest(values, torch.zeros(300, dtype=torch.int64), torch.tensor([20]), world=world)
    assert int(found.above + found.equal) == 20
    return float(found.value), int((values >= found.value).sum())


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)])
def test_brackets_are_global_where_shards_differ_in_range(mesh, pool_of):
    # a search between the mean of the shards' maxima and 0 keeps 211 here
    found = pool_of(mesh).run(extremes, mesh=mesh)
    expected = torch.cat([torch.linspace(0.001, 1, 300) * s for s in (10, 2)]).topk(20).values[-1]
    assert [threshold for threshold, _ in found] == [float(expected)] * 2
    assert [kept for _, kept in found] == [20, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_is_the_kth_of_a_sort(dtype):
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(1000, generator=generator, dtype=dtype) ** 9
    values = torch.cat([values, values[:300], torch.tensor([1e-40, 1e30, float("nan")], dtype=dtype)])
    descending = values.nan_to_num(nan=torch.inf).sort(descending=True).values
    # beside another's values, which are not his
    both, owners = torch.cat([values, values / 2]), torch.arange(2).repeat_interleave(len(values))
    for k in (1, 2, 3, 10, 500, len(values) - 1, len(values)):
        found = kth_largest(both, owners, torch.tensor([k, len(values) + 1]), world=World())
        assert float(found.value[0].nan_to_num(nan=torch.inf)) == float(descending[k - 1])
        assert int(found.above[0]) == int((descending > descending[k - 1]).sum())
        assert int(found.equal[0]) == int((descending == descending[k - 1]).sum())
        assert float(found.value[1]) == 0, "fewer than that"


def offset_rows() -> torch.Tensor:
    return 1 + 1e-3 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0))


def deviations(world: World) -> list[float]:
    own = part(world, offset_rows(), "data")
    return unexplained([own, 0 * own], [0 * own, own], world).tolist()


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1)])
def test_deviations_from_the_mean_of_all_ranks(mesh, pool_of):
    rows = offset_rows().double()
    for found in pool_of(mesh).run(deviations, mesh=mesh):
        assert found == pytest.approx([float((rows - rows.mean(0)).square().sum()), math.inf], rel=1e-4)


def products(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    x, W, b = whole("plain")
    own = part(world, W, "feature").clone().requires_grad_()
    bias = torch.linspace(-1, 1, D_IN).requires_grad_()
    kernels = ShardedKernels(CpuKernels(), world)
    centred = x - world.feature_shared(bias)
    codes = kernels.select_above(
        centred.detach(), own.detach(), part(world, b, "feature"), threshold=torch.zeros(())
    )
    product = kernels.decode(codes, own.detach())
    pre = (centred @ own.T).relu()
    total = (world.feature_sum(pre @ own) - x).square().sum()
    total.backward()
    return product, own.grad, bias.grad, world.coordinate("feature")


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4)])
def test_what_crosses_the_feature_axis_and_its_gradients(mesh, pool_of):
    found = pool_of(mesh).run(products, mesh=mesh)
    x, W, b = whole("plain")
    W, bias = W.double().requires_grad_(), torch.linspace(-1, 1, D_IN).double().requires_grad_()
    x, b = x.double(), b.double()
    pre = ((x - bias) @ W.T).relu()
    (pre @ W - x).square().sum().backward()
    dense = ((x - bias) @ W.T + b).detach().relu() @ W.detach()
    for product, _, at_bias, _ in found:
        torch.testing.assert_close(product.double(), dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(at_bias.double(), bias.grad, rtol=1e-4, atol=1e-3)
        assert torch.equal(product, found[0][0])
        assert torch.equal(at_bias, found[0][2])
    shards = torch.cat([gradient for _, gradient, _, _ in sorted(found, key=lambda f: f[3])])
    torch.testing.assert_close(shards.double(), W.grad, rtol=1e-4, atol=1e-3)


def test_not_a_number_is_kept(pool_of):
    pool_of((1, 2)).run(keep_nan, mesh=(1, 2))


def keep_nan(world: World) -> None:
    x, W, b = whole("plain")
    x[3] = float("nan")
    kernels = ShardedKernels(CpuKernels(), world)
    W, b = part(world, W, "feature"), part(world, b, "feature")
    for codes in (kernels.select_rows(x, W, b, k=3), kernels.select_batch(x, W, b, k=3)):
        assert isinstance(codes, SparseCodes)
        assert kernels.decode(codes, W)[3].isnan().all()
