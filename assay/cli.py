"""The `assay` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sae.errors import UserError

STAGE_OF = {"fit": "fit", "harvest": "harvest", "train": "train", "evaluate": "evaluate", "label": "label"}
USAGE = 2


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 wrong input, 130 or 143 interrupted and resumable, 1 anything else."""
    sys.exit(_guarded(argv))


def _guarded(argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code."""
    try:
        signal.signal(signal.SIGTERM, _terminated)
        arguments = _parser().parse_args(argv)
        _quiet()
        arguments.run(arguments)
        # what is done is done: a late signal must not change the code of a finished run
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except UserError as error:
        print(f"assay: {error}", file=sys.stderr)  # noqa: T201 - the one message of a wrong input
        return USAGE
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        print("assay: interrupted; nothing finished is lost, the same command continues", file=sys.stderr)  # noqa: T201
        return 128 + int(number)
    except BrokenPipeError:
        # the reader of our output has gone, such as `assay inspect RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="assay",
        description="Says, in words an expert signed off, what a credit-risk Transformer's embeddings encode.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    helps = {
        "run": "everything that CONFIG asks for; resumes, and skips what is fresh",
        "fit": "fit the reference model",
        "harvest": "read activations off the model into a store",
        "train": "train the dictionary",
        "evaluate": "held-out reconstruction, and what the model loses by it",
        "label": "label the dictionary's features",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "config", type=Path, metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="override any key, such as sae.k=8"
        )
        command.set_defaults(run=_run, until=STAGE_OF.get(name))
    concepts = commands.add_parser("concepts", help="work on concept files").add_subparsers(required=True)
    check = concepts.add_parser(
        "check", help="prevalence, nulls, run time, leak test and redundancy of every concept"
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.add_argument(
        "--panel", type=Path, required=True, metavar="CONFIG", help="a configuration with a panel"
    )
    check.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    check.set_defaults(run=_check_concepts)
    inspect = commands.add_parser(
        "inspect", help="what a run, store, dictionary, labels folder or bundle holds"
    )
    inspect.add_argument("path", type=Path)
    inspect.add_argument("--verify", action="store_true", help="read every checksum")
    inspect.set_defaults(run=_inspect)
    report = commands.add_parser("report", help="write static pages")
    report.add_argument("folder", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="default: RUN/report")
    report.add_argument("--hash-ids", action="store_true", help="show short hashes instead of entity ids")
    report.set_defaults(run=_report)
    export = commands.add_parser("export", help="write the dictionary for others")
    export.add_argument("folder", type=Path, metavar="RUN")
    export.add_argument("--format", choices=["native"], default="native")
    export.add_argument("--out", type=Path, help="default: RUN/dictionary")
    export.set_defaults(run=_export)
    erase = commands.add_parser(
        "erase", help="remove people from an activation store, leaving nothing behind"
    )
    erase.add_argument("store", type=Path, metavar="STORE")
    erase.add_argument(
        "--entities", type=Path, required=True, metavar="FILE", help="one id per line, CSV or Parquet"
    )
    erase.add_argument("--column", help="the file's column, where it has several")
    erase.set_defaults(run=_erase)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    import torch

    from sae.config import load_config
    from sae.errors import ConfigError
    from sae.world import World

    from .config import RunConfig
    from .console import Console
    from .inspect import show_run
    from .pipeline import STAGES
    from .stages import Context, Runner

    config = load_config(RunConfig, arguments.config, arguments.overrides)
    # the same seed, machine and thread count give the same bits
    torch.use_deterministic_algorithms(True)
    context = Context(config, config.out.expanduser().absolute(), World.single(config.device), Console())
    runner = Runner(context, STAGES)
    if arguments.until and arguments.until not in {s.name for s in runner.stages}:
        raise ConfigError(
            f"{arguments.config} does not ask for the stage {arguments.until}",
            expected=f"one of its stages: {', '.join(s.name for s in runner.stages)}",
        )
    runner.run(arguments.until)
    show_run(context.folder, context.console)


def _check_concepts(arguments: argparse.Namespace) -> None:
    import tempfile

    from activations_cache.panel import prepare
    from label.concepts.check import check_concepts
    from label.concepts.rendering import render
    from sae.config import load_config
    from sae.errors import ConfigError

    from .config import RunConfig
    from .console import Console

    config = load_config(RunConfig, arguments.panel, arguments.overrides)
    if config.panel is None:
        raise ConfigError(f"{arguments.panel} has no section panel")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="assay-") as name:
        folder, panel = Path(name), config.panel
        if panel.path is None:
            from activations_cache.reference.generator import generate

            assert config.reference is not None
            generate(config.reference, folder / "reference")
            panel = panel.model_copy(update={"path": str(folder / "reference" / "panel.parquet")})
        (folder / "panel").mkdir()
        prepare(panel, folder / "panel")
        report = check_concepts(arguments.files, folder / "panel" / "panel.parquet", panel.product)
    console.print(render(report))
    if report.leaking:
        raise SystemExit(USAGE)


def _inspect(arguments: argparse.Namespace) -> None:
    from .console import Console
    from .inspect import inspect

    inspect(arguments.path, Console(), verify=arguments.verify)


def _report(arguments: argparse.Namespace) -> None:
    import json

    from label.report.write import write_report

    from .console import Console
    from .inspect import read_run

    run = read_run(arguments.folder)
    evaluation = next(arguments.folder.glob("sae/*/evaluation.json"), None)
    out = write_report(
        arguments.folder / "labels",
        arguments.out or arguments.folder / "report",
        run=run,
        evaluation=None if evaluation is None else json.loads(evaluation.read_text()),
        hash_ids=arguments.hash_ids,
    )
    Console().print(f"pages in {out}; open {out / 'index.html'}")


def _export(arguments: argparse.Namespace) -> None:
    from label.bundle import write_bundle

    from .console import Console
    from .inspect import read_run

    read_run(arguments.folder)
    out = write_bundle(arguments.folder, arguments.out or arguments.folder / "dictionary")
    Console().print(f"dictionary in {out}; check it with `assay inspect {out} --verify`")


def _erase(arguments: argparse.Namespace) -> None:
    from activations_cache.erase import erase_listed

    from .console import Console

    report = erase_listed(arguments.store, arguments.entities, column=arguments.column)
    Console().print(f"{report.text}; check it with `assay inspect {arguments.store} --verify`")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _quiet() -> None:
    """Keep libraries from writing over our lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
