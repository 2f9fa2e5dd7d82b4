"""The tables of a finished labelling: the contract between who writes them and every reader (report, browser, export)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import ConfigError

FORMAT_VERSION = 1

_F, _I, _S, _B = pa.float64(), pa.int64(), pa.string(), pa.bool_()


def _measured(*names: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{n}{end}", _F) for n in names for end in ("", "_low", "_high")]


MEASURES = _measured("skill", "ap", "lift", "f1", "precision", "recall")
SUPPORT = [
    ("prevalence", _F),
    ("n_entities", _I),
    ("n_entities_without", _I),
    ("n_entities_firing", _I),
    ("p_value", _F),
    ("q_value", _F),
]

FEATURES = pa.schema(
    [
        ("feature", _I),
        ("status", _S),  # labelled, unlabelled
        ("reason", _S),  # null where labelled
        ("description", _S),
        ("title", _S),  # the concept with its interval; null without a candidate
        ("concept", _S),  # the best concept on discover, labelled or not
        ("low", _F),  # its interval of values, low <= value < high; null = open, or not numeric
        ("high", _F),
        ("category", _S),
        ("threshold", _F),  # fires strictly above, raw activation units
        *MEASURES,
        *SUPPORT,
        ("firing_rate", _F),  # on confirm, any positive value
        ("firing_rate_discover", _F),
        ("mean_activation", _F),  # where it fires, on confirm
        ("max_activation", _F),
        ("learned", _B),
        ("raw_column", _S),
        ("raw_skill", _F),
        *_measured("over_raw"),  # skill minus the raw column's, paired by entity
        ("twin_feature", _I),
        ("twin_skill", _F),
        *_measured("over_twin"),
        ("used", _B),
        *_measured(
            "effect", "effect_size"
        ),  # change of the default logit when removed: mean, and mean absolute
        ("effect_share", _F),  # of what removing all features moves
        ("effect_entities", _I),
        ("random_size", _F),
        *_measured("over_random"),
        ("matched_size", _F),
        *_measured("over_matched"),
        ("clock_skill", _F),
        ("control", _S),
        ("control_skill", _F),
        ("rivals", pa.list_(_S)),
    ]
)

ASSOCIATIONS = pa.schema(
    [
        ("feature", _I),
        ("concept", _S),
        ("family", _S),  # concept, clock, hash, persistent, permuted
        ("low", _F),
        ("high", _F),
        (
            "rank",
            _I,
        ),  # among the feature's concepts by skill on discover; -1 = the concept's best feature only
        ("threshold", _F),
        ("auroc_discover", _F),
        ("skill_discover", _F),
        ("f1_discover", _F),
        *MEASURES,
        *SUPPORT,
        ("statistic", _F),
        ("null_center", _F),  # of the statistic when trajectories are permuted, on as many rows
        ("null_width", _F),  # upwards; at least 1
    ]
)

CONCEPTS = pa.schema(
    [
        ("concept", _S),
        ("text", _S),
        ("category", _S),
        ("kind", _S),
        ("type", _S),  # bool, float
        ("risk", _S),
        ("applicable", _B),
        ("reason", _S),  # why it is not
        ("known_share", _F),  # rows of confirm on which it applies
        ("feature", _I),  # the best on discover, labelled or not
        ("low", _F),
        ("high", _F),
        ("threshold", _F),
        *MEASURES,
        *SUPPORT,
        ("n_labelled", _I),  # features whose label is this concept
        ("raw_column", _S),
        ("raw_skill", _F),
        ("twin_feature", _I),
        ("twin_skill", _F),
    ]
)

GROUPS = pa.schema(
    [
        ("concept", _S),
        ("title", _S),
        ("low", _F),
        ("high", _F),
        ("features", pa.list_(_I)),
        ("thresholds", pa.list_(_F)),
        ("f1_discover", _F),
        *_measured("f1", "precision", "recall"),
        ("prevalence", _F),
        ("n_entities", _I),
        ("single_f1", _F),  # of the group's first feature alone, on confirm
    ]
)

EXAMPLES = pa.schema(
    [
        ("feature", _I),
        (
            "band",
            _S,
        ),  # top, middle, low, near_miss (concept true, silent), false_alarm (fires, concept false)
        ("example", _I),  # number within the band
        ("entity", _S),  # the user's id
        ("position", _I),
        ("time", _I),
        ("activation", _F),
        ("concept_true", _B),  # null where it does not apply
        # then one double per canonical column of the panel, `raw_<name>`
    ]
)

HISTOGRAMS = pa.schema(
    [("feature", _I), ("low", _F), ("high", _F), ("n_true", _I), ("n_false", _I), ("n_unknown", _I)]
)

EFFECTS = pa.schema([("feature", _I), ("entity", _S), ("change", _F)])  # of the default logit when removed

SCHEMAS = {
    "features": FEATURES,
    "associations": ASSOCIATIONS,
    "concepts": CONCEPTS,
    "groups": GROUPS,
    "examples": EXAMPLES,
    "histograms": HISTOGRAMS,
    "effects": EFFECTS,
}


def write_table(
    folder: Path, name: str, records: Iterable[Mapping[str, Any]], *, extra: Iterable[str] = ()
) -> None:
    """Write one table; columns a record lacks are null.

    Parameters
    ----------
    extra
        Further columns of doubles after the schema's own.
    """
    schema = SCHEMAS[name]
    for column in extra:
        schema = schema.append(pa.field(column, _F))
    rows = list(records)
    unknown = {key for row in rows for key in row} - set(schema.names)
    if unknown:
        raise KeyError(f"{name}: no column for {sorted(unknown)}")
    columns = {
        field.name: pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema
    }
    table = pa.table(columns, schema=schema)
    pq.write_table(
        table.replace_schema_metadata({"format_version": str(FORMAT_VERSION)}), folder / f"{name}.parquet"
    )


def read_table(folder: Path, name: str) -> pa.Table:
    """Read one table of a labels folder.

    Raises
    ------
    ConfigError
        It is missing or damaged, or has another format version.
    """
    path = folder / f"{name}.parquet"
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"cannot read the labels {path}", got=" ".join(str(error).split()), do="`assay label` again"
        ) from error
    version = (table.schema.metadata or {}).get(b"format_version", b"").decode()
    if version != str(FORMAT_VERSION):
        raise ConfigError(f"{path} is of another version", got=repr(version), expected=str(FORMAT_VERSION))
    return table


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json.

    Raises
    ------
    ConfigError
        There is none.
    """
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"there are no labels in {folder}",
            got="no summary.json",
            do="`assay run` with the sections concepts and label writes them",
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{folder / 'summary.json'} is damaged", got=str(error), do="`assay label` again"
        ) from error
    if not isinstance(summary, dict) or summary.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{folder / 'summary.json'} is no summary of labels, or one of another version",
            expected=f"format_version {FORMAT_VERSION}",
        )
    return summary
