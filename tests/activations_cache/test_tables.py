"""Which files a path names, in which order, and which period a time is, or that it cannot be told."""

from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activations_cache import sql
from activations_cache.tables import find_files, time_expression, written_period
from sae.errors import PanelError


def period(year, month):
    return year * 12 + month - 1


def day(*when):
    return (date(*when) - date(1970, 1, 1)).days


def periods(paths, kind="month"):
    with sql.connect(threads=1, memory_limit="200MB") as connection:
        sql.load_table(connection, "raw", paths, ids=["who"])
        time = time_expression(connection, "raw", "when", kind, files=paths)
        return [row[0] for row in connection.execute(f"SELECT {time} FROM raw").fetchall()]


def write(path, values):
    if path.suffix == ".csv":
        path.write_text("who,when,x\n" + "".join(f"a{i},{v},1\n" for i, v in enumerate(values)))
    else:
        pq.write_table(pa.table({"when": values}), path)
    return path


def test_numbers_in_names_sort_by_their_value(tmp_path):
    names = ["2/a10", "10/a2", "2/a9b", "2/a9", "2/a09", "a"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "*" / "*"), str(tmp_path / "a")])
    shown = [str(path.relative_to(tmp_path)) for path in found]
    assert shown == ["2/a09", "2/a9", "2/a9b", "2/a10", "10/a2", "a"]


def test_a_file_that_is_named_twice_is_refused(tmp_path, monkeypatch):
    for name in ("a2020", "a2021"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for patterns in (
        ["a20*", "*2021"],
        [str(tmp_path / "a2021"), "a2021"],
        ["a2021", f"../{tmp_path.name}/a2021"],
    ):
        with pytest.raises(PanelError, match=r"(?s)more than once.*/a2021\n"):
            find_files(patterns)


FORMS = {
    "2020-01": (2020, 1, 1),
    "  2020-01 ": (2020, 1, 1),
    "2020-01-31": (2020, 1, 31),
    "2020-01-31 12:00:00": (2020, 1, 31),
    "2020-01-31T12:00:00": (2020, 1, 31),
    "2020-01-31T12:00:00.25Z": (2020, 1, 31),
    # as the column's own clocks show it
    "2020-01-31T23:30:00-05:00": (2020, 1, 31),
}


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("kind", ["string", "dictionary"])
def test_text_that_is_read(tmp_path, text, kind):
    values = pa.array([text, None])
    path = write(tmp_path / "a.parquet", values if kind == "string" else values.dictionary_encode())
    year, month, of_month = FORMS[text]
    assert periods([path]) == [period(year, month), None]
    assert periods([path], "day") == [day(year, month, of_month), None]


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2020-01", (2020, 1, 1)),
        ("2020-01-31", (2020, 1, 31)),
        ("2020-01-31 12:00:00", (2020, 1, 31)),
        ("2020-01-31T12:00:00", (2020, 1, 31)),
        ("2020-01-31T12:00:00.25Z", (2020, 1, 31)),
        # UTC in CSV
        ("2020-01-31T23:30:00-05:00", (2020, 2, 1)),
    ],
)
def test_csv_that_is_read(tmp_path, text, when):
    path = write(tmp_path / "a.csv", [text, text])
    assert periods([path]) == [period(*when[:2])] * 2
    assert periods([path], "day") == [day(*when)] * 2


@pytest.mark.parametrize(
    "text",
    ["31-01-20", "01-02-20", "31/01/2020", "01/02/2020", "01/31/2020", "31/01/2020 12:00:00", "31.01.2020", "-001-01",
     "epoch", "infinity", "2020-13", "2020-02-30", "2020-01-31x", "2020-01-31 noon", "Jan 2020"],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_what_would_be_a_guess_is_not_read(tmp_path, text, ending):
    assert periods([write(tmp_path / f"a.{ending}", [text, text])]) == [None, None]


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([202012, 202101], "YYYYMM"),
        ([202012.0, None], "YYYYMM"),
        ([20201231, 20210101], "YYYYMMDD"),
    ],
)
@pytest.mark.parametrize("kind", ["month", "day"])
def test_integers_that_are_dates_are_not_counts_of_periods(tmp_path, values, form, kind):
    with pytest.raises(PanelError, match=f"when are dates, {form},"):
        periods([write(tmp_path / "a.parquet", pa.array(values))], kind)


@pytest.mark.parametrize(
    "values", [[202012, 202013], [202012, 3], [20201231, 20201232], [0, 1], [24240, 24251]]
)
def test_other_integers_count_as_they_stand(tmp_path, values):
    assert periods([write(tmp_path / "a.parquet", pa.array(values))]) == values
    assert periods([write(tmp_path / "b.parquet", pa.array([None, None], pa.int64()))]) == [None, None]


@pytest.mark.parametrize("when", [(1965, 1, 31), (1970, 1, 1), (2020, 12, 31), (2024, 2, 29)])
def test_periods_are_written_as_their_dates(when):
    assert written_period(period(*when[:2]), "month") == f"{date(*when):%Y-%m}"
    assert written_period(day(*when), "day") == date(*when).isoformat()
    assert written_period(24242, None) == "24242"


@pytest.mark.parametrize(
    ("zone", "expected"),
    [("+02:00", day(2020, 2, 1)), ("+0530", day(2020, 2, 1)), ("-05:30", day(2020, 1, 31)), ("UTC", day(2020, 1, 31)),
     ("Europe/Berlin", day(2020, 2, 1))],
)  # fmt: skip
@pytest.mark.parametrize("unit", ["us", "ns"])
def test_times_belong_to_the_day_of_their_zone(tmp_path, zone, expected, unit):
    at = pa.array([np.datetime64("2020-01-31T23:00").astype(f"M8[{unit}]").astype(int)])
    path = write(tmp_path / "a.parquet", at.cast(pa.timestamp(unit, zone)))
    assert periods([path], "day") == [expected]


@pytest.mark.parametrize("zone", [None, "UTC", "+00:00"])
def test_the_last_nanosecond_of_a_day_before_1970_is_that_day(tmp_path, zone):
    last = np.datetime64("1965-01-31T23:59:59.999999999").astype(int)
    path = write(tmp_path / "a.parquet", pa.array([last, last + 1]).cast(pa.timestamp("ns", zone)))
    assert periods([path]) == [period(1965, 1), period(1965, 2)]


@pytest.mark.parametrize(
    ("zones", "says"),
    [
        (["UTC", "Europe/Berlin"], "differ in the time zone"),
        ([None, "Europe/Berlin"], "differ in the time zone"),
        (["Atlantis"], "'Atlantis'"),
    ],
)
def test_zones_that_differ_or_are_not_known_are_refused(tmp_path, zones, says):
    with pytest.raises(PanelError, match=says):
        periods(epochs(tmp_path, zones))


def test_a_time_without_a_zone_counts_as_utc(tmp_path):
    assert periods(epochs(tmp_path, [None, "UTC"])) == [period(1970, 1)] * 2


def epochs(folder, zones):
    at = pa.array([0])
    return [write(folder / f"{i}.parquet", at.cast(pa.timestamp("us", z))) for i, z in enumerate(zones)]
