"""Dictionaries of this project and of sae-lens on data whose directions are known, scored by sae-lens's own code.

    python -m tests.benchmarks.truth PEERS [--data planted synth] [--seeds 0 1 2] [--kinds topk batch_topk]

PEERS is an environment with sae-lens. `planted`: 128 dimensions, 768 directions that fire independently, L0 10.
`synth`: sae-lens's SynthSAEBench generator at an eighth of its width (2,048 directions, of which a dictionary of 512
can hold a quarter). This project trains by its command with nothing but kind, width, k and what `--set` says given;
sae-lens trains each kind at three learning rates, on the same rows. Seconds are those of training alone and mean
something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.checkpoint import load_sae

from .recovery import Planted

ROOT = Path(__file__).resolve().parents[2]
ROWS, HELD = 2_000_000, 50_000
SHAPES = {"planted": {"d_sae": 768, "k": 12}, "synth": {"d_sae": 512, "k": 12}}
RATES = (3e-4, 1e-3, 3e-3)
BATCH = 1024
THEIRS = ("topk", "batch_topk", "matryoshka", "jumprelu")


def make_planted(folder: Path, seed: int) -> None:
    """Write rows, held-out rows, what fires on them, and the directions."""
    data = Planted("uniform", seed)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "directions.npy", data.directions.numpy())
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (ROWS, data.directions.shape[1]))
    for start in range(0, ROWS, 50_000):
        rows[start : start + 50_000] = data.raw(50_000).numpy()
    parts = [data.raw_with_fires(10_000) for _ in range(HELD // 10_000)]
    np.save(folder / "held.npy", np.concatenate([x.numpy() for x, _ in parts]))
    fires = np.concatenate([fires.numpy() for _, fires in parts])
    np.savez(folder / "held_fires.npz", bits=np.packbits(fires, axis=1), width=fires.shape[1])


def ask(*command: str | Path) -> dict[str, Any]:
    """Run a command of this repository quietly and return the JSON of its last line."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, json.JSONDecodeError):
        return {}


def ours(folder: Path, kind: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Harvest and train by the command, and return the seconds of training and where the codes are."""
    out = folder / "-".join(["assay", kind, str(seed), *settings])
    settings = [
        f"source.path={folder / 'rows.npy'}",
        f"out={out}",
        f"sae.kind={kind}",
        f"seed={seed}",
        *settings,
    ]
    assay = [sys.executable, "-c", "import sys; from assay.cli import main; sys.exit(main())"]
    ask(*assay, "run", "configs/tensors.yaml", *settings)
    (path,) = out.glob("sae/*/metrics.jsonl")
    metrics = [json.loads(line) for line in path.read_text().splitlines()]
    encode_held(path.parent, folder / "held.npy", out / "held_codes.npz")
    return {"sae": out / "held_codes.npz", "seconds": round(metrics[-1].get("seconds", float("nan")), 1)}


@torch.inference_mode()
def encode_held(saved: Path, held: Path, out: Path) -> None:
    """Write a dictionary's decoder and its codes of the held rows: not every kind is one that sae-lens can express."""
    sae = load_sae(saved)
    codes = sae.encode(torch.from_numpy(np.load(held)))
    np.savez(out, **codes._asdict(), W_dec=sae.W_dec, b_dec=sae.b_dec)


def main() -> None:
    """Run what the command line asks for; one JSON line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path, help="an environment with sae-lens")
    parser.add_argument("--data", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=[*THEIRS, "lista", "hierarchical_topk"])
    parser.add_argument(
        "--rates", nargs="*", type=float, default=RATES, help="of sae-lens; none leaves it out"
    )
    parser.add_argument("--batch", type=int, help="of both, in place of auto and sae-lens's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of this project's runs")
    parser.add_argument("--work", type=Path, default=Path("runs/truth"))
    given = parser.parse_args()
    worker = (given.peers / "bin" / "python", ROOT / "tests" / "benchmarks" / "peer_truth.py")
    batch = [] if given.batch is None else [f"train.batch_size={given.batch}"]
    for data in given.data:
        shape = SHAPES[data]
        for seed in given.seeds:
            folder = (given.work / f"{data}-{seed}").resolve()
            if not (folder / "held_fires.npz").exists():
                if data == "planted":
                    make_planted(folder, seed)
                else:
                    ask(*worker, "make", folder, "--seed", str(seed), "--rows", str(ROWS))
            for kind in given.kinds:
                told = {"data": data, "seed": seed, "kind": kind}
                settings = [*(f"sae.{name}={value}" for name, value in shape.items()), *batch, *given.set]
                found = ours(folder, kind, seed, settings)
                score = ask(*worker, "score", folder, "--sae", found["sae"])
                print(json.dumps({**told, "who": "assay", "seconds": found["seconds"], **score}), flush=True)
                for lr in given.rates if kind in THEIRS else ():
                    out = folder / f"sae-lens-{kind}-{seed}-{lr:g}"
                    sizes = ("--k", str(shape["k"]), "--d-sae", str(shape["d_sae"]))
                    how = ("--kind", kind, "--lr", str(lr), "--batch", str(given.batch or BATCH))
                    spent = ask(*worker, "train", folder, *sizes, *how, "--seed", str(seed), "--out", out)
                    score = ask(*worker, "score", folder, "--sae", out, "--scaled")
                    print(json.dumps({**told, "who": "sae-lens", **spent, **score}), flush=True)


if __name__ == "__main__":
    main()
