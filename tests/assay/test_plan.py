"""`assay train --plan` as a user calls it."""

from __future__ import annotations

from pathlib import Path

CONFIG = Path(__file__).parents[2] / "configs" / "tensors.yaml"


def test_the_command_plans_and_trains_nothing(command, tmp_path):
    plan = ("train", CONFIG, "--plan", "--gpus", "16", "--gpu", "h200", "--d-in", "512")
    code, shown, error = command(*plan, cwd=tmp_path)
    assert code == 0, error
    for word in ("Adam's moments", "AuxK", "sent along feature", "chosen", "data sheet", "assumed", "rows/s"):
        assert word in shown
    assert not list(tmp_path.iterdir()), "it wrote something"
    code, _, said = command("train", CONFIG, "--plan", "--gpu", "h200", cwd=tmp_path)
    assert code == 2 and "--d-in" in said
    wide = ("train", CONFIG, "sae.d_sae=1048576", "--plan", "--gpu", "h100", "--d-in", "4096")
    code, _, said = command(*wide, cwd=tmp_path)
    assert code == 2 and "smallest mesh" in said
    code, _, said = command(
        "train", CONFIG, "sweep={sae.k: [4]}", "evaluate={}", "--plan", "--d-in", "64", cwd=tmp_path
    )
    assert code == 2 and "one dictionary at a time" in said


def test_what_is_for_plans_only_is_refused_in_a_training(command, tmp_path):
    for option in (("--gpus", "8"), ("--gpu", "h200"), ("--d-in", "64")):
        code, _, said = command("train", CONFIG, *option, cwd=tmp_path)
        assert code == 2 and f"{option[0]} is for --plan" in said
