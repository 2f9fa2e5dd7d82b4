import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from activations_cache.reference.concepts import persistent
from activations_cache.reference.config import ReferenceConfig
from activations_cache.reference.trailing import lagged, trailing_max, trailing_min, trailing_sum

Query = Callable[[Path, str], dict[str, np.ndarray]]
Auc = Callable[[np.ndarray, np.ndarray], float]
LATENT = [
    "frailty_top_decile", "income_shock_active", "state_str", "state_dis",
    "state_hrd_before_forb", "bust_quiet",
]  # fmt: skip
SQL = {
    "transactor": "coalesce(min(ratio) OVER w3 >= 0.95, false)",
    "revolver_6m": "coalesce(max(ratio) OVER w6 < 0.95 AND min(bal) OVER w6 > 0 AND month > 6, false)",
    "min_pay_streak": "coalesce(sum(minimum) OVER w6 >= 4, false)",
    "cure": "coalesce(bkt = 0 AND before >= 1, false)",
    "redefault": "coalesce(bkt >= 1 AND max(cured) OVER w6p = 1, false)",
    "income_loss": "income = 0",
    "cash_adv_streak": "count(*) FILTER (cash > 0) OVER w3 >= 2",
    "inq_burst": "sum(inq) OVER w2 >= 3",
    "hardship": "forb = 1",
    "overlimit": "bal > lim",
    "recession": "t BETWEEN 8 AND 19",
    "xor_trades_age": "(ntr >= 5) <> (file_age >= 84)",
    "distractor_visible_statement_day": "statement_day <= 6",
}


def test_planted_concepts_are_what_the_columns_say(complete: Path, query: Query) -> None:
    frames = ", ".join(
        f"w{n} AS (PARTITION BY entity_id ORDER BY t ROWS {n - 1} PRECEDING)" for n in (2, 3, 6)
    )
    pairs = ", ".join(f"({sql})::int AS s_{name}, {name}::int AS p_{name}" for name, sql in SQL.items())
    found = query(
        complete,
        f"""WITH first AS (
            SELECT *, lag(bkt) OVER w AS before, lag(due) OVER w AS owed, lag(bal) OVER w AS old,
            row_number() OVER w AS month FROM panel WINDOW w AS (PARTITION BY entity_id ORDER BY t)),
        second AS (
            SELECT *, (bkt = 0 AND before >= 1)::int AS cured, pay / nullif(old, 0) AS ratio,
            (pay BETWEEN 0.9 * owed AND 1.1 * owed AND old > 2 * owed)::int AS minimum FROM first)
        SELECT {pairs} FROM (SELECT second.*, planted.* EXCLUDE (entity_id, t)
            FROM second JOIN planted USING (entity_id, t))
        WINDOW {frames},
        w6p AS (PARTITION BY entity_id ORDER BY t ROWS BETWEEN 6 PRECEDING AND 1 PRECEDING)""",
    )
    for name in SQL:
        assert found[f"p_{name}"].sum() > 0, name
        np.testing.assert_array_equal(found[f"s_{name}"], found[f"p_{name}"], err_msg=name)


def test_episodes_show_in_the_columns(complete: Path, query: Query) -> None:
    found = query(
        complete,
        """SELECT util - lag(util) OVER w rise, util, purch, usual, util_rising, bust_out, seasonal,
        util_rising_and_income_loss AS both, income FROM (
            SELECT *, bal / lim AS util, avg(purch) OVER (PARTITION BY entity_id) AS usual
            FROM panel JOIN planted USING (entity_id, t))
        WINDOW w AS (PARTITION BY entity_id ORDER BY t)""",
    )
    rising, december = found["util_rising"] == 1, found["seasonal"] == 1
    assert rising.sum() > 500
    np.testing.assert_allclose(found["rise"][rising], 0.06, atol=2e-4)
    assert np.quantile(found["util"][found["bust_out"] == 1], 0.1) > 0.8
    assert found["purch"][december].mean() > 1.5 * found["usual"][december].mean()
    np.testing.assert_array_equal(found["both"] == 1, rising & (found["income"] == 0))


def test_the_forbearance_flag_lags_hardship(complete: Path, query: Query) -> None:
    found = query(
        complete,
        """SELECT state, forb, state_hrd_before_forb AS early, coalesce(state = lag(state) OVER w
        AND state = lag(state, 2) OVER w, false) AS third
        FROM panel JOIN states USING (entity_id, t) JOIN truth USING (entity_id, t)
        WINDOW w AS (PARTITION BY entity_id ORDER BY t)""",
    )
    hard = np.asarray(found["state"]) == "HRD"
    np.testing.assert_array_equal(found["early"] == 1, hard & (found["forb"] == 0))
    assert (found["forb"][~hard] == 0).all()
    assert (found["forb"][hard & (found["third"] == 0)] == 0).all()
    assert 0.2 < found["forb"][hard].mean() < 0.8


def test_latent_truths_are_the_states(complete: Path, query: Query) -> None:
    found = query(
        complete,
        """SELECT state, theta, shock_month, truth.* EXCLUDE (entity_id, t)
        FROM states JOIN truth USING (entity_id, t)""",
    )
    state = np.asarray(found["state"])
    np.testing.assert_array_equal(found["state_str"] == 1, state == "STR")
    np.testing.assert_array_equal(found["state_dis"] == 1, state == "DIS")
    np.testing.assert_array_equal(found["bust_quiet"] == 1, state == "BUST_QUIET")
    np.testing.assert_array_equal(found["income_shock_active"] == 1, found["shock_month"] > 0)
    np.testing.assert_array_equal(found["frailty_top_decile"] == 1, found["theta"] > 0.5 * 1.2815515655446004)


def test_no_single_column_reveals_a_latent_truth(reference: Path, query: Query) -> None:
    found = query(
        reference,
        """SELECT panel.* EXCLUDE (entity_id, t, default_next_12m, default_entity), bal / lim AS util,
        truth.* EXCLUDE (entity_id, t) FROM panel JOIN truth USING (entity_id, t)""",
    )
    for name in LATENT:
        truth = found[name]
        assert truth.sum() > 100
        for column in set(found) - set(LATENT):
            value = np.nan_to_num(found[column], nan=-1e9)
            cell = np.digitize(value, np.unique(np.quantile(value, np.linspace(0.02, 0.98, 49))))
            rate = np.bincount(cell, truth) / np.maximum(np.bincount(cell), 1)
            precision = np.sort(rate[cell])[::-1][: int(truth.sum())].mean()
            assert (precision - truth.mean()) / (1 - truth.mean()) < 0.6, (name, column)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("distractor_visible_rounded", 0.97, 1.0),
        ("distractor_withheld_weekday", 0.46, 0.54),
        ("distractor_withheld_campaign", 0.43, 0.57),
        ("absent_p05", 0.43, 0.57),
        ("absent_p20", 0.46, 0.54),
    ],
)
def test_what_is_withheld_cannot_be_learned(
    reference: Path, query: Query, summary: np.ndarray, learned_auc: Auc, name: str, low: float, high: float
) -> None:
    sql = f"SELECT {name} y FROM planted SEMI JOIN last USING (entity_id, t) ORDER BY entity_id"
    assert low <= learned_auc(summary, query(reference, sql)["y"]) <= high


def test_a_latent_truth_can_be_learned_from_the_history(
    reference: Path, query: Query, summary: np.ndarray, learned_auc: Auc
) -> None:
    sql = "SELECT frailty_top_decile y FROM truth SEMI JOIN last USING (entity_id, t) ORDER BY entity_id"
    assert 0.65 < learned_auc(summary, query(reference, sql)["y"]) < 0.9


def test_prevalences_are_near_their_targets(reference: Path, query: Query) -> None:
    key = json.loads((reference / "truth.json").read_text())
    assert key["format_version"] == 1
    assert ReferenceConfig.model_validate(key["config"]) == ReferenceConfig(entities=7000)
    roles = [concept["role"] for concept in key["concepts"]]
    assert {role: roles.count(role) for role in set(roles)} == {
        "planted": 16,
        "latent": 6,
        "absent": 4,
        "distractor_withheld": 4,
        "distractor_visible": 2,
    }
    for concept in key["concepts"]:
        assert 0.3 < concept["realised_prevalence"] / concept["target_prevalence"] < 2.5, concept["id"]
        assert concept["hazard_sign"] is None or concept["role"] in ("planted", "latent")
    table = query(
        reference, "SELECT avg(overlimit::int) overlimit, avg(absent_p20::int) absent_p20 FROM planted"
    )
    realised = {concept["id"]: concept["realised_prevalence"] for concept in key["concepts"]}
    for name, share in table.items():
        assert realised[name] == pytest.approx(share[0])
    assert [world["feature_encoding_protected"] for world in key["protected"]] == [
        "redundant",
        "redundant",
        "harmful",
        "proxy",
    ]


def test_a_persistent_signal_has_its_share_and_its_spells() -> None:
    signal = persistent(np.random.default_rng(0), (20_000, 40), 0.05)
    np.testing.assert_allclose(signal.mean(axis=0), 0.05, atol=0.008)
    ends = (signal[:, :-1] & ~signal[:, 1:]).sum() / signal[:, :-1].sum()
    assert ends == pytest.approx(1 / 6, rel=0.05)


def test_trailing_windows_skip_nan_and_start_short() -> None:
    x = np.array([[3.0, np.nan, 1.0, 5.0]])
    np.testing.assert_array_equal(trailing_max(x, 2), [[3, 3, 1, 5]])
    np.testing.assert_array_equal(trailing_min(x, 3), [[3, 3, 1, 1]])
    np.testing.assert_array_equal(trailing_sum(x, 2), [[3, 3, 1, 6]])
    np.testing.assert_array_equal(lagged(x, 2), [[np.nan, np.nan, 3, np.nan]])
