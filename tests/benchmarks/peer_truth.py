"""sae-lens's synthetic data, dictionaries and scores, in its own environment: a worker that `truth.py` calls.

    peers/bin/python tests/benchmarks/peer_truth.py make DIR --seed 0 --rows 2000000
    peers/bin/python tests/benchmarks/peer_truth.py train DIR --kind topk --k 12 --d-sae 512 --lr 3e-4 --out SAE
    peers/bin/python tests/benchmarks/peer_truth.py score DIR --sae SAE

It imports nothing of this project, so that an environment which holds only the peers can run it. A folder of data
holds rows.npy (training, float32), held.npy, held_fires.npz (packed bits of which direction fires on a held row) and
directions.npy. What is scored is a folder of sae-lens, or an npz with a decoder and the codes of the held rows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

HELD = 50_000


def make(folder: Path, seed: int, rows: int) -> None:
    """SynthSAEBench at an eighth of its width: Zipf rates, low-rank correlations, trees of exclusive children."""
    from sae_lens.synthetic import HierarchyConfig, ZipfianFiringProbabilityConfig
    from sae_lens.synthetic.synthetic_model import (
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
    )

    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=2048,
            hidden_dim=128,
            firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
            hierarchy=HierarchyConfig(
                total_root_nodes=16,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
            ),
            orthogonalization=OrthogonalizationConfig(),
            correlation=LowRankCorrelationConfig(rank=4, correlation_scale=0.1),
            std_firing_magnitudes=0.5,
            mean_firing_magnitudes=4.5,
            bias=10.0,
            seed=seed,
        )
    )
    torch.manual_seed(1000 + seed)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "directions.npy", model.feature_dict.feature_vectors.detach().numpy())
    out = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (rows, 128))
    for start in range(0, rows, 10_000):
        out[start : start + 10_000] = model.sample(min(10_000, rows - start)).numpy()
    held = [model.sample_with_features(5_000) for _ in range(HELD // 5_000)]
    np.save(folder / "held.npy", torch.cat([x for x, _ in held]).numpy())
    fires = torch.cat([acts > 0 for _, acts in held]).numpy()
    np.savez(folder / "held_fires.npz", bits=np.packbits(fires, axis=1), width=fires.shape[1])
    print(json.dumps({"l0_of_the_truth": float(fires.sum(1).mean())}))


def train(folder: Path, kind: str, k: int, d_sae: int, lr: float, batch: int, out: Path) -> None:
    """Train as sae-lens trains, on rows scaled to a mean norm of sqrt(d_in), and save for inference."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    d_in, total = rows.shape[1], len(rows)
    shape = {"d_in": d_in, "d_sae": d_sae, "device": "cpu", "dtype": "float32"}
    name, more = {
        "topk": ("TopK", {"k": k}),
        "batch_topk": ("BatchTopK", {"k": float(k)}),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            {"k": float(k), "matryoshka_widths": [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]},
        ),
        "jumprelu": (
            "JumpReLU",
            {
                "jumprelu_sparsity_loss_mode": "quadratic",
                "target_l0": float(k),
                "l0_warm_up_steps": total // batch // 10,
            },
        ),
    }[kind]
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(**shape, **more)
    )
    scale = _scale(folder)

    def batches() -> Iterator[torch.Tensor]:
        start = 0
        while True:
            stop = start + batch
            if stop > total:
                start, stop = 0, batch
            yield torch.from_numpy(rows[start:stop] * scale)
            start = stop

    steps = total // batch
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * batch,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=min(1000, steps // 10),
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=steps // 3,
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches(), save_checkpoint_fn=lambda _: None)
    began = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - began
    sae.save_inference_model(out)
    print(json.dumps({"seconds": round(seconds, 1), "batch": batch, "lr": lr}))


class Given:
    """A dictionary of which only the decoder and the codes of the held rows are known."""

    def __init__(self, saved: Path) -> None:
        known = {name: torch.from_numpy(value) for name, value in np.load(saved).items()}
        self.W_dec, self.b_dec = known["W_dec"], known["b_dec"]
        shape = (len(known["offsets"]) - 1, len(self.W_dec))
        self._codes = torch.sparse_csr_tensor(known["offsets"], known["features"], known["values"], shape)
        self._codes = self._codes.to_dense()
        self._served = 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of the next rows."""
        self._served += len(x)
        return self._codes[self._served - len(x) : self._served]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return Z W_dec + b_dec."""
        return codes @ self.W_dec + self.b_dec


def score(folder: Path, saved: Path, *, scaled: bool) -> None:
    """Score a saved dictionary as sae-lens scores its own."""
    from sae_lens import SAE
    from sae_lens.synthetic.evals import (
        ClassificationMetricsCalculator,
        feature_uniqueness,
        mean_correlation_coefficient,
    )

    sae = Given(saved) if saved.suffix == ".npz" else SAE.load_from_disk(str(saved), device="cpu")
    truth = torch.from_numpy(np.load(folder / "directions.npy"))
    held = np.load(folder / "held.npy")
    x = torch.from_numpy(held * (_scale(folder) if scaled else 1))
    packed = np.load(folder / "held_fires.npz")
    fires = np.unpackbits(packed["bits"], axis=1, count=int(packed["width"]))
    W_dec = sae.W_dec.detach()
    metrics = ClassificationMetricsCalculator(W_dec, truth)
    fired, active, error = torch.zeros(len(W_dec), dtype=torch.bool), 0, 0.0
    with torch.no_grad():
        for start in range(0, len(x), 5_000):
            rows = x[start : start + 5_000]
            codes = sae.encode(rows)
            codes = codes.to_dense() if codes.is_sparse else codes
            metrics.add_batch(codes, torch.from_numpy(fires[start : start + 5_000]).float())
            fired |= (codes != 0).any(0)
            active += int((codes != 0).sum())
            error += float((rows - sae.decode(codes)).square().sum())
    found = metrics.compute()
    result = {
        "mcc": mean_correlation_coefficient(W_dec, truth),
        "f1": found.f1_score,
        "precision": found.precision,
        "recall": found.recall,
        "unique": feature_uniqueness(W_dec, truth),
        "fvu": error / float((x - x.mean(0)).square().sum()),
        "l0": active / len(x),
        "dead": 1 - float(fired.float().mean()),
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def _scale(folder: Path) -> float:
    rows = np.load(folder / "held.npy")
    return float(rows.shape[1] ** 0.5 / np.linalg.norm(rows, axis=1).mean())


def main() -> None:
    """Do what the command line asks for; the last line printed is JSON."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", "train", "score"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sae", type=Path)
    parser.add_argument("--scaled", action="store_true", help="the dictionary reads scaled rows")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.seed, given.rows)
    elif given.what == "train":
        torch.manual_seed(given.seed)
        train(given.folder, given.kind, given.k, given.d_sae, given.lr, given.batch, given.out)
    else:
        score(given.folder, given.sae, scaled=given.scaled)


if __name__ == "__main__":
    main()
