from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from label.concepts.tables import load_concept_table
from sae.errors import ConceptError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"entity": [0, 0, 1], "time": [3, 4, 3]}), tmp_path / "panel.parquet")
    pq.write_table(pa.table({"entity": [0, 1], "id": ["17", "9"]}), tmp_path / "entities.parquet")
    return tmp_path


def load(
    folder: Path, table: dict[str, list[object]], meta: str | None = None, **limits: object
) -> list[object]:
    pq.write_table(pa.table(table), folder / "given.parquet")
    if meta is not None:
        (folder / "meta.yaml").write_text(meta)
    return read(folder, folder / "given.parquet", None if meta is None else folder / "meta.yaml", **limits)


def read(folder: Path, given: Path, meta: Path | None = None, **limits: object) -> list[object]:
    return load_concept_table(  # type: ignore[return-value]
        given,
        folder / "out.parquet",
        panel=folder / "panel.parquet",
        entities=folder / "entities.parquet",
        entity="id",
        time="month",
        meta=meta,
        **limits,  # type: ignore[arg-type]
    )


def test_a_ready_made_table(folder: Path) -> None:
    nan = float("nan")
    table = {
        "id": [9, 17, 17, 5],
        "month": [3, 4, 3, 3],
        "vip": [True, None, False, True],
        "score": [1.5, nan, 2.5, 9.0],
        "visits": [1, 2, 3, 4],
    }
    infos = load(folder, table, "vip: {text: A very important person, kind: event, risk: down}")
    assert [(i.id, i.type, i.text, i.kind) for i in infos] == [  # type: ignore[attr-defined]
        ("vip", "bool", "A very important person", "event"),
        ("score", "float", "score", "point"),
        ("visits", "float", "visits", "point"),
    ]
    out = pq.read_table(folder / "out.parquet")
    assert out.to_pydict() == {
        "entity": [0, 0, 1],
        "time": [3, 4, 3],
        "vip": [False, None, True],
        "score": [2.5, None, 1.5],
        "visits": [3, 2, 1],
    }
    assert out.schema.types[2:] == [pa.bool_(), pa.float64(), pa.float64()]


@pytest.mark.parametrize(
    ("table", "meta", "reason"),
    [
        ({"id": [9], "vip": [True]}, None, "no column 'month'"),
        ({"id": [9], "month": [3]}, None, "no concept column"),
        ({"id": [9], "month": ["2020-01"], "vip": [True]}, None, "not the panel's period index"),
        ({"id": [9], "month": [3], "Vip": [True]}, None, "not a concept id"),
        ({"id": [9], "month": [3], "split": [True]}, None, "not a concept id"),
        ({"id": [9], "month": [3], "vip": ["x"]}, None, "not a truth value or a number"),
        ({"id": [9], "month": [3], "vip": [[1]]}, None, r"BIGINT\[\], not a truth value or a number"),
        ({"id": [9], "month": [3], "vip": [timedelta(1)]}, None, "INTERVAL, not a truth value or a number"),
        ({"id": [9, 9], "month": [3, 3], "vip": [True, False]}, None, "two rows for one entity"),
        ({"id": [1], "month": [3], "vip": [True]}, None, "no row in common"),
        ({"id": [9], "month": [3], "vip": [True]}, "vop: {text: A}", "no such column"),
        ({"id": [9], "month": [3], "vip": [True]}, "vip: {colour: red}", "colour: Extra inputs"),
        ({"id": [9], "month": [3], "vip": [True]}, "vip: {type: float}", "which the table decides"),
        ({"id": [9], "month": [3], "vip": [True]}, "- vip", "not a mapping"),
    ],
)
def test_wrong_tables(folder: Path, table: dict[str, list[object]], meta: str | None, reason: str) -> None:
    with pytest.raises(ConceptError, match=reason):
        load(folder, table, meta)
    assert not (folder / "out.parquet").exists()


@pytest.mark.parametrize("width", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_whole_numbers_of_any_width_are_periods(folder: Path, width: str) -> None:
    months = pa.array([3, 4], getattr(pa, width)())
    load(folder, {"id": [9, 17], "month": months, "vip": [True, False]})
    with pytest.raises(ConceptError, match="not the panel's period index"):
        load(folder, {"id": [9, 17], "month": [3.0, 4.0], "vip": [True, False]})


def test_ids_of_a_csv_are_text_as_they_are_in_a_panel(folder: Path) -> None:
    pq.write_table(pa.table({"entity": [0, 1], "id": ["1.1", "1.10"]}), folder / "entities.parquet")
    (folder / "given.csv").write_text("id,month,vip\n1.1,3,true\n1.10,3,false\n")
    read(folder, folder / "given.csv")
    assert pq.read_table(folder / "out.parquet")["vip"].to_pylist()[::2] == [True, False]


def test_columns_that_are_not_taken_may_hold_anything(folder: Path) -> None:
    table = {"id": [9, 17], "month": [3, 4], "vip": [True, False], "Note": ["x", "y"], "score": [1.5, 2.5]}
    meta = "{vip: {text: A very important person}, score: {text: A score}}"
    infos = load(folder, table, meta, only=["v*", "none"])
    assert [i.text for i in infos] == ["A very important person"]  # type: ignore[attr-defined]
    assert pq.read_table(folder / "out.parquet").column_names == ["entity", "time", "vip"]
    with pytest.raises(ConceptError, match="`only` takes none"):
        load(folder, table, only=["w*"])


def test_a_table_beyond_the_memory_limit_goes_to_disk(tmp_path: Path) -> None:
    n = 60_000
    ids, values = [str(i) for i in range(n)], np.random.default_rng(0).random((24, n))
    pq.write_table(pa.table({"entity": np.arange(n), "time": np.zeros(n, int)}), tmp_path / "panel.parquet")
    pq.write_table(pa.table({"entity": np.arange(n), "id": ids}), tmp_path / "entities.parquet")
    table = {"id": ids, "month": np.zeros(n, int)} | {f"c{i}": own for i, own in enumerate(values)}
    load(tmp_path, table, memory_limit="32MB")
    out = pq.read_table(tmp_path / "out.parquet")
    np.testing.assert_array_equal([out[f"c{i}"].to_numpy() for i in range(24)], values)
    with pytest.raises(ConceptError, match=r"(?s)cannot be brought.*Out of Memory"):
        load(tmp_path, table, memory_limit="1MB")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "entities.parquet", "given.parquet", "out.parquet", "panel.parquet",
    ]  # fmt: skip
