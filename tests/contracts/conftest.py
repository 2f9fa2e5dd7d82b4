"""What sources are tried on: small files of every kind, and one case or more for each kind of source."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import activations_cache.reference.shape
import activations_cache.sources  # noqa: F401 - registers the kinds
from activations_cache.models import ModelConfig
from activations_cache.panel import Panel, PanelConfig
from activations_cache.prepare import prepare
from activations_cache.reference.columns import model_config
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.sources import reading, text
from activations_cache.sources.base import HarvestInputs, SourceConfig
from sae.config import parse_config
from tests.contracts.source_cases import source_case
from tests.contracts.source_models import COLUMNS, CUT, WORDS, save_model


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(reading, "BATCH_ROWS", 64)
    monkeypatch.setattr(text, "BATCH_ROWS", 64)
    monkeypatch.setattr("activations_cache.sources.tensors.BATCH_BYTES", 1024)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


def long_table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for e in range(n):
        months = np.flatnonzero(rng.random(int(rng.integers(1, 16))) < 0.85)
        rows += [(f"E{e:03d}", int(t) + 5, *rng.standard_normal(3)) for t in (months if len(months) else [0])]
    table = pa.Table.from_pylist([dict(zip(("id", "t", *COLUMNS), row, strict=True)) for row in rows])
    bal = np.where(rng.random(len(rows)) < 0.1, np.nan, table["bal"].to_numpy())
    return table.set_column(2, "bal", pa.array(bal, from_pandas=True))


@pytest.fixture(scope="module")
def panel(place):
    pq.write_table(long_table(), place / "long.parquet")
    config = PanelConfig(
        path=str(place / "long.parquet"),
        entity="id",
        time="t",
        columns={c: c for c in COLUMNS},
        split={"out_of_time": CUT},
    )
    prepare(config, place / "panel")
    return place / "panel"


@pytest.fixture(scope="module")
def folder_of(place):
    """Save small models, each with its tokenizer, once."""

    def make(name):
        if not (place / name).exists():
            save_model(name, place / name)
        return place / name

    return make


@pytest.fixture(scope="module")
def texts(place):
    rng = np.random.default_rng(3)
    folder = place / "texts"
    folder.mkdir()
    for i in range(14):
        lines = [" ".join(rng.choice(WORDS, int(n))) for n in rng.integers(0, 30, 3)]
        (folder / f"d{i:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tensor_files(place):
    x = np.random.default_rng(5).standard_normal((300, 6)).astype(np.float32)
    np.save(place / "a.npy", x[:123])
    np.save(place / "b.npy", x[123:].astype(np.float16))
    save_file({"acts": x, "other": x[:, :2].copy()}, place / "x.safetensors")
    save_torch({"acts": torch.from_numpy(x).bfloat16()}, place / "bf16.safetensors")
    rows = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 6)
    pq.write_table(pa.table({"id": np.arange(300), "v": rows}), place / "lists.parquet", row_group_size=70)
    pq.write_table(
        pa.table({f"d{i}": x[:, i] for i in range(6)}), place / "columns.parquet", row_group_size=70
    )
    rng = np.random.default_rng(6)
    who = rng.permutation(np.repeat(np.arange(50), 6))
    when = np.array(["2024-01", "2024-02", "2024-03"])[rng.integers(0, 3, 300)]
    pq.write_table(pa.table({"who": [f"P{w}" for w in who], "when": when}), place / "at.parquet")
    return x


@pytest.fixture(scope="module")
def events(place):
    rng = np.random.default_rng(8)
    days = np.array("1993-01-01", "datetime64[D]") + np.sort(rng.integers(0, 60, 400))
    table = {"account": rng.integers(0, 40, 400), "day": days, "seq": rng.permutation(400)}
    table |= {"amount": rng.standard_normal(400), "kind": rng.choice(["in", "out"], 400)}
    pq.write_table(pa.table(table), place / "events.parquet")
    return place / "events.parquet"


@pytest.fixture
def build(small_batches, place, folder_of, panel, texts, tensor_files, events):
    def make(name, **options):
        source, model, hooks = source_case(name, place, folder_of)
        fitted = place / "fitted"
        if name == "panel" and not fitted.exists():
            torch.manual_seed(0)
            opened = Panel.open(panel)
            shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16, "dropout": 0.0}
            everything = np.ones(len(opened.time), bool)
            CreditTransformer(model_config(opened, everything, n_knots=4, shape=shape)).save_pretrained(
                fitted
            )
        config = parse_config(SourceConfig, {**source, **options}, where="test")
        chosen = None if model is None else parse_config(ModelConfig, model, where="test")
        inputs = HarvestInputs(hooks=tuple(hooks), model=chosen, fitted=fitted, panel=panel)
        return config.build(inputs=inputs)

    return make
