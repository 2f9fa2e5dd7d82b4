"""What a run came to, and what to change about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .plan import Plan

TOO_MUCH = 0.1
"""Share of dead features, or of time spent waiting for data, from which on advice is given."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes
    ----------
    plan
        What was asked, resolved.
    seconds
        Time of this process's share of the run.
    waited
        Share of it spent waiting for data.
    dead
        Share of features dead at the end.
    metrics
        The numbers of the last step, as in metrics.jsonl.
    advice
        What to change, one sentence each; empty where all is well.
    """

    plan: Plan
    seconds: float
    waited: float
    dead: float
    metrics: dict[str, int | float]
    advice: tuple[str, ...]


def advise(dead: float, waited: float, plan: Plan, *, d_sae: int) -> tuple[str, ...]:
    """Return what to change, one sentence each.

    Parameters
    ----------
    dead
        Share of features dead at the end.
    waited
        Share of the time spent waiting for data.
    plan
        What was asked.
    d_sae
        Features asked for.
    """
    advice = []
    if dead > TOO_MUCH:
        alive = math.ceil((1 - dead) * d_sae)
        enough = math.ceil(alive / 64) * 64
        smaller = f"sae.d_sae={enough} would hold the {alive:,} that fire; or " if enough < d_sae else ""
        advice.append(
            f"{dead:.0%} of the features were silent for the last {plan.dead_after_rows:,} rows: "
            f"{smaller}raise sae.k, sae.aux_alpha or train.rows"
        )
    if waited > TOO_MUCH:
        advice.append(f"{waited:.0%} of the time went into waiting for data: put the store on a faster disk")
    return tuple(advice)
