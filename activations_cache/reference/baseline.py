"""A gradient-boosted model on the same entities and columns: what the reference model must not fall behind."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from activations_cache.panel import Panel

N_LAST = 6
"""Rows from the end that become columns of their own; older ones enter through mean, least, largest and first."""


def wide(panel: Panel, entities: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n features"]:
    """Return one row per entity: its last rows side by side, summaries of its history, its length and last gap."""
    end = panel.history_end()[entities]
    start = panel.offsets[entities]
    parts = []
    for back in range(N_LAST):
        row = end - 1 - back
        values = panel.values[np.maximum(row, start)].copy()
        values[row < start] = np.nan
        parts.append(values)
    histories = [panel.values[s:e] for s, e in zip(start, end, strict=True)]
    with np.errstate(all="ignore"):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # all-missing histories are NaN, as they should be
            for summary in (np.nanmean, np.nanmin, np.nanmax):
                parts.append(np.stack([summary(h, axis=0) for h in histories]))
    parts.append(panel.values[start])
    last_gap = np.where(end - start > 1, panel.time[end - 1] - panel.time[np.maximum(end - 2, start)], 0)
    parts.append(np.stack([end - start, last_gap], axis=1).astype(np.float32))
    return np.concatenate(parts, axis=1)


def boosted_probabilities(
    panel: Panel, entities: Int[np.ndarray, " n"], *, seed: int
) -> Float[np.ndarray, " n"]:
    """Fit scikit-learn's HistGradientBoosting on the fit entities and return its probabilities for `entities`.

    For outcomes per entity only; its settings are the library's defaults.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    if panel.outcome is None:
        raise ValueError("a panel without an outcome has no baseline")
    end = panel.history_end()
    fit = panel.entities_of("fit")
    fit = fit[end[fit] > panel.offsets[fit]]
    truth = panel.outcome[end[fit] - 1]
    known = np.isfinite(truth)
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(wide(panel, fit[known]), truth[known].astype(int))
    probabilities: np.ndarray = model.predict_proba(wide(panel, entities))[:, 1]
    return probabilities
