"""Settings of labelling; each default is the definition on the architecture page."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sae.config import Config

from .decide import Rule


class ConceptTableConfig(Config):
    """Ready-made concept values, computed elsewhere."""

    path: str
    """Parquet, CSV or Arrow with one row per (entity, time) and one column per concept."""
    entity: str
    """Column with the user's entity id."""
    time: str
    """Column with the panel's period index."""
    meta: str | None = None
    """YAML with texts and kinds of the columns."""
    only: tuple[str, ...] = ("*",)
    """Globs of the columns that are taken."""


class ConceptsConfig(Config):
    """Which concepts features are compared with."""

    paths: tuple[str, ...] = ()
    """Concept files, such as configs/concepts/credit.yaml; later files add to earlier ones."""
    tables: tuple[ConceptTableConfig, ...] = ()
    """Ready-made concept values."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds after which the evaluation of all concepts is given up."""
    memory_limit: str = "2GB"
    """What the evaluation may hold in memory."""


class LabelConfig(Config):
    """What a label must reach, and how it is measured."""

    min_skill: float = Field(default=0.25, ge=0, lt=1)
    """Least lower end of the skill's 95% interval on confirm."""
    min_f1: float = Field(default=0.4, ge=0, le=1)
    """Least F1 at the frozen threshold on confirm."""
    max_q: float = Field(default=0.01, gt=0, le=1)
    """Largest BH-adjusted p-value over all pairs that went to confirm."""
    min_entities: int = Field(default=30, ge=1)
    """Least number of entities on each side of the concept, and on which the feature fires."""
    always_on: float = Field(default=0.95, gt=0, le=1)
    """Share of rows above which a feature that fires says nothing."""
    candidates: int = Field(default=3, ge=1)
    """Concepts per feature that go on to confirm."""
    candidate_skill: float = Field(default=0.1, ge=0, lt=1)
    """Least skill on discover of a pair that goes on to confirm."""
    screen_auroc: float = Field(default=0.55, ge=0.5, lt=1)
    """Least AUROC on discover; a skill of 0.25 implies about 0.62."""
    rival_overlap: float = Field(default=0.5, ge=0, le=1)
    """Jaccard overlap on discover below which a rival that is as good or better, within the intervals, forbids a label."""
    n_bootstrap: int = Field(default=1000, ge=50)
    """Bootstrap samples of whole entities behind every interval."""
    n_permutations: int = Field(default=200, ge=10)
    """Permutations of whole trajectories that every pair's statistic is compared with."""
    group_size: int = Field(default=8, ge=1)
    """Most features of a group."""
    group_gain: float = Field(default=0.01, ge=0)
    """F1 on discover that each further feature of a group must add."""
    ablation_entities: int = Field(default=256, ge=30)
    """Entities on whose history each feature is removed, at most."""
    ablation_least: int = Field(default=30, ge=1)
    """Least number of entities sampled for a feature, and moved by its removal for it to be used; else `used` is left open.

    In simulations (docs/benchmarks.md) chance passes above 5% with fewer.
    """
    ablation_pool: int = Field(default=8192, ge=30)
    """Confirm entities whose histories the ablations draw on, at most."""
    n_random: int = Field(default=10, ge=1)
    """Random directions that each removal is compared with."""
    n_matched: int = Field(default=10, ge=1)
    """Live features of like rate and size that each removal is compared with."""
    examples: int = Field(default=6, ge=0)
    """Entities shown per band for each labelled feature."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ablation_least > self.ablation_entities:
            raise ValueError(
                f"ablation_least = {self.ablation_least} exceeds ablation_entities = {self.ablation_entities}: "
                "nothing could be judged"
            )
        return self

    def rule(self) -> Rule:
        """Return the part that decides."""
        return Rule(
            self.min_skill, self.min_f1, self.max_q, self.min_entities, self.always_on, self.rival_overlap
        )
