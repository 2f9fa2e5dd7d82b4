"""What the concepts stage makes of ready-made tables."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CONFIG = """
name: tables
out: {folder}/run
device: cpu
source: {{kind: synthetic, d_in: 8, n_directions: 6, entities: 200, rows_per_entity: 5}}
harvest: {{}}
sae: {{kind: topk, d_sae: 8, k: 2}}
train: {{rows: 2048, batch_size: 64}}
concepts:
  tables: [{{path: {folder}/given.parquet, meta: {folder}/meta.yaml, entity: id, time: t, only: ["*_now", "*_later"]}}]
label: {{n_bootstrap: 50, n_permutations: 10}}
"""


def test_a_column_that_looks_ahead_never_makes_a_label(command, tmp_path):
    ids, t = np.repeat([f"E{i:06d}" for i in range(200)], 5), np.tile(np.arange(5), 200)
    chance = np.random.default_rng(0).random((2, 1000)) < 0.3
    table = {"id": ids, "t": t, "late_now": chance[0], "defaults_later": chance[1], "note": ids}
    pq.write_table(pa.table(table), tmp_path / "given.parquet")
    (tmp_path / "meta.yaml").write_text("defaults_later: {text: Defaults within a year, kind: outcome}")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    code, _, error = command("label", tmp_path / "config.yaml", cwd=tmp_path)
    assert code == 0, error
    record = json.loads((tmp_path / "run/concepts/concepts.json").read_text())
    assert [c["id"] for t in record["tables"] for c in t["concepts"]] == ["late_now"]
    assert record["not_applicable"] == [["defaults_later", "it looks ahead, so it never makes a label"]]
    for name in ("features", "associations"):
        assert "defaults_later" not in json.dumps(
            pq.read_table(tmp_path / f"run/labels/{name}.parquet").to_pylist(), default=str
        )
