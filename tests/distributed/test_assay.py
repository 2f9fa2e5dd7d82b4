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


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(path, plant(3000, d_in=12, features=24, l0=3).x.numpy())
    return path


@pytest.fixture(scope="module")
def harvested(vectors, tmp_path_factory) -> Path:
    """A run folder with a store, since the order of its rows depends on how many processes wrote it."""
    folder = tmp_path_factory.mktemp("harvested") / "run"
    child = start(command(vectors, folder, stage="harvest"))
    _, error = child.communicate(timeout=240)
    assert child.returncode == 0, error
    return folder


def command(vectors: Path, out: Path, *more: str, processes: int = 1, stage: str = "train") -> list[str]:
    given = [stage, str(ROOT / "configs" / "tensors.yaml"), f"source.path={vectors}", f"out={out}"]
    given += ["sae.kind=batch_topk", "sae.d_sae=48", "sae.k=3", "train.rows=9600", "train.batch_size=32"]
    given += ["train.log_every=10", "train.checkpoint_every=50", "device=cpu", *more]
    if processes == 1:
        return [*ASSAY, *given]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--no-python"]
    return [*launcher, *ASSAY, *given]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def weights(out: Path) -> dict:
    (path,) = out.glob("sae/*/weights.safetensors")
    return load_file(path)


def test_two_processes_train_what_one_does_and_continue_after_sigterm(vectors, harvested, tmp_path):
    short = "train.rows=1600"
    for name, processes, more in (("one", 1, ()), ("two", 2, ("train.mesh.feature=2",))):
        shutil.copytree(harvested, tmp_path / name)
        child = start(command(vectors, tmp_path / name, short, *more, processes=processes))
        out, error = child.communicate(timeout=240)
        assert child.returncode == 0, error
        assert out.count("steps; about") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        difference = (one[name] - two[name]).double().norm() / one[name].double().norm().clamp(min=1e-30)
        assert difference < 1e-5, name

    broken = shutil.copytree(harvested, tmp_path / "broken")
    child = start(command(vectors, broken, "train.mesh.feature=2", processes=2))
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
    child = start(command(vectors, broken))
    out, error = child.communicate(timeout=240)
    assert child.returncode == 0, error
    assert f"continuing at step {max(saved):,}" in out
    (final,) = broken.glob("sae/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in final.read_text().splitlines()]
    assert steps == list(range(10, 301, 10))
