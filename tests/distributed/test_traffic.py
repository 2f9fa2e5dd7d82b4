"""What the planner says a step sends is what it sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.base import SAEConfig
from sae.config import parse_config
from tests.train.runs import make_trainer, plant
from train.machines import GPUS
from train.plan import TrainConfig
from train.planner import Mesh, describe, estimate

D_IN, D_SAE, K, BATCH, STEPS = 12, 48, 3, 32, 600
KINDS = {
    "topk": {},
    "hierarchical_topk": {},
    "batch_topk": {},
    "matryoshka": {},
    "matryoshka by rate": {"by_rate": True},
    "lista": {"by_rate": False},
    "lista from 2 k, by rate": {"k_start": 2, "steps": 2},
}


def _settings(name: str) -> dict[str, object]:
    return {"kind": name.split(maxsplit=1)[0], "d_sae": D_SAE, "k": K, "k_aux": 7, **KINDS[name]}


def _bytes_of_a_step(world, name: str, folder: str) -> dict[str, int]:
    """Train 3 and then 1 more of many steps, features dead by decree, and count what the last one sent."""
    work = Path(folder) / name / f"{world.rank}"
    run = make_trainer(
        plant(600, d_in=D_IN, features=24, l0=3), work, world=world, sae=_settings(name),
        batch_size=BATCH, rows=BATCH * STEPS, dead_after_rows=10**6, lr=1e-9,
    )  # fmt: skip
    batches = [run.inputs.next() for _ in range(4)]
    for batch in batches[:3]:
        run.step(batch, {})
    run.state.silent_rows[:5] = 10**7
    before = dict(world.traffic)
    run.step(batches[3], {})
    found: dict[str, int] = {}
    for (axis, _), sent in world.traffic.items():
        found[axis] = found.get(axis, 0) + sent
    for (axis, _), sent in before.items():
        found[axis] -= sent
    return found


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)])
def test_bytes_on_each_axis_are_those_that_the_planner_foretells(mesh, pool_of, tmp_path):
    counted = {name: pool_of(mesh).run(_bytes_of_a_step, name, str(tmp_path), mesh=mesh)[0] for name in KINDS}
    for name, found in counted.items():
        sae = parse_config(SAEConfig, _settings(name), where="test")
        config = parse_config(TrainConfig, {"rows": STEPS * BATCH, "batch_size": BATCH}, where="test")
        planned = estimate(
            describe(sae, config, d_in=D_IN), Mesh(*mesh), GPUS["h100"], dead_share=5 / D_SAE * mesh[1]
        )
        axis = "data" if mesh == (2, 1) else "feature"
        # but for single numbers: how many are dead, which shard is widest, the smallest code
        assert planned.sent[axis] == pytest.approx(found[axis], abs=16), (name, found)
        assert planned.sent["all"] == pytest.approx(found.get("all", 0), abs=16), (name, found)
