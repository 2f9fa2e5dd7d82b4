"""Checkpoints of a run: all that the next step depends on, one file a shard and an index, written meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.base import SAE
from sae.checkpoint import write_atomically
from sae.errors import CheckpointError
from sae.world import World

from .state import TrainState

FORMAT_VERSION = 2
KEPT = 2
INDEX = "index.json"
_PREFIX = "step-"


class _Pending(NamedTuple):
    """A checkpoint that is being written: its place, what the index will say, the digest of this rank's file."""

    place: Path
    header: dict[str, Any]
    digest: Future[str]


class Checkpoints:
    """The checkpoints of one run, in a folder that all ranks see.

    `begin` copies the state and goes on; a thread writes each shard's file; once all ranks have written, the
    main rank writes the index, which makes the checkpoint one, and removes all but the last two. Ranks along
    `data` hold the same, so the first of them writes. The files are cut by features, and any other mesh can
    read its own part of them.

    Parameters
    ----------
    folder
        Created where missing.
    identity
        What the run is, JSON values; a checkpoint continues only a run of the same identity.
    world
        Who computes.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], world: World) -> None:
        self.folder, self.world = folder, world
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="assay-checkpoint")
        self._pending: _Pending | None = None
        self._newest = -1

    def begin(
        self, sae: SAE, optimiser: torch.optim.Optimizer, state: TrainState, *, loader: Mapping[str, Any]
    ) -> None:
        """Begin to write the state after `state.step` steps; it may change as soon as this returns.

        Parameters
        ----------
        sae, optimiser, state
            What the next step depends on.
        loader
            The loader's position, JSON values.
        """
        self.finish()
        if state.step == self._newest:
            return
        world, shards = self.world, self.world.axes["feature"]
        files = [f"shard-{i:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        tensors, rowwise = _tensors(sae, optimiser, state)
        own = world.coordinate("feature")
        index = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "rows": state.rows,
            "features": sae.config.d_sae,
            "precision": sae.precision,
            "per_feature": sorted(rowwise),
            "loader": dict(loader),
            "identity": self.identity,
            "files": files,
        }
        snapshot = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in tensors.items()
            if world.coordinate("data") == 0 and (name in rowwise or own == 0)
        }
        place = self.folder / f"{_PREFIX}{state.step:010d}"
        digest = self._writer.submit(_write, place / files[own], snapshot)
        self._pending, self._newest = _Pending(place, index, digest), state.step

    def poll(self) -> None:
        """Complete the checkpoint that is being written if all ranks have written theirs; call it every step."""
        if self._pending is not None:
            done = torch.tensor(int(self._pending.digest.done()), device=self.world.device)
            if int(self.world.all_reduce(done, "min")):
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it."""
        if self._pending is None:
            return
        place, index, digest = self._pending
        own = torch.frombuffer(bytearray.fromhex(digest.result()), dtype=torch.uint8)
        parts = self.world.stack(own.to(self.world.device))[: self.world.axes["feature"]]
        self._pending = None
        if not self.world.is_main:
            return
        index["blake2b"] = [bytes(part.tolist()).hex() for part in parts.cpu()]
        write_atomically(place / INDEX, json.dumps(index, indent=2).encode())
        kept = complete(self.folder)[-KEPT:]
        for old in self.folder.glob(f"{_PREFIX}*"):
            # another rank may have begun the next one already
            if old not in kept and old.name < place.name:
                (old / INDEX).unlink(missing_ok=True)
                shutil.rmtree(old)

    def close(self) -> None:
        """Stop writing; what has no index yet is left without."""
        self._writer.shutdown()

    def load(
        self, sae: SAE, optimiser: torch.optim.Optimizer, step: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Put the checkpoint after `step` steps back into `sae` and `optimiser`; see `newest_common`.

        The dictionary's precision is that of the checkpoint from then on: `auto` may mean another on this machine.

        Returns
        -------
        tuple
            The state, and the loader's position.

        Raises
        ------
        CheckpointError
            The checkpoint is damaged, or belongs to another run.
        """
        place = self.folder / f"{_PREFIX}{step:010d}"
        index = _read_index(place)
        self._check_identity(place, index["identity"])
        try:
            tensors = _read_tensors(place, index, sae)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise _damaged(place, error) from error
        silent = tensors.pop("silent_rows").to(self.world.device)
        sae.load_state_dict(_under(tensors, "sae"))
        sae.precision = index.get("precision", sae.precision)
        _load_adam(sae, optimiser, _under(tensors, "adam"))
        self._newest = step
        return TrainState(silent, step=step, rows=index["rows"]), dict(index["loader"])

    def _check_identity(self, place: Path, known: Mapping[str, Any]) -> None:
        mine = self.identity
        differ = [name for name in sorted({*known, *mine}) if known.get(name) != mine.get(name)]
        if differ:
            raise CheckpointError(
                f"the checkpoint {place} belongs to another run",
                got="; ".join(f"{name} {mine.get(name)}" for name in differ),
                expected="; ".join(f"{name} {known.get(name)}" for name in differ),
                do="remove its folder to start again",
            )


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return [path.parent for path in sorted(folder.glob(f"{_PREFIX}*/{INDEX}"))]


def newest_common(runs: Sequence[Checkpoints]) -> int | None:
    """Return the newest step that all runs have a complete checkpoint of, if any; a collective.

    Newer ones, which only some runs could complete before an interruption, are removed.
    """
    world, common = runs[0].world, -1
    if world.is_main:
        found = [{_step_of(place): place for place in complete(run.folder)} for run in runs]
        common = max(set.intersection(*(set(places) for places in found)), default=-1)
        for step, place in (item for places in found for item in places.items()):
            if step > common:
                (place / INDEX).unlink()
                shutil.rmtree(place)
    common = int(world.all_reduce(torch.tensor(common, device=world.device), "max"))
    return None if common < 0 else common


def _step_of(place: Path) -> int:
    return int(place.name.removeprefix(_PREFIX))


def _tensors(
    sae: SAE, optimiser: torch.optim.Optimizer, state: TrainState
) -> tuple[dict[str, Tensor], set[str]]:
    """Return all tensors of a state by name, and the names of those that have a row for each feature."""
    names = [name for name, _ in sae.named_parameters()]
    rowwise = set(sae.per_feature())
    tensors = {"silent_rows": state.silent_rows}
    sharded = {"silent_rows"}
    for name, value in sae.state_dict().items():
        tensors[f"sae.{name}"] = value
        sharded |= {f"sae.{name}"} if name in rowwise else set()
    for number, slots in optimiser.state_dict()["state"].items():
        for slot, value in slots.items():
            key = f"adam.{slot}.{names[number]}"
            tensors[key] = value
            sharded |= {key} if names[number] in rowwise and value.ndim else set()
    return tensors, sharded


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one rank's file, if it has one to write, and return its hash."""
    if not tensors:
        return bytes(16).hex()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(dict(tensors), temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest = _hash(temporary)
    temporary.replace(path)
    return digest


def _read_index(place: Path) -> dict[str, Any]:
    try:
        index = json.loads((place / INDEX).read_text(encoding="utf-8"))
        if index["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {index['format_version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(place, error) from error
    return dict(index)


def _read_tensors(place: Path, index: Mapping[str, Any], sae: SAE) -> dict[str, Tensor]:
    """Return the features that `sae` holds, from whatever files they are in, and all that is replicated."""
    first, end = sae.first_feature, sae.first_feature + sae.d_sae
    share = index["features"] // len(index["files"])
    rowwise = set(index["per_feature"])
    parts: dict[str, list[Tensor]] = {}
    for number, (name, digest) in enumerate(zip(index["files"], index["blake2b"], strict=True)):
        low, high = max(first - number * share, 0), min(end - number * share, share)
        if number and low >= high:
            continue
        if _hash(place / name) != digest:
            raise ValueError(f"the checksum of {name} does not match")
        with safe_open(place / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key not in rowwise:
                    parts[key] = [file.get_tensor(key)]
                elif low < high:
                    parts.setdefault(key, []).append(file.get_slice(key)[low:high])
    return {key: found[0] if key not in rowwise else torch.cat(found) for key, found in parts.items()}


def _load_adam(sae: SAE, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    numbers = {name: i for i, (name, _) in enumerate(sae.named_parameters())}
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        slot, _, name = key.partition(".")
        slots.setdefault(numbers[name], {})[slot] = value
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})


def _under(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{group}."): value
        for name, value in tensors.items()
        if name.startswith(f"{group}.")
    }


def _damaged(place: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {place} is damaged",
        got=str(error),
        do=f"remove {place} to continue from the one before, or its folder to start again",
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
