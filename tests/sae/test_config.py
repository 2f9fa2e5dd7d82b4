"""Settings with which no dictionary could be trained are refused where they are read."""

from __future__ import annotations

import pytest

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAEConfig
from sae.config import parse_config
from sae.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("topk", "k_aux", 0),
        ("topk", "k_aux", -3),
        ("batch_topk", "aux_alpha", -1.0),
        ("jumprelu", "bandwidth", 0.0),
        ("jumprelu", "bandwidth", -1.0),
        ("jumprelu", "bandwidth", float("nan")),
    ],
)
def test_what_cannot_work_is_refused(kind, name, value):
    with pytest.raises(ConfigError, match=name):
        parse_config(SAEConfig, {"kind": kind, "d_sae": 8, "k": 2, name: value}, where="section sae")
