"""The `assay` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .failures import USAGE, told
from .interruption import Interruption

EXPORTS = ("native", "saelens", "dictionary_learning", "sparsify")
MACHINES = ("here", "a100", "h100", "h200")
TAKEN_SIGNALS = ("Query interrupted", "KeyboardInterrupt: ")
"""What DuckDB's errors say, of various types, where a signal came during one of its calls or of what these read."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 wrong input or an unusable place, 130 or 143 interrupted, 1 anything else.

    What was interrupted, or ended by a full disk or too little memory (1), goes on with the same command.
    """
    sys.exit(_guarded(argv))


def _guarded(argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code."""
    interruption = Interruption()
    try:
        _handle_signals(interruption)
        sys.unraisablehook = interruption.dropped
        try:
            arguments = _parser().parse_args(argv)
            _quiet()
            arguments.run(arguments)
            # what is done is done: a late signal must not change the code of a finished run
            _handle_signals(signal.SIG_IGN)
        except BaseException:
            _handle_signals(interruption.ended)
            raise
        finally:
            sys.unraisablehook = interruption.before
    except KeyboardInterrupt as stop:
        return _interrupted(stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:
        if interruption.number is not None and any(words in str(error) for words in TAKEN_SIGNALS):
            return _interrupted(interruption.number)
        known = told(error)
        if known is None:
            raise
        message, code = known
        rank = int(os.environ.get("RANK", "0"))
        who = f"assay, rank {rank}" if rank else "assay"
        print(f"{who}: {message}", file=sys.stderr)  # noqa: T201 - the one message of what the user can mend
        return code
    return 0


def _handle_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupted(number: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print("assay: interrupted; nothing finished is lost, the same command continues", file=sys.stderr)  # noqa: T201
    return 128 + int(number)


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
        command.set_defaults(run=_run, until=None if name == "run" else name)
        if name == "train":
            _add_planning(command)
    _add_checking(commands.add_parser("concepts", help="work on concept files"))
    inspect = commands.add_parser(
        "inspect", help="what a run, store, dictionary, labels folder or bundle holds"
    )
    inspect.add_argument("path", metavar="PATH", help="a folder, or a store at s3://BUCKET/PREFIX")
    inspect.add_argument(
        "--verify", action="store_true", help="read every checksum, and tables that have none"
    )
    inspect.set_defaults(run=_inspect)
    report = commands.add_parser("report", help="write static pages")
    report.add_argument("folder", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="default: RUN/report")
    report.add_argument("--hash-ids", action="store_true", help="show short hashes instead of entity ids")
    report.set_defaults(run=_report)
    export = commands.add_parser("export", help="write the dictionary for others")
    export.add_argument("folder", type=Path, metavar="RUN")
    export.add_argument("--format", choices=EXPORTS, default=EXPORTS[0], help="native is the labelled bundle")
    export.add_argument("--out", type=Path, help="default: RUN/dictionary, RUN/dictionary-FORMAT for others")
    export.set_defaults(run=_export)
    erase = commands.add_parser("erase", help="remove people from an activation store and its twin's")
    erase.add_argument("store", metavar="STORE")
    erase.add_argument(
        "--entities", type=Path, required=True, metavar="FILE", help="one id per line, CSV or Parquet"
    )
    erase.add_argument("--column", help="the file's column, where it has several")
    erase.set_defaults(run=_erase)
    return parser


def _add_checking(concepts: argparse.ArgumentParser) -> None:
    check = concepts.add_subparsers(required=True).add_parser(
        "check", help="prevalence, nulls, run time, leak test and redundancy of every concept"
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.add_argument(
        "--panel", type=Path, required=True, metavar="CONFIG", help="a configuration with a panel"
    )
    check.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    check.set_defaults(run=_check_concepts)


def _add_planning(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plan", action="store_true", help="say what it would take; train nothing")
    command.add_argument("--gpus", type=int, metavar="N", help="with --plan: for so many ranks (1)")
    command.add_argument(
        "--gpu",
        choices=MACHINES,
        help=f"with --plan: of which kind ({MACHINES[0]}, which is measured by a probe and a few steps)",
    )
    command.add_argument("--d-in", type=int, help="with --plan: width of the activations, before the harvest")


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
    if getattr(arguments, "plan", False):
        from .planning import show_plan

        gpus = 1 if arguments.gpus is None else arguments.gpus
        show_plan(config, Console(), gpus=gpus, gpu=arguments.gpu or MACHINES[0], d_in=arguments.d_in)
        return
    for option in ("gpus", "gpu", "d_in"):
        if getattr(arguments, option, None) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} is for --plan, and changes nothing in a training",
                do="add --plan; to train on several GPUs start the command with torchrun",
            )
    # the same seed, machine and thread count give the same bits; use_deterministic_algorithms would also import torch's
    # compiler, two seconds of every command, to tell it so, and nothing is compiled here
    torch.set_deterministic_debug_mode("error")
    # nothing reads what it did not write, and filling it costs a training step a twentieth
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.train is not None and arguments.until not in ("fit", "harvest"):
        world = config.train.mesh.world(config.device)
    else:
        world = World.from_env(config.device)
    context = Context(config, config.out.expanduser().absolute(), world, Console(quiet=not world.is_main))
    runner = Runner(context, STAGES)
    if arguments.until and arguments.until not in {s.name for s in runner.stages}:
        raise ConfigError(
            f"{arguments.config} does not ask for the stage {arguments.until}",
            expected=f"one of its stages: {', '.join(s.name for s in runner.stages)}",
        )
    runner.run(arguments.until)
    if world.is_main:
        show_run(context.folder, context.console)


def _check_concepts(arguments: argparse.Namespace) -> None:
    import tempfile

    from activations_cache.prepare import prepare
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

    from label.bundle import labelled_dictionary
    from label.report.write import write_report

    from .console import Console
    from .inspect import read_run

    run = read_run(arguments.folder)
    evaluation = labelled_dictionary(arguments.folder, run) / "evaluation.json"
    out = write_report(
        arguments.folder / "labels",
        arguments.out or arguments.folder / "report",
        run=run,
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None,
        hash_ids=arguments.hash_ids,
    )
    Console().say(f"pages in {out}; open {out / 'index.html'}")


def _export(arguments: argparse.Namespace) -> None:
    from .console import Console
    from .export import export_run

    Console().say(export_run(arguments.folder, arguments.format, arguments.out))


def _erase(arguments: argparse.Namespace) -> None:
    from .console import Console
    from .erase import erase_people

    Console().say(erase_people(arguments.store, arguments.entities, column=arguments.column))


def _quiet() -> None:
    """Keep libraries from writing over our lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
