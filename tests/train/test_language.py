"""Next-token loss and KL of a real causal model, against its documents read one by one."""

import tracemalloc

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations_cache.models import PretrainedConfig
from activations_cache.sources.base import HarvestInputs
from activations_cache.sources.text import TextSourceConfig
from activations_cache.splits import SPLITS
from sae.baselines import fit_baseline
from sae.world import World
from train.language import evaluate_language, resample_means

WORDS = ["a", "debt", "is", "what", "one", "owes", "and", "pays", "late", "or", "not", "at", "all"]
HOOK, D = "model.layers.0", 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(out)
    torch.manual_seed(0)
    shape = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # a spread that makes the predictions of an untrained model differ
    config = LlamaConfig(**shape, vocab_size=32, num_key_value_heads=1, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(out)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, int(n))) for n in rng.integers(1, 20, 60)]
    (out / "texts.txt").write_text("\n".join(lines))
    return out


def make_source(folder, **settings):
    config = TextSourceConfig(path=str(folder / "texts.txt"), document="line", length=32, **settings)
    model = PretrainedConfig(path=folder, architecture="AutoModelForCausalLM")
    return config.build(inputs=HarvestInputs(hooks=[HOOK], model=model))


def by_hand(folder, source, change):
    """Loss and KL of every predicted token of the confirm documents."""
    lines = (folder / "texts.txt").read_text().splitlines()
    losses, distances, documents = [], [], []
    for document, line in enumerate(lines):
        if source.feed.split(np.array([document]), np.array([0]))[0] != SPLITS.index("confirm"):
            continue
        ids = torch.tensor([source.feed._tokens._tokenizer(line)["input_ids"]])
        with torch.no_grad():
            plain = source.model(input_ids=ids).logits[0].double()
            handle = source.model.model.layers[0].register_forward_hook(lambda _m, _a, out: change(out))
            changed = source.model(input_ids=ids).logits[0].double()
            handle.remove()
        for at in range(ids.shape[1] - 1):
            p, q = plain[at].softmax(-1), changed[at].softmax(-1)
            losses.append(float(-q[ids[0, at + 1]].log()))
            distances.append(float((p * (p / q).log()).sum()))
            documents.append(document)
    return losses, distances, documents


def test_changes_of_loss_and_kl_are_those_of_documents_read_alone(folder):
    source = make_source(folder)
    x = np.concatenate([batch.acts[HOOK] for batch in source.batches(World())])
    sae, mean = fit_baseline("pca", torch.from_numpy(x), D, k=3), torch.from_numpy(x).mean(0)
    report = evaluate_language(source, HOOK, sae=sae, mean=mean, n_bootstrap=50, seed=0)
    plain, _, documents = by_hand(folder, source, lambda out: None)
    assert report["loss"] == pytest.approx(np.mean(plain), rel=1e-4)
    assert (report["tokens"], report["documents"]) == (len(plain), len(set(documents)))
    by_name = {
        "spliced": lambda out: sae.decode(sae.encode(out[0]))[None],
        "zero": lambda out: out * 0,
        "mean": lambda out: out * 0 + mean,
    }
    rise = {}
    for name, change in by_name.items():
        losses, distances, _ = by_hand(folder, source, change)
        rise[name] = np.mean(losses) - np.mean(plain)
        value, low, high = report["change"][name]["loss"]
        assert value == pytest.approx(rise[name], abs=1e-4)
        assert low < value < high
        assert report["change"][name]["kl"][0] == pytest.approx(np.mean(distances), rel=1e-3)
        assert np.mean(distances) > 1e-3
    assert np.abs(list(report["change"]["error_kept"].values())).max() < 1e-4
    for floor in ("zero", "mean"):
        share = pytest.approx((rise[floor] - rise["spliced"]) / rise[floor], abs=1e-3)
        assert report["recovered"][floor][0] == (share if rise[floor] > 0 else None)


def test_packed_documents_predict_nothing_of_one_another(folder):
    padded, packed = make_source(folder), make_source(folder, packed=True)
    x = np.concatenate([batch.acts[HOOK] for batch in padded.batches(World())])
    sae, mean = fit_baseline("pca", torch.from_numpy(x), D, k=D), torch.from_numpy(x).mean(0)
    one = evaluate_language(padded, HOOK, sae=sae, mean=mean, n_bootstrap=50, seed=0)
    other = evaluate_language(packed, HOOK, sae=sae, mean=mean, n_bootstrap=50, seed=0)
    # a sequence may end between two tokens of a document, and only there a prediction is lost
    assert one["tokens"] - 60 * 20 // 32 <= other["tokens"] <= one["tokens"]
    assert other["change"]["spliced"]["kl"][0] < 1e-5


def test_means_over_samples_are_those_of_documents_repeated_and_one_sample_is_held_at_a_time():
    rng = np.random.default_rng(0)
    n = 5000
    tokens, sums = (
        rng.integers(1, 9, n).astype(float),
        {"model": rng.random((2, n)), "zero": rng.random((2, n))},
    )
    tracemalloc.start()
    found = resample_means(sums, tokens, n_bootstrap=100, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * tokens.nbytes
    philox = np.random.Generator(np.random.Philox(3))
    drawn = [np.arange(n), *(philox.integers(0, n, n) for _ in range(100))]
    for name, total in sums.items():
        for i, measure in enumerate(("loss", "kl")):
            expected = [total[i, chosen].sum() / tokens[chosen].sum() for chosen in drawn]
            np.testing.assert_allclose(found[name][measure], expected, rtol=1e-12)
