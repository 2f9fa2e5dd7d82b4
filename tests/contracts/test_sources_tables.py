"""What sources read of tables and files: in which order, whose rows, what is missing."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import activations_cache.sources  # noqa: F401 - registers the kinds
from activations_cache.matrices import open_matrix
from activations_cache.sources.base import HarvestInputs, SourceConfig
from activations_cache.sources.events import read_events
from sae.config import parse_config
from sae.errors import PanelError
from tests.contracts.source_cases import collect

B = 2**60


def tensors(path, **options):
    tree = {"kind": "tensors", "path": str(path), **options}
    return parse_config(SourceConfig, tree, where="test").build(inputs=HarvestInputs())


def events(folder, table, **options):
    pq.write_table(pa.table(table), folder / "events.parquet")
    path = str(folder / "events.parquet")
    tree = {"kind": "events", "path": path, "entity": "a", "time": "d", "columns": {"x": "x"}, **options}
    return read_events(parse_config(SourceConfig, tree, where="test"))[0]


def test_files_of_a_glob_are_read_in_natural_order(tmp_path):
    for i in (1, 2, 10):
        np.save(tmp_path / f"part-{i}.npy", np.full((2, 3), i, np.float32))
    (batch,) = collect(tensors(tmp_path / "part-*.npy"))
    assert batch.acts["activations"][:, 0].tolist() == [1, 1, 2, 2, 10, 10]


def test_ids_differ_where_only_a_nul_does(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    pq.write_table(pa.table({"entity": ["b", "a\0", "a"], "time": [1, 1, 1]}), tmp_path / "at.parquet")
    source = tensors(tmp_path / "x.npy", coordinates={"path": str(tmp_path / "at.parquet")})
    assert source.entities["id"].to_pylist() == ["a", "a\0", "b"]
    assert np.concatenate([b.entity for b in collect(source)]).tolist() == [2, 1, 0]


def test_ids_of_a_csv_are_text_whatever_they_look_like(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    (tmp_path / "at.csv").write_text("entity,time\n1.10,2020-01\n1.1,2020-01\n12345678901234567890,2020-02\n")
    source = tensors(tmp_path / "x.npy", coordinates={"path": str(tmp_path / "at.csv")})
    assert source.entities["id"].to_pylist() == ["1.1", "1.10", "12345678901234567890"]


@pytest.mark.parametrize("kept_by", ["pandas", "name"])
def test_the_index_of_a_data_frame_is_no_dimension(tmp_path, kept_by):
    table = pa.Table.from_pandas(pd.DataFrame({"d0": [1.0, 2.0], "d1": [3.0, 4.0]}, index=[0.5, 1.5]))
    assert table.column_names == ["d0", "d1", "__index_level_0__"]
    pq.write_table(table if kept_by == "pandas" else table.replace_schema_metadata(), tmp_path / "x.parquet")
    assert open_matrix(tmp_path / "x.parquet").read(0, 2).tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    "order",
    [
        pa.array([B + 2, B + 1, B, None]),
        pa.array([Decimal("3.2"), Decimal("3.1"), Decimal("2.5"), None]),
        pa.array([0.3, 0.2, 0.1, None]),
        pa.array(np.array(["2020-01-03", "2020-01-02", "2020-01-01", "NaT"], "M8[us]"), from_pandas=True),
    ],
)
def test_events_of_a_time_are_ordered_exactly_null_last(tmp_path, order):
    panel = events(tmp_path, {"a": ["u"] * 4, "d": [1] * 4, "o": order, "x": [3.0, 2.0, 1.0, 4.0]}, order="o")
    assert panel.values[:, 0].tolist() == [1, 2, 3, 4]


def test_events_are_not_ordered_by_text(tmp_path):
    table = {"a": ["u"] * 2, "d": [1] * 2, "o": ["10", "9"], "x": [1.0, 2.0]}
    with pytest.raises(PanelError, match=r"source\.order: o does not say"):
        events(tmp_path, table, order="o")


def test_nan_is_missing_to_the_expressions_of_events(tmp_path):
    columns = {"x": "x", "high": "x > 1", "zero": "coalesce(x, 0)"}
    panel = events(tmp_path, {"a": ["u"] * 2, "d": [1, 2], "x": [float("nan"), 5.0]}, columns=columns)
    np.testing.assert_array_equal(panel.values, [[np.nan, np.nan, 0], [5, 1, 5]])
