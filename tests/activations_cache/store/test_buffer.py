"""Rows keep their slots until these are given back, whatever the order of taking and giving back."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache.buffer import RowBuffer
from activations_cache.schema import ArraySpec

SPECS = {"h": ArraySpec("acts/h", "float16", 3, "float16")}
ROWS = 20


def go_on() -> None:
    """Nothing has failed."""


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.integers(0, 99)), min_size=1, max_size=40)
)
def test_rows_stay_what_they_were_until_given_back(steps):
    buffer = RowBuffer(SPECS, ROWS)
    free, held, number = buffer.all_free, [], 0
    for n, interrupted, choice in steps:
        while sum(len(slots) for slots, _ in held) + n > ROWS:
            slots, _ = held.pop(choice % len(held))
            buffer.give_back(slots[::-1])
        slots, after = buffer.take(free, n, check=go_on)
        if interrupted:
            continue
        free = after
        rows = np.arange(number, number + 3 * n, dtype=np.float32).reshape(n, 3) % 2048
        number += 3 * n
        buffer.put("h", slots, rows)
        held.append((slots, rows))
        every = np.concatenate([slots for slots, _ in held])
        assert len(np.unique(every)) == len(every)
        for slots, want in held:
            np.testing.assert_array_equal(buffer.arrays["h"][slots], want.astype(np.float16))


def test_a_taker_waits_for_what_is_given_back_and_stops_at_an_error():
    buffer = RowBuffer(SPECS, ROWS)
    slots, free = buffer.take(buffer.all_free, ROWS, check=go_on)
    threading.Timer(0.1, lambda: buffer.give_back(slots[:7])).start()
    again, free = buffer.take(free, 5, check=go_on)
    assert set(again) <= set(slots[:7]) and 0.05 < buffer.wait_seconds < 5
    failed: list[Exception] = []

    def check() -> None:
        if failed:
            raise failed[0]

    def fail() -> None:
        failed.append(ValueError("no space left"))
        buffer.wake()

    threading.Timer(0.1, fail).start()
    began = time.perf_counter()
    with pytest.raises(ValueError, match="no space left"):
        buffer.take(free, 5, check=check)
    assert time.perf_counter() - began < 5
