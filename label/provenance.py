"""What a run's record says of how its outputs were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def configuration(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that the labels of a run were made with, or else its finished outputs.

    The one on record is that of the last command, which may have done a part of it only, or something else: of what a
    stage read when it made its output, its own record tells.
    """
    config = dict(run.get("config", {}))
    for inputs in _inputs(run.get("stages", {})):
        for name, value in inputs.items():
            # a sweep is on record as the dictionaries that it came to
            if name not in config or name == "sweep":
                continue
            given = config[name]
            same = isinstance(value, Mapping) and isinstance(given, Mapping)
            # what does not change an output, such as how often a log is written, is not in its record
            beside = given if same and given.get("kind") == value.get("kind") else {}
            config[name] = {**beside, **value} if isinstance(value, Mapping) else value
    return config


def _inputs(stages: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what was read by the stages that the labels came after, and by labelling; without labels, by all finished."""
    finished = {
        name: stage.get("inputs", {}) for name, stage in stages.items() if stage.get("output") is not None
    }
    names = ["label"] if "label" in finished else list(finished)
    for name in names:
        before = (key.removeprefix("after ") for key in finished[name] if key.startswith("after "))
        names += [other for other in before if other in finished and other not in names]
    # a twin's settings are those of the dictionary that it is compared with, or out of date
    return [finished[name] for name in names if not name.endswith("twin")]


def dictionary_stage(run: Mapping[str, Any]) -> str:
    """Return the stage that made the dictionary which labels speak of, or will."""
    labelled = run.get("stages", {}).get("label", {}).get("inputs", {})
    for name in ("train", "import"):
        if f"after {name}" in labelled:
            return name
    return "import" if run.get("config", {}).get("dictionary") else "train"
