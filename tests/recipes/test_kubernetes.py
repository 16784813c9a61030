"""The PyTorchJob: its fields by the API's rules, and the command of its pods in real processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pytorchjob import PersistentVolumeClaim, PyTorchJob, quantity
from w2vscale.checkpoint.verification import verify

ROOT = Path(__file__).resolve().parents[2]
JOB, CLAIM = yaml.safe_load_all((ROOT / "recipes" / "utils" / "kubernetes" / "pytorchjob.yaml").read_text())
CONTAINER = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]


def test_every_field_is_one_of_the_api() -> None:
    job, claim = PyTorchJob.model_validate(JOB), PersistentVolumeClaim.model_validate(CLAIM)
    worker = job.spec.pytorch_replica_specs.Worker
    pod = worker.template.spec
    (container,) = pod.containers
    assert worker.replicas == job.spec.elastic_policy.max_replicas
    assert str(container.resources.limits["nvidia.com/gpu"]) == job.spec.nproc_per_node
    claims = [one.persistent_volume_claim.claim_name for one in pod.volumes if one.persistent_volume_claim]
    assert claims == [claim.metadata.name]
    assert claim.spec.access_modes == ["ReadWriteMany"]  # several pods write checkpoints
    (memory,) = (one for one in pod.volumes if one.empty_dir)
    assert {"name": memory.name, "mountPath": "/dev/shm"} in CONTAINER["volumeMounts"]
    assert memory.empty_dir and memory.empty_dir.size_limit and memory.empty_dir.medium == "Memory"
    assert quantity(memory.empty_dir.size_limit) < quantity(container.resources.limits["memory"])
    assert pod.termination_grace_period_seconds > 130  # TORCH_ELASTIC_SHUTDOWN_TIMEOUT of environment.sh


def changed(path: str, value: object) -> dict[str, Any]:
    job = copy.deepcopy(JOB)
    *parents, last = path.split(".")
    place = job
    for name in parents:
        place = place[int(name)] if name.isdecimal() else place[name]
    place[last] = value
    return job


WORKER = "spec.pytorchReplicaSpecs.Worker"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "kubeflow.org/v2"),
        ("metadata.name", "W2V_scale"),
        ("spec.nprocPerNode", 8),  # the API wants a string
        ("spec.nProcPerNode", "8"),
        ("spec.elasticPolicy.minReplicas", 3),
        (f"{WORKER}.restartPolicy", "OnError"),
        (f"{WORKER}.template.spec.restartPolicy", "Never"),
        (f"{WORKER}.template.spec.containers.0.name", "train"),
        (f"{WORKER}.template.spec.containers.0.volumeMounts", [{"name": "other", "mountPath": "/x"}]),
        (f"{WORKER}.template.spec.containers.0.args", "train base"),
        (f"{WORKER}.template.spec.containers.0.resources.requests", {"memory": "1Ti"}),
        ("spec.pytorchReplicaSpecs.worker", {}),
    ],
)
def test_what_the_api_would_refuse_is_refused(path: str, value: object) -> None:
    with pytest.raises((ValidationError, ValueError)):
        PyTorchJob.model_validate(changed(path, value))


def pod(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """The command of a pod, in the checkout."""
    script, name = CONTAINER["args"][:2]
    return subprocess.Popen(
        [*CONTAINER["command"], script, name, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def test_its_script_is_shellcheck_clean(tmp_path: Path) -> None:
    (tmp_path / "pod.sh").write_text("# shellcheck shell=bash\n" + CONTAINER["args"][0])
    found = subprocess.run(
        [
            Path(sys.executable).with_name("shellcheck"),
            "--external-sources",
            f"--source-path={ROOT}",
            tmp_path / "pod.sh",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("code", "final"), [(0, 0), (1, 1), (2, 2), (75, 143), (137, 137), (143, 143)])
def test_the_exit_code_tells_the_operator_whether_to_make_the_pod_again(code: int, final: int, tmp_path: Path) -> None:
    """Kubeflow's policy ExitCode: 1 to 127 is permanent, 128 and more is tried again."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*"\nexit {code}\n')
    python.chmod(0o755)
    process = pod(["base", "a b"], PATH=f"{tmp_path}:{os.environ['PATH']}")
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (
        final,
        "1 -m w2vscale.distributed.torchrun -m w2vscale train base a b\n",
    )


@pytest.mark.long
@pytest.mark.distributed
def test_a_pod_that_is_stopped_saves_and_a_new_one_continues(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    arguments = ["base", *MICRO_RUN, "checkpoint.every=1000", f"data.train={small_corpus.train}", "--exp", str(exp)]
    given = {
        # What the operator sets.
        "PET_NNODES": "1:2", "PET_NPROC_PER_NODE": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "localhost:0",
        "PET_MAX_RESTARTS": "3",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    process = pod([*arguments, "trainer.updates=100000"], **given)
    try:
        deadline = time.monotonic() + 120.0
        while not ((exp / "metrics.jsonl").is_file() and (exp / "metrics.jsonl").read_text().count("\n") > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # to process 1 of the pod alone
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 143, printed
        assert "stopped by SIGTERM; the same command continues from here" in printed
        assert verify(exp).problems == []
        stopped = json.loads((exp / "metrics.jsonl").read_text().splitlines()[-1])["update"]

        process = pod([*arguments, f"trainer.updates={stopped + 2}"], **given)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert f"resumed from {exp}/checkpoints/update_{stopped:08d}" in printed
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
