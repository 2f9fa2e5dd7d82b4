from __future__ import annotations

import time
from datetime import date
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache.sql import (
    ExpressionError,
    check_expression,
    connect,
    load_table,
    lock,
    parse_expression,
)
from sae.errors import ConceptError, PanelError

COLUMNS = ["t", "bkt", "bal", "lim", "Größe"]
WINDOWS = ["w", "w6", "wc"]
FREE = duckdb.connect()

REFUSED = [
    ("", "empty"),
    ("   \n", "empty"),
    ("bkt; DROP TABLE panel", "cannot be parsed"),
    ("bkt) FROM panel; COPY panel TO 'x'; SELECT (1", "cannot be parsed|not one scalar"),
    ("1), (2", "not one scalar"),
    ("1) UNION SELECT (2", "not one scalar"),
    ("1) FROM secrets JOIN panel ON (true", "cannot be parsed"),
    ("bkt -- comment", "comments"),
    ("bkt /* comment */", "comments"),
    ("bkt AS outcome", "cannot be parsed"),
    ("(SELECT 1)", "subqueries"),
    ("EXISTS (SELECT 1)", "subqueries"),
    ("bkt IN (SELECT bal FROM panel)", "subqueries"),
    ("bkt = ANY([1, 2])", "subqueries|not allowed"),
    ("*", "name the column"),
    ("COLUMNS(*)", "name the column"),
    ("COLUMNS('b.*')", "name the column"),
    ("x -> x + 1", "lambdas"),
    ("list_transform([1], lambda x: x + 1)", "not allowed"),
    ("[x FOR x IN range(10)]", "not allowed"),
    ("?", "parameters"),
    ("$name", "parameters"),
    ("#1", "positional"),
    ("bkt COLLATE nocase", "COLLATE"),
    ("getenv('HOME')", "'getenv' is not allowed"),
    ("current_setting('threads')", "not allowed"),
    ("getvariable('x')", "not allowed"),
    ("read_csv('/etc/passwd')", "not allowed"),
    ("read_text('/etc/passwd')", "not allowed"),
    ("query('SELECT 1')", "not allowed"),
    ("query_table('panel')", "not allowed"),
    ("nextval('s')", "not allowed"),
    ("random()", "not allowed"),
    ("now()", "not allowed"),
    ("current_date", "unknown column"),
    ("current_timestamp", "unknown column|not allowed"),
    ("repeat('a', 1000000000)", "not allowed"),
    ("range(1000000000)", "not allowed"),
    ("generate_series(1, 1000000000)", "not allowed"),
    ("lpad('a', 1000000000, 'b')", "not allowed"),
    ("[1, 2, 3]", "not allowed"),
    ("{'a': 1}", "not allowed"),
    ("MAP {1: 2}", "not allowed"),
    ("ROW(1, 2)", "not allowed"),
    ("bkt[1]", "not allowed"),
    ("error('x')", "not allowed"),
    ("main.abs(bkt)", "not allowed"),
    ("bkt.abs()", "not allowed"),
    ("system.main.abs(bkt)", "not allowed"),
    ("panel.bkt", "unknown column"),
    ("CAST(bkt AS BLOB)", "cast"),
    ("CAST(bkt AS DECIMAL(38, 2))", "cast"),
    ("CAST(bkt AS STRUCT(a INT))", "cast"),
    ("abs(x := bkt)", "not allowed"),
    ("bkt ~ 'a*'", "not allowed"),
    ("bkt LIKE '%a'", "not allowed"),
    ("~bkt", "not allowed"),
    ("bkt << 2", "not allowed"),
    ("max(bkt)", "needs a window"),
    ("abs(bkt) FILTER (bal > 1)", "need a window"),
    ("sex", "unknown column 'sex'"),
    ("audit_sex", "unknown column"),
    ("outcome", "unknown column"),
    ("split", "unknown column"),
    ("lead(bkt) OVER w", "looks ahead"),
    ("max(bkt) OVER w9", "unknown window 'w9'"),
    ("max(bkt) OVER ()", "declared window"),
    ("max(bkt) OVER (PARTITION BY bkt)", "declared window"),
    ("max(bkt) OVER (w ORDER BY bal)", "declared window"),
    ("max(bkt) OVER (w ROWS BETWEEN CURRENT ROW AND 1 FOLLOWING)", "declared window"),
    ("max(bkt) OVER (w6 RANGE BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)", "declared window"),
    ("max(bkt) OVER (w ROWS 1 PRECEDING)", "declared window"),
    ("max(bkt) OVER (w6 ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW EXCLUDE TIES)", "declared window"),
    ("max(bkt ORDER BY t DESC) OVER w", "declared window"),
    ("count(DISTINCT bkt) OVER w", "DISTINCT"),
    ("max(max(bkt) OVER w) OVER w6", "window inside"),
    ("max(bkt) FILTER (max(bal) OVER w > 1) OVER w6", "window inside"),
    ("max(bkt, 3) OVER w", "argument"),
    ("percent_rank() OVER w", "not allowed"),
    ("cume_dist() OVER w", "not allowed"),
    ("ntile(4) OVER w", "not allowed"),
    ("fill(bkt) OVER w", "not allowed"),
    ("list(bkt) OVER w", "not allowed"),
    ("string_agg(bkt, ',') OVER w", "not allowed"),
    ("max(bkt IGNORE NULLS) OVER w", "IGNORE NULLS"),
    ("lag(bkt, -1) OVER w", "offset"),
    ("lag(bkt, 0) OVER w", "offset"),
    ("lag(bkt, t) OVER w", "offset"),
    ("lag(bkt, 100000) OVER w", "offset"),
    ("lag(bkt, 1, 0) OVER w", "argument"),
    ("lag(bkt) OVER w6", "one period"),
    ("row_number() OVER w6", "row_number counts"),
    ("row_number() OVER wc", "row_number counts"),
    ("lag(bkt) FILTER (bal > 1) OVER w", "one period|cannot be parsed"),
    ("greatest(bkt)", "argument"),
    ("x'ab'", "constant"),
    ("INTERVAL 1 MONTH", "not allowed"),
    ("b\u200bkt", "U\\+200B"),
    ("bkt\u202e", "U\\+202E"),
    ("bkt\u00a0>= 1", "U\\+00A0"),
    ("bkt\x00", "U\\+0000"),
    ("\uff42kt", "unknown column"),
    ("b\u043at", "unknown column"),
    ("(" * 40 + "1" + ")" * 40, "brackets"),
    ("NOT " * 300 + "true", "nested"),
    ("- " * 500 + "bkt", "nested"),
    ("1 + " * 400 + "1", "nested"),
    ("CASE WHEN true THEN " * 60 + "1" + " END" * 60, "nested"),
    ("bkt + " * 500 + "1", "characters long"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_refused(text: str, reason: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ExpressionError, match=reason):
        parse_expression(text, COLUMNS, windows=WINDOWS)
    assert time.perf_counter() - start < 2


def test_windows_need_to_be_declared() -> None:
    with pytest.raises(ExpressionError, match=r"\(OVER\) are not allowed"):
        parse_expression("max(bkt) OVER (PARTITION BY t)", COLUMNS)
    with pytest.raises(ExpressionError, match="unknown window"):
        parse_expression("max(bkt) OVER w", COLUMNS)


def test_a_hidden_marker_is_only_another_spelling_of_its_window() -> None:
    spelled = parse_expression('max(bkt) OVER (PARTITION BY "@w6")', COLUMNS, windows=WINDOWS)
    assert spelled.sql == 'max("bkt") OVER "w6"' and spelled.windows == {"w6"}
    with pytest.raises(ExpressionError):
        parse_expression('max(bkt) OVER (PARTITION BY "@w7")', COLUMNS, windows=WINDOWS)


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("greatest(pay_status, 0)", 'greatest("Pay_Status", 0)'),
        ("PAY_STATUS = -1", '("Pay_Status" = (-1))'),
        ('"Größe" IS NOT NULL', '("Größe" IS NOT NULL)'),
        ("a / b", '("a" / nullif("b", 0))'),
        ("s IN ('it''s', 'x')", "(\"s\" IN ('it''s', 'x'))"),
        ("a::int", 'TRY_CAST("a" AS INTEGER)'),
        ("CASE s WHEN 'C' THEN 0 END", "CASE WHEN (\"s\" = 'C') THEN 0 ELSE NULL END"),
        ("a BETWEEN 1 AND 1e3", '("a" BETWEEN 1 AND 1e3)'),
        ("coalesce(a, b, 0)", 'coalesce("a", "b", 0)'),
        ("ln(a)", 'ln(nullif(greatest("a", 0), 0))'),
        ("a IS TRUE", '(TRY_CAST("a" AS BOOLEAN) IS NOT DISTINCT FROM true)'),
    ],
)
def test_what_is_run_is_written_anew(text: str, sql: str) -> None:
    found = parse_expression(text, ["Pay_Status", "a", "b", "s", "Größe"])
    assert found.sql == sql


def test_an_expression_knows_what_it_uses() -> None:
    found = parse_expression(
        "bkt > lag(bkt) OVER w + lag(bal, 3) OVER w AND count(*) FILTER (lim > 0) OVER w6 = 2",
        COLUMNS,
        windows=WINDOWS,
    )
    assert found.columns == {"bkt", "bal", "lim"}
    assert found.windows == {"w6"} and found.lags == {1, 3} and found.leads == frozenset()
    ahead = parse_expression("lead(bkt, 2) OVER w", COLUMNS, windows=WINDOWS, ahead=True)
    assert ahead.leads == {2}


def test_the_caller_chooses_the_error() -> None:
    with pytest.raises(PanelError, match=r"(?s)columns\.bkt: the function 'getenv'.*getenv"):
        check_expression("getenv('x')", ["a"], where="columns.bkt")
    with pytest.raises(ConceptError):
        check_expression("nope", ["a"], error=ConceptError)
    assert check_expression("a + 1", ["a"]).columns == {"a"}


leaves = st.sampled_from(["a", "b", "c", "0", "1", "-2", "2.5", "NULL", "1e2"])
numbers = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", " - ", "*"]), inner).map("".join),
        inner.map(lambda x: f"({x})"),
        inner.map(lambda x: f"-({x})"),
        inner.map(lambda x: f"abs({x})"),
        st.tuples(inner, inner).map(lambda p: f"greatest({p[0]}, {p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"coalesce({p[0]}, {p[1]})"),
        st.tuples(inner, inner, inner).map(lambda p: f"CASE WHEN {p[0]} > {p[1]} THEN {p[2]} ELSE a END"),
        st.tuples(inner, inner).map(lambda p: f"CASE WHEN NOT {p[0]} < {p[1]} OR a = 1 AND b = c THEN 7 END"),
        st.tuples(inner, inner).map(lambda p: f"nullif({p[0]}, {p[1]})"),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(numbers)
def test_the_rewritten_sql_means_the_same(text: str) -> None:
    """Precedence, nulls and signs survive: the original text is run by DuckDB itself for comparison."""
    table = "(VALUES (1.0, 2.0, NULL), (-3.0, 0.0, 1.0), (NULL, 4.0, 2.0)) AS v(a, b, c)"
    found = parse_expression(text, ["a", "b", "c"])
    query = "SELECT ({})::DOUBLE FROM (SELECT a::DOUBLE AS a, b::DOUBLE AS b, c::DOUBLE AS c FROM {})"
    expected = FREE.execute(query.format(text, table)).fetchall()
    assert FREE.execute(query.format(found.sql, table)).fetchall() == expected


def write_table(folder: Path) -> pa.Table:
    table = pa.table({"a": [1.0, None, 3.0], "b": [1, 2, 3]})
    pq.write_table(table, folder / "x.parquet")
    pyarrow.feather.write_feather(table, folder / "x.feather")
    (folder / "x.csv").write_text("a,b\n1.0,1\n,2\n3.0,3\n")
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return table


@pytest.mark.parametrize("name", ["x.parquet", "x.feather", "x.csv", "x.arrow"])
@pytest.mark.parametrize("count", [1, 3])
def test_tables_of_every_format_survive_the_lock(tmp_path: Path, name: str, count: int) -> None:
    table = write_table(tmp_path)
    with connect(threads=1, memory_limit="200MB") as connection:
        assert load_table(connection, "panel", [tmp_path / name] * count) == ["a", "b"]
        lock(connection)
        rows = connection.execute("SELECT a, b FROM panel").fetchall()
    assert rows == [tuple(row.values()) for row in table.to_pylist()] * count


def test_dates_of_a_csv_are_dates_where_all_are_iso(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,c,d\n2020-01-31,31-01-20,2020-01-31,1.10\n,,infinity,nan\n")
    with connect(threads=1, memory_limit="200MB") as connection:
        load_table(connection, "panel", [tmp_path / "x.csv"], ids=["d"])
        rows = connection.execute("SELECT a, b, c, d FROM panel").fetchall()
    assert rows == [(date(2020, 1, 31), "31-01-20", "2020-01-31", "1.10"), (None, None, "infinity", "nan")]


def test_odd_file_names(tmp_path: Path) -> None:
    write_table(tmp_path)
    for ending in ("parquet", "csv"):
        odd = tmp_path / f"it's [a] *.{ending}"
        (tmp_path / f"x.{ending}").rename(odd)
        with connect(threads=1, memory_limit="200MB") as connection:
            assert load_table(connection, "panel", [odd]) == ["a", "b"]


def test_wrong_tables(tmp_path: Path) -> None:
    write_table(tmp_path)
    (tmp_path / "other.csv").write_text("a,c\n1,2\n")
    (tmp_path / "broken.parquet").write_text("not parquet")
    pq.write_table(pa.table({"z": [1]}), tmp_path / "z.parquet")
    wrong = [
        ([], "no such file"),
        (["missing.csv"], "no such file"),
        (["x.csv", "x.parquet"], "format"),
        (["x.csv", "other.csv"], "cannot read"),
        (["x.parquet", "z.parquet"], "cannot read"),
        (["broken.parquet"], "cannot read"),
    ]
    for names, reason in wrong:
        with connect(threads=1, memory_limit="200MB") as connection, pytest.raises(PanelError, match=reason):
            load_table(connection, "panel", [tmp_path / name for name in names])


@pytest.mark.parametrize(
    "header", ["Bill_Amt,bill_amt,x", "x,bill_amt,bill_amt", "Bill_Amt,bill_amt,bill_amt_1", "Ä,ä,x"]
)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_that_sql_takes_for_one_are_refused(tmp_path: Path, header: str, ending: str) -> None:
    path, names = tmp_path / f"x.{ending}", header.split(",")
    if ending == "csv":
        path.write_text(f"{header}\n1,2,3\n")
    else:
        pq.write_table(pa.table([pa.array([i]) for i in range(3)], names=names), path)
    twice = len(set(names)) < len(names) and ending == "parquet"
    says = "duplicate field" if twice else "(?i)differ in case alone\n  got: (bill_amt, bill_amt|ä, ä)\n"
    with connect(threads=1, memory_limit="200MB") as connection, pytest.raises(PanelError, match=says):
        load_table(connection, "raw", [path])


@pytest.mark.parametrize("text", ["x,x_1,x_2\n1,2,3\n", "0,0,1\n2,2,3\n", "x,,\n1,,\n", "x,y,z\n"])
def test_names_that_only_look_as_if_they_met_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with connect(threads=1, memory_limit="200MB") as connection:
        assert len(load_table(connection, "raw", [tmp_path / "x.csv"])) == 3


@pytest.mark.parametrize("text", ["a,b\n1,2\n3,4\n5,6,7\n", "a,b\n1,2\na,b,c\n3,4,5\n", "a;b\n1;2\n3\n"])
def test_no_row_of_a_csv_is_taken_for_a_preamble(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    says = "some rows have more or fewer fields"
    with connect(threads=1, memory_limit="200MB") as connection, pytest.raises(PanelError, match=says):
        load_table(connection, "raw", [tmp_path / "x.csv"])


def test_no_row_of_a_csv_is_taken_for_a_comment(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,a\n#1,2\n#2,3\n3,4\n")
    with connect(threads=1, memory_limit="200MB") as connection:
        assert load_table(connection, "raw", [tmp_path / "x.csv"], ids=["id"]) == ["id", "a"]
        assert connection.execute("SELECT * FROM raw").fetchall() == [("#1", 2.0), ("#2", 3.0), ("3", 4.0)]


def test_why_a_csv_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"a,b\n1,\xff\xfe\n3,4\n")
    with connect(threads=1, memory_limit="200MB") as connection, pytest.raises(PanelError) as raised:
        load_table(connection, "raw", [tmp_path / "x.csv"])
    what, got = str(raised.value).split("\n")
    assert what == f"cannot read {tmp_path / 'x.csv'}"
    assert "Line: 2" in got and "not utf-8" in got and "Possible" not in got and "strict_mode" not in got


def test_nothing_gets_through_the_lock(tmp_path: Path) -> None:
    write_table(tmp_path)
    visible = pa.table({"secret": [1]})
    with connect(threads=1, memory_limit="200MB") as connection:
        load_table(connection, "panel", [tmp_path / "x.parquet"])
        lock(connection)
        for query in (
            "SELECT * FROM read_csv('/etc/passwd')",
            "SELECT * FROM read_text('/etc/passwd')",
            "SELECT * FROM '/etc/passwd'",
            "SELECT * FROM glob('/*')",
            f"SELECT * FROM read_parquet('{tmp_path}/x.parquet')",
            f"COPY panel TO '{tmp_path}/leak.csv'",
            f"COPY (SELECT 1) TO '{tmp_path}/x.parquet' (FORMAT parquet, USE_TMP_FILE false)",
            f"ATTACH '{tmp_path}/new.db'",
            f"EXPORT DATABASE '{tmp_path}/dump'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SET threads = 4",
            "SET enable_external_access = true",
            "SET lock_configuration = false",
            "RESET memory_limit",
            "PRAGMA enable_profiling",
            "SELECT getenv('HOME')",
            "SELECT * FROM visible",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(query)
        assert connection.execute("SELECT count(*) FROM panel").fetchone() == (3,)
    assert visible.num_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.arrow", "x.csv", "x.feather", "x.parquet"]
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 3
