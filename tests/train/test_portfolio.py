"""Segments and periods of judged rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.errors import ConfigError
from train.portfolio import periods_of, segments_of


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panel")
    columns = {
        "util": pa.array([0.1, 0.3, None, 0.9, 0.3]),
        "audit_sex": pa.array(["f", "m", "f", None, "m"]),
        "audit_age": pa.array(["20", "31", "40", "52", "65"]),
    }
    pq.write_table(pa.table(columns), folder / "panel.parquet")
    return folder


def listed(parts):
    return [(part.name, np.flatnonzero(part.rows).tolist()) for part in parts]


def test_segments_by_value_and_by_edges_keep_what_is_missing(panel):
    rows = np.array([4, 3, 2, 1])
    found = segments_of(panel, {"util": (0.3, 0.5), "audit_sex": (), "audit_age": (40,)}, rows)
    assert listed(found["util"]) == [
        ({"from": 0.3, "to": 0.5}, [0, 3]),
        ({"from": 0.5, "to": None}, [1]),
        ({"value": None}, [2]),
    ]
    assert listed(found["audit_sex"]) == [
        ({"value": "f"}, [2]),
        ({"value": "m"}, [0, 3]),
        ({"value": None}, [1]),
    ]
    assert listed(found["audit_age"]) == [
        ({"from": None, "to": 40}, [3]),
        ({"from": 40, "to": None}, [0, 1, 2]),
    ]


def test_a_column_that_cannot_be_divided_is_refused(panel, tmp_path):
    with pytest.raises(ConfigError, match="holds no numbers"):
        segments_of(panel, {"audit_sex": (1,)}, np.arange(5))
    pq.write_table(pa.table({"x": np.arange(60.0)}), tmp_path / "panel.parquet")
    with pytest.raises(ConfigError, match="60 values are too many"):
        segments_of(tmp_path, {"x": ()}, np.arange(60))


def test_periods_are_single_while_they_are_few():
    time = np.array([7, 5, 5, 9])
    assert listed(periods_of(time)) == [
        ({"from": 5, "to": 5}, [1, 2]),
        ({"from": 7, "to": 7}, [0]),
        ({"from": 9, "to": 9}, [3]),
    ]
    stretches = periods_of(np.arange(100))
    assert len(stretches) == 12
    assert sum(part.rows.astype(int) for part in stretches).tolist() == [1] * 100
