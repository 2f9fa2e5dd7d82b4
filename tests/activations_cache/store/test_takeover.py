"""Writers on an object store that are killed, or taken for dead and wake up: every row is there once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from activations_cache.places import LockedError, place_of
from activations_cache.places.lease import Lease
from activations_cache.places.objects import ObjectPlace
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.verify import shard_files
from activations_cache.writer import StoreWriter
from sae.errors import StoreError
from tests.activations_cache.store.conftest import Rows, append
from tests.activations_cache.test_harvest import check as check_harvest

pytestmark = pytest.mark.xdist_group("s3")
ROOT = Path(__file__).parents[3]
T = TypeVar("T")


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/some/a.zarr"


@pytest.fixture
def options(few, blocks) -> dict:
    hooks = {h: a.shape[1] for h, a in few.acts.items()}
    return {"hooks": hooks, "layout": blocks, "seed": 5, "provenance": {"model": "m"}}


def test_two_writers_are_refused(url, options) -> None:
    with StoreWriter(url, **options), pytest.raises(LockedError, match="held by another process"):
        StoreWriter(url, **options)


class Sleeper:
    """A writer that nobody hears of any more, stopped somewhere, and that goes on when it is woken."""

    def __init__(self, url: str, options: dict, patch: pytest.MonkeyPatch) -> None:
        self._asleep, self._awake = threading.Event(), threading.Event()
        self._where, self._error = "", None
        # the check of the lock is a courtesy: let the object store itself decide
        patch.setattr(Lease, "_renew", lambda lease: None)
        patch.setattr(Lease, "check", lambda lease: None)
        self.writer = StoreWriter(url, **options)
        for name in ("create", "exchange"):
            self._stop_before(name, patch)
        self._thread = threading.Thread(target=self._run)

    def sleep(self, rows: Rows, where: str) -> None:
        """Write rows until the first object with this in its name is about to be put."""
        self._rows, self._where = rows, where
        self._thread.start()
        assert self._asleep.wait(60)

    def wake(self) -> Exception | None:
        """Go on to the end; return what came of it."""
        self._awake.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self._error

    def _run(self) -> None:
        try:
            append(self.writer, self._rows, step=90)
            self.writer.close()
        except Exception as error:
            self._error = error

    def _stop_before(self, name: str, patch: pytest.MonkeyPatch) -> None:
        real = getattr(ObjectPlace, name)

        def stopping(place: ObjectPlace, *args: object) -> object:
            mine = threading.current_thread().name.startswith(("assay-", self._thread.name))
            if self._where and self._where in place.key and mine:
                self._where = ""
                self._asleep.set()
                assert self._awake.wait(60)
            return real(place, *args)

        patch.setattr(ObjectPlace, name, stopping)


def take_over(patch: pytest.MonkeyPatch, act: Callable[[], T]) -> T:
    """Do something as another machine, for which all others have been silent for long enough."""
    machine = uuid.uuid4().hex
    patch.setattr("activations_cache.places.lease._machine", lambda: machine)
    patch.setattr(Lease, "seconds", 0.0)
    for _ in range(20):
        try:
            return act()
        except LockedError:
            time.sleep(0.01)
    raise AssertionError


def check(url: str, rows: Rows) -> None:
    """Every row is there once, and nothing else is."""
    store = ActivationStore.open(url)
    assert store.verify() == [] and store.n_rows == len(rows.entity)
    for split in np.unique(rows.split):
        want = rows.where(rows.split == split)
        got = store.entities(np.unique(want.entity), "layers.2")
        np.testing.assert_array_equal(got.entity, want.entity)
        np.testing.assert_array_equal(got.acts, want.acts["layers.2"])


STOPS = ["acts/layers.2/c.0.0", "blocks/00000000", "commits/00000000", "commits/00000001"]


@pytest.mark.parametrize("where", STOPS)
@pytest.mark.parametrize(
    "wakes", ["before the other writes", "before the other commits", "before the seal", "last"]
)
def test_a_writer_that_wakes_up_too_late_harms_nothing(url, few, options, monkeypatch, where, wakes) -> None:
    """Taken for dead, it goes on wherever it was stopped, in front of any step of those who took over."""
    sleeper = Sleeper(url, options, monkeypatch)
    sleeper.sleep(few, where)
    other = take_over(monkeypatch, lambda: StoreWriter(url, **options))
    errors = [sleeper.wake()] if wakes == "before the other writes" else []
    try:
        append(other, few, step=70, start=other.cursor[0] if other.cursor else 0)
        errors += [sleeper.wake()] if wakes == "before the other commits" else []
        other.close()
    except StoreError as error:
        errors.append(error)
    errors += [sleeper.wake()] if wakes == "before the seal" else []
    # whoever lost starts again and finds all of it, or what is left
    with take_over(monkeypatch, lambda: StoreWriter(url, **options)) as third:
        append(third, few, step=110, start=third.cursor[0] if third.cursor else 0)
    take_over(monkeypatch, lambda: seal(url))
    errors += [sleeper.wake()] if wakes == "last" else []
    check(url, few)
    # of two who wrote the same block one was told
    assert any(isinstance(error, StoreError) for error in errors)


def test_nothing_is_committed_after_the_seal(url, few, options, monkeypatch) -> None:
    sleeper = Sleeper(url, options, monkeypatch)
    sleeper.sleep(few, "commits/00000001")
    take_over(monkeypatch, lambda: seal(url))
    sealed = ActivationStore.open(url)
    with pytest.raises(LockedError, match="taken over"):
        raise sleeper.wake() or AssertionError
    again = ActivationStore.open(url)
    assert again.verify() == []
    assert again.digest() == sealed.digest()


CHILD = """
import sys
from tests.activations_cache.test_harvest import Rows, run
print("ready", flush=True)
run(sys.argv[1], Rows(pause=float(sys.argv[2])))
"""


@pytest.mark.dist
def test_kill_9_loses_and_doubles_nothing(url) -> None:
    """Killed three times, then left to end; what the dead had put and not committed is gone."""
    rng = random.Random(0)
    for kill in range(4):
        command = [sys.executable, "-c", CHILD, url, "0.02"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if kill < 3:
                time.sleep(rng.uniform(0.1, 0.7))
                process.send_signal(signal.SIGKILL)
        assert process.returncode == (0 if kill == 3 else -signal.SIGKILL)
    store = check_harvest(url)
    place = place_of(url)
    wanted = {f"w0000/{name}" for name, *_ in shard_files(store.description, store.groups[0].commits)}
    assert {name for name in place.sizes() if "/c." in name} == wanted


def test_seal_sweeps_what_a_dead_writer_left(url, few, blocks, write) -> None:
    (place_of(url) / "w0000/fit/acts/layers.2/c.5.0").write(b"half of it")
    (place_of(url) / "w0000/blocks/00000000.0.safetensors").write(b"another")
    write(url, few, layout=blocks)
    check(url, few)
    assert (place_of(url) / "w0000/fit/acts/layers.2/c.5.0").size() is None
    assert (place_of(url) / "w0000/blocks/00000000.0.safetensors").size() is None
