"""Who a process is, as torchrun or SLURM says."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, running
from w2vscale.distributed.launch import launch, launched, local_processes
from w2vscale.distributed.process_group import gpu_index, launch_environment
from w2vscale.errors import UserError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node7",
}

LEAVE_A_PROCESS = """
import os, pathlib, subprocess
if "RANK" in os.environ:
    left = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    pathlib.Path(__file__).with_name(f"left.{left.pid}").touch()
"""
"""A module that Python runs before a program."""


class TestLaunchEnvironment:
    def test_is_empty_for_a_process_that_nobody_launched(self) -> None:
        assert launch_environment({}) == {}
        assert launch_environment({"PATH": "/bin", "WORLD_SIZE": "2"}) == {}

    def test_what_torchrun_sets_stays_even_inside_a_slurm_job(self) -> None:
        assert launch_environment(TORCHRUN) == {}
        assert launch_environment({**SLURM, **TORCHRUN}) == {}

    def test_slurms_tasks_become_ranks(self) -> None:
        assert launch_environment(SLURM) == {
            "RANK": "5",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "8",
            "MASTER_ADDR": "node7",
            "MASTER_PORT": str(20_000 + 123456 % 12_000),
        }

    def test_a_rank_that_all_tasks_inherit_from_the_batch_script_does_not_count(self) -> None:
        inherited = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "login"}
        found = launch_environment({**SLURM, **inherited})
        assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("5", "8", "login")
        assert launch_environment({**SLURM, "SLURM_STEP_NUM_TASKS": "1", **inherited}) == {}

    def test_steps_of_one_job_have_different_ports(self) -> None:
        ports = {launch_environment({**SLURM, "SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(10)}
        assert len(ports) == 10

    @pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"])
    def test_a_variable_that_is_no_number_is_one_line(self, name: str) -> None:
        with pytest.raises(UserError, match=f"^the environment variable {name}=many is not a number; [^\\n]*$"):
            launch_environment({**SLURM, name: "many"})

    def test_a_slurm_job_of_one_task_is_alone(self) -> None:
        assert launch_environment({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == {}
        assert launch_environment({"SLURM_STEP_NUM_TASKS": "8"}) == {}

    def test_address_and_port_that_the_user_set_are_kept(self) -> None:
        found = launch_environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4000")

    def test_jobs_on_one_node_have_different_ports_that_a_user_may_open(self) -> None:
        ports = {int(launch_environment({**SLURM, "SLURM_JOB_ID": str(job)})["MASTER_PORT"]) for job in range(1, 999)}
        assert len(ports) == 998
        assert all(1024 < port < 32_768 for port in ports)  # above, Linux takes ports for outgoing connections

    def test_all_ranks_of_a_job_agree_on_where_to_meet(self) -> None:
        found = [launch_environment({**SLURM, "SLURM_PROCID": str(rank)}) for rank in range(8)]
        assert len({(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found}) == 1
        assert [each["RANK"] for each in found] == [str(rank) for rank in range(8)]

    def test_a_list_of_nodes_is_expanded_by_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scontrol = tmp_path / "scontrol"  # SLURM's own command, which this machine does not have
        scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n')
        scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert launch_environment({**SLURM, "SLURM_STEP_NODELIST": "node[3-4]"})["MASTER_ADDR"] == "node3"

    def test_the_jobs_nodes_do_where_the_step_names_none(self) -> None:
        environment = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}
        assert launch_environment({**environment, "SLURM_JOB_NODELIST": "node9"})["MASTER_ADDR"] == "node9"


class TestGpus:
    def test_a_process_that_sees_one_gpu_uses_it(self) -> None:
        assert [gpu_index(local_rank, 1) for local_rank in (0, 1, 7)] == [0, 0, 0]

    def test_a_process_that_sees_several_uses_that_of_its_local_rank(self) -> None:
        assert [gpu_index(local_rank, 8) for local_rank in range(8)] == list(range(8))

    def test_more_processes_than_gpus_are_an_error(self) -> None:
        with pytest.raises(UserError, match=r"^local rank 2: this process sees 2 GPUs; start fewer processes"):
            gpu_index(2, 2)


class TestLaunching:
    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, False),
            ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun in salloc, with one task
            ({**SLURM, "SLURM_STEP_NUM_TASKS": "2"}, True),
            ({"SLURM_STEP_NUM_TASKS": "2"}, False),  # not a task, because it has no number
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # a batch script
            (TORCHRUN, True),
            ({"RANK": "0"}, False),  # set by something else
            ({"RANK": "0", "WORLD_SIZE": "2"}, True),  # Kubernetes' PyTorchJob
        ],
    )
    def test_launched_says_whether_a_launcher_is_at_work(
        self, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in (*TORCHRUN, *SLURM, "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert launched() is expected

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, None),
            (TORCHRUN, None),
            ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 2),
            ({**TORCHRUN, "LOCAL_SIZE": "2"}, 2),  # DeepSpeed's launcher
            ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
            ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}, 3),
            ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, 4),
        ],
    )
    def test_processes_on_this_machine(self, environment: dict[str, str], expected: int | None) -> None:
        assert local_processes(environment) == expected

    @pytest.mark.parametrize("processes", [0, -1])
    def test_fewer_than_one_process_is_an_error(self, processes: int) -> None:
        with pytest.raises(UserError, match=f"--nproc-per-node {processes}: must be at least 1"):
            launch(["--help"], processes)


def test_what_a_rank_leaves_behind_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loader process that hangs just after its fork."""
    (tmp_path / "sitecustomize.py").write_text(LEAVE_A_PROCESS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert launch(["--version"], 2) == 0
    left = [int(path.suffix[1:]) for path in tmp_path.glob("left.*")]
    assert len(left) == 2
    deadline = time.monotonic() + 10
    while any(map(running, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, left))
