"""The static report: well formed, closed to the network, escaped, and with the tables' figures on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from label.report import write_report
from label.report.numbers import bracket, count, fixed, share, short, signed
from label.report.write import shows_present_labels
from label.tables import read_summary, read_table, write_table
from sae.errors import ConfigError

VOID = {"meta", "link", "input", "br", "hr", "img"}
LOADING = {"href", "src", "srcset", "data", "action", "poster", "xlink:href", "background"}


class Page(HTMLParser):
    """A page's text by element, its ids, its references; fails where tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.open, self.ids, self.references = path, [], set(), []
        self.tags: list[str] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"{path}: {self.open} not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"{self.path}: an attribute twice on {tag}"
        self.tags.append(tag)
        if "id" in values:
            assert values["id"] not in self.ids, f"{self.path}: id {values['id']} twice"
            self.ids.add(values["id"])
        self.references += [v for k, v in attrs if k in LOADING and v is not None]
        assert not [k for k in values if k.startswith("on") or k == "style"], (
            f"{self.path}: inline code on {tag}"
        )
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append((tag, values.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"{self.path}: </{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, ident in self.open:
            if ident:
                self.text[ident] = self.text.get(ident, "") + data
        if self.rows and self.rows[-1] and any(t in ("td", "th") for t, _ in self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="session")
def report(labels_folder: Path, run_record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "pages"
    evaluation = {"confirm": {"fvu": 0.083, "firing_rates": {"never": 5}}}
    return write_report(labels_folder, out, run=run_record, evaluation=evaluation)


@pytest.fixture(scope="session")
def pages(report: Path) -> dict[str, Page]:
    return {str(p.relative_to(report)): Page(p) for p in sorted(report.rglob("*.html"))}


def features_of(folder: Path) -> list[dict[str, Any]]:
    return read_table(folder, "features").to_pylist()


def test_there_is_a_page_for_the_run_and_for_every_labelled_feature(
    pages: dict[str, Page], labels_folder: Path
) -> None:
    labelled = [f["feature"] for f in features_of(labels_folder) if f["status"] == "labelled"]
    assert set(pages) == {"index.html", *(f"features/{j:04d}.html" for j in labelled)}


def test_every_link_leads_to_a_page_and_an_anchor_that_exist(pages: dict[str, Page], report: Path) -> None:
    for page in pages.values():
        for reference in page.references:
            if reference == "data:,":
                continue
            target, _, anchor = reference.partition("#")
            at = (page.path.parent / target).resolve() if target else page.path
            name = str(at.relative_to(report.resolve()))
            assert name in pages, f"{page.path.name}: {reference}"
            assert not anchor or anchor in pages[name].ids, f"{page.path.name}: {reference}"


def test_every_labelled_feature_is_reached_by_links_to_the_next(pages: dict[str, Page]) -> None:
    names = sorted(n for n in pages if n != "index.html")
    for before, after in pairwise(names):
        assert Path(after).name in pages[before].references
        assert Path(before).name in pages[after].references


def test_nothing_is_loaded_from_anywhere(pages: dict[str, Page]) -> None:
    for page in pages.values():
        source = unescape(page.path.read_text())
        assert not re.search(r"(https?:)?//[a-z]", source.replace("// ", ""), re.I), page.path
        assert "@import" not in source and not re.search(r"url\((?!#)", source)
        assert "default-src 'none'" in source and "unsafe" not in source
        assert not {"img", "iframe", "object", "embed", "form"} & set(page.tags)


def test_texts_of_others_are_text_on_the_page(pages: dict[str, Page]) -> None:
    for page in pages.values():
        source = page.path.read_text()
        assert page.tags.count("script") == 1
        assert "<script>alert" not in source and "<img" not in source and "odd <b>" not in source
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;late&quot;" in pages["index.html"].path.read_text()
    )


def test_the_headline_and_the_faithfulness_are_the_summarys(
    pages: dict[str, Page], labels_folder: Path
) -> None:
    summary, text = read_summary(labels_folder), pages["index.html"].text
    assert text["learned-and-used"] == str(summary["n_learned_and_used"])
    assert text["used"] == str(summary["n_used"])
    source = pages["index.html"].path.read_text()
    assert source.index('id="learned-and-used"') < source.index('id="used"')
    fidelity = summary["fidelity"]
    assert text["fvu"] == "0.083" and text["l0"] == "16.0"
    for name in ("auc_model", "auc_reference", "auc_spliced"):
        assert text[name] == f"{fidelity[name]:.3f}"
    assert text["dead"].startswith(f"{summary['n_dead']} (")
    for reason, n in summary["reasons"].items():
        row = next(r for r in pages["index.html"].rows if r and r[0].startswith(reason.replace("_", " ")))
        assert row[2].startswith(str(n))


def test_the_tables_of_the_first_page_hold_the_tables_figures(
    pages: dict[str, Page], labels_folder: Path
) -> None:
    rows = pages["index.html"].rows
    table = {r[0]: r for r in rows if len(r) == 13 and r[0].isdigit()}
    features = features_of(labels_folder)
    assert set(table) == {str(f["feature"]) for f in features}
    for f in features:
        row = table[str(f["feature"])]
        assert row[4] == fixed(f["skill"]) + bracket(f, "skill")
        assert row[6:9] == [fixed(f[n]) for n in ("f1", "precision", "recall")]
        assert row[9:] == [
            share(f["prevalence"]),
            count(f["n_entities"]),
            share(f["firing_rate"]),
            signed(f["effect"], 3),
        ]
        if f["status"] == "labelled":
            words = {True: "✓ yes", False: "✗ no", None: "not assessed"}
            assert row[1:4] == [f["title"], words[f["learned"]], words[f["used"]]]
        else:
            assert f["description"] in row[1]
    text = pages["index.html"].text["concepts"]
    for c in read_table(labels_folder, "concepts").to_pylist():
        assert c["concept"] in text and (c["applicable"] or c["reason"] in text)


def test_a_feature_page_holds_its_evidence(pages: dict[str, Page], labels_folder: Path) -> None:
    associations = read_table(labels_folder, "associations").to_pylist()
    for f in features_of(labels_folder):
        if f["status"] != "labelled":
            continue
        page = pages[f"features/{f['feature']:04d}.html"]
        source, text = page.path.read_text(), page.text["main"]
        assert f["description"] in text
        for name in ("skill", "f1", "precision", "recall"):
            assert f"{fixed(f[name])} {bracket(f, name)}" in text
        assert f"fires above {short(f['threshold'])}" in text
        if f["used"] is not None:
            assert f"{signed(f['effect'], 3)} {bracket(f, 'effect', 3)}" in text
            assert ("On average its presence" in text) == (f["effect_low"] * f["effect_high"] > 0)
        else:
            assert text.count("removing it moved the logit of too few entities to tell") == 2
        mine = [a for a in associations if a["feature"] == f["feature"]]
        assert sum("discovery" in cell for row in page.rows for cell in row[2:3]) == len(mine)
        for band in ("top", "middle", "low", "near_miss", "false_alarm"):
            assert f'id="band-{band}"' in source
        assert text.count("peak") == 18


def test_the_silent_share_is_counted_apart(pages: dict[str, Page], labels_folder: Path) -> None:
    bins = [b for b in read_table(labels_folder, "histograms").to_pylist() if b["feature"] == 0]
    total = sum(b["n_true"] for b in bins)
    row = next(r for r in pages["features/0000.html"].rows if r and r[0] == "concept holds")
    assert row[2:] == [share(bins[0]["n_true"] / total), f"{count(bins[0]['n_true'])} of {count(total)} rows"]


def test_periods_without_a_row_are_hatched(pages: dict[str, Page], labels_folder: Path) -> None:
    rows = [r for r in read_table(labels_folder, "examples").to_pylist() if r["feature"] == 0]
    histories: dict[tuple[str, int], list[int]] = {}
    for r in rows:
        histories.setdefault((r["band"], r["example"]), []).append(r["time"])
    missing = sum(b - a > 1 for t in histories.values() for a, b in pairwise(sorted(t)))
    source = pages["features/0000.html"].path.read_text()
    # each history is drawn twice: the first columns, and the others that unfold
    assert missing > 0 and source.count(": no row<") == 2 * missing


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.0, "0"), (0.0, "0"), (-3.0, "\N{MINUS SIGN}3"), (1240.0, "1,240")]
)
def test_a_negative_zero_is_zero(value: float, shown: str) -> None:
    assert short(value) == shown


def test_what_a_figure_is_of_is_said(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert "False discovery rate among the pairs that pass on confirmation" in text
    assert "features that fire neither on discover nor on confirm" in text


def test_pages_know_of_which_labels_they_are(labels_folder: Path, tmp_path: Path) -> None:
    run = {"stages": {"label": {"inputs": {"label": {"min_skill": 0.25}, "after train": "a"}}}}
    out = write_report(labels_folder, tmp_path / "out", run=run, evaluation=None)
    assert shows_present_labels(out, run)
    # another labelling that was begun leaves those of before where they are
    assert shows_present_labels(out, {"stages": {"label": run["stages"]["label"] | {"begun": "b"}}})
    run["stages"]["label"]["inputs"]["after train"] = "b"
    assert not shows_present_labels(out, run)
    (out / "report.json").write_text('{"format_version": 1, "kind": "report"}')
    assert not shows_present_labels(out, run)


def test_ids_can_be_hidden(labels_folder: Path, report: Path, tmp_path: Path) -> None:
    hidden = write_report(labels_folder, tmp_path / "hidden", run=None, evaluation=None, hash_ids=True)
    assert "client-0-top-0" in (report / "features" / "0000.html").read_text()
    for path in hidden.rglob("*.html"):
        assert "client-" not in path.read_text()
    again = write_report(labels_folder, tmp_path / "again", run=None, evaluation=None, hash_ids=True)
    name = re.compile(r"history of (\w{8})")
    first, second = (name.findall((f / "features" / "0000.html").read_text()) for f in (hidden, again))
    # the key is drawn anew, so that two reports cannot be joined by their hashes
    assert len(set(first)) == 18 and not set(first) & set(second)


def test_an_earlier_report_is_replaced_and_nothing_else_is(labels_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(labels_folder, out, run=None, evaluation=None)
    (out / "features" / "9999.html").write_text("left over")
    write_report(labels_folder, out, run=None, evaluation=None)
    assert not (out / "features" / "9999.html").exists() and [p.name for p in tmp_path.iterdir()] == [
        "report"
    ]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"mine holds something that is not a report"):
        write_report(labels_folder, other, run=None, evaluation=None)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_labels_of_before_the_test_looked_at_each_pair_have_a_report(
    labels_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    shutil.copytree(labels_folder, folder)
    summary = read_summary(folder)
    write_report(folder, tmp_path / "now", run={}, evaluation=None)
    del summary["test_calibration"]["plain_rejected_at_0.05"]
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report(folder, tmp_path / "before", run={}, evaluation=None)
    now, before = ((tmp_path / name / "index.html").read_text() for name in ("now", "before"))
    assert "the test rejects 4.7%" in now and "8.1% if they" in now
    assert "the test rejects" not in before


def test_a_labelling_that_found_nothing_has_a_report_too(labels_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    dead = {
        "feature": 0,
        "status": "unlabelled",
        "reason": "dead",
        "description": "unlabelled: it never fires",
    }
    write_table(folder, "features", [dead])
    for name in ("associations", "concepts", "groups", "examples", "histograms", "effects"):
        write_table(folder, name, [])
    counts = dict.fromkeys(("n_labelled", "n_learned", "n_used", "n_learned_and_used"), 0)
    summary = {
        "format_version": 1,
        "n_features": 1,
        "n_dead": 1,
        "reasons": {"dead": 1},
        "controls": {},
        **counts,
    }
    summary |= {"fdr_q": 0.01, "fidelity": {"fvu": None, "l0": None, "auc_model": None}, "removal": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    out = write_report(folder, tmp_path / "out", run=None, evaluation=None)
    page = Page(out / "index.html")
    assert page.text["learned-and-used"] == "0" and "No outcome" in page.text["main"]


def test_the_report_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, label.report; print(sorted({'torch', 'sae.base', 'zarr', 'duckdb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_concepts_are_held_against_what_was_measured_alone(labels_folder: Path, tmp_path: Path) -> None:
    for missing, words in (
        ((), "lies above the raw column and the twin."),
        (("twin_skill",), "lies above the raw column."),
        (("raw_skill", "twin_skill"), None),
    ):
        folder = tmp_path / "-".join(["labels", *missing])
        shutil.copytree(labels_folder, folder)
        concepts = [c | dict.fromkeys(missing) for c in read_table(folder, "concepts").to_pylist()]
        write_table(folder, "concepts", concepts)
        page = Page(write_report(folder, folder / "pages", run=None, evaluation=None) / "index.html")
        text = unescape(page.path.read_text())
        assert "Mean skill over" in text
        assert (words in text) if words else ("whole interval lies above" not in text)
