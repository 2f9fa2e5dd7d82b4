"""A dictionary on rows that it was not trained on."""

from __future__ import annotations

from typing import Any

import torch

from activations_cache.store import ActivationStore
from sae.base import SAE
from sae.errors import CheckpointError
from sae.metrics import Firing, Variance, coherence

ROWS_AT_ONCE = 8192


@torch.no_grad()
def evaluate_dictionary(store: ActivationStore, sae: SAE, hook: str, split: str) -> dict[str, Any]:
    """Measure how well and how sparsely a folded dictionary reconstructs one split of a store.

    Parameters
    ----------
    store
        Raw activations.
    sae
        Folded, so that it reads them.
    hook, split
        Which of them.

    Returns
    -------
    dict
        `rows`; `fvu` about the mean of these rows; `l0`; `dead`, the share that never fires here; `dense`,
        the share that fires on more than half the rows; `firing_rates`, features by rate; `coherence`, mean
        and maximum over features of the largest |cosine| with another.

    Raises
    ------
    StoreError
        The store has no such hook or split, or is damaged.
    CheckpointError
        The dictionary is not folded, or of another width.
    """
    if not sae.folded:
        raise CheckpointError(
            "the dictionary reads scaled activations", do="fold it first; training saves it folded"
        )
    if store.hooks.get(hook, sae.d_in) != sae.d_in:
        raise CheckpointError(
            f"the dictionary does not fit {hook}", got=f"d_in {sae.d_in}", expected=str(store.hooks[hook])
        )
    firing, variance = Firing.empty(sae.d_sae), Variance()
    for rows in store.rows(hook, split, batch_rows=ROWS_AT_ONCE):
        x = torch.from_numpy(rows.acts).to(sae.W_dec.device)
        codes = sae.encode(x)
        firing.update(codes)
        variance.update(x, sae.decode(codes))
    nearest = coherence(sae.W_dec)
    return {
        "rows": firing.rows,
        "fvu": variance.fvu,
        "l0": firing.l0,
        "dead": firing.dead,
        "dense": firing.dense,
        "firing_rates": firing.histogram(),
        "coherence": {"mean": float(nearest.mean()), "max": float(nearest.max())},
    }
