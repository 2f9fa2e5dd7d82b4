"""What the reference model says of a panel's entities, and how well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache.batching import batches_by_length
from activations_cache.panel import Panel

from .histories import Histories, collate
from .scores import Discrimination, discrimination

if TYPE_CHECKING:
    from .credit_transformer import CreditTransformer


def predict(
    model: CreditTransformer, panel: Panel, entities: Int[np.ndarray, " entities"], *, batch_rows: int = 16384
) -> tuple[Float[np.ndarray, " judged"], Float[np.ndarray, " judged"], Int[np.ndarray, " judged"]]:
    """Return logits, outcomes and entities where the model is judged.

    That is an entity's last position before the time cut, or every row with a known outcome where it is per row.
    """
    device = next(model.parameters()).device
    logits, truths, owners = [], [], []
    end = panel.history_end()
    entities = entities[end[entities] > panel.offsets[entities]]
    with torch.inference_mode():
        for batch in batches_by_length(panel, entities, batch_rows):
            histories = collate(panel, batch, stop=end).to(device)
            out = model(histories.values, histories.gap).default_logit
            where = judged(panel, histories)
            logits.append(out[where].double().cpu().numpy())
            rows = histories.rows[where].cpu().numpy()
            owners.append(panel.entity[rows])
            truths.append(panel.outcome[rows] if panel.outcome is not None else np.full(len(rows), np.nan))
    return np.concatenate(logits), np.concatenate(truths), np.concatenate(owners)


def judged(panel: Panel, histories: Histories) -> Tensor:
    """Return the mask `[batch, time]` of positions at which the model's default head is judged."""
    if panel.outcome_per == "entity" or panel.outcome is None:
        last = histories.real.sum(1, keepdim=True) - 1
        return torch.arange(histories.real.shape[1], device=last.device)[None, :] == last
    known = torch.from_numpy(np.isfinite(panel.outcome)).to(histories.rows.device)[histories.rows]
    return histories.real & known


def evaluate(model: CreditTransformer, panel: Panel, split: str) -> Discrimination | None:
    """Return the model's discrimination and calibration on a split's entities, or None without known outcomes."""
    logits, truth, _ = predict(model, panel, panel.entities_of(split))
    known = np.isfinite(truth)
    if len(np.unique(truth[known])) < 2:
        return None
    return discrimination(truth[known], 1 / (1 + np.exp(-logits[known])))
