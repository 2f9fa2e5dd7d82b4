"""What every export promises, for every kind that it can express; the libraries themselves speak in tests/peers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.base import SAEConfig
from sae.checkpoint import save_sae, write_atomically
from sae.config import parse_config
from sae.errors import CheckpointError, ConfigError
from sae.exports import FORMATS, Origin, export, load
from sae.exports.plain import rule_of
from sae.folding import fold

D_IN, D_SAE, K = 12, 40, 4
KINDS = sorted(SAEConfig.kinds)
ORIGIN = Origin("credit_transformer", "layers.2", 24)


def build(kind, seed=0):
    config = parse_config(SAEConfig, {"kind": kind, "d_sae": D_SAE, "k": K}, where="test")
    generator = torch.Generator().manual_seed(seed)
    sae = config.build(D_IN, generator=generator)
    with torch.no_grad():
        for name, value in (*sae.named_parameters(), *sae.named_buffers()):
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if name == "threshold" else noise)
    return fold(sae, torch.randn(D_IN, generator=generator) * 10, 7.5)


def rows(n=300):
    return 30 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("format_", sorted(FORMATS))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_with_the_same_codes(kind, format_, tmp_path):
    sae, x = build(kind), rows()
    expressible = {"native": True, "sparsify": rule_of(sae) == "topk"}.get(format_, rule_of(sae) is not None)
    if not expressible:
        with pytest.raises(CheckpointError, match=rf"kind {kind}\n.*\n  do: "):
            export(sae, tmp_path / "out", format_, origin=ORIGIN)
        return
    export(sae, tmp_path / "out", format_, origin=ORIGIN)
    back = load(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FORMATS[format_].files)
    assert back.folded
    assert rule_of(back) == rule_of(sae)
    ours, theirs = sae.encode(x), back.encode(x)
    assert len(ours.values) > 0
    torch.testing.assert_close(ours.to_dense(D_SAE), theirs.to_dense(D_SAE), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sae.decode(ours), back.decode(theirs), rtol=1e-5, atol=1e-4)


def test_what_formats_express():
    rules = {kind: rule_of(build(kind)) for kind in KINDS}
    assert rules["topk"] == "topk"
    assert rules["batch_topk"] == "threshold"


@pytest.mark.parametrize("format_", sorted(FORMATS))
def test_an_export_takes_the_place_of_an_export_only(format_, tmp_path):
    export(build("topk"), tmp_path, format_, origin=ORIGIN)
    second = build("topk", seed=1)
    export(second, tmp_path, format_, origin=ORIGIN)
    assert torch.equal(load(tmp_path).b_dec, second.b_dec)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        export(second, tmp_path, format_, origin=ORIGIN)
    with pytest.raises(ConfigError, match="a file"):
        export(second, tmp_path / "notes.txt", format_, origin=ORIGIN)


@pytest.mark.parametrize("format_", sorted(FORMATS))
@pytest.mark.parametrize("file", [0, 1])
def test_an_interrupted_export_leaves_the_earlier_one_or_nothing(format_, file, tmp_path, monkeypatch):
    first, second = build("topk"), build("topk", seed=1)
    target, interrupted = FORMATS[format_].files[file], [True]

    def stop(descriptor):
        # links to open files tell which one is flushed
        if interrupted[0] and target in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        export(first, tmp_path, format_, origin=ORIGIN)
    assert not list(tmp_path.iterdir())
    interrupted[0] = False
    export(first, tmp_path, format_, origin=ORIGIN)
    interrupted[0] = True
    with pytest.raises(KeyboardInterrupt):
        export(second, tmp_path, format_, origin=ORIGIN)
    assert torch.equal(load(tmp_path).b_dec, first.b_dec)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FORMATS[format_].files)


@pytest.mark.parametrize("format_", sorted(FORMATS))
def test_new_weights_never_lie_beside_old_settings(format_, tmp_path, monkeypatch):
    export(build("topk"), tmp_path, format_, origin=ORIGIN)
    settings, weights = FORMATS[format_].files
    replace = Path.replace

    def stop(path, target):
        if path.name == settings and path.parent.name == ".partial":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export(build("topk", seed=1), tmp_path, format_, origin=ORIGIN)
    assert [p.name for p in tmp_path.iterdir()] == [weights]
    with pytest.raises(CheckpointError):
        load(tmp_path, format_)


def test_an_interrupted_write_leaves_no_file_beside(tmp_path, monkeypatch):
    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save_sae(build("topk"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "index.json", b"{}")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "cfg.json").write_text("{")
    export(build("topk"), tmp_path, "saelens", origin=ORIGIN)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_what_a_format_cannot_express_costs_no_earlier_export(tmp_path):
    first = build("topk")
    export(first, tmp_path, "sparsify", origin=ORIGIN)
    with pytest.raises(CheckpointError, match="sparsify cannot express"):
        export(build("relu"), tmp_path, "sparsify", origin=ORIGIN)
    assert torch.equal(load(tmp_path).b_dec, first.b_dec)


@pytest.mark.parametrize("format_", ["saelens", "dictionary_learning", "sparsify"])
def test_no_more_features_are_asked_of_a_row_than_there_are(format_, tmp_path):
    sae = parse_config(SAEConfig, {"kind": "topk", "d_sae": 4, "k": 8}, where="test").build(
        3, generator=torch.Generator()
    )
    sae.folded = True
    export(sae, tmp_path, format_, origin=ORIGIN)
    settings = json.loads((tmp_path / FORMATS[format_].files[0]).read_text())
    assert settings.get("trainer", settings)["k"] == 4
    if format_ == "dictionary_learning":
        assert torch.load(tmp_path / "ae.pt", weights_only=True)["k"] == 4


def test_origin_is_kept_in_each_librarys_words(tmp_path):
    sae = build("batch_topk")
    export(sae, tmp_path / "a", "saelens", origin=ORIGIN)
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu" and (cfg["d_in"], cfg["d_sae"]) == (D_IN, D_SAE)
    assert cfg["metadata"]["hook_name"] == "layers.2" and cfg["metadata"]["context_size"] == 24
    export(sae, tmp_path / "b", "dictionary_learning", origin=ORIGIN)
    trainer = json.loads((tmp_path / "b" / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "BatchTopKSAE" and trainer["k"] == K
    assert trainer["layer"] == 2 and trainer["lm_name"] == "credit_transformer"
    export(build("topk"), tmp_path / "c", "sparsify", origin=Origin())
    assert json.loads((tmp_path / "c" / "cfg.json").read_text())["num_latents"] == D_SAE


def test_dictionary_learning_weights_hold_tensors_only(tmp_path):
    export(build("topk"), tmp_path, "dictionary_learning", origin=ORIGIN)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    export(build("topk"), tmp_path / "out", "dictionary_learning", origin=ORIGIN)
    torch.save({"encoder.weight": Trap()}, tmp_path / "out" / "ae.pt")
    with pytest.raises(CheckpointError, match=r"ae\.pt"):
        load(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_dictionary_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no dictionary of a known format"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="onnx"):
        load(tmp_path, "onnx")
    raw = parse_config(SAEConfig, {"kind": "topk", "d_sae": 8, "k": 2}, where="test").build(
        4, generator=torch.Generator()
    )
    with pytest.raises(CheckpointError, match="scaled"):
        export(raw, tmp_path, "saelens", origin=ORIGIN)
    export(build("topk"), tmp_path, "saelens", origin=ORIGIN)
    export(build("topk"), tmp_path / "x", "sparsify", origin=ORIGIN)
    (tmp_path / "x" / "sae.safetensors").rename(tmp_path / "sae.safetensors")
    with pytest.raises(CheckpointError, match="several formats"):
        load(tmp_path)
    assert load(tmp_path, "saelens").config.kind == "topk"


@pytest.mark.parametrize(
    ("format_", "change", "says"),
    [
        ("saelens", {"normalize_activations": "layer_norm"}, "normalises every row"),
        (
            "saelens",
            {"normalize_activations": "expected_average_only_in"},
            "(?s)rescaled.*fold_activation_norm",
        ),
        ("saelens", {"normalize_activations": True}, "(?s)rescaled.*fold_activation_norm"),
        ("saelens", {"architecture": "transcoder"}, "transcoder"),
        ("saelens", {"k": None}, "damaged"),
        ("saelens", {"k": 0}, "(?s)damaged.*k 0"),
        ("sparsify", {"transcode": True}, "transcode"),
        ("sparsify", {"skip_connection": True}, "skip_connection"),
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("sparsify", {"k": "many"}, "'many'"),
        ("sparsify", {"k": 0}, "k 0"),
        ("dictionary_learning", {"trainer": {"dict_class": "CrossCoder"}}, "CrossCoder"),
        ("dictionary_learning", {"trainer": None}, "dict_class None"),
    ],
)
def test_what_cannot_be_expressed_here_is_refused(format_, change, says, tmp_path):
    export(build("topk"), tmp_path, format_, origin=ORIGIN)
    path = tmp_path / FORMATS[format_].files[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


@pytest.mark.parametrize("format_", sorted(FORMATS))
def test_damage_is_found(format_, tmp_path):
    export(build("topk"), tmp_path, format_, origin=ORIGIN)
    settings, weights = (tmp_path / name for name in FORMATS[format_].files)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=weights.name):
        load(tmp_path)
    weights.write_bytes(whole)
    settings.write_text("{")
    with pytest.raises(CheckpointError, match=settings.name):
        load(tmp_path)


def rewrite(folder, format_, change):
    """Put other tensors in the place of an export's own."""
    path = folder / FORMATS[format_].files[1]
    tensors = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    changed = {name: value.contiguous() for name, value in (tensors | change(tensors)).items()}
    if path.suffix == ".pt":
        torch.save(changed, path)
    else:
        save_file(changed, path)


OTHERS = [
    ("saelens", "topk", "W_dec"),
    ("saelens", "jumprelu", "W_dec"),
    ("saelens", "gated", "W_dec"),
    ("sparsify", "topk", "W_dec"),
    ("dictionary_learning", "topk", "decoder.weight"),
    ("dictionary_learning", "relu", "decoder.weight"),
    ("dictionary_learning", "jumprelu", "W_dec"),
]


@pytest.mark.parametrize(("format_", "kind", "decoder"), OTHERS)
def test_tensors_that_do_not_fit_together_are_said_to(format_, kind, decoder, tmp_path):
    export(build(kind), tmp_path / "whole", format_, origin=ORIGIN)
    if format_ == "saelens":
        # biases are converted then, before there is a dictionary
        path = tmp_path / "whole" / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"apply_b_dec_to_input": False}))
    weights = FORMATS[format_].files[1]
    for wrong in (lambda t: t[0], lambda t: t[:, 1:], lambda t: t[1:], lambda t: t[:0]):
        out = shutil.copytree(tmp_path / "whole", tmp_path / "changed", dirs_exist_ok=True)
        rewrite(out, format_, lambda tensors, wrong=wrong: {decoder: wrong(tensors[decoder])})
        with pytest.raises(CheckpointError, match=rf"(?s){weights} do not fit together.*{decoder} \["):
            load(out)


def test_one_threshold_is_one_number(tmp_path):
    export(build("batch_topk"), tmp_path, "dictionary_learning", origin=ORIGIN)
    rewrite(tmp_path, "dictionary_learning", lambda tensors: {"threshold": torch.ones(1)})
    assert float(load(tmp_path).threshold) == 1
    rewrite(tmp_path, "dictionary_learning", lambda tensors: {"threshold": torch.ones(2)})
    with pytest.raises(CheckpointError, match="do not fit together"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("format_", "kind", "decoder"), OTHERS)
def test_weights_that_are_not_finite_are_named(format_, kind, decoder, value, tmp_path):
    export(build(kind), tmp_path, format_, origin=ORIGIN)

    def spoil(tensors):
        spoilt = tensors[decoder].clone()
        spoilt[1, 2] = value
        return {decoder: spoilt}

    rewrite(tmp_path, format_, spoil)
    with pytest.raises(CheckpointError, match=rf"(?s)not finite.*in {decoder}\n"):
        load(tmp_path)


def test_weights_of_our_own_that_are_not_finite_are_named(tmp_path):
    sae = build("topk")
    sae.b_enc.data[3] = float("inf")
    save_sae(sae, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)not finite.*in b_enc\n"):
        load(tmp_path)


def test_features_that_write_nothing_fall_silent_and_short_rows_count(tmp_path):
    generator = torch.Generator().manual_seed(0)
    W_enc, decoder = torch.randn(2, D_SAE, D_IN, generator=generator)
    decoder[2], decoder[5] = 0, decoder[5] * 1e-12
    W_enc[5] *= 1e12
    b_enc, b_dec = torch.randn(D_SAE, generator=generator), torch.randn(D_IN, generator=generator)
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": decoder.T, "bias": b_dec}
    torch.save(tensors, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    sae, x = load(tmp_path), rows()
    codes = sae.encode(x)
    z = ((x - b_dec).double() @ W_enc.double().T + b_enc.double()).clamp(min=0)
    expected = z @ decoder.double() + b_dec
    torch.testing.assert_close(sae.decode(codes).double(), expected, rtol=1e-4, atol=1e-3)
    assert int((codes.features == 2).sum()) == 0 and int((codes.features == 5).sum()) > 0
    assert all(bool(p.isfinite().all()) for p in sae.parameters())


def test_topk_by_the_norm_of_the_decoder_with_rows_of_no_length(tmp_path):
    export(build("topk"), tmp_path, "saelens", origin=ORIGIN)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_acts_by_decoder_norm": True}))
    norms = torch.linspace(0, 3, D_SAE)
    rewrite(tmp_path, "saelens", lambda tensors: {"W_dec": norms[:, None] * tensors["W_dec"]})
    theirs, x = load_file(tmp_path / "sae_weights.safetensors"), rows()
    codes = load(tmp_path).encode(x).to_dense(D_SAE)
    norms = theirs["W_dec"].norm(dim=1)
    z = ((x - theirs["b_dec"]) @ theirs["W_enc"] + theirs["b_enc"]) * norms
    kept = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values).clamp(min=0)
    torch.testing.assert_close(codes, kept, rtol=1e-4, atol=1e-3)
    assert bool((codes[:, 0] == 0).all())
