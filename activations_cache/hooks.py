"""Reading and changing what flows through a model, with plain forward hooks: one mechanism for capture, splice, ablation.

`layers.2` is the output of that module, `layers.2:in` its first input, `layers.2[0]` an item of a tuple and
`layers.2@1` the second call within one forward pass; names may hold globs, which stay within one part of a dotted name.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sae.errors import ConfigError

NEAREST = 3
"""Names that are shown for each that is not found."""

Visit = Callable[[Tensor], Tensor | None]
_PATTERN = re.compile(r"^(?P<module>[^:\[\]@]*)(?P<input>:in)?(?:\[(?P<item>\d+)\])?(?:@(?P<call>\d+))?$")


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: a module, its input or output, an item of a tuple, and which call within one forward."""

    module: str
    at_input: bool
    item: int | None
    call: int

    @staticmethod
    def parse(text: str) -> HookPoint:
        """Read the written form.

        Raises
        ------
        ConfigError
            The text is not of the form NAME[:in][[ITEM]][@CALL].
        """
        match = _PATTERN.match(text)
        if match is None:
            raise ConfigError(f"cannot read the hook {text!r}", expected="NAME, NAME:in, NAME[0] or NAME@1")
        item, call = match["item"], match["call"]
        return HookPoint(
            match["module"], match["input"] is not None, None if item is None else int(item), int(call or 0)
        )


def resolve_hooks(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the hooks that the patterns name, globs expanded, in the model's own order.

    Raises
    ------
    ConfigError
        A pattern names no module of this model; all such patterns are listed.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    lost: list[str] = []
    for pattern in patterns:
        module = HookPoint.parse(pattern).module
        matches = [n for n in names if n == module] or [n for n in names if _fits(n, module)]
        if not matches:
            lost.append(pattern)
        found += [n + pattern[len(module) :] for n in matches]
    if lost:
        raise ConfigError(
            f"the model has no module for the hook(s) {', '.join(lost)}",
            expected=f"one of its modules, such as {', '.join(_nearest(lost, names))}",
            do="NAME.* is every part of NAME",
        )
    return list(dict.fromkeys(found))


def _nearest(lost: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the modules whose names are most like those that are lost, or the outermost where none is."""
    found: list[str] = []
    for pattern in lost:
        found += difflib.get_close_matches(HookPoint.parse(pattern).module, names, n=NEAREST)
    return list(dict.fromkeys(found)) or sorted(names, key=lambda name: name.count("."))[: 4 * NEAREST]


def _fits(name: str, pattern: str) -> bool:
    """Compare part by part, so that `layers.*` means the layers and not everything inside them."""
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))


@contextmanager
def intercept(model: nn.Module, visits: Mapping[str, Visit]) -> Iterator[None]:
    """Within the block, show each hook's activation to its function and put what that returns in its place.

    A function that returns None leaves the activation as it is. Hooks are removed however the block ends.

    Raises
    ------
    ConfigError
        A hook names no module, or an item of something that is not a tuple.
    """
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda *_: calls.clear(), prepend=True).remove)
        for name, visit in visits.items():
            point = HookPoint.parse(name)
            if point.module not in modules:
                raise ConfigError(f"the model has no module for the hook {name!r}")
            module = modules[point.module]
            visitor = _Visitor(name, point, visit, calls)
            handle = (
                module.register_forward_pre_hook(visitor.on_input)
                if point.at_input
                else module.register_forward_hook(visitor.on_output)
            )
            stack.callback(handle.remove)
        yield


@contextmanager
def capture(model: nn.Module, hooks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, every forward pass leaves a copy of each hook's activation in the dictionary yielded."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Visit:
        def visit(x: Tensor) -> None:
            # what comes after may work in place
            seen[name] = x.detach().clone()

        return visit

    with intercept(model, {name: keep(name) for name in hooks}):
        yield seen


class _Visitor:
    """One hook's bookkeeping: counts calls within a forward pass and reaches into tuples."""

    def __init__(self, name: str, point: HookPoint, visit: Visit, calls: dict[str, int]) -> None:
        self.name, self.point, self.visit, self.calls = name, point, visit, calls

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        item = self.point.item or 0
        return self._apply(args, item) if self._is_my_call() else None

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._is_my_call():
            return None
        if isinstance(output, Tensor) and self.point.item is None:
            return self.visit(output)
        if not isinstance(output, tuple):
            asks = "reads a module that returns no tensor" if self.point.item is None else "asks for an item"
            raise ConfigError(
                f"hook {self.name!r} {asks}",
                got=type(output).__name__,
                expected="a tensor, or a tuple" if self.point.item is None else "a tuple",
                do="read a module inside it, such as its last layer",
            )
        if self.point.item is None:
            raise ConfigError(
                f"hook {self.name!r} reads a module that returns {len(output)} values",
                do=f"name the one you mean, such as {self.name}[0]",
            )
        return self._apply(output, self.point.item)

    def _is_my_call(self) -> bool:
        call = self.calls.get(self.name, 0)
        self.calls[self.name] = call + 1
        return call == self.point.call

    def _apply(self, values: tuple[Any, ...], item: int) -> Any:
        if item >= len(values) or not isinstance(values[item], Tensor):
            raise ConfigError(f"hook {self.name!r} finds no tensor at item {item} of {len(values)}")
        changed = self.visit(values[item])
        if changed is None:
            return None
        replaced = (*values[:item], changed, *values[item + 1 :])
        # NamedTuples are rebuilt from their fields
        return type(values)(*replaced) if hasattr(values, "_fields") else replaced
