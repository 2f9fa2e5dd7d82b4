"""Documents of a real data set on disk are those that were put into it."""

from __future__ import annotations

import pytest

from activations_cache.documents import open_documents
from sae.errors import ConfigError

datasets = pytest.importorskip("datasets", reason="pip install 'assay[datasets]'")
TEXTS = ["one line", "two\nlines", "", "Größe 3 €"]


@pytest.fixture
def folder(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3, 4]}).save_to_disk(str(tmp_path / "one"))
    pair = {name: datasets.Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")}
    datasets.DatasetDict(pair).save_to_disk(str(tmp_path / "two"))
    return tmp_path


def test_rows_are_documents_by_number(folder):
    for path in (folder / "one", folder / "two/test"):
        found = open_documents([path], "file", "text")
        assert found.ids == ["0", "1", "2", "3"]
        assert [found.read(i) for i in (3, 0, 1, 2)] == [TEXTS[i] for i in (3, 0, 1, 2)]


def test_wrong_folders_are_refused(folder):
    with pytest.raises(ConfigError, match=r"no words.*\n.*expected: text, n"):
        open_documents([folder / "one"], "file", "words")
    with pytest.raises(ConfigError, match=r"several data sets.*\n.*train.*\n.*two/train"):
        open_documents([folder / "two"], "file", "text")
    with pytest.raises(ConfigError, match=rf"(?s)source.path.*no data set.*glob, such as {folder}/\*.txt"):
        open_documents([folder], "file", "text")
