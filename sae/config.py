"""Configuration as a frozen, typed tree: YAML plus `key=value`, every error at once, and open choices by `kind`."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")

SEEDS = range(2**32)
"""What scikit-learn takes; torch and NumPy take more, so whatever is derived from one of these is a seed to them."""

Seed = Annotated[int, Field(ge=SEEDS.start, lt=SEEDS.stop)]


class Config(BaseModel):
    """A frozen section of the configuration; the sentence under each field says what it is for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as the numbers 1 and 0."""
        assert info.field_name is not None
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool) for v in values) and not _may_be_switch(
            cls.model_fields[info.field_name].annotation
        ):
            raise ValueError("should be neither true nor false, as which YAML also reads yes, no, on and off")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the section as plain JSON values, defaults included."""
        return self.model_dump(mode="json", serialize_as_any=True)

    def digest(self) -> str:
        """Return a hash of the section's values that does not depend on key order."""
        return hashlib.blake2b(
            json.dumps(self.to_dict(), sort_keys=True).encode(), digest_size=16
        ).hexdigest()


class Family(Config):
    """An open choice: a direct subclass names the family, its subclasses are the members, chosen by `kind`.

    A member is a subclass with `kind: Literal["name"] = "name"`; defining it registers it.
    """

    kinds: ClassVar[dict[str, type[Family]]]
    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Family in cls.__bases__:
            cls.kinds = {}
            return
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            cls.kinds[kind] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, Mapping) or Family not in cls.__bases__:
            return handler(value)
        kind = value.get("kind", cls.model_fields["kind"].get_default())
        member = cls.kinds.get(str(kind))
        if member is None:
            raise ValueError(f"unknown kind {kind!r}; known: {', '.join(sorted(cls.kinds))}")
        return member.model_validate(value)  # type: ignore[return-value]


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: a ValueError where the text is not UTF-8 or a date is none, such as 2020-06-31."""


class PlainLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key that is there twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node; YAMLError where a key is repeated."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: repeated key(s) {', '.join(repeated)}")
        return super().construct_mapping(node, deep=deep)


def load_config(cls: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `key=value` overrides and validate the whole tree.

    Parameters
    ----------
    cls
        The root of the tree.
    path
        The YAML file.
    overrides
        `a.b.c=value`, the value parsed as YAML; `a.b=null` removes what the file set, where a
        setting may be left out.

    Raises
    ------
    ConfigError
        The file is missing, cannot be read or is no YAML mapping, an override has no `=`, or any key is unknown,
        missing or of the wrong type; all such problems are listed with their path.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except FileNotFoundError as error:
        raise ConfigError(
            f"no configuration file at {path}", do="check the path; examples are in configs/"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", got=error.strerror or str(error)) from error
    except NOT_YAML as error:
        raise ConfigError(f"{path} cannot be read as YAML", got=" ".join(str(error).split())) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} is not a configuration", got=type(tree).__name__, expected="a mapping of sections"
        )
    for override in overrides:
        _apply(tree, override)
    return parse_config(cls, tree, where=str(path))


def parse_config(cls: type[ConfigT], tree: Mapping[str, Any], *, where: str) -> ConfigT:
    """Validate a tree of plain values; raise one ConfigError that lists every problem."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(problem, cls) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"cannot read the override {override!r}", expected="key=value, such as sae.k=16")
    *parents, last = key.strip().split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section", got=repr(child))
        node = child
    try:
        node[last] = yaml.load(text, Loader=PlainLoader)
    except NOT_YAML as error:
        raise ConfigError(
            f"cannot read the value of the override {override!r}", got=" ".join(str(error).split())
        ) from error


def _may_be_switch(annotation: Any) -> bool:
    if annotation is bool or annotation is Any:
        return True
    return get_origin(annotation) is not Literal and any(map(_may_be_switch, get_args(annotation)))


def _describe(problem: Any, cls: type[Config]) -> str:
    names = [str(part) for part in problem["loc"]]
    path = ".".join(names) or "(root)"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(cls, names[:-1])
        near = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if known else ""
        return f"  {path}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"  {path}: missing"
    got = problem.get("input")
    if problem["type"] in ("tuple_type", "list_type") and isinstance(got, str):
        return f"  {path}: should be a list, such as [{got}] (got {got!r})"
    shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) else ""
    return f"  {path}: {problem['msg']}{shown}"


def _fields_at(cls: type[Config], names: Sequence[str]) -> list[str]:
    node: Any = cls
    for name in names:
        field = getattr(node, "model_fields", {}).get(name)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        node = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return sorted(getattr(node, "model_fields", {}))
