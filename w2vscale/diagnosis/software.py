"""Python, PyTorch and the packages beside it: installed, in the right version, and working."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from w2vscale.diagnosis.finding import Finding, fail, ok, warn
from w2vscale.diagnosis.requirements import fits, installed_version, requirements
from w2vscale.version import __version__

INSTALL = "Install w2vscale again, in its checkout: pip install -e ."


@dataclass(frozen=True)
class Package:
    """A package whose `modules` are imported to see whether it works.

    `extra`: the one of w2vscale that installs it; None if all runs need it, "" if none does. `advice`: what to do if it
    does not work, unless installing it again helps.
    """

    name: str
    modules: tuple[str, ...]
    purpose: str = ""
    extra: str | None = None
    advice: str = ""

    def absence(self) -> str:
        """What the report says if an optional package is not installed."""
        if not self.extra:
            return f"not installed; {self.purpose}"
        if self.name not in requirements(self.extra):
            return f"not installed; {self.purpose}, but there is no build for Python {platform.python_version()}"
        return f"not installed; {self.purpose}: pip install 'w2vscale[{self.extra}]'"


WAV2VEC2 = "transformers.models.wav2vec2"
PACKAGES = (
    Package("safetensors", ("safetensors.torch",)),
    Package("tensorboard", ("torch.utils.tensorboard",)),
    Package("lhotse", ("lhotse",)),
    Package("av", ("av",), "decodes m4a, mp4 and webm", "av"),
    Package(
        "torchaudio", ("torchaudio",), "w2vscale does not need it", "",
        "Uninstall it (pip uninstall torchaudio): w2vscale does not need it, and Transformers fails with it. Its wheel "
        "on PyPI is built for CUDA, and does not load beside a CPU build of PyTorch.",
    ),
    # `import transformers` alone imports next to nothing.
    Package(
        "transformers", (f"{WAV2VEC2}.feature_extraction_wav2vec2", f"{WAV2VEC2}.modeling_wav2vec2"),
        "opens what `w2vscale export` writes", "huggingface",
        "If torchaudio fails, uninstall that. Otherwise: pip uninstall -y transformers && pip install transformers",
    ),
    Package("jiwer", ("jiwer",), "computes word error rates", "decode"),
    Package("flashlight-text", ("flashlight.lib.text.decoder.kenlm",), "searches with a language model", "decode"),
    Package("sentencepiece", ("sentencepiece",), "for objective.sentencepiece", "decode"),
    Package("silero-vad", ("silero_vad",), "cuts recordings at pauses (--vad)", "vad"),
    Package("datasets", ("datasets",), "reads corpora from Hugging Face", "datasets"),
    Package("s3fs", ("s3fs",), "opens s3:// URLs of data and checkpoints", "s3"),
)  # fmt: skip


def installation() -> Iterator[Finding]:
    """Python, this package, and the packages that it requires, none of which is imported."""
    needed = dict(requirements())
    yield python_finding(".".join(map(str, sys.version_info[:3])), needed.pop("python"))
    yield ok("w2vscale", f"{__version__}, {Path(__file__).parents[1]}")
    needed.pop("torch", None)  # has a line of its own
    yield packages_finding({name: installed_version(name) for name in needed}, needed)


def python_finding(version: str, wanted: SpecifierSet) -> Finding:
    """Whether the version of Python is one that this package supports."""
    if fits(version, wanted):
        return ok("Python", f"{version}, {sys.executable}")
    return fail("Python", f"{version}, but w2vscale needs {wanted}", "Create an environment with another Python.")


def packages_finding(installed: Mapping[str, str | None], wanted: Mapping[str, SpecifierSet]) -> Finding:
    """Whether the packages that w2vscale requires are there, in versions that it supports."""
    bad = []
    for name, version in installed.items():
        if version is None:
            bad.append(f"{name} is not installed")
        elif not fits(version, wanted[name]):
            bad.append(f"{name} {version} is installed, {wanted[name]} is needed")
    if bad:
        return fail("required packages", "; ".join(bad), INSTALL)
    return ok("required packages", f"all {len(installed)} are installed")


def pytorch() -> Iterator[Finding]:
    """PyTorch, which fails here if it is built for another major version of NumPy."""
    import torch

    torch.zeros(1).numpy()
    yield torch_finding(torch.__version__, requirements().get("torch", SpecifierSet()))


def torch_finding(version: str, wanted: SpecifierSet) -> Finding:
    """Whether w2vscale supports a version of PyTorch."""
    if fits(version, wanted):
        return ok("PyTorch", version)
    install = f"Install a supported version: pip install 'torch{wanted}'"
    if fits(version, SpecifierSet(",".join(str(bound) for bound in wanted if bound.operator != "<"))):
        return warn("PyTorch", f"{version} is newer than the versions that were tested ({wanted})", install)
    return fail("PyTorch", f"{version}, but w2vscale needs {wanted}", install)


def package(name: str) -> Iterator[Finding]:
    """Import one of `PACKAGES`."""
    wanted = next(each for each in PACKAGES if each.name == name)
    if wanted.extra is not None and not is_installed(wanted.modules[0]):
        yield ok(name, wanted.absence())
        return
    for module in wanted.modules:
        importlib.import_module(module)
    yield ok(name, installed_version(name) or "of unknown version")


def is_installed(module: str) -> bool:
    """Whether the package of a module can be found. Nothing is imported."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def deepspeed() -> Iterator[Finding]:
    """DeepSpeed in the one version that the engine supports, for the device of this machine, and its operators."""
    if not is_installed("deepspeed"):
        found = "not installed, so engine.name=deepspeed cannot be used; ddp and fsdp can"
        yield warn("DeepSpeed", found, "To use it: pip install 'w2vscale[deepspeed]'")
        return
    import torch

    from w2vscale.engine.deepspeed.config import import_deepspeed

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    library = import_deepspeed(device)
    chosen = library.get_accelerator().device_name()
    if chosen != device.type:
        found = f"{library.__version__} runs on {chosen}, but this machine trains on {device.type}"
        yield fail("DeepSpeed", found, "unset DS_ACCELERATOR")
        return
    yield ok("DeepSpeed", f"{library.__version__}, on {chosen}")
    operators = "none is compiled: DeepSpeed uses the optimizer and pinned memory of PyTorch"
    if os.environ.get("DS_PIN_MEMORY_BACKEND") == "native":
        operators = "pin_memory is compiled at first use, with g++ and ninja (DS_PIN_MEMORY_BACKEND=native)"
    yield ok("DeepSpeed operators", operators)
