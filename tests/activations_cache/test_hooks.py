"""One mechanism reads and changes what flows through a model."""

import re

import pytest
import torch
from torch import nn

from activations_cache.hooks import HookPoint, capture, intercept, resolve_hooks
from sae.errors import ConfigError


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x * 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.pair = Pair()
        self.twice = nn.Linear(3, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        a, b = self.pair(x)
        return self.twice(self.twice(a + b))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.arange(6.0).reshape(2, 3)


def test_capture_sees_input_output_tuple_items_and_calls(net):
    hooks = ["layers.1", "layers.2:in", "pair[0]", "pair[1]", "twice", "twice@1", "pair:in"]
    with capture(net, hooks) as seen:
        out = net(X)
    assert torch.equal(seen["layers.1"], seen["layers.2:in"])
    assert torch.equal(seen["pair[1]"], seen["pair:in"] * 2)
    assert torch.equal(seen["pair[0]"], seen["pair:in"] + 1)
    assert torch.equal(seen["twice@1"], out)
    assert not torch.equal(seen["twice"], seen["twice@1"])


def test_what_works_in_place_afterwards_does_not_change_what_was_seen():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            y = self.b(self.act(h))
            y += h
            return y

    torch.manual_seed(0)
    model = InPlace().eval()
    with torch.inference_mode(), capture(model, ["a", "act:in", "act", "b"]) as seen:
        model(X)
        h = X @ model.a.weight.T + model.a.bias
        y = h.clamp(min=0) @ model.b.weight.T + model.b.bias
    assert (h < 0).any()
    for name, want in (("a", h), ("act:in", h), ("act", h.clamp(min=0)), ("b", y)):
        torch.testing.assert_close(seen[name], want)


def test_calls_are_counted_anew_in_every_pass(net):
    with capture(net, ["twice@1"]) as seen:
        net(X)
        first = seen["twice@1"].clone()
        net(X + 1)
        assert not torch.equal(seen["twice@1"], first)
        net(X)
    assert torch.equal(seen["twice@1"], first)


@pytest.mark.parametrize("hook", ["layers.1", "layers.2:in", "pair[1]", "twice@1"])
def test_what_a_visit_returns_takes_the_place(net, hook):
    before = net(X)
    with intercept(net, {hook: lambda x: x + 1.0}):
        changed = net(X)
    assert not torch.allclose(before, changed)
    assert torch.equal(net(X), before)


def test_hooks_are_removed_after_an_error(net):
    with pytest.raises(RuntimeError), intercept(net, {"layers.1": lambda x: x + 1}):
        raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_globs_name_modules_in_the_models_order(net):
    assert resolve_hooks(net, ["layers.*", "pair[0]"]) == [f"layers.{i}" for i in range(4)] + ["pair[0]"]
    assert resolve_hooks(net, ["layers.?:in", "layers.2:in"]) == [f"layers.{i}:in" for i in range(4)]


@pytest.mark.parametrize("pattern", ["nope", "layers.9", "layers.*.weight"])
def test_a_hook_that_names_nothing_is_an_error_that_names_modules(net, pattern):
    with pytest.raises(ConfigError, match=r"such as .*layers\.\d"):
        resolve_hooks(net, [pattern])


def test_a_hook_that_names_nothing_is_told_what_is_most_like_it(net):
    with pytest.raises(ConfigError) as caught:
        resolve_hooks(net, ["layer.3", "twise:in", "pair"])
    assert "hook(s) layer.3, twise:in\n" in str(caught.value)
    assert "such as layers.3, layers.2, layers.1, twice\n" in str(caught.value)


def test_a_module_that_returns_no_tensor_is_no_hook():
    class Named(nn.Module):
        def forward(self, x):
            return {"x": x}

    net = nn.Sequential(Named())
    for hook, says in (("0", "reads a module that returns no tensor"), ("0[0]", "asks for an item")):
        with (
            pytest.raises(ConfigError, match=f"{re.escape(hook)}' {says}\n  got: dict"),
            capture(net, [hook]),
        ):
            net(X)


def test_a_tuple_without_an_item_is_an_error_that_says_how(net):
    with pytest.raises(ConfigError, match=r"pair\[0\]"), capture(net, ["pair"]):
        net(X)


def test_written_forms():
    assert HookPoint.parse("a.b:in[2]@3") == HookPoint("a.b", True, 2, 3)
    with pytest.raises(ConfigError):
        HookPoint.parse("a[b]")
