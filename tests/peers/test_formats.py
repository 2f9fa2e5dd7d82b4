"""Exports in the libraries they are for, and dictionaries of those libraries here: the same codes, the same rows.

ASSAY_PEERS names an environment with sae-lens, dictionary-learning and eai-sparsify.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.base import SAEConfig
from sae.config import parse_config
from sae.errors import CheckpointError
from sae.exports import FORMATS, Origin, export, load
from sae.folding import fold
from sae.geometry import normalise_rows_

pytestmark = pytest.mark.peers

D_IN, D_SAE, K = 12, 40, 4
THEIRS = {
    "saelens": {
        "standard": "relu",
        "standard_uncentred": "relu",
        "topk": "topk",
        "topk_rescaled": "topk",
        "topk_folded": "topk",
        "jumprelu": "jumprelu",
        "batchtopk": "jumprelu",
        "gated": "gated",
        "gated_uncentred": "gated",
    },
    "dictionary_learning": {
        "AutoEncoder": "relu",
        "AutoEncoderNew": "relu",
        "AutoEncoderTopK": "topk",
        "BatchTopKSAE": "batch_topk",
        "untrained": "batch_topk",
        "MatryoshkaBatchTopKSAE": "batch_topk",
        "JumpReluAutoEncoder": "jumprelu",
        "GatedAutoEncoder": "gated",
    },
    "sparsify": {"sized": "topk", "expanded": "topk"},
}
LIBRARIES = sorted(THEIRS)


def build(kind, seed=0):
    """A folded dictionary with nothing at its special start; decoder rows of unit length, but for a ReLU."""
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": D_SAE, "k": K}, where="test")
    generator = torch.Generator().manual_seed(seed)
    sae = config.build(D_IN, generator=generator)
    with torch.no_grad():
        for name, value in (*sae.named_parameters(), *sae.named_buffers()):
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if name == "threshold" else noise)
    if kind != "relu":
        normalise_rows_(sae.W_dec)
    return fold(sae, 10 * torch.randn(D_IN, generator=generator), 7.5)


@pytest.fixture(scope="module")
def x():
    return 30 * np.random.default_rng(0).standard_normal((500, D_IN)).astype(np.float32)


@pytest.fixture(scope="module")
def ask(x, tmp_path_factory):
    """Have a library read or make folders."""
    if "ASSAY_PEERS" not in os.environ:
        pytest.skip(
            "no peers: set ASSAY_PEERS to an environment with sae-lens, dictionary-learning, eai-sparsify"
        )
    python = Path(os.environ["ASSAY_PEERS"]) / "bin" / "python"
    rows = tmp_path_factory.mktemp("rows") / "x.npy"
    np.save(rows, x)

    def run(command, format_, *folders):
        script = Path(__file__).with_name("speak.py")
        done = subprocess.run(
            [python, script, command, format_, rows, *folders],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="module", params=LIBRARIES)
def exported(request, ask, tmp_path_factory):
    """Every kind that the library can express, read by the library."""
    out, format_ = tmp_path_factory.mktemp(request.param), request.param
    saes = {}
    for kind in sorted(SAEConfig.kinds):
        sae = build(kind)
        try:
            export(sae, out / kind, format_, origin=Origin("model", "layers.1"))
        except CheckpointError:
            continue
        saes[kind] = sae
    if "relu" in saes:
        # dictionary_learning has a class of its own for these
        saes["relu_of_unit_rows"] = build("relu")
        normalise_rows_(saes["relu_of_unit_rows"].W_dec)
        export(saes["relu_of_unit_rows"], out / "relu_of_unit_rows", format_, origin=Origin())
    ask("read", format_, *(out / name for name in saes))
    return format_, out, saes


@pytest.fixture(scope="module", params=LIBRARIES)
def made(request, ask, tmp_path_factory):
    """A dictionary of each of the library's kinds, made and read by the library."""
    out = tmp_path_factory.mktemp(f"their_{request.param}")
    ask("make", request.param, out)
    return request.param, out


def compare(sae, x, folder):
    theirs = np.load(folder / "theirs.npz")
    codes = sae.encode(torch.from_numpy(x))
    z, x_hat = codes.to_dense(sae.d_sae).detach().numpy(), sae.decode(codes).detach().numpy()
    assert (z > 0).any()
    scale = np.abs(z).max()
    # fp32 rounding: a pre-activation is a sum of d_in products of values up to `scale`
    assert np.abs(z - theirs["z"]).max() < 2e-6 * scale
    assert np.abs(x_hat - theirs["x_hat"]).max() < 2e-6 * max(scale, np.abs(x_hat).max())


def test_exports_give_the_same_codes_and_rows_there(exported, x):
    format_, out, saes = exported
    assert "topk" in saes
    if format_ != "sparsify":
        assert {"topk", "batch_topk"} <= set(saes)
    for name, sae in saes.items():
        compare(sae, x, out / name)
        assert {p.name for p in (out / name).iterdir()} == {*FORMATS[format_].files, "theirs.npz"}


def test_theirs_give_the_same_codes_and_rows_here(made, x):
    format_, out = made
    assert {p.name for p in out.iterdir()} == set(THEIRS[format_])
    for name, kind in THEIRS[format_].items():
        sae = load(out / name)
        assert sae.config.kind == kind
        assert sae.folded
        compare(sae, x, out / name)
