"""CreditTransformer: a small causal Transformer over monthly account rows, as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel


class CreditTransformerConfig(PretrainedConfig):  # type: ignore[misc]
    """Shape of the model and how it reads its columns.

    Parameters
    ----------
    columns
        Names of the columns, in the order in which the model reads them.
    knots
        Per column, increasing values between which the piecewise linear code is linear (quantiles of the data
        that fitted the model); all columns have the same number of them.
    centre, spread
        Per column, mean and standard deviation of the signed logarithm of its values.
    """

    model_type = "credit_transformer"

    def __init__(  # noqa: PLR0913 - Hugging Face configurations are flat
        self,
        *,
        columns: Sequence[str] = (),
        knots: Sequence[Sequence[float]] = (),
        centre: Sequence[float] = (),
        spread: Sequence[float] = (),
        d_model: int = 128,
        n_layers: int = 4,
        n_heads: int = 4,
        d_ff: int = 512,
        dropout: float = 0.1,
        max_positions: int = 512,
        max_gap: int = 24,
        **kwargs: Any,  # Hugging Face stores keys of its own here
    ) -> None:
        self.columns = list(columns)
        self.knots = [list(k) for k in knots]
        self.centre = list(centre)
        self.spread = list(spread)
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.d_ff = d_ff
        self.dropout = dropout
        self.max_positions = max_positions
        self.max_gap = max_gap
        super().__init__(**kwargs)


class CreditOutput(NamedTuple):
    """What the model says at every position."""

    default_logit: Float[Tensor, "batch time"]
    """Log-odds of the outcome given the rows up to and including this one."""
    next_columns: Float[Tensor, "batch time columns"]
    """Forecast of the next row's columns, in standardised signed-log units."""


def signed_log(values: Tensor) -> Tensor:
    """Return sign(v) log(1 + |v|): amounts over many magnitudes, negative ones included."""
    return values.sign() * values.abs().log1p()


class ColumnEmbedding(nn.Module):
    """Embed numeric columns and their missingness, summed over columns.

    Each value becomes its piecewise linear code over the column's knots, its standardised signed logarithm and a
    flag for missing; one linear map over all of them is a sum of per-column embeddings.

    Reference: Gorishniy et al., arXiv 2203.05556, section 3.2 (piecewise linear encoding).
    """

    knots: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, config: CreditTransformerConfig) -> None:
        super().__init__()
        n_columns, n_knots = len(config.columns), len(config.knots[0]) if config.knots else 2
        self.register_buffer("knots", _table(config.knots, (n_columns, n_knots)))
        self.register_buffer("centre", _table(config.centre, (n_columns,)))
        self.register_buffer("spread", _table(config.spread, (n_columns,)))
        self.project = nn.Linear(n_columns * (n_knots - 1 + 2), config.d_model)

    def forward(self, values: Float[Tensor, "batch time columns"]) -> Float[Tensor, "batch time d_model"]:
        """Embed rows; NaN marks a missing value."""
        missing = values.isnan()
        known = values.nan_to_num(0.0)
        low, high = self.knots[:, :-1], self.knots[:, 1:]
        code = ((known.unsqueeze(-1) - low) / (high - low)).clamp(0.0, 1.0)
        level = ((signed_log(known) - self.centre) / self.spread).clamp(-8.0, 8.0)
        # a missing value has no code and no level, only its flag
        code = code.masked_fill(missing.unsqueeze(-1), 0.0)
        level = level.masked_fill(missing, 0.0)
        parts = [rearrange(code, "b t c k -> b t (c k)"), level, missing.to(code.dtype)]
        embedded: Tensor = self.project(torch.cat(parts, dim=-1))
        return embedded


class Block(nn.Module):
    """One pre-norm block: causal self-attention, then a GELU network, each added to the stream."""

    def __init__(self, config: CreditTransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.norm_attention = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm_mlp = nn.LayerNorm(d)
        self.up = nn.Linear(d, config.d_ff)
        self.down = nn.Linear(config.d_ff, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """Add what attention and the network write; padding on the right is never attended to from the left."""
        qkv = rearrange(self.qkv(self.norm_attention(x)), "b t (n h d) -> n b h t d", n=3, h=self.n_heads)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.dropout(self.out(rearrange(mixed, "b h t d -> b t (h d)")))
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm_mlp(x)))))
        return out


class CreditTransformer(PreTrainedModel):  # type: ignore[misc]
    """A causal, pre-norm Transformer with one token per row of an account's history.

    h_0 = columns + position + gap; h_l = Block_l(h_{l-1}); default_t = w . norm(h_L)_t. Position t sees rows 0..t
    only. Histories of one batch are padded on the right.
    """

    config_class = CreditTransformerConfig
    base_model_prefix = "credit"
    main_input_name = "values"

    def __init__(self, config: CreditTransformerConfig) -> None:
        super().__init__(config)
        self.columns = ColumnEmbedding(config)
        self.position = nn.Embedding(config.max_positions, config.d_model)
        self.gap = nn.Embedding(config.max_gap + 1, config.d_model)
        self.embedding = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.default_head = nn.Linear(config.d_model, 1)
        self.next_head = nn.Linear(config.d_model, len(config.columns))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.d_model**-0.5
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ColumnEmbedding):
            # Hugging Face builds the model without storage and calls this for what a checkpoint does not hold
            for name in ("knots", "centre", "spread"):
                table = getattr(module, name)
                with torch.no_grad():
                    table.copy_(_table(getattr(self.config, name), tuple(table.shape)))

    def forward(
        self, values: Float[Tensor, "batch time columns"], gap: Int[Tensor, "batch time"]
    ) -> CreditOutput:
        """Read histories padded on the right.

        Parameters
        ----------
        values
            Columns in the order of `config.columns`; NaN = missing (padding may hold anything).
        gap
            Periods without a row before this one; 0 for consecutive rows and for the first.
        """
        steps = torch.arange(values.shape[1], device=values.device).clamp(max=self.config.max_positions - 1)
        x = self.columns(values) + self.position(steps) + self.gap(gap.clamp(0, self.config.max_gap))
        return self.resume(0, self.embedding(x))

    def resume(self, layer: int, x: Float[Tensor, "batch time d_model"]) -> CreditOutput:
        """Run the layers from `layer` on over a given stream: what an intervention behind layer - 1 needs."""
        for block in self.layers[layer:]:
            x = block(x)
        x = self.norm(x)
        return CreditOutput(self.default_head(x).squeeze(-1), self.next_head(x))

    def resume_after(self, hook: str) -> int | None:
        """Return the layer to resume from for a stream read at `hook`, or None where that is not possible."""
        if hook == "embedding":
            return 0
        name, _, index = hook.partition(".")
        if name == "layers" and index.isdigit() and int(index) < len(self.layers):
            return int(index) + 1
        return None


def _table(values: Any, shape: tuple[int, ...]) -> Tensor:
    """Return configuration numbers as a tensor; an empty configuration gives ramps that only hold the shape."""
    table = torch.tensor(values, dtype=torch.float32)
    return (
        table if table.shape == shape else torch.arange(shape[-1], dtype=torch.float32).expand(shape).clone()
    )
