"""Fidelity where it counts: what the model predicts when the reconstruction takes the activations' place."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from activations_cache.batching import batches_by_length
from activations_cache.hooks import capture, intercept
from activations_cache.panel import Panel
from activations_cache.reference.baseline import boosted_probabilities
from activations_cache.reference.histories import collate
from activations_cache.reference.predict import judged
from activations_cache.reference.scores import auc_difference, discrimination
from activations_cache.splits import SPLITS
from sae.config import Config
from sae.dictionary import Dictionary

from .paired import Resamples, changes, figure, probability, recovered, resample
from .portfolio import Part, periods_of, segments_of

if TYPE_CHECKING:
    from activations_cache.reference.credit_transformer import CreditTransformer

BATCH_ROWS = 16384
Change = Callable[[Tensor], Tensor]


class EvaluateConfig(Config):
    """Evaluation of the dictionary on held-out entities and out of time."""

    segments: dict[str, tuple[float, ...]] = {}
    """Panel column (audit_NAME for audit columns) -> edges between segments for which fidelity is reported; [] makes
    each value a segment."""
    n_bootstrap: int = Field(default=200, ge=50)
    """Samples of whole entities behind each interval of fidelity."""

    @field_validator("segments")
    @classmethod
    def _edges_rise(cls, segments: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for name, edges in segments.items():
            if any(low >= high for low, high in pairwise(edges)):
                raise ValueError(f"the edges of {name} do not increase")
        return segments


class Judged(NamedTuple):
    """What the default head says where it is judged, under every change of the activations."""

    logits: dict[str, Float[np.ndarray, " n"]]
    """`model`, and one for each change."""
    truth: Float[np.ndarray, " n"]
    """The outcome; NaN where it is not known."""
    entity: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    """Rows of the panel."""


def replacements(sae: Dictionary, mean: Float[Tensor, " d_in"]) -> dict[str, Change]:
    """Return what takes the activations' place.

    Returns
    -------
    dict
        `spliced`: x̂ = decode(encode(x)). `error_kept`: x̂ + (x - x̂), which is x up to rounding. `zero` and `mean`:
        no activation, and the same one everywhere.
    """

    def reconstruct(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return sae.decode(sae.encode(flat)).to(x.dtype).reshape(x.shape)

    def keep_error(x: Tensor) -> Tensor:
        x_hat = reconstruct(x)
        return x_hat + (x - x_hat)

    return {
        "spliced": reconstruct,
        "error_kept": keep_error,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.to(x).expand_as(x),
    }


@torch.inference_mode()
def splice(
    model: CreditTransformer, panel: Panel, hook: str, *, replace: dict[str, Change], out_of_time: bool
) -> Judged:
    """Return what the model says of the confirm entities as it is and under each change at the hook.

    Parameters
    ----------
    model, panel, hook
        Everything behind the hook is computed anew.
    replace
        Name -> what is put in the place of the activations.
    out_of_time
        Judge after the time cut, with whole histories, instead of before it.
    """
    cut = panel.history_end()
    end, start = (panel.offsets[1:], cut) if out_of_time else (cut, panel.offsets[:-1])
    entities = panel.entities_of("confirm")
    entities = entities[end[entities] > start[entities]]
    device = next(model.parameters()).device
    late = torch.from_numpy(panel.split == SPLITS.index("out_of_time")).to(device)
    logits: dict[str, list[np.ndarray]] = {name: [] for name in ("model", *replace)}
    found = []
    for batch in batches_by_length(panel, entities, BATCH_ROWS):
        histories = collate(panel, batch, stop=end).to(device)
        where = judged(panel, histories) & (late[histories.rows] == out_of_time)
        layer = model.resume_after(hook)
        with capture(model, [hook]) as seen:
            logit = model(histories.values, histories.gap).default_logit
        logits["model"].append(logit[where].double().cpu().numpy())
        for name, change in replace.items():
            if layer is not None:
                after = model.resume(layer, change(seen[hook]))
            else:
                with intercept(model, {hook: change}):
                    after = model(histories.values, histories.gap)
            logits[name].append(after.default_logit[where].double().cpu().numpy())
        found.append(histories.rows[where].cpu().numpy())
    rows = np.concatenate(found) if found else np.empty(0, np.int64)
    truth = np.full(len(rows), np.nan) if panel.outcome is None else panel.outcome[rows]
    together = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in logits.items()}
    return Judged(together, truth, panel.entity[rows], rows)


def evaluate_fidelity(
    model: CreditTransformer,
    folder: Path,
    hook: str,
    *,
    sae: Dictionary,
    mean: Float[Tensor, " d_in"],
    config: EvaluateConfig,
    seed: int,
) -> dict[str, Any]:
    """Return what the confirm entities' predictions lose when the reconstruction is spliced in.

    Parameters
    ----------
    model, hook
        Where the activations are read.
    folder
        Of the panel.
    sae
        Folded.
    mean
        Of the hook's activations, for the ablation.
    config, seed
        Segments, number of samples, and what draws them.

    Returns
    -------
    dict
        The figures of `_report` before the time cut; `out_of_time`: the same after it, where there is one; before
        it also `reference_auc` and `reference_change`: scikit-learn's HistGradientBoosting on the same entities
        and columns, and model minus reference (outcomes per entity only).

    Raises
    ------
    ConfigError
        A column cannot be divided into the segments that are asked for.
    """
    panel = Panel.open(folder)
    replace = replacements(sae, mean)
    out: dict[str, Any] = {}
    for out_of_time in (False, True):
        found = splice(model, panel, hook, replace=replace, out_of_time=out_of_time)
        if not len(found.rows):
            continue
        segments = segments_of(folder, config.segments, found.rows)
        periods = periods_of(panel.time[found.rows])
        report = _report(found, segments, periods, n_bootstrap=config.n_bootstrap, seed=seed)
        if out_of_time:
            out["out_of_time"] = report
            continue
        out |= report
        if "model" in report and panel.outcome_per == "entity":
            known = np.isfinite(found.truth)
            truth, owner = found.truth[known], found.entity[known]
            boosted = boosted_probabilities(panel, owner, seed=seed)
            out["reference_auc"] = discrimination(truth, boosted).auc
            out["reference_change"] = auc_difference(
                truth,
                found.logits["model"][known],
                boosted,
                owner,
                n_bootstrap=config.n_bootstrap,
                seed=seed,
            )
    return out


def _report(
    found: Judged, segments: dict[str, list[Part]], periods: list[Part], *, n_bootstrap: int, seed: int
) -> dict[str, Any]:
    """Return the figures of one set of judged rows.

    Returns
    -------
    dict
        `entities`; `mean_abs_dpd`, mean |change of the PD|; `mean_abs_dlogit`; `change`: by what was put in the
        activations' place, the measures of `resample` minus those of the model, each with its 95% interval;
        `segments` and `periods`: such changes of the spliced model on parts of the rows. With outcomes also `model`
        and `spliced`: discrimination and calibration; `auc_change`, as in `change`; `recovered`: the share of the
        loss that ablation adds and splicing does not, by ablation.
    """
    plain, spliced = found.logits["model"], found.logits["spliced"]
    samples = resample(found.truth, found.logits, found.entity, n_bootstrap=n_bootstrap, seed=seed)
    change = {name: changes(samples, name) for name in found.logits if name != "model"}

    def part_of(part: Part) -> dict[str, Any]:
        pair = {"model": plain, "spliced": spliced}
        drawn = resample(
            found.truth, pair, found.entity, n_bootstrap=n_bootstrap, seed=seed, within=part.rows
        )
        return part.name | _part_figures(drawn, found.entity[part.rows])

    out: dict[str, Any] = {
        "entities": len(np.unique(found.entity)),
        "mean_abs_dpd": float(samples["spliced"]["mean_abs_dpd"][0]),
        "mean_abs_dlogit": float(np.abs(spliced - plain).mean()),
        "change": change,
        "segments": {name: [part_of(part) for part in parts] for name, parts in segments.items()},
        "periods": [part_of(part) for part in periods],
    }
    known = np.isfinite(found.truth)
    truth = found.truth[known]
    if len(np.unique(truth)) > 1:
        out |= {
            "model": discrimination(truth, probability(plain[known])).to_dict(),
            "spliced": discrimination(truth, probability(spliced[known])).to_dict(),
            "auc_change": change["spliced"]["auc"],
            "recovered": {floor: recovered(samples, "spliced", floor) for floor in ("zero", "mean")},
        }
    return out


def _part_figures(samples: Resamples, entity: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    model = {name: figure(v)[0] for name, v in samples["model"].items() if name != "mean_abs_dpd"}
    return {
        "rows": len(entity),
        "entities": len(np.unique(entity)),
        "model": model,
        "change": changes(samples, "spliced"),
    }
