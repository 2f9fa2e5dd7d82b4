"""Whether labels name the right concept on activations whose directions are known.

    python -m tests.benchmarks.oracle RUN

RUN is a finished run of configs/oracle.yaml. Prints the share of labels that name the concept of the direction nearest in
cosine to the feature's decoder row, and the share of concepts that some label names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from label.tables import read_table
from sae.checkpoint import load_sae


class Score(NamedTuple):
    n_labels: int
    right: float
    """Share of labels that name the concept of the nearest direction."""
    named: float
    """Share of concepts that a label names."""


def score(run: Path) -> Score:
    directions = load_file(run / "truth" / "directions.safetensors")["directions"]
    sae = load_sae(next((run / "sae").iterdir()))
    nearest = (sae.W_dec.detach().numpy() @ directions.T).argmax(1)
    rows = [r for r in read_table(run / "labels", "features").to_pylist() if r["status"] == "labelled"]
    right = [r["concept"] == f"direction_{nearest[r['feature']]:03d}" for r in rows]
    named = {r["concept"] for r in rows}
    return Score(len(rows), float(np.mean(right)) if right else 0.0, len(named) / len(directions))


if __name__ == "__main__":
    found = score(Path(sys.argv[1]))
    print(f"{found.n_labels} labels; {found.right:.3f} name the nearest direction's concept;")
    print(f"{found.named:.3f} of concepts are named")
