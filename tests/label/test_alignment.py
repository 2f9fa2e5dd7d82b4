"""Tables of (entity, time) brought onto rows, against a dictionary."""

import numpy as np
import pytest

from label.alignment import locate
from label.evidence import rows_of

MONTH = 30 * 86_400 * 10**9


@pytest.mark.parametrize("unit", [1, MONTH])
def test_rows_are_found_whatever_the_unit_of_time(unit):
    rng = np.random.default_rng(0)
    entity, time = np.repeat(np.arange(2000), 12), np.tile(np.arange(12) - 3, 2000) * unit
    table, mine = (rng.random(len(entity)) < share for share in (0.7, 0.4))
    # a time that the table lacks, and one that the rows lack
    table &= time != 2 * unit
    mine &= time != 5 * unit
    rows, _ = rows_of("discover", entity[mine], time[mine], np.zeros(mine.sum(), np.int64))
    at = {key: i for i, key in enumerate(zip(entity[table].tolist(), time[table].tolist(), strict=True))}
    wanted = [at.get(key, -1) for key in zip(rows.entity.tolist(), rows.time.tolist(), strict=True)]
    found = locate(rows, entity[table], time[table])
    assert -1 in wanted
    np.testing.assert_array_equal(found, wanted)
