"""Agreement of dictionaries against scipy, scikit-learn and brute force."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from sae.agreement import CoFiring, Detection, decoder_stability
from sae.codes import from_dense

EDGES = [0, 1, 30, 31, 80]


def dense(seed, d, rate=0.3, n=80):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((n, d)) * (rng.random((n, d)) < rate))


def test_decoder_stability_is_the_best_assignment():
    rng = np.random.default_rng(0)
    a, b = torch.from_numpy(rng.standard_normal((4, 6))), torch.from_numpy(rng.standard_normal((5, 6)))
    unit = [(m / m.norm(dim=1, keepdim=True)).numpy() for m in (a, b)]
    cosines = unit[0] @ unit[1].T
    best = max(np.mean([cosines[i, j] for i, j in enumerate(order)]) for order in permutations(range(5), 4))
    found = decoder_stability(a, b)
    assert found.mean == pytest.approx(best)
    assert found.similarity == pytest.approx(cosines[found.a, found.b])


def test_an_opposite_direction_is_another_feature():
    a = torch.eye(3)
    assert decoder_stability(a, a[[2, 0, 1]] * 7).mean == pytest.approx(1)
    assert decoder_stability(a[:1], -a[:1]).mean == pytest.approx(-1)


def test_co_firing_against_sklearn_and_blind_to_batches():
    a, b = dense(0, 5), dense(1, 7)
    b[:, 6] = 0
    whole, parts = CoFiring.empty(5, 7), CoFiring.empty(5, 7)
    whole.update(from_dense(a), from_dense(b))
    for low, high in pairwise(EDGES):
        part = CoFiring.empty(5, 7)
        part.update(from_dense(a[low:high]), from_dense(b[low:high]))
        parts.merge(part)
    expected = [
        [jaccard_score(a[:, i] > 0, b[:, j] > 0, zero_division=0) for j in range(7)] for i in range(5)
    ]
    for counted in (whole, parts):
        assert counted.jaccard() == pytest.approx(np.array(expected))
    order = [3, 1, 4, 0, 2]
    same = CoFiring.empty(5, 5)
    same.update(from_dense(a), from_dense(a[:, order] * 9))
    found = same.stability()
    assert found.mean == 1
    assert [order[j] for j in found.b] == found.a.tolist()


def test_detection_against_sklearn_and_blind_to_batches():
    codes, truth = dense(2, 6), dense(3, 4, rate=0.5)
    codes[:, 5] = 0
    features, truths = torch.tensor([4, 0, 5, 2]), torch.tensor([1, 1, 3, 0])
    detections = []
    for edges in ([0, 80], EDGES):
        merged = Detection(features, truths)
        for low, high in pairwise(edges):
            part = Detection(features, truths)
            part.update(from_dense(codes[low:high]), from_dense(truth[low:high]), d_sae=6, n_truths=4)
            merged.merge(part)
        detections.append(merged)
    pairs = [
        (truth[:, t].numpy() > 0, codes[:, f].numpy() > 0) for f, t in zip(features, truths, strict=True)
    ]
    for found in detections:
        for values, oracle in (
            (found.precision, precision_score),
            (found.recall, recall_score),
            (found.f1, f1_score),
        ):
            assert values.tolist() == pytest.approx([oracle(t, f, zero_division=0) for t, f in pairs])
