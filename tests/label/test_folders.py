"""Folders that take the place of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from label.folders import replaced_folder
from sae.errors import ConfigError


def write(out: Path, text: str) -> None:
    with replaced_folder(out, "report.json", "report") as folder:
        (folder / "report.json").write_text(json.dumps({"kind": "report"}))
        (folder / "page").write_text(text)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "report").symlink_to(tmp_path / "www")
    for text in ("first", "second"):
        write(tmp_path / "report", text)
        assert (tmp_path / "www" / "page").read_text() == text
    assert (tmp_path / "report").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "www"]


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is where you are"):
        write(Path(), "lost")
    monkeypatch.chdir(tmp_path)
    write(Path("empty"), "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
