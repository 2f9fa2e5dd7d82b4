"""Tables that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from label.report import write_report
from label.tables import read_table, write_table
from sae.errors import ConfigError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_table(tmp_path, "effects", [{"feature": 0, "entity": "a", "change": 0.1}] * 100)
    return tmp_path / "effects.parquet"


@pytest.mark.parametrize("damage", ["cut short", "a page", "missing", "another version"])
def test_a_damaged_table_is_an_error_of_the_users(table: Path, damage: str) -> None:
    whole = table.read_bytes()
    if damage == "cut short":
        table.write_bytes(whole[:-40])
    elif damage == "a page":
        table.write_bytes(whole[:4] + bytes(60) + whole[64:])
    elif damage == "missing":
        table.unlink()
    else:
        pq.write_table(pq.read_table(table).replace_schema_metadata({"format_version": "0"}), table)
    with pytest.raises(ConfigError, match=r"effects\.parquet"):
        read_table(table.parent, "effects")


def test_a_report_says_which(labels_folder: Path, tmp_path: Path) -> None:
    for path in labels_folder.iterdir():
        if path.stem != "effects":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ConfigError, match=r"effects\.parquet"):
        write_report(tmp_path, tmp_path / "report", run=None, evaluation=None)
