"""The card of an exported dictionary: what it is, what it may be used for, and how far the evidence goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from activations_cache.tables import written_period

from .decide import REASONS

N_SHOWN = 25
"""Labelled features listed on the card; all are in features.parquet."""


def card(dictionary: Mapping[str, Any], features: Sequence[Mapping[str, Any]]) -> str:
    """Return the card as Markdown.

    Parameters
    ----------
    dictionary
        dictionary.json.
    features
        Rows of features.parquet with their column names.
    """
    parts = [
        f"# {dictionary['name']}: dictionary of features",
        _what(dictionary),
        "## Use and limits",
        _LIMITS,
        "## Evidence",
        _evidence(dictionary),
        "## Why features carry no label",
        _reasons(dictionary["counts"]),
        "## Faithfulness gap",
        _gap(dictionary),
        f"## The strongest labels ({N_SHOWN} at most)",
        _strongest(features),
        "## Not recorded here",
        _MISSING,
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = """- A label explains a direction in a network, not a customer decision.
- Not for adverse action notices, unless the reason is derived from factors actually scored and the
  attribution from input to feature to score is tested for that purpose.
- It holds for the model, the place in it, and the population named above. Another population needs new
  evidence.
- A feature counts as firing strictly above its threshold, in raw activation units. Thresholds are frozen.
- "Labelled" alone says only that feature and concept go together. "Learned" says that neither a raw column
  nor an untrained network shows as much; "used" says that the model's default logit depends on it."""

_MISSING = """Stability over seeds and dictionary sizes, behaviour on later periods, relation to protected
attributes and their proxies, and a human review with its decision and expiry. Without them the dictionary is
a description, not an approved model document."""


def _what(d: Mapping[str, Any]) -> str:
    model, data, counts = d["provenance"]["model"], d["provenance"]["data"], d["counts"]
    lines = [
        f"{_n(counts['n_features'])} features learned on the activations of `{d['hook']}` "
        f"(model: {model['kind'] or 'unknown'}, weights {model['weights'] or 'not recorded'}).",
        f"Headline: **{_n(counts['n_learned_and_used'])} labelled, learned and used**; "
        f"{_n(counts['n_used'])} labelled and used; {_n(counts['n_labelled'])} labelled.",
    ]
    if data.get("rows"):
        first, last = (
            written_period(data[f"{end}_period"], data.get("calendar")) for end in ("first", "last")
        )
        lines.append(
            f"Population: {data.get('product')} panel, {_n(data['entities'])} entities, {_n(data['rows'])} "
            f"rows, periods {first} to {last}."
        )
    sae = d["sae"]
    lines.append(
        f"Dictionary: {sae.get('kind')}, k {sae.get('k')}, seed {d['provenance']['seed']}; written "
        f"{d['created']}."
    )
    return "\n".join(f"- {line}" for line in lines)


def _evidence(d: Mapping[str, Any]) -> str:
    rule = d["label_rule"]
    lines = [
        "Thresholds and candidate concepts were chosen on discovery entities; every figure is from "
        "confirmation entities, with 95% intervals from bootstraps of whole entities.",
    ]
    if rule:
        lines.append(
            f"A label needs a lower end of skill of {rule.get('min_skill')}, an F1 of {rule.get('min_f1')}, "
            f"an adjusted p of at most {rule.get('max_q')}, and {rule.get('min_entities')} entities on each "
            "side."
        )
    controls = ", ".join(f"{name} {_n(n)}" for name, n in d["controls"].items())
    lines.append(
        f"Features that negative controls would label under the same rule: {controls or 'not assessed'}."
    )
    return "\n".join(f"- {line}" for line in lines)


def _reasons(counts: Mapping[str, Any]) -> str:
    texts: dict[str, str] = {str(k): v for k, v in REASONS.items()}
    rows = sorted((counts["reasons"] or {}).items(), key=lambda item: -item[1])
    body = [f"| {name} | {_n(n)} | {texts.get(name, '')} |" for name, n in rows]
    return "\n".join(["| reason | features | meaning |", "| --- | ---: | --- |", *body])


def _gap(d: Mapping[str, Any]) -> str:
    f, removal = d["fidelity"] or {}, d["removal"]
    lines = [
        f"Variance of the activations that is not reconstructed: {_f(f.get('fvu'))}; {_f(f.get('l0'), 1)} "
        "features active per row.",
        f"AUC of the model {_f(f.get('auc_model'))}, with the reconstruction in place "
        f"{_f(f.get('auc_spliced'))}, of a reference model {_f(f.get('auc_reference'))}.",
        f"Mean absolute change of the PD by the reconstruction: {_f(f.get('mean_abs_dpd'), 4)}.",
    ]
    if removal:
        lines.append(
            "Removing all used features together moves the default logit by "
            f"{_f(removal.get('used_together'))}, removing every feature by "
            f"{_f(removal.get('all_features'))} (mean absolute change)."
        )
    return "\n".join(f"- {line}" for line in lines)


def _strongest(features: Sequence[Mapping[str, Any]]) -> str:
    labelled = [f for f in features if f["status"] == "labelled"]
    labelled.sort(key=lambda f: (not (f["learned"] and f["used"]), not f["used"], -(f["skill"] or 0.0)))
    if not labelled:
        return "No feature carries a label."
    body = [
        f"| `{f['column']}` | {_cell(f['title'])} | {_f(f['skill'])} [{_f(f['skill_low'])}, "
        f"{_f(f['skill_high'])}] | {_verdict(f['learned'])} | {_verdict(f['used'])} |"
        for f in labelled[:N_SHOWN]
    ]
    return "\n".join(
        ["| column | what it encodes | skill | learned | used |", "| --- | --- | --- | --- | --- |", *body]
    )


def _cell(text: object) -> str:
    """Return text that stays within a Markdown table and is no HTML."""
    shown = str(text).replace("\n", " ")
    for sign in ("\\", "|", "<", ">", "`", "*", "_", "[", "]"):
        shown = shown.replace(sign, f"\\{sign}")
    return shown


def _verdict(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not assessed"}[value]


def _n(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"


def _f(value: float | None, digits: int = 3) -> str:
    return "not assessed" if value is None else f"{value:.{digits}f}"
