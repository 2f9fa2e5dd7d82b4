"""A labels folder as a labelling would leave it: random, but plausible, with texts that must be escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from label.tables import FORMAT_VERSION, write_table

Record = dict[str, Any]
HOSTILE = "Paid <script>alert(1)</script> & \"late\" 'twice'"
N_FEATURES, N_LABELLED = 40, 12
UNMOVED = 9
"""A feature whose removal changes no logit."""
COLUMNS = ("bkt", "util", "bal", "lim", "pay", "due", "purch", "inq", "mob", "days_since_payment")
CONCEPTS: list[tuple[str, str, str, str]] = [
    ("dpd30_now", "Account is 30+ days past due at statement date", "delinquency", "bool"),
    ("dpd60_now", "60+ days past due now", "delinquency", "bool"),
    ("ever_90_12m", "Has been 90+ days past due in the last twelve months", "delinquency", "bool"),
    ("util_level", "Credit utilisation", "utilisation", "float"),
    ("util_rising_3m", "Utilisation has risen for three months in a row", "utilisation", "bool"),
    ("over_limit", "Balance is above the limit", "utilisation", "bool"),
    ("min_payer", "Pays about the minimum amount due, while owing far more than that", "payment", "bool"),
    ("missed_payments_6m", "Missed payments in the last six months", "payment", "float"),
    ("transactor", "Pays the whole statement every month of the last six", "payment", "bool"),
    ("inquiry_burst", "Three or more hard inquiries within three months", "seeking", "bool"),
    ("hostile", HOSTILE, "odd <b>", "bool"),
    ("balance_jump", "Balance is up by half within one month", "shock", "bool"),
    ("dormant", "No purchase and no balance for six months", "inactivity", "bool"),
    ("months_on_book", "Months on book", "tenure", "float"),
]
ABSENT = [
    ("hpi_drop", "meant for mortgage; the panel is revolving"),
    ("ltv_high", "meant for mortgage, auto; the panel is revolving"),
    ("gambling", "the panel has no column gamble, inflow"),
]
REASONS = {
    "dead": "it fires neither on discover nor on confirm",
    "too_few_entities": "it fires on, or its concept holds for, too few entities",
    "no_association": "no concept goes with it on the discovery entities",
    "not_confirmed": "its concept did not hold up on the confirmation entities",
    "control": "a signal that means nothing explains it as well",
}


def measured(rng: np.random.Generator, skill: float) -> Record:
    """Figures that go with a skill, each with an interval around it."""
    prevalence = float(rng.uniform(0.005, 0.2))
    ap = skill * (1 - prevalence) + prevalence
    values = {"skill": skill, "ap": ap, "lift": ap / prevalence}
    values |= {
        n: float(np.clip(skill + rng.uniform(-0.1, 0.15), 0.02, 0.98)) for n in ("f1", "precision", "recall")
    }
    out: Record = {}
    for name, value in values.items():
        half = float(rng.uniform(0.02, 0.07)) * (value if name == "lift" else 1)
        out |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
    counts = {"n_entities": 412, "n_entities_without": 1588, "n_entities_firing": 530}
    return out | {"prevalence": prevalence, **counts, "p_value": 1e-9, "q_value": 4e-8}


def spread(name: str, value: float, half: float) -> Record:
    """A figure with an interval."""
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def bounds(kind: str, rng: np.random.Generator) -> tuple[float | None, float | None, str]:
    """An interval of values for numeric concepts, and its words."""
    if kind == "bool":
        return None, None, ""
    low = round(float(rng.uniform(0.3, 0.8)), 2)
    return (
        (low, None, f": at least {low}")
        if rng.random() < 0.5
        else (low, low + 0.15, f": between {low} and {low + 0.15:.2f}")
    )


def feature(j: int, rng: np.random.Generator) -> Record:
    """One row of features.parquet: the first twelve are labelled."""
    base = {
        "feature": j,
        "rivals": [],
        "firing_rate": float(rng.uniform(0.001, 0.2)),
        "firing_rate_discover": 0.04,
    }
    if j >= N_LABELLED:
        reason = list(REASONS)[j % len(REASONS)]
        base |= {"status": "unlabelled", "reason": reason, "description": f"unlabelled: {REASONS[reason]}"}
        if reason in ("not_confirmed", "control"):
            id_, words, category, kind = CONCEPTS[j % len(CONCEPTS)]
            low, high, span = bounds(kind, rng)
            base |= {"concept": id_, "title": words + span, "category": category, "low": low, "high": high}
            base |= {"threshold": 0.4, **measured(rng, float(rng.uniform(0.1, 0.3)))}
        return base
    id_, words, category, kind = CONCEPTS[(0, 1, 3, 3, 3, 4, 6, 8, 9, 10, 11, 12)[j]]
    low, high, span = bounds(kind, rng)
    skill = float(rng.uniform(0.35, 0.92))
    over_raw, over_twin = float(rng.uniform(-0.1, 0.3)), float(rng.uniform(-0.05, 0.3))
    size, random, matched = float(rng.uniform(0.02, 0.4)), 0.05, 0.06
    base |= {
        "status": "labelled",
        "concept": id_,
        "title": words + span,
        "category": category,
        "low": low,
        "high": high,
    }
    base |= {"threshold": 0.55, "mean_activation": 1.4, "max_activation": 4.8, **measured(rng, skill)}
    base |= {
        "learned": over_raw > 0.06 and over_twin > 0.06,
        **spread("over_raw", over_raw, 0.06),
        **spread("over_twin", over_twin, 0.06),
    }
    base |= {
        "raw_column": "high bkt",
        "raw_skill": skill - over_raw,
        "twin_feature": j + 3,
        "twin_skill": skill - over_twin,
    }
    base |= {
        "clock_skill": 0.02,
        "control": "hash:3",
        "control_skill": 0.01,
        "rivals": ["ever_90_12m"] if j == 1 else [],
    }
    if j == UNMOVED:
        size = 0.0
    if j != 7:
        base |= {
            "used": size > 0.1,
            **spread("effect", -size * 0.7, min(size, 0.02)),
            **spread("effect_size", size, min(size, 0.02)),
        }
        base |= {
            "effect_share": size / 4,
            "effect_entities": 256,
            "random_size": random,
            "matched_size": matched,
        }
        base |= {**spread("over_random", size - random, 0.03), **spread("over_matched", size - matched, 0.04)}
    verdicts = f"Learned: {base['learned']}. Used: {base.get('used')}."
    base["description"] = (
        f"Fires when: {base['title']}. Skill {skill:.2f} [{base['skill_low']:.2f}, "
        f"{base['skill_high']:.2f}]. {verdicts}"
    )
    return base


def associations(features: list[Record], rng: np.random.Generator) -> Iterator[Record]:
    """The label, two more concepts, the position and a control, for each labelled feature."""
    for f in features[:N_LABELLED]:
        own = {k: f[k] for k in ("feature", "concept", "low", "high", "threshold") if k in f}
        own |= {
            k: v
            for k, v in f.items()
            if k.removesuffix("_low").removesuffix("_high")
            in ("skill", "ap", "lift", "f1", "precision", "recall")
        }
        own |= {k: f[k] for k in ("prevalence", "n_entities", "p_value", "q_value")}
        yield own | {
            "family": "concept",
            "rank": 0,
            "auroc_discover": 0.93,
            "skill_discover": f["skill"] + 0.02,
            "f1_discover": f["f1"],
        }
        for rank, other in ((1, "ever_90_12m"), (2, "missed_payments_6m")):
            skill = f["skill"] * float(rng.uniform(0.4, 0.98))
            yield {
                "feature": f["feature"],
                "concept": other,
                "family": "concept",
                "rank": rank,
                "skill_discover": skill + 0.03,
                "f1_discover": 0.4,
                **measured(rng, skill),
            }
        for family, name in (("clock", "position"), ("hash", "hash:3"), ("permuted", "permuted:dpd30_now")):
            yield {
                "feature": f["feature"],
                "concept": name,
                "family": family,
                "rank": 0,
                "skill_discover": 0.03,
                "f1_discover": 0.1,
                **measured(rng, float(rng.uniform(-0.01, 0.05))),
            }


def histories(j: int, rng: np.random.Generator) -> Iterator[Record]:
    """Histories in every band, some with months missing, some with values missing."""
    for band in ("top", "middle", "low", "near_miss", "false_alarm"):
        for example in range(6 if band == "top" else 3):
            start = 24180 + int(rng.integers(0, 4))
            limit = float(rng.choice([500, 2000, 5000, 12000]))
            onset = int(rng.integers(6, 20))
            util, bkt = float(rng.uniform(0.1, 0.6)), 0
            gone = set(rng.integers(3, 22, size=int(rng.integers(0, 3))).tolist())
            for position, month in enumerate(m for m in range(24) if m not in gone):
                holds = month >= onset and band != "false_alarm"
                util = float(np.clip(util + rng.normal(0.03 if holds else 0, 0.05), 0, 1.3))
                bkt = min(bkt + 1, 5) if holds and rng.random() < 0.6 else max(bkt - 1, 0)
                level = {"top": 4.5, "middle": 2.0, "low": 0.7, "near_miss": 0.0, "false_alarm": 1.2}[band]
                fires = holds or (band == "false_alarm" and month > 18)
                value = level * float(rng.uniform(0.5, 1.05)) if fires else 0.0
                record = {
                    "feature": j,
                    "band": band,
                    "example": example,
                    "entity": f"client-{j}-{band}-{example}",
                    "position": position,
                }
                record |= {
                    "time": start + month,
                    "activation": value,
                    "concept_true": None if month < 3 else holds,
                }
                raw = (
                    bkt,
                    util,
                    util * limit,
                    limit,
                    util * limit * 0.08,
                    util * limit * 0.05,
                    float(rng.gamma(2, 60)),
                    float(rng.poisson(0.2)),
                    10 + month,
                    float(30 * bkt),
                )
                yield record | {
                    f"raw_{n}": None if n == "purch" and rng.random() < 0.1 else float(v)
                    for n, v in zip(COLUMNS, raw, strict=True)
                }


def histogram(j: int, rng: np.random.Generator) -> Iterator[Record]:
    """Silent rows, then 30 bins in which the concept becomes likelier with the activation."""
    yield {"feature": j, "low": 0.0, "high": 0.0, "n_true": 310, "n_false": 41230, "n_unknown": 2100}
    for i in range(30):
        true, false = 220 * np.exp(-(((i - 14) / 7) ** 2)), 900 * np.exp(-i / 3)
        yield {
            "feature": j,
            "low": i * 0.16,
            "high": (i + 1) * 0.16,
            "n_true": int(rng.poisson(true)),
            "n_false": int(rng.poisson(false)),
            "n_unknown": int(rng.poisson(false / 40)),
        }


def concepts(features: list[Record], rng: np.random.Generator) -> Iterator[Record]:
    """Every concept with its best feature, then what does not apply."""
    for i, (id_, words, category, kind) in enumerate(CONCEPTS):
        low, high, _ = bounds(kind, rng)
        skill = float(rng.uniform(0.1, 0.9))
        record = {
            "concept": id_,
            "text": words,
            "category": category,
            "kind": "point",
            "type": kind,
            "risk": "up",
            "applicable": True,
            "known_share": 0.97,
        }
        record |= {
            "feature": i,
            "low": low,
            "high": high,
            "threshold": 0.5,
            **measured(rng, skill),
            "raw_column": "high bkt",
        }
        record |= {
            "raw_skill": skill * float(rng.uniform(0.6, 1.1)),
            "twin_feature": i + 1,
            "twin_skill": skill * float(rng.uniform(0.5, 1.05)),
        }
        yield record | {
            "n_labelled": sum(f.get("concept") == id_ and f["status"] == "labelled" for f in features)
        }
    for id_, reason in ABSENT:
        yield {"concept": id_, "applicable": False, "reason": reason, "n_labelled": 0}


def summary_of(features: list[Record], concepts: list[Record]) -> Record:
    """The summary that goes with the tables."""
    labelled = [f for f in features if f["status"] == "labelled"]
    reasons: dict[str, int] = {}
    for f in features:
        if f.get("reason"):
            reasons[f["reason"]] = reasons.get(f["reason"], 0) + 1
    measured_ = [c for c in concepts if "skill" in c]
    return {
        "n_features": len(features),
        "n_labelled": len(labelled),
        "n_dead": reasons["dead"],
        "reasons": reasons,
        "n_learned": sum(bool(f["learned"]) for f in labelled),
        "n_used": sum(bool(f.get("used")) for f in labelled),
        "n_learned_and_used": sum(bool(f["learned"]) and bool(f.get("used")) for f in labelled),
        "baselines": {
            n: {c["concept"]: c[f"{n.removesuffix('_column')}_skill"] for c in measured_}
            for n in ("raw_column", "twin")
        },
        "concepts": {c["concept"]: {"feature": c["feature"], "skill": c["skill"]} for c in measured_},
        "fdr_q": 0.01,
        "test_calibration": {
            "n": 25600,
            "rejected_at_0.05": 0.047,
            "plain_rejected_at_0.05": 0.081,
            "inflation": 1.03,
        },
        "controls": {"hash": 0, "persistent": 0, "permuted": 1},
        "removal": {
            "used_together": 0.61,
            "all_features": 1.42,
            "entities": 4096,
            "random_mean": 0.05,
            "matched_mean": 0.06,
        },
        "fidelity": {
            "fvu": 0.083,
            "l0": 15.97,
            "auc_model": 0.781,
            "auc_reference": 0.779,
            "auc_spliced": 0.776,
            "mean_abs_dpd": 0.0084,
        },
        "format_version": FORMAT_VERSION,
    }


@pytest.fixture(scope="session")
def labels_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven tables and the summary."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(7)
    features = [feature(j, rng) for j in range(N_FEATURES)]
    rows = list(concepts(features, rng))
    groups = [
        {
            "concept": "util_level",
            "title": "Credit utilisation: at least 0.6",
            "low": 0.6,
            "features": [2, 3, 30],
            "thresholds": [0.5, 0.4, 0.2],
            "f1_discover": 0.71,
            **{
                k: v
                for k, v in measured(rng, 0.68).items()
                if k.split("_")[0] in ("f1", "precision", "recall")
            },
            "prevalence": 0.2,
            "n_entities": 700,
            "single_f1": 0.44,
        },
        {
            "concept": "hostile",
            "title": HOSTILE,
            "features": [9],
            "thresholds": [0.5],
            "f1_discover": 0.5,
            **spread("f1", 0.5, 0.05),
            "prevalence": 0.01,
            "n_entities": 60,
            "single_f1": 0.5,
        },
    ]
    labelled = range(N_LABELLED)
    write_table(folder, "features", features)
    write_table(folder, "associations", associations(features, rng))
    write_table(folder, "concepts", rows)
    write_table(folder, "groups", groups)
    write_table(folder, "histograms", (b for j in labelled for b in histogram(j, rng)))
    write_table(
        folder,
        "examples",
        (r for j in labelled for r in histories(j, rng)),
        extra=[f"raw_{n}" for n in COLUMNS],
    )
    changes = (
        {"feature": j, "entity": f"client-{i}", "change": float(rng.normal(-0.1, 0.12)) * (j != UNMOVED)}
        for j in labelled
        if j != 7
        for i in range(256)
    )
    write_table(folder, "effects", changes)
    (folder / "summary.json").write_text(json.dumps(summary_of(features, rows)))
    return folder


@pytest.fixture(scope="session")
def run_record() -> Record:
    """What run.json holds."""
    config = {
        "name": "uci_default",
        "seed": 0,
        "panel": {"path": "panel.parquet", "product": "revolving", "period": "month", "split": {"seed": 0}},
        "model": {"kind": "credit_transformer", "d_model": 128},
        "harvest": {"hooks": ["layers.2"], "dtype": "float32"},
        "sae": {"kind": "batch_topk", "d_sae": N_FEATURES, "k": 16},
        "label": {"min_skill": 0.25, "min_f1": 0.4, "max_q": 0.01},
    }
    versions = {"python": "3.11.9", "torch": "2.13.0", "assay": "0.1.0"}
    return {
        "name": "uci_default",
        "config": config,
        "versions": versions,
        "threads": 2,
        "note": "<img src=x onerror=alert(1)>",
    }
