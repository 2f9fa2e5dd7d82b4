"""dictionary_learning: `config.json` and `ae.pt`, which `dictionary_learning.utils.load_dictionary` opens.

Its weights are a pickle of plain tensors, for it reads nothing else; here it is read with `weights_only`, which runs no
code.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sae.base import SAE
from sae.checkpoint import write_atomically
from sae.errors import CheckpointError

from .format import Format, Origin, as_float32, read_settings, require, write_settings
from .plain import (
    build,
    centred_bias,
    k_of,
    refusal,
    rule_of,
    thresholds,
    uncentred_bias,
    with_unit_rows,
)

SETTINGS, WEIGHTS = "config.json", "ae.pt"
LINEAR = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "decoder.weight": ("d_in", "d_sae"),
}
FOUR = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}


def write(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write the dictionary for dictionary_learning.

    BatchTopK and its kin become BatchTopKSAE with their one threshold. JumpReluAutoEncoder, and AutoEncoderNew
    for ReLUs without unit rows, do not subtract b_dec: they get a bias that has the subtraction in it.

    Raises
    ------
    CheckpointError
        Its encoder is more than one product.
    """
    kind, tensors = _foreign(sae)
    layer = re.search(r"\d+", origin.hook)
    trainer = {
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": k_of(sae),
        "layer": None if layer is None else int(layer[0]),
        "lm_name": origin.model or None,
        "submodule_name": origin.hook or None,
    }
    buffer = {"d_submodule": sae.d_in, "ctx_len": origin.context}
    content = io.BytesIO()
    torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, content)
    write_atomically(folder / WEIGHTS, content.getvalue())
    write_settings(folder / SETTINGS, {"trainer": trainer, "buffer": buffer})


def read(folder: Path) -> SAE:
    """Read a dictionary of one of their classes.

    Raises
    ------
    CheckpointError
        It is damaged, or of a class that cannot be expressed here.
    """
    path = folder / WEIGHTS
    trainer = read_settings(folder / SETTINGS).get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    readers = {
        "AutoEncoder": _autoencoder,
        "AutoEncoderNew": _autoencoder_new,
        "AutoEncoderTopK": _topk,
        "BatchTopKSAE": _batch_topk,
        "MatryoshkaBatchTopKSAE": _matryoshka,
        "JumpReluAutoEncoder": _jumprelu,
        "GatedAutoEncoder": _gated,
    }
    if kind not in readers:
        raise CheckpointError(
            f"{folder} is of a class that cannot be read",
            got=f"trainer.dict_class {kind!r}",
            expected=", ".join(readers),
        )
    return readers[kind](_tensors(path), path)


def _foreign(sae: SAE) -> tuple[str, Mapping[str, Tensor]]:
    """Return their class and its tensors."""
    rule = rule_of(sae)
    linear = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T}
    if rule == "gated":
        biases = {
            "decoder_bias": sae.b_dec,
            "gate_bias": sae.b_enc,
            "mag_bias": sae.get_parameter("b_mag"),
            "r_mag": sae.get_parameter("r_mag"),
        }
        return "GatedAutoEncoder", linear | biases
    linear["encoder.bias"] = sae.b_enc
    counted = {"b_dec": sae.b_dec, "k": torch.tensor(k_of(sae), dtype=torch.int32)}
    if rule == "relu" and _has_unit_columns(linear["decoder.weight"]):
        return "AutoEncoder", linear | {"bias": sae.b_dec}
    if rule == "relu":
        bias = uncentred_bias(sae.b_enc, sae.W_enc, sae.b_dec)
        return "AutoEncoderNew", linear | {"encoder.bias": bias, "decoder.bias": sae.b_dec}
    if rule == "topk":
        # -1 is what theirs holds where no threshold was learned; TopK does not use it
        return "AutoEncoderTopK", linear | counted | {"threshold": torch.tensor(-1.0)}
    if rule is None:
        raise refusal(
            sae,
            "dictionary_learning",
            knows="an encoder of one product",
            do="export it as native, or train another kind",
        )
    threshold = thresholds(sae)
    if bool((threshold == threshold[0]).all()):
        return "BatchTopKSAE", linear | counted | {"threshold": threshold[0].clone()}
    bias = uncentred_bias(sae.b_enc, sae.W_enc, sae.b_dec)
    return "JumpReluAutoEncoder", {
        "W_enc": sae.W_enc.T,
        "b_enc": bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        "threshold": threshold,
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(
            f"cannot read the weights {path}", got=str(error).splitlines()[0], expected="a plain state_dict"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} is not a plain state_dict", got=type(state).__name__)
    return as_float32(state)


def _autoencoder(tensors: dict[str, Tensor], path: Path) -> SAE:
    W_enc, b_enc, decoder, b_dec = require(tensors, LINEAR | {"bias": ("d_in",)}, where=path)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": decoder.T, "b_dec": b_dec}
    if not _has_unit_columns(decoder):
        state = with_unit_rows(state)
    return build("relu", state, k=1, where=path)


def _has_unit_columns(decoder: Tensor) -> bool:
    """Return whether their loader of AutoEncoder leaves the weights alone; it makes unit columns of any other."""
    norms = torch.linalg.vector_norm(decoder.detach(), dim=0)
    return torch.allclose(norms, torch.ones_like(norms))


def _autoencoder_new(tensors: dict[str, Tensor], path: Path) -> SAE:
    W_enc, b, decoder, b_dec = require(tensors, LINEAR | {"decoder.bias": ("d_in",)}, where=path)
    state = {"W_enc": W_enc, "b_enc": centred_bias(b, W_enc, b_dec), "W_dec": decoder.T, "b_dec": b_dec}
    return build("relu", state, k=1, where=path)


def _topk(tensors: dict[str, Tensor], path: Path) -> SAE:
    tensors.pop("threshold", None)
    layout = LINEAR | {"b_dec": ("d_in",), "k": ()}
    W_enc, b_enc, decoder, b_dec, k = require(tensors, layout, where=path)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": decoder.T, "b_dec": b_dec}
    return build("topk", state, k=int(k), where=path)


def _batch_topk(tensors: dict[str, Tensor], path: Path) -> SAE:
    layout = LINEAR | {"b_dec": ("d_in",), "k": (), "threshold": ()}
    W_enc, b_enc, decoder, b_dec, k, threshold = require(tensors, layout, where=path)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": decoder.T, "b_dec": b_dec}
    return build("batch_topk", state | _one(threshold), k=int(k), where=path)


def _matryoshka(tensors: dict[str, Tensor], path: Path) -> SAE:
    # the groups matter to training alone
    tensors.pop("group_sizes", None)
    W_enc, b_enc, W_dec, b_dec, k, threshold = require(tensors, FOUR | {"k": (), "threshold": ()}, where=path)
    state = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return build("batch_topk", state | _one(threshold), k=int(k), where=path)


def _one(threshold: Tensor) -> dict[str, Tensor]:
    """Return BatchTopK's threshold; a negative one, as before training, is that of a ReLU."""
    return {"threshold": threshold.clamp(min=0).reshape(())}


def _jumprelu(tensors: dict[str, Tensor], path: Path) -> SAE:
    W_enc, b, W_dec, b_dec, threshold = require(tensors, FOUR | {"threshold": ("d_sae",)}, where=path)
    state = {"W_enc": W_enc.T, "b_enc": centred_bias(b, W_enc.T, b_dec), "W_dec": W_dec, "b_dec": b_dec}
    return build("jumprelu", state | {"threshold": threshold.clamp(min=0)}, k=1, where=path)


def _gated(tensors: dict[str, Tensor], path: Path) -> SAE:
    layout = {
        "encoder.weight": ("d_sae", "d_in"),
        "decoder.weight": ("d_in", "d_sae"),
        "decoder_bias": ("d_in",),
        "gate_bias": ("d_sae",),
        "mag_bias": ("d_sae",),
        "r_mag": ("d_sae",),
    }
    W_enc, decoder, b_dec, b_gate, b_mag, r_mag = require(tensors, layout, where=path)
    state = {
        "W_enc": W_enc,
        "W_dec": decoder.T,
        "b_dec": b_dec,
        "b_enc": b_gate,
        "b_mag": b_mag,
        "r_mag": r_mag,
    }
    return build("gated", state, k=1, where=path)


FORMAT = Format("dictionary_learning", (SETTINGS, WEIGHTS), write, read)
