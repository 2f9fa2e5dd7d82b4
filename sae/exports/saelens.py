"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` opens.

Their matrices are W_enc [d_in, d_sae] and W_dec [d_sae, d_in]. BatchTopK and its kin become `jumprelu`, as SAELens
itself saves them for inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.base import SAE
from sae.errors import CheckpointError

from .format import Format, Origin, read_settings, read_tensors, require, write_settings, write_tensors
from .plain import build, centred_bias, k_of, refusal, rule_of, thresholds, with_unit_rows

SETTINGS, WEIGHTS = "cfg.json", "sae_weights.safetensors"

LEAST_VERSION = "6.0.0"
"""Names the layout of cfg.json: without it SAELens takes the file for one of an older layout."""

FOUR = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
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
        It is damaged, of an architecture that cannot be expressed here, or reads rescaled or normalised rows.
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
    return readers[architecture](tensors, settings, path)


def _modern(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in the words of version 6."""
    settings = {"architecture": "standard", "apply_b_dec_to_input": True, **settings}
    activation = settings.get("activation_fn", settings.get("activation_fn_str", "relu"))
    if activation == "topk":
        settings |= {"architecture": "topk", **settings.get("activation_fn_kwargs", {})}
    return settings


def _refuse_normalisation(settings: Mapping[str, Any], path: Path) -> None:
    normalises = settings.get("normalize_activations")
    # SAELens folds the average norm into the weights at the end of training, and then says none
    if normalises in (True, "expected_average_only_in"):
        raise CheckpointError(
            f"{path} reads rescaled activations",
            got=f"normalize_activations {normalises}",
            expected="none",
            do="in SAELens, fold_activation_norm_scaling_factor(factor) and save_inference_model; import that",
        )
    if normalises not in (None, False, "none"):
        raise CheckpointError(
            f"{path} normalises every row by itself, which no folded dictionary does",
            got=f"normalize_activations {normalises}",
            expected="none",
            do="normalise the rows before harvesting, or train without",
        )


def _weights(four: Sequence[Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    W_enc, b_enc, W_dec, b_dec = four
    if not settings["apply_b_dec_to_input"]:
        b_enc = centred_bias(b_enc, W_enc.T, b_dec)
    return {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _standard(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    return build("relu", _weights(require(tensors, FOUR, where=path), settings), k=1, where=path)


def _topk(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    state = _weights(require(tensors, FOUR, where=path), settings)
    if settings.get("rescale_acts_by_decoder_norm", False):
        state = with_unit_rows(state)
    return build("topk", state, k=settings.get("k"), where=path)


def _jumprelu(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    *four, threshold = require(tensors, FOUR | {"threshold": ("d_sae",)}, where=path)
    state = _weights(four, settings)
    return build("jumprelu", state | {"threshold": threshold.clamp(min=0)}, k=1, where=path)


def _gated(tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path) -> SAE:
    layout = {
        "W_enc": ("d_in", "d_sae"),
        "W_dec": ("d_sae", "d_in"),
        "b_dec": ("d_in",),
        "b_gate": ("d_sae",),
        "b_mag": ("d_sae",),
        "r_mag": ("d_sae",),
    }
    W_enc, W_dec, b_dec, b_gate, b_mag, r_mag = require(tensors, layout, where=path)
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
