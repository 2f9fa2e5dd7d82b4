from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from label.concepts.language import load_concepts
from label.concepts.windows import STANDARD
from sae.errors import ConceptError

Write = Callable[..., Path]


def problems_of(*paths: Path) -> str:
    with pytest.raises(ConceptError) as caught:
        load_concepts(paths)
    return str(caught.value)


def test_a_concept_is_compiled(write: Write) -> None:
    path = write("""
windows: {w4: {months: 4}, old: {from: start, before: 12}}
helpers:
  half_x: pr_x / 2
  pr_x: pay / lag(bal) OVER w
concepts:
  - {id: a, text: A, expr: max(half_x) OVER w4 > 1, kind: window, risk: up, category: c, owner: me}
  - {id: b, text: B, expr: bkt + 1, kind: point, type: float, products: [mortgage], min_history: 9}
  - {id: c, text: C, expr: max(bkt) OVER old, kind: since}
  - {id: d, text: D, expr: "max(bkt) OVER n12 >= 3 OR lead(bkt, 14) OVER w = 5", kind: outcome}
""")
    library = load_concepts([path])
    a, b, c, d = library.concepts
    assert (a.type, a.history, a.ahead, a.columns) == ("bool", 4, 0, {"pay", "bal"})
    assert [helper.name for helper in a.helpers] == ["pr_x", "half_x"]
    assert set(a.frames) == {"w4", "lag_1"} and a.risk == "up" and a.owner == "me"
    assert (b.type, b.history, b.products) == ("float", 9, ("mortgage",))
    assert (c.history, c.frames["old"].sql.split("RANGE ")[1]) == (
        1,
        "BETWEEN UNBOUNDED PRECEDING AND 12 PRECEDING)",
    )
    assert (d.kind, d.ahead) == ("outcome", 14)
    assert library["c"] is c


def test_the_standard_windows() -> None:
    expected = {
        "w": (None, 0), "wc": (None, 0), "wp": (None, -1),
        "w2": (-1, 0), "w3": (-2, 0), "w6": (-5, 0), "w12": (-11, 0),
        "w3p": (-3, -1), "w6p": (-6, -1), "wq": (-5, -3), "w3l": (-3, -1), "w12p2": (-13, -2),
    }  # fmt: skip
    assert {name: (frame.first, frame.last) for name, frame in STANDARD.items()} == expected
    assert {name: STANDARD[name].history for name in ("w6", "w6p", "wq", "w12p2", "wp")} == {
        "w6": 6, "w6p": 7, "wq": 6, "w12p2": 14, "wp": 1,
    }  # fmt: skip


def test_every_problem_of_every_file_at_once(write: Write, tmp_path: Path) -> None:
    good = write("concepts: [{id: same, text: A, expr: bkt >= 1, kind: point}]", name="good.yaml")
    bad = write(
        """
windows: {w6: {months: 4}, wx: {months: 4, from: start}, wy: {ahead: 3}, lag_1: {months: 1}, wz: {months: -1}}
concepts: []
""",
        name="bad.yaml",
    )
    worse = write(
        """
windows: {lag_1: {months: 1}, w6: {months: 4}}
helpers: {h1: h2, h2: h1, h3: lead(bkt) OVER w, h4: "'text'", bal: bkt, outcome: bkt}
concepts:
  - {id: a, text: A, expr: bkt, kind: point}
  - {id: b, text: B, expr: bkt >= 1, kind: point, type: float}
  - {id: Bad-Id, text: C, expr: bkt >= 1, kind: points, weight: 1}
  - {id: c, text: C, expr: max(bkt) OVER n12 >= 3, kind: window}
  - {id: d, text: D, expr: sex = 2, kind: point}
  - {id: e, text: E, expr: audit_sex = 2, kind: point}
  - {id: f, text: F, expr: lead(bkt) OVER w, kind: event}
  - {id: g, text: G, expr: upper('a'), kind: event}
  - {id: h, text: H, expr: "bkt >= 'x' || 1", kind: event}
  - {id: time, text: H, expr: bkt, kind: event}
  - {text: I, expr: bkt, kind: event}
  - 17
  - {id: same, text: A, expr: bkt >= 1, kind: point}
""",
        name="worse.yaml",
    )
    text = problems_of(good, bad, worse, tmp_path / "missing.yaml")
    for expected in (
        "bad.yaml: windows.wx: Value error, give either `months` or `from: start`",
        "bad.yaml: windows.wy.ahead: Extra inputs are not permitted",
        "bad.yaml: windows.wz.months: ",
        "bad.yaml: concepts: List should have at least 1 item",
        "worse.yaml: window lag_1: the name is taken",
        "worse.yaml: window w6: the name is taken",
        "worse.yaml: helper h1: it needs itself",
        "worse.yaml: helper h3: the function 'lead' looks ahead",
        "worse.yaml: helper h4: its type is varchar",
        "worse.yaml: helper bal: a column has this name",
        "worse.yaml: helper outcome: the name is reserved",
        "worse.yaml: concept b: its type is bool, not float",
        "worse.yaml: concept Bad-Id: id: ",
        "worse.yaml: concept Bad-Id: kind: ",
        "worse.yaml: concept Bad-Id: weight: Extra inputs",
        "worse.yaml: concept c: unknown window 'n12': looking ahead is for `kind: outcome` only",
        "worse.yaml: concept d: unknown column 'sex'",
        "worse.yaml: concept e: unknown column 'audit_sex'",
        "worse.yaml: concept f: the function 'lead' looks ahead",
        "worse.yaml: concept g: its type is varchar",
        "worse.yaml: concept h: the function '||' is not allowed",
        "worse.yaml: concept time: the id is reserved",
        "worse.yaml: concept number 11: id: Field required",
        "worse.yaml: concept number 12: ",
        "no concept file at",
        "worse.yaml: concept same: defined before in ",
    ):
        assert expected in text, expected
    assert "good.yaml: " not in text


def test_columns_that_concepts_may_never_read(write: Write) -> None:
    path = write(
        "concepts: [{id: a, text: A, expr: audit_sex = 1, kind: point, products: [any]}]",
        head="version: 1\ncolumns: {audit_sex: s, outcome: o, split: s, entity: e, t: t, time: t, X: y}\n",
    )
    text = problems_of(path)
    for name in ("audit_sex", "outcome", "split", "entity", "t", "time"):
        assert f"column {name}: the name is reserved" in text
    assert "column 'X': a name is" in text


def test_files_must_agree(write: Write) -> None:
    one = write("helpers: {h: bal / lim}\nconcepts: [{id: a, text: A, expr: h, kind: point}]", name="1.yaml")
    two = write("helpers: {h: bal / pay}\nconcepts: [{id: b, text: A, expr: h, kind: point}]", name="2.yaml")
    three = write(
        "helpers: {h: (bal / lim)}\nconcepts: [{id: c, text: A, expr: h, kind: point}]", name="3.yaml"
    )
    assert "2.yaml: helper h: defined differently in" in problems_of(one, two)
    assert len(load_concepts([one, three]).concepts) == 2


def test_a_helper_is_no_column_of_another_file(write: Write) -> None:
    one = write("helpers: {h: bal / lim}\nconcepts: [{id: a, text: A, expr: h, kind: point}]", name="1.yaml")
    head = "version: 1\nproducts: [any]\ncolumns: {h: in per cent}\n"
    two = write("concepts: [{id: b, text: B, expr: h, kind: point}]", name="2.yaml", head=head)
    for files in ((one, two), (two, one)):
        assert "1.yaml: helper h: a column that" in problems_of(*files)


def test_products(write: Write) -> None:
    path = write(
        "concepts: [{id: a, text: A, expr: bkt, kind: point}]", head="version: 1\ncolumns: {bkt: b}\n"
    )
    assert "concept a: no products" in problems_of(path)
    path = write("""
concepts:
  - {id: a, text: A, expr: bkt, kind: point}
  - {id: b, text: B, expr: bal, kind: point, products: [mortgage, installment]}
  - {id: c, text: C, expr: bal + pay, kind: point, products: [revolving]}
  - {id: d, text: D, expr: t, kind: point}
""")
    fit, unfit = load_concepts([path]).applicable("revolving", ["bkt", "bal", "entity"])
    assert [concept.id for concept in fit] == ["a", "d"]
    assert dict(unfit) == {
        "b": "meant for mortgage, installment; the panel is revolving",
        "c": "the panel has no column pay",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: &a [x]\nb: [" + "*a, " * 40 + "]", "more than 32 aliases"),
        ("[" * 400 + "]" * 400, "nested more than 16"),
        ("{a: 1, a: 2}", "repeated key"),
        ("version: 1\nhelpers: {x: bkt, x: bal}", "repeated key"),
        ("a: [", "expected"),
        ("x: \x00", "special characters"),
        ("- 1", "Input should be a valid dictionary"),
        ("", "Input should be a valid dictionary"),
        ("version: 2\ncolumns: {}\nconcepts: [1]", "version"),
    ],
)
def test_hostile_yaml(write: Write, text: str, reason: str) -> None:
    assert reason in problems_of(write(text, head=""))


def test_a_billion_laughs_stay_small(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "more than 32 aliases" in problems_of(write("\n".join(lines), head=""))


def test_a_huge_file(write: Write) -> None:
    assert "too large" in problems_of(write("# " + "x" * 1_000_001, head=""))


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as YAML" in problems_of(tmp_path / "x.yaml")
    assert "cannot be read as YAML" in problems_of(tmp_path)
    assert "empty" in problems_of()


def test_refused_expressions_are_refused_in_files(write: Write) -> None:
    refused = [
        "(SELECT 1)",
        "read_csv('/etc/passwd')",
        "getenv('HOME')",
        "repeat('a', 10)",
        "bkt; DROP TABLE x",
    ]
    listed = "\n".join(
        f'  - {{id: c{n}, text: A, kind: point, expr: "{text}"}}' for n, text in enumerate(refused)
    )
    text = problems_of(write("concepts:\n" + listed))
    assert all(f"concept c{n}: " in text for n in range(len(refused)))
