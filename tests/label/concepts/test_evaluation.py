from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from label.concepts.evaluation import WORKER, columns_of, evaluate_concepts, make_job, make_task
from label.concepts.language import load_concepts
from label.concepts.library import Concept, ConceptLibrary
from label.concepts.safety import run_child
from sae.errors import ConceptError

Write = Callable[..., Path]
Row = dict[str, float | None]


class History:
    """One entity's rows by time: an oracle in plain Python that shares nothing with the SQL."""

    def __init__(self, rows: dict[int, Row]) -> None:
        self.rows = rows
        self.first = min(rows)

    def at(self, name: str, t: int) -> float | None:
        return self.rows[t][name] if t in self.rows else None

    def within(self, name: str, first: int, last: int) -> list[float]:
        """Return the values that are not null of the periods from first to last."""
        values = [self.at(name, t) for t in range(max(first, self.first), last + 1)]
        return [value for value in values if value is not None]

    def pr(self, t: int) -> float | None:
        pay, before = self.at("pay", t), self.at("bal", t - 1)
        return None if pay is None or before is None or before <= 0 else pay / before


def both(*values: bool | None) -> bool | None:
    """AND with SQL's three values."""
    return False if False in values else None if None in values else True


def when(value: float | None, check: Callable[[float], bool]) -> bool | None:
    return None if value is None else bool(check(value))


def worst_dpd_6m(h: History, t: int) -> float | None:
    return max(h.within("bkt", t - 5, t), default=None) if t - h.first >= 5 else None


def times30_12m(h: History, t: int) -> float | None:
    return float(sum(b >= 1 for b in h.within("bkt", t - 11, t))) if t - h.first >= 11 else None


def late_months(h: History, t: int) -> list[int]:
    return [s for s in range(h.first, t + 1) if (h.at("bkt", s) or 0) >= 1]


def months_since_delq(h: History, t: int) -> float | None:
    late = late_months(h, t)
    return float(t - late[-1]) if late else None


def clean_streak(h: History, t: int) -> float | None:
    late = late_months(h, t)
    return None if h.at("bkt", t) is None else float(t - (late[-1] if late else h.first - 1))


def status_full_payer_streak(h: History, t: int) -> float | None:
    broken = [s for s in h.rows if s <= t and (code := h.at("status", s)) is not None and code >= 0]
    return None if h.at("status", t) is None else float(t - max(broken, default=h.first - 1))


def roll_forward(h: History, t: int) -> bool | None:
    before = h.at("bkt", t - 1)
    return None if before is None else when(h.at("bkt", t), lambda b: b > before)


def cured(h: History, t: int) -> bool | None:
    return both(when(h.at("bkt", t), lambda b: b == 0), when(h.at("bkt", t - 1), lambda b: b >= 1))


def redefault(h: History, t: int) -> bool | None:
    if t - h.first < 2:
        return None
    relapse = any(cured(h, s) is True for s in range(t - 6, t) if s in h.rows)
    return both(when(h.at("bkt", t), lambda b: b >= 1), relapse)


def util_slope_6m(h: History, t: int) -> float | None:
    if t - h.first < 3:
        return None
    pairs = [
        (s, h.at("bal", s) / h.at("lim", s))  # type: ignore[operator]
        for s in range(t - 5, t + 1)
        if h.at("bal", s) is not None and h.at("lim", s) is not None
    ]
    return float(np.polyfit(*zip(*pairs, strict=True), 1)[0]) if len(pairs) > 1 else None


def pay_ratio(h: History, t: int) -> float | None:
    return h.pr(t)


def each(checks: Iterable[bool | None], enough: bool) -> bool | None:
    """Whether something holds in each month of a window; null where the history is short of it."""
    return both(*checks) if enough else None


def transactor(h: History, t: int) -> bool | None:
    return each([when(h.pr(s), lambda r: r >= 0.95) for s in range(t - 2, t + 1)], t - h.first >= 3)


def revolver(h: History, t: int) -> bool | None:
    months = range(t - 2, t + 1)
    under = [when(h.pr(s), lambda r: r < 0.95) for s in months]
    return each([*under, *(when(h.at("bal", s), lambda b: b > 0) for s in months)], t - h.first >= 3)


def chronic_late(h: History, t: int) -> bool | None:
    return each([when(h.at("bkt", s), lambda b: b >= 1) for s in range(t - 2, t + 1)], t - h.first >= 2)


def stagnant_bucket(h: History, t: int) -> bool | None:
    known = h.within("bkt", t - 2, t)
    same = None if len(known) < 3 and len(set(known)) < 2 else len(set(known)) == 1
    return each([same, when(h.at("bkt", t), lambda b: b >= 1)], t - h.first >= 2)


def status_minimum_3m(h: History, t: int) -> bool | None:
    return each([when(h.at("status", s), lambda x: x == 0) for s in range(t - 2, t + 1)], t - h.first >= 2)


def overspend_streak(h: History, t: int) -> bool | None:
    pairs = [(h.at("outflow", s), h.at("inflow", s)) for s in range(t - 2, t + 1)]
    return each([None if None in pair else pair[0] > pair[1] for pair in pairs], t - h.first >= 2)  # type: ignore[operator]


def min_payer(h: History, t: int) -> bool | None:
    pay, due, bal = h.at("pay", t), h.at("due", t - 1), h.at("bal", t - 1)
    about = None if pay is None or due is None else 0.9 * due <= pay <= 1.1 * due
    far = None if bal is None or due is None else bal > 2 * due
    return both(about, far, when(due, lambda d: d > 0))


def min_pay_streak_6m(h: History, t: int) -> float | None:
    known = [x for s in range(t - 5, t + 1) if s in h.rows and (x := min_payer(h, s)) is not None]
    return float(sum(known)) if known and t - h.first >= 6 else None


def missed_6m(h: History, t: int) -> float | None:
    months = [s for s in range(t - 5, t + 1) if s in h.rows]
    missed = [
        both(when(h.at("pay", s), lambda p: p == 0), when(h.at("bal", s - 1), lambda b: b > 0))
        for s in months
    ]
    known = [x for x in missed if x is not None]
    return float(sum(known)) if known and t - h.first >= 6 else None


def bal_volatility(h: History, t: int) -> float | None:
    values = h.within("bal", t - 5, t)
    if t - h.first < 5 or len(values) < 2 or np.mean(values) == 0:
        return None
    return float(np.std(values, ddof=1) / abs(np.mean(values)))


def gap_months(h: History, t: int) -> float | None:
    before = [s for s in h.rows if s < t]
    return float(t - max(before) - 1) if before else None


def income_loss(h: History, t: int) -> bool | None:
    if t - h.first < 3:
        return None
    before = [when(h.at("income", s), lambda i: i > 0) for s in range(t - 3, t)]
    return both(when(h.at("income", t), lambda i: i == 0), *before)


def cash_adv_streak(h: History, t: int) -> bool | None:
    return sum(c > 0 for c in h.within("cash", t - 2, t)) >= 2 if t - h.first >= 2 else None


def maxed_out(h: History, t: int) -> bool | None:
    pairs = [(h.at("bal", s), h.at("lim", s)) for s in range(t - 2, t + 1)]
    full = [None if None in pair else pair[0] / pair[1] >= 0.95 for pair in pairs]  # type: ignore[operator]
    return each(full, t - h.first >= 2)


def rate_shock(h: History, t: int) -> bool | None:
    before = h.at("rate", t - 12)
    return None if before is None else when(h.at("rate", t), lambda r: r - before > 2)


ORACLES = (
    worst_dpd_6m,
    times30_12m,
    months_since_delq,
    clean_streak,
    status_full_payer_streak,
    status_minimum_3m,
    chronic_late,
    stagnant_bucket,
    roll_forward,
    redefault,
    util_slope_6m,
    pay_ratio,
    transactor,
    revolver,
    min_payer,
    min_pay_streak_6m,
    missed_6m,
    overspend_streak,
    bal_volatility,
    gap_months,
    income_loss,
    cash_adv_streak,
    maxed_out,
    rate_shock,
)


@pytest.fixture(scope="module")
def concepts(credit: Path, uci_status: Path) -> tuple[Concept, ...]:
    return load_concepts([credit, uci_status]).concepts


@pytest.fixture(scope="module")
def values(concepts: Sequence[Concept], panel: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    out = tmp_path_factory.mktemp("values") / "concepts.parquet"
    evaluate_concepts(concepts, panel, out)
    return pq.read_table(out)


def histories(panel: Path) -> dict[int, History]:
    rows: dict[int, dict[int, Row]] = {}
    for row in pq.read_table(panel).to_pylist():
        rows.setdefault(row["entity"], {})[row["time"]] = row
    return {entity: History(own) for entity, own in rows.items()}


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.__name__)
def test_values_agree_with_plain_python(
    oracle: Callable[..., float | None], panel: Path, values: pa.Table
) -> None:
    known = histories(panel)
    got = values.column(oracle.__name__).to_pylist()
    keys = zip(values.column("entity").to_pylist(), values.column("time").to_pylist(), strict=True)
    expected = [oracle(known[entity], t) for entity, t in keys]
    assert [value is None for value in got] == [value is None for value in expected]
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None]
    assert len({round(float(a), 6) for a, _ in pairs}) > 1, "the oracle must see more than one value"
    np.testing.assert_allclose(*np.array(pairs, dtype=float).T, rtol=1e-9, atol=1e-12)


def test_the_layout(concepts: Sequence[Concept], panel: Path, values: pa.Table) -> None:
    source = pq.read_table(panel, columns=["entity", "time"])
    assert values.select(["entity", "time"]).equals(source)
    assert values.column_names == ["entity", "time", *(concept.id for concept in concepts)]
    for concept in concepts:
        assert values.schema.field(concept.id).type == (
            pa.bool_() if concept.type == "bool" else pa.float64()
        )


def test_every_concept_of_the_library_says_something(concepts: Sequence[Concept], values: pa.Table) -> None:
    """On a panel with every column, all but the rarest compound concept take at least two values."""
    dull = {c.id for c in concepts if len(values.column(c.id).drop_null().unique()) < 2}
    rare = {"bust_out", "low_use", "forb_exit", "modified_ever", "roll_straight", "status_inactive_6m"}
    assert dull <= rare


def small_panel(path: Path, times: Sequence[int], **columns: Sequence[float | None]) -> Path:
    table = {"entity": pa.array([0] * len(times), pa.int64()), "time": pa.array(list(times), pa.int64())}
    table |= {name: pa.array(list(own), pa.float64()) for name, own in columns.items()}
    pq.write_table(pa.table(table), path)
    return path


def compute(concepts: Sequence[Concept], panel: Path, out: Path, *ids: str) -> dict[str, list[float | None]]:
    chosen = [concept for concept in concepts if not ids or concept.id in ids]
    evaluate_concepts(chosen, panel, out, threads=1)
    return pq.read_table(out).to_pydict()


def test_what_holds_in_each_of_several_months_needs_all_of_them_known(
    concepts: Sequence[Concept], tmp_path: Path
) -> None:
    """A gap at 3 and an unknown limit at 8; what is paid is known from 1 on."""
    times = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    lim, bal = [1000.0 if t != 8 else None for t in times], [5.0] * len(times)
    panel = small_panel(tmp_path / "p.parquet", times, bal=bal, lim=lim, pay=bal)
    got = compute(concepts, panel, tmp_path / "o.parquet", "transactor", "low_use")
    assert got["transactor"] == [True if t >= 7 else None for t in times]
    assert got["low_use"] == [True if t == 14 else None for t in times]


def test_a_bust_out_pays_nothing_now_whatever_it_paid_before(
    concepts: Sequence[Concept], tmp_path: Path
) -> None:
    """Quiet for a year and paid in full, then the limit is drawn and nothing paid."""
    bal, pay = [100.0] * 14 + [900, 950, 960], [100.0] * 14 + [100, 0, 0]
    panel = small_panel(tmp_path / "p.parquet", range(17), bal=bal, lim=[1000.0] * 17, pay=pay)
    got = compute(concepts, panel, tmp_path / "o.parquet", "bust_out")["bust_out"]
    assert [t for t, value in enumerate(got) if value] == [15]


def test_loans_in_sequence_are_a_product_of_their_own(concepts: Sequence[Concept], tmp_path: Path) -> None:
    ids = ["repeat_borrower", "loan_step_up"]
    library = ConceptLibrary(tuple(concepts))
    monthly, _ = library.applicable("installment", ["orig", "bal"])
    loans, _ = library.applicable("loan_sequence", ["orig", "bal"])
    assert not {concept.id for concept in monthly} & set(ids)
    assert {concept.id for concept in loans} >= set(ids)
    panel = small_panel(tmp_path / "p.parquet", [1, 2, 3], orig=[500, 1000, 1100], bal=[500, 1000, 9000])
    got = compute(concepts, panel, tmp_path / "o.parquet", *ids)
    assert (got["repeat_borrower"], got["loan_step_up"]) == ([0, 1, 2], [None, True, False])


def test_gaps_history_and_nulls(write: Write, tmp_path: Path) -> None:
    file = write("""
helpers: {twice: 2 * lag(bkt) OVER w}
concepts:
  - {id: lag1, text: A, expr: lag(bkt) OVER w, kind: point}
  - {id: lag2, text: A, expr: "lag(bkt, 2) OVER w", kind: point}
  - {id: through_helper, text: A, expr: twice, kind: point}
  - {id: sum3, text: A, expr: sum(bkt) OVER w3, kind: window}
  - {id: sum3_early, text: A, expr: sum(bkt) OVER w3, kind: window, min_history: 1}
  - {id: sum3_late, text: A, expr: sum(bkt) OVER w3, kind: window, min_history: 8}
  - {id: before, text: A, expr: sum(bkt) OVER w3p, kind: window}
  - {id: rows, text: A, expr: row_number() OVER w, kind: point}
  - {id: ratio, text: A, expr: bkt / bal, kind: point}
  - {id: huge, text: A, expr: exp(1000 * bkt), kind: point}
  - {id: log, text: A, expr: ln(bkt - 2), kind: point}
  - {id: next3, text: A, expr: max(bkt) OVER n3, kind: outcome}
  - {id: lead1, text: A, expr: lead(bkt) OVER w, kind: outcome}
""")
    times = [10, 11, 13, 14, 15, 18]
    panel = small_panel(
        tmp_path / "p.parquet", times, bkt=[1, 2, 3, None, 5, 6], bal=[0, 2, math.nan, 4, math.inf, 3]
    )
    got = compute(load_concepts([file]).concepts, panel, tmp_path / "out.parquet")
    assert got["lag1"] == [None, 1, None, 3, None, None]
    assert got["lag2"] == [None, None, 2, None, 3, None]
    assert got["through_helper"] == [None, 2, None, 6, None, None]
    assert got["sum3"] == [None, None, 5, 3, 8, 6]
    assert got["sum3_early"] == [1, 3, 5, 3, 8, 6]
    assert got["sum3_late"] == [None, None, None, None, None, 6]
    assert got["before"] == [None, None, 3, 5, 3, 5]
    assert got["rows"] == [1, 2, 3, 4, 5, 6]
    assert got["ratio"] == [None, 1, None, None, None, 2]
    assert got["huge"] == [None] * 6
    assert got["log"] == [None, None, 0, None, pytest.approx(math.log(3)), pytest.approx(math.log(4))]
    assert got["next3"] == [3, 3, 5, 5, 6, None]
    assert got["lead1"] == [2, None, None, 5, None, None]


def test_audit_columns_and_outcomes_are_not_loaded(concepts: Sequence[Concept]) -> None:
    assert not {"outcome", "split", "inner", "audit_sex"} & set(columns_of(concepts))
    query = make_task(concepts, out=None)["query"]
    assert "outcome" not in query and "audit_" not in query and "panel /*rows*/" in query


def test_the_same_file_every_time_and_by_any_blocks(
    concepts: Sequence[Concept], panel: Path, values: pa.Table, tmp_path: Path
) -> None:
    again = tmp_path / "again.parquet"
    evaluate_concepts(concepts, panel, again)
    assert pq.read_table(again).equals(values)
    assert [path.name for path in tmp_path.iterdir()] == ["again.parquet"]
    task = make_task(concepts, out=tmp_path / "blocks.parquet")
    job = job_of(concepts, panel, tmp_path, [task]) | {"rows_at_once": 100}
    run_child(WORKER, job, timeout_s=120)
    blocks = pq.read_table(tmp_path / "blocks.parquet")
    assert pq.ParquetFile(tmp_path / "blocks.parquet").num_row_groups > 5
    assert blocks.select(["entity", "time"]).equals(values.select(["entity", "time"]))
    for concept in concepts:
        one, other = (
            np.array(table.column(concept.id).to_pylist(), dtype=float) for table in (values, blocks)
        )
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9, err_msg=concept.id)


def job_of(concepts: Sequence[Concept], panel: Path, folder: Path, tasks: list[dict]) -> dict:  # type: ignore[type-arg]
    return make_job(
        panel,
        tasks,
        columns=columns_of(concepts),
        folder=folder,
        timeout_s=60,
        memory_limit="1GB",
        threads=1,
    )


def smuggle(write: Write, sql: str) -> Concept:
    """Return a concept whose SQL never went through the allow-list, to try the walls behind it."""
    concept = load_concepts([write("concepts: [{id: bad, text: A, expr: bkt, kind: point}]")]).concepts[0]
    return concept.model_copy(update={"expression": dataclasses.replace(concept.expression, sql=sql)})


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("(SELECT count(*) FROM read_csv('/etc/passwd'))", "disabled by configuration"),
        ("(SELECT count(*) FROM glob('/*'))", "disabled by configuration"),
        ("getenv('HOME')", "does not exist"),
        ("(SELECT count(*) FROM visible)", "does not exist"),
        ("length(repeat(repeat('a', 100000), 100000 + bkt::INT))", "(memory|allocat|maximum)"),
        ("(SELECT max(list_sum(range(x * 100000000))) FROM range(1, 30) r(x))", "(memory|allocat)"),
        ("CAST('x' || bkt AS INTEGER)", "could not convert"),
    ],
)
def test_behind_the_allow_list_the_lock_and_the_limits_hold(
    write: Write, panel: Path, tmp_path: Path, sql: str, reason: str
) -> None:
    good = load_concepts([write("concepts: [{id: good, text: A, expr: bkt, kind: point}]", name="g.yaml")])
    out = tmp_path / "out.parquet"
    with pytest.raises(ConceptError, match=rf"(?is)concept bad.*{reason}"):
        evaluate_concepts(
            [*good.concepts, smuggle(write, sql)], panel, out, memory_limit="300MB", timeout_s=60
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["concepts.yaml", "g.yaml"]


def test_a_cpu_bomb_is_stopped(write: Write, panel: Path, tmp_path: Path) -> None:
    bomb = smuggle(
        write, "(SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE sqrt(a.range * b.range) = 0.5)"
    )
    with pytest.raises(ConceptError, match=r"the concepts took longer than 12 s"):
        evaluate_concepts([bomb], panel, tmp_path / "out.parquet", timeout_s=12)
    assert not (tmp_path / "out.parquet").exists()


def test_a_child_that_dies_is_an_error(panel: Path) -> None:
    with pytest.raises(ConceptError, match=r"(?s)ended the process.*exit status 1: .*no_such_module"):
        run_child("no_such_module", {}, timeout_s=30)


def test_wrong_calls(write: Write, panel: Path, tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="no concept applies"):
        evaluate_concepts([], panel, tmp_path / "out.parquet")
    concepts = load_concepts([write("concepts: [{id: a, text: A, expr: bkt, kind: point}]")]).concepts
    thin = small_panel(tmp_path / "thin.parquet", [1], bal=[1])
    with pytest.raises(ConceptError, match=r"(?s)lacks columns.*bkt"):
        evaluate_concepts(concepts, thin, tmp_path / "out.parquet")
    with pytest.raises(ConceptError, match="no such file"):
        evaluate_concepts(concepts, tmp_path / "none.parquet", tmp_path / "out.parquet")
    with pytest.raises(ConceptError, match="no rows"):
        evaluate_concepts(concepts, small_panel(tmp_path / "e.parquet", [], bkt=[]), tmp_path / "out.parquet")
    with pytest.raises(ConceptError, match="memory limit cannot be read"):
        evaluate_concepts(concepts, panel, tmp_path / "out.parquet", memory_limit="lots")
    assert not (tmp_path / "out.parquet").exists()
