"""From what a labelling found to rows of its tables and to its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .baselines import TwinFeature
from .concepts.library import ConceptInfo
from .confirm import Measure
from .describe import template
from .discover import why_unscreened
from .labelling import Group, Labelling
from .statistics.bootstrap import Interval
from .statistics.score_test import Null
from .targets import CONTROLS, Coded, Target


def spread(name: str, value: Interval | None) -> dict[str, float | None]:
    """Return a figure and its interval as three columns; nothing for None."""
    if value is None:
        return {}
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}


def measured(m: Measure) -> dict[str, Any]:
    """Return the columns that every measured pair has."""
    out: dict[str, Any] = {}
    for name in ("skill", "ap", "lift", "f1", "precision", "recall"):
        out |= spread(name, getattr(m, name))
    return out | {
        "prevalence": m.prevalence,
        "n_entities": m.n_entities,
        "n_entities_without": m.n_entities_without,
        "n_entities_firing": m.n_entities_firing,
    }


def title_of(info: ConceptInfo, coded: Coded, target: Target, whole: bool) -> str:
    """Return a target in words."""
    low, high = coded.bounds(target)
    return template.title({"low": low, "high": high, "whole": whole, "concept_text": info.text})


def feature(work: Labelling, j: int) -> dict[str, Any]:
    """Return one row of features.parquet."""
    decision = work.decisions[j]
    confirm, discover = work.evidence["confirm"], work.evidence["discover"]
    values = confirm.of(j)[1]
    record: dict[str, Any] = {
        "feature": j,
        "status": "labelled" if decision.reason is None else "unlabelled",
        "reason": decision.reason,
        "firing_rate": float(confirm.count[j] / len(confirm.rows)),
        "firing_rate_discover": float(discover.count[j] / len(discover.rows)),
        "mean_activation": float(values.mean()) if len(values) else 0.0,
        "max_activation": float(values[0]) if len(values) else 0.0,
        "rivals": [r.pair.target.concept for r in decision.rivals],
    }
    words: dict[str, Any] = {"concept_text": "", "whole": False}
    if decision.winner is not None:
        pair, measure, q = decision.winner
        coded, info = work.by_id[pair.target.concept], work.info(pair.target.concept)
        low, high = coded.bounds(pair.target)
        words = {"concept_text": info.text, "whole": work.whole.get(info.id, False)}
        record |= {"concept": info.id, "low": low, "high": high, "category": info.category}
        record |= {"threshold": pair.threshold, "q_value": q, **measured(measure)}
        record["p_value"] = float(work.p[work.index_of_pair[j, pair.target]])
        record["title"] = title_of(info, coded, pair.target, words["whole"])
    record |= _nuisances(work, j) | _learned(work, j) | _used(work, j)
    record["description"] = template.describe({**dict.fromkeys(("learned", "used")), **record, **words})
    return record


def _nuisances(work: Labelling, j: int) -> dict[str, Any]:
    clock, control = work.best_nuisance(j, ["clock"]), work.best_nuisance(j, CONTROLS)
    out: dict[str, Any] = {}
    if clock is not None:
        out["clock_skill"] = clock[1].skill.value
    if control is not None:
        out |= {"control": control[0].target.concept, "control_skill": control[1].skill.value}
    return out


def _learned(work: Labelling, j: int) -> dict[str, Any]:
    if work.decisions[j].reason is not None:
        return {}
    learned = work.learned(j)
    winner = work.decisions[j].winner
    assert winner is not None
    compared = work.compared[winner.pair.target]
    out: dict[str, Any] = {
        "learned": learned.verdict,
        **spread("over_raw", learned.over_raw),
        **spread("over_twin", learned.over_twin),
    }
    if compared.column is not None and compared.column_measure is not None:
        out |= {"raw_column": compared.column.describe(), "raw_skill": compared.column_measure.skill.value}
    if learned.twin is not None:
        out |= _twin(*learned.twin)
    return out


def _twin(twin: TwinFeature, measure: Measure) -> dict[str, Any]:
    return {"twin_feature": twin.feature, "twin_skill": measure.skill.value}


def _used(work: Labelling, j: int) -> dict[str, Any]:
    effect = work.effects.get(j)
    if effect is None:
        return {}
    return {
        "used": effect.used,
        **spread("effect", effect.signed),
        **spread("effect_size", effect.size),
        "effect_share": effect.share,
        "effect_entities": effect.n_entities,
        "random_size": effect.random_size,
        **spread("over_random", effect.over_random),
        "matched_size": effect.matched_size,
        **spread("over_matched", effect.over_matched),
    }


def association(work: Labelling, i: int) -> dict[str, Any]:
    """Return one row of associations.parquet."""
    pair, measure = work.pairs[i], work.measures[i]
    null = Null(work.null.statistics[:, [i]], work.null.kept[[i]])
    coded = work.by_id[pair.target.concept]
    low, high = coded.bounds(pair.target)
    return {
        "feature": pair.feature,
        "concept": coded.id,
        "family": coded.family,
        "low": low,
        "high": high,
        "rank": pair.rank,
        "threshold": pair.threshold,
        "auroc_discover": pair.auroc,
        "skill_discover": pair.skill,
        "f1_discover": pair.f1,
        **measured(measure),
        "p_value": float(work.p[i]),
        "q_value": float(work.q[i]),
        "statistic": measure.statistic,
        "null_center": float(null.center[0]),
        "null_width": float(null.width[0]),
    }


def concepts(work: Labelling) -> Iterator[dict[str, Any]]:
    """Yield the rows of concepts.parquet: what could be evaluated, with its best feature, then what could not."""
    labels = Counter(d.winner.pair.target.concept for d in work.decisions if d.reason is None and d.winner)
    for _, infos in work.inputs.tables:
        for info in infos:
            record: dict[str, Any] = {
                "concept": info.id,
                "text": info.text,
                "category": info.category,
                "kind": info.kind,
                "type": info.type,
                "risk": info.risk,
                "applicable": info.id in work.by_id,
                "n_labelled": labels[info.id],
            }
            if info.id not in work.by_id:
                yield record | {"reason": "it is null on every held-out row"}
                continue
            codes = work.by_id[info.id].codes["confirm"]
            record["known_share"] = float((codes >= 0).mean())
            pair = work.best_of_concept.get(info.id)
            if pair is None:
                concept, least = work.by_id[info.id], work.config.min_entities
                reason = why_unscreened(work.rows["discover"], concept, min_entities=least)
                yield record | {"reason": reason}
                continue
            yield record | _best(work, work.index_of_pair[pair.feature, pair.target])
    for id_, reason in work.inputs.not_applicable:
        yield {"concept": id_, "applicable": False, "reason": reason, "n_labelled": 0}


def _best(work: Labelling, i: int) -> dict[str, Any]:
    pair, measure = work.pairs[i], work.measures[i]
    low, high = work.by_id[pair.target.concept].bounds(pair.target)
    out = {
        "feature": pair.feature,
        "low": low,
        "high": high,
        "threshold": pair.threshold,
        **measured(measure),
    }
    out |= {"p_value": float(work.p[i]), "q_value": float(work.q[i])}
    compared = work.compared[pair.target]
    if compared.column is not None and compared.column_measure is not None:
        out |= {"raw_column": compared.column.describe(), "raw_skill": compared.column_measure.skill.value}
    if compared.twins:
        out |= _twin(*compared.twins[0])
    return out


def group(work: Labelling, found: Group) -> dict[str, Any]:
    """Return one row of groups.parquet."""
    coded, measure = work.by_id[found.target.concept], found.measure
    low, high = coded.bounds(found.target)
    whole = work.whole.get(coded.id, False)
    return {
        "concept": coded.id,
        "title": title_of(work.info(coded.id), coded, found.target, whole),
        "low": low,
        "high": high,
        "features": [m.name for m in found.members],
        "thresholds": [m.threshold for m in found.members],
        "f1_discover": found.f1_discover,
        **spread("f1", measure.f1),
        **spread("precision", measure.precision),
        **spread("recall", measure.recall),
        "prevalence": measure.prevalence,
        "n_entities": measure.n_entities,
        "single_f1": found.single.f1.value,
    }


def summary(work: Labelling, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what summary.json holds, but for its format version."""
    labelled = [f for f in features if f["status"] == "labelled"]
    used = [f["feature"] for f in labelled if f.get("used")]
    best: dict[str, dict[str, Any]] = {}
    baselines: dict[str, dict[str, float]] = {"raw_column": {}, "twin": {}}
    keys = (
        "feature",
        "f1",
        "ap",
        "skill",
        "skill_low",
        "skill_high",
        "lift",
        "precision",
        "recall",
        "prevalence",
        "n_entities",
    )
    for record in concepts(work):
        if "skill" not in record:
            continue
        best[record["concept"]] = {key: record[key] for key in keys}
        for name, column in (("raw_column", "raw_skill"), ("twin", "twin_skill")):
            if column in record:
                baselines[name][record["concept"]] = record[column]
    return {
        "n_features": len(features),
        "n_labelled": len(labelled),
        "n_dead": sum(f["reason"] == "dead" for f in features),
        "reasons": dict(Counter(f["reason"] for f in features if f["reason"])),
        "n_learned": sum(bool(f.get("learned")) for f in labelled),
        "n_used": len(used),
        "n_learned_and_used": sum(bool(f.get("learned")) and bool(f.get("used")) for f in labelled),
        "n_concepts": len(best),
        "n_pairs_confirmed": sum(work.by_id[p.target.concept].family == "concept" for p in work.pairs),
        "baselines": {name: values for name, values in baselines.items() if values},
        "concepts": best,
        "fdr_q": work.config.max_q,
        "test_calibration": {
            "n": work.calibration.n,
            "rejected_at_0.05": _finite(work.calibration.rejected),
            "plain_rejected_at_0.05": _finite(work.calibration.plain),
            "inflation": work.calibration.inflation,
        },
        "controls": work.control_counts(),
        "removal": _removal(work, used),
        "fidelity": dict(work.inputs.fidelity),
    }


def _removal(work: Labelling, used: Sequence[int]) -> dict[str, Any] | None:
    """Return what removing all used features together moves, beside what removing every feature moves."""
    if work.ablation is None:
        return None
    together, everything = work.ablation.together(used)
    return {
        "used_together": together,
        "all_features": everything,
        "entities": len(work.ablation.stream.codes),
        "random_mean": float(np.mean([e.random_size for e in work.effects.values()]))
        if work.effects
        else None,
        "matched_mean": float(np.mean([e.matched_size for e in work.effects.values()]))
        if work.effects
        else None,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
