"""What reads: a model that the run fits, one from a Hugging Face folder, or any torch module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import nn

from sae.config import Family
from sae.errors import ConfigError

from .inputs import PanelAdapter


class ModelConfig(Family):
    """The model whose activations are read."""

    kind: str = "credit_transformer"

    def load(self, fitted: Path | None) -> nn.Module:
        """Return the model, ready to be called.

        Parameters
        ----------
        fitted
            Folder of the model that the run fitted, for kinds that are fitted by it.

        Raises
        ------
        ConfigError
            The model cannot be found or built.
        """
        raise NotImplementedError

    def adapter(self) -> PanelAdapter:
        """Return what turns a panel's histories into calls of this model.

        Raises
        ------
        ConfigError
            This kind of model does not read panels.
        """
        raise ConfigError(
            f"model.kind={self.kind} does not read a panel row by row",
            do="use source.kind=timeseries or text, or model.kind=module with an adapter",
        )

    def files(self) -> Sequence[Path]:
        """Return the user's files that the model depends on."""
        return ()


class ModuleConfig(ModelConfig):
    """Any torch.nn.Module, by import path, with a function that says how it is called."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    kind: Literal["module"] = "module"
    import_: str = Field(alias="import", pattern=r"^[\w.]+:[\w.]+$")
    """package.module:function that returns the module, weights loaded; the current folder is searched too."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function, such as a path to weights."""
    adapter_: str | None = Field(default=None, alias="adapter", pattern=r"^[\w.]+:[\w.]+$")
    """package.module:function(panel, entities) -> ModelInputs; not needed where the source makes the calls."""

    def load(self, fitted: Path | None) -> nn.Module:
        """Call the function."""
        module = import_object(self.import_, "model.import")(**self.arguments)
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"model.import={self.import_} did not return a model",
                got=type(module).__name__,
                expected="nn.Module",
            )
        return module

    def adapter(self) -> PanelAdapter:
        """Import the adapter."""
        if self.adapter_ is None:
            raise ConfigError("model.adapter is missing", do="give package.module:function(panel, entities)")
        adapter: PanelAdapter = import_object(self.adapter_, "model.adapter")
        return adapter

    def files(self) -> Sequence[Path]:
        """Return the source files of both functions, and what their arguments name, such as weights."""
        sources = {source_file(text) for text in (self.import_, self.adapter_) if text is not None}
        return sorted(sources | set(named_files(self.arguments)))


class PretrainedConfig(ModelConfig):
    """A model in a local folder, as `save_pretrained` writes it."""

    kind: Literal["pretrained"] = "pretrained"
    path: Path
    """Folder with config.json and safetensors; nothing is downloaded."""
    architecture: str = Field(default="AutoModel", pattern=r"^\w+$")
    """Class of `transformers` that loads it: AutoModel, or AutoModelForTextEncoding for the encoder of T5."""

    def load(self, fitted: Path | None) -> nn.Module:
        """Load it in float32, from safetensors only."""
        import transformers

        if not (self.path / "config.json").is_file():
            what = (
                f"no config.json in {self.path}" if self.path.is_dir() else f"there is no folder {self.path}"
            )
            raise ConfigError(
                f"model.path: {what}",
                expected="a folder that save_pretrained wrote, with config.json and model.safetensors",
                do="check the path; a model of a hub has to be downloaded first, as nothing is downloaded here",
            )
        architecture: Any = getattr(transformers, self.architecture, None)
        if not hasattr(architecture, "from_pretrained"):
            raise ConfigError(
                f"model.architecture={self.architecture} is no class of transformers that loads models"
            )
        if not any(self.path.glob("*.safetensors")):
            found = ", ".join(sorted(file.name for file in self.path.glob("*.bin"))[:3])
            raise ConfigError(
                f"model.path: no safetensors in {self.path}",
                got=found or "no weights",
                expected="model.safetensors",
                do="save the model anew with save_pretrained; .bin files are pickles and are not read",
            )
        try:
            model, loaded = architecture.from_pretrained(
                self.path,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (MemoryError, torch.OutOfMemoryError, ImportError):
            raise
        # a class of its own for a damaged file, whatever a wrong config.json leads to
        except Exception as error:
            raise ConfigError(
                f"{self.architecture} cannot load {self.path}",
                got=first_line(error),
                do="check that config.json and the weights are whole and belong together",
            ) from error
        assert isinstance(model, nn.Module)
        with torch.no_grad():
            for name in self._check_whole(loaded):
                # random ones would be others at every start, and a harvest could not go on
                model.get_parameter(name).zero_()
        return model

    def _check_whole(self, loaded: Mapping[str, Any]) -> list[str]:
        """Raise ConfigError where the model has weights that the folder does not give it: they would be random.

        A pooler may lack them, as it does where a language model was saved, since no layer reads it; its are returned.
        """
        other = [
            f"{name} {tuple(there)}, {tuple(here)} by config.json"
            for name, there, here in loaded["mismatched_keys"]
        ]
        if other:
            raise ConfigError(
                f"the weights in {self.path} are not of the shapes that its config.json says",
                got=shortened(sorted(other)),
                do="use the config.json that was saved with them",
            )
        pooler = [name for name in loaded["missing_keys"] if "pooler" in name.split(".")]
        lost = sorted(set(loaded["missing_keys"]) - set(pooler))
        if lost:
            raise ConfigError(
                f"{self.path} lacks weights that model.architecture={self.architecture} needs, so they would be random",
                got=f"no {shortened(lost)}",
                expected="the class that it was saved with, or AutoModel for the layers without a head",
                do="set model.architecture, or use a folder that was saved with this one",
            )
        return pooler

    def files(self) -> Sequence[Path]:
        """Return the folder."""
        return (self.path,)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def import_object(text: str, key: str) -> Any:
    """Return what `package.module:name` names.

    Raises
    ------
    ConfigError
        There is no such module or name; an error inside the module is shown as it is.
    """
    module, _, name = text.partition(":")
    _search_here()
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise ConfigError(
            f"{key}={text}: no module {error.name}", do="install it, or run from the folder it lies in"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{key}={text}: {error}") from error
    return found


def source_file(text: str) -> Path:
    """Return the file that defines the module of `package.module:name`; ConfigError where there is none."""
    _search_here()
    module = text.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"{text}: no module {module}", do="install it, or run from the folder it lies in")
    return Path(spec.origin)


def named_files(value: Any) -> list[Path]:
    """Return the files and folders that the texts in some arguments name, at any depth."""
    if isinstance(value, Mapping):
        return [path for part in value.values() for path in named_files(part)]
    if isinstance(value, list | tuple):
        return [path for part in value for path in named_files(part)]
    if not isinstance(value, str | Path) or not str(value):
        return []
    path = Path(value)
    try:
        there = path.is_file() or path.is_dir()
    except (OSError, ValueError):
        return []
    # the folder that one works in, or above it, is no input
    return [path] if there and not Path.cwd().is_relative_to(path.resolve()) else []


def module_hash(model: nn.Module) -> str:
    """Return a hash over a module's parameters and buffers, for provenance."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(folder: Path) -> str:
    """Return a hash over a model folder's weight files, which tells folders apart without loading the model."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _search_here() -> None:
    """Let modules of the current folder be imported, as `python -m` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
