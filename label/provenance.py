"""What a run's record says of how its outputs were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def configuration(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that the finished outputs of a run were made with.

    The one on record is that of the last command, which may have done a part of it only: of what a stage read when it
    made its output, its own record tells.
    """
    config = dict(run.get("config", {}))
    for stage in run.get("stages", {}).values():
        if not stage.get("output"):
            continue
        for name, value in stage.get("inputs", {}).items():
            # a sweep is on record as the dictionaries that it came to
            if isinstance(value, Mapping) and isinstance(config.get(name), Mapping) and name != "sweep":
                # what does not change an output, such as how often a log is written, is not in its record
                same_kind = config[name].get("kind") == value.get("kind")
                config[name] = {**(config[name] if same_kind else {}), **value}
    return config


def dictionary_stage(run: Mapping[str, Any]) -> str:
    """Return the stage that made the dictionary which labels speak of, or will."""
    labelled = run.get("stages", {}).get("label", {}).get("inputs", {})
    for name in ("train", "import"):
        if f"after {name}" in labelled:
            return name
    return "import" if run.get("config", {}).get("dictionary") else "train"
