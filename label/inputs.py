"""What a labelling starts from: codes of both splits, concept values, and who the entities are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from activations_cache.store import ActivationStore
from sae.base import SAE
from sae.checkpoint import load_sae
from sae.errors import ConceptError, StoreError

from .alignment import code_table
from .concepts.library import ConceptInfo, NotApplicable
from .evidence import Evidence, Rows, gather
from .targets import Coded

Report = Callable[[str, int, int], None]
SPLITS = ("discover", "confirm")


@dataclass(frozen=True)
class LabelInputs:
    """What is labelled, and with what.

    Attributes
    ----------
    store, sae, hook
        The activations and the dictionary trained on one of their hooks.
    tables
        Concept values (Parquet with entity, time, one column per concept) and what is said of them.
    not_applicable
        Concepts that were not evaluated, and why.
    panel, model
        Folders of the canonical panel and of the model; None where there is none, and then raw columns are no
        baseline and nothing is removed.
    twin_store, twin_sae
        The untrained twin's; None where there is none.
    fidelity
        Figures of the dictionary's evaluation, repeated in the summary.
    split_seed
        Of the hash that divides the entities, which also draws the controls that are constant per entity.
    """

    store: Path
    sae: Path
    hook: str
    tables: Sequence[tuple[Path, list[ConceptInfo]]]
    not_applicable: Sequence[NotApplicable] = ()
    panel: Path | None = None
    model: Path | None = None
    twin_store: Path | None = None
    twin_sae: Path | None = None
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    split_seed: int = 0


@dataclass(frozen=True)
class Material:
    """What was read of the inputs.

    Attributes
    ----------
    evidence, twin
        Split -> codes of the dictionary and of the twin's; None where there is no twin.
    concepts
        On the rows of both splits.
    whole
        Concept -> whether its values are whole numbers, so that intervals can be written with them.
    ids
        Entity code -> the user's id.
    """

    evidence: dict[str, Evidence]
    twin: dict[str, Evidence] | None
    concepts: list[Coded]
    whole: dict[str, bool]
    ids: list[str]

    @property
    def rows(self) -> dict[str, Rows]:
        """Return who and when, by split."""
        return {s: e.rows for s, e in self.evidence.items()}


def read_material(inputs: LabelInputs, *, report: Report) -> Material:
    """Encode both splits of the store, and of the twin's, and code the concepts on their rows.

    Raises
    ------
    StoreError
        The stores do not hold the same rows, or do not name their entities.
    ConceptError
        No concept applies.
    """
    store = ActivationStore.open(inputs.store)
    evidence = _evidence(store, load_sae(inputs.sae), inputs.hook, "reading codes", report)
    rows = {s: e.rows for s, e in evidence.items()}
    concepts: list[Coded] = []
    whole: dict[str, bool] = {}
    for path, infos in inputs.tables:
        coded, are_whole = code_table(path, infos, rows)
        concepts += coded
        whole |= are_whole
    if not concepts:
        raise ConceptError(
            "no concept applies to this panel", do="check concepts.paths and the panel's product"
        )
    return Material(evidence, _twin_evidence(inputs, rows, report), concepts, whole, _entity_ids(store))


def _twin_evidence(
    inputs: LabelInputs, rows: Mapping[str, Rows], report: Report
) -> dict[str, Evidence] | None:
    if inputs.twin_store is None or inputs.twin_sae is None:
        return None
    store = ActivationStore.open(inputs.twin_store)
    twin = _evidence(store, load_sae(inputs.twin_sae), inputs.hook, "reading the twin's codes", report)
    for split in SPLITS:
        if not np.array_equal(twin[split].rows.entity, rows[split].entity):
            raise StoreError(
                f"{inputs.twin_store} holds other rows than {inputs.store}",
                do=f"where people were erased from one of them alone, `assay erase {inputs.store} --entities FILE` with "
                "their ids, which in a run erases from both; else remove the twin's store, and run again",
            )
    return twin


def _entity_ids(store: ActivationStore) -> list[str]:
    names = store.entity_ids()
    if names is None:
        raise StoreError(f"{store.path} does not name its entities", do="harvest it again")
    ids: list[str] = [""] * (max(names["entity"].to_pylist()) + 1)
    for code, name in zip(names["entity"].to_pylist(), names["id"].to_pylist(), strict=True):
        ids[code] = name
    return ids


def _evidence(store: ActivationStore, sae: SAE, hook: str, phase: str, report: Report) -> dict[str, Evidence]:
    empty = [s for s in SPLITS if not store.splits.get(s)]
    if empty:
        raise StoreError(
            f"{store.path} has no rows of split {' or '.join(empty)}, by which labels are found and confirmed",
            got=", ".join(f"{name} {rows:,}" for name, rows in store.splits.items()),
            do="harvest more entities, or other shares of them",
        )
    total = sum(store.splits[s] for s in SPLITS)
    out: dict[str, Evidence] = {}
    for split in SPLITS:
        before = sum(len(e.rows) for e in out.values())
        out[split] = gather(
            store,
            sae,
            hook,
            split,
            report=lambda done, before=before: report(phase, before + done, total),  # type: ignore[misc]
        )
    return out
