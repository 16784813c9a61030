"""What is slow to import is imported only where it is needed."""

from __future__ import annotations

import subprocess
import sys

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "torch.distributed.checkpoint"}
LIBRARIES = {"transformers", "deepspeed", "matplotlib", "tensorboard", "pandas", "scipy", "sklearn"}


def imported_by(code: str) -> set[str]:
    """The names of all modules that a new process has after some code."""
    code = f"{code}\nimport sys\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return {*found.stdout.split()}


def test_a_command_starts_without_libraries() -> None:
    found = imported_by("import w2vscale.cli.app, w2vscale.config, w2vscale.checkpoint.format")
    assert not found & {"torch", "numpy", "lhotse", "soundfile", "fsspec", *LIBRARIES}


def test_tools_for_checkpoints_need_no_audio_and_no_compiler() -> None:
    code = (
        "import w2vscale.interop.exporting, w2vscale.interop.importing, w2vscale.checkpoint.verification\n"
        "from w2vscale.checkpoint.expected import meta_model\n"
        "from w2vscale.models.initialisation import empty_parameters\n"
        "from w2vscale.objectives import load\n"
        "config, objective = load('tiny')\n"
        "with empty_parameters():\n"
        "    model = objective.build_model()\n"
        "assert all(x.is_meta for each in (model, meta_model(config)) for x in each.parameters())\n"
    )
    assert not imported_by(code) & {"lhotse", *COMPILER, *LIBRARIES}


def test_inference_needs_no_compiler() -> None:
    code = "import w2vscale.inference.transcription, w2vscale.evaluation.wer, w2vscale.analysis.probing"
    assert not imported_by(code) & {*COMPILER, *LIBRARIES}
