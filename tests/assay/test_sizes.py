"""`sae.d_sae: auto` and `sae.k: auto` as a user writes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from activations_cache.loader import LoaderConfig
from assay.config import RunConfig
from sae.config import load_config
from sae.errors import ConfigError
from sae.sizing import suggest_sizes
from tests.assay.test_run import assay
from tests.distributed.pool import free_port
from tests.train.runs import plant
from tests.train.test_train_sae import HOOK, write
from train.sizes import measure_sizes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name: sized
out: {folder}/run
source: {{kind: tensors, path: {folder}/x.npy}}
harvest: {{}}
sae: {{kind: topk, d_sae: auto, k: auto}}
train: {{rows: 6400, batch_size: 128, checkpoint_every: 10, log_every: 10}}
"""
NAME = "activations-topk-128-3-0"


def write_config(folder: Path) -> Path:
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sized")
    np.save(folder / "x.npy", plant(8000, d_in=32, features=80, l0=3).x.numpy())
    done = assay("run", write_config(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def weights(run: Path) -> bytes:
    return (run / "sae" / NAME / "weights.safetensors").read_bytes()


@pytest.mark.xdist_group("sizes")
def test_everything_after_the_harvest_has_the_numbers(sized):
    folder, said = sized
    found = json.loads((folder / "run" / "size.json").read_text())
    assert (found["d_sae"], found["k"]) == (128, 3)
    assert "they support d_sae 128 and k 3" in said
    record = json.loads((folder / "run" / "run.json").read_text())
    header = json.loads((folder / "run" / "sae" / NAME / "config.json").read_text())
    for sae in (record["config"]["sae"], record["stages"]["train"]["inputs"]["sae"], header["sae"]):
        assert (sae["d_sae"], sae["k"]) == (128, 3)


@pytest.mark.xdist_group("sizes")
def test_the_same_numbers_given_train_nothing_anew_and_others_are_commented_on(sized, command):
    folder, said = sized
    assert "they support about" not in said
    code, said, error = command("run", folder / "config.yaml", "sae.d_sae=128", "sae.k=3", cwd=folder)
    assert code == 0, error
    assert said.count("is fresh") == 2, said
    wide = ("train", folder / "config.yaml", "sae.d_sae=512", f"out={folder / 'wide'}")
    code, said, error = command(*wide, cwd=folder)
    assert code == 0, error
    assert "they support about sae.d_sae=128 and sae.k=3, which `auto` takes, not 512 and 3" in said
    assert (folder / "wide" / "sae" / "activations-topk-512-3-0").is_dir(), "what was given was changed"
    assert command("run", folder / "config.yaml", cwd=folder)[0] == 0


@pytest.mark.xdist_group("sizes")
def test_settled_again_they_are_the_same(sized, command, tmp_path):
    folder, _ = sized
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "size.json").unlink()
    shutil.rmtree(tmp_path / "run" / "sae" / NAME)
    code, _, error = command("run", folder / "config.yaml", f"out={tmp_path / 'run'}", cwd=tmp_path)
    assert code == 0, error
    assert weights(tmp_path / "run") == weights(folder / "run")


@pytest.mark.xdist_group("sizes")
def test_an_interrupted_training_continues_with_the_same_numbers(sized, command, tmp_path):
    folder, _ = sized
    shutil.copyfile(folder / "x.npy", tmp_path / "x.npy")
    config = write_config(tmp_path)
    longer = (config, "train.rows=40000", "train.checkpoint_every=20")
    process = subprocess.Popen(
        [sys.executable, "-c", "from assay.cli import main; main()", "run", *map(str, longer)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "run" / ".work" / "train" / "checkpoints"
    for _ in range(600):
        if list(checkpoints.glob("step-*/index.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    code, said, error = command("run", *longer, cwd=tmp_path)
    assert code == 0, error
    assert "size is fresh" in said
    assert "train continues where it stopped" in said and "continuing at step" in said
    assert (tmp_path / "run" / "sae" / NAME).is_dir()


@pytest.mark.xdist_group("sizes")
@pytest.mark.dist
@pytest.mark.parametrize("axis", ["feature", "data"])
def test_all_ranks_have_the_same_numbers(axis, sized, tmp_path):
    folder, _ = sized
    # the same store: two processes would harvest another order of rows
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "sae")
    (tmp_path / "run" / "size.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--no-python"]
    command += [sys.executable, "-c", "from assay.cli import main; main()", "run"]
    command += [str(folder / "config.yaml"), f"out={tmp_path / 'run'}", f"train.mesh.{axis}=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    sizes = [json.loads((run / "size.json").read_text()) for run in (folder / "run", tmp_path / "run")]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "run" / "sae" / NAME).is_dir()


@pytest.mark.xdist_group("sizes")
def test_the_run_can_be_looked_at_and_handed_on(sized, command, tmp_path):
    folder, _ = sized
    code, shown, error = command("inspect", folder / "run", "--verify", cwd=tmp_path)
    assert code == 0 and "size" in shown, error
    out = tmp_path / "exported"
    code, _, error = command("export", folder / "run", "--format", "saelens", "--out", out, cwd=tmp_path)
    assert code == 0 and list(out.rglob("*.safetensors")), error


@pytest.mark.xdist_group("sizes")
def test_the_record_keeps_the_numbers_while_they_are_fresh(sized, command, tmp_path):
    folder, _ = sized
    shutil.copytree(folder / "run", tmp_path / "run")
    place = (folder / "config.yaml", f"out={tmp_path / 'run'}")
    for more, numbers in (("train.rows=6400", (128, 3)), ("seed=1", ("auto", "auto"))):
        code, _, error = command("harvest", *place, more, cwd=tmp_path)
        assert code == 0, error
        sae = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["sae"]
        assert (sae["d_sae"], sae["k"]) == numbers


@pytest.mark.xdist_group("sizes")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 1, "k": 3}', "is damaged"),
        ('{"format_version": 2, "d_sae": 128, "k": 3}', "another version"),
    ],
)
def test_a_damaged_file_is_one_clear_error(text, message, sized, command, tmp_path):
    folder, _ = sized
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "size.json").write_text(text)
    again = ("run", folder / "config.yaml", f"out={tmp_path / 'run'}")
    code, _, error = command(*again, cwd=tmp_path)
    assert code == 2 and message in error and "remove it" in error
    (tmp_path / "run" / "size.json").unlink()
    assert command(*again, cwd=tmp_path)[0] == 0


@pytest.mark.xdist_group("sizes")
def test_a_sweep_that_comes_to_the_dictionary_alone_trains_that(sized, command, tmp_path):
    folder, _ = sized
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "size.json").unlink()
    swept = ("train", folder / "config.yaml", f"out={tmp_path / 'run'}", "evaluate={}", "sweep={sae.k: [3]}")
    code, said, error = command(*swept, cwd=tmp_path)
    assert code == 0, error
    assert "the sweep asks for no other dictionary" in said
    assert weights(tmp_path / "run") == weights(folder / "run")


@pytest.mark.parametrize("rows", [2, 700, 4000])
def test_no_row_of_a_small_split_counts_twice(rows, tmp_path):
    x = plant(rows, d_in=16, features=24, l0=2).x
    fit = x[np.arange(rows) // 10 % 5 < 3]
    store = write(tmp_path / "activations.zarr", x.numpy())
    for window in (0, 256):
        found = measure_sizes(store, HOOK, seed=0, settings=LoaderConfig(window_rows=window))
        expected = suggest_sizes(fit)
        assert found._replace(effective_rank=0) == expected._replace(effective_rank=0)
        assert found.effective_rank == pytest.approx(expected.effective_rank)


@pytest.mark.xdist_group("sizes")
def test_the_planner_looks_at_the_store_or_says_that_it_has_to(sized, command, tmp_path):
    folder, _ = sized
    code, shown, error = command("train", folder / "config.yaml", "--plan", "--gpu", "h200", cwd=folder)
    assert code == 0, error
    assert "50 steps of 128 rows" in shown
    unharvested = ("train", folder / "config.yaml", f"out={tmp_path}", "--plan", "--d-in", "32")
    code, _, said = command(*unharvested, cwd=tmp_path)
    assert code == 2 and "not known before the harvest" in said


@pytest.mark.parametrize(
    ("sae", "settled"),
    [
        ("{d_sae: auto, k: 5}", (64, 5)),
        ("{d_sae: auto, k: 9}", (128, 9)),
        ("{d_sae: auto, k: 100}", (832, 100)),
        ("{kind: matryoshka, d_sae: 128, k: auto, prefixes: [32, 128]}", (128, 7)),
        ("{kind: hierarchical_topk, d_sae: auto, k: 4, budgets: [2, 4]}", (64, 4)),
        ("{d_sae: 1024, k: auto}", (1024, 7)),
        ("{d_sae: 4, k: auto}", (4, 4)),
        ("{kind: matryoshka, d_sae: auto, k: auto, aux_alpha: 0.25}", (64, 7)),
    ],
)
def test_either_number_may_be_left_open(sae, settled, tmp_path):
    config = load_config(RunConfig, write_config(tmp_path), [f"sae={sae}"])
    sized = config.sized(64, 7)
    assert (sized.members[0].sae.d_sae, sized.members[0].sae.k) == settled
    assert "aux_alpha" not in sae or sized.members[0].sae.aux_alpha == 0.25


def test_a_sweep_starts_from_the_settled_numbers(tmp_path):
    overrides = ["evaluate={}", "sweep={sae.k: [2, 7], seed: [0, 1]}"]
    config = load_config(RunConfig, write_config(tmp_path), overrides).sized(64, 7)
    names = [member.name for member in config.members]
    assert names == ["topk-64-7-0", "topk-64-2-0", "topk-64-2-1", "topk-64-7-1"]
    with pytest.raises(ConfigError, match=r"sae\.k = 65 exceeds sae\.d_sae = 64"):
        load_config(RunConfig, write_config(tmp_path), ["evaluate={}", "sweep={sae.k: [65]}"]).sized(64, 7)


def test_members_that_come_to_the_same_are_there_once(tmp_path):
    def names(sweep: str) -> list[str]:
        config = load_config(RunConfig, write_config(tmp_path), ["evaluate={}", f"sweep={sweep}"])
        return [member.name for member in config.sized(64, 7).members]

    assert names("{sae.k: [7]}") == ["topk-64-7-0"]
    assert names("[{sae.k: 2}, {sae.d_sae: 64, sae.k: 2}]") == ["topk-64-7-0", "topk-64-2-0"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sae={d_sae: auto, k: 0}", "1 problem(s) sae.k: Input should be greater than 0"),
        ("sae={d_sae: none, k: auto}", "1 problem(s) sae.d_sae: Input should be a valid integer"),
        ("sae={d_sae: auto}", "1 problem(s) sae.k: missing"),
        (
            "sae={kind: hierarchical_topk, d_sae: 64, k: auto, budgets: [1, 4]}",
            "budgets end at k: give k a number, or leave budgets at auto",
        ),
        (
            "sae={kind: matryoshka, d_sae: auto, k: 4, prefixes: [32, 64]}",
            "prefixes end at d_sae: give d_sae a number, or leave prefixes at auto",
        ),
        ("sae.aux_alfa=1", "aux_alfa: unknown key; did you mean 'aux_alpha'?"),
        ("sae.k=0", "Input should be greater than 0"),
        ("sae.kind=topq", "unknown kind 'topq'"),
        ("sweep={sae.kk: [1]}", "kk: unknown key; did you mean 'k'?"),
        ("sweep={sae.k: [auto, 3]}", "sweep, member 1"),
    ],
)
def test_what_is_wrong_is_said_before_there_are_rows(override, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, write_config(tmp_path), ["evaluate={}", override])
    assert message in " ".join(str(caught.value).split())
