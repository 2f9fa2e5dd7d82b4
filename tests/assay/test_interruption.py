import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assay import interruption
from assay.interruption import Interruption

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import os, signal, time
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
whole = True
"""


@pytest.fixture(autouse=True)
def handled():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handler = Interruption()
    for number in handlers:
        signal.signal(number, handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "signalled_in_import.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "signalled_in_import"
    sys.modules.pop("signalled_in_import", None)


def wait_after(call):
    call()
    time.sleep(10)
    pytest.fail("the signal was lost")


def test_an_import_is_finished_before_its_signal_interrupts(module):
    with pytest.raises(KeyboardInterrupt) as caught:
        wait_after(lambda: importlib.import_module(module))
    assert caught.value.args == (signal.SIGTERM,)
    assert sys.modules[module].whole


def test_an_import_that_does_not_end_is_interrupted(module, monkeypatch):
    monkeypatch.setattr(interruption, "_HELD_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(module)
    assert module not in sys.modules


def test_how_long_one_signal_was_held_does_not_count_for_another(module, monkeypatch):
    monkeypatch.setattr(interruption, "_HELD_SECONDS", 0.5)
    monkeypatch.setattr(interruption, "_ECHO_SECONDS", 0.5)
    handler = signal.getsignal(signal.SIGTERM)
    caught = []

    def first(number, frame):
        # what is sent again reaches the handler of a training
        signal.signal(number, lambda number, _: caught.append(number))
        handler(number, frame)

    signal.signal(signal.SIGTERM, first)
    importlib.import_module(module)
    del sys.modules[module]
    while not caught:
        time.sleep(0.01)
    time.sleep(0.6)
    monkeypatch.setattr(interruption, "_HELD_SECONDS", 10)
    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(KeyboardInterrupt):
        wait_after(lambda: importlib.import_module(module))
    assert sys.modules[module].whole


def test_what_cannot_raise_does_not_swallow_a_signal():
    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt) as caught:
        wait_after(Dropped)
    assert caught.value.args == (signal.SIGINT,)


CALLBACK = """
import os, signal, time
def called():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    ended.append(True)
"""


@pytest.mark.parametrize(
    ("file", "ends"), [("site-packages/llvmlite/binding/executionengine.py", [True]), ("elsewhere.py", [])]
)
def test_a_callback_that_c_calls_does_not_swallow_a_signal(monkeypatch, file, ends):
    monkeypatch.setattr(sys, "unraisablehook", signal.getsignal(signal.SIGTERM).dropped)
    names = {"ended": list[bool]()}
    exec(compile(CALLBACK, file, "exec"), names)
    with pytest.raises(KeyboardInterrupt) as caught:
        wait_after(ctypes.CFUNCTYPE(None)(names["called"]))
    assert caught.value.args == (signal.SIGTERM,)
    assert names["ended"] == ends


def test_what_else_is_dropped_goes_to_the_hook_before(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    monkeypatch.setattr(sys, "unraisablehook", Interruption().dropped)

    class Fails:
        def __del__(self):
            raise ValueError("not ours")

    Fails()
    assert [type(unraisable.exc_value) for unraisable in heard] == [ValueError]


FAILS = """
import os, signal, sys, threading, time
import assay.cli as cli

def linger():
    # until the command has said what is wrong
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

def fail(_):
    threading.Thread(target=linger).start()
    raise cli.told.__globals__["UserError"]("wrong input")

cli._inspect = fail
cli.main(["inspect", "."])
"""


def test_a_command_that_failed_can_be_ended_while_its_threads_go_on():
    done = subprocess.run(
        [sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=25, check=False, cwd=ROOT
    )
    assert done.stderr == "assay: wrong input\n"
    assert done.returncode == -signal.SIGTERM


def test_an_echo_is_left_out():
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
