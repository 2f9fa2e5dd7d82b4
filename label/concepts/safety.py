"""What keeps a concept file from doing harm: YAML within limits, and a child process with its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from sae.config import PlainLoader
from sae.errors import ConceptError

MAX_BYTES = 1_000_000
MAX_ALIASES = 32
MAX_NESTING = 16


class _CappedLoader(PlainLoader):
    """A loader that also refuses alias bombs and deep nesting."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = 0
        self.nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"more than {MAX_ALIASES} aliases")
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise yaml.YAMLError(f"nested more than {MAX_NESTING} deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.nesting -= 1
        return node


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    Raises
    ------
    ConceptError
        The file is missing, larger than 1 MB, not UTF-8, not YAML, or holds tags, too many aliases, too
        deep nesting or a repeated key.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConceptError(f"{path} is too large", got=f"{size} bytes", expected=f"at most {MAX_BYTES}")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_CappedLoader)
    except FileNotFoundError as error:
        raise ConceptError(f"no concept file at {path}", do="check `concepts.paths`") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConceptError(f"{path} cannot be read as YAML", got=" ".join(str(error).split())) from error


def limit_this_process(*, memory_bytes: int, cpu_seconds: int) -> None:
    """Cap the address space and processor time of this process, and write no core file."""
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (soft, hard if what == resource.RLIMIT_CPU else soft))


def run_child(module: str, job: dict[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
    """Run a module in a new interpreter with the job as JSON on stdin; return the JSON lines it printed.

    Raises
    ------
    ConceptError
        It ran out of time, was killed or failed; the message names the last thing it said it was working on.
    """
    environment = {
        key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ") if key in os.environ
    }
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as child:
        try:
            output, errors = child.communicate(json.dumps(job), timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            child.kill()
            output, _ = child.communicate()
            raise ConceptError(
                f"{_working_on(output)} took longer than {timeout_s:g} s and was stopped",
                do="simplify it, raise the timeout, or time each concept with `assay concepts check`",
            ) from error
        except BaseException:
            child.kill()
            raise
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    failed = next((line["error"] for line in lines if "error" in line), None)
    if failed is not None:
        raise ConceptError(f"{_working_on(output)} failed", got=failed)
    if child.returncode != 0:
        last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
        raise ConceptError(
            f"{_working_on(output)} ended the process that computes concepts",
            got=f"exit status {child.returncode}: {last}",
            do="raise the memory limit, or time each concept with `assay concepts check`",
        )
    return lines


def _working_on(output: str) -> str:
    """Return what the child last said it was working on; an unfinished last line is ignored."""
    names = [
        json.loads(line)["working_on"] for line in output.splitlines() if line.startswith('{"working_on"')
    ]
    return str(names[-1]) if names else "computing concepts"
