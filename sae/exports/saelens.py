"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` opens.

Their matrices are W_enc [d_in, d_sae] and W_dec [d_sae, d_in]. BatchTopK and its kin become `jumprelu`, as SAELens
itself saves them for inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.base import SAE
from sae.errors import CheckpointError

from .format import Format, Origin, read_settings, read_tensors, require, write_settings, write_tensors
from .plain import build, centred_bias, k_of, refusal, rule_of, thresholds

SETTINGS, WEIGHTS = "cfg.json", "sae_weights.safetensors"

LEAST_VERSION = "6.0.0"
"""Names the layout of cfg.json: without it SAELens takes the file for one of an older layout."""

FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
ARCHITECTURES = {"relu": "standard", "topk": "topk", "threshold": "jumprelu", "gated": "gated"}


def write(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write the dictionary for SAELens.

    Raises
    ------
    CheckpointError
        Its encoder is more than one product.
    """
    rule = rule_of(sae)
    if rule is None:
        raise refusal(
            sae, "SAELens", knows="an encoder of one product", do="export it as native, or train another kind"
        )
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if rule == "gated":
        tensors |= {
            "b_gate": sae.b_enc,
            "b_mag": sae.get_parameter("b_mag"),
            "r_mag": sae.get_parameter("r_mag"),
        }
    else:
        tensors["b_enc"] = sae.b_enc
    if rule == "threshold":
        tensors["threshold"] = thresholds(sae)
    metadata = {
        "sae_lens_version": LEAST_VERSION,
        "model_name": origin.model or None,
        "hook_name": origin.hook or None,
        "context_size": origin.context,
    }
    settings: dict[str, Any] = {
        "architecture": ARCHITECTURES[rule],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if rule == "topk":
        settings |= {"k": k_of(sae), "rescale_acts_by_decoder_norm": False}
    write_tensors(folder / WEIGHTS, tensors)
    write_settings(folder / SETTINGS, settings)


def read(folder: Path) -> SAE:
    """Read a dictionary that SAELens saved for inference, of version 6 or before.

    Raises
    ------
    CheckpointError
        It is damaged, of an architecture that cannot be expressed here, or normalises each row.
    """
    settings = _modern(read_settings(folder / SETTINGS))
    architecture, path = settings["architecture"], folder / WEIGHTS
    _refuse_normalisation(settings, path)
    tensors = read_tensors(path)
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise CheckpointError(f"{path} rescales its codes", got="scaling_factor other than 1")
    readers = {"standard": _standard, "topk": _topk, "jumprelu": _jumprelu, "gated": _gated}
    if architecture not in readers:
        raise CheckpointError(
            f"{folder} is of an architecture that cannot be read",
            got=repr(architecture),
            expected=", ".join(readers),
            do="a training checkpoint: save it with save_inference_model; another architecture: none",
        )
    try:
        return readers[architecture](tensors, settings, path)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / SETTINGS} is damaged", got=repr(error)) from error


def _modern(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in the words of version 6."""
    settings = {"architecture": "standard", "apply_b_dec_to_input": True, **settings}
    activation = settings.get("activation_fn", settings.get("activation_fn_str", "relu"))
    if activation == "topk":
        settings |= {"architecture": "topk", **settings.get("activation_fn_kwargs", {})}
    return settings


def _refuse_normalisation(settings: Mapping[str, Any], path: Path) -> None:
    # the average norm is folded into the weights when SAELens saves, and ignored when it loads
    known = (None, False, True, "none", "expected_average_only_in")
    if settings.get("normalize_activations") not in known:
        raise CheckpointError(
            f"{path} normalises every row by itself, which no folded dictionary does",
            got=f"normalize_activations {settings['normalize_activations']}",
            expected="none",
            do="normalise the rows before harvesting, or train without",
        )


def _weights(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    W_enc, b_enc, W_dec, b_dec = require(tensors, FOUR, where=path)
    if not settings["apply_b_dec_to_input"]:
        b_enc = centred_bias(b_enc, W_enc.T, b_dec)
    return {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _standard(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    return build("relu", _weights(tensors, settings, path), k=1, where=path)


def _topk(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    state = _weights(tensors, settings, path)
    if settings.get("rescale_acts_by_decoder_norm", False):
        norms = torch.linalg.vector_norm(state["W_dec"], dim=1)
        state["W_enc"] = state["W_enc"] * norms[:, None]
        state["b_enc"] = state["b_enc"] * norms
        state["W_dec"] = state["W_dec"] / norms.clamp(min=1e-8)[:, None]
    return build("topk", state, k=int(settings["k"]), where=path)


def _jumprelu(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    threshold = tensors.pop("threshold")
    state = _weights(tensors, settings, path)
    return build("jumprelu", state | {"threshold": threshold.clamp(min=0)}, k=1, where=path)


def _gated(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    W_enc, W_dec, b_dec, b_gate, b_mag, r_mag = require(tensors, names, where=path)
    if not settings["apply_b_dec_to_input"]:
        b_gate = centred_bias(b_gate, W_enc.T, b_dec)
        b_mag = centred_bias(b_mag, W_enc.T * r_mag.exp()[:, None], b_dec)
    state = {
        "W_enc": W_enc.T,
        "W_dec": W_dec,
        "b_dec": b_dec,
        "b_enc": b_gate,
        "b_mag": b_mag,
        "r_mag": r_mag,
    }
    return build("gated", state, k=1, where=path)


FORMAT = Format("saelens", (SETTINGS, WEIGHTS), write, read)
