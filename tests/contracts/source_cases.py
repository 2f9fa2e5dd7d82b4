"""The cases: source, model and hooks of each; at least one for every kind of source."""

import numpy as np

from sae.world import World

HERE = "tests.contracts.source_models"


def module(adapter="to_inputs"):
    return {
        "kind": "module",
        "import": f"{HERE}:recurrent",
        "adapter": f"{HERE}:{adapter}",
        "arguments": {"width": 7},
    }


def source_case(name, place, folder_of):
    def pretrained(folder, **more):
        return {"kind": "pretrained", "path": str(folder_of(folder)), **more}

    t5 = {"architecture": "T5EncoderModel"}
    words = {"kind": "text", "path": str(place / "texts" / "*.txt"), "length": 16}
    at = {"path": str(place / "at.parquet"), "entity": "who", "time": "when"}
    files = {"kind": "tensors", "path": [str(place / "a.npy"), str(place / "b.npy")]}
    happened = {
        "kind": "events",
        "path": str(place / "events.parquet"),
        "entity": "account",
        "time": "day",
        "columns": {
            "amount": "amount",
            "out": "CASE WHEN kind = 'out' THEN 1 ELSE 0 END",
            "abs": "abs(amount)",
        },
    }
    return {
        "synthetic": (
            {"kind": "synthetic", "entities": 430, "rows_per_entity": 3, "n_directions": 8, "d_in": 6},
            None,
            [],
        ),
        "panel": ({"kind": "panel"}, {"kind": "credit_transformer"}, ["layers.*", "default_head:in"]),
        "panel, module": ({"kind": "panel"}, module(), ["gru[0]", "twice@1", "twice:in", "embed"]),
        "panel, module, left padding": ({"kind": "panel"}, module("to_inputs_left"), ["embed"]),
        "panel, module, fields": ({"kind": "panel"}, module("to_inputs_fields"), ["per_field", "twice"]),
        "tensors, npy": (files, None, []),
        "tensors, coordinates": ({**files, "coordinates": at}, None, []),
        "tensors, safetensors": (
            {"kind": "tensors", "path": str(place / "x.safetensors"), "key": "acts", "hook": "h"},
            None,
            [],
        ),
        "tensors, bfloat16": ({"kind": "tensors", "path": str(place / "bf16.safetensors")}, None, []),
        "tensors, lists": ({"kind": "tensors", "path": str(place / "lists.parquet")}, None, []),
        "tensors, columns": ({"kind": "tensors", "path": str(place / "columns.parquet")}, None, []),
        "batches": ({"kind": "batches", "import": f"{HERE}:batches"}, module(), ["gru[0]", "twice"]),
        "events": (happened, module(), ["gru[0]"]),
        "events, ordered": ({**happened, "order": "seq"}, module(), ["gru[0]"]),
        "text, bert": (words, pretrained("bert"), ["encoder.layer.*"]),
        "text, bert, lines, special": (
            {**words, "document": "line", "special_tokens": "keep"},
            pretrained("bert"),
            ["encoder.layer.1"],
        ),
        "text, gpt2, packed": ({**words, "packed": True}, pretrained("gpt2"), ["h.1"]),
        "text, llama": (words, pretrained("llama"), ["layers.1"]),
        "text, t5, packed": ({**words, "packed": True}, pretrained("t5", **t5), ["encoder.block.1[0]"]),
        "timeseries, patchtst": ({"kind": "timeseries"}, pretrained("patchtst"), ["encoder.layers.*[0]"]),
        "timeseries, patchtst, cls": (
            {"kind": "timeseries"},
            pretrained("patchtst_cls"),
            ["encoder.layers.1[0]"],
        ),
        "timeseries, tst": ({"kind": "timeseries"}, pretrained("tst"), ["encoder.layers.1"]),
    }[name]


CASES = [
    "synthetic",
    "panel",
    "panel, module",
    "panel, module, left padding",
    "panel, module, fields",
    "tensors, npy",
    "tensors, coordinates",
    "tensors, safetensors",
    "tensors, bfloat16",
    "tensors, lists",
    "tensors, columns",
    "batches",
    "events",
    "events, ordered",
    "text, bert",
    "text, bert, lines, special",
    "text, gpt2, packed",
    "text, llama",
    "text, t5, packed",
    "timeseries, patchtst",
    "timeseries, patchtst, cls",
    "timeseries, tst",
]


def collect(source, world=None, cursor=0):
    return list(source.batches(world or World(), cursor))


def table_of(found):
    """Return (entity, position, time, split) and activations of all batches, sorted."""
    at = np.concatenate([np.stack([b.entity, b.position, b.time, b.split], 1) for b in found])
    order = np.lexsort(at.T[::-1])
    return at[order], {h: np.concatenate([b.acts[h] for b in found])[order] for h in found[0].acts}


def same(a, b):
    assert a.cursor == b.cursor
    assert a.acts.keys() == b.acts.keys()
    assert all(np.array_equal(a.acts[h], b.acts[h]) for h in a.acts)
    assert all(np.array_equal(x, y) for x, y in zip(a[1:5], b[1:5], strict=True))
