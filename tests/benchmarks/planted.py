"""What a finished run on the reference panel found of the truth that its panel hides.

    python -m tests.benchmarks.planted RUN

For six latent states that no column shows: F1 on confirm of the best union of at most 3 features (grown on discover), of
the untrained twin's, and of raw columns' intervals, with paired intervals by entity. For planted concepts with a term in
the hazard: what removing their group does to the default logit of entities on which they hold. For distractors: whether
any label of theirs is used; for absent and withheld ones: whether there is a label at all.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

from activations_cache.panel import Panel
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.store import ActivationStore
from label.alignment import code_table, raw_values
from label.cause import Stream
from label.concepts.tables import load_concept_table
from label.confirm import Confirm, Detector
from label.discover import against_target
from label.evidence import Evidence, gather
from label.groups import GroupMeasure, grow, grow_from_features, measure_group, measure_union
from label.statistics.bootstrap import entity_weights, interval
from label.statistics.counts import Levels, count
from label.tables import read_table
from label.targets import Coded, Target
from sae.base import SAE
from sae.checkpoint import load_sae

GROUP = 3
N_EDGES = 13
SPLITS = ("discover", "confirm")


class Latent(NamedTuple):
    """One latent state: F1 of the trained group, and by how much it exceeds twin and raw columns."""

    concept: str
    prevalence: float
    trained: GroupMeasure
    twin: GroupMeasure
    raw: GroupMeasure

    def over(self, other: GroupMeasure):
        return interval(self.trained.f1.value - other.f1.value, self.trained.f1_draws - other.f1_draws)

    @property
    def exceeds(self) -> bool:
        return self.over(self.twin).low > 0 and self.over(self.raw).low > 0


class Found(NamedTuple):
    """A run's codes, its twin's, and tables of truth on the same rows."""

    run: Path
    hook: str
    sae: SAE
    trained: dict[str, Evidence]
    twin: dict[str, Evidence]
    panel: Panel


def read(run: Path) -> Found:
    folder = next((run / "sae").iterdir())
    hook = json.loads((folder / "evaluation.json").read_text())["hook"]
    sides = []
    for root in (run, run / "twin"):
        store, sae = ActivationStore.open(root / "activations.zarr"), load_sae(root / "sae" / folder.name)
        sides.append({split: gather(store, sae, hook, split) for split in SPLITS})
    return Found(run, hook, load_sae(folder), sides[0], sides[1], Panel.open(run / "panel"))


def code(found: Found, name: str) -> dict[str, Coded]:
    """Code one of the reference's tables on the rows of both splits."""
    with tempfile.TemporaryDirectory() as scratch:
        panel = found.run / "panel"
        infos = load_concept_table(
            found.run / "reference" / f"{name}.parquet",
            Path(scratch) / "t.parquet",
            panel=panel / "panel.parquet",
            entities=panel / "entities.parquet",
            entity="entity_id",
            time="t",
        )
        coded, _ = code_table(
            Path(scratch) / "t.parquet", infos, {s: e.rows for s, e in found.trained.items()}
        )
    return {c.id: c for c in coded}


def group_of(evidence: dict[str, Evidence], concept: Coded, target: Target):
    levels = Levels.of(evidence["discover"])
    fit = against_target(levels, count(levels, concept.codes["discover"], concept.n_bins), target)
    holds, applies = concept.truth("discover", target)
    members, _ = grow_from_features(evidence["discover"], fit, holds, applies, max_size=GROUP, min_gain=1e-9)
    return members


def raw_candidates(values: np.ndarray) -> list[tuple[int, float, float]]:
    """Every interval between quantiles of every column."""
    out = []
    for column in range(values.shape[1]):
        known = values[np.isfinite(values[:, column]), column]
        edges = np.unique(np.quantile(known, np.linspace(0, 1, N_EDGES), method="nearest"))
        out += [(column, float(a), float(b)) for i, a in enumerate(edges) for b in edges[i:]]
    return out


def firing(values: np.ndarray, candidates: list[tuple[int, float, float]]) -> np.ndarray:
    return np.stack([(values[:, c] >= a) & (values[:, c] <= b) for c, a, b in candidates])


def latents(found: Found, *, n_bootstrap: int = 1000) -> list[Latent]:
    coded = code(found, "truth")
    rows = found.trained["confirm"].rows
    confirm = Confirm(rows, coded, entity_weights(rows.n_entities, n_bootstrap, seed=0))
    values = {s: raw_values(found.panel, e.rows) for s, e in found.trained.items()}
    candidates = raw_candidates(values["discover"])
    fires = {s: firing(v, candidates) for s, v in values.items()}
    fired = [np.flatnonzero(f) for f in fires["discover"]]
    out = []
    for name, concept in coded.items():
        target = Target(name, 1, 1)
        groups = [
            measure_group(confirm, side["confirm"], group_of(side, concept, target), target)
            for side in (found.trained, found.twin)
        ]
        holds, applies = concept.truth("discover", target)
        chosen, _ = grow(fired, holds, applies, max_size=GROUP, min_gain=1e-9)
        rows_of = [np.flatnonzero(fires["confirm"][i]) for i in chosen]
        raw = measure_union(confirm, [Detector(r, np.ones(len(r), np.float32), 0.0) for r in rows_of], target)
        out.append(Latent(name, groups[0].prevalence, groups[0], groups[1], raw))
    return out


def hazard_effects(found: Found) -> list[dict[str, Any]]:
    """Remove each planted concept's group where the concept holds at an entity's last row."""
    truth = json.loads((found.run / "reference" / "truth.json").read_text())["concepts"]
    terms = {c["id"]: c for c in truth if c.get("hazard_log_odds") is not None and c["role"] == "planted"}
    coded = code(found, "planted")
    model = CreditTransformer.from_pretrained(found.run / "model").eval()
    store = ActivationStore.open(found.run / "activations.zarr")
    stream = Stream.read(store, model, found.panel, found.hook, found.sae, n_entities=1 << 30, seed=0)
    assert stream is not None
    rows = found.trained["confirm"].rows
    last = np.flatnonzero(np.diff(rows.member, append=-1) != 0)
    base = stream.without(lambda index: torch.zeros(()), np.arange(len(stream.codes)))
    out = []
    for name, term in terms.items():
        target = Target(name, 1, 1)
        members = group_of(found.trained, coded[name], target)
        holds, applies = coded[name].truth("confirm", target)
        entities = np.flatnonzero(np.isin(stream.codes, rows.entity[last[(holds & applies)[last]]]))
        if not members or len(entities) < 10:
            continue
        parts = [
            (torch.from_numpy(stream.activation(m.name)), found.sae.W_dec[m.name].detach()) for m in members
        ]

        def removed(index, parts=parts):
            return sum(z[index].unsqueeze(-1) * w for z, w in parts)

        change = float((stream.without(removed, entities) - base[entities]).mean())
        # the concept adds its term while it holds, so removing what encodes it should take that away
        out.append(
            {"concept": name, "term": term["hazard_log_odds"], "change": change, "entities": len(entities)}
        )
    return out


def labels_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Labels that name distractors or absent concepts."""
    rows = read_table(run / "labels", "features").to_pylist()
    labelled = [r for r in rows if r["status"] == "labelled"]
    return {
        kind: [r for r in labelled if r["concept"].startswith(kind)]
        for kind in ("distractor_visible", "distractor_withheld", "absent")
    }


def main(run: Path) -> None:
    found = read(run)
    print(
        f"{'latent state':24} {'prev.':>6}  {'trained':>22} {'twin':>6} {'raw':>6}  over twin            over raw"
    )
    results = latents(found)
    for r in results:
        a, b = r.over(r.twin), r.over(r.raw)
        f1 = r.trained.f1
        print(
            f"{r.concept:24} {r.prevalence:6.2%}  {f1.value:6.3f} [{f1.low:.3f}, {f1.high:.3f}] "
            f"{r.twin.f1.value:6.3f} {r.raw.f1.value:6.3f}  {a.value:+.3f} [{a.low:+.3f}, {a.high:+.3f}]  "
            f"{b.value:+.3f} [{b.low:+.3f}, {b.high:+.3f}]  {'exceeds both' if r.exceeds else ''}"
        )
    above = sum(r.exceeds for r in results)
    print(f"{above} of {len(results)} latent states: the trained group exceeds twin and raw columns\n")
    effects = hazard_effects(found)
    for e in sorted(effects, key=lambda e: -e["term"]):
        agrees = np.sign(-e["change"]) == np.sign(e["term"])
        verdict = "agrees" if agrees else "DISAGREES"
        print(
            f"{e['concept']:30} term {e['term']:+.2f}  removal {e['change']:+.4f}  {verdict}  "
            f"({e['entities']} entities)"
        )
    if len(effects) > 2:
        order = spearmanr([e["term"] for e in effects], [-e["change"] for e in effects]).statistic
        print(f"rank correlation of terms and effects {order:.2f}\n")
    for kind, found_labels in labels_of(run).items():
        used = sum(bool(r["used"]) for r in found_labels)
        print(f"{kind}: {len(found_labels)} labels, {used} used")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
