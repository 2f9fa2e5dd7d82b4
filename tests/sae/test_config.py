"""Settings with which no dictionary could be trained are refused where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAEConfig
from sae.config import Config, Seed, load_config, parse_config
from sae.errors import ConfigError


class Inner(Config):
    share: float = 0.5
    many: tuple[int, ...] = ()


class Settings(Config):
    name: str = ""
    count: int | Literal["auto"] = "auto"
    world: Literal[0, 1] = 0
    shut: bool | None = None
    seed: Seed = 0
    free: dict[str, list[Any]] = {}
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("topk", "k_aux", 0),
        ("topk", "k_aux", -3),
        ("batch_topk", "aux_alpha", -1.0),
        ("jumprelu", "bandwidth", 0.0),
        ("jumprelu", "bandwidth", -1.0),
        ("jumprelu", "bandwidth", float("nan")),
        ("topk", "aux_alpha", float("inf")),
        ("topk", "d_sae", 2**24 + 1),
        ("topk", "d_sae", 10**19),
    ],
)
def test_what_cannot_work_is_refused(kind, name, value):
    with pytest.raises(ConfigError, match=name):
        parse_config(SAEConfig, {"kind": kind, "d_sae": 8, "k": 2, name: value}, where="section sae")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("count: yes", "count: Value error, should be neither true nor false"),
        ("world: on", "world: "),
        ("inner: {share: true}", "inner.share: "),
        ("inner: {many: [2, no]}", "inner.many: "),
        ("inner: {share: .nan}", "inner.share: Input should be a finite number"),
        ("inner: {share: -.inf}", "inner.share: Input should be a finite number"),
        ("seed: 4294967296", "seed: "),
        ("seed: -1", "seed: "),
        ("name: 2020-06-31", "day is out of range for month"),
        ("inner: {share: 1, share: 2}", "repeated key(s) share"),
        ("inner: " + "[" * 3000, "recursion"),
    ],
)
@pytest.mark.parametrize("given", ["in the file", "as an override"])
def test_a_wrong_value_is_refused_wherever_it_stands(
    tmp_path: Path, text: str, says: str, given: str
) -> None:
    key, _, value = text.partition(": ")
    (tmp_path / "a.yaml").write_text(text if given == "in the file" else "{}")
    with pytest.raises(ConfigError) as caught:
        load_config(Settings, tmp_path / "a.yaml", [] if given == "in the file" else [f"{key}={value}"])
    assert says in str(caught.value)


def test_what_may_be_a_switch_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("shut: yes\nfree: {a: [true, 1]}\nseed: 4294967295\nworld: 1\n")
    read = load_config(Settings, tmp_path / "a.yaml")
    assert read.shut is True and read.free["a"][0] is True and (read.seed, read.world) == (2**32 - 1, 1)


@pytest.mark.parametrize("path", ["a.yaml/b", "x" * 300, "."])
def test_a_place_that_cannot_be_read_is_one_message(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Settings, tmp_path / path)


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_bytes("name: Kärnten".encode())
    # what an 8-bit locale does to a text that is read without saying its encoding
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "latin-1")
    assert load_config(Settings, tmp_path / "a.yaml").name == "Kärnten"
