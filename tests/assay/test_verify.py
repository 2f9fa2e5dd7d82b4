"""A run of ready-made tensors, with brackets in its names: what is printed of it, handed on, and found damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activations_cache.erase import erase as erase_one
from activations_cache.panel import PanelConfig
from activations_cache.prepare import prepare
from activations_cache.store import ActivationStore
from assay.console import Console
from assay.freshness import run_lock
from tests.assay.test_run import assay

CONFIG = """
name: cards [v2]
out: "{folder}/run [v2]"
device: cpu
source: {{kind: tensors, path: x.npy, coordinates: {{path: rows.parquet}}}}
harvest: {{}}
sae: {{kind: topk, d_sae: 8, k: 2}}
train: {{rows: 4096, batch_size: 256}}
evaluate: {{}}
concepts: {{tables: [{{path: rows.parquet, entity: entity, time: time, only: [first, second]}}]}}
label: {{n_bootstrap: 50, n_permutations: 10}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tensors")
    rng = np.random.default_rng(0)
    on = rng.random((2400, 4)) < 0.2
    np.save(folder / "x.npy", (on * rng.gamma(4, 1, on.shape)).astype(np.float32))
    who = {"entity": np.repeat(np.arange(200), 12), "time": np.tile(np.arange(12), 200)}
    pq.write_table(pa.table(who | {"first": on[:, 0], "second": on[:, 1]}), folder / "rows.parquet")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    done = assay("run", folder / "config.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run [v2]", done.stdout


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """The run with a bundle, and with a twin as a model of the run's own would have it."""
    copy = shutil.copytree(finished[0], tmp_path / "run [v2]")
    for part in ("activations.zarr", "sae"):
        shutil.copytree(copy / part, copy / "twin" / part)
    return copy


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_names_and_paths_are_printed_as_they_are(finished, command, tmp_path):
    run, shown = finished
    flat = "".join(shown.split())
    for part in ("activations.zarr", "labels", "report"):
        # when it was done, and where everything lies
        assert flat.count(f"{run / part}".replace(" ", "")) >= 2, part
    assert f"Done: {run}. Next: open {run}/report/index.html; assay export {run}" in shown
    code, shown, error = command("inspect", run, cwd=run.parent)
    assert code == 0 and "cards [v2], versions" in shown, error
    assert (
        f"{run / 'activations.zarr'}: complete"
        in command("inspect", run / "activations.zarr", cwd=tmp_path)[1]
    )
    out = tmp_path / "out [v2]"
    assert f"dictionary in {out}; " in command("export", run, "--out", out, cwd=tmp_path)[1]
    assert f"pages in {out}2; " in command("report", run, "--out", f"{out}2", cwd=tmp_path)[1]
    (tmp_path / "gone.csv").write_text("entity\n0\n")
    store = shutil.copytree(run / "activations.zarr", out / "activations.zarr")
    code, shown, error = command("erase", store, "--entities", tmp_path / "gone.csv", cwd=tmp_path)
    assert code == 0 and f"`assay inspect {store} --verify`" in shown, error


def test_who_is_erased_from_a_run_is_erased_from_its_twin_too(run, command):
    (run.parent / "ids.txt").write_text("0\n7\nnobody\n")
    erase = ("erase", run / "activations.zarr", "--entities", run.parent / "ids.txt")
    code, shown, error = command(*erase, cwd=run.parent)
    assert code == 0, error
    for store in (run / "activations.zarr", run / "twin" / "activations.zarr"):
        assert f"{store}: 2 of 3 entities erased: 24 rows" in shown
        assert not {"0", "7"} & set(ActivationStore.open(store).entity_ids()["id"].to_pylist())
    assert f"Still about them in {run}:" in shown and "  labels: ids and values" in shown
    assert "  panel: " not in shown, "there is none"
    code, _, error = command(*erase, cwd=run.parent)
    assert code == 2 and "none of the 3 ids" in error


def test_an_erasure_that_reached_one_of_two_stores_is_completed_by_the_same_command(run, command):
    (run.parent / "ids.txt").write_text("0\n")
    erase_one(run / "activations.zarr", ["0"])
    code, shown, error = command(
        "erase", run / "activations.zarr", "--entities", run.parent / "ids.txt", cwd=run.parent
    )
    assert code == 0 and f"{run / 'twin' / 'activations.zarr'}: 1 of 1 entities erased" in shown, error


@pytest.mark.parametrize("damage", ["harvest not ended", "cut short", "in use"])
def test_an_erasure_is_not_kept_from_the_store_by_its_twin(run, command, damage):
    (run.parent / "ids.txt").write_text("0\n")
    store, twin = run / "activations.zarr", run / "twin" / "activations.zarr"
    erase = ("erase", store, "--entities", run.parent / "ids.txt")
    if damage == "in use":
        with run_lock(run):
            code, _, error = command(*erase, cwd=run.parent)
        assert code == 2 and "another process works in" in error
        assert "0" in ActivationStore.open(store).entity_ids()["id"].to_pylist()
        return
    if damage == "harvest not ended":
        opened = ActivationStore.open(twin)
        replace(opened.description, sealed=False).write(opened.path)
    else:
        (twin / "manifest.json").write_text("{")
    code, shown, error = command(*erase, cwd=run.parent)
    assert "0" not in ActivationStore.open(store).entity_ids()["id"].to_pylist()
    if damage == "cut short":
        assert code == 2 and "1 of 1 entities erased" in error and "but not from the twin beside it" in error
    else:
        assert code == 0 and f"{twin}: removed, since its harvest had not ended" in shown, error
        assert not twin.exists()


def test_pages_of_earlier_labels_are_not_pointed_to(finished, run, command):
    folder = finished[0].parent
    again = ("label", folder / "config.yaml", f"out={run}", "label.min_skill=0.4")
    code, shown, error = command(*again, cwd=folder)
    assert code == 0 and "label again, because label.min_skill" in shown, error
    for said in (shown, command("inspect", run, cwd=folder)[1]):
        assert f"Next: assay report {run} (the pages in {run / 'report'} are of earlier labels" in said
    assert command("report", run, cwd=folder)[0] == 0
    assert f"Next: open {run / 'report' / 'index.html'}; " in command("inspect", run, cwd=folder)[1]


def test_why_a_stage_runs_again_is_printed_as_it_is(capsys):
    Console().started("label", "again, because concepts.paths [red] -> [blue]")
    assert "concepts.paths [red] -> [blue]" in capsys.readouterr().out


def test_tensors_have_a_bundle_though_the_run_has_no_model(run, command):
    code, _, error = command("export", run, cwd=run.parent)
    assert code == 0, error
    provenance = json.loads((run / "dictionary" / "dictionary.json").read_text())["provenance"]
    assert provenance["model"] == {"kind": None, "weights": None}


def test_whatever_is_damaged_is_named(run, command):
    assert command("export", run, cwd=run.parent)[0] == 0
    code, shown, error = command("inspect", run, "--verify", cwd=run.parent)
    assert code == 0, error
    weights = next(run.glob("sae/*/weights.safetensors")).relative_to(run)
    parts = ["activations.zarr", "twin/activations.zarr", f"{weights.parent}", f"twin/{weights.parent}"]
    assert [line for line in shown.splitlines() if line.endswith(": no damage")] == [
        f"  {part}: no damage" for part in (*parts[::2], *parts[1::2], "labels", "dictionary")
    ]
    chunk = max(
        (run / "twin" / "activations.zarr").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    for path in (run / weights, run / "twin" / weights, run / "dictionary" / "card.md", chunk):
        flip(path)
    (run / "labels" / "effects.parquet").unlink()
    features = run / "labels" / "features.parquet"
    features.write_bytes(features.read_bytes()[:500])
    code, shown, error = command("inspect", run, "--verify", cwd=run.parent)
    assert code == 2 and "Traceback" not in error
    assert "  activations.zarr: no damage" in shown
    for path in (run / weights, run / "twin" / weights, run / "labels" / "effects.parquet", features):
        assert str(path) in error
    assert f"{run / 'twin' / 'activations.zarr'} is damaged" in error and "card.md was changed" in error


def test_parts_of_a_run_are_verified_too(run, command):
    (run / "sae" / "notes").mkdir()
    assert command("inspect", run, "--verify", cwd=run.parent)[0] == 0
    dictionary = next(run.glob("sae/*/weights.safetensors")).parent
    assert "every checksum is right" in command("inspect", dictionary, "--verify", cwd=run.parent)[1]
    assert "every table can be read" in command("inspect", run / "labels", "--verify", cwd=run.parent)[1]
    (run / "labels" / "groups.parquet").unlink()
    assert command("inspect", run / "labels", cwd=run.parent)[0] == 0
    code, _, error = command("inspect", run / "labels", "--verify", cwd=run.parent)
    assert code == 2 and "groups.parquet" in error


def test_a_panel_is_verified_as_far_as_it_can_be(command, tmp_path):
    rows = {"client": np.repeat(np.arange(40), 3), "t": np.tile(np.arange(3), 40), "bal": np.ones(120)}
    pq.write_table(pa.table(rows), tmp_path / "book.parquet")
    given = PanelConfig(
        path=str(tmp_path / "book.parquet"), entity="client", time="t", columns={"bal": "bal"}
    )
    prepare(given, tmp_path / "panel")
    assert "every table can be read" in command("inspect", tmp_path / "panel", "--verify", cwd=tmp_path)[1]
    entities = tmp_path / "panel" / "entities.parquet"
    entities.write_bytes(entities.read_bytes()[:300])
    code, _, error = command("inspect", tmp_path / "panel", "--verify", cwd=tmp_path)
    assert code == 2 and str(entities) in error
    for damage in ("", "null", '{"format'):
        (tmp_path / "panel" / "profile.json").write_text(damage)
        code, _, error = command("inspect", tmp_path / "panel", "--verify", cwd=tmp_path)
        assert code == 2 and "profile.json is damaged" in error


@pytest.mark.parametrize(
    ("command_", "table"), [("report", "effects"), ("inspect", "features"), ("export", "groups")]
)
def test_a_table_that_cannot_be_read_is_one_message(run, command, command_, table):
    path = run / "labels" / f"{table}.parquet"
    path.write_bytes(path.read_bytes()[:300])
    code, _, error = command(command_, run, cwd=run.parent)
    assert code == 2 and str(path) in error and "Traceback" not in error
