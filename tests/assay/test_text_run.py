"""A run over text and a model of somebody else's, as a new user meets it: what is said, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contracts.source_models import WORDS, save_model

CONFIG = """
name: words
out: {folder}/run
device: cpu
source: {{kind: text, path: "{folder}/texts/*.txt", length: 32}}
model: {{kind: pretrained, path: {folder}/bert}}
harvest: {{hooks: [encoder.layer.1, encoder.layer.2]}}
sae: {{kind: topk, d_sae: auto, k: auto}}
train: {{hook: encoder.layer.2, rows: 2000, batch_size: 64}}
evaluate: {{}}
"""


@pytest.fixture
def words(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS, 60)))
    save_model("bert", tmp_path / "bert")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


@pytest.mark.xdist_group("text run")
def test_a_run_says_what_it_found_and_what_it_did_not_measure(words, command):
    code, said, error = command("run", words / "config.yaml", cwd=words)
    assert code == 0, error
    said = " ".join(said.split())
    assert "what is usual is taken where none is given, d_sae 128 and k 2" in said, (
        "an untrained model's rows take half of the dimensions"
    )
    assert "not what the model's predictions lose by it: model.architecture=AutoModel predicts no" in said
    assert "confirm: FVU 0." in said and "FVU at that L0 of neurons 0." in said
    assert said.endswith(f"assay export {words / 'run'} --format saelens")

    code, _, error = command("export", words / "run", cwd=words)
    assert code == 2 and "no labels" in error and "--format saelens" in error
    code, _, error = command("report", words / "run", cwd=words)
    assert code == 2 and "no labels" in error and "Traceback" not in error
    assert command("export", words / "run", "--format", "saelens", cwd=words)[0] == 0

    code, said, _ = command("train", words / "config.yaml", "train.rows=1000", cwd=words)
    assert code == 0 and "\ntrain " in said and "\nevaluate " not in said, (
        "it is gone with the dictionary it measured"
    )

    code, said, _ = command("inspect", words / "run" / "activations.zarr", cwd=words)
    data = next(line for line in said.splitlines() if line.startswith("  data: "))
    assert code == 0 and data.endswith("and 11 more, in zarr.json")
    assert data.count("file ") == 20, "30 texts and the model's folder"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["harvest.hooks=encoder.layer.1"], "harvest.hooks: should be a list, such as [encoder.layer.1]"),
        (["harvest.hooks=[encoder.layers.1]"], "such as encoder.layer.1,"),
        (["source.path={folder}/texts"], "give a glob, such as {folder}/texts/*.txt"),
        (["train.hook=encoder.layer.0"], "train.hook=encoder.layer.0"),
        (["model.architecture=AutoModelForCausalLM"], "would be random"),
        (["model.path=hub/name"], "nothing is downloaded"),
    ],
)
def test_a_new_users_mistakes_are_one_message_before_anything_is_harvested(words, command, arguments, says):
    filled = [text.format(folder=words) for text in arguments]
    code, _, error = command("harvest", words / "config.yaml", *filled, cwd=words)
    assert code == 2 and error.count("assay: ") == 1 and "Traceback" not in error
    assert says.format(folder=words) in error
    assert not (words / "run" / "activations.zarr").exists()
