"""The files in configs/launch: scripts parse and hand their arguments on; the manifest is what Kubernetes expects."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "configs" / "launch"


@pytest.mark.parametrize(
    "path", sorted(p for p in LAUNCH.iterdir() if p.suffix != ".yaml"), ids=lambda p: p.name
)
def test_every_script_parses(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def launch(script: str, *given: str, tmp_path: Path, fails: int = 0, **env: str) -> tuple[int, list[str]]:
    """Run a script with a torchrun that writes its arguments down and fails so many times."""
    tool, log = tmp_path / "torchrun", tmp_path / "log"
    tool.write_text(f'#!/bin/bash\necho "$*" >> {log}\n(( $(wc -l < {log}) > {fails} ))\n')
    tool.chmod(0o755)
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "sleep").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [LAUNCH / script, *given], env={**os.environ, **env, "PATH": path}, capture_output=True, check=False
    )
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_one_host_hands_over_to_torchrun(tmp_path):
    code, (line,) = launch("one_host.sh", "c.yaml", "sae.k=8", tmp_path=tmp_path, RANKS="4")
    assert code == 0 and line.endswith("--no-python assay train c.yaml sae.k=8")
    assert "--nproc-per-node 4" in line and "--max-restarts 20" in line


@pytest.mark.parametrize(("fails", "code", "starts"), [(0, 0, 1), (2, 0, 3), (9, 1, 3)])
def test_a_host_starts_again_a_few_times(tmp_path, fails, code, starts):
    env = {"HOSTS": "2", "HOST_RANK": "1", "HOST_ZERO": "10.0.0.1", "RESTARTS": "3"}
    got, lines = launch("several_hosts.sh", "c.yaml", tmp_path=tmp_path, fails=fails, **env)
    assert (got, len(lines)) == (code, starts)
    assert "--node-rank 1" in lines[0] and "--master-addr 10.0.0.1" in lines[0]


def test_the_job_is_one_pod_per_host_and_each_finds_the_first():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] and pod["restartPolicy"] == "Never"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {
        "job-name": job["metadata"]["name"]
    }
    (container,) = pod["containers"]
    words = container["command"][2].split()
    assert words[words.index("--nnodes") + 1] == str(spec["completions"])
    assert words[words.index("--nproc-per-node") + 1] == str(
        container["resources"]["limits"]["nvidia.com/gpu"]
    )
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert (
        words[words.index("--master-addr") + 1] == first and pod["subdomain"] == service["metadata"]["name"]
    )
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
