"""How figures are written."""

from __future__ import annotations

import pytest

from label.report.numbers import bracket, fixed, p_text, period, share, short, signed
from label.report.strips import Axis
from label.report.svg import ticks


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (5.0, "5"), (0.0312, "0.0312"), (1240.4, "1,240"), (12400.0, "12.4k"), (3.1e6, "3.1M"),
     (999_600.0, "1M"), (999_400.0, "999k"), (999_999_999.0, "1e+09"), (99_960.0, "100k"),
     (-0.5, "\N{MINUS SIGN}0.5"), (3.1e-7, "3.1e-07"), (None, "\N{EN DASH}"), (float("nan"), "\N{EN DASH}")],
)  # fmt: skip
def test_short(value: float | None, shown: str) -> None:
    assert short(value) == shown


def test_the_others() -> None:
    assert fixed(-0.125, 2) == "\N{MINUS SIGN}0.12" and fixed(-0.001) == "0.00" and signed(0.127) == "+0.13"
    assert signed(0.0001) == "0.00" and signed(-0.5) == "\N{MINUS SIGN}0.50" and signed(None) == "\N{EN DASH}"
    assert [share(v) for v in (0.0, 0.00001, 0.0043, 0.1234, 0.9998, 1.0, None)] == [
        "0%",
        "<0.01%",
        "0.43%",
        "12.3%",
        ">99.9%",
        "100%",
        "\N{EN DASH}",
    ]
    assert p_text(1e-9) == "<0.001" and p_text(0.0123) == "0.012"
    assert (
        bracket({"x": 1.0, "x_low": -0.1, "x_high": 0.25}, "x") == "[\N{MINUS SIGN}0.10, 0.25]"
        and bracket({"x": 1.0}, "x") == ""
    )
    assert (
        period(24182, "month") == "2015-03" and period(7, "month") == "7" and period(24182, "day") == "24182"
    )


def test_axes_end_on_round_numbers_and_hold_every_value() -> None:
    for values in ([0.2, 0.37], [-0.13, 0.5], [0.0], [3.0, 1234.0], [None, 0.0004]):
        axis = Axis.around(values, 200)
        there = [v for v in values if v is not None]
        assert axis.low <= min(there) and axis.high >= max(there) and axis.low < axis.high
        assert all(axis.low - 1e-9 <= t <= axis.high + 1e-9 for t in axis.ticks) and len(axis.ticks) >= 2
    assert ticks(0, 1, 2) == [0.0, 0.5, 1.0]
