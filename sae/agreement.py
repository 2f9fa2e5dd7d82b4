"""Whether a dictionary agrees with the truth or with another one: in its directions, and in when it fires."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from .codes import SparseCodes
from .geometry import unit_directions


class Pairs(NamedTuple):
    """A one-to-one match of the features of two dictionaries.

    Attributes
    ----------
    mean : float
        Mean similarity over the pairs; there are min(d_a, d_b) of them.
    a, b : Int[np.ndarray, "pairs"]
        The pairs.
    similarity : Float[np.ndarray, "pairs"]
        Theirs.
    """

    mean: float
    a: Int[np.ndarray, "pairs"]
    b: Int[np.ndarray, "pairs"]
    similarity: Float[np.ndarray, "pairs"]


def pair(similarity: Float[np.ndarray, "d_a d_b"]) -> Pairs:
    """Match rows with columns so that the summed similarity is largest (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    a, b = linear_sum_assignment(similarity, maximize=True)
    chosen = similarity[a, b]
    return Pairs(float(chosen.mean()), a, b, chosen)


def decoder_stability(a: Float[Tensor, "d_a d_in"], b: Float[Tensor, "d_b d_in"]) -> Pairs:
    """Match the write directions of two dictionaries by cosine.

    The sign counts: codes are positive, so a direction and its opposite are different features. Leave dead
    features out; theirs is noise. Time grows with the cube of d_a in the worst case.

    References
    ----------
    arXiv 2501.16615.
    """
    return pair((unit_directions(a) @ unit_directions(b).T).numpy())


@dataclass
class CoFiring:
    """How often each feature of one dictionary fires on the same rows as each of another.

    Attributes
    ----------
    both : csr_array
        int64 `[d_a, d_b]`, sparse.
    a, b : Int[np.ndarray, "..."]
        Rows on which each feature fires.
    """

    both: csr_array
    a: Int[np.ndarray, "d_a"]
    b: Int[np.ndarray, "d_b"]

    @classmethod
    def empty(cls, d_a: int, d_b: int) -> CoFiring:
        """Return the counts of no rows."""
        return cls(csr_array((d_a, d_b), dtype=np.int64), np.zeros(d_a, np.int64), np.zeros(d_b, np.int64))

    def update(self, a: SparseCodes, b: SparseCodes) -> None:
        """Count the codes of two dictionaries on the same rows."""
        fired_a, fired_b = _indicator(a, len(self.a)), _indicator(b, len(self.b))
        self.both = self.both + fired_a.T @ fired_b
        self.a = self.a + fired_a.sum(0)
        self.b = self.b + fired_b.sum(0)

    def merge(self, other: CoFiring) -> None:
        """Add the rows of `other`."""
        self.both, self.a, self.b = self.both + other.both, self.a + other.a, self.b + other.b

    def jaccard(self) -> Float[np.ndarray, "d_a d_b"]:
        """Return rows on which both fire over rows on which either does; 0 where neither ever does."""
        both = self.both.toarray()
        either = self.a[:, None] + self.b[None, :] - both
        return np.asarray(both / np.maximum(either, 1), dtype=np.float64)

    def stability(self) -> Pairs:
        """Match the features of both dictionaries by the Jaccard index of the rows on which they fire."""
        return pair(self.jaccard())


@dataclass
class Detection:
    """Precision and recall of features as detectors of what is known to be there.

    Attributes
    ----------
    features, truths : Int[Tensor, "pairs"]
        Which feature detects which truth; a feature takes part once, a truth may be detected by several.
    hits, fired, held : Int[Tensor, "pairs"]
        Rows on which both are active, the feature fires, the truth holds.
    """

    features: Int[Tensor, "pairs"]
    truths: Int[Tensor, "pairs"]
    hits: Int[Tensor, "pairs"] = field(init=False)
    fired: Int[Tensor, "pairs"] = field(init=False)
    held: Int[Tensor, "pairs"] = field(init=False)

    def __post_init__(self) -> None:
        assert len(torch.unique(self.features)) == len(self.features), "a feature takes part once"
        self.hits, self.fired, self.held = (torch.zeros_like(self.features) for _ in range(3))

    def update(self, codes: SparseCodes, truth: SparseCodes, *, d_sae: int, n_truths: int) -> None:
        """Count a batch.

        Parameters
        ----------
        codes, truth
            Of the same rows.
        d_sae, n_truths
            How many features, and how many truths, there are.
        """
        self.fired += codes.features.bincount(minlength=d_sae)[self.features]
        self.held += truth.features.bincount(minlength=n_truths)[self.truths]
        partner = torch.full((d_sae,), -1, dtype=torch.int64)
        partner[self.features] = self.truths
        takes_part = partner[codes.features] >= 0
        features = codes.features[takes_part]
        wanted = codes.row_ids()[takes_part] * n_truths + partner[features]
        there = torch.isin(wanted, truth.row_ids() * n_truths + truth.features)
        self.hits += features[there].bincount(minlength=d_sae)[self.features]

    def merge(self, other: Detection) -> None:
        """Add the rows of `other`, whose pairs are the same."""
        self.hits, self.fired, self.held = (
            self.hits + other.hits,
            self.fired + other.fired,
            self.held + other.held,
        )

    @property
    def precision(self) -> Float[Tensor, "pairs"]:
        """Share of a feature's firings on which its truth holds; 0 where it never fires."""
        return self.hits.double() / self.fired.clamp(min=1)

    @property
    def recall(self) -> Float[Tensor, "pairs"]:
        """Share of the rows where the truth holds on which the feature fires; 0 where it never holds."""
        return self.hits.double() / self.held.clamp(min=1)

    @property
    def f1(self) -> Float[Tensor, "pairs"]:
        """Harmonic mean of precision and recall."""
        return 2 * self.hits.double() / (self.fired + self.held).clamp(min=1)


def _indicator(codes: SparseCodes, d_sae: int) -> csr_array:
    ones = np.ones(len(codes.features), dtype=np.int64)
    return csr_array(
        (ones, codes.features.cpu().numpy(), codes.offsets.cpu().numpy()), shape=(codes.rows, d_sae)
    )
