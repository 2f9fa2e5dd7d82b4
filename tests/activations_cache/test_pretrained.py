"""A Hugging Face folder is read whole or refused: nothing of a model may be random, and no tokenizer empty."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast

from activations_cache.models import PretrainedConfig, module_hash
from activations_cache.sources.text import load_tokenizer
from sae.errors import ConfigError
from tests.contracts.source_models import save_model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_model("bert", folder)
    return folder


@pytest.fixture
def copy(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "copy")


def load(folder, architecture="AutoModel"):
    return PretrainedConfig(path=folder, architecture=architecture).load(None)


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def as_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def test_a_damaged_file_is_one_message(copy):
    cut(copy)
    with pytest.raises(ConfigError, match=r"cannot load .*copy\n  got: .+\n  do: check"):
        load(copy)


def test_pickles_are_named_and_not_read(copy):
    as_pickle(copy)
    with pytest.raises(
        ConfigError, match=r"(?s)got: pytorch_model.bin\n.*expected: model.safetensors\n.*save_pretrained"
    ):
        load(copy)


def test_a_config_of_another_size_is_refused_with_both_shapes(copy):
    change(copy, intermediate_size=48)
    with pytest.raises(ConfigError, match=r"(?s)not of the shapes.*\(32,\), \(48,\) by config.json"):
        load(copy)


def test_a_head_that_was_not_saved_is_not_made_up(bert):
    with pytest.raises(
        ConfigError, match=r"(?s)AutoModelForCausalLM needs.*no cls\..*and \d more.*AutoModel"
    ):
        load(bert, "AutoModelForCausalLM")


def test_layers_of_another_kind_of_model_are_not_made_up(copy):
    config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=64)
    (copy / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match="would be random"):
        load(copy)


def test_only_a_pooler_may_be_missing(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    model = load(copy)
    read = model.state_dict()
    assert all(torch.equal(read[name], value) for name, value in kept.items())
    # random ones would be others at the next start, which would then be another harvest
    assert module_hash(model) == module_hash(load(copy))


def test_a_folder_that_is_not_there_says_that_nothing_is_downloaded(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)no folder .*nowhere.*downloaded"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", ["config.json", "tokenizer_config.json"])
def test_a_tokenizer_that_would_be_empty_is_refused(copy, keep):
    # the library makes one of the kind that config.json says, to which every word is unknown
    for file in copy.glob("*token*"):
        if file.name != keep:
            file.unlink()
    with pytest.raises(ConfigError, match=r"(?s)tokenizer.*source.tokenizer"):
        load_tokenizer(copy)


def test_a_damaged_tokenizer_is_one_message(copy):
    (copy / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"no tokenizer in .*\n  got: .+\n  do: save one there"):
        load_tokenizer(copy)


@pytest.mark.parametrize(("words", "special"), [(["account", "late"], False), (["account"], True)])
def test_words_that_were_added_are_words_unless_they_are_special(tmp_path, words, special):
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")), unk_token="[UNK]"
    )
    made.add_tokens(words, special_tokens=special)
    made.save_pretrained(tmp_path)
    if special:
        with pytest.raises(ConfigError, match="knows no words"):
            load_tokenizer(tmp_path)
    else:
        assert set(words) <= load_tokenizer(tmp_path).get_vocab().keys()
