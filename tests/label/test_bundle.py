"""The exported bundle: whole, checked, and good for feature columns of a panel."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from activations_cache.hooks import capture
from activations_cache.panel import Panel, PanelConfig
from activations_cache.prepare import prepare
from activations_cache.reference.columns import model_config
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.reference.histories import collate
from assay.config import RunConfig
from label.bundle import verify_bundle, write_bundle
from label.card import card
from label.columns import feature_columns
from label.naming import column_name
from label.tables import read_summary, read_table
from sae.base import SAEConfig
from sae.checkpoint import load_sae, save_sae
from sae.config import parse_config
from sae.errors import CheckpointError, ConfigError, PanelError

N_FEATURES, K = 40, 6


@pytest.fixture(scope="module")
def panel_config(tmp_path_factory: pytest.TempPathFactory) -> PanelConfig:
    """A panel of eighty clients with histories of unequal length and months missing."""
    rng = np.random.default_rng(3)
    client = np.repeat(np.arange(80), rng.integers(2, 14, size=80))
    rows = {
        "client": [f"c{c}" for c in client],
        "t": np.arange(len(client)),
        "bal": rng.gamma(2, 500, len(client)),
    }
    start = np.flatnonzero(np.diff(client, prepend=-1))
    rows["t"] = (rows["t"] - np.repeat(start, np.bincount(client))) * rng.integers(1, 3, 80)[client]
    rows["bkt"] = np.where(rng.random(len(client)) < 0.1, np.nan, rng.integers(0, 4, len(client)))
    path = tmp_path_factory.mktemp("given") / "book.parquet"
    order = rng.permutation(len(client))
    pq.write_table(pa.table(rows).take(order), path)
    return PanelConfig(path=str(path), entity="client", time="t", columns={"bkt": "bkt", "bal": "bal"})


@pytest.fixture(scope="module")
def run_folder(
    labels_folder: Path,
    run_record: dict[str, Any],
    panel_config: PanelConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run as the stages leave it: panel, model, dictionary, labels."""
    run = tmp_path_factory.mktemp("run")
    prepare(panel_config, run / "panel")
    panel = Panel.open(run / "panel")
    torch.manual_seed(0)
    shape: dict[str, int | float] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32}
    everything = np.ones(len(panel.time), dtype=bool)
    CreditTransformer(model_config(panel, everything, n_knots=4, shape=shape)).save_pretrained(run / "model")
    sizes = parse_config(SAEConfig, {"kind": "topk", "d_sae": N_FEATURES, "k": K}, where="test")
    sae = sizes.build(16, generator=torch.Generator().manual_seed(1))
    sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(2))
    sae.folded = True
    save_sae(sae, run / "sae" / "layers.0-topk", extra={"hook": "layers.0", "seed": 0, "store": "5eed"})
    shutil.copytree(labels_folder, run / "labels")
    config = run_record["config"] | {"panel": panel_config.to_dict()}
    record = run_record | {"config": config, "stages": {"train": {"output": "sae/layers.0-topk"}}}
    (run / "run.json").write_text(json.dumps(record))
    (run / "concepts").mkdir()
    (run / "concepts" / "expressions.json").write_text(json.dumps({"dpd30_now": "bkt >= 1"}))
    return run


@pytest.fixture
def bundle(run_folder: Path, tmp_path: Path) -> Path:
    return write_bundle(run_folder, tmp_path / "dictionary")


def test_a_bundle_holds_what_a_validator_asks_for(bundle: Path, run_folder: Path) -> None:
    dictionary = verify_bundle(bundle)
    summary = read_summary(run_folder / "labels")
    assert dictionary["counts"]["n_learned_and_used"] == summary["n_learned_and_used"]
    assert (
        dictionary["counts"]["reasons"] == summary["reasons"]
        and dictionary["fidelity"] == summary["fidelity"]
    )
    provenance = dictionary["provenance"]
    assert (
        dictionary["hook"] == "layers.0" and provenance["seed"] == 0 and provenance["data"]["store"] == "5eed"
    )
    assert provenance["versions"]["torch"] == "2.13.0" and dictionary["label_rule"]["min_skill"] == 0.25
    panel = hashlib.sha256((run_folder / "panel" / "panel.parquet").read_bytes()).hexdigest()
    assert provenance["data"]["panel_sha256"] == panel and provenance["data"]["entities"] == 80
    concepts = json.loads((bundle / "concepts.json").read_text())["concepts"]
    assert concepts["dpd30_now"]["expr"] == "bkt >= 1" and concepts["hpi_drop"]["applicable"] is False
    text = (bundle / "card.md").read_text()
    assert "Not for adverse action notices, unless" in text and "<script>" not in text
    headline = f"**{summary['n_learned_and_used']} labelled, learned and used**"
    assert headline in text and text.index(headline) < text.index("labelled and used;")


def test_the_card_shows_periods_as_people_write_them(bundle: Path) -> None:
    dictionary = verify_bundle(bundle)
    dictionary["provenance"]["data"] |= {"first_period": 24240, "last_period": 24251}
    assert "periods 24240 to 24251." in card(dictionary, [])
    dictionary["provenance"]["data"]["calendar"] = "month"
    assert "periods 2020-01 to 2020-12." in card(dictionary, [])


def test_a_run_without_a_model_has_a_bundle(run_folder: Path, tmp_path: Path) -> None:
    """As RunConfig.to_dict leaves a section that a run of ready-made tensors does not have."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    source = {"kind": "tensors", "path": "x.npy"}
    config = RunConfig.model_validate({"name": "tensors", "out": str(run), "source": source}).to_dict()
    assert config["model"] is None
    (run / "run.json").write_text(json.dumps(record | {"config": config}))
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "panel")
    dictionary = verify_bundle(write_bundle(run, tmp_path / "dictionary"))
    assert dictionary["provenance"]["model"] == {"kind": None, "weights": None}


def test_damaged_labels_are_not_handed_on(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    groups = run / "labels" / "groups.parquet"
    groups.write_bytes(groups.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"groups\.parquet"):
        write_bundle(run, tmp_path / "dictionary")
    assert not (tmp_path / "dictionary").exists()


def test_both_forms_of_the_features_say_the_same(bundle: Path, run_folder: Path) -> None:
    table = pq.read_table(bundle / "features.parquet").to_pylist()
    lines = [json.loads(line) for line in (bundle / "features.jsonl").read_text().splitlines()]
    assert lines == table
    names = [f.pop("column") for f in table]
    assert table == read_table(run_folder / "labels", "features").to_pylist()
    assert len(set(names)) == N_FEATURES and names[0] == "f_0000__dpd30_now" and names[-1] == "f_0039"


def test_the_weights_are_read_from_the_bundle(bundle: Path, run_folder: Path) -> None:
    ours, theirs = load_sae(bundle), load_sae(run_folder / "sae" / "layers.0-topk")
    assert ours.folded and all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_every_damage_is_found_and_named(bundle: Path) -> None:
    for path in sorted(bundle.iterdir()):
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], bytes([whole[0] ^ 1]) + whole[1:], None):
            if broken is None:
                path.unlink()
            else:
                path.write_bytes(broken)
            with pytest.raises(CheckpointError, match=path.name):
                verify_bundle(bundle)
        path.write_bytes(whole)
    verify_bundle(bundle)
    for name in ("card.md", "groups.parquet"):
        (bundle / name).write_text("other")
    with pytest.raises(CheckpointError, match=r"card\.md was changed; groups\.parquet was changed"):
        verify_bundle(bundle)


def test_a_bundle_replaces_a_bundle_and_nothing_else(run_folder: Path, bundle: Path, tmp_path: Path) -> None:
    (bundle / "card.md").write_text("scribbled over")
    write_bundle(run_folder, bundle)
    verify_bundle(bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dictionary"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something that is not a bundle"):
        write_bundle(run_folder, mine)
    with pytest.raises(ConfigError, match="is a file"):
        write_bundle(run_folder, mine / "thesis.txt")
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_a_run_without_labels_has_nothing_to_export(run_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run_folder, bare, ignore=shutil.ignore_patterns("labels"))
    with pytest.raises(ConfigError, match="no labels"):
        write_bundle(bare, tmp_path / "dictionary")
    assert not (tmp_path / "dictionary").exists()


def expected_columns(run: Path, panel: Panel) -> np.ndarray:
    """The codes of every row, one entity at a time, by TopK written out in NumPy."""
    model = CreditTransformer.from_pretrained(run / "model").eval()
    sae = load_sae(run / "sae" / "layers.0-topk")
    w, b, start = (p.detach().double().numpy() for p in (sae.W_enc, sae.b_enc, sae.b_dec))
    out = np.zeros((len(panel.time), N_FEATURES))
    for entity in range(panel.n_entities):
        batch = collate(panel, np.array([entity]))
        with torch.inference_mode(), capture(model, ["layers.0"]) as seen:
            model(batch.values, batch.gap)
        for row, x in zip(batch.rows[0].tolist(), seen["layers.0"][0].double().numpy(), strict=True):
            z = (x - start) @ w.T + b
            top = np.argsort(-z, kind="stable")[:K]
            out[row, top] = np.maximum(z[top], 0)
    return out


def test_columns_are_the_codes_of_the_panels_rows(run_folder: Path, bundle: Path) -> None:
    table = feature_columns(bundle, run_folder / "model", run_folder / "panel", features=range(N_FEATURES))
    panel = Panel.open(run_folder / "panel")
    got = np.stack([c.to_numpy() for c in table.columns[2:]], axis=1)
    np.testing.assert_allclose(got, expected_columns(run_folder, panel), atol=2e-5)
    ids = pq.read_table(run_folder / "panel" / "entities.parquet")["id"].to_pylist()
    assert table["entity"].to_pylist() == [ids[e] for e in panel.entity]
    assert table["time"].to_pylist() == panel.time.tolist()
    labelled = feature_columns(bundle, run_folder / "model", run_folder / "panel")
    assert labelled.column_names[2:] == table.column_names[2:14]
    assert labelled.column(2).equals(table.column(2))
    assert json.loads(labelled.schema.field(2).metadata[b"threshold"]) == 0.55


def test_the_page_on_exports_tells_the_truth(
    run_folder: Path, bundle: Path, panel_config: PanelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "uci_default").symlink_to(run_folder)
    shutil.copyfile(str(panel_config.path), tmp_path / "new_book.parquet")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    written = pq.read_table(tmp_path / "features.parquet")
    assert written.equals(feature_columns(bundle, run_folder / "model", run_folder / "panel"))
    listed = {name for line in page.splitlines() if line.startswith("| `") for name in line.split("`")[1::2]}
    assert {p.name for p in bundle.iterdir()} <= listed


def test_the_wrong_model_or_panel_is_refused(
    run_folder: Path, bundle: Path, panel_config: PanelConfig, tmp_path: Path
) -> None:
    other = CreditTransformer.from_pretrained(run_folder / "model")
    with torch.no_grad():
        other.default_head.bias += 1
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is not the model"):
        feature_columns(bundle, tmp_path / "model", run_folder / "panel")
    swapped = panel_config.model_copy(update={"columns": {"bal": "bal", "bkt": "bkt"}})
    prepare(swapped, tmp_path / "panel")
    with pytest.raises(PanelError, match="other columns than the model reads"):
        feature_columns(bundle, run_folder / "model", tmp_path / "panel")
    with pytest.raises(CheckpointError, match="no feature 40"):
        feature_columns(bundle, run_folder / "model", run_folder / "panel", features=[3, 40])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((123, 1024, "util_high", 0.9, None), "f_0123__util_high_at_least_0.9"),
        ((123, 1024, "util", 0.55, 0.7), "f_0123__util_0.55_to_below_0.7"),
        ((3, 100, "bal", 1234567.0, 1234568.0), "f_0003__bal_1234567_to_below_1234568"),
        ((3, 100, "score", 0.98765432, None), "f_0003__score_at_least_0.987654"),
        ((3, 100, "score", 0.123456, 0.98765), "f_0003__score_0.123456_to_below_0.98765"),
        ((5, 65536, "mob", None, 12.0), "f_00005__mob_below_12"),
        ((5, 8, "dpd30_now", None, None), "f_0005__dpd30_now"),
        ((5, 8, None, None, None), "f_0005"),
    ],
)
def test_names_of_columns(arguments: Any, name: str) -> None:
    assert column_name(*arguments) == name
