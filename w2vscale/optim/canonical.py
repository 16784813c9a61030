"""What a checkpoint of a model must hold: the name and shape of every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Whole shapes by name."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state with the shape of the parameter; `step` is one value."""


def canonical_shapes(parameters: Mapping[str, Sequence[int]], *, optimizer: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of these parameters; without `optimizer`, of the model alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters.items():
        shapes[f"model.{name}"] = tuple(shape)
        if optimizer:
            shapes |= {f"optim.{name}.{key}": tuple(shape) for key in MOMENTS}
            shapes[f"optim.{name}.step"] = ()
    return shapes


def parameters_in(tensors: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in a checkpoint that holds `tensors`, by the model's own names."""
    return {name.removeprefix("model."): shape for name, shape in tensors.items() if name.startswith("model.")}


def has_optimizer_state(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names was written by a run, not imported or averaged."""
    return any(name.startswith("optim.") for name in names)


def differences(found: Shapes, expected: Shapes) -> Iterator[str]:
    """What is missing in `found`, has another shape, or does not belong there: one line each."""
    for name, shape in expected.items():
        if name not in found:
            yield f"{name}: missing"
        elif found[name] != shape:
            yield f"{name}: is {list(found[name])}, the model has {list(shape)}"
    for name in found:
        if name not in expected:
            yield f"{name}: not a tensor of the model or its optimizer"


def missing_weight(tensors: Shapes) -> str | None:
    """A tensor of the model that a checkpoint with `tensors` lacks, if the others show it."""
    weights = parameters_in(tensors)
    of_optimizer = (name.removeprefix("optim.").rpartition(".")[0] for name in tensors if name.startswith("optim."))
    missing = next((name for name in of_optimizer if name not in weights), None)
    if missing is None and not weights:
        return "any tensor of the model"
    return missing and f"model.{missing}"


def incomplete_state(tensors: Shapes) -> str | None:
    """Why no run can be continued from a checkpoint whose weights are `tensors`' own, or None."""
    if not has_optimizer_state(tensors):
        return "it holds no optimizer state"
    missing = [name for name in canonical_shapes(parameters_in(tensors)) if name not in tensors]
    if missing:
        of = {name.removeprefix("optim.").rpartition(".")[0] for name in missing}
        return (
            f"its optimizer state is incomplete ({counted(len(missing), 'tensor')} of {counted(len(of), 'parameter')} "
            f"{'is' if len(missing) == 1 else 'are'} missing, e.g. {missing[0]})"
        )
    wrong = next(differences(tensors, canonical_shapes(parameters_in(tensors))), None)
    return f"its optimizer state does not fit its weights ({wrong})" if wrong else None


def counted(count: int, noun: str) -> str:
    """A number and its noun, with an s unless it is one."""
    return f"{count} {noun}{'s' * (count != 1)}"


def expected_tensors(model: Any, *, optimizer: bool = True) -> dict[str, tuple[int, ...]]:
    """Temporary."""
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if optimizer and parameter.requires_grad:
            shapes |= {f"optim.{name}.{key}": tuple(parameter.shape) for key in MOMENTS}
            shapes[f"optim.{name}.step"] = ()
    return shapes
