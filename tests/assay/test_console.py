"""What is written where there is no terminal: a line of progress now and then, as the log of a job has it."""

import pytest
from rich.console import Console as RichConsole

from assay.console import Console
from train.progress import LiveTable, as_cells

RECORD = {
    "step": 1200, "rows_per_second": 35000.0, "floor_share": 0.6, "wait_share": 0.01, "loss": 0.2, "fvu": 0.19,
    "l0": 16.0, "dead": 0.0, "lr": 3e-3, "memory_bytes": 2**30, "seconds_left": 185.0,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_long_work_leaves_a_line_a_minute_in_a_log(clock, capsys):
    with Console().bar("rows") as bar:
        for second in range(0, 200, 10):
            clock[0] = 1000.0 + second
            bar(second, 200, "model 80%\nmore")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "    60 of 200 rows after 1 min 0 s; model 80%",
        "    120 of 200 rows after 2 min 0 s; model 80%",
        "    180 of 200 rows after 3 min 0 s; model 80%",
    ]


def test_short_work_says_nothing(clock, capsys):
    with Console().bar("") as bar:
        bar(3, 4)
        clock[0] += 59
        bar(4, 4)
    assert not capsys.readouterr().out


def test_training_says_its_latest_numbers(clock, capsys):
    shown = LiveTable(RichConsole(width=80, force_terminal=False), steps=5000)
    shown.write(RECORD)
    assert not capsys.readouterr().out
    clock[0] += 60
    shown.write(RECORD)
    shown.write(RECORD)
    shown.close()
    said = capsys.readouterr().out
    assert said.count("step 1,200 of 5,000, rows/s 35,000") == 1
    assert all(cell in said for cell in as_cells(RECORD, 5000).values())


def test_of_several_processes_one_speaks(clock, capsys):
    with Console(quiet=True).bar("rows") as bar:
        clock[0] += 100
        bar(1, 2)
    assert not capsys.readouterr().out
