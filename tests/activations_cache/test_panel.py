"""Any table becomes the canonical panel, or one message says why not."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from activations_cache.panel import Panel, PanelConfig
from activations_cache.prepare import prepare
from activations_cache.splits import SPLITS, SplitConfig, assign_splits, hash_uniform
from assay.steps.model import profile_lines
from sae.config import parse_config
from sae.errors import ConfigError, PanelError


def raw_table(n=60, length=4, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.repeat([f"E{i:03d}" for i in range(n)], length)
    t = np.tile(np.arange(length), n)
    y = np.repeat(rng.integers(0, 2, n), length)
    bal = rng.normal(size=n * length)
    return {
        "who": ids,
        "when": t,
        "bal": bal,
        "lim": np.full(n * length, 10.0),
        "y": y,
        "sex": np.repeat(rng.integers(0, 2, n), length),
    }


def config(path, **changes):
    base = {
        "path": str(path),
        "entity": "who",
        "time": "when",
        "columns": {"util": "bal / lim", "bal": "bal"},
        "audit": {"sex": "sex"},
        "outcome": "y",
    }
    return PanelConfig(**{**base, **changes})


def write(tmp_path, table, name="raw.parquet"):
    path = tmp_path / name
    pq.write_table(pa.table(table), path)
    return path


def prepared(tmp_path, table, **changes):
    out = tmp_path / "panel"
    out.mkdir(exist_ok=True)
    profile = prepare(config(write(tmp_path, table), **changes), out)
    return Panel.open(out), profile


def test_columns_are_expressions_and_audit_columns_stay_out_of_the_model(tmp_path):
    table = raw_table()
    panel, profile = prepared(tmp_path, table)
    assert panel.columns == ["util", "bal"]
    np.testing.assert_allclose(panel.values[:, 0], (table["bal"] / 10).astype(np.float32))
    assert "audit_sex" in pq.read_schema(tmp_path / "panel" / "panel.parquet").names
    assert profile["rows"] == 240
    assert profile["entities"] == 60
    assert sum(s["entities"] for s in profile["splits"].values()) == 60


@pytest.mark.parametrize("kind", ["csv", "arrow", "two files"])
def test_every_format_gives_the_same_panel(tmp_path, kind):
    table = raw_table()
    expected, _ = prepared(tmp_path, table)
    arrow = pa.table(table)
    if kind == "csv":
        path = str(tmp_path / "raw.csv")
        pcsv.write_csv(arrow, path)
    elif kind == "arrow":
        path = str(tmp_path / "raw.arrow")
        pyarrow.feather.write_feather(arrow, path, compression="uncompressed")
    else:
        (tmp_path / "parts").mkdir()
        pq.write_table(arrow.slice(100), tmp_path / "parts" / "a.parquet")
        pq.write_table(arrow.slice(0, 100), tmp_path / "parts" / "b.parquet")
        path = str(tmp_path / "parts" / "*.parquet")
    out = tmp_path / "again"
    out.mkdir()
    prepare(config(path), out)
    found = Panel.open(out)
    np.testing.assert_allclose(found.values, expected.values)
    np.testing.assert_array_equal(found.entity, expected.entity)
    np.testing.assert_array_equal(found.split, expected.split)


def test_order_of_rows_does_not_matter(tmp_path):
    table = raw_table()
    expected, _ = prepared(tmp_path, table)
    order = np.random.default_rng(1).permutation(len(table["bal"]))
    found, _ = prepared(tmp_path, {k: v[order] for k, v in table.items()})
    np.testing.assert_array_equal(found.values, expected.values)


@pytest.mark.parametrize(
    ("values", "first"),
    [
        (["2005-04", "2005-05", "2005-07", "2006-01"], 2005 * 12 + 3),
        (["2005-04-30", "2005-05-31", "2005-07-31", "2006-01-31"], 2005 * 12 + 3),
    ],
)
def test_months_as_text_become_periods_and_gaps_stay_gaps(tmp_path, values, first):
    table = raw_table()
    table["when"] = np.tile(values, 60)
    panel, profile = prepared(tmp_path, table)
    assert panel.time[:4].tolist() == [first, first + 1, first + 3, first + 9]
    assert profile["gaps"] == 120


def test_days_are_told_apart_where_the_period_is_a_day(tmp_path):
    table = raw_table()
    table["when"] = np.tile(
        np.array(["1970-01-02", "1970-01-03", "1970-01-05", "1971-01-01"], dtype="datetime64[D]"), 60
    )
    panel, _ = prepared(tmp_path, table, period="day")
    assert panel.time[:4].tolist() == [1, 2, 4, 365]


def broken(key, value, row=5):
    def change(table):
        column = table[key].astype(object) if value is None else table[key].copy()
        column[row] = value
        return {**table, key: column.tolist() if value is None else column}

    return change


@pytest.mark.parametrize(
    ("change", "changes", "words"),
    [
        (broken("when", 0), {}, ["more than once", "E001", "2 rows"]),
        (broken("when", None), {}, ["null or cannot be read", "E001"]),
        (
            lambda t: {**t, "who": np.where(np.arange(240) == 5, np.nan, np.arange(240) // 4.0)},
            {},
            ["1 rows without an entity"],
        ),
        (lambda t: {**t, "when": np.tile(["a", "b", "c", "d"], 60)}, {}, ["cannot be read", "E000, a"]),
        (broken("bal", np.inf), {}, ["infinite", "E001"]),
        (broken("bal", -1e39), {}, ["1 values in bal", "float32", "E001"]),
        (broken("y", 7), {}, ["other than 0, 1", "7"]),
        (broken("y", 1 - int(raw_table()["y"][5])), {}, ["not constant", "E001"]),
        (lambda t: t, {"columns": {"x": "nope + 1", "z": "bal"}}, ["nope", "who, when"]),
        (lambda t: t, {"entity": "whom"}, ["whom"]),
        (lambda t: t, {"columns": {"x": "who"}}, ["x = "]),
        (lambda t: t, {"outcome": "(select 1)"}, ["outcome"]),
    ],
)
def test_what_cannot_be_trusted_is_one_message_with_the_offending_values(tmp_path, change, changes, words):
    with pytest.raises(PanelError) as caught:
        prepared(tmp_path, change(raw_table()), **changes)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "panel" / "panel.parquet").exists()


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize("here", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_times_with_a_zone_belong_to_the_months_of_that_zone_on_any_machine(
    tmp_path, zone, here, monkeypatch
):
    monkeypatch.setenv("TZ", here)
    time.tzset()
    try:
        table = raw_table()
        local = pa.array(
            np.tile(
                np.array(["2005-04-01T00:30", "2005-05-31T23:30", "2005-07-01", "2005-08-31"], "M8[us]"), 60
            )
        )
        table["when"] = pc.assume_timezone(local, zone)
        panel, _ = prepared(tmp_path, table)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (panel.time[:4] - 2005 * 12).tolist() == [3, 4, 6, 7]


@pytest.mark.parametrize("name", ["x.parquet", "x.csv"])
def test_the_file_that_is_named_is_read_though_its_path_looks_like_a_pattern(tmp_path, name):
    for folder, bal in (("a[1]", 1.0), ("a1", 2.0)):
        (tmp_path / folder).mkdir()
        table = pa.table({**raw_table(), "bal": np.full(240, bal)})
        path = tmp_path / folder / name
        pq.write_table(table, path) if name.endswith("parquet") else pcsv.write_csv(table, path)
    out = tmp_path / "panel"
    out.mkdir()
    prepare(config(tmp_path / "a[1]" / name), out)
    assert (Panel.open(out).values[:, 1] == 1.0).all()


def test_files_that_have_ids_once_as_numbers_and_once_as_text_are_refused(tmp_path):
    table = raw_table()
    table["who"] = np.repeat(np.arange(60), 4)
    one = write(tmp_path, table, "1.parquet")
    two = write(tmp_path, {**table, "who": [f"{i:05d}" for i in table["who"] + 100]}, "2.parquet")
    with pytest.raises(PanelError, match=r"2\.parquet has who as string, 1\.parquet as int64"):
        prepare(config("").model_copy(update={"path": (str(one), str(two))}), tmp_path)


def test_column_names_that_differ_in_a_letter_are_two(tmp_path):
    table = {**raw_table(), "masse": np.full(240, 1.0), "maße": np.full(240, 2.0)}
    panel, _ = prepared(tmp_path, table, columns={"m": "masse", "z": "maße"})
    assert (panel.values == [1.0, 2.0]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": {"bal": "bal", "BAL": "lim"}},
        {"columns": {"time_as_given": "bal"}},
        {"columns": {"AUDIT_sex": "bal"}},
        {"audit": {"sex": "sex", "Sex": "sex"}},
    ],
)
def test_canonical_names_that_would_meet_are_refused(changes):
    with pytest.raises(ValueError, match="column name"):
        config("x.parquet", **changes)


@pytest.mark.parametrize(
    ("when", "cut", "says"),
    [
        (None, "2005-10", "is a date, and when counts periods"),
        (None, 17, "leaves nothing after it\n  got: 0 to 3\n"),
        (None, 0, "leaves nothing before it"),
        (["2005-04", "2005-05", "2005-06", "2005-07"], "2005-13", "cannot read"),
        (["2005-04", "2005-05", "2005-06", "2005-07"], "2007-01", "after it\n  got: 2005-04 to 2005-07\n"),
    ],
)
def test_a_time_cut_that_cuts_nothing_is_refused(tmp_path, when, cut, says):
    table = raw_table()
    if when:
        table["when"] = np.tile(when, 60)
    elif isinstance(cut, str):
        # periods may be whole numbers of any type
        table["when"] = table["when"].astype(float)
    with pytest.raises(PanelError, match=says):
        prepared(tmp_path, table, split=SplitConfig(out_of_time=cut))


@pytest.mark.parametrize(
    ("first", "period", "shown"),
    [("2019-12", "month", "2019-12 to 2020-03"), ("2019-12-30", "day", "2019-12-30 to 2020-01-02"), (7, "month", "7 to 10")],
)  # fmt: skip
def test_the_profile_shows_periods_as_they_were_given(tmp_path, first, period, shown):
    when = first + np.arange(4) if isinstance(first, int) else np.arange(4) + np.datetime64(first)
    table = raw_table() | {"when": np.tile(when if isinstance(first, int) else when.astype(str), 60)}
    _, profile = prepared(tmp_path, table, period=period)
    assert f"60 entities, periods {shown}, " in profile_lines(profile)[0]


def test_too_few_entities_for_three_splits_is_said(tmp_path):
    with pytest.raises(PanelError, match="no entity falls into"):
        prepared(tmp_path, raw_table(n=2))


def test_missing_values_stay_missing(tmp_path):
    table = raw_table()
    table["bal"][3] = np.nan
    panel, profile = prepared(tmp_path, table)
    assert np.isnan(panel.values[3]).all()
    assert profile["column_profile"]["bal"]["missing"] == pytest.approx(1 / 240)


@pytest.mark.parametrize(
    "expression", ["bal > 100", "greatest(bal, 0)", "coalesce(bal, -1)", "bal BETWEEN 0 AND 1", "bal IS NULL"]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nan_and_null_are_the_same_to_expressions(tmp_path, expression, dtype):
    found = []
    for missing in (np.nan, None):
        table = raw_table()
        bal = pa.array(table["bal"].astype(dtype)).to_pylist()
        table["bal"] = pa.array([*bal[:3], missing, *bal[4:]], pa.from_numpy_dtype(dtype))
        found.append(prepared(tmp_path, table, columns={"x": expression})[0].values)
    np.testing.assert_array_equal(*found)


def test_an_outcome_that_is_never_known_has_no_rate(tmp_path, recwarn):
    table = {**raw_table(), "y": pa.nulls(240, pa.int64())}
    _, profile = prepared(tmp_path, table)
    assert profile["outcome_rate"] is None and profile["outcome_known"] == 0
    assert not recwarn.list


def test_a_time_cut_takes_the_latest_rows_of_every_entity(tmp_path):
    panel, _ = prepared(tmp_path, raw_table(), split=SplitConfig(out_of_time=3))
    assert (panel.split == SPLITS.index("out_of_time")).sum() == 60
    assert (panel.time[panel.split == SPLITS.index("out_of_time")] == 3).all()
    np.testing.assert_array_equal(panel.history_end(), panel.offsets[1:] - 1)


def test_the_split_is_a_function_of_the_entity_alone():
    names = [f"{i}" for i in range(5000)]
    split, inner = assign_splits(SplitConfig(), names)
    again, _ = assign_splits(SplitConfig(), names[::-1])
    np.testing.assert_array_equal(split, again[::-1])
    assert np.bincount(split) / 5000 == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    assert inner[split != 0].sum() == 0
    assert inner.sum() / (split == 0).sum() == pytest.approx(0.1, abs=0.02)


def test_shares_that_leave_none_to_confirm_are_refused():
    for fit, discover in ((0.8, 0.3), (0.6, 0.4)):
        with pytest.raises(ConfigError, match="none to confirm"):
            parse_config(SplitConfig, {"fit": fit, "discover": discover}, where="split")


def test_purposes_are_independent():
    names = [f"{i}" for i in range(4000)]
    u, v = (hash_uniform(0, p, names) for p in ("split", "rank"))
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.05
    assert ((u >= 0) & (u < 1)).all()
    assert hash_uniform(0, "split", ["7"]) != hash_uniform(1, "split", ["7"])


def test_a_known_hash_so_that_splits_never_move():
    # blake2b-64 of b"0|split|17", little endian, its upper 53 bits
    import hashlib

    digest = hashlib.blake2b(b"0|split|17", digest_size=8).digest()
    assert hash_uniform(0, "split", ["17"])[0] == (int.from_bytes(digest, "little") >> 11) / 2**53
