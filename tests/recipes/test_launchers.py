"""cmd.sh: what each launcher would run, and what it refuses. tests/recipes/test_slurm.py runs SLURM's."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
UTILS = RECIPES / "utils"

SCRIPT = f"""#!/usr/bin/env bash
set -euo pipefail
nproc=1
launcher=local
print_command=false
. {UTILS}/parse_options.sh
. {UTILS}/log.sh
. {UTILS}/cmd.sh
on_ranks train 'a b' data.train="[x,y]" --exp "it's"
"""
GIVEN = ["train", "a b", "data.train=[x,y]", "--exp", "it's"]
OURS = (
    "NNODES",
    "RDZV",
    "RDZV_ID",
    "MAX_RESTARTS",
    "LOCAL_ADDR",
    "HOSTFILE",
    "FIRST_MACHINE",
    "OMP_NUM_THREADS",
    "NCCL_DEBUG",
)
THEIRS = ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TASK_CODES")


def clean(folder: Path, **given: str) -> dict[str, str]:
    """An environment without a launcher's variables, in which programs report what they are given."""
    bin_folder = folder / "bin"
    if not bin_folder.exists():
        bin_folder.mkdir()
        for name in ("w2vscale", "python", "deepspeed", "srun"):
            program = bin_folder / name
            program.write_text(f'#!/bin/bash\necho {name}; printf "%q " "$@"; echo; env\n')
            program.chmod(0o755)
        scontrol = bin_folder / "scontrol"
        scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n')
        scontrol.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in (*OURS, *THEIRS) and "SLURM" not in name}
    return kept | {"PATH": f"{bin_folder}{os.pathsep}/usr/bin{os.pathsep}/bin"} | given


def run(folder: Path, *options: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    script = folder / "run.sh"
    script.write_text(SCRIPT)
    done = subprocess.run(
        ["bash", str(script), *options],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env=clean(folder, **environment),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def words(folder: Path, *options: str, **environment: str) -> tuple[dict[str, str], list[str]]:
    """The variables and the words of the command that --print-command shows."""
    (line,) = run(folder, *options, "--print-command", **environment).stdout.splitlines()
    found = shlex.split(line)
    assert found.pop(0) == "env"
    variables = {}
    while "=" in found[0] and not found[0].startswith("/"):
        name, _, value = found.pop(0).partition("=")
        variables[name] = value
    return variables, found


TORCHRUN = ["-m", "w2vscale.distributed.torchrun"]
JOB = {
    "SLURM_JOB_ID": "24007",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[3-4]",
    "SLURM_CPUS_PER_TASK": "6",
}


class TestCommands:
    def test_local(self, tmp_path: Path) -> None:
        _, found = words(tmp_path, "--nproc", "4")
        assert found == [f"{tmp_path}/bin/w2vscale", "train", "--nproc-per-node", "4", *GIVEN[1:]]

    def test_torchrun_on_one_machine(self, tmp_path: Path) -> None:
        _, found = words(tmp_path, "--launcher", "torchrun", "--nproc", "4")
        assert found == [
            f"{tmp_path}/bin/python", *TORCHRUN, "--nnodes", "1", "--nproc-per-node", "4", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", "--rdzv-id", "w2vscale", "--max-restarts", "0", "-m", "w2vscale", *GIVEN,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"NNODES": "3"}, ("3", "node1:29400", "w2vscale", "0")),
            ({"NNODES": "2:3"}, ("2:3", "node1:29400", "w2vscale", "3")),
            ({"NNODES": "2:3", "MAX_RESTARTS": "0"}, ("2:3", "node1:29400", "w2vscale", "0")),
            (
                {"NNODES": "2", "RDZV_ID": "my job", "MAX_RESTARTS": "9", "RDZV": "[fd00::1]:1"},
                ("2", "[fd00::1]:1", "my job", "9"),
            ),
        ],
    )
    def test_torchrun_on_several(self, environment: dict[str, str], expected: tuple[str, ...], tmp_path: Path) -> None:
        _, found = words(tmp_path, "--launcher", "torchrun", **{"RDZV": "node1:29400", **environment})
        options = ("--nnodes", "--rdzv-endpoint", "--rdzv-id", "--max-restarts")
        assert tuple(found[found.index(option) + 1] for option in options) == expected
        assert ("last_call_timeout=10" in found) == (":" in expected[0])

    def test_slurm_with_a_task_per_process(self, tmp_path: Path) -> None:
        _, found = words(tmp_path, "--launcher", "slurm", **JOB)
        command = [f"{tmp_path}/bin/w2vscale", *GIVEN]
        assert found == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=6", *command]
        _, found = words(tmp_path, "--launcher", "slurm")
        assert found == ["srun", "--kill-on-bad-exit=1", *command]
        _, found = words(tmp_path, "--launcher", "slurm", TASK_CODES="/tmp/a b")
        assert found == ["srun", "--kill-on-bad-exit=1", "bash", f"{UTILS}/slurm/task.sh", "/tmp/a b", *command]

    def test_slurm_with_a_task_per_machine(self, tmp_path: Path) -> None:
        _, found = words(tmp_path, "--launcher", "slurm", "--nproc", "8", **JOB, SLURM_RESTART_COUNT="2")
        machines = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
        assert found == [
            "srun", "--kill-on-bad-exit=1", "--cpus-per-task=6", *machines, f"{tmp_path}/bin/python", *TORCHRUN,
            "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node3:20007",
            "--rdzv-id", "24007.2", "--max-restarts", "0", "-m", "w2vscale", *GIVEN,
        ]  # fmt: skip

    def test_deepspeed(self, tmp_path: Path) -> None:
        _, found = words(tmp_path, "--launcher", "deepspeed", "--nproc", "2", RDZV="10.0.0.1:4000")
        port = ["--master_addr", "10.0.0.1", "--master_port", "4000"]
        module = ["--module", "w2vscale", *GIVEN]
        assert found == [f"{tmp_path}/bin/deepspeed", "--num_gpus", "2", *port, *module]
        (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
        given = {"RDZV": "10.0.0.1:4000", "HOSTFILE": "hosts", "NNODES": "2"}
        _, found = words(tmp_path, "--launcher", "deepspeed", "--nproc", "8", **given)
        hosts = ["--hostfile", f"{tmp_path}/hosts", "--num_gpus", "8", "--num_nodes", "2"]
        assert found == [f"{tmp_path}/bin/deepspeed", *hosts, *port, *module]
        # DeepSpeed would ignore CUDA_VISIBLE_DEVICES beside --num_gpus.
        given = {"RDZV": "10.0.0.1:4000", "CUDA_VISIBLE_DEVICES": "4,6,7"}
        _, found = words(tmp_path, "--launcher", "deepspeed", "--nproc", "2", **given)
        assert found == [f"{tmp_path}/bin/deepspeed", "--include", "localhost:4,6", *port, *module]

    @pytest.mark.parametrize("launcher", ["local", "torchrun", "deepspeed", "slurm"])
    def test_what_is_printed_is_what_runs(self, launcher: str, tmp_path: Path) -> None:
        """The printed line, pasted into another shell, gives a program the same words and variables."""
        given = {"RDZV": "node1:29400", "LANG": "C"}
        options = ("--launcher", launcher, "--nproc", "1")
        printed = run(tmp_path, *options, "--print-command", **given).stdout
        shell = {name: value for name, value in clean(tmp_path, **given).items() if name != "PWD"}
        pasted = subprocess.run(
            ["bash", "-c", printed], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=shell
        )

        def seen(text: str) -> list[str]:
            lines = [line for line in text.splitlines() if not line.startswith(("_=", "SHLVL=", "OLDPWD="))]
            return lines[:2] + sorted(lines[2:])

        assert seen(pasted.stdout) == seen(run(tmp_path, *options, **given).stdout)


class TestVariables:
    def test_each_is_set(self, tmp_path: Path) -> None:
        variables, _ = words(tmp_path, "--launcher", "torchrun", "--nproc", "2")
        threads = str(max(len(os.sched_getaffinity(0)) // 2, 1))
        assert variables == {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "130",
            "NCCL_DEBUG": "WARN",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "OMP_NUM_THREADS": threads,
        }

    def test_a_single_process_may_use_all_cores(self, tmp_path: Path) -> None:
        assert "OMP_NUM_THREADS" not in words(tmp_path)[0]

    def test_those_of_the_user_count(self, tmp_path: Path) -> None:
        own = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
        variables, _ = words(tmp_path, "--launcher", "torchrun", "--nproc", "2", **own)
        assert not {"NCCL_DEBUG", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"} & set(variables)

    def test_the_documentation_names_each(self, tmp_path: Path) -> None:
        variables, _ = words(tmp_path, "--launcher", "torchrun", "--nproc", "2", LOCAL_ADDR="127.0.0.1")
        page = (RECIPES.parent / "docs" / "launching.md").read_text()
        for name in (*variables, *OURS[:7]):
            assert f"| `{name}`" in page, name

    @pytest.mark.skipif(not Path("/sbin/ip").exists() and not Path("/usr/sbin/ip").exists(), reason="no ip command")
    def test_the_interface_is_that_of_the_address(self, tmp_path: Path) -> None:
        path = f"{tmp_path}/bin:/usr/sbin:/sbin:/usr/bin:/bin"
        given = {"NNODES": "2", "RDZV": "203.0.113.7:29400", "PATH": path}
        variables, found = words(tmp_path, "--launcher", "torchrun", LOCAL_ADDR="127.0.0.1", **given)
        assert (variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
        assert found[found.index("--local-addr") + 1] == "127.0.0.1"
        done = run(tmp_path, "--launcher", "torchrun", code=2, LOCAL_ADDR="203.0.113.1", **given)
        assert done.stderr == "run.sh: LOCAL_ADDR=203.0.113.1 is not an address of this machine: see ip address\n"


class TestRefused:
    @pytest.mark.parametrize(
        ("launcher", "environment", "message"),
        [
            ("torchrun", {"NNODES": "2"}, "NNODES=2 without RDZV: each machine would wait for itself; set RDZV="),
            ("torchrun", {"NNODES": "1:2"}, "NNODES=1:2 without RDZV"),
            ("torchrun", {"NNODES": "abc"}, "NNODES=abc: give a number of machines, or MIN:MAX for an elastic run"),
            ("torchrun", {"NNODES": "3:2"}, "NNODES=3:2: give a number"),
            ("torchrun", {"NNODES": "0"}, "NNODES=0: give a number"),
            ("torchrun", {"NNODES": "2:"}, "NNODES=2:: give a number"),
            ("torchrun", {"NNODES": "1:2:3"}, "NNODES=1:2:3: give a number"),
            ("torchrun", {"NNODES": "$(id)"}, "NNODES=$(id): give a number"),
            ("torchrun", {"NNODES": "2", "RDZV": "node1"}, "RDZV=node1: give HOST:PORT of one of the machines"),
            ("torchrun", {"NNODES": "2", "RDZV": "node1:"}, "RDZV=node1:: give HOST:PORT"),
            ("torchrun", {"NNODES": "2", "RDZV": "node1:99999"}, "RDZV=node1:99999: give HOST:PORT"),
            ("torchrun", {"NNODES": "2", "RDZV": "tcp://node1:29400"}, "RDZV=tcp://node1:29400: give HOST:PORT"),
            ("torchrun", {"NNODES": "2", "RDZV": ":29400"}, "RDZV=:29400: give HOST:PORT"),
            ("torchrun", {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: give a number of restarts"),
            ("local", {"NNODES": "2"}, "NNODES=2: --launcher local starts processes on this machine only"),
            ("local", {"MAX_RESTARTS": "2"}, "MAX_RESTARTS=2: --launcher local does not restart processes"),
            ("slurm", {"MAX_RESTARTS": "2"}, "MAX_RESTARTS=2: --launcher slurm does not restart processes"),
            ("deepspeed", {"MAX_RESTARTS": "2"}, "MAX_RESTARTS=2: --launcher deepspeed does not restart processes"),
            ("deepspeed", {"NNODES": "2"}, "NNODES=2 without HOSTFILE: set HOSTFILE to a file with a line"),
            ("deepspeed", {"NNODES": "1:2"}, "NNODES=1:2: DeepSpeed's launcher is not elastic"),
            ("deepspeed", {"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere: no such file"),
            ("torchrun", {"FIRST_MACHINE": "yes"}, "FIRST_MACHINE takes true or false, not 'yes'"),
            ("ssh", {}, "--launcher takes local, torchrun, slurm or deepspeed, not ssh"),
        ],
    )  # fmt: skip
    def test_in_one_line(self, launcher: str, environment: dict[str, str], message: str, tmp_path: Path) -> None:
        done = run(tmp_path, "--launcher", launcher, code=2, **environment)
        assert done.stderr.startswith(f"run.sh: {message}") and done.stderr.count("\n") == 1
        assert done.stdout == ""

    @pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", "gpu"])
    def test_a_number_of_processes_that_is_none(self, number: str, tmp_path: Path) -> None:
        done = run(tmp_path, f"--nproc={number}", code=2)
        assert done.stderr == f"run.sh: --nproc takes a number of processes, 1 or more, not '{number}'\n"

    def test_a_task_per_machine_outside_of_a_job_or_with_several_tasks(self, tmp_path: Path) -> None:
        options = ("--launcher", "slurm", "--nproc", "8")
        assert "only inside sbatch or salloc" in run(tmp_path, *options, code=2).stderr
        given = {**JOB, "SLURM_NTASKS_PER_NODE": "8"}
        assert "needs sbatch --ntasks-per-node=1, not 8" in run(tmp_path, *options, code=2, **given).stderr


MACHINES = f"""#!/usr/bin/env bash
set -euo pipefail
stage=1
stop_stage=9
launcher=torchrun
. {UTILS}/parse_options.sh
. {UTILS}/log.sh
. {UTILS}/cmd.sh
echo "first machine: $first_machine"
prepare() {{ sleep 3; mkdir -p data; echo prepared | tee data/made; }}
train() {{
  cat data/made >/dev/null
  # As torchrun does, wait for the other machine.
  touch "here-$first_machine"
  until [[ -e here-true && -e here-false ]]; do sleep 0.1; done
  on_ranks train
  on_first_machine echo reported
}}
run_stage 1 "prepare" data prepare
made=data/made
train_stage 4 "train" exp --reads made train
run_stage 5 "evaluate" exp --reads made echo evaluated
"""


class TestSeveralMachines:
    def start(self, folder: Path, **environment: str) -> subprocess.Popen[str]:
        script = folder / "run.sh"
        script.write_text(MACHINES)
        given = clean(folder, **{"NNODES": "2", "RDZV": "203.0.113.7:29400", **environment})
        return subprocess.Popen(
            ["bash", str(script)], cwd=folder, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def test_one_prepares_and_all_train(self, tmp_path: Path) -> None:
        """Two recipes in one folder, as on two machines with a shared file system."""
        second = self.start(tmp_path, FIRST_MACHINE="false")
        first = self.start(tmp_path, FIRST_MACHINE="true")
        try:
            outputs = [process.communicate(timeout=60) for process in (first, second)]
        finally:
            first.kill()
            second.kill()
        assert [process.returncode for process in (first, second)] == [0, 0], outputs
        lines = [[line for line in printed.splitlines() if "=" not in line] for printed, _ in outputs]
        trained = [line for line in lines[1] if line.startswith("-m w2vscale.distributed.torchrun")]
        assert len(trained) == 1 and trained[0] in lines[0]
        started = ["python", *trained]
        assert lines[0] == ["first machine: true", "prepared", *started, "reported", "evaluated"]
        assert lines[1] == ["first machine: false", *started]
        assert "stage 5: evaluate: waiting for the first machine, that of RDZV=203.0.113.7:29400" in outputs[1][1]
        # All is done, on each of them.
        again = self.start(tmp_path, FIRST_MACHINE="false")
        assert again.communicate(timeout=60)[1].count("done already") == 3

    def test_a_stage_that_fails_ends_those_that_wait_for_it(self, tmp_path: Path) -> None:
        second = self.start(tmp_path, FIRST_MACHINE="false")
        try:
            while "waiting for the first machine" not in second.stderr.readline():  # type: ignore[union-attr]
                assert second.poll() is None
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "made").mkdir()  # which the first stage cannot write
            first = self.start(tmp_path, FIRST_MACHINE="true")
            assert first.wait(60) == 1
            _, errors = second.communicate(timeout=60)
        finally:
            second.kill()
        assert second.returncode == 2
        assert re.search(r"^run.sh: stage 1 has failed on \S+ at \d{4}-", errors, re.MULTILINE), errors

    def test_the_machine_of_the_rendezvous_is_the_first(self, tmp_path: Path) -> None:
        for rendezvous, first in ((f"{socket.gethostname()}:1", "true"), ("203.0.113.1:1", "false")):
            script = tmp_path / "run.sh"
            script.write_text(MACHINES)
            done = subprocess.run(
                ["bash", str(script), "--stop-stage", "0"],
                cwd=tmp_path,
                env=clean(tmp_path, NNODES="2", RDZV=rendezvous),
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.stdout == f"first machine: {first}\n", done.stderr

    @pytest.mark.parametrize(
        ("rendezvous", "message"),
        [
            ("localhost:1", "each machine would wait for itself"),
            ("[::1]:1", "each machine would wait for itself"),
            ("nosuch.invalid:1", "no machine has this name"),
        ],
    )
    def test_a_rendezvous_that_cannot_be_is_refused(self, rendezvous: str, message: str, tmp_path: Path) -> None:
        process = self.start(tmp_path, RDZV=rendezvous)
        printed, errors = process.communicate(timeout=60)
        assert (process.returncode, printed) == (2, "")
        assert errors.startswith(f"run.sh: RDZV={rendezvous}: {message}")
