import math

import numpy as np
import pytest
import torch

from sae.sizing import (
    Sizes,
    _sum_over_cycles,
    effective_rank,
    independent_directions,
    principal_components,
    spectrum,
    suggest_sizes,
)
from tests.train.runs import plant


def sparse_sums(p, rows, seed):
    """Orthogonal directions of which each is there (size 1) at its own rate, turned somehow."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((len(p), len(p))))[0]
    return torch.from_numpy(((rng.random((rows, len(p))) < p) @ turn).astype(np.float32))


@pytest.mark.parametrize("p", [np.full(24, 0.05), np.linspace(0.02, 0.1, 24)])
def test_fourth_moments_of_orthogonal_directions_are_those_of_their_rates(p):
    variance = p * (1 - p)
    kappa = variance * (1 - 6 * variance)
    samples = [sparse_sums(p, 4096, seed) for seed in range(5)]
    found = [independent_directions(x, spectrum(x)) for x in samples]
    per_row = variance.sum() ** 2 / kappa.sum()
    total = kappa.sum() ** 2 / (kappa**2).sum()
    assert np.mean([f.per_row for f in found]) == pytest.approx(per_row, rel=0.03)
    assert np.mean([f.total for f in found]) == pytest.approx(total, rel=0.06)


def test_the_cumulant_of_pairs_and_triples_is_that_of_the_whole_tensor():
    x = torch.from_numpy(np.random.default_rng(0).exponential(size=(20_000, 3)) @ np.diag([1.0, 2.0, 3.0]))
    x -= x.mean(0)
    fourth = np.einsum("ni,nj,nk,nl->ijkl", *[x.numpy()] * 4, optimize=True) / len(x)
    second = (x.T @ x / len(x)).numpy()
    for pairing in ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl"):
        fourth -= np.einsum(pairing, second, second)
    total = np.einsum("iijj->", fourth) ** 2 / (fourth**2).sum()
    assert independent_directions(x[:8192], spectrum(x[:8192])).total == pytest.approx(total, rel=0.1)


def test_k_and_width_of_planted_rows_though_their_covariances_are_alike():
    sizes = {l0: suggest_sizes(plant(4096, l0=l0).x) for l0 in (5, 20)}
    for l0, found in sizes.items():
        assert found.told_by == "fourth moments"
        assert found.k == pytest.approx(l0, rel=0.2)
        assert 768 / 2 <= found.d_sae <= 768 * 2
    assert sizes[5].effective_rank == pytest.approx(sizes[20].effective_rank, rel=0.05)
    assert suggest_sizes(plant(4096, features=200).x).d_sae <= 448


def test_the_components_are_counted_in_a_known_spectrum_about_the_mean():
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((500, 4))
    left = np.linalg.qr(columns - columns.mean(0))[0]
    variances = spectrum(torch.from_numpy(left * np.sqrt([500 * 50, 500 * 30, 500 * 15, 500 * 5]) + 1000))
    assert variances.numpy() == pytest.approx([50, 30, 15, 5])
    assert effective_rank(variances) == pytest.approx(100**2 / (50**2 + 30**2 + 15**2 + 5**2))
    assert [principal_components(variances, share) for share in (0.49, 0.51, 0.79, 0.81, 0.94, 0.96)] == [
        1, 2, 2, 3, 3, 4,
    ]  # fmt: skip


def test_the_effective_rank_counts_equal_directions_and_ignores_the_mean():
    x = torch.zeros(20_000, 8)
    x[:, :3] = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    assert effective_rank(spectrum(x + 100)) == pytest.approx(3, rel=0.01)
    assert effective_rank(spectrum(x[:, :1])) == pytest.approx(1)


@pytest.mark.parametrize(("components", "k"), [(1, 1), (2, 2), (3, 4), (8, 8)])
def test_rows_without_sparse_structure_get_what_their_components_need(components, k):
    rng = torch.Generator().manual_seed(components)
    x = torch.randn(4096, components, generator=rng) @ torch.eye(32)[:components]
    found = suggest_sizes(x)
    assert found == Sizes(64 * math.ceil(8 * k / 64), k, found.effective_rank, "principal components")


@pytest.mark.parametrize(("d_in", "k"), [(4, 1), (64, 8), (512, 32)])
def test_rows_of_which_no_few_components_hold_most_get_what_is_usual(d_in, k):
    found = suggest_sizes(torch.randn(2048, d_in, generator=torch.Generator().manual_seed(0)))
    assert (found.d_sae, found.k, found.told_by) == (max(64, 8 * d_in), k, "nothing")
    assert found.supports(100 * d_in, 2 * k), "nothing speaks against other numbers"


@pytest.mark.parametrize(("rows", "d_in"), [(100, 768), (256, 1024)])
def test_few_rows_have_few_components_whatever_they_are(rows, d_in):
    found = suggest_sizes(torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0)))
    assert (found.d_sae, found.k, found.told_by) == (8 * d_in, 32, "nothing")


def test_full_rank_noise_is_no_sum_of_a_thousand_directions():
    for seed in range(8):
        x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(seed))
        assert suggest_sizes(x).told_by != "fourth moments"


@pytest.mark.parametrize("d_in", [32, 128])
@pytest.mark.parametrize("spread", [0.2, 0.3])
@pytest.mark.parametrize("decay", [0, 1])
def test_rows_of_one_shape_whose_norms_vary_are_no_sums_of_directions(d_in, spread, decay):
    rng = np.random.default_rng(d_in)
    x = rng.standard_normal((4096, d_in)) * np.arange(1, d_in + 1) ** (-decay / 2)
    x = torch.from_numpy(x * (1 + spread * rng.standard_normal((4096, 1))))
    found = independent_directions(x, spectrum(x))
    assert 1 <= found.per_row <= d_in / 4, "the other conditions refuse these"
    assert 0.6 < found.total / found.cloud < 2
    assert suggest_sizes(x).told_by != "fourth moments"


def test_the_count_that_a_cloud_pretends_to_is_that_of_its_whole_cumulant():
    shape = np.diag([1.0, 2.0, 5.0]) / 8
    fourth = sum(np.einsum(p, shape, shape) for p in ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl"))
    rows = np.random.default_rng(0).standard_normal((4096, 3)) @ np.sqrt(shape)
    x = torch.from_numpy(rows)
    total = np.einsum("iikk->", fourth) ** 2 / (fourth**2).sum()
    assert independent_directions(x, spectrum(x)).cloud == pytest.approx(total, rel=0.03)


def test_where_noise_leaves_nothing_of_the_cumulant_there_is_no_count_of_directions():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    assert math.isinf(independent_directions(x, spectrum(x)).total)


def test_units_and_place_of_the_rows_do_not_matter():
    x = plant(2048, d_in=32, features=64, l0=3).x.double()
    assert suggest_sizes(1e6 * x - 5e6)[:2] == suggest_sizes(x)[:2]


def test_the_cycles_are_those_of_a_sum_over_four_rows():
    x = np.random.default_rng(0).standard_normal((7, 3))
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    assert _sum_over_cycles(torch.from_numpy(x)) == pytest.approx(np.trace(np.linalg.matrix_power(gram, 4)))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_few_rows_get_numbers_all_the_same(rows):
    found = suggest_sizes(torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)))
    assert found.d_sae == 64 and 1 <= found.k <= 4 and found.told_by != "fourth moments"


def test_rows_that_do_not_vary_need_one_feature():
    found = suggest_sizes(torch.ones(100, 4))
    assert (found.d_sae, found.k) == (64, 1) and math.isnan(found.effective_rank)


def test_what_is_far_off_is_not_supported():
    found = Sizes(128, 8, 3.0, False)
    assert found.supports(128, 8) and found.supports(255, 5) and found.supports(16, 15)
    assert not found.supports(256, 8)
    assert not found.supports(128, 4)
    assert not found.supports(128, 16)
