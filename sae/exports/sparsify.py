"""sparsify: `cfg.json` and `sae.safetensors`, which `sparsify.SparseCoder.load_from_disk` opens; TopK only."""

from __future__ import annotations

from pathlib import Path

from sae.base import SAE
from sae.errors import CheckpointError

from .format import Format, Origin, read_settings, read_tensors, require, write_settings, write_tensors
from .plain import build, k_of, refusal, rule_of

SETTINGS, WEIGHTS = "cfg.json", "sae.safetensors"
LAYOUT = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
}


def write(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write a TopK dictionary for sparsify.

    Raises
    ------
    CheckpointError
        It selects otherwise than by the k largest of a row.
    """
    if rule_of(sae) != "topk":
        raise refusal(
            sae,
            "sparsify",
            knows="the k largest of each row (topk)",
            do="export for saelens or dictionary_learning, or train sae.kind=topk",
        )
    settings = {
        "activation": "topk",
        "expansion_factor": max(1, round(sae.d_sae / sae.d_in)),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": k_of(sae),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        # sparsify leaves out what it does not know
        "model": origin.model or None,
        "hookpoint": origin.hook or None,
        "ctx_len": origin.context,
    }
    tensors = zip(LAYOUT, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True)
    write_tensors(folder / WEIGHTS, dict(tensors))
    write_settings(folder / SETTINGS, settings)


def read(folder: Path) -> SAE:
    """Read a TopK dictionary that sparsify trained.

    Raises
    ------
    CheckpointError
        It is damaged, or it is a transcoder, has a skip connection, or selects by groups.
    """
    settings, path = read_settings(folder / SETTINGS), folder / WEIGHTS
    unusual = [name for name in ("transcode", "skip_connection") if settings.get(name)]
    if settings.get("activation", "topk") != "topk":
        unusual.append(f"activation {settings['activation']}")
    if unusual:
        raise CheckpointError(
            f"{folder} is no plain TopK dictionary",
            got=", ".join(unusual),
            expected="activation topk, without transcode and skip_connection",
        )
    W_enc, b_enc, W_dec, b_dec = require(read_tensors(path), LAYOUT, where=path)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return build("topk", state, k=settings.get("k", 32), where=path)


FORMAT = Format("sparsify", (SETTINGS, WEIGHTS), write, read)
