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
from w2vscale.diagnosis import audio, doctor, gpus, links, requirements, software
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
