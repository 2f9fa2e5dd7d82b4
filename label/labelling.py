"""A labelling in progress: screen, confirm, compare, remove, decide, group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from activations_cache.panel import Panel
from activations_cache.reference.shape import load_model
from activations_cache.store import ActivationStore
from sae.checkpoint import load_sae

from .alignment import raw_values
from .baselines import TwinFeature, best_columns, best_twin_features
from .cause import Ablation, Effect, Stream
from .concepts.library import ConceptInfo
from .config import LabelConfig
from .confirm import Confirm, Measure, detector_of, measure_pairs
from .decide import Candidate, Decision, decide
from .discover import Pair, Screen, against_target, best_of_concepts, best_of_features, screen
from .groups import GroupMeasure, Member, grow_from_features, measure_group
from .inputs import LabelInputs, Material, Report
from .learned import Compared, Learned, learned
from .permuted import permuted_statistics
from .statistics.bootstrap import entity_weights
from .statistics.counts import Levels, count
from .statistics.score_test import Calibration, Null, benjamini_hochberg, calibration, p_values
from .targets import (
    CONTROLS,
    Coded,
    Target,
    clocks,
    hash_controls,
    permuted_controls,
    persistent_controls,
)


class Group(NamedTuple):
    """A union of features grown for one target on discover, with what confirm says of it and of its first member."""

    target: Target
    members: list[Member]
    f1_discover: float
    measure: GroupMeasure
    single: GroupMeasure


class Labelling:
    """One labelling; the steps run in the order of their definition.

    Parameters
    ----------
    inputs, material
        What is labelled, and what was read of it.
    config, seed
        Settings, and what the draws start from.
    report
        Called with (phase, done, total).
    """

    def __init__(
        self, inputs: LabelInputs, material: Material, config: LabelConfig, *, seed: int, report: Report
    ) -> None:
        self.inputs, self.config, self.seed, self.report = inputs, config, seed, report
        self.evidence, self.twin, self.ids = material.evidence, material.twin, material.ids
        self.rows, self.concepts, self.whole = material.rows, material.concepts, material.whole
        self.rule = config.rule()
        self.by_id: dict[str, Coded] = {}
        self.screened: Screen
        self.levels: Levels
        self.pairs: list[Pair] = []
        self.best_of_concept: dict[str, Pair] = {}
        self.measures: list[Measure] = []
        self.p: np.ndarray = np.empty(0)
        self.q: np.ndarray = np.empty(0)
        self.decisions: list[Decision] = []
        self.compared: dict[Target, Compared] = {}
        self.effects: dict[int, Effect] = {}
        self.ablation: Ablation | None = None
        self.groups: list[Group] = []
        self.null: Null
        self.calibration: Calibration

    def discover(self) -> None:
        """Screen everything on discover and choose what goes on to confirm."""
        nuisances = [
            *clocks(self.rows),
            *hash_controls(self.rows, self.ids, seed=self.inputs.split_seed),
            *persistent_controls(self.rows, self.concepts, seed=self.seed),
            *permuted_controls(self.rows, self.concepts, seed=self.seed),
        ]
        every = [*self.concepts, *nuisances]
        self.by_id = {c.id: c for c in every}
        self.levels = Levels.of(self.evidence["discover"])
        c = self.config
        self.screened = screen(
            self.levels,
            every,
            min_entities=c.min_entities,
            report=lambda i: self.report("screening", i, len(every)),
        )

        def best(rows: Sequence[int], n_best: int) -> list[Pair]:
            return best_of_features(
                self.screened, rows, n_best=n_best, min_skill=c.candidate_skill, min_auroc=c.screen_auroc
            )

        chosen = best(self._of_family("concept"), c.candidates)
        for family in ("clock", *CONTROLS):
            chosen += best(self._of_family(family), 1)
        self.best_of_concept = best_of_concepts(self.screened, self._of_family("concept"))
        seen = {(p.feature, p.target) for p in chosen}
        chosen += [p for p in self.best_of_concept.values() if (p.feature, p.target) not in seen]
        self.pairs = chosen

    def confirm_pairs(self) -> None:
        """Measure every chosen pair once, check the test, adjust for their number, and decide."""
        rows = self.rows["confirm"]
        weights = entity_weights(rows.n_entities, self.config.n_bootstrap, seed=self.seed)
        self.confirm = Confirm(rows, self.by_id, weights)
        n = len(self.pairs)
        evidence = self.evidence["confirm"]
        self.measures = measure_pairs(
            self.confirm, evidence, self.pairs, report=lambda i: self.report("confirming", i, n)
        )
        self.null = permuted_statistics(
            evidence,
            self.by_id,
            self.pairs,
            n_permutations=self.config.n_permutations,
            seed=self.seed,
            report=lambda i: self.report("permuting trajectories", i, self.config.n_permutations),
        )
        family = np.array([self.by_id[p.target.concept].family for p in self.pairs])
        self.calibration = calibration(self.null.of(family == "concept"))
        statistics = np.array([m.statistic for m in self.measures])
        self.p = p_values(statistics, self.null, self.calibration.inflation)
        self.q = np.ones(n)
        for name in np.unique(family):
            # each family is judged by the rule as if it were the concepts, so that controls are counted fairly
            part = np.flatnonzero(family == name)
            self.q[part] = benjamini_hochberg(self.p[part])
        self._decide(family)

    def compare(self) -> None:
        """Measure raw columns and the twin on every target that a label or a concept's best feature names."""
        targets = [d.winner.pair.target for d in self.decisions if d.winner is not None and d.reason is None]
        targets += [p.target for p in self.best_of_concept.values()]
        targets = list(dict.fromkeys(targets))
        columns = self._columns(targets)
        twins: dict[Target, list[TwinFeature]] = {}
        if self.twin is not None:
            levels, least = Levels.of(self.twin["discover"]), self.config.min_entities
            twins = best_twin_features(levels, self.by_id, targets, min_entities=least)
        raw = self.raw("confirm")
        for i, target in enumerate(targets):
            column, column_measure = columns.get(target), None
            if column is not None and raw is not None:
                values = raw[1][:, raw[0].index(column.column)]
                column_measure = self.confirm.measure(column.on(values), target)
            measured = [(twin, self._measure_twin(twin)) for twin in twins.get(target, ())]
            self.compared[target] = Compared(column, column_measure, measured)
            self.report("comparing with raw columns and the twin", i + 1, len(targets))

    def remove(self) -> None:
        """Remove features from the stream of held-out histories and see what the default logit does."""
        panel = self._panel
        if panel is None or self.inputs.model is None or panel.outcome is None:
            return
        model = load_model(self.inputs.model)
        store = ActivationStore.open(self.inputs.store)
        stream = Stream.read(
            store,
            model,
            panel,
            self.inputs.hook,
            load_sae(self.inputs.sae),
            n_entities=self.config.ablation_pool,
            seed=self.seed,
        )
        if stream is None:
            return
        self.ablation = Ablation(
            stream,
            n_entities=self.config.ablation_entities,
            least=self.config.ablation_least,
            n_bootstrap=self.config.n_bootstrap,
            seed=self.seed,
        )
        live = np.flatnonzero(self.evidence["confirm"].count).tolist()
        self.ablation.live(live, report=lambda i: self.report("removing features", i, len(live)))
        labelled = self.labelled()
        for i, feature in enumerate(labelled):
            effect = self.ablation.effect(
                feature, n_random=self.config.n_random, n_matched=self.config.n_matched
            )
            if effect is not None:
                self.effects[feature] = effect
            self.report("comparing with random directions", i + 1, len(labelled))

    def group(self) -> None:
        """Grow a group for every concept's target on discover and measure it on confirm."""
        c = self.config
        for i, (concept, pair) in enumerate(self.best_of_concept.items()):
            coded = self.by_id[concept]
            counts = count(self.levels, coded.codes["discover"], coded.n_bins)
            holds, applies = coded.truth("discover", pair.target)
            members, f1 = grow_from_features(
                self.evidence["discover"],
                against_target(self.levels, counts, pair.target),
                holds,
                applies,
                max_size=c.group_size,
                min_gain=c.group_gain,
            )
            if members:
                evidence = self.evidence["confirm"]
                measure = measure_group(self.confirm, evidence, members, pair.target)
                single = measure_group(self.confirm, evidence, members[:1], pair.target)
                self.groups.append(Group(pair.target, members, f1, measure, single))
            self.report("growing groups", i + 1, len(self.best_of_concept))

    def labelled(self) -> list[int]:
        """Return the labelled features."""
        return [j for j, d in enumerate(self.decisions) if d.reason is None]

    def learned(self, feature: int) -> Learned:
        """Return whether a label exceeds raw column and twin."""
        winner = self.decisions[feature].winner
        if winner is None or winner.pair.target not in self.compared:
            return Learned(None, None, None, None)
        return learned(winner.measure, self.compared[winner.pair.target])

    def control_counts(self) -> dict[str, int]:
        """Return, per kind of control, how many features it would label under the rule, clocks included."""
        counts: dict[str, int] = dict.fromkeys(map(str, CONTROLS), 0)
        for pair, measure, q in zip(self.pairs, self.measures, self.q, strict=True):
            family = self.by_id[pair.target.concept].family
            if family in counts:
                candidate = Candidate(pair, measure, float(q))
                counts[family] += self._judge(pair.feature, [candidate], control=None).reason is None
        return counts

    def best_nuisance(self, feature: int, families: Sequence[str]) -> tuple[Pair, Measure] | None:
        """Return the strongest nuisance of the given families for a feature, by skill on confirm.

        Each family sends the one that is best on discover; none of them may reach a label's skill.
        """
        found = [
            (p, m)
            for p, m in self._by_feature.get(feature, ())
            if self.by_id[p.target.concept].family in families
        ]
        return max(found, key=lambda pm: pm[1].skill.value) if found else None

    def _decide(self, family: np.ndarray) -> None:
        self._by_feature: dict[int, list[tuple[Pair, Measure]]] = {}
        candidates: dict[int, list[Candidate]] = {}
        for pair, measure, q, name in zip(self.pairs, self.measures, self.q, family, strict=True):
            self._by_feature.setdefault(pair.feature, []).append((pair, measure))
            if name == "concept" and pair.rank >= 0:
                candidates.setdefault(pair.feature, []).append(Candidate(pair, measure, float(q)))
        for j in range(self.evidence["discover"].d_sae):
            mine = sorted(candidates.get(j, []), key=lambda c: c.pair.rank)
            control = self.best_nuisance(j, CONTROLS)
            self.decisions.append(self._judge(j, mine, control=None if control is None else control[1]))

    def _judge(self, feature: int, candidates: Sequence[Candidate], *, control: Measure | None) -> Decision:
        """Apply the rule to one feature."""
        discover = self.evidence["discover"]
        rates = [e.count[feature] / len(e.rows) for e in (discover, self.evidence["confirm"])]
        clock = self.best_nuisance(feature, ["clock"])
        return decide(
            rates=(float(rates[0]), float(rates[1])),
            n_entities_firing=len(np.unique(discover.rows.member[discover.of(feature)[0]])),
            candidates=candidates,
            clock=None if clock is None else clock[1],
            control=control,
            overlap={i: self._overlap(candidates[0].pair, c.pair) for i, c in enumerate(candidates) if i},
            rule=self.rule,
        )

    def _overlap(self, first: Pair, second: Pair) -> float:
        """Return the Jaccard overlap of two targets' rows on discover."""
        a, _ = self.by_id[first.target.concept].truth("discover", first.target)
        b, _ = self.by_id[second.target.concept].truth("discover", second.target)
        return float((a & b).sum() / max((a | b).sum(), 1))

    def _measure_twin(self, twin: TwinFeature) -> Measure:
        assert self.twin is not None
        pair = Pair(twin.feature, twin.target, twin.threshold, 0.0, twin.skill, 0.0, 0)
        return self.confirm.measure(detector_of(self.twin["confirm"], pair), twin.target)

    def _of_family(self, family: str) -> list[int]:
        return [i for i, c in enumerate([*self.by_id.values()]) if c.family == family]

    def info(self, concept: str) -> ConceptInfo:
        """Return what is said of a concept."""
        return next(info for _, infos in self.inputs.tables for info in infos if info.id == concept)

    @cached_property
    def index_of_pair(self) -> dict[tuple[int, Target], int]:
        """Where the pair of a feature and a target stands in `pairs`."""
        return {(pair.feature, pair.target): i for i, pair in enumerate(self.pairs)}

    @cached_property
    def _panel(self) -> Panel | None:
        return None if self.inputs.panel is None else Panel.open(self.inputs.panel)

    def raw(self, split: str) -> tuple[list[str], np.ndarray] | None:
        """Return the panel's column names and values on a split's rows; None without a panel."""
        panel = self._panel
        return None if panel is None else (panel.columns, raw_values(panel, self.rows[split]))

    def _columns(self, targets: Sequence[Target]) -> dict[Target, ColumnDetector]:
        raw = self.raw("discover")
        if raw is None:
            return {}
        return best_columns(raw[0], raw[1], self.by_id, targets)
