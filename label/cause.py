"""Whether the model uses a feature: remove it, keep the rest and the error, and see how far the default logit moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache.hooks import intercept
from activations_cache.panel import Panel
from activations_cache.reference.histories import collate
from activations_cache.reference.predict import judged
from activations_cache.store import ActivationStore
from sae.base import SAE

from .statistics.bootstrap import Interval, entity_weights, interval

if TYPE_CHECKING:
    from activations_cache.reference.credit_transformer import CreditTransformer

_CELLS = 1 << 24
"""Numbers of the stream that one forward pass may hold."""

Subtract = Callable[[Tensor], Tensor]


class Effect(NamedTuple):
    """What removing one feature does to the default logit of held-out entities on whose history it fires."""

    n_entities: int
    signed: Interval
    """Mean change of the logit (after removal minus before); negative: the feature raises the PD."""
    size: Interval
    """Mean absolute change."""
    share: float
    """Size over that of removing all features, on the same entities."""
    random_size: float
    """The largest mean absolute change among random directions of the same norm at the same positions."""
    over_random: Interval
    """Size minus that; paired by entity."""
    matched_size: float
    """Mean size of the live features nearest in log rate and log activation, each where it fires itself."""
    over_matched: Interval
    used: bool
    """Both differences have their interval above zero, and enough entities' logits move for that to mean something."""


class Removed(NamedTuple):
    """The change of the logit per entity when a feature is removed."""

    entity: Int[np.ndarray, " n"]
    change: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Stream:
    """A hook's activations and codes for whole held-out histories, and the way from there to the default logit.

    Attributes
    ----------
    codes
        Entity codes, ascending.
    offsets
        `[entities + 1]`: rows of each.
    x
        `[rows, d_in]`.
    row, feature, value
        Codes as entries sorted by feature, then row.
    starts
        `[d_sae + 1]` into the entries.
    """

    model: CreditTransformer
    panel: Panel
    hook: str
    sae: SAE
    codes: Int[np.ndarray, " entities"]
    offsets: Int[np.ndarray, " bounds"]
    x: Float[Tensor, "rows d_in"]
    row: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]
    starts: Int[np.ndarray, " d_sae_bounds"]

    @staticmethod
    def read(
        store: ActivationStore,
        model: CreditTransformer,
        panel: Panel,
        hook: str,
        sae: SAE,
        *,
        n_entities: int,
        seed: int,
    ) -> Stream | None:
        """Read the histories up to the time cut of at most `n_entities` confirm entities, at random.

        Nothing could move those that are judged nowhere (`Panel.judged`). None: nobody is judged.
        """
        codes = panel.judged("confirm")
        if not len(codes):
            return None
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 5])))
        codes = np.sort(rng.permutation(codes)[:n_entities])
        stored = store.entities(codes, hook)
        length = (panel.history_end() - panel.offsets[:-1])[stored.entity]
        keep = stored.position < length
        x = torch.from_numpy(stored.acts[keep])
        entity = stored.entity[keep]
        offsets = np.append(np.searchsorted(entity, codes), len(entity))
        with torch.inference_mode():
            z = sae.encode(x)
        row = np.repeat(np.arange(len(x)), z.offsets.diff().cpu().numpy())
        feature = z.features.cpu().numpy()
        order = np.lexsort((row, feature))
        starts = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=sae.d_sae))])
        values = z.values.float().cpu().numpy()[order]
        return Stream(model, panel, hook, sae, codes, offsets, x, row[order], values, starts)

    def fired(self, feature: int) -> Int[np.ndarray, " n"]:
        """Return the indices of entities on whose history a feature fires."""
        part = self.row[self.starts[feature] : self.starts[feature + 1]]
        return np.unique(np.searchsorted(self.offsets, part, side="right") - 1)

    def activation(self, feature: int) -> Float[np.ndarray, " rows"]:
        """Return a feature's activation on every row."""
        out = np.zeros(len(self.x), dtype=np.float32)
        part = slice(self.starts[feature], self.starts[feature + 1])
        out[self.row[part]] = self.value[part]
        return out

    def without(self, removed: Subtract, entities: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the mean default logit at the judged positions once something is subtracted from the stream.

        Parameters
        ----------
        removed
            Rows `[batch, time]` of the stream -> what to subtract there, `[batch, time, d_in]`.
        entities
            Indices into `codes`.
        """
        out = np.empty(len(entities))
        width = int((self.offsets[1:] - self.offsets[:-1])[entities].max()) * self.x.shape[1]
        step = max(1, _CELLS // width)
        for start in range(0, len(entities), step):
            part = entities[start : start + step]
            out[start : start + step] = self._logits(removed, part)
        return out

    def _logits(self, removed: Subtract, entities: np.ndarray) -> np.ndarray:
        begin = self.offsets[entities]
        length = self.offsets[entities + 1] - begin
        steps = np.arange(int(length.max()))
        index = torch.from_numpy(np.minimum(begin[:, None] + steps, (begin + length - 1)[:, None]))
        stream = self.x[index] - removed(index)
        histories = collate(self.panel, self.codes[entities], stop=self.panel.history_end())
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            layer = self.model.resume_after(self.hook)
            if layer is not None:
                out = self.model.resume(layer, stream.to(device))
            else:
                with intercept(self.model, {self.hook: lambda _: stream.to(device)}):
                    out = self.model(histories.values.to(device), histories.gap.to(device))
        where = judged(self.panel, histories)
        logits = out.default_logit.double().cpu()
        weight = where.double()
        return ((logits * weight).sum(1) / weight.sum(1)).numpy()


class Ablation:
    """Removes features one by one; keeps what every live feature's removal does, for the matched controls.

    Parameters
    ----------
    n_entities
        Sampled for each feature, at most.
    least
        Entities on which a verdict rests: sampled for any, and for "used" moved as well.
    """

    def __init__(self, stream: Stream, *, n_entities: int, least: int, n_bootstrap: int, seed: int) -> None:
        self.stream, self.n_entities, self.least, self.seed = stream, n_entities, least, seed
        self.n_bootstrap = n_bootstrap
        everyone = np.arange(len(stream.codes))
        self.base = stream.without(lambda index: torch.zeros(()), everyone)
        self.all_removed = self._all_removed(everyone)
        self.removed: dict[int, Removed] = {}
        self._draws: dict[int, np.ndarray] = {}

    def live(self, features: Sequence[int], *, report: Callable[[int], None] = lambda _: None) -> None:
        """Remove each of the given features where it fires."""
        for i, feature in enumerate(features):
            members = self._sample(feature)
            if len(members):
                z = torch.from_numpy(self.stream.activation(feature))
                change = self._change(z, self._direction(feature), members)
                self.removed[feature] = Removed(self.stream.codes[members], change)
                weights = entity_weights(len(members), self.n_bootstrap, seed=self.seed + feature)
                self._draws[feature] = (np.abs(change) @ weights) / len(members)
            report(i + 1)

    def effect(self, feature: int, *, n_random: int, n_matched: int) -> Effect | None:
        """Judge one feature against its controls, or leave it open.

        Returns
        -------
        None where fewer than `least` entities were sampled for it, and where it would be used but fewer than that move:
        intervals of so few lie above zero by chance too often. That speaks against no "not used".
        """
        members = self._sample(feature)
        if feature not in self.removed or len(members) < self.least:
            return None
        change = self.removed[feature].change
        size = np.abs(change)
        z = torch.from_numpy(self.stream.activation(feature))
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + feature)
        directions = torch.randn(n_random, self.stream.x.shape[1], generator=rng)
        directions *= self._direction(feature).norm() / directions.norm(dim=1, keepdim=True)
        random = np.stack([np.abs(self._change(z, d, members)) for d in directions])
        largest = random[int(random.mean(1).argmax())]
        weights = entity_weights(len(members), self.n_bootstrap, seed=self.seed + feature)
        n = len(members)
        matched = self._matched(feature, n_matched)
        matched_draws = (
            np.mean([self._draws[m] for m in matched], axis=0) if matched else np.zeros(self.n_bootstrap)
        )
        matched_size = (
            float(np.mean([np.abs(self.removed[m].change).mean() for m in matched])) if matched else 0.0
        )
        over_random = interval(float((size - largest).mean()), (size - largest) @ weights / n)
        over_matched = interval(float(size.mean()) - matched_size, self._draws[feature] - matched_draws)
        used = over_random.low > 0 and over_matched.low > 0 and bool(matched)
        if used and np.count_nonzero(size > self._noise(members)) < self.least:
            return None
        return Effect(
            n_entities=n,
            signed=interval(float(change.mean()), change @ weights / n),
            size=interval(float(size.mean()), self._draws[feature]),
            share=float(size.mean() / max(np.abs(self.all_removed[members]).mean(), 1e-12)),
            random_size=float(largest.mean()),
            over_random=over_random,
            matched_size=matched_size,
            over_matched=over_matched,
            used=used,
        )

    def together(self, features: Sequence[int]) -> tuple[float, float]:
        """Return the mean absolute change of the logit when these features, and when all, are removed."""
        removed = torch.zeros_like(self.stream.x)
        for feature in features:
            z = torch.from_numpy(self.stream.activation(feature))
            removed += z[:, None] * self._direction(feature)
        everyone = np.arange(len(self.stream.codes))
        change = self.stream.without(lambda index: removed[index], everyone) - self.base
        return float(np.abs(change).mean()), float(np.abs(self.all_removed).mean())

    def _direction(self, feature: int) -> Tensor:
        return self.stream.sae.W_dec[feature].detach().float().cpu()

    def _change(self, z: Tensor, direction: Tensor, members: np.ndarray) -> np.ndarray:
        after = self.stream.without(lambda index: z[index].unsqueeze(-1) * direction, members)
        return np.asarray(after - self.base[members])

    def _noise(self, members: np.ndarray) -> float:
        """Return the largest change of a logit when nothing is removed, but batches are cut as for a removal.

        It is at least the last place of the largest logit, for a subtraction rounds where batches agree, too.
        """
        again = self.stream.without(lambda index: torch.zeros(()), members)
        last_place = torch.finfo(next(self.stream.model.parameters()).dtype).eps * np.abs(again).max()
        return float(max(np.abs(again - self.base[members]).max(), last_place))

    def _all_removed(self, everyone: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            written = self.stream.sae.decode(self.stream.sae.encode(self.stream.x)) - self.stream.sae.b_dec
        written = written.float().cpu()
        return np.asarray(self.stream.without(lambda index: written[index], everyone) - self.base)

    def _sample(self, feature: int) -> np.ndarray:
        members = self.stream.fired(feature)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, 6, feature])))
        return np.sort(rng.permutation(members)[: self.n_entities])

    def _matched(self, feature: int, n: int) -> list[int]:
        """Return the live features nearest in log firing rate and log mean activation, each standardised."""
        live = sorted(self.removed)
        starts, value = self.stream.starts, self.stream.value
        count = np.array([starts[j + 1] - starts[j] for j in live], dtype=float)
        mean = np.array([value[starts[j] : starts[j + 1]].mean() for j in live])
        place = np.stack([np.log(count), np.log(mean)], axis=1)
        place = (place - place.mean(0)) / np.maximum(place.std(0), 1e-9)
        distance = np.square(place - place[live.index(feature)]).sum(1)
        return [live[i] for i in np.argsort(distance, kind="stable") if live[i] != feature][:n]
