"""A dictionary that was trained elsewhere, in the place of one that the run trains."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from activations_cache.store import ActivationStore
from sae.checkpoint import save_sae
from sae.config import Config
from sae.errors import CheckpointError
from sae.exports import load


class ImportConfig(Config):
    """A dictionary to label that was trained elsewhere, on the activations that the run harvests."""

    path: Path
    """Its folder, as the library that trained it wrote it."""
    format: str = Field("auto")
    """native, saelens, dictionary_learning or sparsify; auto tells it by the files in the folder."""
    hook: str | None = None
    """Which hook of the store it reads; needed only where several were harvested."""

    def files(self) -> list[Path]:
        """Return the files that a change of must be noticed."""
        folder = self.path.expanduser()
        return sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []


def import_dictionary(store_path: Path, config: ImportConfig, out: Path, *, hook: str) -> str:
    """Bring a dictionary into our own format and say what it is.

    Parameters
    ----------
    store_path, hook
        The activations that it reads, raw.
    config
        Where it is.
    out
        Folder that gets `config.json` and `weights.safetensors`.

    Returns
    -------
    str
        Its kind, number of features and width.

    Raises
    ------
    CheckpointError
        It cannot be read, or reads activations of another width.
    ConfigError
        No format of that name.
    StoreError
        The store is damaged.
    """
    sae, store = load(config.path.expanduser(), config.format), ActivationStore.open(store_path)
    if store.hooks[hook] != sae.d_in:
        raise CheckpointError(
            f"the dictionary in {config.path} does not fit {hook}",
            got=f"d_in {sae.d_in}",
            expected=f"d_in {store.hooks[hook]}",
            do="harvest the place that it was trained on, or set dictionary.hook",
        )
    origin = {"path": str(config.path), "format": config.format}
    save_sae(sae, out, extra={"hook": hook, "store": store.digest(), "imported": origin})
    return f"{sae.config.kind} with {sae.d_sae:,} features of {sae.d_in} dimensions"
