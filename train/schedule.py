"""The learning rate as a function of the step."""

from __future__ import annotations

from .plan import Plan


def learning_rate(step: int, plan: Plan) -> float:
    """Return the rate of a step: a linear rise, a plateau at `plan.lr`, a linear fall towards 0.

    Parameters
    ----------
    step
        From 0; no step has rate 0.
    plan
        Peak rate and length of the ramps.
    """
    rise = (step + 1) / (plan.warmup_steps + 1)
    fall = (plan.steps - step) / (plan.decay_steps + 1)
    return plan.lr * min(1.0, rise, fall)
