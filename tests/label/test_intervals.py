"""Written intervals say what the interval is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from label.intervals import written_ends

ENDS = st.floats(-1e12, 1e12) | st.floats(-1, 1)


@pytest.mark.parametrize(
    ("ends", "written"),
    [
        ((0.55, 0.7), ("0.55", "0.7")),
        ((12.4, 14.4), ("12.4", "14.4")),
        ((0.123456, 0.98765), ("0.123", "0.988")),
        ((1001.2, 1004.9), ("1001.2", "1004.9")),
        ((0.9991, 0.9994), ("0.9991", "0.9994")),
        ((999.6, 1000.4), ("999.6", "1000.4")),
        ((1234.5, 98765.4), ("1234", "98765")),
        ((1000.07, None), ("1000.07", "")),
        ((None, 1234567.0), ("", "1234567")),
        ((None, 1e9), ("", "1e+09")),
        ((None, None), ("", "")),
        ((-0.0, 1e-7), ("0", "1e-07")),
        ((0.1 + 0.2, 0.1 + 0.2), ("0.3", "0.3")),
    ],
)
def test_as_few_digits_as_tell_it_from_others(ends, written):
    assert written_ends(*ends) == written


@given(st.tuples(ENDS, ENDS).map(sorted).filter(lambda ends: ends[0] < ends[1]), st.integers(3, 6))
def test_both_ends_lie_within_a_hundredth_of_the_width_and_stay_apart(ends, least):
    low, high = ends
    first, last = written_ends(low, high, least=least)
    assert abs(float(first) - low) <= 0.01 * (high - low) >= abs(float(last) - high)
    assert float(first) < float(last)


@given(ENDS)
def test_an_end_without_another_has_six_digits(end):
    first, none = written_ends(end, None)
    assert none == ""
    assert float(first) == pytest.approx(end, rel=5.1e-6, abs=0)
    assert "e" not in first or not 1e-4 <= abs(end) < 1e9
