from pathlib import Path

import duckdb
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from activations_cache.reference.config import ReferenceConfig
from activations_cache.reference.generator import generate
from activations_cache.reference.macro import simulate_economy
from activations_cache.reference.population import draw_people, region_probabilities
from activations_cache.reference.simulate import block_pd, generator, simulate_block


def test_the_region_tells_the_attribute_with_the_stated_auc() -> None:
    table = region_probabilities()
    np.testing.assert_allclose(table.sum(axis=1), 1.0)
    ratio = table[1] / table[0]
    wins = (ratio[:, None] > ratio[None, :]) + 0.5 * (ratio[:, None] == ratio[None, :])
    assert (table[1][:, None] * table[0][None, :] * wins).sum() == pytest.approx(0.75, abs=1e-6)
    assert abs(np.corrcoef(np.arange(20), ratio)[0, 1]) < 0.5


def test_proxies_in_the_panel(reference: Path) -> None:
    with duckdb.connect() as connection:
        found = connection.execute(
            f"""SELECT any_value(region) r, any_value(merchant_mix) m, any_value(protected) a
                FROM '{reference}/panel.parquet' JOIN '{reference}/protected.parquet' USING (entity_id)
                GROUP BY entity_id"""
        ).fetchnumpy()
    member = np.asarray(found["a"]).astype(bool)
    ratio = region_probabilities()[1] / region_probabilities()[0]
    assert member.mean() == pytest.approx(0.3, abs=0.02)
    assert roc_auc_score(member, ratio[np.asarray(found["r"])]) == pytest.approx(0.75, abs=0.02)
    assert roc_auc_score(member, np.asarray(found["m"])) == pytest.approx(0.65, abs=0.02)


def test_entries_come_in_five_vintages_and_attrition_is_blind() -> None:
    config = ReferenceConfig()
    people = draw_people(generator(0, 1, 0), config, 20_000)
    assert sorted(set(people.entry)) == [0, 3, 6, 9, 12]
    assert (people.mob[people.entry > 0] == 0).all()
    old = people.entry == 0
    assert people.left[old].mean() == pytest.approx(1 - 0.99**23, abs=0.015)
    assert abs(np.corrcoef(people.theta, people.left)[0, 1]) < 0.03


@pytest.fixture(scope="module")
def worlds() -> dict[int, dict[str, float]]:
    """Per world: ratio of protected to others of shown income, inquiries, true PD, hazard odds."""
    found = {}
    for world in (0, 1, 2, 3):
        config = ReferenceConfig(world=world)  # type: ignore[arg-type]
        economy = simulate_economy(config, 60)
        block = simulate_block(config, economy, 0)
        member = block.people.protected
        pd = block_pd(config, economy, block)
        values = {
            "income": block.people.income,
            "shown": block.bureau.inq_shown.mean(axis=1),
            "real": block.bureau.inq.mean(axis=1),
            "pd": np.where(np.isnan(pd), 0.0, pd).max(axis=1),
            "log_odds": np.exp(block.constant.mean(axis=1)),
        }
        found[world] = {name: float(v[member].mean() / v[~member].mean()) for name, v in values.items()}
    return found


def test_each_world_moves_what_it_says_and_nothing_else(worlds: dict[int, dict[str, float]]) -> None:
    plain = worlds[0]
    assert worlds[1]["income"] / plain["income"] == pytest.approx(0.9, rel=1e-9)
    assert worlds[2]["shown"] / plain["shown"] == pytest.approx(np.exp(0.3), rel=0.05)
    for name in ("real", "pd", "income", "log_odds"):
        assert worlds[2][name] == pytest.approx(plain[name], rel=1e-9), name
    assert plain["shown"] == plain["real"]
    assert worlds[3]["shown"] == plain["shown"] and worlds[3]["income"] == plain["income"]
    assert worlds[3]["log_odds"] / plain["log_odds"] == pytest.approx(np.exp(0.5), rel=1e-9)
    assert worlds[3]["pd"] > 1.05 * plain["pd"]


def test_world_one_reaches_default_through_income(worlds: dict[int, dict[str, float]]) -> None:
    assert 1.0 < worlds[1]["pd"] / worlds[0]["pd"] < 1.3


def test_the_attribute_is_written_apart(tmp_path: Path) -> None:
    generate(ReferenceConfig(entities=50, world=3), tmp_path)
    with duckdb.connect() as connection:
        rows = connection.execute(f"FROM '{tmp_path}/protected.parquet'").fetchall()
    assert len(rows) == 50 and {type(value) for _, value in rows} == {bool}
