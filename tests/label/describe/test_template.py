"""What a description says of a removal, by the sign that its interval allows."""

import numpy as np
import pytest

from label.describe.template import describe
from tests.label.conftest import feature


@pytest.mark.parametrize(
    ("effect", "says"),
    [
        ((-0.2, -0.3, -0.1), "removing it lowers the default logit by 0.2 [-0.3, -0.1]"),
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
