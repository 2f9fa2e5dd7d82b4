"""The Triton kernels at full size on a real GPU: errors against float64, same bits every time, every kind's step."""

import pytest
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.codes import SparseCodes
from sae.config import parse_config
from sae.kernels import find_kernels
from sae.stack import stack, unstack_losses
from sae.world import World
from train.optim import make_adam
from train.plan import TrainConfig, make_plan
from train.state import TrainState
from train.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
KINDS = sorted(name for name, config in SAEConfig.kinds.items() if config.trainable)
ROWS, D_IN, D_SAE, K = 1000, 768, 16384, 32


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


def problem():
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, D_IN, generator=generator) for n in (ROWS, D_SAE))
    return x.cuda(), torch.nn.functional.normalize(W, dim=1).cuda(), torch.zeros(D_SAE).cuda()


def wide(codes: SparseCodes) -> SparseCodes:
    return codes._replace(values=codes.values.double())


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_are_the_largest_of_the_exact_products(precision):
    x, W, b = problem()
    kernels = find_kernels("triton", device=x.device, precision=precision)
    codes = kernels.select_rows(x, W, b, k=K)
    exact = x.double() @ W.double().T
    assert codes.offsets.tolist() == list(range(0, K * ROWS + 1, K))
    assert off(codes.values, exact[codes.row_ids(), codes.features]) < 1e-6
    best = exact.topk(K, dim=1).values.sum()
    assert codes.values.double().sum() > best * (1 - (1e-6 if precision == "fp32" else 1e-4))
    again = kernels.select_rows(x, W, b, k=K)
    assert all(torch.equal(a, b) for a, b in zip(codes, again, strict=True))


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "jumprelu"])
def test_a_stack_costs_what_its_members_cost(kind):
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": 2048, "k": 8}, where="test")
    saes = [config.build(128, generator=torch.Generator().manual_seed(seed)).cuda() for seed in range(4)]
    x = torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(9)).cuda()
    dead = torch.zeros(2048, dtype=torch.bool, device="cuda")
    alone = [one.losses(Batch(x), dead=dead, world=World(device=x.device)) for one in saes]
    whole = stack(saes)
    together = whole.losses(Batch(x.repeat(4, 1)), dead=dead.repeat(4), world=World(device=x.device))
    for own, other in zip(unstack_losses(whole, together), alone, strict=True):
        torch.testing.assert_close(own.total, other.total, rtol=1e-4, atol=0)
        assert len(own.codes.values) == pytest.approx(len(other.codes.values), rel=1e-3)


def test_sums_and_gradients_against_float64():
    x, W, b = problem()
    kernels, reference = find_kernels("triton", device=x.device), find_kernels("reference")
    codes, g = kernels.select_rows(x, W, b, k=K), torch.randn_like(x)
    exact = wide(codes)
    assert off(kernels.decode(codes, W), reference.decode(exact, W.double())) < 1e-6
    values = reference.value_gradients(exact, g.double(), W.double())
    assert off(kernels.value_gradients(codes, g, W), values) < 1e-6
    weights = kernels.weight_gradient(codes, g, D_SAE)
    assert off(weights, reference.weight_gradient(exact, g.double(), D_SAE)) < 1e-6
    assert torch.equal(weights, kernels.weight_gradient(codes, g, D_SAE))
    dead = (W[:2000], b[:2000], W[2000:4000])
    ours = kernels.explain(x, g, dead, k=300)
    theirs = reference.explain(x.double(), g.double(), tuple(t.double() for t in dead), k=300)
    assert all(off(a, b) < 1e-3 for a, b in zip(ours, theirs, strict=True))  # a tie in fp32 moves an entry


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_repeats_bit_for_bit_and_is_that_of_a_cpu(kind):
    x, _, _ = problem()
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": 2048, "k": 16}, where="test")
    plan = make_plan(TrainConfig(rows=10**6, batch_size=ROWS, lr=1e-3, warmup=0), config)
    follows = torch.arange(ROWS) % 2 == 1

    def weights(device: str) -> torch.Tensor:
        model = config.build(D_IN, generator=torch.Generator().manual_seed(0)).to(device)
        optimiser, state = make_adam(model), TrainState.start(2048, torch.device(device))
        world = World(device=torch.device(device))
        batch = Batch(x.to(device), follows.to(device))
        for _ in range(3):
            train_step(model, optimiser, state, batch, plan=plan, world=world)
        return model.W_dec.detach().cpu()

    first = weights("cuda")
    assert torch.equal(first, weights("cuda"))
    torch.testing.assert_close(first, weights("cpu"), rtol=1e-2, atol=1e-3)
