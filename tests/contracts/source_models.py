"""Models, adapters and batches that sources are tried with; none of them is ours."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PatchTSTConfig,
    PatchTSTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    TimeSeriesTransformerConfig,
    TimeSeriesTransformerModel,
)

from activations_cache.inputs import ModelInputs
from activations_cache.reference.histories import collate

COLUMNS = ("bal", "due", "lim")
CUT = 17
"""First period after the time cut."""
WORDS = [
    "the",
    "account",
    "was",
    "paid",
    "late",
    "and",
    "then",
    "again",
    "in",
    "full",
    "by",
    "its",
    "holder",
    "who",
    "moved",
    "away",
]


class Recurrent(nn.Module):
    """A stranger: a GRU that returns a tuple, a layer called twice, one output per field."""

    def __init__(self, width=7):
        super().__init__()
        torch.manual_seed(1)
        self.gru = nn.GRU(len(COLUMNS), width, batch_first=True)
        self.twice = nn.Linear(width, width)
        self.per_field = nn.Linear(1, 5)
        self.embed = nn.Linear(len(COLUMNS), 4)

    def forward(self, values, scale=1.0):
        self.per_field(values.unsqueeze(-1))
        self.embed(values)
        hidden, _ = self.gru(values * scale)
        return self.twice(self.twice(hidden))


def recurrent(**options):
    return Recurrent(**options)


def to_inputs(panel, entities, left=False, fields=()):
    h = collate(panel, entities)
    order = (
        np.argsort(h.real.numpy(), axis=1, kind="stable")
        if left
        else np.tile(np.arange(h.rows.shape[1]), (len(h.rows), 1))
    )
    rows, real = (np.take_along_axis(part.numpy(), order, 1) for part in (h.rows, h.real))
    values = torch.from_numpy(np.nan_to_num(panel.values[rows]) * real[..., None])
    return ModelInputs.at_rows(panel, rows, real, values, fields=fields, scale=0.01)


def to_inputs_left(panel, entities):
    return to_inputs(panel, entities, left=True)


def to_inputs_fields(panel, entities):
    return to_inputs(panel, entities, fields=COLUMNS)


class Batches(list):
    ids = [f"C{i}" for i in range(12)]


def batches(n=9):
    rng = np.random.default_rng(0)
    found = Batches()
    for i in range(n):
        shape = (4, 3 + i % 3)
        entity = np.repeat((np.arange(4) + 4 * (i % 3))[:, None], shape[1], axis=1)
        position = np.tile(np.arange(shape[1]), (4, 1)) + 10 * (i // 3)
        values = torch.from_numpy(rng.standard_normal((*shape, len(COLUMNS)), dtype=np.float32))
        found.append(ModelInputs((values,), {}, entity, position, position, rng.random(shape) < 0.8))
    return found


def save_model(name, folder):
    """Save a small model, with a tokenizer where it reads text."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vocabulary = {"vocab_size": 64}
    with torch.random.fork_rng():
        built = {
            "bert": lambda: BertModel(BertConfig(**size, **vocabulary, max_position_embeddings=32)),
            "gpt2": lambda: GPT2Model(
                GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **vocabulary)
            ),
            "llama": lambda: LlamaModel(LlamaConfig(**size, **vocabulary, num_key_value_heads=1)),
            "t5": lambda: T5EncoderModel(
                T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, **vocabulary)
            ),
            "patchtst": lambda: PatchTSTModel(patchtst_config()),
            "patchtst_cls": lambda: PatchTSTModel(patchtst_config(use_cls_token=True, do_mask_input=True)),
            "tst": lambda: TimeSeriesTransformerModel(tst_config()),
        }[name]()
    built.save_pretrained(folder)
    if name in ("bert", "gpt2", "llama", "t5"):
        tokenizer(with_ends=name in ("bert", "t5")).save_pretrained(folder)


def patchtst_config(**options):
    return PatchTSTConfig(
        num_input_channels=3,
        context_length=8,
        patch_length=3,
        patch_stride=2,
        d_model=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=16,
        **options,
    )


def tst_config():
    return TimeSeriesTransformerConfig(
        input_size=3,
        context_length=6,
        prediction_length=2,
        lags_sequence=[1, 2],
        num_time_features=2,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )


def tokenizer(with_ends):
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    if with_ends:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)
