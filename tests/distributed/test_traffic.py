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

D_IN, D_SAE, K, BATCH = 12, 48, 3, 32


def _bytes_of_a_step(world, kind: str, folder: str) -> dict[str, int]:
    """Train 3 and then 3 more steps, half a dictionary dead by decree, and count what the later ones sent."""
    sae = {"kind": kind, "d_sae": D_SAE, "k": K, "k_aux": 7}
    work = Path(folder) / kind / f"{world.rank}"
    run = make_trainer(
        plant(600, d_in=D_IN, features=24, l0=3), work, world=world, sae=sae,
        batch_size=BATCH, rows=BATCH * 6, dead_after_rows=10**6, lr=1e-9,
    )  # fmt: skip
    batches = [run.inputs.next() for _ in range(6)]
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
    counted = {
        kind: pool_of(mesh).run(_bytes_of_a_step, kind, str(tmp_path), mesh=mesh)[0]
        for kind in ("topk", "batch_topk")
    }
    for kind, found in counted.items():
        sae = parse_config(SAEConfig, {"kind": kind, "d_sae": D_SAE, "k": K, "k_aux": 7}, where="test")
        config = parse_config(TrainConfig, {"rows": 6 * BATCH, "batch_size": BATCH}, where="test")
        planned = estimate(
            describe(sae, config, d_in=D_IN), Mesh(*mesh), GPUS["h100"], dead_share=5 / D_SAE * mesh[1]
        )
        axis = "data" if mesh == (2, 1) else "feature"
        assert planned.sent[axis] == pytest.approx(found[axis], rel=0.05), (kind, found)
        if kind == "batch_topk":
            assert planned.sent["all"] == pytest.approx(found["all"], rel=0.05), found
