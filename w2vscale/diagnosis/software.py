"""Python, PyTorch and the packages beside it: installed, in the right version, and working."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from w2vscale.diagnosis.finding import Finding, fail, ok, warn
from w2vscale.diagnosis.requirements import fit, installed_version, requirements
from w2vscale.version import __version__


@dataclass(frozen=True)
class Package:
    """A package that is imported to see whether it works. `extra`: what installs it; None if all runs need it."""

    name: str
    module: str
    purpose: str
    extra: str | None = None


PACKAGES = (
    Package("lhotse", "lhotse", "manifests and shards"),
    Package("transformers", "transformers", "opening what `w2vscale export` writes", "huggingface"),
    Package("jiwer", "jiwer", "word error rates", "decode"),
    Package("flashlight-text", "flashlight.lib.text.decoder.kenlm", "beam search with a language model", "decode"),
    Package("sentencepiece", "sentencepiece", "objective.sentencepiece", "decode"),
    Package("silero-vad", "silero_vad", "cutting recordings at pauses (--vad)", "vad"),
    Package("datasets", "datasets", "corpora from Hugging Face", "datasets"),
    Package("s3fs", "s3fs", "s3:// URLs of data and checkpoints", "s3"),
)


def installation() -> Iterator[Finding]:
    """Python, this package, and the packages that it requires, none of which is imported."""
    needed = requirements()
    yield python_finding(platform.python_version(), sys.executable, needed.python)
    yield ok("w2vscale", f"{__version__}, {Path(__file__).parents[1]}")
    others = [name for name in needed.packages if name != "torch"]  # has a line of its own
    yield packages_finding({name: installed_version(name) for name in others}, needed.packages)


def python_finding(version: str, executable: str, wanted: str) -> Finding:
    """Whether the version of Python is one that this package supports."""
    if fit(version, wanted) == "fits":
        return ok("Python", f"{version}, {executable}")
    return fail("Python", f"{version}, but w2vscale needs {wanted}", "Make an environment with another Python.")


def packages_finding(installed: Mapping[str, str | None], wanted: Mapping[str, str]) -> Finding:
    """Whether the packages that w2vscale requires are there, in versions that it supports."""
    bad = []
    for name, version in installed.items():
        if version is None:
            bad.append(f"{name} is not installed")
        elif fit(version, wanted[name]) != "fits":
            bad.append(f"{name} {version} is installed, {wanted[name]} is needed")
    if bad:
        return fail("required packages", "; ".join(bad), "Install w2vscale again: pip install -e . in its checkout.")
    return ok("required packages", f"all {len(installed)} are installed")


def torch_finding(version: str, wanted: str) -> Finding:
    """Whether w2vscale supports a version of PyTorch."""
    found = fit(version, wanted)
    if found == "fits":
        return ok("PyTorch", version)
    install = f"Install a supported version: pip install 'torch{wanted}'."
    if found == "too new":
        return warn("PyTorch", f"{version} is newer than the versions that were tested ({wanted})", install)
    return fail("PyTorch", f"{version}, but w2vscale needs {wanted}", install)


def pytorch() -> Iterator[Finding]:
    """PyTorch, and whether the packages work that are used together with it by all runs."""
    import torch

    yield torch_finding(torch.__version__, requirements().packages.get("torch", ""))
    tests = {"numpy": _exchange_with_numpy, "safetensors": _write_and_read, "tensorboard": _import_tensorboard}
    for name, test in tests.items():
        version = installed_version(name) or "not installed"
        try:
            test()
        except Exception as error:  # whatever it is: the others are tested, too
            found = f"{version}; does not work with this PyTorch: {type(error).__name__}: {error}"
            yield fail(name, found, f"pip install --upgrade {name}")
        else:
            yield ok(name, version)


def _exchange_with_numpy() -> None:
    """Fails if PyTorch is built for another major version of NumPy."""
    import numpy
    import torch

    torch.from_numpy(numpy.ones(2)).numpy()


def _import_tensorboard() -> None:
    """With logging.tensorboard, the default, a run imports it."""
    importlib.import_module("torch.utils.tensorboard")


def _write_and_read() -> None:
    import torch
    from safetensors.torch import load, save

    whole = torch.arange(6.0).view(2, 3)
    if not torch.equal(load(save({"tensor": whole}))["tensor"], whole):
        raise ValueError("it does not read what it wrote")


def package(name: str) -> Iterator[Finding]:
    """Import one of `PACKAGES`."""
    wanted = next(each for each in PACKAGES if each.name == name)
    if not is_installed(wanted.module):
        if wanted.extra is None:
            yield fail(name, f"not installed; needed for {wanted.purpose}", f"pip install {name}")
        else:
            yield ok(name, f"not installed; for {wanted.purpose}: pip install 'w2vscale[{wanted.extra}]'")
        return
    importlib.import_module(wanted.module)
    yield ok(name, installed_version(name) or "of unknown version")


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported, but the packages that contain it are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def torchaudio() -> Iterator[Finding]:
    """torchaudio, which only other libraries use. Its wheel on PyPI does not load beside a CPU build of PyTorch."""
    if not is_installed("torchaudio"):
        yield ok("torchaudio", "not installed; w2vscale does not need it")
        return
    import torchaudio

    yield ok("torchaudio", torchaudio.__version__)


def deepspeed() -> Iterator[Finding]:
    """DeepSpeed in the one version that the engine supports, for the device of this machine, and its operators."""
    if not is_installed("deepspeed"):
        yield warn(
            "DeepSpeed",
            "not installed, so engine.name=deepspeed cannot be used; ddp and fsdp can",
            "pip install 'w2vscale[deepspeed]', if you want to use it.",
        )
        return
    import torch

    from w2vscale.engine.deepspeed.config import import_deepspeed
    from w2vscale.errors import UserError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        library = import_deepspeed(device)
    except UserError as error:
        yield fail("DeepSpeed", str(error), "Install that version, or uninstall deepspeed and use fsdp.")
        return
    chosen = library.get_accelerator().device_name()
    if chosen != device.type:
        yield fail(
            "DeepSpeed",
            f"{library.__version__} runs on {chosen}, but this machine trains on {device.type}",
            "Unset the environment variable DS_ACCELERATOR.",
        )
        return
    yield ok("DeepSpeed", f"{library.__version__}, on {chosen}")
    yield from deepspeed_operators()


def deepspeed_operators() -> Iterator[Finding]:
    """The operators of DeepSpeed that a run would compile at first use."""
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if os.environ.get("DS_PIN_MEMORY_BACKEND") != "native":
        yield ok("DeepSpeed operators", "none is used: the optimizer and pinned memory are those of PyTorch")
    elif missing:
        yield fail(
            "DeepSpeed operators",
            f"DS_PIN_MEMORY_BACKEND=native compiles pin_memory, and {' and '.join(missing)} cannot be found",
            "Unset DS_PIN_MEMORY_BACKEND, or install what is missing.",
        )
    else:
        yield ok("DeepSpeed operators", "pin_memory is compiled at first use (DS_PIN_MEMORY_BACKEND=native)")
