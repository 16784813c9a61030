"""A whole model with all kernels and with none: equal losses, outputs and gradients."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.helpers.comparison import RELATIVE
from tests.helpers.families import FAMILIES, batch, build, family, gradients, valid_frames
from w2vscale.kernels import replaceable
from w2vscale.kernels.replaceable import kernels
from w2vscale.kernels.table import KERNELS, Kernel
from w2vscale.objectives.contrastive import ContrastiveInputs, Wav2Vec2ForPretraining

NO_DROPOUT = "regularization.attention_dropout=1e-7"
"""A probability that drops nothing, but makes CPUs use the kernel for attention with dropout."""


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operations that a kernel computed."""
    names: set[str] = set()

    def watched(name: str, kernel: Kernel) -> Kernel:
        def function(*args: object, **kwargs: object) -> Tensor:
            y: Tensor = kernel.function(*args, **kwargs)
            if y is not NotImplemented:
                names.add(name)
            return y

        return kernel._replace(function=function)

    monkeypatch.setattr(replaceable, "KERNELS", {key: watched(key[0], kernel) for key, kernel in KERNELS.items()})
    return names


def loss_and_gradients(model: Wav2Vec2ForPretraining, inputs: ContrastiveInputs) -> dict[str, Tensor]:
    encoded: list[Tensor] = []
    handle = model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output))
    sums = model(inputs)
    handle.remove()
    valid_BT = valid_frames(inputs)
    hidden = {f"hidden {index}": state_BTD[valid_BT] for index, state_BTD in enumerate(encoded[0].hidden)}
    features = {"features": encoded[0].features_BTC[valid_BT], "context": encoded[0].context_BTD[valid_BT]}
    return {"loss": sums.total, **features, **hidden, **gradients(model, sums.total)}


@pytest.mark.parametrize("samples", [(2000, 3100, 2017), (2500, 2500)], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_together_equals_none(name: str, samples: tuple[int, ...], used: set[str]) -> None:
    objective = family(name, NO_DROPOUT, "objective.feature_penalty_weight=3")
    model, inputs = build(objective).train(), batch(objective, *samples)
    with kernels("fast"):
        found = loss_and_gradients(model, inputs)
    assert used >= {"attention", "positional_convolution", "strided_convolution"}
    assert ("normalized_convolution" in used) == (objective.model.conv_norm == "group")
    used.clear()
    with kernels("plain"):
        expected = loss_and_gradients(model, inputs)
    assert not used
    assert found.keys() == expected.keys() and len(found) > 50
    largest = max(float(x.detach().norm()) for x in expected.values())
    for key, tensor in expected.items():
        difference = float((found[key] - tensor).detach().norm())
        # Gradients through a softmax may cancel to almost nothing.
        assert difference <= RELATIVE * max(float(tensor.detach().norm()), 1e-3 * largest), key
