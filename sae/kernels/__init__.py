"""The products of a sparse dictionary behind one interface, chosen by argument.

`reference` states each in plain dense torch and is the oracle of the tests; `portable` runs on any device, `cpu` and
`triton` do the same faster on theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.errors import ConfigError

from .explanation import Explanation

CPU = torch.device("cpu")

EachK = int | Sequence[int]
"""Active features of a row: of all members of a stack (`sae.stack`), or of each."""


@runtime_checkable
class Kernels(Protocol):
    """What an architecture needs; implementations hold no state.

    Selections take centred inputs and return positive codes only; ties go to the lower index; NaN is kept, so
    that it reaches the loss.
    """

    def select_rows(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row of x Wᵀ + b."""

    def select_largest(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k largest entries of each row of x Wᵀ + b, whatever their sign."""

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries of x Wᵀ + b, over all rows together; of a stack, over each member's."""

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Keep the entries of x Wᵀ + b strictly above a threshold >= 0: one for all or one per feature.

        Of a stack [members, 1, 1] is one for each member.
        """

    def decode(self, codes: SparseCodes, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return Z W for the codes Z."""

    def value_gradients(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] for every code: the gradient of Z W with respect to the values of Z."""

    def weight_gradient(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], d_sae: int
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return Zᵀ g: the gradient of Z W with respect to W."""

    def explain(
        self,
        x: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        weights: tuple[Tensor, Tensor, Tensor],
        *,
        k: int,
    ) -> Explanation:
        """Explain a residual by the k largest entries of each row of x W_encᵀ + b_enc, whatever their sign.

        `weights` are W_enc, b_enc, W_dec of the features at hand, of which there may be none.
        """


@cache
def find_kernels(
    name: str = "auto", *, device: torch.device = CPU, precision: str = "fp32", members: int = 1
) -> Kernels:
    """Return the kernels of that name.

    Parameters
    ----------
    name
        `reference`, `portable`, `cpu` or `triton`; `auto` takes the fastest that runs on the device.
    device
        Where the tensors are.
    precision
        `bf16` lets products in bf16 propose which codes to keep; their values stay those of W's precision. `explain`
        of one process rounds what it multiplies. The reference has no such thing.
    members
        How many dictionaries of one shape lie end to end (see `sae.stack`): rows and features of one meet only each
        other. The reference knows single ones only.

    Raises
    ------
    ConfigError
        No kernels of that name, or not for this device or a stack.
    """
    from .cpu import CpuKernels
    from .portable import PortableKernels
    from .reference import ReferenceKernels

    bf16 = precision == "bf16"
    if name == "auto":
        on_gpu = "triton" if find_spec("triton") else "portable"
        name = {"cpu": "cpu", "cuda": on_gpu}.get(device.type, "portable")
    if name == "triton":
        return _triton_kernels(device, bf16, members)
    known: dict[str, Callable[[], Kernels]] = {
        "reference": ReferenceKernels,
        "portable": partial(PortableKernels, bf16=bf16, members=members),
        "cpu": partial(CpuKernels, bf16=bf16, members=members),
    }
    if name == "cpu" and device.type != "cpu":
        raise ConfigError("the cpu kernels need a CPU", got=f"device {device}", do="take kernels `auto`")
    if name not in known:
        raise ConfigError("unknown kernels", got=repr(name), expected=", ".join(["auto", *known, "triton"]))
    if name == "reference" and members > 1:
        raise ConfigError("the reference kernels know single dictionaries only", got=f"a stack of {members}")
    return known[name]()


def find_precision(name: str, device: torch.device) -> str:
    """Return `fp32` or `bf16` as named, or for `auto` bf16 where the device multiplies it natively.

    That is a CPU with AVX512-BF16 or AMX, or an NVIDIA GPU from Ampere on; elsewhere bf16 is emulated and slower.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and native else "fp32"


def _triton_kernels(device: torch.device, bf16: bool, members: int) -> Kernels:
    # on a CPU Triton's interpreter runs them, slowly, for tests
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ConfigError("the triton kernels need a GPU", got=f"device {device}", do="take kernels `auto`")
    try:
        from .triton import TritonKernels
    except ImportError as error:
        raise ConfigError(
            "triton is not installed", got=str(error), do="pip install 'assay[triton]', or take other kernels"
        ) from error
    return TritonKernels(bf16=bf16, members=members)
