"""What is slow to import is imported only where it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMPILER = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "torch.distributed.checkpoint")
LIBRARIES = ("transformers", "deepspeed", "matplotlib", "tensorboard", "pandas", "scipy", "sklearn")


def imported_with(module: str) -> set[str]:
    """The names of all modules that a new process has after `import module`."""
    code = f"import sys, {module}\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return {*found.stdout.split()}


@pytest.mark.parametrize("module", ["w2vscale", "w2vscale.cli.app", "w2vscale.config", "w2vscale.checkpoint.format"])
def test_a_command_starts_without_libraries(module: str) -> None:
    assert not imported_with(module) & {"torch", "numpy", "lhotse", "soundfile", "fsspec", *LIBRARIES}


@pytest.mark.parametrize("module", ["interop.exporting", "interop.importing", "checkpoint.verification"])
def test_tools_for_checkpoints_need_no_audio_and_no_compiler(module: str) -> None:
    assert not imported_with(f"w2vscale.{module}") & {"lhotse", *COMPILER, *LIBRARIES}


@pytest.mark.parametrize("module", ["inference.transcription", "evaluation.wer", "analysis.probing"])
def test_inference_needs_no_compiler(module: str) -> None:
    assert not imported_with(f"w2vscale.{module}") & {*COMPILER, *LIBRARIES}
