"""The configuration of a run: one frozen tree of the sections that the rooms define."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

import activations_cache.sources  # noqa: F401 - registers the kinds of sources
import sae.architectures  # noqa: F401 - registers the kinds of dictionaries
from activations_cache.harvest import HarvestConfig
from activations_cache.models import ModelConfig
from activations_cache.panel import PanelConfig
from activations_cache.reference.config import ReferenceConfig
from activations_cache.reference.shape import FitConfig, ModelShape
from activations_cache.sources.base import SourceConfig
from activations_cache.sources.panel import PanelSourceConfig
from label.config import ConceptsConfig, LabelConfig
from sae.base import SAEConfig
from sae.config import Config, Seed
from sae.errors import ConfigError
from train.fidelity import EvaluateConfig
from train.imported import ImportConfig
from train.plan import TrainConfig
from train.sizes import ANY_SIZE, AutoSAEConfig
from train.sweep import Member, Sweep, drop_same, make_members

__all__ = ["RunConfig"]


class RunConfig(Config):
    """Everything a run does; a stage whose section is absent is not run."""

    name: str = Field(min_length=1)
    """Name of the run, for people."""
    out: Path
    """The run folder."""
    seed: Seed = 0
    """Initialisation, order, generators, below 2^32; never the split."""
    device: str = "auto"
    """Where tensors live: auto, cpu, cuda, cuda:1, mps."""
    reference: ReferenceConfig | None = None
    """Generate a panel with planted truth first."""
    panel: PanelConfig | None = None
    """The panel."""
    source: SourceConfig = PanelSourceConfig()
    """What activations are read from."""
    model: ModelConfig | None = None
    """The model that reads: fitted by the run, from a folder, or any torch module."""
    fit: FitConfig | None = None
    """Training of that model."""
    harvest: HarvestConfig | None = None
    """Reading activations off the model."""
    sae: SAEConfig | AutoSAEConfig | None = None
    """The dictionary; `d_sae: auto` and `k: auto` leave its numbers to the harvested rows."""
    train: TrainConfig | None = None
    """Training of the dictionary."""
    sweep: Sweep | None = None
    """More dictionaries, trained on the same batches: a grid such as {sae.k: [8, 16]}, or a list of overrides."""
    dictionary: ImportConfig | None = None
    """A dictionary that was trained elsewhere, in the place of sections sae and train."""
    twin: bool = True
    """Whether the untrained twin is harvested and trained too; without it no label can count as learned."""
    evaluate: EvaluateConfig | None = None
    """Held-out reconstruction and fidelity."""
    concepts: ConceptsConfig | None = None
    """What experts say."""
    label: LabelConfig | None = None
    """Labels."""

    @field_validator("sae", mode="before")
    @classmethod
    def _may_be_open(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        is_open = "auto" in (value.get("d_sae"), value.get("k"))
        return (AutoSAEConfig if is_open else SAEConfig).model_validate(value)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        needs = {
            "fit": ("panel", "model"),
            "train": ("sae", "harvest"),
            "dictionary": ("harvest",),
            "sweep": ("train", "evaluate"),
            "label": ("concepts",),
        }
        for section, others in needs.items():
            missing = [
                name for name in others if getattr(self, section) is not None and getattr(self, name) is None
            ]
            if missing:
                raise ValueError(f"section {section} needs {', '.join(missing)}")
        if self.dictionary is not None and (self.sae is not None or self.train is not None):
            raise ValueError("section dictionary takes the place of sae and train: set them to null")
        if self.dictionary is None and self.train is None:
            without = [name for name in ("evaluate", "label") if getattr(self, name) is not None]
            if without:
                raise ValueError(
                    f"section {without[0]} needs train, or a dictionary that was trained elsewhere"
                )
        if self.train is not None:
            self._check_members()
        if self.fit is not None and not isinstance(self.model, ModelShape):
            raise ValueError(
                "section fit trains model.kind=credit_transformer only; leave it out for other models"
            )
        if self.harvest is not None:
            needed = list(self.source.needs)
            if "model" in needed and isinstance(self.model, ModelShape):
                # it has no weights before it is fitted
                needed.append("fit")
            missing = [name for name in needed if getattr(self, name) is None]
            if missing:
                raise ValueError(f"source {self.source.kind} needs the section(s) {', '.join(missing)}")
        if self.evaluate is not None and self.evaluate.segments:
            self._check_segments(self.evaluate)
        if self.panel is not None and self.panel.path is None and self.reference is None:
            raise ValueError(
                "panel.path is missing: give panel.path=FILE, or a `reference` section that generates one"
            )
        return self

    def _check_members(self) -> None:
        assert self.harvest is not None
        try:
            members = (self.sized(*ANY_SIZE) if isinstance(self.sae, AutoSAEConfig) else self).members
        except ConfigError as error:
            raise ValueError(str(error)) from error
        readers = [member.sae.kind for member in members if member.sae.reads_previous]
        if readers and self.harvest.run_length == 1:
            raise ValueError(
                f"sae.kind={readers[0]} learns from adjacent positions: set harvest.run_length to 2 or more"
            )
        if 0 < len(readers) < len(members):
            raise ValueError(
                f"sweep: sae.kind={readers[0]} keeps rows of an entity together, and the other kinds shuffle all: "
                "train it in a run of its own"
            )

    def _check_segments(self, evaluate: EvaluateConfig) -> None:
        if self.panel is None or not self.fits_model:
            raise ValueError("evaluate.segments needs a panel and a model that the run fits")
        known = [*self.panel.columns, *(f"audit_{name}" for name in self.panel.audit)]
        strange = [name for name in evaluate.segments if name not in known]
        if strange:
            raise ValueError(
                f"evaluate.segments: no column {', '.join(strange)} in the panel, only {', '.join(known)}"
            )

    def sized(self, d_sae: int, k: int) -> RunConfig:
        """Return the configuration with these numbers in the place of `auto` in section sae.

        Members of a sweep that come to the same with them are there once, or not at all where that is section sae.

        Raises
        ------
        ConfigError
            Other settings do not go with them.
        """
        if not isinstance(self.sae, AutoSAEConfig):
            return self
        sae, sweep = self.sae.sized(d_sae, k), self.sweep
        if sweep is not None and self.train is not None:
            sweep = drop_same(sae, self.train, self.seed, sweep)
        sized = self.model_copy(update={"sae": sae, "sweep": sweep})
        _ = sized.members
        return sized

    @property
    def members(self) -> tuple[Member, ...]:
        """The dictionaries to train: that of section sae first, which labels speak of, then those of the sweep."""
        assert isinstance(self.sae, SAEConfig) and self.train is not None
        return make_members(self.sae, self.train, self.seed, self.sweep)

    @property
    def reads_panel(self) -> bool:
        """Whether activations belong to the entities and periods of the panel."""
        return self.source.reads_panel

    @property
    def split_seed(self) -> int:
        """Seed of the hash that divides the entities: the panel's, or that of a source with entities of its own."""
        split = (
            self.panel.split
            if self.panel is not None and self.reads_panel
            else getattr(self.source, "split", None)
        )
        return 0 if split is None else split.seed

    @property
    def fits_model(self) -> bool:
        """Whether activations are read off a model that the run fits, and so can re-initialise and intervene in."""
        return isinstance(self.source, PanelSourceConfig) and self.fit is not None
