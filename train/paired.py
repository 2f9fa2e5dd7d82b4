"""Paired change of discrimination, calibration and loss between predictions, with intervals by entity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from activations_cache.reference.scores import BINS, calibration_bins

Figure = tuple[float | None, float | None, float | None]
"""A value with the ends of its 95% interval; None where it is not defined."""
Resamples = dict[str, dict[str, np.ndarray]]
"""By prediction and measure, `[1 + samples]`: the value on all rows, then that on every sample."""


class Scored:
    """Predictions against outcomes, sorted once, so that a weighting of the rows costs one pass.

    Parameters
    ----------
    truth
        0 or 1.
    logit
        Log-odds that it is 1.
    """

    def __init__(self, truth: Float[np.ndarray, " n"], logit: Float[np.ndarray, " n"]) -> None:
        self.order = np.argsort(logit, kind="stable")
        score, self.truth = logit[self.order], truth[self.order]
        self.excess = probability(score) - self.truth
        self.loss = np.logaddexp(0, score) - self.truth * score
        self.starts = np.flatnonzero(np.append(True, np.diff(score) != 0))
        self.bins = calibration_bins(score)

    def measure(self, weight: Float[np.ndarray, " n"]) -> dict[str, float]:
        """Return the measures of weighted rows.

        Returns
        -------
        dict
            `auc`: P(score of a 1 above score of a 0), ties half. `gini`: 2 auc - 1. `ks`: the largest distance
            between the score distributions of the two outcomes. `calibration_error`: mean |observed rate - mean
            probability| over ten equally filled bins (of the rows unweighted), weighted by their size. `brier`: mean
            squared error of the probability. `loss`: mean log loss in nats. NaN without weight, and the first three
            with one outcome only.
        """
        w = weight[self.order]
        total = float(w.sum())
        if not total:
            return dict.fromkeys(("auc", "gini", "ks", "calibration_error", "brier", "loss"), float("nan"))
        ones = np.add.reduceat(w * self.truth, self.starts)
        zeros = np.add.reduceat(w, self.starts) - ones
        n1, n0 = float(ones.sum()), float(zeros.sum())
        auc = ks = float("nan")
        if n1 and n0:
            below = np.cumsum(zeros) - zeros
            auc = float((ones * (below + 0.5 * zeros)).sum() / (n1 * n0))
            ks = float(np.abs(np.cumsum(ones) / n1 - np.cumsum(zeros) / n0).max())
        by_bin = np.bincount(self.bins, weights=w * self.excess, minlength=BINS)
        return {
            "auc": auc,
            "gini": 2 * auc - 1,
            "ks": ks,
            "calibration_error": float(np.abs(by_bin).sum() / total),
            "brier": float((w * np.square(self.excess)).sum() / total),
            "loss": float((w * self.loss).sum() / total),
        }


def resample(
    truth: Float[np.ndarray, " n"],
    logits: Mapping[str, Float[np.ndarray, " n"]],
    entity: Int[np.ndarray, " n"],
    *,
    n_bootstrap: int,
    seed: int,
    within: Bool[np.ndarray, " n"] | None = None,
) -> Resamples:
    """Measure predictions on all rows and on samples of whole entities, the same samples for all predictions.

    Parameters
    ----------
    truth
        0, 1, or NaN where the outcome is not known: such rows count for `mean_abs_dpd` only.
    logits
        Predictions; one of them is `model`, from which `mean_abs_dpd` is counted.
    entity
        Whose row it is.
    n_bootstrap, seed
        Number of samples, and what draws them.
    within
        The rows that are measured; samples are of all entities nevertheless, so that segments share them.

    Returns
    -------
    dict
        The measures of `Scored.measure`, where an outcome is known, and `mean_abs_dpd`.
    """
    within = np.ones(len(truth), dtype=bool) if within is None else within
    known = within & np.isfinite(truth)
    judged = bool(known.any())
    scored = {name: Scored(truth[known], logit[known]) for name, logit in logits.items()} if judged else {}
    base = probability(logits["model"][within])
    moved = {name: np.abs(probability(logit[within]) - base) for name, logit in logits.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in logits}
    for weight in entity_samples(entity, n_bootstrap, seed):
        here = weight[within]
        total = float(here.sum())
        for name in logits:
            shift = float((here * moved[name]).sum() / total) if total else float("nan")
            measures = {"mean_abs_dpd": shift}
            measures |= scored[name].measure(weight[known]) if judged else {}
            for measure, value in measures.items():
                found[name].setdefault(measure, []).append(value)
    return {name: {m: np.array(values) for m, values in by.items()} for name, by in found.items()}


def changes(samples: Resamples, name: str) -> dict[str, Figure]:
    """Return by measure how far a prediction is from that of the model; `mean_abs_dpd` is a distance already."""
    model = samples["model"]
    return {
        measure: figure(values if measure == "mean_abs_dpd" else values - model[measure])
        for measure, values in samples[name].items()
    }


def recovered(samples: Resamples, name: str, floor: str) -> Figure:
    """Return (L_floor - L_name) / (L_floor - L_model), L the log loss: 1 is nothing lost, 0 no better than the floor.

    Not defined where the floor predicts as well as the model, and in samples where it does.
    """
    loss = {key: samples[key]["loss"] for key in ("model", name, floor)}
    room = loss[floor] - loss["model"]
    room[room <= 0] = np.nan
    return figure((loss[floor] - loss[name]) / room)


def figure(values: Float[np.ndarray, " samples"]) -> Figure:
    """Return the first value with the 2.5% and 97.5% quantiles of the others that are finite."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if len(drawn) else (None, None)
    return (float(values[0]) if np.isfinite(values[0]) else None), low, high


def probability(logit: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return 1 / (1 + exp(-logit))."""
    # through the logarithm, so that no logit overflows
    return np.asarray(np.exp(-np.logaddexp(0, -logit)))


def entity_samples(
    entity: Int[np.ndarray, " n"], n_bootstrap: int, seed: int
) -> Iterator[Float[np.ndarray, " n"]]:
    """Yield how often each row counts: once, then as often as its entity was drawn."""
    codes, where = np.unique(entity, return_inverse=True)
    yield np.ones(len(entity))
    rng = np.random.Generator(np.random.Philox(seed))
    for _ in range(n_bootstrap):
        drawn = rng.integers(0, len(codes), len(codes))
        yield np.bincount(drawn, minlength=len(codes))[where].astype(np.float64)
