"""Labelling on activations whose truth is known, with the true directions as the dictionary."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import sae.architectures  # noqa: F401
from activations_cache.erase import erase
from activations_cache.harvest import HarvestConfig, harvest
from activations_cache.sources.synthetic import SyntheticSource, SyntheticSourceConfig
from activations_cache.splits import SPLITS, SplitConfig
from activations_cache.store import ActivationStore
from label.concepts.library import ConceptInfo
from label.config import LabelConfig
from label.inputs import LabelInputs
from label.run import label_dictionary
from label.tables import SCHEMAS, read_summary, read_table
from sae.architectures.batch_topk import BatchTopKConfig
from sae.checkpoint import save_sae
from sae.errors import StoreError
from sae.folding import fold
from sae.world import World

N, D = 40, 24
SOURCE = SyntheticSourceConfig(
    d_in=D, n_directions=N, l0=2.4, prevalence=(0.03, 0.2), entities=1500, rows_per_entity=12, noise=0.02
)
CONFIG = LabelConfig(n_bootstrap=200, n_permutations=20, examples=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> LabelInputs:
    folder = tmp_path_factory.mktemp("oracle")
    source = SyntheticSource(SOURCE)
    harvest(source, folder / "store.zarr", HarvestConfig(), seed=0, world=World.single("cpu"))
    source.write_truth(folder / "truth")
    save_truth_dictionary(source, folder / "sae")
    truth = pq.read_table(folder / "truth" / "concepts.parquet")
    entity = truth["entity_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    columns = {"entity": entity, "time": truth["t"].to_numpy().astype(np.int64)}
    names = [f"direction_{i:03d}" for i in range(N)]
    pq.write_table(pa.table({**columns, **{n: truth[n] for n in names}}), folder / "values.parquet")
    infos = [ConceptInfo(id=n, text=n, kind="point", type="bool") for n in names]
    return LabelInputs(folder / "store.zarr", folder / "sae", "oracle", [(folder / "values.parquet", infos)])


def save_truth_dictionary(source: SyntheticSource, out: Path) -> None:
    """Each direction as a feature that fires on its pseudo-inverse, with two features that never fire."""
    config = BatchTopKConfig(d_sae=N + 2, k=2)
    dictionary = config.build(D, generator=torch.Generator().manual_seed(0))
    directions = torch.from_numpy(source.directions).float()
    with torch.no_grad():
        dictionary.W_dec[:N] = directions
        dictionary.W_enc[:N] = directions
        dictionary.b_enc.zero_()
        dictionary.b_dec.zero_()
        dictionary.b_enc[N:] = -1e3
        dictionary.threshold.fill_(0.6)
    save_sae(fold(dictionary, torch.zeros(D), 1.0), out, {})


@pytest.fixture(scope="module")
def labelled(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("labels")
    label_dictionary(inputs, CONFIG, out, seed=0)
    return out


def test_labels_name_the_concept_of_their_direction(labelled):
    rows = read_table(labelled, "features").to_pylist()
    named = [r for r in rows if r["status"] == "labelled"]
    assert len(named) >= 30
    assert all(r["concept"] == f"direction_{r['feature']:03d}" for r in named)


def test_silent_features_are_dead_and_every_feature_has_a_row(labelled):
    rows = read_table(labelled, "features").to_pylist()
    assert [r["feature"] for r in rows] == list(range(N + 2))
    assert [r["reason"] for r in rows[-2:]] == ["dead", "dead"]
    assert all((r["reason"] is None) == (r["status"] == "labelled") for r in rows)
    assert all(r["description"] for r in rows)


def test_the_summary_agrees_with_the_tables(labelled):
    summary = read_summary(labelled)
    rows = read_table(labelled, "features").to_pylist()
    assert summary["n_features"] == len(rows)
    assert summary["n_labelled"] == sum(r["status"] == "labelled" for r in rows)
    assert summary["n_labelled"] + sum(summary["reasons"].values()) == len(rows)
    assert summary["n_learned"] == summary["n_used"] == 0
    wanted = {
        "n_features",
        "n_labelled",
        "n_dead",
        "reasons",
        "n_learned",
        "n_used",
        "n_learned_and_used",
        "baselines",
        "concepts",
        "fdr_q",
        "controls",
        "fidelity",
        "format_version",
    }
    assert wanted <= set(summary)
    assert set(next(iter(summary["concepts"].values()))) == {
        "feature",
        "f1",
        "ap",
        "skill",
        "skill_low",
        "skill_high",
        "lift",
        "precision",
        "recall",
        "prevalence",
        "n_entities",
    }
    for name in SCHEMAS:
        assert (labelled / f"{name}.parquet").is_file()


def test_without_model_and_twin_nothing_is_called_learned_or_used(labelled):
    rows = read_table(labelled, "features").to_pylist()
    assert all(r["learned"] is None and r["used"] is None for r in rows)
    assert any("not assessed" in r["description"] for r in rows)


def test_negative_controls_are_not_labelled(labelled):
    assert read_summary(labelled)["controls"] == {"hash": 0, "persistent": 0, "permuted": 0}


def test_a_store_without_rows_to_confirm_on_is_refused(inputs, tmp_path):
    few = SOURCE.model_copy(update={"entities": 3})
    harvest(SyntheticSource(few), tmp_path / "few.zarr", HarvestConfig(), seed=0, world=World.single("cpu"))
    empty = [
        s for s in ("discover", "confirm") if s not in ActivationStore.open(tmp_path / "few.zarr").splits
    ]
    assert empty
    with pytest.raises(StoreError, match=f"no rows of split {' or '.join(empty)}"):
        label_dictionary(replace(inputs, store=tmp_path / "few.zarr"), CONFIG, tmp_path / "labels", seed=0)


def test_who_was_erased_from_one_of_two_stores_is_to_be_erased_from_the_other(inputs, tmp_path):
    twin = Path(shutil.copytree(inputs.store, tmp_path / "twin.zarr"))
    store = ActivationStore.open(twin)
    names = dict(zip(*(store.entity_ids()[c].to_pylist() for c in ("entity", "id")), strict=True))
    erase(twin, [names[store.entity_codes("discover")[0]]])
    with pytest.raises(StoreError, match=f"`assay erase {inputs.store} --entities FILE`"):
        label_dictionary(
            replace(inputs, twin_store=twin, twin_sae=inputs.sae), CONFIG, tmp_path / "labels", seed=0
        )


def test_a_time_cut_holds_for_oracle_activations_too():
    config = SOURCE.model_copy(update={"split": SplitConfig(out_of_time=10)})
    for batch in SyntheticSource(config).batches(World()):
        late = batch.split == SPLITS.index("out_of_time")
        np.testing.assert_array_equal(late, batch.time >= 10)


def test_the_same_seed_gives_the_same_bytes(inputs, labelled, tmp_path):
    label_dictionary(inputs, CONFIG, tmp_path, seed=0)
    for file in sorted(labelled.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_concepts_given_to_other_entities_label_next_to_nothing(inputs, tmp_path):
    path, infos = inputs.tables[0]
    table = pq.read_table(path)
    entity, time = (table[n].to_numpy() for n in ("entity", "time"))
    donor = np.random.default_rng(0).permutation(SOURCE.entities)
    key = {(e, t): i for i, (e, t) in enumerate(zip(entity, time, strict=True))}
    source = np.array([key[donor[e], t] for e, t in zip(entity, time, strict=True)])
    columns = {n: table[n].take(pa.array(source)) for n in table.column_names if n not in ("entity", "time")}
    pq.write_table(pa.table({"entity": entity, "time": time, **columns}), tmp_path / "values.parquet")
    moved = LabelInputs(inputs.store, inputs.sae, inputs.hook, [(tmp_path / "values.parquet", infos)])
    (tmp_path / "out").mkdir()
    summary = label_dictionary(moved, CONFIG, tmp_path / "out", seed=0)
    assert summary["n_labelled"] <= 0.01 * summary["n_features"]


def test_confirm_rows_do_not_choose_anything(inputs, labelled, tmp_path):
    """With confirm's concepts replaced by noise, thresholds, targets and candidates stay what they were."""
    path, infos = inputs.tables[0]
    table = pq.read_table(path)
    store = ActivationStore.open(inputs.store)
    confirm = np.unique(store.coordinates("confirm")[0])
    there = np.isin(table["entity"].to_numpy(), confirm)
    rng = np.random.default_rng(0)
    columns = {}
    for name in table.column_names[2:]:
        values = table[name].to_numpy(zero_copy_only=False).copy()
        values[there] = rng.random(there.sum()) < 0.5
        columns[name] = values
    pq.write_table(
        pa.table({"entity": table["entity"], "time": table["time"], **columns}), tmp_path / "values.parquet"
    )
    (tmp_path / "out").mkdir()
    noisy = LabelInputs(inputs.store, inputs.sae, inputs.hook, [(tmp_path / "values.parquet", infos)])
    summary = label_dictionary(noisy, CONFIG, tmp_path / "out", seed=0)
    keys = ["feature", "concept", "threshold", "auroc_discover", "skill_discover", "f1_discover", "rank"]

    def chosen(folder):
        rows = read_table(folder, "associations").select([*keys, "family"]).to_pylist()
        return [r for r in rows if r["family"] == "concept"]

    assert chosen(tmp_path / "out") == chosen(labelled)
    assert summary["n_labelled"] == 0
    assert summary["reasons"]["not_confirmed"] >= 30


def test_a_feature_that_is_a_clock_says_so(inputs, tmp_path):
    """A concept that holds late in the history is found by a clock just as well."""
    path, _ = inputs.tables[0]
    table = pq.read_table(path, columns=["entity", "time"])
    store = ActivationStore.open(inputs.store)
    late = table["time"].to_numpy() >= 8
    flip = np.random.default_rng(1).random(len(late)) < 0.02
    pq.write_table(table.append_column("late", pa.array(late ^ flip)), tmp_path / "values.parquet")
    clock = tmp_path / "clock.zarr"
    from activations_cache.schema import StoreLayout
    from activations_cache.seal import seal
    from activations_cache.writer import StoreWriter

    x = np.zeros((len(late), D), dtype=np.float32)
    x[:, 0] = late * 2.0
    split = np.empty(len(late), dtype=object)
    owners = {s: set(np.unique(store.coordinates(s)[0]).tolist()) for s in ("fit", "discover", "confirm")}
    entity = table["entity"].to_numpy()
    for s, members in owners.items():
        split[np.isin(entity, list(members))] = s
    with StoreWriter(clock, hooks={"oracle": D}, layout=StoreLayout(), seed=0, provenance={}) as writer:
        time = table["time"].to_numpy()
        writer.append(
            {"oracle": x}, entity=entity, position=time, time=time, split=split.astype(str), cursor=1
        )
    seal(clock, entities=store.entity_ids())
    dictionary = BatchTopKConfig(d_sae=2, k=1).build(D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(2, D))
        dictionary.W_enc.copy_(torch.eye(2, D))
        dictionary.b_enc.zero_()
        dictionary.b_dec.zero_()
        dictionary.threshold.fill_(0.5)
    save_sae(fold(dictionary, torch.zeros(D), 1.0), tmp_path / "sae", {})
    info = ConceptInfo(id="late", text="Late in the window", kind="point", type="bool")
    out = tmp_path / "out"
    out.mkdir()
    label_dictionary(
        LabelInputs(clock, tmp_path / "sae", "oracle", [(tmp_path / "values.parquet", [info])]),
        CONFIG,
        out,
        seed=0,
    )
    assert read_table(out, "features").to_pylist()[0]["reason"] == "clock"
    assert json.loads((out / "summary.json").read_text())["reasons"]["clock"] == 1
