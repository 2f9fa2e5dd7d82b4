"""Several dictionaries from one read of a store: which ones a sweep asks for, and what they are called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sae.base import SAEConfig
from sae.config import SEEDS, parse_config
from sae.errors import ConfigError

from .plan import TrainConfig, make_plan

Sweep = dict[str, list[Any]] | list[dict[str, Any]]
"""A grid, keys to lists of values, or a list of overrides; keys are `sae.NAME`, `train.lr` and `seed`."""

_IN_NAME = {"sae.kind", "sae.d_sae", "sae.k", "seed"}


@dataclass(frozen=True)
class Member:
    """One dictionary of a sweep.

    Attributes
    ----------
    name
        kind-d_sae-k-seed, and after it what else differs from the base configuration.
    sae, train, seed
        The dictionary, its training, and the seed of its initial directions.
    """

    name: str
    sae: SAEConfig
    train: TrainConfig
    seed: int


def make_members(
    sae: SAEConfig, train: TrainConfig, seed: int, sweep: Sweep | None = None
) -> tuple[Member, ...]:
    """Return the dictionaries that a configuration asks for, that of its own sections first.

    In a sweep all members read the same batches: `train.rows: auto` is the largest that a member would take
    alone, and `train.batch_size: auto` follows from it. A member of another kind leaves out the settings of
    section `sae` that its kind does not have.

    Raises
    ------
    ConfigError
        A training cannot be planned, a key cannot be swept, a value is wrong, or two members are the same; all
        such problems of a sweep at once.
    """
    make_plan(train, sae)
    base = Member(_name(sae, seed, {}), sae, train, seed)
    if sweep is None:
        return (base,)
    members, problems = [base], list[str]()
    for where, _, member in _parsed(base, sweep, problems):
        if any(other.name == member.name for other in members[1:]):
            problems.append(f"{where}: {member.name} is there already")
        elif member.name != base.name:
            members.append(member)
    if not problems and len(members) == 1:
        problems.append("sweep: it has no member besides the dictionary of section sae")
    if problems:
        raise ConfigError("\n".join(problems))
    rows = max(make_plan(member.train, member.sae).rows for member in members)
    batch_size = make_plan(train.model_copy(update={"rows": rows}), sae).batch_size
    shared = {"rows": rows, "batch_size": batch_size}
    return tuple(replace(m, train=m.train.model_copy(update=shared)) for m in members)


def drop_same(sae: SAEConfig, train: TrainConfig, seed: int, sweep: Sweep) -> Sweep | None:
    """Return the overrides that make other dictionaries than that of section sae, each once; None where none does.

    For numbers that were `auto`: nobody could know that a member would come to the same.

    Raises
    ------
    ConfigError
        As `make_members`.
    """
    base = Member(_name(sae, seed, {}), sae, train, seed)
    members: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for _, overrides, member in _parsed(base, sweep, problems):
        members.setdefault(member.name, overrides)
    if problems:
        raise ConfigError("\n".join(problems))
    members.pop(base.name, None)
    return list(members.values()) or None


def _parsed(base: Member, sweep: Sweep, problems: list[str]) -> Iterator[tuple[str, dict[str, Any], Member]]:
    """Yield where each member stands, its overrides and the member; what is wrong with others joins `problems`."""
    for number, overrides in enumerate(_listed(sweep)):
        where = f"sweep, member {number + 1}"
        try:
            yield where, overrides, _override(base, overrides, where=where)
        except ConfigError as error:
            problems.append(str(error))


def _listed(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the overrides of each member; of a grid, the last key varies fastest."""
    if isinstance(sweep, list):
        return sweep
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _override(base: Member, overrides: Mapping[str, Any], *, where: str) -> Member:
    wrong = [key for key in overrides if not (key.startswith("sae.") or key in ("train.lr", "seed"))]
    if wrong:
        raise ConfigError(
            f"{where}: {', '.join(wrong)} cannot differ between dictionaries that share their batches",
            expected="sae.NAME, train.lr, seed",
        )
    seed = overrides.get("seed", base.seed)
    if type(seed) is not int or seed not in SEEDS:
        raise ConfigError(f"{where}: seed is no number from 0 to {SEEDS[-1]}", got=repr(seed))
    changed = {key.removeprefix("sae."): v for key, v in overrides.items() if key.startswith("sae.")}
    sae = parse_config(SAEConfig, {**_kept(base.sae, changed), **changed}, where=f"{where}, section sae")
    lr = overrides.get("train.lr", base.train.lr)
    train = parse_config(TrainConfig, {**base.train.to_dict(), "lr": lr}, where=f"{where}, section train")
    try:
        make_plan(train, sae)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    before = {"train.lr": base.train.lr, **{f"sae.{name}": v for name, v in base.sae.to_dict().items()}}
    now = {"train.lr": train.lr, **{f"sae.{name}": v for name, v in sae.to_dict().items()}}
    told = {key: now[key] for key in overrides if key not in _IN_NAME and before.get(key) != now[key]}
    return Member(_name(sae, seed, told), sae, train, seed)


def _kept(sae: SAEConfig, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the base that a member keeps: those given, and known to the member's kind."""
    given = {"kind": sae.kind, **sae.model_dump(mode="json", exclude_unset=True)}
    kind = SAEConfig.kinds.get(str(changed.get("kind", sae.kind)))
    return given if kind is None else {name: v for name, v in given.items() if name in kind.model_fields}


def _name(sae: SAEConfig, seed: int, told: Mapping[str, Any]) -> str:
    parts = [f"{sae.kind}-{sae.d_sae}-{sae.k}-{seed}"]
    parts += [f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '_', str(told[key]))}" for key in told]
    return "-".join(parts)
