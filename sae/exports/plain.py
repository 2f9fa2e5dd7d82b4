"""Dictionaries whose encoder is one product and one rule: what all libraries can say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAE, SAEConfig
from sae.config import parse_config
from sae.errors import CheckpointError

Rule = Literal["relu", "topk", "threshold", "gated"]


def rule_of(sae: SAE) -> Rule | None:
    """Return how a dictionary selects at inference; None where its encoder is more than one product.

    It is told by what the dictionary is made of, so that a new kind that infers like an old one exports like it.
    """
    if sae.config.kind == "gated":
        return "gated"
    if type(sae).encode is not SAE.encode or type(sae)._encode is not SAE._encode:
        return None
    names = dict(sae.named_buffers()) | dict(sae.named_parameters())
    if "threshold" in names:
        return "threshold"
    if sae.config.kind == "relu":
        return "relu"
    return "topk"


def k_of(sae: SAE) -> int:
    """Return how many features a row has at most: other libraries take the k largest, of which there must be k."""
    return min(sae.config.k, sae.d_sae)


def refusal(sae: SAE, format_: str, *, knows: str, do: str) -> CheckpointError:
    """Return the error of a dictionary that a format cannot express."""
    return CheckpointError(
        f"{format_} cannot express this dictionary", got=f"kind {sae.config.kind}", expected=knows, do=do
    )


def thresholds(sae: SAE) -> Float[Tensor, "d_sae"]:
    """Return one threshold per feature, for dictionaries of rule `threshold`."""
    threshold: Tensor = sae.get_parameter("threshold") if _is_parameter(sae) else sae.get_buffer("threshold")
    return threshold.detach().expand(sae.d_sae).clone()


def uncentred_bias(
    b_enc: Float[Tensor, "d_sae"], W_enc: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, "d_in"]
) -> Float[Tensor, "d_sae"]:
    """Return b with x W_encᵀ + b = (x - b_dec) W_encᵀ + b_enc."""
    return (b_enc.double() - W_enc.double() @ b_dec.double()).to(b_enc.dtype)


def centred_bias(
    b: Float[Tensor, "d_sae"], W_enc: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, "d_in"]
) -> Float[Tensor, "d_sae"]:
    """Return b_enc with (x - b_dec) W_encᵀ + b_enc = x W_encᵀ + b."""
    return uncentred_bias(b, W_enc, -b_dec)


def with_unit_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what reconstructs the same with unit rows of W_dec; a feature that writes nothing never fires."""
    norms = torch.linalg.vector_norm(state["W_dec"], dim=1)
    return {
        **state,
        "W_enc": state["W_enc"] * norms[:, None],
        "b_enc": state["b_enc"] * norms,
        "W_dec": state["W_dec"] / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None],
    }


def build(kind: str, state: Mapping[str, Tensor], *, k: object, where: Path) -> SAE:
    """Return a dictionary of one of our kinds with the given state, which reads raw activations.

    Parameters
    ----------
    kind
        The kind.
    state
        Every parameter and buffer that inference reads, both matrices with one row per feature; see `require`.
    k
        Active features per row, as the library says it; for kinds that do not choose by number, what is known of it.
    where
        The file that the state is from, for messages.

    Raises
    ------
    CheckpointError
        k is no positive number.
    """
    if not isinstance(k, int) or k < 1:
        raise CheckpointError(f"{where.parent} is damaged", got=f"k {k!r}", expected="a positive number")
    d_sae, d_in = state["W_dec"].shape
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": d_sae, "k": min(k, d_sae)}, where=str(where))
    sae = config.build(d_in, generator=torch.Generator())
    # what only training reads keeps its initial value
    whole = sae.state_dict() | {name: value.contiguous() for name, value in state.items()}
    sae.load_state_dict(whole, assign=True)
    sae.folded = True
    return sae


def _is_parameter(sae: SAE) -> bool:
    return "threshold" in dict(sae.named_parameters())
