"""Fidelity where it counts: what the model predicts when the reconstruction takes the activations' place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations_cache.hooks import capture, intercept
from activations_cache.panel import Panel
from activations_cache.reference.baseline import boosted_probabilities
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.reference.fit import judged
from activations_cache.reference.histories import batches_by_length, collate
from activations_cache.reference.scores import auc_difference, discrimination
from sae.base import SAE

BATCH_ROWS = 16384


def splice(
    model: CreditTransformer, panel: Panel, hook: str, sae: SAE, entities: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return logits of the model as it is and with x replaced by decode(encode(x)), outcomes and entities.

    All are taken where the default head is judged; everything behind the hook is computed anew.
    """
    end = panel.history_end()
    entities = entities[end[entities] > panel.offsets[entities]]
    device = next(model.parameters()).device
    plain, spliced, truths, owners = [], [], [], []

    def reconstruct(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return sae.decode(sae.encode(flat)).to(x.dtype).reshape(x.shape)

    with torch.inference_mode():
        for batch in batches_by_length(panel, entities, BATCH_ROWS):
            histories = collate(panel, batch, stop=end).to(device)
            where = judged(panel, histories)
            layer = model.resume_after(hook)
            with capture(model, [hook]) as seen:
                before = model(histories.values, histories.gap)
            if layer is not None:
                after = model.resume(layer, reconstruct(seen[hook]))
            else:
                with intercept(model, {hook: reconstruct}):
                    after = model(histories.values, histories.gap)
            plain.append(before.default_logit[where].double().cpu().numpy())
            spliced.append(after.default_logit[where].double().cpu().numpy())
            rows = histories.rows[where].cpu().numpy()
            owners.append(panel.entity[rows])
            truths.append(panel.outcome[rows] if panel.outcome is not None else np.full(len(rows), np.nan))
    return tuple(np.concatenate(part) for part in (plain, spliced, truths, owners))  # type: ignore[return-value]


def evaluate_fidelity(
    model: CreditTransformer, panel: Panel, hook: str, sae: SAE, *, seed: int
) -> dict[str, Any]:
    """Return what the confirm entities' predictions lose when the reconstruction is spliced in.

    Returns
    -------
    dict
        `model` and `spliced`: discrimination and calibration; `auc_change`: spliced minus model with its interval
        by entity; `mean_abs_dpd`: mean |change of the PD|; `mean_abs_dlogit`; `reference_auc` and
        `reference_change`: scikit-learn's HistGradientBoosting on the same entities and columns, and model minus
        reference (outcomes per entity only).
    """
    entities = panel.entities_of("confirm")
    plain, spliced, truth, owner = splice(model, panel, hook, sae, entities)
    pd_plain, pd_spliced = _probability(plain), _probability(spliced)
    out: dict[str, Any] = {
        "entities": len(np.unique(owner)),
        "mean_abs_dpd": float(np.abs(pd_spliced - pd_plain).mean()),
        "mean_abs_dlogit": float(np.abs(spliced - plain).mean()),
    }
    known = np.isfinite(truth)
    if len(np.unique(truth[known])) < 2:
        return out
    truth, owner = truth[known], owner[known]
    out |= {
        "model": discrimination(truth, pd_plain[known]).to_dict(),
        "spliced": discrimination(truth, pd_spliced[known]).to_dict(),
        "auc_change": auc_difference(truth, spliced[known], plain[known], owner, seed=seed),
    }
    if panel.outcome_per == "entity":
        reference = boosted_probabilities(panel, owner, seed=seed)
        out["reference_auc"] = discrimination(truth, reference).auc
        out["reference_change"] = auc_difference(truth, plain[known], reference, owner, seed=seed)
    return out


def _probability(logit: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-logit)))
