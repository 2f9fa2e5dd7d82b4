"""A dictionary on rows that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from activations_cache.loader import ShuffledLoader
from activations_cache.store import ActivationStore
from sae.baselines import fit_baseline
from sae.dictionary import Dictionary
from sae.errors import CheckpointError
from sae.metrics import Firing, Variance
from sae.world import World

from .segments import RowSegments, find_stretches

ROWS_AT_ONCE = 8192
BASELINES = ("neurons", "pca")
"""The baselines that every evaluation shows: those that cost no more than a decomposition of one sample."""
SAMPLE_ROWS = 32768
"""Rows of the training split that baselines are fitted to."""


@torch.no_grad()
def evaluate_dictionary(store: ActivationStore, sae: Dictionary, hook: str, split: str) -> dict[str, Any]:
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
        `rows`; `fvu` about the mean of these rows; `fvu_per_dimension`, its median, 90% quantile and maximum,
        and the dimension of the maximum; `shrinkage`; `l0`; `dead`, the share that never fires here; `dense`,
        the share that fires on more than half the rows; `firing_rates`, features by rate; `segments`, FVU and
        L0 by position and time. `sae.metrics` defines them all. FVU is NaN only where the rows do not vary.

    Raises
    ------
    StoreError
        The store has no such hook or split, or is damaged.
    CheckpointError
        The dictionary is not folded, or of another width, or its reconstructions are not finite.
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
    segments = RowSegments(find_stretches(store, split))
    for rows in store.rows(hook, split, batch_rows=ROWS_AT_ONCE):
        x = torch.from_numpy(rows.acts).to(sae.W_dec.device)
        codes = sae.encode(x)
        firing.update(codes)
        x_hat = sae.decode(codes)
        variance.update(x, x_hat)
        segments.update(x, x_hat, codes, rows)
    _require_finite(variance, f"{hook}, split {split}")
    return {
        "rows": firing.rows,
        "fvu": variance.fvu,
        "fvu_per_dimension": _spread(variance.fvu_per_dimension),
        "shrinkage": variance.shrinkage,
        "l0": firing.l0,
        "dead": firing.dead,
        "dense": firing.dense,
        "firing_rates": firing.histogram(),
        "segments": segments.compute(),
    }


@torch.no_grad()
def evaluate_baselines(
    store: ActivationStore, hook: str, splits: Sequence[str], *, k: int, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure what needs no training: by baseline and split, `fvu` and `l0` with k features per row.

    Parameters
    ----------
    store, hook
        Raw activations; the baselines are fitted to a random sample of split fit.
    splits
        Where they are measured.
    k
        Features kept per row: the L0 of the dictionary that they are compared with.
    seed
        Of the sample, and of baselines that draw.

    Raises
    ------
    StoreError
        The store has no such hook or split, or is damaged.
    """
    sample = _sample(store, hook, seed)
    fitted = {name: fit_baseline(name, sample, store.hooks[hook], k=k, seed=seed) for name in BASELINES}
    measured: dict[str, dict[str, dict[str, float]]] = {name: {} for name in fitted}
    for split in splits:
        totals = {name: (Firing.empty(b.d_sae), Variance()) for name, b in fitted.items()}
        for rows in store.rows(hook, split, batch_rows=ROWS_AT_ONCE):
            x = torch.from_numpy(rows.acts)
            for name, (firing, variance) in totals.items():
                codes = fitted[name].encode(x)
                firing.update(codes)
                variance.update(x, fitted[name].decode(codes))
        for name, (firing, variance) in totals.items():
            measured[name][split] = {"fvu": variance.fvu, "l0": firing.l0}
    return measured


def _sample(store: ActivationStore, hook: str, seed: int) -> Tensor:
    """Return rows of split fit in the mixed order of the loader: rows that are stored side by side may be alike."""
    loader = ShuffledLoader(
        store,
        hook,
        "fit",
        # a batch that goes on into the next epoch would hold rows twice
        batch_size=max(1, min(SAMPLE_ROWS, store.splits.get("fit", 0))),
        seed=seed,
        world=World.single("cpu"),
    )
    try:
        return loader.next_batch().x
    finally:
        loader.close()


def _require_finite(variance: Variance, where: str) -> None:
    if not bool(variance.residual.isfinite().all()):
        raise CheckpointError(
            "the dictionary's reconstructions are not finite",
            got=f"NaN or infinity on {where}",
            do="train or import it again, and look at the size of its weights",
        )


def _spread(fvu: Tensor) -> dict[str, int | float | None]:
    """Return quantiles over the dimensions that vary, and the worst of them."""
    known = fvu[~fvu.isnan()]
    if not len(known):
        return {"median": None, "p90": None, "max": None, "worst": None}
    median, p90 = torch.quantile(known, torch.tensor([0.5, 0.9], dtype=known.dtype)).tolist()
    worst = int(fvu.nan_to_num(-1.0).argmax())
    return {"median": median, "p90": p90, "max": float(known.max()), "worst": worst}
