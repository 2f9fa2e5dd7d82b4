from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest

from activations_cache.reference.config import ReferenceConfig
from activations_cache.reference.generator import FILES, generate

Query = Callable[[Path, str], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A panel with the default rates, 7,000 entities."""
    out = tmp_path_factory.mktemp("reference")
    generate(ReferenceConfig(entities=7000), out)
    return out


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A panel in which no row or cell is missing, 1,500 entities, defaulted accounts included."""
    out = tmp_path_factory.mktemp("complete")
    whole = {"missing": 0.0, "outage": False, "inq_missing": 0.0, "attrition": 0.0}
    generate(ReferenceConfig(entities=1500, book="all", true_pd="all", seed=5, **whole), out)
    return out


@pytest.fixture(scope="session")
def query() -> Query:
    """Run SQL over the files of a folder, each a view; numbers come back as float64, null as nan."""

    def floats(value: np.ndarray) -> np.ndarray:
        if value.dtype.kind not in "biuf":
            return value
        return np.ma.filled(np.ma.asarray(value).astype(float), np.nan)

    def run(folder: Path, sql: str) -> dict[str, np.ndarray]:
        with duckdb.connect() as connection:
            connection.execute("SET threads = 1")
            for name in FILES:
                connection.execute(f"CREATE VIEW {name} AS FROM '{folder / name}.parquet'")
            connection.execute(
                "CREATE VIEW last AS SELECT entity_id, max(t) AS t FROM panel GROUP BY entity_id"
            )
            return {name: floats(value) for name, value in connection.execute(sql).fetchnumpy().items()}

    return run


@pytest.fixture(scope="session")
def summary(reference: Path, query: Query) -> np.ndarray:
    """One row per entity of `reference`, by id: the last month's columns and simple aggregates."""
    found = query(
        reference,
        """SELECT p.* EXCLUDE (entity_id, t, default_next_12m, default_entity), a.* EXCLUDE (entity_id)
        FROM panel p SEMI JOIN last USING (entity_id, t) JOIN (
            SELECT entity_id, max(bkt), avg(bal / lim), regr_slope(bal / lim, t), sum(inq), min(min_bal),
            avg(days_late), avg(income), sum(nsf), avg(purch), avg(pay / nullif(due, 0)),
            avg((pay % 10 = 0 AND pay > 0)::int) FROM panel GROUP BY entity_id) a USING (entity_id)
        ORDER BY entity_id""",
    )
    matrix = np.column_stack(list(found.values()))
    return np.where(np.isfinite(matrix), matrix, np.nan)


@pytest.fixture(scope="session")
def learned_auc() -> Callable[[np.ndarray, np.ndarray], float]:
    """Cross-validated AUC of gradient boosting."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    def auc(features: np.ndarray, target: np.ndarray) -> float:
        model = HistGradientBoostingClassifier(
            max_iter=60, learning_rate=0.06, max_leaf_nodes=8, min_samples_leaf=40
        )
        score = cross_val_predict(model, features, target, cv=3, method="predict_proba")[:, 1]
        return float(roc_auc_score(target, score))

    return auc
