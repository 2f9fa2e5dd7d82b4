"""What makes a stage run again: any of its files, whatever they are called."""

from __future__ import annotations

import numpy as np

from activations_cache.sources.tensors import TensorsSourceConfig

CONFIG = """
name: parts
out: {folder}/run
device: cpu
source: {{kind: tensors, path: "{folder}/*/part-0.npy"}}
harvest: {{}}
sae: {{kind: topk, d_sae: 8, k: 2}}
train: {{rows: 4096, batch_size: 64}}
"""


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
    monkeypatch.setattr(TensorsSourceConfig, "version", 2)
    assert "harvest again, because source version" in " ".join(harvest().split())
