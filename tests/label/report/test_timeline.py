"""A history as a picture: what is left out, and how its periods are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from label.report.data import ByFeature, Labels
from label.report.histories import histories
from label.report.timeline import frame_of, timeline


def row(time: int) -> dict[str, Any]:
    place = {"feature": 0, "band": "top", "example": 0, "entity": "a", "position": 0}
    return place | {"time": time, "activation": 1.0, "concept_true": True}


def test_a_gap_takes_as_much_room_however_long_it_is() -> None:
    history = [row(t) for t in (1_600_000_000, 1_600_000_001, 1_600_000_003, 1_602_592_000)]
    drawn = str(timeline(history, [], frame_of([history], 0.5, str), name="", lead=True))
    assert "1600000002: no row<" in drawn and "1600000004 to 1602591999: no row<" in drawn
    assert drawn.count(": no row<") == 2


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"panel": {"period": "month"}}, "1907-07"),
        ({"panel": {"period": "day"}}, "22890"),
        ({"panel": {"period": "month"}, "source": {"kind": "events", "period": "day"}}, "22890"),
        ({"panel": None, "source": {"kind": "tensors", "coordinates": {"period": "month"}}}, "1907-07"),
        ({"panel": None, "source": {"kind": "tensors", "coordinates": None}}, "22890"),
        ({}, "22890"),
    ],
)
def test_only_what_counts_months_is_written_as_months(
    labels_folder: Path, config: dict[str, Any], shown: str
) -> None:
    found = Labels.read(labels_folder, {"config": config}, None, hash_ids=False)
    found = replace(found, examples=ByFeature(pa.Table.from_pylist([row(22890)])))
    assert f"{shown}: activation" in str(histories(found, found.labelled[0]))
