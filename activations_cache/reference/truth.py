"""The answer key: latent truths that no column shows, and the table that says what every concept is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .chain import DIS, HRD, Q1, Q3, STR, BoolArray, IntArray
from .concepts import CONCEPTS, Concept
from .config import ReferenceConfig
from .population import People

FORMAT_VERSION = 1
TOP_DECILE = 1.2815515655446004

LATENT: tuple[Concept, ...] = (
    Concept(
        "frailty_top_decile", "Hidden frailty in the top tenth of the population", "latent", 0.10, 1, None
    ),
    Concept("income_shock_active", "A hidden income shock is running", "latent", 0.035, 1, None),
    Concept("state_str", "Hidden state: stretched", "latent", 0.13, 1, None),
    Concept("state_dis", "Hidden state: distressed", "latent", 0.035, 1, None),
    Concept(
        "state_hrd_before_forb",
        "Hidden hardship, before the forbearance flag is set",
        "latent",
        0.005,
        1,
        None,
    ),
    Concept("bust_quiet", "The quiet phase before a bust-out", "latent", 0.003, 1, None),
)

_PROTECTED: dict[int, tuple[str, str]] = {
    0: (
        "redundant",
        "the attribute neither moves default nor any column but its proxies: dropping it loses nothing",
    ),
    1: ("redundant", "the attribute acts through income, which is shown: given income it adds nothing"),
    2: (
        "harmful",
        "inquiries are overstated for the protected and the overstatement has no effect on default",
    ),
    3: (
        "proxy",
        "the hazard itself differs: a feature that encodes the attribute stands in for it",
    ),
}


def latent(
    config: ReferenceConfig, people: People, states: IntArray, shock: IntArray, forb: BoolArray
) -> dict[str, BoolArray]:
    """Return the six latent truths, each [n, horizon]."""
    frail = people.theta > TOP_DECILE * config.frailty_sd
    return {
        "frailty_top_decile": np.broadcast_to(frail[:, None], states.shape),
        "income_shock_active": shock > 0,
        "state_str": states == STR,
        "state_dis": states == DIS,
        "state_hrd_before_forb": (states == HRD) & ~forb,
        "bust_quiet": (states >= Q1) & (states <= Q3),
    }


def answer_key(
    config: ReferenceConfig, counts: Mapping[str, int], *, rows: int, entities: int
) -> dict[str, Any]:
    """Return the content of truth.json.

    Parameters
    ----------
    config
        What was generated.
    counts
        True rows per concept.
    rows, entities
        Size of the panel.
    """
    table = [
        {
            "id": concept.id,
            "text": concept.text,
            "role": concept.role,
            "target_prevalence": concept.prevalence,
            "realised_prevalence": counts[concept.id] / rows,
            "hazard_sign": concept.sign,
            "hazard_log_odds": concept.strength,
        }
        for concept in (*CONCEPTS, *LATENT)
    ]
    worlds = [
        {
            "world": world,
            "feature_encoding_protected": verdict,
            "why": why,
            "generated": world == config.world,
        }
        for world, (verdict, why) in _PROTECTED.items()
    ]
    return {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "rows": rows,
        "entities": entities,
        "concepts": table,
        "protected": worlds,
    }
