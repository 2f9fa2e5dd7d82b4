"""The command on several processes: what it harvests, and what is left of it when some of them die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from activations_cache.store import ActivationStore
from assay.console import Console
from assay.inspect import inspect

ROOT = Path(__file__).resolve().parents[2]
ENTITIES, LENGTH = 160, 12
N = ENTITIES * LENGTH
CONFIG = """
name: rows
out: {out}
device: cpu
source: {{kind: batches, import: "slow_rows:batches", arguments: {{length: {length}}}}}
model: {{kind: module, import: "slow_rows:build"}}
harvest: {{hooks: ["0"], layout: {{chunk_rows: 16, shard_rows: 64, block_rows: 128,
  retain_until: 2031-12-31, data_licence: for tests}}}}
sae: {{kind: topk, d_sae: 16, k: 2}}
train: {{rows: 4096, batch_size: 64}}
"""
MODULE = """
import os
import time
import numpy as np
import torch
from activations_cache.inputs import ModelInputs

class Rows:
    def __init__(self, length):
        self.length = length
        self.pause = float(os.environ.get("PAUSE", 0))

    def __len__(self):
        return {entities}

    def __getitem__(self, i):
        time.sleep(self.pause)
        position = np.arange(self.length)[None]
        x = torch.from_numpy(np.stack([position * 0 + i, position, position % 3, position % 5], -1)).float()
        entity = np.full_like(position, i)
        return ModelInputs((x,), {{}}, entity, position, position, np.ones_like(position, bool))

def batches(length):
    return Rows(length)

def build():
    return torch.nn.Sequential(torch.nn.Identity())
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_rows", raising=False)
    (tmp_path / "slow_rows.py").write_text(MODULE.format(entities=ENTITIES))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(out=tmp_path / "run", length=LENGTH))
    return path


def start(config: Path, *, processes: int, pause: float = 0) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node N --no-python assay harvest CONFIG`."""
    assay = [sys.executable, "-c", "from assay.cli import main; main()", "harvest", str(config)]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*run, "--no-python", *assay],
        cwd=config.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{config.parent}",
            "OMP_NUM_THREADS": "1",
            "PAUSE": str(pause),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 0, text
    return text


def rows_of(path: Path) -> np.ndarray:
    """Every stored row as (entity, position), checked against what the source gives."""
    store = ActivationStore.open(path)
    assert store.verify() == []
    (hook,) = store.hooks
    parts = [batch for split in store.splits for batch in store.rows(hook, split)]
    entity, position = (np.concatenate([getattr(p, c) for p in parts]) for c in ("entity", "position"))
    want = np.stack([entity, position, position % 3, position % 5], 1)
    np.testing.assert_array_equal(np.concatenate([p.acts for p in parts]), want)
    return np.sort(entity * LENGTH + position)


def workers(parent: int) -> Iterator[int]:
    """Process ids of the children of a process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, fields = path.read_text().rpartition(")")
        except OSError:
            continue
        if int(fields.split()[1]) == parent:
            yield int(number.split()[0])


def wait_for_commits(store: Path, parts: Sequence[int]) -> None:
    """Wait until each of some parts has committed something."""
    until = time.monotonic() + 120
    while not all(list(store.glob(f"w{part:04d}/commits/*.json")) for part in parts):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.dist
def test_four_processes_harvest_what_one_does(config, capsys, command):
    store = config.parent / "run/activations.zarr"
    text = finish(start(config, processes=4))
    assert text.count(f"{N:,} rows of") == 1, "one process speaks"
    assert len(ActivationStore.open(store).groups) == 4
    np.testing.assert_array_equal(rows_of(store), np.arange(N))
    inspect(store, Console(), verify=True)
    said = capsys.readouterr().out
    parts = (
        ": complete",
        f"{N:,} rows, {ENTITIES} entities",
        "weights: ",
        '"assay": ',
        "file slow_rows.py",
        f'"length": {LENGTH}',
        "data licence: for tests",
        "deleted after: 2031-12-31",
        "every checksum is right",
    )
    for part in parts:
        assert part in said
    code, _, error = command("harvest", config, f"out={config.parent / 'one'}", cwd=config.parent)
    assert code == 0, error
    np.testing.assert_array_equal(rows_of(config.parent / "one/activations.zarr"), np.arange(N))
    code, again, error = command("run", config, cwd=config.parent)
    assert code == 0, error
    assert "harvest is fresh" in again and list(config.parent.glob("run/sae/*/weights.safetensors"))


@pytest.mark.dist
@pytest.mark.parametrize("blow", ["interrupt", "kill one"])
def test_what_was_committed_is_there_after(config, blow, command):
    store = config.parent / "run/activations.zarr"
    job = start(config, processes=2, pause=0.03)
    wait_for_commits(store, range(2))
    children = list(workers(job.pid))
    assert len(children) == 2
    if blow == "kill one":
        os.kill(children[0], signal.SIGKILL)
    else:
        # a terminal's ctrl-C reaches everybody, and torchrun passes on its own as well
        for process in (*children, job.pid):
            os.kill(process, signal.SIGINT)
    job.communicate(timeout=60)
    assert job.returncode != 0 and not any(Path(f"/proc/{child}").exists() for child in children)
    before = ActivationStore.open(store, allow_incomplete=True)
    assert not before.complete and before.n_rows > 0
    kept = {path: path.read_bytes() for path in store.glob("w*/commits/*.json")}
    code, _, error = command("harvest", config, cwd=config.parent)
    assert code == 0, error
    assert all(path.read_bytes() == data for path, data in kept.items())
    np.testing.assert_array_equal(rows_of(store), np.arange(N))
