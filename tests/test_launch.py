"""The launch files of scripts/launch: what a scheduler would read of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.main import get_command

from mergesearch.cli import app
from mergesearch.config.storage import check_url, expanded

LAUNCH = Path(__file__).parent.parent / "scripts" / "launch"
SCHEMA = Path(__file__).parent / "data" / "kubernetes_job.json"
SLURM, KUBERNETES = LAUNCH / "slurm.sbatch", LAUNCH / "kubernetes.yaml"
# of sbatch's manual, with the form of the value
OPTIONS = {
    "job-name": r"[\w-]+",
    "gres": r"gpu:\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"B:TERM@\d+",
    "output": r"[\w%.-]+",
    "requeue": "",
}


def test_slurms_options_are_sbatchs() -> None:
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    given = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert given
    for option in given:
        name, _, value = option.partition("=")
        assert re.fullmatch(OPTIONS[name], value), option
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch reads none behind a command
    subprocess.run(["bash", "-n", SLURM], check=True)


def test_slurms_warning_reaches_the_worker(tmp_path: Path) -> None:
    """With a stand-in for the command, which says what it was given and that it was asked to end."""
    stand_in = tmp_path / "mergesearch"
    stand_in.write_text(
        f"#!{sys.executable} -S\n"
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "print(*sys.argv[1:], flush=True)\n"
        "if signal.sigtimedwait([signal.SIGTERM], 60):\n"
        "    print('handed back', flush=True)\n"
        "    sys.exit(1)\n"
    )
    stand_in.chmod(0o755)
    there = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CONFIG": "mine.yaml", "SETS": "--set search.trials=9"}
    begun = subprocess.Popen(["bash", SLURM], env=there, stdout=subprocess.PIPE, text=True)
    assert begun.stdout is not None
    assert begun.stdout.readline() == "worker mine.yaml --set search.trials=9\n"
    begun.send_signal(signal.SIGTERM)
    assert begun.stdout.readline() == "handed back\n"
    begun.wait(timeout=30)
    left_out = subprocess.run(["bash", SLURM], env={"PATH": there["PATH"]}, capture_output=True, text=True)
    assert left_out.returncode and "name the configuration" in left_out.stderr


def test_the_job_is_one_that_kubernetes_takes() -> None:
    job = yaml.safe_load(KUBERNETES.read_text(encoding="utf-8"))
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    valid = Draft202012Validator(schema)
    assert [error.message for error in valid.iter_errors(job)] == []
    # what a typing error makes of it is refused
    for wrong in ({"backoffLimitPerPod": 10}, {"parallelism": "8"}, {"template": {"spec": {"restartPolicy": "Never"}}}):
        assert not valid.is_valid({**job, "spec": {**job["spec"], **wrong}})
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what backoffLimitPerIndex asks for
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    first = job["spec"]["podFailurePolicy"]["rules"][0]  # the first that fits counts
    wrong_input = {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert (first["action"], first["onExitCodes"]) == ("FailIndex", wrong_input)
    verb = container["command"][1]
    assert container["command"][0] == "mergesearch" and verb in get_command(app).commands  # type: ignore[attr-defined]


def test_the_secrets_password_comes_into_the_storage_that_kubernetes_file_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = KUBERNETES.read_text(encoding="utf-8")
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    monkeypatch.setenv(variable["name"], "se/cret")
    found = re.search(r"# .*(storage: \S+)$", text, re.MULTILINE)
    assert found
    storage = yaml.safe_load(found[1])["storage"]
    assert expanded(check_url(storage)) == "postgresql://me:se%2Fcret@database/runs"


def test_kubernetes_says_so_too() -> None:
    if shutil.which("kubeconform") is None:
        pytest.skip("kubeconform is not installed")
    subprocess.run(["kubeconform", "-strict", KUBERNETES], check=True)


def test_the_manual_names_both() -> None:
    text = (LAUNCH.parent.parent / "docs" / "workers.md").read_text(encoding="utf-8")
    assert all(f"../scripts/launch/{path.name}" in text for path in LAUNCH.iterdir())
    assert shlex.split("CONFIG=mine.yaml sbatch --array=0-7 scripts/launch/slurm.sbatch")[-1] in SLURM.read_text()
