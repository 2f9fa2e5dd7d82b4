"""The report in a real browser, from the file system: nothing complains, nothing is asked of a network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from label.report import write_report
from label.tables import read_table

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)


class Browser:
    """Chromium over its debugging pipe: one tab, with everything it complained about and asked for."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # the browser speaks on descriptors 3 and 4
        command = f'exec "$0" {FLAGS} --user-data-dir="$1" about:blank 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, str(profile)],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loaded = 0
        tab = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        before = self.loaded
        self.call("Page.navigate", url=path.as_uri())
        while self.loaded == before:
            self._next()

    def run(self, script: str) -> Any:
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self, path: Path) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._to)
        os.close(self._from)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        match event.get("method"):
            case "Page.loadEventFired":
                self.loaded += 1
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(event["params"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(event["params"]["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
        return event


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(
        (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
    )
    if program is None:
        pytest.skip("no Chromium on this machine; `apt-get install chromium` gives one")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(labels_folder: Path, run_record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(labels_folder, tmp_path_factory.mktemp("report"), run=run_record, evaluation=None)


VISIBLE = "[...document.querySelectorAll('#feature-table tbody tr')].filter(r => !r.hidden)"


def fill(browser: Browser, selector: str, value: str) -> None:
    events = "field.dispatchEvent(new Event('input')); field.dispatchEvent(new Event('change'))"
    browser.run(f"{{const field = document.querySelector('{selector}'); field.value = '{value}'; {events}}}")


def test_pages_open_without_a_complaint_and_ask_for_nothing(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    for path in (report / "index.html", report / "features" / "0001.html", report / "features" / "0007.html"):
        for width, dark in ((1280, False), (390, True)):
            browser.open(path, width=width, dark=dark)
            picture = browser.screenshot(tmp_path / f"{path.stem}-{width}.png")
            assert len(picture) > 20_000
            assert browser.run("getComputedStyle(document.body).backgroundColor") == (
                "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
            )
            # the page itself never scrolls sideways; wide tables do so on their own
            assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_the_table_filters(browser: Browser, report: Path, labels_folder: Path) -> None:
    features = read_table(labels_folder, "features").to_pylist()
    browser.open(report / "index.html")
    assert browser.run(f"{VISIBLE}.length") == sum(f["status"] == "labelled" for f in features)
    fill(browser, "select[name=status]", "learned-and-used")
    assert browser.run(f"{VISIBLE}.length") == sum(bool(f["learned"] and f["used"]) for f in features)
    fill(browser, "select[name=status]", "")
    fill(browser, "select[name=reason]", "control")
    expected = sum(f["reason"] == "control" for f in features)
    assert browser.run(f"{VISIBLE}.length") == expected
    assert browser.run("document.querySelector('.tools output').textContent") == f"{expected} of 40 shown"
    fill(browser, "select[name=reason]", "")
    fill(browser, ".tools input", "UTILISATION least")
    found = browser.run(f"{VISIBLE}.map(r => r.cells[1].textContent)")
    assert found and all("utilisation" in text.lower() and "least" in text for text in found)


def test_the_table_sorts_and_what_is_not_known_comes_last(
    browser: Browser, report: Path, labels_folder: Path
) -> None:
    browser.open(report / "index.html")
    skills = [f["skill"] for f in read_table(labels_folder, "features").to_pylist()]
    known = sorted((s for s in skills if s is not None), reverse=True)
    column = "document.querySelectorAll('#feature-table thead th')[4]"
    read = "[...document.querySelectorAll('#feature-table tbody tr')].map(r => r.cells[4].dataset.v)"
    for expected, direction in ((known, "descending"), (known[::-1], "ascending")):
        browser.run(f"{column}.querySelector('button').click()")
        assert browser.run(f"{column}.getAttribute('aria-sort')") == direction
        shown = browser.run(read)
        assert [float(v) for v in shown[: len(known)]] == expected and set(shown[len(known) :]) == {""}


def test_arrow_keys_lead_to_the_neighbours(browser: Browser, report: Path) -> None:
    browser.open(report / "features" / "0001.html")
    before = browser.loaded
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
    while browser.loaded == before:
        browser._next()
    assert browser.run("document.querySelector('nav .here').textContent") == "Feature 2"


def test_no_words_of_a_plot_lie_on_one_another(browser: Browser, report: Path) -> None:
    overlaps = """
    [...document.querySelectorAll('svg')].flatMap(svg => {
      const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.width && q.width && Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
        Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4).map(([b]) => a + ' / ' + b));
    })"""
    for path in [report / "index.html", *sorted((report / "features").iterdir())]:
        browser.open(path)
        assert browser.run(overlaps) == [], path.name
