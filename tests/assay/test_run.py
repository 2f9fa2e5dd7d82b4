"""The command as a user runs it: real processes over a small generated panel."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from label.tables import read_table

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name: small
out: {out}
seed: 0
reference: {{entities: 700, months: 12}}
panel:
  entity: entity_id
  time: t
  columns: {{bkt: bkt, bal: bal, lim: lim, pay: pay, income: income, mob: mob}}
  outcome: default_entity
model: {{d_model: 16, n_layers: 2, n_heads: 2, d_ff: 32}}
fit: {{epochs: 2, batch_rows: 512}}
harvest: {{hooks: [layers.0]}}
sae: {{kind: topk, d_sae: 48, k: 4}}
train: {{rows: 40000, batch_size: 256, checkpoint_every: 40}}
evaluate: {{segments: {{bkt: [1, 3]}}}}
concepts:
  paths: [{root}/configs/concepts/credit.yaml]
  tables:
    - {{path: "{{run}}/reference/planted.parquet", entity: entity_id, time: t, only: ["distractor_*", "absent_*"]}}
label: {{n_bootstrap: 60, n_permutations: 10, ablation_entities: 40, n_random: 2, n_matched: 3}}
"""


def assay(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from assay.cli import main; main()", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_config(folder: Path, out: str = "run") -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(out=folder / out, root=ROOT))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("run with a space")
    config = write_config(folder)
    done = assay("run", config, cwd=folder)
    assert done.returncode == 0, done.stderr
    return config, folder / "run", done.stdout


def results(run: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a run went: weights and tables."""
    files = [p for p in run.rglob("*") if p.suffix in (".safetensors", ".parquet") and ".work" not in p.parts]
    files = [p for p in files if "activations.zarr" not in p.parts]
    files += [run / "labels" / "summary.json"]
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(files)}


@pytest.mark.xdist_group("run")
def test_a_run_leaves_every_artefact_and_says_where(finished):
    _, run, text = finished
    for name in (
        "run.json",
        "panel",
        "model",
        "activations.zarr",
        "twin/activations.zarr",
        "labels/summary.json",
        "report/index.html",
    ):
        assert (run / name).exists(), name
    assert "features are labelled, learned and used" in text
    assert str(run / "report" / "index.html") in text
    assert not list(run.rglob("*.part"))
    summary = json.loads((run / "labels" / "summary.json").read_text())
    assert summary["fidelity"]["auc_model"] is not None
    assert set(summary["baselines"]) == {"raw_column", "twin"}
    fidelity = json.loads(next(run.glob("sae/*/evaluation.json")).read_text())["fidelity"]
    assert sum(part["rows"] for part in fidelity["segments"]["bkt"]) == fidelity["entities"]


@pytest.mark.xdist_group("run")
def test_a_second_run_skips_everything(finished, command):
    config, run, _ = finished
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in ("run.json", ".lock")
    }
    code, shown, error = command("run", config, cwd=run.parent)
    assert code == 0, error
    assert shown.count("is fresh") == 12
    after = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in ("run.json", ".lock")
    }
    assert before == after


@pytest.mark.xdist_group("run")
def test_a_changed_setting_reruns_what_reads_it_and_says_why(finished, command):
    config, run, _ = finished
    code, shown, error = command("run", config, "label.min_skill=0.3", cwd=run.parent)
    assert code == 0, error
    assert "again, because label.min_skill 0.25 -> 0.3" in shown
    assert shown.count("is fresh") == 10
    assert command("run", config, cwd=run.parent)[0] == 0


@pytest.mark.xdist_group("run")
def test_interrupted_anywhere_and_run_again_the_result_is_the_same(finished, tmp_path):
    _, run, _ = finished
    config = write_config(tmp_path)
    delays = [4.0, 6.0, 8.0, 10.0]
    codes = []
    for delay, number in zip(
        delays, [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGINT], strict=True
    ):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", "from assay.cli import main; main()", "run", str(config)],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
            time.sleep(delay)
            process.send_signal(number)
            codes.append(process.wait(timeout=60))
        assert codes[-1] in (0, 130, 143, -9), (delay, codes, (tmp_path / "log").read_text())
    assert any(code != 0 for code in codes), "every run ended before its signal: shorten the delays"
    done = assay("run", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == results(run)


# DuckDB looks for signals itself now and then (when, no test can choose), and calls Python for what it reads
TAKEN = """
import os, signal, sys
from pathlib import Path
import pyarrow as pa
import assay.cli as cli
from activations_cache import sql

taken, signalled = sys.argv[1], sys.argv[2] == "True"

class Source:
    schema = pa.schema([("x", pa.float64())])
    def __arrow_c_schema__(self):
        return self.read("schema").schema.__arrow_c_schema__()
    def __arrow_c_stream__(self, requested_schema=None):
        return self.read("stream").__arrow_c_stream__(requested_schema)
    def read(self, what):
        if what == taken:
            if not signalled:
                raise ValueError("no such rows")
            os.kill(os.getpid(), signal.SIGTERM)
        return pa.table({"x": [1.0]})

def query(_):
    if taken != "query":
        connection = sql.connect(threads=1, memory_limit="100MB")
        sql._dataset = lambda *_, **__: Source()
        sql.load_table(connection, "raw", [Path(__file__)])
        connection.execute("SELECT sum(x) FROM raw").fetchall()
        return
    try:
        os.kill(os.getpid(), signal.SIGTERM) if signalled else None
    except KeyboardInterrupt:
        pass
    raise RuntimeError("Query interrupted")

cli._inspect = query
cli.main(["inspect", "."])
"""


@pytest.mark.parametrize(
    ("taken", "signalled", "code"),
    [
        ("query", True, 143),
        ("query", False, 1),
        ("schema", True, 143),
        ("schema", False, 2),
        ("stream", True, 143),
        ("stream", False, 1),
    ],
)
def test_a_signal_that_duckdb_took_is_an_interruption(tmp_path, taken, signalled, code):
    program = tmp_path / "x.parquet"
    program.write_text(TAKEN)
    done = subprocess.run(
        [sys.executable, str(program), taken, str(signalled)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.mark.xdist_group("run")
def test_labels_are_not_handed_on_with_another_dictionary(finished, command, tmp_path, monkeypatch):
    config, run, _ = finished
    other = tmp_path / "run"
    shutil.copytree(run, other)
    changed = (config, f"out={other}", "sae.k=3")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("assay.steps.labels.label_dictionary", interrupt)
        # interrupted, the labels are the former ones still, and may be handed on with their dictionary only
        assert command("label", config, f"out={other}", "label.min_f1=0.9", cwd=tmp_path)[0] == 130
        code, _, error = command("export", other, "--out", tmp_path / "bundle", cwd=tmp_path)
        assert code == 0, error
        bundle = json.loads((tmp_path / "bundle" / "dictionary.json").read_text())
        assert bundle["label_rule"]["min_f1"] == bundle["provenance"]["config"]["label"]["min_f1"] != 0.9
        for stage, ends in (("train", 0), ("label", 130)):
            code, _, error = command(stage, *changed, cwd=tmp_path)
            assert code == ends, error
            for arguments in (("export", other), ("report", other)):
                code, _, error = command(*arguments, cwd=tmp_path)
                assert code == 2 and "are not of its present dictionary, layers.0-topk-48-3-0" in error
            assert "are not of its present dictionary" in command("inspect", other, cwd=tmp_path)[1]
    assert not (other / "dictionary").exists()
    assert command("export", other, "--format", "saelens", cwd=tmp_path)[0] == 0


@pytest.mark.xdist_group("run")
def test_files_of_which_no_concept_applies_are_said_to_be_so_and_tables_still_count(
    finished, command, tmp_path
):
    config, run, _ = finished
    other = tmp_path / "run"
    shutil.copytree(run, other)
    cards = "version: 1\nproducts: [other]\ncolumns: {bal: b}\n"
    (tmp_path / "cards.yaml").write_text(
        cards + "concepts: [{id: owes, text: O, expr: bal > 0, kind: point}]"
    )
    again = ("run", config, f"out={other}", f"concepts.paths=[{tmp_path / 'cards.yaml'}]")
    code, _, error = command(*again, "concepts.tables=[]", cwd=tmp_path)
    assert code == 2 and "no concept applies to this panel" in error
    code, _, error = command(*again, cwd=tmp_path)
    assert code == 0, error


@pytest.mark.xdist_group("run")
def test_inspect_tells_what_everything_is(finished, command):
    _, run, _ = finished
    for part, words in {
        ".": ["labelled, learned and used", "versions"],
        "activations.zarr": ["complete", "layers.0", "every checksum is right"],
        "labels": ["Unlabelled"],
        "panel": ["entities"],
    }.items():
        code, shown, error = command("inspect", run / part, "--verify", cwd=run.parent)
        assert code == 0, error
        for word in words:
            assert word in shown, (part, word)


@pytest.mark.xdist_group("run")
def test_export_and_report_write_where_they_are_told(finished, command, tmp_path):
    _, run, _ = finished
    assert command("export", run, "--out", tmp_path / "bundle", cwd=tmp_path)[0] == 0
    assert command("inspect", tmp_path / "bundle", "--verify", cwd=tmp_path)[0] == 0
    weights = next((tmp_path / "bundle").rglob("weights.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    code, _, said = command("inspect", tmp_path / "bundle", "--verify", cwd=tmp_path)
    assert code == 2
    assert "weights.safetensors" in said
    assert command("report", run, "--out", tmp_path / "pages", "--hash-ids", cwd=tmp_path)[0] == 0
    page = (tmp_path / "pages" / "index.html").read_text()
    assert "small" in page


@pytest.mark.xdist_group("run")
def test_labels_of_the_run_carry_both_verdicts(finished):
    _, run, _ = finished
    rows = read_table(run / "labels", "features").to_pylist()
    labelled = [r for r in rows if r["status"] == "labelled"]
    assert labelled
    assert all(r["learned"] is not None and r["used"] is not None for r in labelled)
    assert all("earned" in r["description"] and "sed" in r["description"] for r in labelled)


@pytest.mark.xdist_group("run")
def test_what_the_model_never_saw_has_no_label_and_distractors_are_not_used(finished):
    _, run, _ = finished
    rows = read_table(run / "labels", "features").to_pylist()
    labelled = [r for r in rows if r["status"] == "labelled"]
    concepts = {r["concept"] for r in read_table(run / "labels", "concepts").to_pylist() if r["applicable"]}
    assert {"absent_p20", "distractor_withheld_weekday"} <= concepts
    assert not [
        r["concept"] for r in labelled if r["concept"].startswith(("absent_", "distractor_withheld_"))
    ]
    assert not [
        r["concept"] for r in labelled if r["concept"].startswith("distractor_visible_") and r["used"]
    ]
    assert set(json.loads((run / "labels" / "summary.json").read_text())["controls"].values()) == {0}


@pytest.mark.xdist_group("run")
def test_concepts_check_prints_every_concept(finished, command):
    config, run, _ = finished
    path = ROOT / "configs/concepts/credit.yaml"
    code, shown, error = command("concepts", "check", path, "--panel", config, cwd=run.parent)
    assert code == 0, error
    for name in ("dpd30_now", "util", "mob"):
        assert name in shown


@pytest.mark.xdist_group("run")
def test_a_dictionary_goes_out_and_comes_back_with_the_same_labels(finished, command, tmp_path):
    config, run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    for name in ("saelens", "dictionary_learning", "sparsify"):
        code, _, error = command("export", run, "--format", name, "--out", tmp_path / name, cwd=tmp_path)
        assert code == 0, error
    elsewhere = [f"out={copy}", "sae=null", "train=null", f"dictionary.path={tmp_path / 'saelens'}"]
    done = assay("run", config, *elsewhere, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "topk with 48 features of 16 dimensions" in done.stdout
    ours, theirs = (read_table(r / "labels", "features").to_pylist() for r in (run, copy))
    assert [(f["status"], f["concept"], f["threshold"]) for f in ours] == [
        (f["status"], f["concept"], f["threshold"]) for f in theirs
    ]
    assert {f["learned"] for f in theirs} == {None}
    code, _, error = command("export", copy, "--out", tmp_path / "bundle", cwd=tmp_path)
    assert code == 0, error
    assert json.loads((tmp_path / "bundle" / "dictionary.json").read_text())["provenance"]["dictionary"] == (
        "layers.0-imported"
    )
    code, _, said = command("run", config, *elsewhere, "model.d_model=24", cwd=tmp_path)
    assert code == 2
    assert "d_in 16" in said and "dictionary.hook" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "{config}", "label.min_skil=0.3"], ["label.min_skil", "did you mean 'min_skill'"]),
        (["run", "{config}", "sae.kind=best", "seed=x"], ["sae", "batch_topk", "seed"]),
        (["run", "{config}", "panel.columns.util=bal/limm"], ["limm", "util"]),
        (["run", "{config}", "panel.path=missing.parquet"], ["missing.parquet"]),
        (["run", "{config}", "device=cuda:7"], ["cuda:7"]),
        (["run", "{config}", "concepts.paths=[no.yaml]"], ["no.yaml"]),
        (["run", "{config}", "concepts.tables=[{{path: no.parquet, entity: e, time: t}}]"], ["no.parquet"]),
        (["run", "{config}", "evaluate.segments.nope=[]"], ["evaluate.segments", "nope"]),
        (["run", "{config}", "model.n_heads=3"], ["n_heads = 3 does not divide d_model = 16"]),
        (["run", "{config}", "seed=4294967296", "reference.seed=-1"], ["  seed: ", "reference.seed: "]),
        (["run", "{config}", "train.batch_size=1000000000"], ["train.batch_size", "16777216"]),
        (["run", "{config}", "out=~no-such-user/x"], ["~"]),
        (["run", "{config}", "out={config}/x"], ["cannot be a run folder"]),
        (["inspect", "nowhere"], ["nothing at nowhere"]),
        (["report", "."], ["no run folder"]),
        (["export", "."], ["no run folder"]),
        (["run", "{config}", "sae.kind=gated"], ["gated dictionaries are not trained here"]),
        (["run", "{config}", "sae.k=49"], ["sae.k = 49 exceeds sae.d_sae = 48"]),
        (["run", "{config}", "dictionary.path=x"], ["takes the place of sae and train"]),
        (
            ["run", "{config}", "sae=null", "train=null", "dictionary.path=x"],
            ["no dictionary", "in x", "ae.pt"],
        ),
        (["run", "{config}", "sae.kind=temporal"], ["sae.kind=temporal", "harvest.run_length"]),
        (["train", "{config}", "sae.kind=temporal", "--plan", "--d-in", "16"], ["harvest.run_length"]),
        (
            ["run", "{config}", "sweep=[{{sae.k: 3}}, {{sae.kind: temporal}}]"],
            ["sae.kind=temporal", "harvest.run_length"],
        ),
        (
            ["run", "{config}", "sweep=[{{sae.kind: temporal}}]", "harvest.run_length=3"],
            ["sae.kind=temporal", "a run of its own"],
        ),
        (["run", "{config}", "sae=null", "train=null"], ["needs train, or a dictionary"]),
    ],
)
def test_wrong_input_is_one_message_and_code_2(tmp_path, command, arguments, words):
    config = write_config(tmp_path)
    code, _, said = command(*[a.format(config=config) for a in arguments], cwd=tmp_path)
    assert code == 2, said
    assert "assay: " in said and "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "run" / "model").exists(), "it began before it complained"


def test_a_process_says_it_too(tmp_path):
    done = assay("run", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_loads(path):
    from assay.config import RunConfig
    from sae.config import load_config

    assert load_config(RunConfig, path).name
