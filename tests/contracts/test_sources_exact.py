"""What sources read is what models compute and files hold; and wrong input is one clear message."""

import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from activations_cache.documents import Documents
from activations_cache.hooks import capture
from activations_cache.inputs import ModelInputs
from activations_cache.models import ModelConfig
from activations_cache.sources import reading
from activations_cache.sources.base import HarvestInputs, SourceConfig
from activations_cache.sources.batches import BatchesFeed
from activations_cache.sources.text import PaddedFeed, Tokens, check_fit, load_tokenizer
from activations_cache.splits import SplitConfig
from sae.config import parse_config
from sae.errors import ConfigError, UserError
from sae.world import World
from tests.contracts.source_cases import HERE, collect, source_case, table_of
from tests.contracts.source_models import COLUMNS, CUT, WORDS, batches

EXACT = {
    "text, bert": ("bert", "encoder.layer.{}", range(3), {}),
    "text, llama": ("llama", "layers.{}", range(2), {}),
    "text, gpt2, packed": ("gpt2", "h.{}", range(2), {}),
    "text, t5, packed": ("t5", "encoder.block.{}[0]", range(2), {"architecture": "T5EncoderModel"}),
    "timeseries, patchtst": ("patchtst", "encoder.layers.{}[0]", range(1), {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_activations_equal_output_hidden_states(name, small_batches, place, folder_of, panel, texts):
    folder, hook, layers, more = EXACT[name]
    config = parse_config(SourceConfig, source_case(name, place, folder_of)[0], where="test")
    chosen = parse_config(
        ModelConfig, {"kind": "pretrained", "path": str(folder_of(folder)), **more}, where="test"
    )
    inputs = HarvestInputs(hooks=[hook.format(i) for i in layers], model=chosen, panel=panel)
    source = config.build(inputs=inputs)
    model = chosen.load(None).eval()
    checked = 0
    for step, batch in zip(source.feed.plan(World()), collect(source), strict=True):
        call = source.feed.load(step)
        with torch.inference_mode():
            states = model(**call.kwargs, output_hidden_states=True).hidden_states
        for i in layers:
            # element 0 is the embedding, so element i + 1 is what layer i wrote
            state, name_i = states[i + 1], hook.format(i)
            if not call.fields:
                assert np.array_equal(batch.acts[name_i], state[torch.from_numpy(call.real)].numpy())
            for c, field in enumerate(call.fields):
                assert np.array_equal(
                    batch.acts[f"{name_i}#{field}"], state[:, c][torch.from_numpy(call.real)].numpy()
                )
        checked += len(batch.entity)
    assert checked == source.n_rows


def test_tokens_of_a_document_are_all_there_in_order(build, texts, folder_of):
    words = AutoTokenizer.from_pretrained(folder_of("bert"))
    for name, kept in (("text, bert", False), ("text, t5, packed", False)):
        source = build(name)
        at, _ = table_of(collect(source))
        ids = source.entities["id"].to_pylist()
        for entity in np.unique(at[:, 0]):
            n = len(words((texts / ids[entity]).read_text(), add_special_tokens=kept)["input_ids"])
            assert at[at[:, 0] == entity, 1].tolist() == list(range(n))
            assert np.array_equal(at[at[:, 0] == entity, 1], at[at[:, 0] == entity, 2])


@pytest.mark.parametrize(
    "name", ["tensors, npy", "tensors, safetensors", "tensors, lists", "tensors, columns"]
)
def test_tensors_are_the_rows_of_the_files(name, build, tensor_files):
    source = build(name)
    at, acts = table_of(collect(source))
    assert at[:, 0].tolist() == list(range(300))
    assert not at[:, 1:3].any()
    x = tensor_files.copy()
    if name == "tensors, npy":
        x[123:] = x[123:].astype(np.float16)
    assert np.array_equal(next(iter(acts.values())), x)


def test_tensors_without_coordinates_mostly_fit(build, place):
    np.save(place / "many.npy", np.ones((5000, 2), np.float32))
    at, _ = table_of(collect(build("tensors, columns", path=str(place / "many.npy"))))
    assert (at[:, 3] == 0).mean() == pytest.approx(0.98, abs=0.01)


def test_coordinates_say_who_and_when(build, place, tensor_files):
    source = build(
        "tensors, safetensors",
        coordinates={"path": str(place / "at.parquet"), "entity": "who", "time": "when"},
    )
    table = pq.read_table(place / "at.parquet").to_pydict()
    ids = source.entities["id"].to_pylist()
    found = {}
    for b in collect(source):
        for e, p, t, x in zip(b.entity, b.position, b.time, b.acts["h"], strict=True):
            found.setdefault((ids[e], int(t)), []).append((int(p), x))
    for i, (who, when) in enumerate(zip(table["who"], table["when"], strict=True)):
        key = (who, 2024 * 12 + int(when[-2:]) - 1)
        assert any(np.array_equal(x, tensor_files[i]) for _, x in found[key])
    per_entity = {}
    for (who, t), items in found.items():
        per_entity.setdefault(who, []).extend((p, t) for p, _ in items)
    for pairs in per_entity.values():
        pairs.sort()
        assert [p for p, _ in pairs] == list(range(6))
        assert [t for _, t in pairs] == sorted(t for _, t in pairs)


def test_patches_join_at_their_last_month(build, panel):
    at, acts = table_of(collect(build("timeseries, patchtst")))
    rows = pq.read_table(panel / "panel.parquet").to_pydict()
    by_entity = {}
    for e, t in zip(rows["entity"], rows["time"], strict=True):
        by_entity.setdefault(e, []).append(t)
    expected = []
    for e, times in by_entity.items():
        for i, t in enumerate(times):
            # context 8, patches of 3 every 2: the context begins with a month that no patch covers
            last = max(u for u in times if (u >= CUT) == (t >= CUT))
            place = 7 - (last - t) % 8
            if place in (3, 5, 7):
                expected.append((e, i, t))
    assert [tuple(r) for r in at[:, :3]] == sorted(expected)
    assert set(acts) == {f"encoder.layers.{i}[0]#{c}" for i in range(2) for c in COLUMNS}


def test_what_comes_after_the_time_cut_does_not_reach_the_rows_before_it(place, panel, folder_of):
    later = place / "later"
    shutil.copytree(panel, later)
    table = pq.read_table(panel / "panel.parquet")
    after = pc.greater_equal(table["time"], CUT)
    for name in COLUMNS:
        changed = pc.if_else(after, pc.add(table[name], 1000.0), table[name])
        table = table.set_column(table.schema.get_field_index(name), name, changed)
    pq.write_table(table, later / "panel.parquet")
    source, model, _ = source_case("timeseries, patchtst", place, folder_of)
    chosen = parse_config(ModelConfig, model, where="test")
    found = []
    for folder in (panel, later):
        inputs = HarvestInputs(hooks=["encoder.layers.1[0]"], model=chosen, panel=folder)
        found.append(table_of(collect(parse_config(SourceConfig, source, where="test").build(inputs=inputs))))
    (at, acts), (same_at, later_acts) = found
    assert np.array_equal(at, same_at)
    early = at[:, 2] < CUT
    assert 0 < early.sum() < len(early)
    for hook, x in acts.items():
        assert np.array_equal(x[early], later_acts[hook][early])
        assert not np.array_equal(x[~early], later_acts[hook][~early])


def test_several_events_of_a_day_keep_their_order(build, events):
    table = pq.read_table(events)
    rows = list(
        zip(table["account"].to_pylist(), table["day"].to_pylist(), table["seq"].to_pylist(), strict=True)
    )
    for name, key in (("events", lambda r: (r[0], r[1])), ("events, ordered", lambda r: r)):
        source = build(name)
        panel = source.feed.panel
        ids = source.entities["id"].to_pylist()
        # ids are text, so are codes in order of text
        wanted = sorted(range(400), key=lambda i: (str(rows[i][0]), *key(rows[i])[1:]))
        assert [ids[e] for e in panel.entity] == [str(rows[i][0]) for i in wanted]
        amount = np.array(table["amount"].to_pylist(), np.float32)
        assert np.array_equal(panel.values[:, 0], amount[wanted])
        assert (np.diff(panel.time)[np.diff(panel.entity) == 0] == 0).any()


def test_left_and_right_padding_give_the_same_activations(build):
    right = build("panel, module")
    left = build("panel, module, left padding")
    a, b = table_of(collect(right)), table_of(collect(left))
    assert np.array_equal(a[0], b[0])
    np.testing.assert_allclose(a[1]["embed"], b[1]["embed"], rtol=1e-5, atol=1e-6)


def test_hooks_of_one_pass_belong_together(build):
    source = build("panel, module")
    assert source.hooks == {"gru[0]": 7, "twice@1": 7, "twice:in": 7, "embed": 4}
    layer = source.model.twice
    for batch in collect(source):
        assert np.array_equal(batch.acts["gru[0]"], batch.acts["twice:in"])
        with torch.inference_mode():
            again = layer(layer(torch.from_numpy(batch.acts["gru[0]"]))).numpy()
        np.testing.assert_allclose(batch.acts["twice@1"], again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tensors, safetensors", {"key": None}, "acts or other"),
        ("tensors, safetensors", {"key": "no"}, "source.key=no"),
        ("tensors, npy", {"key": "acts"}, "source.key=acts"),
        ("tensors, npy", {"path": "nowhere.npy"}, "nowhere"),
        ("tensors, npy", {"path": "long.csv"}, "expected"),
        ("tensors, npy", {"coordinates": {"path": "{place}/at.parquet"}}, "lacks entity, time"),
        (
            "tensors, npy",
            {"coordinates": {"path": "{place}/long.parquet", "entity": "id", "time": "t"}},
            "300",
        ),
        ("tensors, columns", {"path": "{place}/at.parquet"}, "no floating-point"),
        ("text, bert", {"path": "nowhere.txt"}, "nowhere"),
        ("text, bert", {"length": 64}, "at most 32"),
        ("text, bert", {"path": "{place}/texts"}, "no data set|datasets"),
        ("text, bert", {"tokenizer": "{place}"}, "no tokenizer"),
        ("timeseries, patchtst", {"columns": ["bal"]}, "3 channel"),
        ("timeseries, patchtst", {"columns": ["bal", "due", "nope"]}, "no nope"),
        ("events", {"order": "nope", "columns": {"a": "nope + 1"}}, "nope"),
        ("batches", {"import": "no_such_module:f"}, "no_such_module"),
        ("batches", {"import": f"{HERE}:COLUMNS.nope"}, "nope"),
    ],
)
def test_wrong_input_is_refused(name, options, message, build, place):
    def fill(value):
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return value.replace("{place}", str(place)) if isinstance(value, str) else value

    with pytest.raises(UserError, match=message):
        build(name, **fill(options))


def test_an_activation_that_does_not_fit_is_refused():
    x = torch.zeros(3, 2, 5)
    inputs = ModelInputs((), {}, *(np.zeros((2, 3), int),) * 3, np.ones((2, 3), bool))
    with pytest.raises(ConfigError, match=r"shape \(3, 2, 5\)"):
        reading.at_real_places("gru", x, inputs)
    with pytest.raises(ConfigError, match="4 fields"):
        reading.at_real_places("h", torch.zeros(2, 3, 3, 5), inputs._replace(fields=tuple("abcd")))


def test_rows_are_taken_before_the_model_works_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).eval()
    calls = batches()
    source = reading.ModelSource(BatchesFeed(calls, SplitConfig()), model, ["0"], provenance={})
    for call, batch in zip(calls, collect(source), strict=True):
        want = (call.args[0] @ model[0].weight.T + model[0].bias)[torch.from_numpy(call.real)]
        assert (want < 0).any()
        np.testing.assert_allclose(batch.acts["0"], want.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_document_is_cut_from_its_beginning_whatever_its_tokenizer_says(place, folder_of, side):
    folder = place / f"cut from the {side}"
    words = AutoTokenizer.from_pretrained(folder_of("bert"))
    words.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    sides = {"truncation_side": side, "padding_side": side}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **sides}))
    text = " ".join(WORDS)
    documents = Documents(["d"], lambda _: text)
    feed = PaddedFeed(Tokens(documents, load_tokenizer(folder), keep_special=False), 6, SplitConfig())
    found = {}
    for step in feed.plan(World()):
        call = feed.load(step)
        ids = call.kwargs["input_ids"].numpy()[call.real]
        found |= dict(zip(call.position[call.real].tolist(), ids.tolist(), strict=True))
    assert [found[i] for i in range(len(WORDS))] == words(text, add_special_tokens=False)["input_ids"]


def test_positions_that_begin_behind_the_padding_are_fewer():
    config = RobertaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config).eval()
    model(input_ids=torch.full((1, 18), 5))
    check_fit(model, range(30), 18)
    with pytest.raises(ConfigError, match="at most 18"):
        check_fit(model, range(30), 19)


def test_a_hook_that_is_never_called_is_refused(build, place, folder_of):
    source, model, _ = source_case("panel, module", place, folder_of)
    chosen = parse_config(ModelConfig, model, where="test")
    inputs = HarvestInputs(hooks=["twice@5"], model=chosen, panel=place / "panel")
    with pytest.raises(ConfigError, match="never came"):
        parse_config(SourceConfig, source, where="test").build(inputs=inputs)


def test_torchs_packed_sequences_are_read():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    real = np.array([[True] * 3 + [False] * 2, [True] * 2 + [False] * 3])
    x = torch.randn(2, 5, 8)
    inputs = ModelInputs((x,), {}, *(np.zeros((2, 5), int),) * 3, real)
    with torch.inference_mode(), capture(model, ["layers.1"]) as seen:
        model(x, src_key_padding_mask=torch.from_numpy(~real))
    assert seen["layers.1"].is_nested
    acts = reading.at_real_places("layers.1", seen["layers.1"], inputs)["layers.1"]
    alone = [model(x[i : i + 1, : real[i].sum()])[0] for i in range(2)]
    np.testing.assert_allclose(acts, torch.cat(alone).detach().numpy(), rtol=1e-4, atol=1e-5)
