"""Run by the interpreter that has the other libraries: what they make of a folder, and folders of their making.

python speak.py read FORMAT X.npy FOLDER ...    writes FOLDER/theirs.npz: dense codes and reconstructions of X
python speak.py make FORMAT X.npy FOLDER        a dictionary of each of the library's kinds in FOLDER/<kind>/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

D_IN, D_SAE, K = 12, 40, 4


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter away from its special start; thresholds stay positive, decoder rows get unequal norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = 0.2 * torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() if name == "threshold" else value + noise)
    return module


class SaeLens:
    def read(self, folder: Path, x: torch.Tensor):
        from sae_lens import SAE

        sae = SAE.load_from_disk(str(folder), device="cpu")
        z = sae.encode(x)
        return z, sae.decode(z)

    def make(self, folder: Path):
        from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

        common = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "metadata": {}}
        kinds = {
            "standard": {"architecture": "standard"},
            "standard_uncentred": {"architecture": "standard", "apply_b_dec_to_input": False},
            "topk": {"architecture": "topk", "k": K},
            "topk_rescaled": {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
            "jumprelu": {"architecture": "jumprelu"},
            "gated": {"architecture": "gated"},
            "gated_uncentred": {"architecture": "gated", "apply_b_dec_to_input": False},
        }
        for name, settings in kinds.items():
            randomised(SAE.from_dict({**common, **settings})).save_model(folder / name)
        sizes = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu"}
        trained = randomised(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=K)))
        trained.topk_threshold.fill_(0.3)
        trained.save_inference_model(folder / "batchtopk")
        rescaled = {"k": K, "normalize_activations": "expected_average_only_in"}
        trained = randomised(TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, **rescaled)))
        trained.fold_activation_norm_scaling_factor(0.05)
        trained.save_inference_model(folder / "topk_folded")


class DictionaryLearning:
    def read(self, folder: Path, x: torch.Tensor):
        from dictionary_learning.utils import load_dictionary

        dictionary, _ = load_dictionary(str(folder), "cpu")
        z = dictionary.encode(x)
        return z, dictionary.decode(z)

    def make(self, folder: Path):
        from dictionary_learning import dictionary as d
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        made = {
            "AutoEncoder": d.AutoEncoder(D_IN, D_SAE),
            "AutoEncoderNew": d.AutoEncoderNew(D_IN, D_SAE),
            "AutoEncoderTopK": AutoEncoderTopK(D_IN, D_SAE, K),
            "BatchTopKSAE": BatchTopKSAE(D_IN, D_SAE, K),
            "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [10, 30]),
            "JumpReluAutoEncoder": d.JumpReluAutoEncoder(D_IN, D_SAE),
            "GatedAutoEncoder": d.GatedAutoEncoder(D_IN, D_SAE),
        }
        untrained = BatchTopKSAE(D_IN, D_SAE, K)
        for name, dictionary in [*made.items(), ("untrained", untrained)]:
            randomised(dictionary)
            if "TopKSAE" in name:
                dictionary.threshold.fill_(0.3)
            out = folder / name
            out.mkdir(parents=True)
            torch.save(dictionary.state_dict(), out / "ae.pt")
            trainer = {"dict_class": type(dictionary).__name__, "k": K}
            (out / "config.json").write_text(json.dumps({"trainer": trainer}))


class Sparsify:
    def read(self, folder: Path, x: torch.Tensor):
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(folder, device="cpu")
        values, indices, _ = coder.encode(x)
        z = torch.zeros(len(x), coder.num_latents).scatter(1, indices, values)
        return z, coder.decode(values, indices)

    def make(self, folder: Path):
        from sparsify import SparseCoder, SparseCoderConfig

        for name, sizes in {"sized": {"num_latents": D_SAE}, "expanded": {"expansion_factor": 4}}.items():
            randomised(SparseCoder(D_IN, SparseCoderConfig(k=K, **sizes))).save_to_disk(folder / name)


LIBRARIES = {"saelens": SaeLens, "dictionary_learning": DictionaryLearning, "sparsify": Sparsify}


def main(command: str, format_: str, x_path: str, *folders: str) -> None:
    library, x = LIBRARIES[format_](), torch.from_numpy(np.load(x_path))
    found = [Path(f) for f in folders]
    if command == "make":
        library.make(found[0])
        found = sorted(found[0].iterdir())
    with torch.no_grad():
        for folder in found:
            z, x_hat = library.read(folder, x)
            np.savez(folder / "theirs.npz", z=z.numpy(), x_hat=x_hat.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
