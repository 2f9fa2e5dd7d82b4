"""Which configuration outputs were made with, where the last command had another."""

from __future__ import annotations

from label.provenance import configuration, dictionary_stage

RUN = {
    "config": {
        "seed": 5,
        "twin": False,
        "label": None,
        "dictionary": {"path": "theirs"},
        "sae": {"kind": "topk", "k": 8},
        "train": {"lr": 0.1, "log_every": 10},
        "sweep": None,
    },
    "stages": {
        "train": {
            "output": "sae/a",
            "inputs": {
                "version": 3,
                "sae": {"kind": "batch_topk", "k": 16},
                "train": {"lr": 0.2},
                "seed": 0,
                "sweep": {"b": {}},
            },
        },
        "train twin": {"output": "twin/sae/a", "inputs": {"sae": {"kind": "topk", "k": 4}, "seed": 0}},
        "import": {"output": "sae/imported", "inputs": {"dictionary": {"path": "other"}}},
        "label": {
            "output": "labels",
            "inputs": {
                "label": {"min_f1": 0.5},
                "seed": 0,
                "twin": True,
                "after train": "x",
                "after train twin": "y",
                "after evaluate": None,
            },
        },
    },
}


def test_labels_are_told_of_with_what_they_and_their_dictionary_were_made_with():
    assert configuration(RUN) == {
        "seed": 0,
        "twin": True,
        "label": {"min_f1": 0.5},
        "dictionary": {"path": "theirs"},
        "sae": {"kind": "batch_topk", "k": 16},
        "train": {"lr": 0.2, "log_every": 10},
        "sweep": None,
    }
    assert dictionary_stage(RUN) == "train"


def test_without_labels_every_finished_output_counts_and_without_records_the_configuration():
    unlabelled = {**RUN, "stages": {k: v for k, v in RUN["stages"].items() if k != "label"}}
    assert configuration(unlabelled)["dictionary"] == {"path": "other"}
    assert configuration(unlabelled)["label"] is None
    assert dictionary_stage(unlabelled) == "import"
    unfinished = {**RUN, "stages": {"train": {"begun": "x", "begun_inputs": {"seed": 7}}}}
    assert configuration(unfinished) == RUN["config"]
