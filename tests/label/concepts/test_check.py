from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy.stats import spearmanr

from label.concepts.check import CheckReport, check_concepts, check_library, leaking
from label.concepts.language import load_concepts
from label.concepts.library import Concept, ConceptLibrary
from label.concepts.redundancy import nearest, similarities
from label.concepts.rendering import render
from label.concepts.windows import Frame
from sae.errors import ConceptError

Write = Callable[..., Path]


def smuggle(concept: Concept, sql: str, **frames: Frame) -> Concept:
    """Return the concept with SQL and windows that never went through the allow-list."""
    expression = dataclasses.replace(concept.expression, sql=sql)
    return concept.model_copy(update={"expression": expression, "frames": frames})


def test_the_leak_test_catches_what_looks_ahead(write: Write, panel: Path) -> None:
    listed = "".join(
        f"  - {{id: {name}, text: A, expr: bkt, kind: {kind}}}\n"
        for name, kind in [
            ("honest", "point"),
            ("next_month", "point"),
            ("centred_mean", "window"),
            ("whole_life", "window"),
            ("panel_mean", "point"),
            ("rank_in_life", "point"),
            ("future", "outcome"),
        ]
    )
    library = load_concepts([write("concepts:\n" + listed)])
    life = "(PARTITION BY entity ORDER BY time ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)"
    leaks = [
        library["honest"],
        smuggle(library["next_month"], 'max(bkt) OVER "x"', x=Frame(1, 1)),
        smuggle(library["centred_mean"], 'avg(bkt) OVER "x"', x=Frame(-1, 1)),
        smuggle(library["whole_life"], f"max(bkt) OVER {life}"),
        smuggle(library["panel_mean"], "bkt - avg(bkt) OVER ()"),
        smuggle(library["rank_in_life"], "percent_rank() OVER (PARTITION BY entity ORDER BY time)"),
        smuggle(library["future"], 'max(bkt) OVER "x"', x=Frame(1, 1)),
    ]
    report = check_library(ConceptLibrary(tuple(leaks)), panel, "revolving", threads=1)
    assert report.leaking == ["next_month", "centred_mean", "whole_life", "panel_mean", "rank_in_life"]
    assert len(report.cuts) == 4
    warned = {check.concept.id: check.warnings for check in report.checks}
    assert "looks ahead: values up to" in warned["next_month"][0]
    assert not any("looks ahead" in warning for warning in warned["future"])


def test_leaking_tolerates_rounding_and_nothing_else(write: Write) -> None:
    concepts = load_concepts([write("concepts: [{id: a, text: A, expr: bkt, kind: point}]")]).concepts

    def table(values: list[float | None]) -> pa.Table:
        n = len(values)
        return pa.table({"entity": [0] * n, "time": list(range(n)), "a": pa.array(values, pa.float64())})

    full = table([1000.0, None, 1e-12, 5.0])
    assert leaking(full, table([1000.0 * (1 + 1e-10), None, 0.0]), 2, concepts) == []
    assert leaking(full, table([1000.0 * (1 + 1e-8), None, 0.0]), 2, concepts) == ["a"]
    assert leaking(full, table([1000.0, 0.0, 1e-12]), 2, concepts) == ["a"]
    assert leaking(full, table([1000.0, None, None]), 2, concepts) == ["a"]


def test_the_ninety_on_a_full_panel(credit: Path, uci_status: Path, panel: Path) -> None:
    report = check_concepts([credit, uci_status], panel, "revolving")
    everything = load_concepts([credit, uci_status]).concepts
    assert sum(concept.file == str(credit) for concept in everything) == 90
    assert 8 <= sum(concept.file == str(uci_status) for concept in everything) <= 14
    assert report.leaking == []
    installment = {"prepaid_early", "late_habit", "repeat_borrower", "loan_step_up", "amort_pct", "ltv_now"}
    assert {item.id for item in report.not_applicable} == installment
    assert len(report.checks) + len(installment) == len(everything)
    assert not [c.concept.id for c in report.checks if any("never applies" in w for w in c.warnings)]
    assert all(check.seconds > 0 for check in report.checks)
    text = plain(report)
    assert (
        "none looks ahead" in text
        and "util_slope_6m" in text
        and "prepaid_early: meant for installment" in text
    )


def plain(report: CheckReport) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(render(report))
    return console.file.getvalue()


def test_what_is_said_of_each_concept(write: Write, panel: Path) -> None:
    path = write("""
concepts:
  - {id: late, text: A, expr: bkt >= 1, kind: point}
  - {id: not_late, text: A, expr: not bkt >= 1, kind: point}
  - {id: level, text: A, expr: bkt, kind: point}
  - {id: always, text: A, expr: bkt >= 0, kind: point}
  - {id: rare, text: A, expr: bkt = 6 AND bal < -900, kind: point}
  - {id: never, text: A, expr: max(bkt) OVER w12, kind: window, min_history: 100}
  - {id: other, text: A, expr: bkt, kind: point, products: [mortgage]}
""")
    report = check_concepts([path], panel, "revolving", prevalence_limits=(0.05, 0.9))
    found = {check.concept.id: check for check in report.checks}
    bkt = pq.read_table(panel).column("bkt")
    assert found["late"].prevalence == pytest.approx(
        pc.mean(pc.cast(pc.greater_equal(bkt, 1), "float64")).as_py()
    )
    assert found["late"].nulls == pytest.approx(bkt.null_count / len(bkt)) and found["late"].quartiles is None
    expected = tuple(np.quantile(bkt.drop_null().to_numpy(), [0, 0.25, 0.5, 0.75, 1]))
    assert found["level"].quartiles == expected and found["level"].prevalence is None
    assert found["late"].neighbour == "not_late" and found["late"].similarity == pytest.approx(1)
    assert "nearly the same as not_late (1.000)" in found["late"].warnings
    assert found["always"].warnings == ("constant: always 1",) and found["always"].neighbour is None
    assert any("prevalence" in warning for warning in found["rare"].warnings)
    assert found["never"].warnings == ("never applies: all null (needs 100 periods)",)
    assert [item.id for item in report.not_applicable] == ["other"]
    text = plain(report)
    assert "constant: always 1" in text and "not_late 1.00" in text


def test_a_sample_takes_whole_entities(write: Write, panel: Path) -> None:
    path = write("concepts: [{id: a, text: A, expr: row_number() OVER w, kind: point}]")
    total = pq.ParquetFile(panel).metadata.num_rows
    report = check_concepts([path], panel, "revolving", max_rows=total // 2)
    assert report.rows_total == total and 0.2 * total < report.rows < 0.8 * total
    assert f"of {total:,} rows" in plain(report)


def test_similarities_are_spearman_and_phi() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=5000)
    columns = np.stack(
        [
            x,
            x**3 + generator.normal(size=5000),
            (x > 1).astype(float),
            (x > 0.5).astype(float),
            np.ones(5000),
        ],
        axis=1,
    )
    table = similarities(columns)
    np.testing.assert_allclose(table[:4, :4], np.abs(spearmanr(columns[:, :4]).statistic), atol=1e-9)
    both, one, other = np.mean(columns[:, 2] * columns[:, 3]), columns[:, 2].mean(), columns[:, 3].mean()
    phi = (both - one * other) / np.sqrt(one * (1 - one) * other * (1 - other))
    assert table[2, 3] == pytest.approx(phi)
    assert np.isnan(table[4]).all()
    columns[:4950, 0] = np.nan
    assert np.isnan(similarities(columns)[0]).all(), "too few rows in common"
    assert nearest({"a": columns[:, 2], "b": columns[:, 3], "c": columns[:, 4]}) == {
        "a": ("b", pytest.approx(phi)),
        "b": ("a", pytest.approx(phi)),
    }


def test_wrong_panels(write: Write, panel: Path, tmp_path: Path) -> None:
    path = write("concepts: [{id: a, text: A, expr: bkt, kind: point, products: [mortgage]}]")
    with pytest.raises(ConceptError, match=r"(?s)no concept applies.*meant for mortgage"):
        check_concepts([path], panel, "revolving")
    (tmp_path / "bad.parquet").write_text("no")
    for wrong in ("bad.parquet", "missing.parquet"):
        with pytest.raises(ConceptError, match="cannot read the panel"):
            check_concepts([path], tmp_path / wrong, "mortgage")


@pytest.mark.parametrize(
    ("calendar", "shown"), [("month", "2020-03"), ("day", "2036-05-16"), (None, "24242")]
)
def test_cuts_are_shown_as_people_write_them(calendar: str | None, shown: str) -> None:
    assert f"(cut at {shown})" in plain(CheckReport((), (), 0, 0, (24242,), 0.0, calendar))


def test_whether_times_were_dates_is_read_beside_the_panel(write: Write, panel: Path, tmp_path: Path) -> None:
    path = write("concepts: [{id: a, text: A, expr: bkt, kind: point}]")
    assert check_concepts([path], panel, "revolving").calendar is None
    shutil.copy(panel, tmp_path / "panel.parquet")
    (tmp_path / "profile.json").write_text('{"format_version": 1, "calendar": "month"}')
    assert check_concepts([path], tmp_path / "panel.parquet", "revolving").calendar == "month"


def test_uci(uci: Path, credit: Path, uci_status: Path, tmp_path: Path) -> None:
    raw = pq.read_table(uci).slice(0, 12_000)
    raw = raw.sort_by([("client_id", "ascending"), ("t", "ascending")])
    status = pc.cast(raw.column("pay_status"), pa.float64())
    columns = {
        "entity": pc.cast(raw.column("client_id"), pa.int64()),
        "time": pc.cast(raw.column("t"), pa.int64()),
        "status": status,
        "bkt": pc.max_element_wise(status, 0.0),
        "bal": pc.cast(raw.column("bill_amt"), pa.float64()),
        "lim": pc.cast(raw.column("limit_bal"), pa.float64()),
        "pay": pc.cast(raw.column("pay_amt"), pa.float64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "panel.parquet")
    report = check_concepts([credit, uci_status], tmp_path / "panel.parquet", "revolving")
    found = {check.concept.id: check for check in report.checks}
    assert report.leaking == [] and len(found) > 50
    values = np.array(status)
    assert found["status_minimum_paid"].prevalence == pytest.approx((values == 0).mean())
    assert found["dpd30_now"].prevalence == pytest.approx((values >= 1).mean())
    assert found["worst_dpd_6m"].nulls == pytest.approx(5 / 6)
    assert any("all null" in warning for warning in found["times30_12m"].warnings)
