"""What a kind of dictionary takes in a step beyond what follows from its sizes, so that it can be planned for."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """The work of a training step; each kind says what it does otherwise than a plain one.

    Attributes
    ----------
    active : int
        Features of a row at most, at any time of the training.
    per_row : bool
        Whether each row has its own; otherwise the batch shares them out.
    reconstructions : int
        Of a row, each with an error of its own.
    looks : int
        Encodings before the one whose codes count, each decoded, so that what it leaves over can be encoded again.
    by_rank : bool
        Whether codes are sorted by their rank in the row, for which shards exchange the values of all of them.
    by_rate : bool
        Whether codes are sorted by how often their features fire, which all ranks count together and exchange.
    """

    active: int
    per_row: bool = True
    reconstructions: int = 1
    looks: int = 0
    by_rank: bool = False
    by_rate: bool = False
