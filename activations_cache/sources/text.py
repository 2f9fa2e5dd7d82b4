"""Text, read by a Hugging Face model: an entity is a document, a position one of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import nn

from activations_cache.batching import cut_by_length
from activations_cache.documents import Documents, open_documents
from activations_cache.inputs import ModelInputs
from activations_cache.models import PretrainedConfig, first_line, module_hash
from activations_cache.splits import SplitConfig
from activations_cache.tables import find_files
from sae.errors import ConfigError
from sae.world import World

from .base import ActivationSource, HarvestInputs, SourceConfig
from .reading import BATCH_ROWS, EntitySplits, ModelSource

FEWEST_WORDS = 2
"""Fewer tokens than that besides special ones tell nothing apart."""


class TextSourceConfig(SourceConfig):
    """Documents, read by a model and its tokenizer; positions and times count a document's tokens."""

    needs: ClassVar[tuple[str, ...]] = ("model",)
    version: ClassVar[int] = 2

    kind: Literal["text"] = "text"
    path: str | tuple[str, ...]
    """Text files (UTF-8), or one folder that `datasets` saved with save_to_disk; a glob is allowed, in natural order."""
    document: Literal["file", "line"] = "file"
    """What a document of a text file is; empty lines are none."""
    column: str = "text"
    """Column of a `datasets` folder that holds the text."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; None: the model's."""
    length: int = Field(default=512, ge=2)
    """Most tokens of one sequence, special ones included; a longer document is cut into several."""
    packed: bool = False
    """Fill every sequence with one document after another: no padding, but tokens see the document before."""
    special_tokens: Literal["drop", "keep"] = "drop"
    """Whether tokens that the tokenizer adds, such as [CLS], get rows; the model sees them in any case."""
    split: SplitConfig = SplitConfig()
    """How documents are divided."""

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source."""
        assert inputs.model is not None
        folder = self.tokenizer
        if folder is None and isinstance(inputs.model, PretrainedConfig):
            folder = inputs.model.path
        if folder is None:
            raise ConfigError("source.tokenizer is missing", do="give the folder of the model's tokenizer")
        model = inputs.model.load(inputs.fitted).to(inputs.device)
        tokenizer = load_tokenizer(folder)
        check_fit(model, tokenizer, self.length)
        documents = open_documents(self.files(), self.document, self.column)
        kept = Tokens(documents, tokenizer, keep_special=self.special_tokens == "keep")
        feed = (
            PackedFeed(kept, self.length, self.split)
            if self.packed
            else PaddedFeed(kept, self.length, self.split)
        )
        provenance = {
            "source": self.to_dict(),
            "model": inputs.model.to_dict(),
            "weights": module_hash(model),
        }
        return ModelSource(feed, model, inputs.hooks, provenance=provenance)

    def files(self) -> Sequence[Path]:
        """Return the texts."""
        return find_files([self.path] if isinstance(self.path, str) else self.path)


class Piece(NamedTuple):
    """Consecutive tokens of one document."""

    ids: Int[np.ndarray, " tokens"]
    kept: Bool[np.ndarray, " tokens"]
    """Whether the token gets a row."""


class Tokens:
    """Documents as tokens; recent ones are remembered, since the sequences of a document follow one another."""

    def __init__(self, documents: Documents, tokenizer: Any, *, keep_special: bool) -> None:
        self.ids = documents.ids
        self.pad = tokenizer.pad_token_id or 0
        self._documents, self._tokenizer, self._keep_special = documents, tokenizer, keep_special
        self.pieces = lru_cache(maxsize=64)(self._pieces)

    def _pieces(self, document: int, length: int | None) -> list[Piece]:
        """Return a document cut into sequences of at most `length` tokens, or uncut for None."""
        cut = (
            {}
            if length is None
            else {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        )
        text = self._documents.read(document)
        coded = self._tokenizer([text], return_special_tokens_mask=True, verbose=False, **cut)
        return [
            Piece(
                np.array(ids, np.int64),
                np.array(special) == 0 if not self._keep_special else np.ones(len(ids), bool),
            )
            for ids, special in zip(coded["input_ids"], coded["special_tokens_mask"], strict=True)
        ]


class _Feed:
    """What both feeds share: documents as entities, and the layout of a call."""

    def __init__(self, tokens: Tokens, length: int, split: SplitConfig) -> None:
        names = pa.array(tokens.ids, pa.string())
        self.entities = pa.table({"entity": np.arange(len(names)), "id": names})
        self._tokens, self._length, self._splits = tokens, length, EntitySplits(split, names)

    def split(
        self, entity: Int[np.ndarray, " rows"], time: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " rows"]:
        """Return the split of rows."""
        return self._splits.of(entity, time)

    def _call(self, sequences: list[list[tuple[int, int, Piece]]]) -> ModelInputs:
        """Lay sequences, each of (document, position of its first kept token, piece), beside one another."""
        width = max(sum(len(piece.ids) for _, _, piece in sequence) for sequence in sequences)
        shape = (len(sequences), width)
        ids, seen, kept = np.full(shape, self._tokens.pad), np.zeros(shape, np.int64), np.zeros(shape, bool)
        entity, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, sequence in enumerate(sequences):
            start = 0
            for document, first, piece in sequence:
                here = (row, slice(start, start + len(piece.ids)))
                ids[here], seen[here], kept[here], entity[here] = piece.ids, 1, piece.kept, document
                position[here] = first + np.cumsum(piece.kept) - 1
                start += len(piece.ids)
        words = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(seen)}
        return ModelInputs((), words, entity, position, position, kept)


class PaddedFeed(_Feed):
    """Sequences of one document each, like lengths together, padded on the right; ranks have whole documents."""

    def __init__(self, tokens: Tokens, length: int, split: SplitConfig) -> None:
        super().__init__(tokens, length, split)
        found = [
            (document, number, len(piece.ids), int(piece.kept.sum()))
            for document in range(len(tokens.ids))
            for number, piece in enumerate(tokens.pieces(document, length))
        ]
        table = np.array(found, np.int64).reshape(-1, 4)
        self._document, self._number, self._size, kept = table[table[:, 3] > 0].T
        kept = np.asarray(kept)
        before = np.cumsum(kept) - kept
        starts = np.flatnonzero(np.diff(self._document, prepend=-1))
        self._first = before - np.repeat(before[starts], np.diff(np.append(starts, len(kept))))
        self.n_rows = int(kept.sum())

    def plan(self, world: World) -> Iterator[Int[np.ndarray, " batch"]]:
        """Yield numbers of sequences, so many that they fill a batch."""
        rank = self._splits.rank[self._document]
        mine = np.flatnonzero(np.floor(rank * world.size) == world.rank)
        order = mine[np.argsort(rank[mine], kind="stable")]
        stretch = max(1, int(16 * BATCH_ROWS / max(1.0, float(self._size.mean() if len(self._size) else 1))))
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            yield from cut_by_length(part, self._size[part], BATCH_ROWS)

    def load(self, step: Int[np.ndarray, " batch"]) -> ModelInputs:
        """Return the call for these sequences."""
        sequences = []
        for i in step.tolist():
            document = int(self._document[i])
            piece = self._tokens.pieces(document, self._length)[int(self._number[i])]
            sequences.append([(document, int(self._first[i]), piece)])
        return self._call(sequences)


class PackedFeed(_Feed):
    """All documents one after the other, cut into sequences of equal length; ranks take batches in turn."""

    def __init__(self, tokens: Tokens, length: int, split: SplitConfig) -> None:
        super().__init__(tokens, length, split)
        pieces = (tokens.pieces(document, None)[0] for document in range(len(tokens.ids)))
        sizes = np.array([(len(piece.ids), int(piece.kept.sum())) for piece in pieces], np.int64)
        self._starts = np.append(0, np.cumsum(sizes[:, 0]))
        self._at_once = max(1, BATCH_ROWS // length)
        self.n_rows = int(sizes[:, 1].sum())

    def plan(self, world: World) -> Iterator[int]:
        """Yield where batches begin in the stream of all tokens."""
        size = self._at_once * self._length
        yield from range(world.rank * size, int(self._starts[-1]), world.size * size)

    def load(self, step: int) -> ModelInputs:
        """Return the call for the batch that begins at this token."""
        end = min(step + self._at_once * self._length, int(self._starts[-1]))
        starts = range(step, end, self._length)
        return self._call([self._sequence(start, min(start + self._length, end)) for start in starts])

    def _sequence(self, start: int, end: int) -> list[tuple[int, int, Piece]]:
        parts = []
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        while document < len(self._tokens.ids) and self._starts[document] < end:
            piece, origin = self._tokens.pieces(document, None)[0], int(self._starts[document])
            low, high = max(start - origin, 0), end - origin
            first = int(piece.kept[:low].sum())
            if len(piece.ids[low:high]):
                parts.append((document, first, Piece(piece.ids[low:high], piece.kept[low:high])))
            document += 1
        return parts


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder.

    Raises
    ------
    ConfigError
        There is none, or it is not one of the quick ones, which alone can cut a document into sequences.
    """
    from transformers import AutoTokenizer

    do = "save one there (tokenizer.json), or set source.tokenizer to the folder that has it"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library behind it raises Exception itself
        raise ConfigError(f"no tokenizer in {folder}", got=first_line(error), do=do) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer in {folder} is no fast one", do="convert it to tokenizer.json")
    # from the left it would cut a document's sequences in the order last to first
    tokenizer.truncation_side = "right"
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(words) < FEWEST_WORDS:
        # a folder without tokenizer files gets an empty one of the model's kind, to which every word is unknown
        raise ConfigError(
            f"the tokenizer in {folder} knows no words", got=f"{len(words)} besides special tokens", do=do
        )
    return tokenizer


def check_fit(model: nn.Module, tokenizer: Any, length: int) -> None:
    """Compare the model's tables with what it will be given; ConfigError where they are too small."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions - _first_position(model) < length:
        raise ConfigError(
            f"source.length={length} is more than the model reads",
            expected=f"at most {positions - _first_position(model)}",
        )
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    table = find()
    if isinstance(table, nn.Embedding) and len(tokenizer) > table.num_embeddings:
        raise ConfigError(
            "the tokenizer knows more tokens than the model",
            got=f"{len(tokenizer)}",
            expected=f"at most {table.num_embeddings}",
        )


def _first_position(model: nn.Module) -> int:
    """Return where a model's table of positions begins: behind the padding's in RoBERTa and its kin."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
