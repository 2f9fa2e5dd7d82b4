"""Removing features: the planted cause is found used, a bystander is not, and nothing else is recomputed wrongly."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sae.architectures  # noqa: F401
from activations_cache.harvest import HarvestConfig, harvest
from activations_cache.hooks import capture, intercept
from activations_cache.reference.histories import collate
from activations_cache.sources.panel import PanelSource
from label.cause import Ablation, Stream
from label.config import LabelConfig
from sae.architectures.batch_topk import BatchTopKConfig
from sae.config import parse_config
from sae.errors import ConfigError
from sae.folding import fold
from sae.world import World
from tests.activations_cache.reference.test_credit_transformer import SHAPE, make_panel
from tests.benchmarks.used import SIZES, false_rates


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A small model whose default head reads one direction of the stream; features along it and across it."""
    from activations_cache.reference.columns import model_config
    from activations_cache.reference.credit_transformer import CreditTransformer

    folder = tmp_path_factory.mktemp("cause")
    panel = make_panel(folder, n=600)
    torch.manual_seed(0)
    dims = SHAPE.model_dump(exclude={"kind", "n_knots"})
    model = CreditTransformer(
        model_config(panel, np.ones(len(panel.time), bool), n_knots=8, shape=dims)
    ).eval()
    source = PanelSource(folder, model, ["layers.1"], provenance={}, seed=0)
    store = harvest(source, folder / "a.zarr", HarvestConfig(), seed=0, world=World.single("cpu"))
    d = SHAPE.d_model
    sae = BatchTopKConfig(d_sae=12, k=4).build(d, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reads = model.default_head.weight[0] * model.norm.weight
        basis = torch.linalg.qr(torch.cat([(reads - reads.mean())[:, None], torch.randn(d, 11)], 1))[0].T
        sae.W_dec.copy_(basis[:12])
        sae.W_enc.copy_(basis[:12])
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.threshold.fill_(0.2)
    sae = fold(sae, torch.zeros(d), 1.0)
    stream = Stream.read(store, model, panel, "layers.1", sae, n_entities=1000, seed=0)
    return SimpleNamespace(panel=panel, model=model, sae=sae, stream=stream)


def test_what_is_subtracted_equals_a_full_pass_with_a_hook(case):
    stream = case.stream
    feature = int(np.diff(stream.starts).argmax())
    z = torch.from_numpy(stream.activation(feature))
    entities = stream.fired(feature)[:20]
    w = case.sae.W_dec[feature].detach()
    fast = stream.without(lambda index: z[index].unsqueeze(-1) * w, entities)
    for i, e in enumerate(entities):
        histories = collate(case.panel, stream.codes[[e]])

        def remove(x):
            codes = case.sae.encode(x[0]).to_dense(case.sae.d_sae)[:, feature]
            return x - codes[None, :, None] * w

        with torch.inference_mode(), intercept(case.model, {"layers.1": remove}):
            slow = case.model(histories.values, histories.gap).default_logit[0, -1]
        assert fast[i] == pytest.approx(float(slow), abs=1e-4)


def test_removing_nothing_changes_nothing(case):
    everyone = np.arange(len(case.stream.codes))
    base = case.stream.without(lambda index: torch.zeros(()), everyone)
    histories = collate(case.panel, case.stream.codes[:5])
    with torch.inference_mode(), capture(case.model, ["layers.1"]):
        out = case.model(histories.values, histories.gap).default_logit
    last = histories.real.sum(1) - 1
    np.testing.assert_allclose(base[:5], out[torch.arange(5), last].numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def by_row(case, tmp_path_factory):
    """The same model where outcomes are per row, and a third of the entities have none that is known."""
    folder = tmp_path_factory.mktemp("by_row")
    known = "CASE WHEN t > 2 AND CAST(right(id, 1) AS INTEGER) % 3 > 0 THEN y END"
    panel = make_panel(folder, n=300, outcome=known, outcome_per="row")
    source = PanelSource(folder, case.model, ["layers.1"], provenance={}, seed=0)
    store = harvest(source, folder / "a.zarr", HarvestConfig(), seed=0, world=World.single("cpu"))
    return panel, store


def test_where_outcomes_are_per_row_entities_without_a_known_one_are_left_out(case, by_row):
    panel, store = by_row
    stream = Stream.read(store, case.model, panel, "layers.1", case.sae, n_entities=1000, seed=0)
    known = {int(e) for e, y in zip(panel.entity, panel.outcome, strict=True) if np.isfinite(y)}
    confirm = panel.entities_of("confirm").tolist()
    assert stream.codes.tolist() == [e for e in confirm if e in known]
    assert 0 < len(stream.codes) < len(confirm)
    base = stream.without(lambda index: torch.zeros(()), np.arange(len(stream.codes)))
    for e, logit in zip(stream.codes[:10], base, strict=False):
        histories = collate(panel, np.array([e]))
        with torch.inference_mode():
            alone = case.model(histories.values, histories.gap).default_logit[0].double().numpy()
        judged = np.isfinite(panel.outcome[panel.offsets[e] : panel.offsets[e + 1]])
        assert logit == pytest.approx(alone[judged].mean(), abs=1e-5)


def test_where_no_outcome_is_known_no_removal_can_be_judged(case, by_row):
    panel, store = by_row
    unknown = replace(panel, outcome=np.full_like(panel.outcome, np.nan))
    assert Stream.read(store, case.model, unknown, "layers.1", case.sae, n_entities=1000, seed=0) is None


def test_the_feature_that_the_head_reads_is_used_and_those_across_it_are_not(case):
    ablation = Ablation(case.stream, n_entities=120, least=1, n_bootstrap=200, seed=0)
    live = [j for j in range(12) if len(case.stream.fired(j))]
    ablation.live(live)
    effects = {j: ablation.effect(j, n_random=5, n_matched=5) for j in live}
    assert effects[0].used
    assert effects[0].over_random.low > 0
    assert not any(e.used for j, e in effects.items() if j)
    assert effects[0].share > max(e.share for j, e in effects.items() if j)


def test_all_together_is_the_sum_of_all(case):
    ablation = Ablation(case.stream, n_entities=50, least=30, n_bootstrap=60, seed=0)
    together, everything = ablation.together(range(12))
    assert together == pytest.approx(everything, rel=1e-4)
    assert ablation.together([])[0] == 0


def firing_strongly_on(stream, n):
    """The stream with feature 0, which the head reads, firing far stronger where n entities are judged, else next to not."""
    value, mine = stream.value.copy(), slice(stream.starts[0], stream.starts[1])
    read = np.intersect1d(stream.row[mine], stream.offsets[1:] - 1)
    value[mine] *= np.where(np.isin(stream.row[mine], read[:n]), 10, 1e-12)
    return replace(stream, value=value)


def judge(stream, *, n_entities=1000, least, noise=0.0):
    """Feature 0's effect; with noise, as if batches that are cut differently gave logits that differ by as much."""
    ablation = Ablation(stream, n_entities=n_entities, least=least, n_bootstrap=200, seed=0)
    ablation.base += noise * (-1) ** np.arange(len(ablation.base))
    ablation.live([j for j in range(12) if len(stream.fired(j))])
    return ablation.effect(0, n_random=5, n_matched=5)


def test_a_feature_sampled_on_too_few_entities_is_left_open(case):
    assert judge(case.stream, n_entities=29, least=30) is None
    assert judge(firing_strongly_on(case.stream, 0), n_entities=30, least=30) is not None


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_a_feature_that_would_be_used_but_moves_too_few_entities_is_left_open(case, noise):
    stream = firing_strongly_on(case.stream, 8)
    assert len(stream.fired(0)) > 30
    assert judge(stream, least=8, noise=noise).used
    assert judge(stream, least=9, noise=noise) is None


def test_a_feature_that_moves_no_entity_of_many_is_not_used(case):
    effect = judge(firing_strongly_on(case.stream, 0), least=30)
    assert effect is not None
    assert not effect.used


def test_more_entities_than_are_sampled_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="ablation_least = 41 exceeds ablation_entities = 40"):
        parse_config(LabelConfig, {"ablation_entities": 40, "ablation_least": 41}, where="test")


@pytest.mark.parametrize("sizes", SIZES)
def test_with_the_least_number_of_entities_chance_passes_at_most_at_the_level(sizes):
    # where all of them move; where few do, even fewer pass
    assert max(false_rates(SIZES[sizes], LabelConfig().ablation_least, share=1.0, draws=1500)) < 0.05
    assert max(false_rates(SIZES[sizes], 5, share=1.0, draws=500)) > 0.05
