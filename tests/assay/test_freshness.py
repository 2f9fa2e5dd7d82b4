"""What makes a stage run again: any of its files, whatever they are called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activations_cache.models import ModuleConfig, named_files
from activations_cache.sources.tensors import TensorsSourceConfig
from activations_cache.store import ActivationStore
from assay.freshness import changes, run_lock
from sae.errors import UserError

CONFIG = """
name: parts
out: {folder}/run
device: cpu
source: {{kind: tensors, path: "{folder}/*/part-0.npy"}}
harvest: {{}}
sae: {{kind: topk, d_sae: 8, k: 2}}
train: {{rows: 4096, batch_size: 64}}
"""


def test_a_slip_of_the_pen_does_not_cost_the_store_that_is_there(command, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((200, 4), dtype=np.float32))
    config = CONFIG.format(folder=tmp_path).replace("/*/part-0.npy", "/x.npy")
    (tmp_path / "config.yaml").write_text(config)
    harvest = ("harvest", tmp_path / "config.yaml")
    assert command(*harvest, cwd=tmp_path)[0] == 0
    store = tmp_path / "run" / "activations.zarr"
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for wrong, says in (
        (["source.path=no.npy"], "no.npy"),
        (["seed=1", "train.hook=nope"], "train.hook=nope"),
    ):
        code, _, error = command(*harvest, *wrong, cwd=tmp_path)
        assert code == 2 and says in error
        assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    code, said, _ = command(*harvest, cwd=tmp_path)
    assert code == 0 and "harvest is fresh" in said
    assert "assay export" not in said, "there is nothing to export yet"


def test_records_that_do_not_say_what_was_written_are_of_what_they_name(command, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((200, 4), dtype=np.float32))
    (tmp_path / "config.yaml").write_text(
        CONFIG.format(folder=tmp_path).replace("/*/part-0.npy", "/x.npy").replace("4096", "128")
    )
    record = tmp_path / "run" / "run.json"
    for k in (2, 3, 2):
        code, _, error = command("train", tmp_path / "config.yaml", f"sae.k={k}", cwd=tmp_path)
        assert code == 0, error
        data = json.loads(record.read_text())
        if k == 2:
            del data["stages"]["train"]["wrote"]
        record.write_text(json.dumps(data))


def test_what_was_erased_since_makes_everything_after_the_store_anew(command, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((200, 4), dtype=np.float32))
    who = pa.table({"entity": [f"E{i // 2}" for i in range(200)], "time": [i % 2 for i in range(200)]})
    pq.write_table(who, tmp_path / "who.parquet")
    config = CONFIG.format(folder=tmp_path).replace("/*/part-0.npy", "/x.npy")
    (tmp_path / "config.yaml").write_text(config)
    given = ("run", tmp_path / "config.yaml", f"source.coordinates.path={tmp_path / 'who.parquet'}")
    assert command(*given, cwd=tmp_path)[0] == 0
    (tmp_path / "ids.txt").write_text("E3\nE5\n")
    store = tmp_path / "run" / "activations.zarr"
    assert command("erase", store, "--entities", tmp_path / "ids.txt", cwd=tmp_path)[0] == 0
    code, said, error = command(*given, cwd=tmp_path)
    assert code == 0, error
    assert "harvest is fresh" in said and "train again, because harvest, amended" in said
    assert "train is fresh" in command(*given, cwd=tmp_path)[1]


def test_who_was_erased_comes_back_with_no_other_settings(command, tmp_path):
    rng = np.random.default_rng(0)

    def write(people: list[str]) -> None:
        np.save(tmp_path / "x.npy", rng.standard_normal((2 * len(people), 4), dtype=np.float32))
        who = pa.table({"entity": [p for p in people for _ in range(2)], "time": [0, 1] * len(people)})
        pq.write_table(who, tmp_path / "who.parquet")

    people = [f"E{i}" for i in range(100)]
    write(people)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path).replace("/*/part-0.npy", "/x.npy"))
    given = ("harvest", tmp_path / "config.yaml", f"source.coordinates.path={tmp_path / 'who.parquet'}")
    assert command(*given, cwd=tmp_path)[0] == 0
    (tmp_path / "ids.txt").write_text("E3\nE5\n")
    store = tmp_path / "run" / "activations.zarr"
    assert command("erase", store, "--entities", tmp_path / "ids.txt", cwd=tmp_path)[0] == 0
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    half = (*given, "harvest.layout.dtype=float16")
    code, _, error = command(*half, cwd=tmp_path)
    assert code == 2 and "2 erased entities; 2 of the source that the store does not hold" in error
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    # gone from the source as well, nobody can come back
    write([p for p in people if p not in ("E3", "E5")])
    code, _, error = command(*half, cwd=tmp_path)
    assert code == 0, error
    found = ActivationStore.open(store)
    assert found.description.dtype == "float16" and found.n_rows == 196


def test_files_that_come_and_go_are_called_that():
    before, now = {"file a": "1", "file b": "2", "seed": 0}, {"file b": "3", "file c": "4", "seed": 1}
    assert changes(before, now) == ["file a is gone", "file b changed", "file c is new", "seed 0 -> 1"]


def test_every_file_counts_though_they_have_one_name_and_so_does_how_they_are_read(
    command, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    for year in ("2020", "2021"):
        (tmp_path / year).mkdir()
        np.save(tmp_path / year / "part-0.npy", rng.standard_normal((200, 4), dtype=np.float32))
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))

    def harvest() -> str:
        code, said, error = command("harvest", tmp_path / "config.yaml", cwd=tmp_path)
        assert code == 0, error
        return said

    harvest()
    assert "harvest is fresh" in harvest()
    for year, number in (("2020", 1), ("2021", 2)):
        np.save(tmp_path / year / "part-0.npy", rng.standard_normal((200, 4), dtype=np.float32))
        assert f"harvest again, because file part-0.npy {number}" in " ".join(harvest().split())
        assert "harvest is fresh" in harvest()
    # a kind of source that reads otherwise than it did
    monkeypatch.setattr(TensorsSourceConfig, "version", 99)
    assert "harvest again, because source version" in " ".join(harvest().split())


PANEL = """
name: cards
out: {folder}
device: cpu
panel: {{path: "{folder}/{place}/cards.csv", entity: id, time: t, columns: {{bal: bal}}}}
"""


@pytest.mark.parametrize(("place", "says"), [("panel", "no run wrote it"), ("data", None)])
def test_a_run_replaces_nothing_that_it_did_not_write(command, tmp_path, place, says):
    (tmp_path / place).mkdir()
    cards = "id,t,bal\n" + "".join(f"E{i},{t},1\n" for i in range(60) for t in range(3))
    (tmp_path / place / "cards.csv").write_text(cards)
    (tmp_path / "config.yaml").write_text(PANEL.format(folder=tmp_path, place=place))
    code, _, error = command("run", tmp_path / "config.yaml", cwd=tmp_path)
    assert (code == 2 and says in error) if says else (code == 0)
    assert (tmp_path / place / "cards.csv").read_text() == cards
    if says is None:
        # nor what it reads, once the folder is its own
        (tmp_path / "panel" / "cards.csv").write_text(cards)
        (tmp_path / "config.yaml").write_text(PANEL.format(folder=tmp_path, place="panel"))
        code, _, error = command("run", tmp_path / "config.yaml", cwd=tmp_path)
        assert code == 2 and "lies where panel writes" in error
        assert (tmp_path / "panel" / "cards.csv").read_text() == cards


def test_what_arguments_name_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_text("1")
    (tmp_path / "parts").mkdir()
    given = {
        "weights": "w.pt",
        "more": [{"folder": "parts"}, "cpu", 3, None],
        "here": ".",
        "long": "x" * 9000,
    }
    assert named_files(given) == [Path("w.pt"), Path("parts")]
    model = ModuleConfig.model_validate({"import": "torch.nn:Linear", "arguments": given})
    assert Path("w.pt") in model.files()


def test_a_key_that_is_there_twice_is_refused(command, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path) + "harvest: {}\n")
    code, _, error = command("run", tmp_path / "config.yaml", cwd=tmp_path)
    assert code == 2 and "repeated key(s) harvest" in error


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("run.json", "", "is damaged, or no record of a run"),
        ("run.json", "[]", "is damaged, or no record of a run"),
        ("run.json", '{"format_version": 1, "stages": {}}', "no name, config, versions in it"),
        ("summary.json", "{", "is damaged"),
        ("summary.json", "{}", "no summary of labels"),
    ],
)
def test_a_record_that_is_none_of_ours_is_one_message(command, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    code, _, error = command("inspect", tmp_path, cwd=tmp_path)
    assert code == 2 and says in error
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    code, _, error = command("run", tmp_path / "config.yaml", f"out={tmp_path / name}", cwd=tmp_path)
    assert code == 2 and "cannot be a run folder" in error


def test_a_run_folder_that_cannot_be_locked_is_one_message(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be a run folder"), run_lock(tmp_path):
        pytest.fail("it was locked")
