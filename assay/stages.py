"""The stages of a run: what each reads and writes, and the order that follows from it."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sae.errors import UserError
from sae.world import World

from .config import RunConfig
from .console import Console
from .freshness import Inputs, RunRecord, changes, file_hashes, fingerprint, run_lock
from .ranks import Ranks

PACKAGES = ("assay", "torch", "transformers", "numpy", "zarr", "duckdb", "scikit-learn")


@dataclass(frozen=True)
class Context:
    """What every stage gets: the configuration, the run folder, the processes and the screen."""

    config: RunConfig
    folder: Path
    world: World
    console: Console

    @property
    def dictionary(self) -> str:
        """Name of the dictionary's folder: hook-kind-d_sae-k-seed, or hook-imported."""
        if self.config.dictionary is not None:
            return f"{self.hook}-imported"
        return f"{self.hook}-{self.config.members[0].name}"

    @property
    def hook(self) -> str:
        """The hook that the dictionary reads."""
        from activations_cache.store import ActivationStore
        from train.run import choose_hook

        section = self.config.dictionary or self.config.train
        assert section is not None
        return choose_hook(section, ActivationStore.open(self.folder / "activations.zarr").hooks)

    def work(self, stage: str) -> Path:
        """Return the folder that keeps a stage's state over interruptions."""
        return self.folder / ".work" / stage


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes
    ----------
    name
        As it is shown and recorded.
    version
        Raised when the same inputs would give another output.
    asked
        Whether the configuration asks for the stage.
    reads
        Sections and values of the configuration that the output depends on.
    after
        Stages whose output it reads; those that are not asked for do not count.
    output
        What it writes.
    run
        Writes the output: into the folder given, which becomes the output when it returns.
    files
        Files of the user's that it reads.
    check
        Raises what is wrong with them, as far as that can be told before any stage has run.
    proves
        Raises what is wrong with what it reads, stages before it included, without writing anything. Called before
        an output that seals itself makes room for that of other inputs, so that a slip of the pen does not cost it.
    beside
        What it writes besides, which has to be there as well for the output to be fresh.
    in_place
        The output commits and seals itself, so it is written under its own name and continued after an interruption.
    together
        Every process takes part; the other stages are the first one's alone.
    amended
        What was done to its output since, other than by this stage; the stages after it depend on that as well.
    settles
        Returns the configuration with what its output says of it; the attribute is None where that is nothing. The
        stages after it depend on those settings, and not on how they were found.
    """

    name: str
    version: int
    asked: Callable[[RunConfig], bool]
    reads: Callable[[RunConfig], dict[str, Any]]
    after: tuple[str, ...]
    output: Callable[[Context], Path]
    run: Callable[[Context, Path], None]
    files: Callable[[RunConfig], Sequence[Path]] = field(default=lambda _: ())
    check: Callable[[RunConfig], None] = field(default=lambda _: None)
    proves: Callable[[Context], None] = field(default=lambda _: None)
    beside: Callable[[Context], Sequence[Path]] = field(default=lambda _: ())
    in_place: bool = False
    together: bool = False
    amended: Callable[[Context], list[Any]] = field(default=lambda _: [])
    settles: Callable[[RunConfig, Path], RunConfig] | None = None


class Runner:
    """Runs stages in order, skips what is fresh, and says why it re-runs what is not.

    Of several processes the first does so; the others join in the stages that are everybody's.
    """

    def __init__(self, context: Context, stages: Sequence[Stage]) -> None:
        self.context = context
        self.stages = [s for s in stages if s.asked(context.config)]
        self.record = RunRecord(context.folder)
        self.ranks = Ranks(context.world)

    def run(self, until: str | None = None) -> None:
        """Run every stage that is asked for, or those that `until` needs, itself included."""
        wanted = self._needed(until)
        if not self.context.world.is_main:
            self._join(wanted)
            return
        with self.ranks.ending(), run_lock(self.context.folder):
            # another process may have ended a run here since this one began
            self.record = RunRecord(self.context.folder)
            for stage in self.stages:
                if stage.name in wanted:
                    stage.check(self.context.config)
            self.record.data |= _provenance(self.context)
            self.record.write()
            for stage in self.stages:
                if stage.name in wanted:
                    self._one(stage)
                    self._settle(stage)
                elif stage.settles is not None and self._is_fresh(stage, fingerprint(self.inputs(stage))):
                    self._settle(stage)

    def _join(self, wanted: set[str]) -> None:
        """Take part in the stages that are everybody's, when the first process begins them."""
        before: list[Stage] = []
        for stage in self.stages:
            if stage.name in wanted and stage.together:
                word = self.ranks.hear(stage.name)
                if word is None:
                    return
                for done in before:
                    self._settle(done)
                before = []
                if word == "runs":
                    stage.run(self.context, self._place(stage))
            before += [stage] if stage.name in wanted else []

    def _settle(self, stage: Stage) -> None:
        """Go on with the configuration as the output of a stage settles it."""
        if stage.settles is not None:
            config = stage.settles(self.context.config, stage.output(self.context))
            self.context = replace(self.context, config=config)
            if self.context.world.is_main:
                self.record.data["config"] = config.to_dict()
                self.record.write()

    def _needed(self, until: str | None) -> set[str]:
        names = {s.name: s for s in self.stages}
        if until is None:
            return set(names)
        needed, queue = set(), [until]
        while queue:
            name = queue.pop()
            if name in names and name not in needed:
                needed.add(name)
                queue += names[name].after
        return needed

    def inputs(self, stage: Stage) -> Inputs:
        """Return everything that a stage's output depends on."""
        config = self.context.config
        inputs: Inputs = {"version": stage.version, **stage.reads(config)}
        inputs |= file_hashes([p for p in stage.files(config) if p.exists()])
        asked = {s.name for s in self.stages if s.settles is None}
        inputs |= {f"after {n}": self.record.stage(n).get("fingerprint") for n in stage.after if n in asked}
        before = [s for s in self.stages if s.name in stage.after]
        return inputs | {f"{s.name}, amended": done for s in before if (done := s.amended(self.context))}

    def _one(self, stage: Stage) -> None:
        console, record = self.context.console, self.record.stage(stage.name)
        inputs = self.inputs(stage)
        mark = fingerprint(inputs)
        if self._is_fresh(stage, mark):
            console.skipped(stage.name, record.get("seconds", 0.0))
            if stage.together:
                self.ranks.say(stage.name, "is fresh")
            return
        self._spare_what_is_not_ours(stage, record)
        console.started(stage.name, self._why(stage, record, inputs))
        began = time.monotonic()
        spent = record.get("seconds_so_far", 0.0) if record.get("begun") == mark else 0.0
        if record.get("begun") != mark:
            if stage.in_place and stage.output(self.context).exists():
                stage.proves(self.context)
            self._discard(stage, record)
        # what the finished output was made of stays on record until another takes its place
        wrote = sorted({*self._wrote(stage, record), *self._writes(stage)})
        self.record.update(stage.name, begun=mark, begun_inputs=inputs, wrote=wrote)
        try:
            output = self._write(stage)
        except BaseException:
            self.record.update(stage.name, seconds_so_far=spent + time.monotonic() - began)
            raise
        shutil.rmtree(self.context.work(stage.name), ignore_errors=True)
        seconds = spent + time.monotonic() - began
        self.record.data["stages"][stage.name] = {
            "begun": mark,
            "fingerprint": mark,
            "inputs": inputs,
            "wrote": wrote,
            "output": str(output.relative_to(self.context.folder)),
            "seconds": round(seconds, 2),
            "threads": torch.get_num_threads(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.record.write()
        console.finished(stage.name, seconds, output)

    def _spare_what_is_not_ours(self, stage: Stage, record: dict[str, Any]) -> None:
        """Refuse to replace what this run did not write, and what the stage itself reads."""
        output, ours = stage.output(self.context), self._wrote(stage, record)
        for name in self._writes(stage):
            path = self.context.folder / name
            if name not in ours and path.exists() and not stage.in_place:
                raise UserError(
                    f"{path} is there already, and no run wrote it",
                    expected="a folder of this run's own, since stages replace what they wrote",
                    do="name another folder (out=DIR), or move it away",
                )
        for path in stage.files(self.context.config):
            if path.resolve().is_relative_to(output.resolve()):
                raise UserError(
                    f"{path} lies where {stage.name} writes, which replaces {output}",
                    do="move it, or name another folder (out=DIR)",
                )

    def _writes(self, stage: Stage) -> list[str]:
        """Return what a stage replaces, by its place in the run; what lies deeper is part of what another stage wrote."""
        output = stage.output(self.context)
        beside = [path for path in stage.beside(self.context) if path.parent == output.parent]
        return [str(path.relative_to(self.context.folder)) for path in (output, *beside)]

    def _wrote(self, stage: Stage, record: dict[str, Any]) -> list[str]:
        """Return what a stage has replaced so far; a record of before this was listed stands for what it would replace."""
        before = [record["output"]] if record.get("output") else []
        begun = self._writes(stage) if before or record.get("begun") else []
        return list(record.get("wrote", [*before, *begun]))

    def _is_fresh(self, stage: Stage, mark: str) -> bool:
        record = self.record.stage(stage.name)
        known = record.get("output")
        if record.get("fingerprint") != mark or known is None or not (self.context.folder / known).exists():
            return False
        return all(path.exists() for path in stage.beside(self.context))

    def _write(self, stage: Stage) -> Path:
        output, place = stage.output(self.context), self._place(stage)
        output.parent.mkdir(parents=True, exist_ok=True)
        if place != output:
            _remove(place)
        if stage.together:
            self.ranks.say(stage.name, "runs")
        stage.run(self.context, place)
        if place == output:
            return output
        old = output.with_name(f".{output.name}.old")
        _remove(old)
        if output.exists():
            output.replace(old)
        place.replace(output)
        _remove(old)
        return output

    def _place(self, stage: Stage) -> Path:
        """Return where a stage writes: its output's own name, or one that becomes it at the end."""
        output = stage.output(self.context)
        return output if stage.in_place else output.with_name(f".{output.name}.part")

    def _discard(self, stage: Stage, record: dict[str, Any]) -> None:
        """Remove what other inputs left behind: state to continue from, and outputs that seal themselves."""
        shutil.rmtree(self.context.work(stage.name), ignore_errors=True)
        self.record.update(stage.name, fingerprint=None)
        if stage.in_place and record.get("begun") is not None:
            _remove(stage.output(self.context))

    def _why(self, stage: Stage, record: dict[str, Any], inputs: Inputs) -> str:
        if not record:
            return ""
        different = changes(record.get("begun_inputs", record.get("inputs", {})), inputs)
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            return f"again, because {', '.join(different[:3])}{more}"
        return (
            "continues where it stopped"
            if record.get("fingerprint") is None
            else "again, because its output is gone"
        )


def _provenance(context: Context) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        versions[package] = version(package)
    return {
        "name": context.config.name,
        "config": context.config.to_dict(),
        "versions": versions | {"python": platform.python_version()},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "device": str(context.world.device),
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
