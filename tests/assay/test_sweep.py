"""A sweep as a user runs it: every dictionary with its evaluation, a table, a drawing, and clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.assay.test_run import assay
from tests.distributed.pool import free_port
from tests.train.runs import plant

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name: swept
out: {folder}/run
source: {{kind: tensors, path: {folder}/x.npy}}
harvest: {{}}
sae: {{kind: topk, d_sae: 32, k: 3}}
train: {{rows: 6400, batch_size: 128, checkpoint_every: 20, log_every: 10}}
evaluate: {{}}
sweep: {{sae.k: [1, 3], seed: [0, 1]}}
"""
NAMES = [
    "activations-topk-32-3-0",
    "activations-topk-32-1-0",
    "activations-topk-32-1-1",
    "activations-topk-32-3-1",
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    np.save(folder / "x.npy", plant(5000, d_in=16, features=24, l0=2).x.numpy())
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    done = assay("run", folder / "config.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.xdist_group("sweep")
def test_every_member_lands_with_its_evaluation_and_the_table_says_what_they_say(swept):
    folder, text = swept
    sae = folder / "run" / "sae"
    assert sorted(p.name for p in sae.iterdir()) == sorted([*NAMES, "sweep.json", "sweep.svg"])
    table = json.loads((sae / "sweep.json").read_text())
    assert table["split"] == "confirm"
    assert {row["name"] for row in table["members"]} == set(NAMES)
    for row in table["members"]:
        found = json.loads((sae / row["name"] / "evaluation.json").read_text())["confirm"]
        assert {name: row[name] for name in ("fvu", "l0", "dead")} == {
            n: found[n] for n in ("fvu", "l0", "dead")
        }
        assert row["l0"] == pytest.approx(int(row["name"].split("-")[3]), rel=0.1)
        assert row["name"] in text
    shown = text.partition("Dictionaries from one read")[2]
    assert shown.index(NAMES[1]) < shown.index(NAMES[0])
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["stages"]["train"]["output"] == f"sae/{NAMES[0]}"


@pytest.mark.xdist_group("sweep")
def test_what_is_gone_of_any_member_is_made_again(swept, command):
    folder, _ = swept
    (folder / "run" / "sae" / NAMES[0] / "evaluation.json").unlink()
    code, said, error = command("run", folder / "config.yaml", cwd=folder)
    assert code == 0, error
    assert "train is fresh" in said and "evaluate again, because its output is gone" in said
    shutil.rmtree(folder / "run" / "sae" / NAMES[2])
    code, said, error = command("run", folder / "config.yaml", cwd=folder)
    assert code == 0, error
    assert "train again, because its output is gone" in said
    assert all((folder / "run" / "sae" / name / "evaluation.json").is_file() for name in NAMES)


@pytest.mark.xdist_group("sweep")
def test_again_it_is_fresh_and_a_changed_member_trains_again(swept, command):
    folder, _ = swept
    code, said, error = command("run", folder / "config.yaml", cwd=folder)
    assert code == 0, error
    assert said.count("is fresh") == 3, said
    code, said, error = command("train", folder / "config.yaml", "sweep={train.lr: [1.0e-3]}", cwd=folder)
    assert code == 0, error
    assert "train again, because sweep." in said
    assert (folder / "run" / "sae" / f"{NAMES[0]}-lr-0.001" / "weights.safetensors").is_file()


@pytest.mark.xdist_group("sweep")
@pytest.mark.dist
def test_two_processes_train_all_members_too(swept, tmp_path):
    folder, _ = swept
    # the same store: two processes would harvest another order of rows
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "sae")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--no-python"]
    command += [
        sys.executable,
        "-c",
        "from assay.cli import main; main()",
        "run",
        str(folder / "config.yaml"),
        f"out={tmp_path / 'run'}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    rows = json.loads((tmp_path / "run" / "sae" / "sweep.json").read_text())["members"]
    alone = {r["name"]: r for r in json.loads((folder / "run" / "sae" / "sweep.json").read_text())["members"]}
    assert {row["name"] for row in rows} == set(NAMES)
    for row in rows:
        assert row["fvu"] == pytest.approx(alone[row["name"]]["fvu"], rel=1e-3)


@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_folder_that_no_run_wrote_is_left_alone_whichever_member_is_called_so(
    swept, command, tmp_path, name
):
    folder, _ = swept
    theirs = tmp_path / "run" / "sae" / name / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    shutil.copytree(folder / "run" / "activations.zarr", tmp_path / "run" / "activations.zarr")
    record = json.loads((folder / "run" / "run.json").read_text())
    record["stages"] = {"harvest": record["stages"]["harvest"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    code, _, error = command("train", folder / "config.yaml", f"out={tmp_path / 'run'}", cwd=folder)
    assert code == 2 and "is there already, and no run wrote it" in error and name in error
    assert theirs.read_text() == "precious"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep=[{sae.k: 64}]", "sweep, member 1: this training cannot be planned"),
        (
            "sweep={train.rows: [1, 2]}",
            "train.rows cannot differ between dictionaries that share their batches",
        ),
        ("sweep={sae.kk: [1]}", "kk: unknown key; did you mean 'k'?"),
        ("sweep=3", "sweep"),
        ("evaluate=null", "section sweep needs evaluate"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_code_2(override, message, tmp_path, command):
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    code, _, said = command("train", tmp_path / "config.yaml", override, cwd=tmp_path)
    assert code == 2
    assert message in " ".join(said.split())
