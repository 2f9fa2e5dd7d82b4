"""What is measured, shown and warned of while training goes on."""

import io
import json
import logging

import pytest
from rich.console import Console

from train.inputs import Inputs
from train.progress import LiveTable, as_table, duration

SAE = {"kind": "batch_topk", "d_sae": 40, "k": 3}
RUN = {"batch_size": 32, "rows": 32 * 60, "dead_after_rows": 200, "log_every": 10}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_agree_with_what_is_known(small, trainer, tmp_path):
    run = trainer(small, tmp_path, sae=SAE, **RUN)
    run.fit()
    records = lines(tmp_path)
    for record in records:
        assert record["l0"] == pytest.approx(3, abs=0.01)
        assert record["rows"] == 32 * record["step"]
        assert record["memory_bytes"] > 10**7
        assert 0 <= record["wait_share"] < 0.5
        assert 0 < record["floor_share"] < 1
    # scaled inputs have mean square 1 about the data-set mean, so mse is FVU up to the variance of a batch
    ratios = [record["fvu"] / record["mse"] for record in records]
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.25)
    assert records[-1]["seconds_left"] == 0
    began = 0.0
    for record in records:
        assert record["rows_per_second"] == pytest.approx(320 / (record["seconds"] - began), rel=1e-6)
        began = record["seconds"]


def test_the_first_record_after_a_resumption_counts_the_steps_since(small, trainer, tmp_path):
    run = trainer(small, tmp_path, sae=SAE, **RUN, checkpoint_every=25)

    def stop(done, total, text):
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fit(stop)
    run.checkpoints.finish()
    trainer(small, tmp_path, sae=SAE, **RUN, checkpoint_every=25).fit()
    first = next(record for record in lines(tmp_path) if record["step"] == 30)
    assert first["rows_per_second"] == pytest.approx(5 * 32 / first["seconds"], rel=1e-6)


def test_waiting_and_dead_features_are_warned_of_once(small, trainer, tmp_path, caplog):
    run = trainer(small, tmp_path, sae={**SAE, "d_sae": 400, "aux_alpha": 0.0}, **RUN)

    class Slow(type(run.inputs.loader)):
        def next_batch(self):
            self.wait_seconds += 10
            return super().next_batch()

    run.inputs = Inputs(Slow(run.inputs.loader.x, batch_size=32), run.inputs.mean, run.inputs.scale)
    with caplog.at_level(logging.WARNING):
        run.fit()
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("waiting for data" in text for text in warnings) == 1
    assert sum("sae.d_sae" in text for text in warnings) == 1
    assert lines(tmp_path)[-1]["wait_share"] > 1


def test_a_healthy_run_warns_of_nothing(small, trainer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(small, tmp_path, sae={**SAE, "d_sae": 24}, **RUN).fit()
    assert not caplog.records


def test_the_table_is_drawn_on_a_terminal_only(small, trainer, tmp_path):
    drawn = {}
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=200)
        run = trainer(small, tmp_path / str(terminal), sae=SAE, **RUN)
        run.watcher = LiveTable(console, 60)
        run.fit()
        drawn[terminal] = screen.getvalue()
    assert drawn[False] == ""
    for word in ("rows/s", "of floor", "waiting", "FVU", "L0", "dead", "rate", "memory", "left", "60 of 60"):
        assert word in drawn[True]
    assert as_table(lines(tmp_path / "True")[0], 60).row_count == 1


def test_times_as_text():
    assert [duration(s) for s in (8.2, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 5 min"]
