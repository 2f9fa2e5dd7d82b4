"""What a description says of a removal, by the sign that its interval allows."""

import numpy as np
import pytest

from label.describe.template import describe, interval_text
from label.report.scorecard import interval_of
from tests.label.conftest import feature


@pytest.mark.parametrize(
    ("effect", "says"),
    [
        ((-0.2, -0.3, -0.1), "removing it lowers the default logit by 0.2 [0.1, 0.3]"),
        ((0.2, 0.1, 0.3), "removing it raises the default logit by 0.2 [0.1, 0.3]"),
        ((-0.1, -0.3, 0.1), "removing it moves the default logit by -0.1 [-0.3, 0.1]"),
        ((0.0, 0.0, 0.0), "removing it moves the default logit by 0 [0, 0]"),
    ],
)
def test_a_direction_is_named_only_where_the_interval_excludes_zero(effect, says):
    record = feature(0, np.random.default_rng(0)) | {
        "concept_text": "Utilisation",
        "whole": False,
        "rivals": [],
    }
    record |= dict(zip(("effect", "effect_low", "effect_high"), effect, strict=True))
    assert says in describe(record)


@pytest.mark.parametrize(
    "ends", [(31.0, 38.05), (38.05, 54.03), (13.3, 18.2), (12.4, 13.4), (2.0, 3.0), (None, 4.5)]
)
def test_whole_numbers_are_those_that_the_interval_holds(ends):
    low, high = ends
    held = [v for v in range(100) if (low is None or v >= low) and v < high]
    text = interval_text(low, high, whole=True)
    first, last = held[0], held[-1]
    whole = f"exactly {first}" if first == last else f"{first} to {last}"
    assert text == (f"{last} or less" if low is None else whole)


@pytest.mark.parametrize(
    ("low", "high", "title", "scorecard"),
    [
        (1001.2, 1004.9, "between 1001.2 and 1004.9", "from 1001.2 to below 1004.9"),
        (0.9991, 0.9994, "between 0.9991 and 0.9994", "from 0.9991 to below 0.9994"),
        (1000.07, None, "at least 1000.07", "at least 1000.07"),
        (None, 1234567.0, "below 1234567", "below 1234567"),
        (None, None, "", ""),
    ],
)
def test_an_interval_is_never_rounded_to_another(low, high, title, scorecard):
    assert interval_text(low, high, whole=False) == title
    assert interval_of({"low": low, "high": high}) == scorecard
