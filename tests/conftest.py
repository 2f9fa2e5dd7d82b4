"""What all tests share: shape checks on, real data where it is at hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from assay.cli import main

# read when Triton is first imported, by whatever test comes first
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# shapes in signatures are checked while tests run; modules of configuration are pydantic's to check
CHECKED = (
    [
        f"sae.{m}"
        for m in (
            "agreement",
            "baselines",
            "codes",
            "folding",
            "geometry",
            "losses",
            "metrics",
            "operators",
            "sizing",
        )
    ]
    # what numba compiles is not Python's to check
    + [
        f"sae.kernels.{m}"
        for m in ("cpu", "explanation", "portable", "reference", "sharded", "sparse", "triton")
    ]
    + [
        f"label.{m}"
        for m in ("statistics", "confirm", "groups", "baselines", "targets", "evidence", "discover")
    ]
    + [
        f"activations_cache.{m}"
        for m in ("buffer", "store", "chunks", "shards", "moments", "summing", "loader", "splits")
    ]
    + [f"activations_cache.reference.{m}" for m in ("credit_transformer", "histories", "scores", "baseline")]
)
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="session")
def uci() -> Path:
    """The UCI default panel, from ASSAY_UCI or ../shared/data."""
    here = Path(__file__).resolve().parents[2] / "shared" / "data" / "uci_default" / "panel_long.parquet"
    path = Path(os.environ.get("ASSAY_UCI", here))
    if not path.is_file():
        pytest.skip("no UCI panel: set ASSAY_UCI to panel_long.parquet")
    return path


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[Callable[..., tuple[object, str, str]]]:
    """The command in this process, which spares the seconds of starting one: exit code, output and complaint."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deterministic = torch.get_deterministic_debug_mode()

    def run(*arguments: object, cwd: Path) -> tuple[object, str, str]:
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        return stopped.value.code, *capsys.readouterr()

    yield run
    torch.set_deterministic_debug_mode(deterministic)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of several processes: they wait much, and one group of them takes longest."""
    items.sort(key=lambda item: "tests/distributed" not in item.path.as_posix())
