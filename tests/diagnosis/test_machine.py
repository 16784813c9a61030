"""Verdicts of doctor on stated facts of a machine: its memory, cores, limits, control groups and disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from w2vscale.diagnosis import disk, machine, needs
from w2vscale.diagnosis.cgroups import Limits, limits

GB = 1e9


class TestMachine:
    def test_shared_memory(self) -> None:
        """Of `base`, one rank holds 64 micro-batches of 87.5 s ahead, and on a CPU those of the update; 358 MB each."""
        window = 64 * 87.5 * 16_000 * 4
        assert needs.shared_memory("base", 1, 1, gpus=1) == pytest.approx(window)
        assert needs.shared_memory("base", 1, 1, gpus=0) == pytest.approx(2 * window)
        # Eight ranks: 8 processes with 4 micro-batches each, though an update has 8 per rank.
        assert needs.shared_memory("base", 8, 8, gpus=8) == pytest.approx(4 * window)
        # The same on eight machines: the window of a rank depends on the ranks of the job.
        assert needs.shared_memory("base", 1, 8, gpus=1) == pytest.approx(window / 2)

    @pytest.mark.parametrize(
        ("free", "gpus", "verdict"),
        [
            (1e6, 0, "fail"),
            (0.0, 0, "fail"),  # there is none
            (64e6, 0, "warn"),  # of Docker: enough for `tiny`
            (64e6, 1, "fail"),
            (2 * GB, 0, "ok"),
            (2 * GB, 1, "ok"),
        ],
    )
    def test_shared_memory_verdicts(self, free: float, gpus: int, verdict: str) -> None:
        space = [needs.shared_memory(preset, 1, 1, gpus=gpus) for preset in ("tiny", "base")]
        finding = machine.shared_memory_finding(max(free, 64e6), free, *space, gpus=gpus)
        assert finding.verdict == verdict
        assert verdict == "ok" or "--shm-size=2g" in finding.advice

    def test_the_size_that_is_advised_suffices(self) -> None:
        """8 GB, of which others use 1 GB, and `base` needs 9 GB."""
        assert "--shm-size=11g" in machine.shared_memory_finding(8 * GB, 7 * GB, 0.1 * GB, 9 * GB, gpus=1).advice

    @pytest.mark.parametrize(
        ("soft", "hard", "world_size", "verdict", "advice"),
        [
            (100, 4096, 1, "fail", "ulimit -n 4096"),
            (512, 4096, 1, "warn", "ulimit -n 4096"),
            (1024, 1024, 1, "ok", ""),
            (-1, -1, 1, "ok", ""),
            (65536, -1, 1, "ok", ""),
            # 1,024 ranks need more than 2,048.
            (1024, -1, 1024, "fail", "ulimit -n 65536"),
            (1024, 1024, 1024, "fail", "Ask for a higher hard limit, which is 1024: docker run --ulimit nofile=65536"),
        ],
    )
    def test_open_files(self, soft: int, hard: int, world_size: int, verdict: str, advice: str) -> None:
        finding = machine.open_files_finding(soft, hard, needs.open_files(world_size))
        assert finding.verdict == verdict and advice in finding.advice

    @pytest.mark.parametrize(
        ("text", "cores", "usable", "ranks", "verdict"),
        [
            (None, 64, 64, 8, "ok"),
            (None, 4, 4, 1, "ok"),  # a part of a node: PyTorch respects the affinity mask
            (None, 64, 4, 1, "warn"),  # the quota of a container
            ("8", 64, 64, 8, "ok"),
            ("16", 64, 64, 8, "warn"),
            ("1", 2, 2, 8, "ok"),
            ("4,2", 8, 8, 1, "ok"),
            ("0", 8, 8, 1, "warn"),
            ("auto", 8, 8, 1, "warn"),
        ],
    )
    def test_threads(self, text: str | None, cores: int, usable: float, ranks: int, verdict: str) -> None:
        found = machine.threads_finding(text, cores=cores, usable=usable, ranks=ranks)
        assert found.verdict == verdict
        assert verdict == "ok" or f"OMP_NUM_THREADS={max(usable // ranks, 1)}" in found.advice

    @pytest.mark.parametrize(("tasks", "threads", "cores"), [("1", "warn", "warn"), ("8", "ok", "ok")])
    def test_the_cores_of_a_task_of_slurm(
        self, tasks: str, threads: str, cores: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """srun binds each of eight tasks to eight cores; eight ranks of another launcher share those of a process."""
        for name, value in (("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", tasks), ("OMP_NUM_THREADS", "8")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
        monkeypatch.setattr(machine, "visible", lambda: 8)
        found = {finding.name: finding.verdict for finding in machine.machine(ranks=8, world_size=8)}
        assert (found["threads"], found["CPU cores"]) == (threads, cores)

    @pytest.mark.parametrize(("cores", "gpus", "verdict"), [(2, 0, "ok"), (64, 8, "ok"), (16, 8, "warn")])
    def test_cores(self, cores: int, gpus: int, verdict: str) -> None:
        assert machine.cores_finding(cores, gpus=gpus).verdict == verdict

    @pytest.mark.parametrize(
        ("free", "ranks", "verdict"), [(1, 1, "fail"), (5, 1, "warn"), (20, 1, "ok"), (20, 8, "warn")]
    )
    def test_memory(self, free: float, ranks: int, verdict: str) -> None:
        assert machine.memory_finding(256 * GB, free * GB, ranks=ranks).verdict == verdict

    def test_processes(self) -> None:
        assert machine.tasks_finding([-1, None], ranks=8).verdict == "ok"
        assert machine.tasks_finding([4096, None], ranks=8).verdict == "ok"
        assert machine.tasks_finding([-1, 512], ranks=8).verdict == "warn"

    def test_locked_memory_matters_with_infiniband(self) -> None:
        assert machine.locked_memory_finding(65536, infiniband=False).verdict == "ok"
        assert machine.locked_memory_finding(-1, infiniband=True).verdict == "ok"
        assert machine.locked_memory_finding(65536, infiniband=True).verdict == "warn"

    def test_temporary_files_need_a_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert machine.temporary_finding().verdict == "ok"
        monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
        finding = machine.temporary_finding()
        assert finding.verdict == "fail" and "TMPDIR" in finding.advice


class TestControlGroups:
    def test_version_2(self, tmp_path: Path) -> None:
        """The tightest limit of all groups counts; files in the cache are not used memory."""
        self.write(tmp_path, "self", "0::/job/step\n")
        self.write(tmp_path, "fs/job/cpu.max", "400000 100000\n")
        self.write(tmp_path, "fs/job/step/cpu.max", "max 100000\n")
        self.write(tmp_path, "fs/job/memory.max", "8000000000\n")
        self.write(tmp_path, "fs/job/memory.current", "5000000000\n")
        self.write(tmp_path, "fs/job/memory.stat", "anon 1\ninactive_file 2000000000\nactive_file 1000000000\n")
        self.write(tmp_path, "fs/job/step/memory.max", "max\n")
        self.write(tmp_path, "fs/job/step/pids.max", "512\n")
        assert limits(tmp_path / "self", tmp_path / "fs") == Limits(4.0, 8_000_000_000, 2_000_000_000, 512)

    def test_version_1(self, tmp_path: Path) -> None:
        """In a container, the path of the group is that of the host, which cannot be seen."""
        self.write(tmp_path, "self", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:pids:/docker/abc\n")
        self.write(tmp_path, "fs/cpu,cpuacct/cpu.cfs_quota_us", "150000\n")
        self.write(tmp_path, "fs/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
        self.write(tmp_path, "fs/memory/memory.limit_in_bytes", "4000000000\n")
        self.write(tmp_path, "fs/memory/memory.usage_in_bytes", "3000000000\n")
        self.write(tmp_path, "fs/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 500000000\n")
        self.write(tmp_path, "fs/pids/pids.max", "max\n")
        assert limits(tmp_path / "self", tmp_path / "fs") == Limits(1.5, 4_000_000_000, 2_500_000_000, None)

    def test_no_limits(self, tmp_path: Path) -> None:
        self.write(tmp_path, "self", "1:cpu:/\n2:memory:/\n0::/\n")
        self.write(tmp_path, "fs/cpu/cpu.cfs_quota_us", "-1\n")
        self.write(tmp_path, "fs/cpu/cpu.cfs_period_us", "100000\n")
        self.write(tmp_path, "fs/memory/memory.limit_in_bytes", "9223372036854771712\n")
        assert limits(tmp_path / "self", tmp_path / "fs") == Limits()
        assert limits(tmp_path / "missing", tmp_path / "fs") == Limits()

    @staticmethod
    def write(folder: Path, name: str, text: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


class TestDisk:
    @pytest.mark.parametrize(
        ("speed", "verdict"),
        # A stopped run has 120 s. A checkpoint of `base` has 1.14 GB (95 million parameters), one of `large` 3.8 GB.
        [(1.14e9 / 121, "fail"), (1.14e9 / 119, "warn"), (3.8e9 / 61, "warn"), (3.9e9 / 60, "ok"), (2 * GB, "ok")],
    )
    def test_writing(self, speed: float, verdict: str) -> None:
        assert disk.write_finding(speed).verdict == verdict

    @pytest.mark.parametrize(
        ("read", "seconds", "gpus", "verdict"),
        [
            (10e6, 0.5, 0, "ok"),
            (1 * GB, 0.001, 8, "ok"),
            (0.5 * GB, 0.001, 8, "warn"),
            (1 * GB, 0.1, 1, "warn"),
        ],
    )
    def test_reading(self, read: float, seconds: float, gpus: int, verdict: str) -> None:
        """Eight H100 read 6,077 s of FLAC per second each, with 17 kB per second: 0.83 GB/s."""
        assert disk.read_finding(read, seconds, gpus=gpus).verdict == verdict

    @pytest.mark.parametrize(
        ("free", "verdict", "found"),
        [
            (0.1, "fail", "3 checkpoints of `base` need 3.4 GB"),
            (2, "warn", "3 checkpoints of `base` need 3.4 GB"),
            (4, "ok", "enough for 3 checkpoints of `base`"),
            (12, "ok", "enough for 3 checkpoints of `xlsr_300m`"),
            (79, "ok", "enough for 3 checkpoints of `xlsr_2b`"),
        ],
    )
    def test_space(self, free: float, verdict: str, found: str) -> None:
        finding = disk.space_finding(Path("/data"), free * GB)
        assert finding.verdict == verdict and finding.found.endswith(found)

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (finding,) = disk.disk(str(tmp_path / "file"))
        assert finding.verdict == "fail" and "is not a folder" in finding.found

    def test_a_folder_that_does_not_exist_yet(self, tmp_path: Path) -> None:
        assert disk.existing(tmp_path / "exp" / "base") == tmp_path

    def test_measuring_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk, "LARGEST", disk.BLOCK)
        assert min(*disk.speed(tmp_path), disk.small_file_seconds(tmp_path)) > 0
        assert not list(tmp_path.iterdir())

    def test_checkpoint_sizes(self) -> None:
        """Weights and two moments in fp32."""
        from w2vscale.objectives import load

        for preset in ("base", "large"):
            with torch.device("meta"):  # without memory
                model = load(preset)[1].build_model()
            assert 12 * sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(
                needs.CHECKPOINTS[preset], rel=0.01
            )
