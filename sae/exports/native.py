"""Our own format: `config.json` and `weights.safetensors`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from sae.base import SAE
from sae.checkpoint import CONFIG, WEIGHTS, load_sae, save_sae
from sae.errors import CheckpointError

from .format import Format, Origin, require_finite


def write(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write the dictionary as training does."""
    save_sae(sae, folder, extra={"origin": asdict(origin)})


def read(folder: Path) -> SAE:
    """Read a folded dictionary.

    Raises
    ------
    CheckpointError
        It is damaged, its weights are not finite, or it reads scaled activations.
    """
    sae = load_sae(folder)
    if not sae.folded:
        raise CheckpointError(
            f"{folder} reads scaled activations", do="fold it first; training saves it folded"
        )
    require_finite(sae.state_dict(), where=folder / WEIGHTS)
    return sae


FORMAT = Format("native", (CONFIG, WEIGHTS), write, read)
