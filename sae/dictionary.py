"""What every measure and every label asks of a dictionary, trained or not."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from .codes import SparseCodes


@runtime_checkable
class Dictionary(Protocol):
    """Reads rows as sparse positive codes and writes them back; `SAE` and `Baseline` are ones.

    Attributes
    ----------
    d_in, d_sae
        Width of the rows, and number of features.
    folded
        Whether it reads raw activations.
    """

    d_in: int
    d_sae: int
    folded: bool

    @property
    def W_dec(self) -> Tensor:
        """Write directions [d_sae, d_in], one row per feature."""

    def encode(self, x: Tensor) -> SparseCodes:
        """Return the codes of rows [batch, d_in], which depend on no other row."""

    def decode(self, codes: SparseCodes) -> Tensor:
        """Return the reconstruction [batch, d_in]."""
