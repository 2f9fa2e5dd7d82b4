"""What docs/models.md shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import activations_cache.reference.shape
import activations_cache.sources  # noqa: F401 - registers the kinds
from activations_cache.models import ModelConfig
from activations_cache.sources.base import SourceConfig
from activations_cache.store import ActivationStore
from assay.config import RunConfig
from sae.config import parse_config

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def blocks(language):
    return re.findall(rf"```{language} ?(\S*)\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_harvests_and_trains(tmp_path):
    for name, content in blocks("python") + [b for b in blocks("yaml") if b[0]]:
        (tmp_path / name).write_text(content)
    rng = np.random.default_rng(0)
    n, months = 300, 8
    table = {
        "account": np.repeat(np.arange(n), months),
        "month": np.tile(np.arange(months), n),
        "balance": rng.standard_normal(n * months),
        "credit_limit": rng.standard_normal(n * months),
    }
    pq.write_table(pa.table(table), tmp_path / "panel.parquet")
    command = [
        sys.executable,
        "-c",
        "from assay.cli import main; main()",
        "run",
        "my_model.yaml",
        "train.rows=4000",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    store = ActivationStore.open(tmp_path / "runs" / "my_model" / "activations.zarr")
    assert store.hooks == {"encoder.layers.0": 16, "encoder.layers.1": 16, "head[0]": 8, "head:in": 16}
    assert sum(store.splits.values()) == n * months
    assert next((tmp_path / "runs" / "my_model" / "sae").glob("encoder.layers.1-topk-*/weights.safetensors"))


@pytest.mark.parametrize("content", [c for name, c in blocks("yaml") if name])
def test_whole_configurations_are_valid(content):
    parse_config(RunConfig, yaml.safe_load(content), where="docs")


@pytest.mark.parametrize("content", [c for name, c in blocks("yaml") if not name])
def test_other_sections_are_valid(content):
    tree = yaml.safe_load(content)
    parse_config(SourceConfig, tree["source"], where="docs")
    parse_config(ModelConfig, tree["model"], where="docs")
