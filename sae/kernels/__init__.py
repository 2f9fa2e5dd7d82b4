"""The products of a sparse dictionary behind one interface, chosen by argument.

`reference` states each in plain dense torch and is the oracle of the tests; `cpu` is what training runs on.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.errors import ConfigError
from sae.world import World


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
        k: int,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row of x Wᵀ + b."""

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
        world: World,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries of x Wᵀ + b, over the rows of all ranks together."""

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Keep the entries of x Wᵀ + b strictly above a threshold >= 0: one for all or one per feature."""

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


def find_kernels(name: str = "auto") -> Kernels:
    """Return the kernels of that name; `auto` takes the fastest that runs on this device.

    Raises
    ------
    ConfigError
        No kernels of that name.
    """
    from .cpu import CpuKernels
    from .reference import ReferenceKernels

    known: dict[str, Kernels] = {"auto": CpuKernels(), "cpu": CpuKernels(), "reference": ReferenceKernels()}
    if name not in known:
        raise ConfigError("unknown kernels", got=repr(name), expected=", ".join(known))
    return known[name]
