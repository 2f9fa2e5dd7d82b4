"""A gappy random panel with every canonical column, and the project's own concept files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CONFIGS = Path(__file__).parents[3] / "configs" / "concepts"


@pytest.fixture(scope="session")
def credit() -> Path:
    return CONFIGS / "credit.yaml"


@pytest.fixture(scope="session")
def uci_status() -> Path:
    return CONFIGS / "uci_status.yaml"


def make_panel(path: Path, *, entities: int, periods: int, seed: int) -> Path:
    """Write a panel with gaps of one to several periods, late starts, and one null in ten."""
    generator = np.random.default_rng(seed)
    present = generator.random((entities, periods)) < 0.8
    start = generator.integers(0, periods // 2, entities)
    present &= np.arange(periods) >= start[:, None]
    present[:, 7:9] &= generator.random((entities, 1)) < 0.5
    entity, time = np.nonzero(present)
    n = len(entity)
    late = np.maximum(0, generator.integers(-4, 7, n))
    bal = np.where(generator.random(n) < 0.1, 0, generator.normal(900, 700, n)).round(-1)
    counts = {
        name: generator.poisson(rate, n) for name, rate in (("inq", 0.5), ("new_tr", 0.2), ("nsf", 0.3))
    }
    columns = {
        "bkt": late,
        "bal": bal,
        "lim": generator.choice([1000.0, 2000.0], n),
        "pay": generator.choice([0.0, 50.0, 500.0, 1000.0, 2000.0], n),
        "due": generator.choice([0.0, 50.0, 100.0], n),
        "purch": generator.gamma(1, 100, n),
        "cash": generator.choice([0.0, 100.0], n),
        "ntr": generator.integers(1, 9, n),
        "file_age": generator.integers(0, 99, n),
        "mob": time + generator.integers(0, 30, entities)[entity],
        "income": generator.choice([0.0, 1500.0, 2000.0, 2100.0], n, p=[0.2, 0.2, 0.3, 0.3]),
        "inflow": generator.gamma(2, 900, n),
        "outflow": generator.gamma(2, 900, n),
        "min_bal": generator.normal(200, 300, n),
        "nsf_int": generator.choice([0.0, 5.0], n),
        "gamble": generator.choice([0.0, 30.0], n),
        "forb": generator.choice([0.0, 1.0], n, p=[0.8, 0.2]),
        "orig": 4000.0 + 1000 * (time % 3),
        "rate": 3 + time / 6,
        "coll": np.full(n, 9000.0),
        "hpi": 1 + time / 100,
        "uer": 4 + time / 12,
        "days_late": generator.normal(0, 3, n).round(),
        "status": late - generator.integers(0, 3, n),
        **counts,
    }
    table = {"entity": pa.array(entity, pa.int64()), "time": pa.array(time, pa.int64())}
    for name, values in columns.items():
        table[name] = pa.array(values.astype(float), mask=generator.random(n) < 0.1)
    table["split"] = pa.array(["fit"] * n)
    table["audit_sex"] = pa.array(generator.integers(1, 3, n).astype(float))
    table["outcome"] = pa.array(generator.integers(0, 2, n).astype(float))
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture(scope="session")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_panel(tmp_path_factory.mktemp("panel") / "panel.parquet", entities=80, periods=30, seed=3)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a concept file; columns bkt, bal, lim, pay and products are there by default."""

    def writer(text: str, *, name: str = "concepts.yaml", head: str | None = None) -> Path:
        default = "version: 1\nproducts: [any]\ncolumns: {bkt: a, bal: b, lim: c, pay: d}\n"
        path = tmp_path / name
        path.write_text((default if head is None else head) + text)
        return path

    return writer
