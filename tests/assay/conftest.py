from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from assay.cli import main


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[Callable[..., tuple[object, str, str]]]:
    """The command in this process, which spares the seconds of starting one: exit code, output and complaint."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deterministic = torch.are_deterministic_algorithms_enabled()

    def run(*arguments: object, cwd: Path) -> tuple[object, str, str]:
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        return stopped.value.code, *capsys.readouterr()

    yield run
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in handlers.items():
        signal.signal(number, handler)
