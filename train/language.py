"""Fidelity of a causal language model: what its next-token predictions lose at replaced activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from activations_cache.hooks import intercept
from activations_cache.inputs import ModelInputs
from activations_cache.sources.reading import ModelSource
from activations_cache.splits import SPLITS
from sae.dictionary import Dictionary
from sae.world import World

from .fidelity import Change, replacements
from .paired import Resamples, changes, entity_samples, recovered

TOKENS_AT_ONCE = 1024
"""Tokens whose distributions over the vocabulary are compared at once."""


def evaluate_language(
    source: ModelSource,
    hook: str,
    *,
    sae: Dictionary,
    mean: Float[Tensor, " d_in"],
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Return what next-token predictions in the confirm documents lose when the reconstruction is spliced in.

    Activations are replaced at the tokens that have rows, so special tokens that were left out keep theirs.

    Parameters
    ----------
    source
        Texts and a causal language model, whose output has `logits`.
    hook, sae, mean
        As for `evaluate_fidelity`.
    n_bootstrap, seed
        Number of samples of whole documents, and what draws them.

    Returns
    -------
    dict
        `documents`, `tokens`; `loss`, the model's mean -log p(next token) in nats; `change`: by what was put in
        the activations' place, the rise of `loss`, and `kl`, the mean KL(model || changed) over the vocabulary;
        `recovered`: the share of the loss that ablation adds and splicing does not. Intervals are by document.
    """
    replace = replacements(sae, mean)
    n_documents = len(source.entities)
    sums = {name: np.zeros((2, n_documents)) for name in ("model", *replace)}
    count = np.zeros(n_documents)
    for step in source.feed.plan(World()):
        inputs = source.feed.load(step)
        judged = _judged(source, inputs)
        if not judged.any():
            continue
        document = inputs.entity[:, :-1][judged]
        count += np.bincount(document, minlength=n_documents)
        for name, (loss, kl) in _measure(source, inputs, hook, replace, judged).items():
            sums[name][0] += np.bincount(document, weights=loss, minlength=n_documents)
            sums[name][1] += np.bincount(document, weights=kl, minlength=n_documents)
    read = np.flatnonzero(count)
    out: dict[str, Any] = {"documents": len(read), "tokens": int(count.sum())}
    if not len(read):
        return out
    sums = {name: total[:, read] for name, total in sums.items()}
    samples = resample_means(sums, count[read], n_bootstrap=n_bootstrap, seed=seed)
    return out | {
        "loss": float(samples["model"]["loss"][0]),
        "change": {name: changes(samples, name) for name in replace},
        "recovered": {floor: recovered(samples, "spliced", floor) for floor in ("zero", "mean")},
    }


def resample_means(
    sums: Mapping[str, Float[np.ndarray, "2 documents"]],
    tokens: Float[np.ndarray, " documents"],
    *,
    n_bootstrap: int,
    seed: int,
) -> Resamples:
    """Return the mean loss and KL of a token over all documents and over samples of them.

    Parameters
    ----------
    sums
        By what was put in the activations' place, loss and KL summed over each document.
    tokens
        Tokens of each document.
    n_bootstrap, seed
        As for `evaluate_language`.
    """
    means: dict[str, list[np.ndarray]] = {name: [] for name in sums}
    for weight in entity_samples(np.arange(len(tokens)), n_bootstrap, seed):
        drawn = weight @ tokens
        for name, total in sums.items():
            means[name].append(total @ weight / drawn)
    return {name: dict(zip(("loss", "kl"), np.stack(by, axis=1), strict=True)) for name, by in means.items()}


def _judged(source: ModelSource, inputs: ModelInputs) -> np.ndarray:
    """Return the mask `[batch, time - 1]` of tokens of confirm documents that are followed by one of the same."""
    real, entity = inputs.real, inputs.entity
    follows: np.ndarray = real[:, :-1] & real[:, 1:] & (entity[:, :-1] == entity[:, 1:])
    where = np.nonzero(follows)
    split = source.feed.split(entity[where], inputs.time[where])
    follows[where] = split == SPLITS.index("confirm")
    return follows


@torch.inference_mode()
def _measure(
    source: ModelSource, inputs: ModelInputs, hook: str, replace: Mapping[str, Change], judged: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, by change, loss and KL of every judged token."""
    device = next(source.model.parameters()).device
    words = {name: value.to(device) for name, value in inputs.kwargs.items()}
    real = torch.from_numpy(inputs.real).to(device).unsqueeze(-1)
    where = torch.from_numpy(judged).to(device)
    target = words["input_ids"][:, 1:][where]
    plain = source.model(**words).logits[:, :-1][where]
    out = {"model": _compare(plain, plain, target)}
    for name, change in replace.items():
        with intercept(
            source.model,
            {hook: lambda x, change=change: torch.where(real, change(x), x)},  # type: ignore[misc]
        ):
            changed = source.model(**words).logits[:, :-1][where]
        out[name] = _compare(plain, changed, target)
    return out


def _compare(
    plain: Float[Tensor, "tokens words"],
    changed: Float[Tensor, "tokens words"],
    target: Int[Tensor, " tokens"],
) -> tuple[np.ndarray, np.ndarray]:
    """Return -log p_changed(target) and KL(plain || changed) of every token."""
    losses, distances = [], []
    for start in range(0, len(target), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        p, q = plain[part].float().log_softmax(-1), changed[part].float().log_softmax(-1)
        losses.append(F.nll_loss(q, target[part], reduction="none"))
        distances.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    return torch.cat(losses).double().cpu().numpy(), torch.cat(distances).double().cpu().numpy()
