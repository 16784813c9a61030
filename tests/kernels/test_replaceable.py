"""Which operation runs: the kernel of the device, or the plain one."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from w2vscale.errors import UserError
from w2vscale.kernels import replaceable
from w2vscale.kernels.replaceable import kernels
from w2vscale.kernels.table import KERNELS, Kernel
from w2vscale.models import layers, wav2vec2


def negated(x: Tensor, *, refuse: bool = False) -> Tensor:
    return NotImplemented if refuse else -x


@replaceable.replaceable
def unchanged(x: Tensor, *, refuse: bool = False) -> Tensor:
    return x


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replaceable._chosen, ("unchanged", "cpu"), Kernel(negated))


@pytest.mark.usefixtures("with_kernel")
def test_a_kernel_replaces_the_operation_on_its_device() -> None:
    x = torch.ones(2)
    assert torch.equal(unchanged(x), -x)
    assert unchanged(torch.ones(2, device="meta")).is_meta


@pytest.mark.usefixtures("with_kernel")
def test_a_kernel_may_leave_arguments_to_the_plain_operation() -> None:
    x = torch.ones(2)
    assert torch.equal(unchanged(x, refuse=True), x)


@pytest.mark.usefixtures("with_kernel")
def test_without_kernels_the_plain_operation_runs() -> None:
    x = torch.ones(2)
    with kernels("plain"):
        assert torch.equal(unchanged(x), x)
    assert torch.equal(unchanged(x), -x)


@pytest.mark.parametrize("traceable", [True, False])
def test_compiled_code_holds_only_traceable_kernels(traceable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replaceable._chosen, ("unchanged", "cpu"), Kernel(negated, traceable))

    def both(x: Tensor) -> Tensor:
        return torch.stack([unchanged(x), unchanged(x, refuse=True)])

    compiled = torch.compile(both, backend="eager", fullgraph=True, dynamic=True)
    assert compiled(torch.ones(1)).flatten().tolist() == [-1.0 if traceable else 1.0, 1.0]


def test_the_environment_chooses() -> None:
    script = "from w2vscale.kernels.replaceable import kernel_of; print(kernel_of('dropout', 'cpu'))"
    environment = os.environ | {replaceable.VARIABLE: "plain"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None"


def test_another_choice_is_refused() -> None:
    assert replaceable.kernels_of("fast") == KERNELS
    with pytest.raises(UserError, match="W2VSCALE_KERNELS=slow: choose fast or plain"):
        replaceable.kernels_of("slow")


@pytest.mark.parametrize("name", sorted({name for name, _ in KERNELS}))
def test_a_kernel_has_the_signature_of_the_operation(name: str) -> None:
    plain = getattr(layers, name, None) or getattr(wav2vec2, name)
    for (operation, device), kernel in KERNELS.items():
        if operation == name:
            found, expected = (list(inspect.signature(one).parameters.values()) for one in (kernel.function, plain))
            assert [(one.name, one.kind, one.default) for one in found] == [
                (one.name, one.kind, one.default) for one in expected
            ], device
