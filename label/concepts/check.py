"""What each concept comes to on a panel, whether it looks ahead, and which other it repeats."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from activations_cache.panel import read_profile
from sae.errors import ConceptError

from .evaluation import WORKER, columns_of, make_job, make_task
from .language import load_concepts
from .library import Concept, ConceptLibrary, NotApplicable
from .redundancy import nearest
from .safety import run_child

RTOL = 1e-9
REDUNDANT = 0.95
CUTS = 4


@dataclass(frozen=True)
class ConceptCheck:
    """What was found about one concept.

    Attributes
    ----------
    nulls
        Share of rows where it does not apply.
    prevalence
        Share of true among the others; None for a number.
    quartiles
        Minimum, quartiles and maximum; None for a truth value and where it never applies.
    seconds
        Time to compute it alone on the rows that were checked.
    leaks_at
        The first cut t* whose removal of later rows changed a value at or before it; None = it does not
        look ahead. Outcomes are not tested: looking ahead is their purpose.
    neighbour, similarity
        The concept most like it and |phi| or |Spearman| with it; None where none can be compared.
    warnings
        What an expert should look at.
    """

    concept: Concept
    nulls: float
    prevalence: float | None
    quartiles: tuple[float, float, float, float, float] | None
    seconds: float
    leaks_at: int | None
    neighbour: str | None
    similarity: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """The outcome of `check_concepts`."""

    checks: tuple[ConceptCheck, ...]
    not_applicable: tuple[NotApplicable, ...]
    rows: int
    rows_total: int
    cuts: tuple[int, ...]
    seconds: float
    calendar: str | None
    """What the panel's times were dates of, month or day; None where they are counts, or it does not say."""

    @property
    def leaking(self) -> list[str]:
        """The concepts that look ahead."""
        return [check.concept.id for check in self.checks if check.leaks_at is not None]


def check_concepts(
    paths: Sequence[Path],
    panel: Path,
    product: str,
    *,
    max_rows: int = 100_000,
    prevalence_limits: tuple[float, float] = (0.001, 0.95),
    timeout_s: float = 600.0,
    memory_limit: str = "2GB",
    threads: int = 2,
) -> CheckReport:
    """Read concept files and try every applicable concept on a canonical panel.

    The leak test truncates the panel at four times t*: the values at t <= t* must not change (rtol 1e-9 of
    the value plus 1e-12 of the concept's largest, nulls equal).

    Parameters
    ----------
    paths
        Concept files.
    panel
        The canonical panel.
    product
        What the panel holds.
    max_rows
        Above this, a sample of whole entities of about this many rows is checked.
    prevalence_limits
        Outside of these a truth value is worth a warning.
    timeout_s, memory_limit, threads
        Limits of the child process.

    Raises
    ------
    ConceptError
        A file is wrong, no concept applies, or the computation failed.
    """
    return check_library(
        load_concepts(paths),
        panel,
        product,
        max_rows=max_rows,
        prevalence_limits=prevalence_limits,
        timeout_s=timeout_s,
        memory_limit=memory_limit,
        threads=threads,
    )


def check_library(
    library: ConceptLibrary,
    panel: Path,
    product: str,
    *,
    max_rows: int = 100_000,
    prevalence_limits: tuple[float, float] = (0.001, 0.95),
    timeout_s: float = 600.0,
    memory_limit: str = "2GB",
    threads: int = 2,
) -> CheckReport:
    """Do what `check_concepts` says, for concepts that are already read."""
    file = _open(panel)
    concepts, unfit = library.applicable(product, file.schema_arrow.names)
    if not concepts:
        reasons = "; ".join(f"{item.id}: {item.reason}" for item in unfit[:5])
        raise ConceptError(f"no concept applies to {panel}", got=reasons, do="check its product and columns")
    total = file.metadata.num_rows
    at = _cuts(file, CUTS)
    with tempfile.TemporaryDirectory(prefix="assay-concepts-") as folder:
        out = {until: Path(folder) / f"{until}.parquet" for until in (None, *at)}
        tasks = [make_task(concepts, out=path, until=until) for until, path in out.items()]
        tasks += [make_task([concept], out=None, name=f"concept {concept.id}") for concept in concepts]
        job = make_job(
            panel,
            tasks,
            columns=columns_of(concepts),
            folder=Path(folder),
            timeout_s=timeout_s,
            memory_limit=memory_limit,
            threads=threads,
            sample=max_rows / total if total > max_rows else 1.0,
        )
        lines = [line for line in run_child(WORKER, job, timeout_s=timeout_s) if "task" in line]
        values = pq.read_table(out[None])
        leaks: dict[str, int] = {}
        for until in at:
            for id in leaking(values, pq.read_table(out[until]), until, concepts):
                leaks.setdefault(id, until)
    seconds = {line["task"].removeprefix("concept "): float(line["seconds"]) for line in lines}
    neighbours = nearest({concept.id: _numbers(values.column(concept.id)) for concept in concepts})
    checks = tuple(
        _check(concept, values.column(concept.id), seconds, leaks, neighbours, prevalence_limits)
        for concept in concepts
    )
    spent = sum(float(line["seconds"]) for line in lines)
    profile = panel.with_name("profile.json")
    calendar = read_profile(panel.parent).get("calendar") if profile.is_file() else None
    return CheckReport(checks, tuple(unfit), values.num_rows, total, tuple(at), spent, calendar)


def leaking(
    full: pa.Table, cut: pa.Table, until: int, concepts: Collection[Concept], *, rtol: float = RTOL
) -> list[str]:
    """Return the concepts whose values at t <= `until` change when later rows go; outcomes are skipped.

    Parameters
    ----------
    full, cut
        Values on the whole panel and on its rows up to `until`, both by (entity, time).
    """
    past = full.filter(pc.less_equal(full.column("time"), until))
    if not past.select(["entity", "time"]).equals(cut.select(["entity", "time"])):
        raise AssertionError("the truncated panel has other rows")
    found = []
    for concept in concepts:
        if concept.kind == "outcome":
            continue
        before, after = _numbers(past.column(concept.id)), _numbers(cut.column(concept.id))
        both = ~np.isnan(before) & ~np.isnan(after)
        largest = float(np.abs(before[both]).max(initial=0.0))
        same = np.abs(before - after)[both] <= rtol * np.abs(before)[both] + 1e-3 * rtol * largest
        if not np.array_equal(np.isnan(before), np.isnan(after)) or not same.all():
            found.append(concept.id)
    return found


def _open(panel: Path) -> Any:
    try:
        return pq.ParquetFile(panel)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConceptError(f"cannot read the panel {panel}", got=str(error).split("\n")[0]) from error


def _cuts(file: Any, count: int) -> list[int]:
    """Return times t* spread over the panel's periods, the last one left out as it cuts nothing."""
    times: Int[ndarray, "periods"] = np.unique(file.read(columns=["time"]).column(0).to_numpy())
    if len(times) < 2:
        return []
    spots = np.unique(np.linspace(0, len(times) - 2, num=count + 2).round().astype(int)[1:-1])
    return [int(time) for time in times[spots]]


def _numbers(column: pa.ChunkedArray) -> Float[ndarray, "rows"]:
    """Return a concept as numbers, false = 0, true = 1, null = NaN."""
    return np.asarray(pc.cast(column, pa.float64()).to_numpy(), dtype=np.float64)


def _check(
    concept: Concept,
    column: pa.ChunkedArray,
    seconds: dict[str, float],
    leaks: dict[str, int],
    neighbours: dict[str, tuple[str, float]],
    limits: tuple[float, float],
) -> ConceptCheck:
    values = _numbers(column)
    known: Bool[ndarray, "rows"] = ~np.isnan(values)
    prevalence = float(values[known].mean()) if concept.type == "bool" and known.any() else None
    quartiles = None
    if concept.type == "float" and known.any():
        low, lower, middle, upper, high = np.quantile(values[known], [0, 0.25, 0.5, 0.75, 1]).tolist()
        quartiles = (low, lower, middle, upper, high)
    neighbour, similarity = neighbours.get(concept.id, (None, None))
    leak = leaks.get(concept.id)
    warnings = []
    if leak is not None:
        warnings.append(f"looks ahead: values up to {leak} change when later rows are removed")
    if not known.any():
        warnings.append(
            "never applies: all null" + (f" (needs {concept.history} periods)" * (concept.history > 1))
        )
    elif values[known].min() == values[known].max():
        warnings.append(f"constant: always {values[known][0]:g}")
    elif prevalence is not None and not limits[0] <= prevalence <= limits[1]:
        warnings.append(f"prevalence {prevalence:.4%} is outside {limits[0]:.1%} to {limits[1]:.1%}")
    if similarity is not None and similarity > REDUNDANT:
        warnings.append(f"nearly the same as {neighbour} ({similarity:.3f})")
    return ConceptCheck(
        concept=concept,
        nulls=float(1 - known.mean()),
        prevalence=prevalence,
        quartiles=quartiles,
        seconds=seconds[concept.id],
        leaks_at=leak,
        neighbour=neighbour,
        similarity=similarity,
        warnings=tuple(warnings),
    )
