from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from activations_cache.reference.chain import BUCKET
from activations_cache.reference.config import ReferenceConfig
from activations_cache.reference.generator import FILES, generate
from activations_cache.reference.macro import simulate_economy
from activations_cache.reference.simulate import simulate_block
from sae.config import parse_config
from sae.errors import ConfigError, PanelError

Query = Callable[[Path, str], dict[str, np.ndarray]]
Auc = Callable[[np.ndarray, np.ndarray], float]
PANEL_COLUMNS = [
    "entity_id", "t", "bkt", "bal", "lim", "pay", "due", "purch", "cash", "inq", "new_tr", "ntr", "file_age",
    "mob", "income", "inflow", "outflow", "min_bal", "nsf", "nsf_int", "gamble", "forb", "rate", "hpi", "uer",
    "days_late", "orig", "coll", "region", "merchant_mix", "statement_day",
    "default_next_12m", "default_entity",
]  # fmt: skip


def test_the_panel_holds_no_answer(reference: Path) -> None:
    with duckdb.connect() as connection:
        described = connection.execute(f"DESCRIBE FROM '{reference}/panel.parquet'").fetchall()
    assert sorted(row[0] for row in described) == sorted(PANEL_COLUMNS)
    files = [*(f"{name}.parquet" for name in FILES), "truth.json"]
    assert sorted(path.name for path in reference.iterdir()) == sorted(files)


def test_the_files_describe_the_same_rows(reference: Path, query: Query) -> None:
    for name in ("states", "truth", "planted"):
        unmatched = f"WHERE panel.t IS NULL OR {name}.t IS NULL"
        other = query(
            reference, f"SELECT count(*) n FROM panel FULL JOIN {name} USING (entity_id, t) {unmatched}"
        )
        assert other["n"][0] == 0, name
    counts = "SELECT count(*) n, count(DISTINCT (entity_id, t)) d, count(DISTINCT entity_id) e FROM panel"
    found = query(reference, counts)
    assert found["n"][0] == found["d"][0] and found["e"][0] == 7000
    assert (
        query(reference, "SELECT count(*) n FROM true_pd SEMI JOIN last USING (entity_id, t)")["n"][0] == 7000
    )
    assert query(reference, "SELECT count(*) n FROM true_pd")["n"][0] == 7000


def test_same_config_same_bytes_and_more_entities_change_none(tmp_path: Path, query: Query) -> None:
    few = ReferenceConfig(entities=200)
    changed: dict[str, dict[str, int]] = {"a": {}, "b": {}, "more": {"entities": 400}, "seed": {"seed": 1}}
    for name, update in changed.items():
        generate(few.model_copy(update=update), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    with duckdb.connect() as connection:
        for name in FILES:
            some = connection.execute(f"FROM '{tmp_path}/a/{name}.parquet'").fetchall()
            more = connection.execute(f"FROM '{tmp_path}/more/{name}.parquet' LIMIT {len(some)}").fetchall()
            assert some == more, name
    balances = [query(tmp_path / name, "SELECT bal FROM panel LIMIT 99")["bal"] for name in ("a", "seed")]
    assert not np.array_equal(*balances)


def test_outcomes_follow_the_path(reference: Path, query: Query) -> None:
    entity = query(
        reference,
        """SELECT default_entity y, coalesce(months_to_default, 99) BETWEEN 1 AND 12 AS truth
        FROM panel JOIN states USING (entity_id, t) SEMI JOIN last USING (entity_id, t)""",
    )
    np.testing.assert_array_equal(entity["y"], entity["truth"])
    values = "SELECT count(DISTINCT default_entity) n FROM panel GROUP BY entity_id"
    assert (query(reference, values)["n"] == 1).all()
    rows = query(
        reference,
        """SELECT default_next_12m y, coalesce(months_to_default, 99) m, last.t - panel.t ahead,
        last.t < 23 gone
        FROM panel JOIN states USING (entity_id, t) JOIN last USING (entity_id)""",
    )
    censored = np.isnan(rows["y"])
    assert (rows["m"] > rows["ahead"]).all()
    np.testing.assert_array_equal(censored, (rows["gone"] == 1) & (rows["ahead"] < 12))
    np.testing.assert_array_equal(rows["y"][~censored], (rows["m"] <= 12)[~censored])


def test_the_true_pd_is_calibrated_and_ranks(
    reference: Path, query: Query, summary: np.ndarray, learned_auc: Auc
) -> None:
    found = query(
        reference,
        "SELECT pd_12m, default_entity FROM true_pd JOIN panel USING (entity_id, t) ORDER BY entity_id",
    )
    pd, seen = found["pd_12m"], found["default_entity"]
    assert 0.04 < seen.mean() < 0.08
    for part in np.array_split(np.argsort(pd), 10):
        assert abs(seen[part].mean() - pd[part].mean()) < 4 * np.sqrt(pd[part].mean() / len(part))
    best = roc_auc_score(seen, pd)
    assert best > 0.82
    assert 0.70 < learned_auc(summary, seen) < best


def test_with_the_whole_book_every_row_is_calibrated(complete: Path, query: Query) -> None:
    found = query(
        complete, "SELECT pd_12m, default_next_12m y, t FROM true_pd JOIN panel USING (entity_id, t)"
    )
    assert not np.isnan(found["y"]).any()
    for first in (0, 8, 16):
        rows = (found["t"] >= first) & (found["t"] < first + 8)
        assert found["y"][rows].mean() == pytest.approx(found["pd_12m"][rows].mean(), rel=0.2)


def test_months_and_cells_go_missing_as_set(reference: Path, complete: Path, query: Query) -> None:
    found = query(
        reference,
        """SELECT count(*) FILTER (t = 16) outage, count(*) FILTER (t = 15) usual,
        avg((inq IS NULL)::int) FILTER (t < 12) AS early, avg((inq IS NULL)::int) FILTER (t >= 12) AS late
        FROM panel""",
    )
    assert found["outage"][0] == 0 and found["usual"][0] > 3000
    assert found["early"][0] == pytest.approx(0.3, abs=0.03) and found["late"][0] == 0
    lengths = query(complete, "SELECT count(*) n, max(t) - min(t) + 1 span FROM panel GROUP BY entity_id")
    np.testing.assert_array_equal(lengths["n"], lengths["span"])


def test_delinquent_months_are_missing_three_times_as_often() -> None:
    config = ReferenceConfig(outage=False)
    block = simulate_block(config, simulate_economy(config, 48), 0)
    inside = np.arange(block.shown.shape[1]) < block.last[:, None]
    late = BUCKET[block.states] > 0
    assert 1 - block.shown[inside & ~late].mean() == pytest.approx(0.02, abs=0.003)
    assert 1 - block.shown[inside & late].mean() == pytest.approx(0.06, abs=0.025)


def test_the_lost_month_tells_no_default_of_the_whole_book() -> None:
    config = ReferenceConfig(book="all")
    block = simulate_block(config, simulate_economy(config, 48), 0)
    seen = block.last >= 0
    assert not (block.shown & (block.time == config.outage_month)).any()
    assert block.shown[seen, block.last[seen]].all() and (block.default[seen] > block.last[seen]).all()


def test_dirt_is_made_on_request(tmp_path: Path, query: Query) -> None:
    generate(ReferenceConfig(entities=500, duplicates=0.01, recode_month=12), tmp_path)
    found = query(tmp_path, "SELECT count(*) - count(DISTINCT (entity_id, t)) twice, count(*) n FROM panel")
    assert 0.005 < found["twice"][0] / found["n"][0] < 0.02
    codes = query(
        tmp_path,
        "SELECT t, bkt, state FROM panel JOIN states USING (entity_id, t) WHERE state IN ('D1', 'D2', 'D3')",
    )
    plain = np.array([int(name[1]) for name in codes["state"]])
    np.testing.assert_array_equal(codes["bkt"], plain + (codes["t"] >= 12))


@pytest.mark.parametrize(
    ("config", "problem"),
    [({"recode_month": 24}, "recode_month is 24"), ({"world": 4}, "world"), ({"entitys": 5}, "unknown key")],
)
def test_bad_settings_are_said(config: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config(ReferenceConfig, config, where="test")


def test_a_file_in_the_way_and_an_empty_book_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PanelError, match="a file"):
        generate(ReferenceConfig(entities=10), tmp_path / "file")
    ruin = ReferenceConfig(entities=10, months=60, attrition=0.0, hazard_intercept=0.0, worsening_shift=5.0)
    with pytest.raises(PanelError, match="no account is left"):
        generate(ruin, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
