"""What every kind of dictionary promises."""

import copy
import json

import pytest
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, InferenceOnly, SAEConfig
from sae.checkpoint import load_sae, read_header, save_sae
from sae.config import parse_config
from sae.errors import CheckpointError, ConfigError
from sae.folding import fold
from sae.metrics import Firing
from sae.world import World

WORLD = World()
D_IN, D_SAE, K = 12, 40, 4
KINDS = sorted(SAEConfig.kinds)
STRAIGHT_THROUGH = {"threshold"}
STOPPED = {"lista": {"detached": False}}
"""Settings without stopped gradients, which no difference quotient has; their oracle is in test_nested.py."""
BY_ROW = ("topk", "hierarchical_topk", "jumprelu")
"""Kinds whose training codes of a row depend on no other row."""


def build(kind, *, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, **options):
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": d_sae, "k": k, **options}, where="test")
    return config.build(d_in, generator=torch.Generator().manual_seed(seed))


def rows(n, seed=0, d_in=D_IN):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def batch(n, seed=0):
    """Rows of which every other one continues the one before."""
    return Batch(rows(n, seed), torch.arange(n) % 2 == 1)


def learners(sae):
    return {name: p for name, p in sae.named_parameters() if p.requires_grad}


def train(sae, steps=60, n=64):
    """Train it, or move the weights of one that was trained elsewhere away from its start."""
    if isinstance(sae, InferenceOnly):
        generator = torch.Generator().manual_seed(1)
        for p in sae.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
        return sae
    optimiser = torch.optim.Adam(learners(sae).values(), lr=3e-3)
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    for step in range(steps):
        optimiser.zero_grad()
        losses = sae.losses(batch(n, seed=step), dead=dead, world=WORLD)
        losses.total.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step(losses, world=WORLD)
    return sae


TRAINED = [kind for kind in KINDS if SAEConfig.kinds[kind].trainable]
every_kind = pytest.mark.parametrize("kind", KINDS)
trained_kinds = pytest.mark.parametrize("kind", TRAINED)


@every_kind
def test_it_starts_tied_with_unit_rows_and_repeats(kind):
    a, b = build(kind), build(kind)
    assert torch.equal(a.W_enc, a.W_dec)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.W_enc.shape == a.W_dec.shape == (D_SAE, D_IN)


@every_kind
@pytest.mark.parametrize("n", [1, 2, 37])
def test_codes_are_positive_ordered_and_of_every_row(kind, n):
    sae = train(build(kind))
    codes = sae.encode(rows(n))
    assert codes.rows == n
    assert codes.offsets[0] == 0
    assert codes.offsets[-1] == len(codes.values) == len(codes.features)
    assert (codes.values > 0).all()
    keys = codes.row_ids() * D_SAE + codes.features
    assert (keys.diff() > 0).all()
    assert sae.decode(codes).shape == (n, D_IN)


@every_kind
def test_a_row_is_encoded_the_same_in_any_company(kind):
    sae, x = train(build(kind)), rows(50)
    together = sae.encode(x).to_dense(D_SAE)
    alone = torch.cat([sae.encode(x[i : i + 1]).to_dense(D_SAE) for i in range(50)])
    torch.testing.assert_close(together, alone)


@every_kind
def test_decoding_is_the_dense_product(kind):
    sae, x = train(build(kind)), rows(20)
    codes = sae.encode(x)
    torch.testing.assert_close(sae.decode(codes), codes.to_dense(D_SAE) @ sae.W_dec + sae.b_dec)


@trained_kinds
@pytest.mark.parametrize("n_dead", [0, 3, 40])
def test_losses_change_nothing_and_reach_every_parameter(kind, n_dead):
    sae = train(build(kind, k_aux=5), steps=10)
    before = copy.deepcopy(sae.state_dict())
    given, dead = batch(9, seed=99), torch.arange(D_SAE) < n_dead
    x = given.x.clone()
    first, second = (sae.losses(given, dead=dead, world=WORLD) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert torch.equal(given.x, x)
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    assert (first.parts["auxk"] > 0) == (n_dead > 0)
    gradients = torch.autograd.grad(first.total, list(learners(sae).values()))
    assert all(torch.isfinite(g).all() and g.any() for g in gradients)


@trained_kinds
def test_gradients_of_the_loss_against_finite_differences(kind):
    sae = build(kind, d_in=4, d_sae=11, k=3, **STOPPED.get(kind, {})).double()
    x = Batch(rows(7, seed=99, d_in=4).double(), torch.arange(7) % 2 == 1)
    dead = torch.zeros(11, dtype=torch.bool)
    smooth = {name: p for name, p in learners(sae).items() if name not in STRAIGHT_THROUGH}

    def total(*values):
        with torch.nn.utils.stateless._reparametrize_module(sae, dict(zip(smooth, values, strict=True))):
            return sae.losses(x, dead=dead, world=WORLD).total

    assert torch.autograd.gradcheck(total, tuple(p.detach().requires_grad_() for p in smooth.values()))


@pytest.mark.parametrize("kind", BY_ROW)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(kind):
    sae, x, none = train(build(kind), steps=5), rows(30, seed=4), torch.zeros(D_SAE, dtype=torch.bool)
    whole, *parts = (sae.losses(Batch(part), dead=none, world=WORLD).total for part in (x, x[:12], x[12:]))
    torch.testing.assert_close(whole, 0.4 * parts[0] + 0.6 * parts[1])


@trained_kinds
def test_training_lowers_the_loss_and_keeps_unit_rows(kind):
    sae = build(kind)
    none = torch.zeros(D_SAE, dtype=torch.bool)
    first = sae.losses(batch(256, seed=7), dead=none, world=WORLD).parts["mse"]
    train(sae, steps=150)
    last = sae.losses(batch(256, seed=7), dead=none, world=WORLD).parts["mse"]
    assert last < 0.8 * first
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@trained_kinds
def test_l0_after_training_is_close_to_k_on_rows_not_seen(kind):
    sae = train(build(kind), steps=300, n=128)
    sae.settle((rows(128, seed=5000 + i) for i in range(32)), world=WORLD)
    firing = Firing.empty(D_SAE)
    firing.update(sae.encode(rows(4000, seed=10_000)))
    assert firing.l0 == pytest.approx(K, rel=0.05)


@every_kind
def test_folding_gives_the_same_features_in_raw_units(kind):
    sae = train(build(kind))
    mean, scale = torch.randn(D_IN, generator=torch.Generator().manual_seed(5)) * 10, 7.5
    folded, x = fold(sae, mean, scale), rows(200, seed=3) * scale + mean
    scaled, raw = sae.encode((x - mean) / scale), folded.encode(x)
    assert torch.equal(scaled.features, raw.features)
    assert torch.equal(scaled.offsets, raw.offsets)
    torch.testing.assert_close(raw.values, scale * scaled.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.decode(raw), scale * sae.decode(scaled) + mean, rtol=1e-4, atol=1e-3)
    assert folded.folded
    assert not sae.folded
    with pytest.raises(CheckpointError, match="folded already"):
        fold(folded, mean, scale)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="positive"):
            fold(sae, mean, bad)


@every_kind
def test_saving_and_loading_changes_nothing(kind, tmp_path):
    sae = fold(train(build(kind)), torch.ones(D_IN), 2.0)
    save_sae(sae, tmp_path / "sae", extra={"hook": "layers.2"})
    back = load_sae(tmp_path / "sae")
    assert type(back) is type(sae)
    assert back.config == sae.config
    assert back.folded
    assert read_header(tmp_path / "sae")["extra"] == {"hook": "layers.2"}
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["config.json", "weights.safetensors"]
    theirs = back.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in sae.state_dict().items())
    x = rows(30)
    assert torch.equal(back.encode(x).values, sae.encode(x).values)


@every_kind
def test_damage_is_found(kind, tmp_path):
    folder = tmp_path / "sae"
    sae = build(kind)
    save_sae(sae, folder)
    weights, header = (folder / "weights.safetensors").read_bytes(), (folder / "config.json").read_text()

    def broken(weights=weights, header=header):
        (folder / "weights.safetensors").write_bytes(weights)
        (folder / "config.json").write_text(header)
        with pytest.raises(CheckpointError) as caught:
            load_sae(folder)
        return str(caught.value)

    assert "weights.safetensors" in broken(weights=weights[:-1])
    assert "not what config.json describes" in broken(weights=weights[:-1] + bytes([weights[-1] ^ 1]))
    assert "config.json" in broken(header="{")
    assert "format_version 2" in broken(header=header.replace('"format_version": 1', '"format_version": 2'))
    fields = json.loads(header)
    assert "d_in" in broken(header=json.dumps({**fields, "d_in": None}))
    assert "do not fit" in broken(header=json.dumps({**fields, "d_in": D_IN + 1}))
    assert "unknown kind" in broken(header=json.dumps({**fields, "sae": {**fields["sae"], "kind": "no"}}))
    other = build(kind, seed=1)
    save_sae(other, tmp_path / "other")
    assert "not what" in broken(weights=(tmp_path / "other" / "weights.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no readable dictionary"):
        load_sae(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(TRAINED)))
def test_kinds_that_are_only_read_refuse_to_train(kind):
    with pytest.raises(ConfigError, match="not trained here"):
        build(kind).losses(batch(9), dead=torch.zeros(D_SAE, dtype=torch.bool), world=WORLD)


@trained_kinds
def test_only_after_step_and_settle_change_buffers_and_the_state_is_loaded_back(kind, tmp_path):
    sae = train(build(kind), steps=5)
    save_sae(sae, tmp_path)
    back = load_sae(tmp_path)
    ours, theirs = (train(s, steps=5).state_dict() for s in (sae, back))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@every_kind
def test_wrong_settings_are_refused_all_at_once(kind):
    with pytest.raises(ConfigError, match="2 problem"):
        build(kind, d_sae=0, k=-1)


@every_kind
def test_a_geometric_median_start_is_placed_by_the_rows(kind):
    sae = build(kind, start="geometric_median")
    sae.start_at(rows(500) + 3)
    assert (sae.b_dec - 3).abs().max() < 0.3
    plain = build(kind)
    plain.start_at(rows(500) + 3)
    assert not plain.b_dec.any()
