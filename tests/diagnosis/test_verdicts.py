"""The verdict of each check on stated facts, with limits that are derived here and not read from the program."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.markers import default_environment
from packaging.specifiers import SpecifierSet

from tests.helpers.processes import ROOT
from w2vscale.config import load_config
from w2vscale.diagnosis import audio, disk, doctor, gpus, links, machine, needs, requirements, software
from w2vscale.diagnosis.cgroups import Limits, limits
from w2vscale.diagnosis.finding import Finding, fail, failed, ok, summary, warn

GB = 1e9
H100 = gpus.Gpu("NVIDIA H100 80GB HBM3", (9, 0), int(85 * GB), int(84.4 * GB))
NONE = gpus.Cuda(driver=None, devices=False, build=None, named=None)
EIGHT = gpus.Cuda(driver="550.54.15", devices=True, build="12.6", named=None, gpus=(H100,) * 8)
UNUSED = replace(EIGHT, gpus=())


class TestSummary:
    @pytest.mark.parametrize(
        ("findings", "line", "code"),
        [
            ([ok("a", "")], "no problems found", False),
            ([warn("a", "", ""), ok("b", "")], "1 warning", False),
            ([warn("a", "", "")] * 2 + [fail("b", "", "")], "2 warnings, 1 failure", True),
            ([fail("b", "", "")] * 2, "2 failures", True),
        ],
    )
    def test_the_last_line(self, findings: list[Finding], line: str, code: bool) -> None:
        assert summary(findings) == line
        assert failed(findings) is code


class TestRequirements:
    @pytest.mark.parametrize("installed", [False, True])
    def test_they_are_those_of_the_checkout_or_package(
        self, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        if installed:
            metadata = Message()
            metadata["Requires-Python"] = project["requires-python"]
            lines = [*project["dependencies"], *(f"{line} ; extra == 'deepspeed'" for line in extras["deepspeed"])]
            monkeypatch.setattr(requirements, "_CHECKOUT", tmp_path / "pyproject.toml")
            monkeypatch.setattr("importlib.metadata.metadata", lambda name: metadata)
            monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
            monkeypatch.setattr(requirements, "installed_version", lambda name: "0.1.0")
        requirements.requirements.cache_clear()
        found = requirements.requirements()
        assert str(found["python"]) == project["requires-python"]
        names = {line.partition("[")[0].partition(">")[0].partition("=")[0] for line in project["dependencies"]}
        assert found.keys() == {"python", *names}
        assert requirements.requirements("deepspeed").keys() == {"python", *names, "deepspeed"}
        assert [requirements.required("deepspeed", "deepspeed")] == extras["deepspeed"]
        requirements.requirements.cache_clear()

    def test_they_depend_on_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """flashlight-text has no wheels for 3.13: `w2vscale[decode]` does not install it there."""
        (flashlight,) = [package for package in software.PACKAGES if package.name == "flashlight-text"]
        for version, words in (("3.12", "pip install 'w2vscale[decode]'"), ("3.13", "no build for Python")):
            default = {**default_environment(), "python_version": version}
            monkeypatch.setattr("packaging.markers.default_environment", lambda default=default: default)
            requirements.requirements.cache_clear()
            assert words in flashlight.absence()
        requirements.requirements.cache_clear()

    @pytest.mark.parametrize(
        ("version", "wanted", "expected"),
        [
            ("2.11.0+cu130", ">=2.11,<2.14", True),
            ("2.11.0a0+7c8ec84dab.nv25.03", ">=2.11,<2.14", True),  # NVIDIA's containers
            ("2.9.1", ">=2.11,<2.14", False),
            ("2.14.0.dev20270101+cpu", ">=2.11,<2.14", False),
            ("0.19.9", "==0.19.8", False),
            ("1.30", ">=1.30", True),
            ("1.30.0", "", True),
        ],
    )
    def test_versions(self, version: str, wanted: str, expected: bool) -> None:
        assert requirements.fits(version, SpecifierSet(wanted)) is expected


class TestAdvice:
    """What can be typed is a command that exists, with nothing glued to it."""

    def test_packages_are_installed_by_their_own_names(self) -> None:
        """`w2vscale` itself is on no index, so pip cannot install it again."""
        checks = {check.name: check.advice for check in doctor.software_checks()}
        assert "'torch<2.14,>=2.11'" in checks["PyTorch"] and "'deepspeed==0.19.8'" in checks["DeepSpeed"]
        assert "'lhotse>=1.30'" in checks["lhotse"]
        for advice in checks.values():
            assert "w2vscale[" not in advice
            assert not re.search(r"pip [^:)]*[\w']\.$", advice), advice  # no full stop after a command

    def test_settings_exist(self) -> None:
        text = "".join(path.read_text() for path in Path(doctor.__file__).parent.glob("*.py"))
        found = set(re.findall(r"(?<![\w.])(data|checkpoint|engine|precision)\.([a-z_]+)", text))
        assert ("data", "workers") in found and ("engine", "shard_size") in found
        config = load_config("base")
        for section, key in found:
            assert hasattr(getattr(config, section), key), (section, key)


class TestSoftware:
    def test_python(self) -> None:
        assert software.python_finding("3.12.1", SpecifierSet(">=3.11")).verdict == "ok"
        assert software.python_finding("3.10.1", SpecifierSet(">=3.11")).verdict == "fail"

    @pytest.mark.parametrize(("version", "verdict"), [("2.12.0+cpu", "ok"), ("2.10.0", "fail"), ("2.14.0", "warn")])
    def test_torch(self, version: str, verdict: str) -> None:
        finding = software.torch_finding(version, SpecifierSet(">=2.11,<2.14"))
        assert finding.verdict == verdict
        assert (verdict == "ok") or finding.advice.endswith("pip install 'torch<2.14,>=2.11'")

    def test_required_packages(self) -> None:
        wanted = {"lhotse": SpecifierSet(">=1.30"), "numpy": SpecifierSet()}
        assert software.packages_finding({"lhotse": "1.33.0", "numpy": "2.0"}, wanted).verdict == "ok"
        bad = software.packages_finding({"lhotse": "1.20.0", "numpy": None}, wanted)
        assert bad.verdict == "fail"
        assert "lhotse 1.20.0 is installed, >=1.30 is needed" in bad.found and "numpy is not installed" in bad.found


class TestAudio:
    def test_wav_and_flac_are_essential(self) -> None:
        for name in audio.FORMATS:
            assert audio.decoder_finding(name, "").verdict == "ok"
            broken = audio.decoder_finding(name, "Format not recognised")
            assert broken.verdict == ("fail" if name in ("WAV", "FLAC") else "warn")
            assert "Format not recognised" in broken.found and "soundfile" in broken.advice

    def test_the_tone_is_recognised(self) -> None:
        tone = audio.tone()
        assert audio.problem_with(tone) == ""
        assert audio.problem_with(0 * tone) == "decodes to silence"
        assert audio.problem_with(tone[:1000]) == "decodes to silence"
        assert audio.problem_with(tone[::2]) != ""  # half of the rate: twice the pitch


class TestGpus:
    @pytest.mark.parametrize(
        ("cuda", "verdict", "found", "advice"),
        [
            (NONE, "warn", "none found", "install their driver"),
            (EIGHT, "ok", "8 × NVIDIA H100 80GB HBM3, 85.0 GB each, driver 550.54.15, CUDA 12.6", ""),
            (replace(UNUSED, build=None), "fail", "550.54.15, but PyTorch is a CPU build", "pip uninstall torch"),
            (replace(UNUSED, devices=False), "fail", "may not use its GPUs", "--gpus all"),
            (replace(UNUSED, named=""), "warn", "CUDA_VISIBLE_DEVICES= hides", "unset CUDA_VISIBLE_DEVICES"),
            (replace(UNUSED, named="8", problem="No CUDA GPUs are available"), "fail",
             "CUDA_VISIBLE_DEVICES=8 names none of the GPUs", "nvidia-smi -L"),
            # SLURM sets it in every job.
            (replace(UNUSED, named="0", problem="The NVIDIA driver on your system is too old (found version 11040)."),
             "fail", "too old (found version 11040)", "Update the driver"),
            (replace(UNUSED, problem="The NVIDIA driver on your system is too old (found version 11040)."), "fail",
             "too old (found version 11040)", "Update the driver"),
            (replace(EIGHT, gpus=(H100, replace(H100, problem="no kernel image is available for execution"))), "fail",
             "GPU 1 (NVIDIA H100 80GB HBM3): no kernel image", "supports these GPUs"),
        ],
    )  # fmt: skip
    def test_gpu(self, cuda: gpus.Cuda, verdict: str, found: str, advice: str) -> None:
        finding = gpus.gpu_finding(cuda)
        assert finding.verdict == verdict
        assert found in finding.found and advice in finding.advice

    def test_memory_that_others_use(self) -> None:
        assert gpus.memory_finding((H100, H100)).verdict == "ok"
        finding = gpus.memory_finding((H100, replace(H100, free=int(60 * GB))))
        assert finding.verdict == "warn" and "GPU 1: 25.0 GB" in finding.found

    def test_bf16(self) -> None:
        assert gpus.bf16_finding((H100,)).verdict == "ok"
        old = gpus.bf16_finding((H100, gpus.Gpu("Tesla V100", (7, 0), 1, 1)))
        assert old.verdict == "warn" and "Tesla V100" in old.found and "precision.compute=fp32" in old.advice

    def test_nccl(self) -> None:
        assert gpus.nccl_finding("2.27.3", 8).verdict == "ok"
        assert gpus.nccl_finding(None, 8).verdict == "fail"
        assert gpus.nccl_finding(None, 1).verdict == "warn"

    def test_compilation(self) -> None:
        assert gpus.compile_finding(None).verdict == "ok"
        assert gpus.compile_finding("a C compiler").verdict == "warn"

    def test_a_gpu_that_does_not_compute_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch says that there are two; without a GPU, computing on them fails."""
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU that computes")
        properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=int(80 * GB))
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        finding = gpus.gpu_finding(gpus.cuda())
        assert finding.verdict == "fail"
        assert "GPU 0 (NVIDIA H100): " in finding.found and "GPU 1 (NVIDIA H100): " in finding.found

    def test_gpus_of_a_container_or_job(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm"):
            (tmp_path / name).touch()
        for named, expected in ((None, 2), ("0", 1), ("0,1,2,3", 2), ("GPU-1a2b,GPU-3c4d", 2), ("", 0), ("-1", 0)):
            if named is None:
                monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            else:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
            assert gpus.visible(tmp_path) == expected, named

    def test_the_version_of_the_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        version = tmp_path / "version"
        monkeypatch.setattr(gpus, "DRIVER", version)
        assert gpus.driver_version() is None
        # The first lines of two real files: the closed and the open kernel module.
        version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Tue Mar  5 22:42:15 UTC 2024\n")
        assert gpus.driver_version() == "535.161.08"
        version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n")
        assert gpus.driver_version() == "570.86.15"


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


class TestNetwork:
    @pytest.mark.parametrize(
        ("link", "world_size", "device", "verdict"),
        [
            # `base` has 380 MB of gradients, and eight H100 compute an update of 5,600 s of audio in 0.115 s.
            (links.Link(8, 64 * 2**20, 0.010, 50e-6), 8, "cuda", "ok"),  # 380 MB take 0.057 s
            (links.Link(8, 64 * 2**20, 0.030, 50e-6), 8, "cuda", "warn"),  # 0.17 s
            (links.Link(2, 64 * 2**20, 0.030, 50e-6), 2, "cuda", "ok"),  # two compute for 0.46 s
            (links.Link(8, 64 * 2**20, 0.010, 5e-3), 8, "cuda", "warn"),
            (links.Link(2, 64 * 2**20, 0.5, 0.5e-3), 2, "cpu", "ok"),
            (links.Link(2, 64 * 2**20, 2.0, 0.5e-3), 2, "cpu", "warn"),
            (links.Link(2, 64 * 2**20, 0.1, 0.05), 2, "cpu", "warn"),
        ],
    )
    def test_links(self, link: links.Link, world_size: int, device: str, verdict: str) -> None:
        for across in (False, True):
            finding = links.link_finding(link, world_size=world_size, device=device, across=across)
            assert finding.verdict == verdict
            assert (verdict == "warn") == bool(finding.advice)

    def test_settings_of_nccl_are_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NCCL_IB_DISABLE", "1")
        link = links.Link(8, 64 * 2**20, 0.3, 50e-6)
        found = links.link_finding(link, world_size=8, device="cuda", across=True)
        assert "NCCL_IB_DISABLE=1" in found.found and "NCCL_SOCKET_IFNAME" in found.advice

    def test_bandwidth_is_that_of_a_ring(self) -> None:
        """Each of four ranks sends 2 * 3/4 of the bytes."""
        assert links.Link(4, 1_000_000, 0.5, 0.0).bandwidth == pytest.approx(3_000_000)
