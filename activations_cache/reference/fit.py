"""Fitting the reference model: a plain loop with early stopping, resumable after every epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from activations_cache.batching import batches_by_length
from activations_cache.panel import Panel
from sae.errors import ConfigError, PanelError

from .columns import model_config
from .credit_transformer import CreditTransformer, signed_log
from .histories import Histories, collate
from .predict import predict
from .scores import discrimination
from .shape import FitConfig, ModelShape


class FitProgress(NamedTuple):
    """What the caller is told while the model is fitted."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    text: str


Report = Callable[[FitProgress], None]


def fit(
    panel: Panel,
    shape: ModelShape,
    config: FitConfig,
    *,
    seed: int,
    device: torch.device,
    work: Path,
    report: Report = lambda _: None,
) -> tuple[CreditTransformer, list[dict[str, float]]]:
    """Train a CreditTransformer on the fit entities and return it with the epochs' history.

    The loss is the outcome's log loss at every position, each entity weighing 1 in all (each row where the outcome
    is per row), plus `next_weight` times the squared error of the next row's standardised columns. The weights kept
    are those of the best epoch on the early-stopping entities.

    Parameters
    ----------
    work
        Folder of the state after each epoch; a second call with the same folder continues there and ends with the
        same weights as an undisturbed one.

    Raises
    ------
    PanelError
        No early-stopping entity, or an outcome with one value only.
    ConfigError
        A loss that is not finite; the epoch is not kept.
    """
    codes = panel.entities_of("fit")
    end = panel.history_end()
    codes = codes[end[codes] > panel.offsets[codes]]
    train, held = codes[~panel.inner[codes]], codes[panel.inner[codes]]
    if not len(train) or not len(held):
        raise PanelError(
            "too few fit entities to train and to stop early", got=f"{len(train)} and {len(held)}"
        )
    rows = np.zeros(len(panel.time), dtype=bool)
    for code in train:
        rows[panel.offsets[code] : end[code]] = True
    _check_outcome(panel, rows)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        dims = shape.model_dump(exclude={"kind", "n_knots"})
        model = CreditTransformer(model_config(panel, rows, n_knots=shape.n_knots, shape=dims)).to(device)
        trainer = _Trainer(panel, model, config, seed, device, end)
        trainer.restore(work)
        while trainer.epoch < config.epochs and trainer.stale < config.patience:
            torch.manual_seed(seed * 100_003 + trainer.epoch)
            trainer.run_epoch(train, held, report)
            trainer.save(work)
    model.load_state_dict(trainer.best)
    return model.eval(), trainer.history


class _Trainer:
    """State of the loop: model, optimiser, the best weights and what has been seen."""

    def __init__(
        self,
        panel: Panel,
        model: CreditTransformer,
        config: FitConfig,
        seed: int,
        device: torch.device,
        end: np.ndarray,
    ) -> None:
        self.panel, self.model, self.config, self.seed, self.device, self.end = (
            panel,
            model,
            config,
            seed,
            device,
            end,
        )
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.epoch, self.stale = 0, 0
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
        self.history: list[dict[str, float]] = []

    def run_epoch(self, train: np.ndarray, held: np.ndarray, report: Report) -> None:
        batches = list(_shuffled(self.panel, train, self.config.batch_rows, self.seed, self.epoch))
        total = len(batches) * self.config.epochs
        self.model.train()
        seen = 0.0
        for i, batch in enumerate(batches):
            step = self.epoch * len(batches) + i
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * _schedule(step, total)
            loss = self._loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            seen += float(loss.detach())
            report(
                FitProgress(self.epoch, self.config.epochs, i + 1, len(batches), f"loss {seen / (i + 1):.4f}")
            )
        self._judge(held, seen / len(batches))

    def _judge(self, held: np.ndarray, train_loss: float) -> None:
        self.model.eval()
        with torch.inference_mode():
            parts = [(float(self._loss(b)), len(b)) for b in batches_by_length(self.panel, held, 16384)]
        loss = sum(value * n for value, n in parts) / sum(n for _, n in parts)
        if not math.isfinite(train_loss) or not math.isfinite(loss):
            raise ConfigError(
                "fitting the model diverged",
                got=f"loss {train_loss:g} in epoch {self.epoch + 1}, {loss:g} on the early-stopping entities",
                do="lower fit.lr",
            )
        entry = {"epoch": self.epoch, "loss_fit": train_loss, "loss_early_stop": loss}
        if self.panel.outcome is not None:
            logits, truth, _ = predict(self.model, self.panel, held)
            known = np.isfinite(truth)
            if len(np.unique(truth[known])) == 2:
                scores = discrimination(truth[known], 1 / (1 + np.exp(-logits[known])))
                entry["auc_early_stop"] = scores.auc
        self.history.append(entry)
        self.epoch += 1
        self.stale += 1
        if loss < self.best_loss:
            self.best_loss, self.stale = loss, 0
            self.best = {k: v.clone() for k, v in self.model.state_dict().items()}

    def _loss(self, batch: np.ndarray) -> Tensor:
        histories = collate(self.panel, batch, stop=self.end).to(self.device)
        out = self.model(histories.values, histories.gap)
        loss = self.config.next_weight * _next_loss(self.model, histories, out.next_columns)
        if self.panel.outcome is None:
            return loss
        truth = torch.from_numpy(self.panel.outcome[histories.rows.cpu().numpy()]).float().to(self.device)
        weight = (histories.real & ~truth.isnan()).float()
        if self.panel.outcome_per == "entity":
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        errors = F.binary_cross_entropy_with_logits(
            out.default_logit, truth.nan_to_num(0.0), reduction="none"
        )
        return loss + (errors * weight).sum() / weight.sum().clamp(min=1e-9)

    def save(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        part = work / "epoch.safetensors.part"
        record = {
            "epoch": self.epoch,
            "stale": self.stale,
            "best_loss": self.best_loss,
            "history": self.history,
        }
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            part,
            {"record": json.dumps(record)},
        )
        part.replace(work / "epoch.safetensors")

    def restore(self, work: Path) -> None:
        path = work / "epoch.safetensors"
        if not path.is_file():
            return
        tensors = load_file(path, device=str(self.device))
        record = _metadata(path)
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.best = {k[5:]: v for k, v in tensors.items() if k.startswith("best.")}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                # Adam keeps its step counts on the CPU unless capturable
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.epoch, self.stale = record["epoch"], record["stale"]
        self.best_loss, self.history = record["best_loss"], record["history"]


def _next_loss(model: CreditTransformer, histories: Histories, forecast: Tensor) -> Tensor:
    """Mean squared error of the forecast of the next row's standardised signed-log columns, where known."""
    if histories.values.shape[1] < 2:
        return forecast.sum() * 0.0
    target = histories.values[:, 1:]
    known = histories.real[:, 1:, None] & ~target.isnan()
    level = (signed_log(target.nan_to_num(0.0)) - model.columns.centre) / model.columns.spread
    errors = (forecast[:, :-1] - level.clamp(-8.0, 8.0)).square()
    return (errors * known).sum() / known.sum().clamp(min=1)


def _shuffled(
    panel: Panel, entities: np.ndarray, batch_rows: int, seed: int, epoch: int
) -> Iterator[np.ndarray]:
    """Yield the epoch's batches: entities in random order, like lengths together within a stretch, batches shuffled."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = rng.permutation(entities)
    mean_length = max(1.0, len(panel.time) / panel.n_entities)
    stretch = max(1, int(16 * batch_rows / mean_length))
    batches = [
        batch
        for start in range(0, len(order), stretch)
        for batch in batches_by_length(panel, order[start : start + stretch], batch_rows)
    ]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def _schedule(step: int, total: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    warmup = max(1, total // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _check_outcome(panel: Panel, rows: np.ndarray) -> None:
    if panel.outcome is None:
        return
    values = panel.outcome[rows]
    if len(np.unique(values[np.isfinite(values)])) < 2:
        raise PanelError(
            "the outcome has only one value on the entities that fit the model", do="check panel.outcome"
        )


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    return record
