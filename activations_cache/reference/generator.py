"""The reference panel: a book of card accounts whose hidden truth is known, written beside its answer key.

Files
-----
panel.parquet
    What a lender sees, one row per (entity_id, t), and two outcomes that look ahead (`OUTCOMES`).
states.parquet, truth.parquet, planted.parquet, true_pd.parquet, protected.parquet, truth.json
    The answer key, in files of its own so that a pipeline given the panel cannot read it.

Outcomes
--------
`default_entity` is whether the entity defaults in the 12 months after its last row, followed to the end
even when the account leaves the book. `default_next_12m` is what the lender itself gets to know of each row:
null where the account left the book within 12 months of the row without a default. In the book `performing`
nothing defaults up to an entity's last month, so the outcome of earlier rows has survivor bias; the book
`all` has none where `attrition` is 0. `hazard.py` says how default arises.

Deviations from the published design
------------------------------------
Bust-outs are states of their own; the default of `hazard_intercept` is -8, not -7; affordability moves the
chain; the hazard has two non-linear terms more; people in one state differ in utilisation; frailty leaves
faint traces in habits (utilisation, punctuality, savings, inquiries), since the chain alone says next to
nothing about it in two years.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import PanelError

from .chain import BUCKET, SHOWN_NAMES, BoolArray, FloatArray
from .config import OUTCOME_MONTHS, ReferenceConfig
from .macro import Economy, simulate_economy
from .simulate import BLOCK, Block, block_pd, generator, simulate_block
from .truth import answer_key

OUTCOMES = ("default_next_12m", "default_entity")
FILES = ("panel", "states", "truth", "planted", "true_pd", "protected")


def generate(config: ReferenceConfig, out: Path) -> None:
    """Write the panel and its answer key into the folder `out`.

    Parameters
    ----------
    config
        Size, world and rates; the same config gives the same bytes.
    out
        The folder; made if need be. Files of an earlier panel in it are replaced, all at the end.

    Raises
    ------
    PanelError
        `out` is a file, or so many accounts default that the book cannot be filled.
    """
    if out.exists() and not out.is_dir():
        raise PanelError(
            f"cannot write a panel into {out}", got="a file", expected="a folder", do="name another path"
        )
    out.mkdir(parents=True, exist_ok=True)
    beside = {name: out / f".{name}.parquet.partial" for name in FILES}
    try:
        key = _write_tables(config, beside)
        (out / ".truth.json.partial").write_text(json.dumps(key, indent=1) + "\n")
        for name, path in beside.items():
            path.replace(out / f"{name}.parquet")
        (out / ".truth.json.partial").replace(out / "truth.json")
    finally:
        for path in (*beside.values(), out / ".truth.json.partial"):
            path.unlink(missing_ok=True)


def _write_tables(config: ReferenceConfig, paths: dict[str, Path]) -> dict[str, object]:
    """Simulate block after block until the book is full; return the content of truth.json."""
    longest = config.months // 2 + config.months + OUTCOME_MONTHS
    economy = simulate_economy(config, longest)
    writers: dict[str, pq.ParquetWriter] = {}
    counts: Counter[str] = Counter()
    rows = entities = index = 0
    try:
        while entities < config.entities:
            block = _keep(simulate_block(config, economy, index), config.entities - entities)
            found = int((block.last >= 0).sum())
            if not found:
                raise PanelError(
                    "no account is left in the book", do="lower worsening_shift or hazard_intercept"
                )
            for name, table in _tables(config, economy, block, index).items():
                if name not in writers:
                    writers[name] = pq.ParquetWriter(paths[name], table.schema, compression="zstd")
                writers[name].write_table(table)
            shown = {
                name: int((flag & block.shown).sum())
                for name, flag in (block.concepts | block.latent).items()
            }
            counts.update(shown)
            rows, entities, index = rows + int(block.shown.sum()), entities + found, index + 1
    finally:
        for writer in writers.values():
            writer.close()
    return answer_key(config, counts, rows=rows, entities=entities)


def _keep(block: Block, most: int) -> Block:
    """Leave all but the first `most` entities out of the book."""
    over = np.cumsum(block.last >= 0) > most
    return block._replace(last=np.where(over, -1, block.last), shown=block.shown & ~over[:, None])


def _tables(config: ReferenceConfig, economy: Economy, block: Block, index: int) -> dict[str, pa.Table]:
    shown = block.shown
    names = np.array([f"A{index * BLOCK + i:06d}" for i in range(BLOCK)])
    keys = {"entity_id": np.broadcast_to(names[:, None], shown.shape)[shown], "t": block.time[shown]}
    inside = block.last >= 0
    pd = block_pd(config, economy, block)
    panel = keys | _panel_columns(config, economy, block) | _outcomes(config, block)
    states = keys | {
        "state": np.array(SHOWN_NAMES)[block.states[shown]],
        "theta": _rows(block, block.people.theta),
        "shock_month": block.shock[shown],
        "macro_u": economy.u[block.time][shown],
        "hazard": block.hazard[shown],
        "months_to_default": _months_to_default(block),
    }
    states |= {name: block.latent[name][shown] for name in ("frailty_top_decile", "income_shock_active")}
    tables = {
        "panel": _dirty(config, pa.table(_nullable(panel)), index),
        "states": pa.table(_nullable(states)),
        "truth": pa.table(keys | {name: flag[shown] for name, flag in block.latent.items()}),
        "planted": pa.table(keys | {name: flag[shown] for name, flag in block.concepts.items()}),
        "protected": pa.table({"entity_id": names[inside], "protected": block.people.protected[inside]}),
    }
    asked = ~np.isnan(pd)
    tables["true_pd"] = pa.table(
        {
            "entity_id": np.broadcast_to(names[:, None], shown.shape)[asked],
            "t": block.time[asked],
            "pd_12m": pd[asked],
        }
    )
    return tables


def _panel_columns(config: ReferenceConfig, economy: Economy, block: Block) -> dict[str, np.ndarray]:
    """Return what the lender sees, each of shape [rows]."""
    shown, people, time = block.shown, block.people, block.time
    bucket = BUCKET[block.states]
    if config.recode_month is not None:
        bucket = bucket + ((bucket > 0) & (time >= config.recode_month))
    late_feed = people.inq_late[:, None] & (time < config.inq_missing_until)
    card, home, bureau = block.card, block.household, block.bureau
    matrices = {
        "bkt": bucket,
        **{name: getattr(card, name) for name in ("bal", "lim", "pay", "due", "purch", "cash")},
        "inq": np.where(late_feed, np.nan, bureau.inq_shown),
        "new_tr": bureau.new_tr,
        "ntr": bureau.ntr,
        "file_age": bureau.file_age,
        "mob": block.mob,
        **home._asdict(),
        "forb": block.forb.astype(np.int64),
        "rate": block.rate,
        "hpi": economy.hpi[time],
        "uer": economy.uer[time],
        "days_late": block.late,
    }
    constants = {
        "orig": block.card.lim[:, 0],
        "coll": people.coll,
        "region": people.region,
        "merchant_mix": people.merchant_mix,
        "statement_day": people.statement_day,
    }
    return {name: value[shown] for name, value in matrices.items()} | {
        name: _rows(block, value) for name, value in constants.items()
    }


def _outcomes(config: ReferenceConfig, block: Block) -> dict[str, np.ndarray]:
    """Return the two outcomes, each of shape [rows]: 0, 1, nan for censored."""
    age = np.arange(block.shown.shape[1])
    default, last = block.default[:, None], block.last[:, None]
    known_until = np.where(block.people.left, block.last, block.last + OUTCOME_MONTHS)[:, None]
    ended_by_default = default <= block.people.last[:, None]
    known_until = np.where(ended_by_default, last + OUTCOME_MONTHS, known_until)
    soon = (default <= age + OUTCOME_MONTHS) & (default <= known_until)
    value = np.where(soon, 1.0, np.where(age + OUTCOME_MONTHS > known_until, np.nan, 0.0))
    within = (block.default <= block.last + OUTCOME_MONTHS).astype(np.float64)
    return {OUTCOMES[0]: value[block.shown], OUTCOMES[1]: _rows(block, within)}


def _months_to_default(block: Block) -> FloatArray:
    """Return the months from each row to the default, nan for none within the simulated path, [rows]."""
    horizon = block.shown.shape[1]
    months = block.default[:, None] - np.arange(horizon)
    return np.where(block.default[:, None] < horizon, months, np.nan)[block.shown]


def _rows(block: Block, value: np.ndarray) -> np.ndarray:
    """Repeat a value per entity over its rows."""
    return np.broadcast_to(value[:, None], block.shown.shape)[block.shown]


def _nullable(columns: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    """Turn nan into null."""
    return {name: pa.array(value, from_pandas=True) for name, value in columns.items()}


def _dirty(config: ReferenceConfig, table: pa.Table, index: int) -> pa.Table:
    """Write a share of the rows twice."""
    if not config.duplicates:
        return table
    twice: BoolArray = generator(config.seed, 9, index).random(table.num_rows) < config.duplicates
    return table.take(np.repeat(np.arange(table.num_rows), 1 + twice))
