"""The files of cluster/ against the schemas and linters of the tools that read them.

tests/cluster/kuberay/ holds the schemas (descriptions left out) of KubeRay v1.7.0's published custom resources,
Apache-2.0, github.com/ray-project/kuberay. Kubernetes' own are kubernetes-validate's.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from namespaces import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = ROOT / "cluster"
LAUNCHER = sorted(CLUSTER.glob("ray-*.yaml"))
SCRIPTS = sorted([*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch")])
TOOLS = Path(sys.executable).parent
# what sbatch knows of the options that such a script may use, and what their values look like
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "exclusive": "",
    "time": r"(\d+-)?\d{1,2}(:\d{2}){1,2}",
    "signal": r"(R?B?:)?(\w+)(@\d+)?",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[\w./%-]+",
}


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name}-{document['kind']}", document)
        for path in sorted(CLUSTER.glob("kuberay-*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def strict(schema: Any) -> Any:
    """The same schema, which also refuses fields it does not name (the API server drops them in silence)."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def kuberay_schema(kind: str) -> Any:
    path = Path(__file__).parent / "kuberay" / f"{kind.lower()}s-v1.json.gz"
    schema = strict(json.loads(gzip.decompress(path.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return schema


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_cluster_launcher_takes_the_file(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    whole = prepare_config(copy.deepcopy(config))
    validate_config({"cluster_synced_files": [], **whole})
    broken = {**whole, "cluster_synced_files": [], "head_start_ray_command": []}
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_command"):
        validate_config(broken)
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token ray start " in command
        words = shlex.split(command[command.index("ray start") :])
        assert set(word.partition("=")[0] for word in words[2:]) <= {
            *("--head", "--port", "--address", "--dashboard-host", "--disable-usage-stats", "--autoscaling-config"),
        }
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert any(target.endswith(".ray/auth_token") for target in config["file_mounts"])


@pytest.mark.parametrize(("name", "document"), documents(), ids=[name for name, _ in documents()])
def test_kubernetes_takes_the_file(name: str, document: dict[str, Any]) -> None:
    if document["apiVersion"] == "v1":
        kubernetes_validate.validate(document, "1.31", strict=True)
        return
    assert document["apiVersion"] == "ray.io/v1"
    schema = kuberay_schema(document["kind"])
    jsonschema.validate(document, schema)
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__, "the image has the Ray of this environment"
    misspelt = copy.deepcopy(document)
    misspelt["spec"]["rayVersions"] = "2"
    with pytest.raises(jsonschema.ValidationError, match="rayVersions"):
        jsonschema.validate(misspelt, schema)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    found = subprocess.run([TOOLS / "shellcheck", "--shell=bash", path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_slurm_reads_every_directive() -> None:
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    found = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert number < first, "sbatch reads no directive after the first command"
            (word,) = shlex.split(line, comments=False)[1:]
            name, _, value = word.removeprefix("--").partition("=")
            assert re.fullmatch(SBATCH[name], value), line
            found[name] = value
    # the shell gets the signal long enough before the end, and the job may come back
    assert re.fullmatch(r"B:TERM@\d{3}", found["signal"])
    assert "requeue" in found
    text = "\n".join(lines)
    assert "RAY_AUTH_MODE=token" in text
    assert "--dashboard-host=127.0.0.1" in text


def test_the_dockerfile_is_clean() -> None:
    found = subprocess.run([TOOLS / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    text = (CLUSTER / "Dockerfile").read_text()
    assert {"cpu", "gpu"} <= set(re.findall(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE))
    assert "RAY_AUTH_MODE=token" in text


def test_symmetric_run_has_the_options_that_slurm_uses() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"ray symmetric-run (.*?) -- ", text)
    help_text = subprocess.run([TOOLS / "ray", "symmetric-run", "--help"], capture_output=True, text=True, check=True)
    start = subprocess.run([TOOLS / "ray", "start", "--help"], capture_output=True, text=True, check=True)
    for option in re.findall(r"--[\w-]+", line):
        assert option in help_text.stdout or option in start.stdout, option
