"""Every bf16 operation that the models run on a CPU, against the same operation in float64, at the presets' shapes.

A processor's own bf16 kernels can be wrong at some shapes only. So the presets' own modules are run, and each operation
that they call on bf16 values, forward and backward, is repeated in float64 with the same arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.batches import inputs_of
from tests.helpers.operators import PARTS
from w2vscale.config import Config, architecture_of, load_config, preset_names
from w2vscale.kernels.precision import CPU_HAS_BF16
from w2vscale.kernels.replaceable import kernel_of
from w2vscale.models.lengths import input_samples
from w2vscale.models.wav2vec2 import positional_convolution
from w2vscale.objectives import Objective, StepContext, build_objective
from w2vscale.objectives.ctc import CtcInputs

ROUNDING = 2**-8
"""Largest relative error of rounding to bf16."""

BOUNDS = {
    # These also round intermediate values, and their gradients are differences of rounded values.
    "_scaled_dot_product_flash_attention_for_cpu": 4 * ROUNDING,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 64 * ROUNDING,
}
"""Error bounds of operations that round more than their result."""

UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operations that are not compared because they return uninitialised memory."""

WITHOUT_DROPOUT = {"_scaled_dot_product_flash_attention_for_cpu"}
"""Operations that draw random numbers only with dropout."""

ZEROS_AND_ONES = {"bernoulli_"}
"""Operations that are not compared because they draw random numbers. These are exact in bf16."""

EXPECTED = {"gelu", "gelu_backward", "_scaled_dot_product_flash_attention_for_cpu", "addmm", "mm"}
"""Operations that every model must run in bf16."""

LAYER_NORM = {"native_layer_norm", "native_layer_norm_backward"}
"""Also expected if LayerNorm has a kernel; otherwise it is computed in fp32."""

PIECE = 2**14
"""Number of elements to compare at a time, so that they stay in the processor cache."""


def settings_of(config: Config) -> str:
    """Settings that determine the operations of a model with one block, and their shapes."""
    architecture = (architecture_of(config.model), architecture_of(build_objective(config).settings))
    return json.dumps((architecture, config.regularization.attention_dropout > 0.0))


def distinct(settings: Callable[[Config], object]) -> dict[str, Config]:
    """Return the presets with distinct `settings`, each with one block.

    Where the processor has no bf16, this is the smallest preset only: products take minutes there, and one kernel
    computes them at all shapes.
    """
    found: dict[object, tuple[str, Config]] = {}
    for name in preset_names() if CPU_HAS_BF16 else ["tiny"]:
        config = load_config(name, ["model.layers=1"])
        found.setdefault(settings(config), (name, config))
    return dict(found.values())


MODELS = distinct(settings_of)
POSITIONAL = distinct(
    lambda config: (config.model.dim // config.model.positional_groups, config.model.positional_kernel)
)


# ---------------------------------------------------------------- operations, repeated in float64


class Bf16Operations(TorchDispatchMode):
    """Repeats each operation on bf16 values in float64; `wrong` says which results differ by more than rounding.

    What is right is added to `compared`, and not repeated where the arguments' shapes, strides and types are the same.
    """

    def __init__(self, compared: set[str]) -> None:
        super().__init__()
        self.compared = compared
        self.names: set[str] = set()
        self.wrong: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in PARTS:
            with self:
                return PARTS[function](*args, **(kwargs or {}))
        given = (args, dict(kwargs or {}))
        changes_inputs = function._schema.is_mutable
        before = exact(given) if changes_inputs and has_bf16(given) else None
        y = function(*given[0], **given[1])
        name = function.overloadpacket.__name__
        if not has_bf16((given, y)) or is_view(function) or name in UNINITIALISED | ZEROS_AND_ONES:
            return y
        self.names.add(name)
        call = f"{function}({described(*given)})"
        if call in self.compared:
            return y
        if torch.Tag.nondeterministic_seeded in function.tags and name not in WITHOUT_DROPOUT:
            self.wrong.append(f"{call}: draws random numbers and cannot be repeated")
        elif "convolution" in name and has_groups(function, *given):
            self.wrong.append(f"{call}: a convolution with groups")
        else:
            args, kwargs = before or exact(given)
            expected = function(*args, **kwargs)
            inputs = (given, (args, kwargs)) if changes_inputs else ((), ())
            error = difference((y, inputs[0]), (expected, inputs[1]))
            if error <= BOUNDS.get(name, ROUNDING):
                self.compared.add(call)
            else:
                self.wrong.append(f"{call}: error {error:.2g}")
        return y


def exact(arguments: Any) -> Any:
    """A copy in float64."""

    def widened(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(torch.float64, copy=True) if x.is_floating_point() else x.clone()
        return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

    return tree_map(widened, arguments)


def difference(found: Any, expected: Any) -> float:
    """The largest error of an element, relative to its own size plus the root mean square of its tensor."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    errors = [_difference(one, other) for one, other in pairs if isinstance(one, Tensor) and one.numel()]
    return max(errors, default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    if found.dim() == 0:
        found, expected = found.view(1), expected.view(1)
    size = float(expected.double().square().mean().sqrt()) or 1.0
    rows = max(PIECE * found.shape[0] // found.numel(), 1)
    pieces = zip(found.split(rows), expected.split(rows), strict=True)
    error = float(torch.stack([((one - other).abs_() / other.abs().add_(size)).max() for one, other in pieces]).max())
    # Where a mask is minus infinity, only equality counts.
    return 0.0 if math.isnan(error) and bool((found == expected).all()) else error


def has_bf16(values: Any) -> bool:
    return any(
        isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tree_leaves(values)
    )


def has_groups(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | dict(kwargs)
    return bool(given.get("groups", 1) != 1)


def is_view(function: Any) -> bool:
    """Whether the result is a view of an input. Views are not compared, because they change no value."""
    return any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns)


def described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def short(x: Any) -> Any:
        return f"{x.dtype}{list(x.shape)}/{list(x.stride())}" if isinstance(x, Tensor) else x

    given = [str(tree_map(short, x)) for x in args]
    return ", ".join([*given, *(f"{key}={tree_map(short, x)}" for key, x in kwargs.items())])


# ---------------------------------------------------------------- models


def model_inputs(objective: Objective, frames: Sequence[int]) -> Any:
    draws = np.random.default_rng(0)
    waveforms = [draws.standard_normal(input_samples(count, objective.model), dtype=np.float32) for count in frames]
    inputs = inputs_of(objective, waveforms, [[1]] * len(frames))
    if isinstance(inputs, CtcInputs):
        dim = objective.model.dim
        inputs = inputs._replace(channel_mask_BD=torch.arange(dim).expand(len(frames), -1) < dim // 4)
    return inputs


EVERY_LAYER = StepContext(seed=0, update=0, numbers=(0,), worst_case=True)
"""A step in which no layer is dropped or frozen."""


class Precision(NamedTuple):
    """A way to run a model in bf16."""

    weights: torch.dtype
    activations: torch.dtype
    autocast: bool


PRECISIONS = {
    "compute": Precision(torch.float32, torch.bfloat16, autocast=False),
    "weights": Precision(torch.bfloat16, torch.bfloat16, autocast=False),
    "autocast": Precision(torch.float32, torch.float32, autocast=True),
}


@pytest.fixture(scope="module")
def compared() -> set[str]:
    """Models of the same width share most of their operations."""
    return set()


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=[pytest.mark.long] if config.model.dim > 1024 else [])
        for name, config in MODELS.items()
    ],
)
def test_every_bf16_operation_is_right_but_for_rounding(preset: str, precision: Precision, compared: set[str]) -> None:
    objective = build_objective(MODELS[preset])
    torch.manual_seed(0)
    model: Any = objective.build_model()
    for parameter in model.parameters():  # not buffers: the engines leave them in fp32, too
        parameter.data = parameter.data.to(precision.weights)
    model.compute_dtype = precision.activations
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast)
    with Bf16Operations(compared) as operations:
        with autocast:
            sums = objective.forward(model, model_inputs(objective, (37, 12, 1)), step=EVERY_LAYER, training=True)
        sums.total.backward()
        model.eval()
        for frames in ((12,), (1,)):  # without dropout or padding
            with autocast, torch.no_grad():
                objective.forward(model, model_inputs(objective, frames), step=EVERY_LAYER, training=False)
    assert not operations.wrong, "\n".join(operations.wrong)
    assert operations.names >= (EXPECTED if kernel_of("layer_norm", "cpu") is None else EXPECTED | LAYER_NORM)


@pytest.mark.parametrize("frames", [1, 37, 131])
@pytest.mark.parametrize("preset", POSITIONAL)
def test_the_positional_convolution_is_rounded_once(preset: str, frames: int) -> None:
    config = POSITIONAL[preset].model
    torch.manual_seed(0)
    width = config.dim // config.positional_groups
    groups = 2  # all groups are alike
    shapes = ((1, frames, groups * width), (groups * width, width, config.positional_kernel), (groups * width,))
    values = [torch.randn(shape).bfloat16() for shape in shapes]
    given_BTD = torch.randn(shapes[0]).bfloat16()

    def gradients(convolve: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in values]
        y_BTD = convolve(*leaves, groups)
        return [y_BTD.detach(), *torch.autograd.grad(y_BTD, leaves, given_BTD.to(dtype))]

    expected = gradients(plain_convolution, torch.float64)
    operations = Bf16Operations(set())
    with operations:
        found = gradients(positional_convolution, torch.bfloat16)
    assert not operations.wrong, "\n".join(operations.wrong)
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert difference(found, expected) <= ROUNDING
    with torch.autocast("cpu", torch.bfloat16), operations:
        found = gradients(positional_convolution, torch.float32)
    assert not operations.wrong, "\n".join(operations.wrong)
    assert {x.dtype for x in found} == {torch.float32}
    assert difference(found, expected) < 2**-12


def plain_convolution(x_BTD: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    y_BDT = F.conv1d(x_BTD.transpose(1, 2), weight_DIK, bias_D, padding=weight_DIK.shape[2] // 2, groups=groups)
    return y_BDT[:, :, : x_BTD.shape[1]].transpose(1, 2)


# ---------------------------------------------------------------- the comparison itself


class Faulty(TorchDispatchMode):
    """Returns a wrong value from one operation in bf16, as a faulty kernel of a processor does."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        y = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == self.name and has_bf16(y):
            y.view(-1)[-1] += 1.0
        return y


@pytest.mark.parametrize("name", ["gelu", "gelu_backward", "_to_copy"])
def test_a_wrong_element_is_found(name: str) -> None:
    torch.manual_seed(0)
    with Faulty(name), Bf16Operations(set()) as operations:
        x = torch.randn(7, 5, requires_grad=True)
        F.gelu(x.bfloat16()).sum().backward()
    assert len(operations.wrong) == 1 and operations.wrong[0].startswith(f"aten.{name}.default(")


def test_a_convolution_with_groups_in_bf16_is_found() -> None:
    x_BDT, weight_DIK = torch.randn(1, 4, 9).bfloat16(), torch.randn(4, 2, 3).bfloat16()
    with Bf16Operations(set()) as operations:
        plain_convolution(x_BDT.transpose(1, 2), weight_DIK, torch.zeros(4).bfloat16(), groups=2)
    assert len(operations.wrong) == 1 and operations.wrong[0].endswith("a convolution with groups")


def test_random_numbers_in_bf16_are_found() -> None:
    with Bf16Operations(set()) as operations:
        torch.empty(3, dtype=torch.bfloat16).normal_()
    assert len(operations.wrong) == 1 and "cannot be repeated" in operations.wrong[0]
