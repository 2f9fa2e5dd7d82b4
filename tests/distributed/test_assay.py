"""The command under torchrun: the same dictionary as one process trains, and an interruption that is resumed."""

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
from safetensors.torch import load_file

from tests.distributed.pool import free_port
from tests.train.runs import plant

ROOT = Path(__file__).parents[2]
ASSAY = [sys.executable, "-c", "from assay.cli import main; main()"]


@pytest.fixture
def vectors(tmp_path) -> Path:
    path = tmp_path / "x.npy"
    np.save(path, plant(3000, d_in=12, features=24, l0=3).x.numpy())
    return path


@pytest.fixture
def harvested(vectors, command, tmp_path) -> Path:
    """A run folder with a store, since the order of its rows depends on how many processes wrote it."""
    code, _, error = command(*given("harvest", vectors, tmp_path / "run"), cwd=ROOT)
    assert code == 0, error
    return tmp_path / "run"


def given(stage: str, vectors: Path, out: Path, *more: str) -> list[str]:
    words = [stage, str(ROOT / "configs" / "tensors.yaml"), f"source.path={vectors}", f"out={out}"]
    words += ["sae.kind=batch_topk", "sae.d_sae=48", "sae.k=3", "train.rows=9600", "train.batch_size=32"]
    return [*words, "train.log_every=10", "train.checkpoint_every=50", "device=cpu", *more]


def start_two(vectors: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Two processes that share the features."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--no-python"]
    return subprocess.Popen(
        [*launcher, *ASSAY, *given("train", vectors, out, "train.mesh.feature=2", *more)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def weights(out: Path) -> dict:
    (path,) = out.glob("sae/*/weights.safetensors")
    return load_file(path)


def test_two_processes_train_what_one_does_and_continue_after_sigterm(vectors, harvested, command, tmp_path):
    short = "train.rows=1600"
    for name in ("one", "two"):
        shutil.copytree(harvested, tmp_path / name)
    code, out, error = command(*given("train", vectors, tmp_path / "one", short), cwd=ROOT)
    assert code == 0, error
    assert out.count("steps; about") == 1
    child = start_two(vectors, tmp_path / "two", short)
    out, error = child.communicate(timeout=240)
    assert child.returncode == 0, error
    assert out.count("steps; about") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        difference = (one[name] - two[name]).double().norm() / one[name].double().norm().clamp(min=1e-30)
        assert difference < 1e-5, name

    broken = shutil.copytree(harvested, tmp_path / "broken")
    child = start_two(vectors, broken)
    metrics = broken / ".work" / "train" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=120)
    assert child.returncode != 0
    assert "the same command continues" in error
    saved = [int(path.parent.name[5:]) for path in metrics.parent.glob("checkpoints/step-*/index.json")]
    assert saved
    # another mesh takes it up
    code, out, error = command(*given("train", vectors, broken), cwd=ROOT)
    assert code == 0, error
    assert f"continuing at step {max(saved):,}" in out
    (final,) = broken.glob("sae/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in final.read_text().splitlines()]
    assert steps == list(range(10, 301, 10))
