"""Every kind of dictionary and every baseline on the activations of one run, at the same numbers of active features.

    python -m tests.benchmarks.architectures RUN [--rows N] [--d-sae N] [--k 8,16,32] [--kinds topk,...] [--out FILE.json]

RUN holds `activations.zarr` and `concepts/`, as `assay run configs/uci_default.yaml` leaves them. Each kind is trained with
every setting derived but the rows. FVU, L0 and dead are on confirm. Concept F1 is the mean over yes-or-no concepts of the
best feature's F1 on confirm, feature and threshold chosen on discover. The probe is a logistic regression on all
dimensions, fitted and given its threshold on discover; its share is the mean over concepts of feature F1 over probe F1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from activations_cache.store import ActivationStore
from label.alignment import code_table
from label.concepts.library import ConceptInfo
from label.discover import against_target
from label.evidence import Evidence, Rows, gather, rows_of
from label.statistics.counts import Levels, count
from label.targets import Coded, Target
from sae.base import InferenceOnly, SAEConfig
from sae.baselines import BASELINES, fit_baseline
from sae.checkpoint import load_sae
from sae.config import parse_config
from sae.dictionary import Dictionary
from sae.errors import UserError
from sae.world import World
from train.evaluate import SAMPLE_ROWS, evaluate_dictionary
from train.plan import TrainConfig
from train.run import train_sae

SPLITS = ("discover", "confirm")
MOST_PREVALENT = 0.95


class Bench(NamedTuple):
    """Activations and the truth of every yes-or-no concept on their rows."""

    store: ActivationStore
    hook: str
    rows: dict[str, Rows]
    x: dict[str, np.ndarray]
    concepts: list[Coded]


class Line(NamedTuple):
    """One dictionary's figures; `seconds` is its training, on a machine that may be busy."""

    name: str
    k: int
    d_sae: int
    fvu: float
    l0: float
    dead: float
    f1: float
    share: float
    seconds: float


def read(run: Path) -> Bench:
    store = ActivationStore.open(run / "activations.zarr")
    hook = next(iter(store.hooks))
    rows, x = {}, {}
    for split in SPLITS:
        parts = list(store.rows(hook, split))
        columns = (np.concatenate([getattr(p, c) for p in parts]) for c in ("entity", "time", "position"))
        rows[split], place = rows_of(split, *columns)
        x[split] = np.empty((len(place), store.hooks[hook]), np.float32)
        x[split][place] = np.concatenate([p.acts for p in parts])
    concepts: list[Coded] = []
    for table in json.loads((run / "concepts" / "concepts.json").read_text())["tables"]:
        infos = [ConceptInfo.model_validate(c) for c in table["concepts"]]
        concepts += code_table(run / "concepts" / table["file"], infos, rows)[0]
    return Bench(store, hook, rows, x, [c for c in concepts if c.edges is None and usable(c)])


def usable(concept: Coded) -> bool:
    """Holds somewhere, not everywhere, in both splits."""
    rates = [(c == 1).sum() / max((c >= 0).sum(), 1) for c in concept.codes.values()]
    return all(0 < rate <= MOST_PREVALENT for rate in rates)


def f1(fires: np.ndarray, holds: np.ndarray) -> float:
    return float(2 * (fires & holds).sum() / max(fires.sum() + holds.sum(), 1))


def probe_f1(bench: Bench, concept: Coded) -> float:
    known = {s: concept.codes[s] >= 0 for s in SPLITS}
    holds = {s: concept.codes[s][known[s]] == 1 for s in SPLITS}
    scaler = StandardScaler().fit(bench.x["discover"])
    x = {s: scaler.transform(bench.x[s][known[s]]) for s in SPLITS}
    probe = LogisticRegression(max_iter=3000).fit(x["discover"], holds["discover"])
    scores = {s: probe.decision_function(x[s]) for s in SPLITS}
    thresholds = np.quantile(scores["discover"], np.linspace(0, 1, 513))
    best = max(thresholds, key=lambda t: f1(scores["discover"] > t, holds["discover"]))
    return f1(scores["confirm"] > best, holds["confirm"])


def feature_f1(evidence: dict[str, Evidence], levels: Levels, concept: Coded) -> float:
    target = Target(concept.id, 1, 1)
    fit = against_target(levels, count(levels, concept.codes["discover"], concept.n_bins), target)
    feature = int(fit.f1.argmax())
    row, value = evidence["confirm"].of(feature)
    fires = np.zeros(len(evidence["confirm"].rows), dtype=bool)
    fires[row[value > fit.threshold[feature]]] = True
    holds, applies = concept.truth("confirm", target)
    return f1(fires[applies], holds[applies])


def measure(bench: Bench, dictionary: Dictionary, probes: np.ndarray, **named) -> Line:
    report = evaluate_dictionary(bench.store, dictionary, bench.hook, "confirm")
    evidence = {s: gather(bench.store, dictionary, bench.hook, s) for s in SPLITS}
    levels = Levels.of(evidence["discover"])
    found = np.array([feature_f1(evidence, levels, c) for c in bench.concepts])
    share = float((found / np.maximum(probes, 1e-9)).mean())
    figures = {name: report[name] for name in ("fvu", "l0", "dead")}
    return Line(d_sae=dictionary.d_sae, **figures, f1=float(found.mean()), share=share, **named)


def trained(bench: Bench, kind: str, k: int, options: argparse.Namespace) -> tuple[Dictionary, float]:
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": options.d_sae, "k": k}, where=kind)
    settings = TrainConfig(rows=options.rows, checkpoint_every=1_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        out, work = Path(scratch) / "out", Path(scratch) / "work"
        began = time.monotonic()
        train_sae(
            bench.store.path,
            config,
            settings,
            out,
            hook=bench.hook,
            work=work,
            seed=0,
            world=World.single("cpu"),
        )
        return load_sae(out), time.monotonic() - began


def dictionaries(bench: Bench, options: argparse.Namespace):
    """Yield name, k and how to get each dictionary asked for."""
    for k in options.k:
        for kind in sorted(SAEConfig.kinds):
            readable = parse_config(SAEConfig, {"kind": kind, "d_sae": 8, "k": 2}, where=kind)
            if not isinstance(readable.build(4, generator=torch.Generator()), InferenceOnly):
                yield kind, k, lambda kind=kind, k=k: trained(bench, kind, k, options)
    sample = torch.from_numpy(next(iter(bench.store.rows(bench.hook, "fit", batch_rows=SAMPLE_ROWS))).acts)
    for k in options.k:
        for name in BASELINES:

            def fitted(name=name, k=k):
                began = time.monotonic()
                # signed components give two features each, so all have about d_sae of them
                baseline = fit_baseline(name, sample, options.d_sae // 2, k=k)
                return baseline, time.monotonic() - began

            yield name, k, fitted


def show(line: Line) -> None:
    print(
        f"{line.name:20} {line.k:>3} {line.d_sae:>6} {line.fvu:>8.4f} {line.l0:>6.1f} {line.dead:>6.1%} "
        f"{line.f1:>8.3f} {line.share:>7.3f} {line.seconds:>8.0f}",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=lambda text: [int(k) for k in text.split(",")], default=[8, 16, 32])
    parser.add_argument("--kinds", type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    bench = read(options.run)
    probes = np.array([probe_f1(bench, concept) for concept in bench.concepts])
    print(f"{len(bench.concepts)} yes-or-no concepts; a linear probe's mean F1 is {probes.mean():.3f}")
    print(
        f"{'':20} {'k':>3} {'d_sae':>6} {'FVU':>8} {'L0':>6} {'dead':>6} {'best F1':>8} {'share':>7} {'s':>8}"
    )
    lines = []
    for name, k, make in dictionaries(bench, options):
        if options.kinds and name not in options.kinds:
            continue
        try:
            dictionary, seconds = make()
        except UserError as error:
            print(f"{name:20} {k:>3} not trained: {str(error).splitlines()[0]}", flush=True)
            continue
        lines.append(measure(bench, dictionary, probes, name=name, k=k, seconds=seconds))
        show(lines[-1])
        if options.out:
            record = {"probe_f1": float(probes.mean()), "concepts": len(probes), "rows": options.rows}
            options.out.write_text(
                json.dumps(record | {"lines": [line._asdict() for line in lines]}, indent=1)
            )


if __name__ == "__main__":
    main(sys.argv[1:])
