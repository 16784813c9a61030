"""Export the encoder, and the output layer of a CTC model, as an ONNX graph for onnxruntime and others.

    waveforms [batch, samples], lengths [batch] → hidden [batch, frames, dim], frames [batch], logits [batch, frames, V]

The graph masks and normalises the waveforms as training does, so it takes audio as it was recorded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2vscale.checkpoint.lazy import LazyReader, LazyTensor
from w2vscale.config import Config, ModelConfig, PrecisionConfig
from w2vscale.errors import UserError
from w2vscale.interop.names import own_settings
from w2vscale.kernels.packing import Lengths
from w2vscale.kernels.replaceable import kernels
from w2vscale.models.initialisation import allocate, empty_parameters
from w2vscale.models.lengths import conv_padding, hop, input_samples
from w2vscale.models.wav2vec2 import valid_mask
from w2vscale.objectives import Objective, build_objective

GRAPH = "model.onnx"
ONE_FILE_BYTES = 2 * 10**9  # a file of ONNX holds at most 2 GiB; weights of larger models go to model.onnx.data
OPSET = 18
TOLERANCE = 1e-4  # of the largest value: how much onnxruntime may differ from PyTorch
EXAMPLE_FRAMES = 50  # of the noise that the graph is traced and checked with


class Graph(nn.Module):
    """What is exported: the model in evaluation, from recorded waveforms and their lengths in samples."""

    def __init__(self, model: Any, objective: Objective, config: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.config = config

    def forward(self, waveforms_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, ...]:
        """Return hidden states, number of frames and, with an output layer, logits. Padded frames are zero."""
        config = self.config
        valid_BS = valid_mask(lengths_B, waveforms_BS.shape[1])
        x_BS = waveforms_BS * valid_BS
        if config.normalize_waveform:
            mean_B1 = x_BS.sum(dim=1, keepdim=True) / lengths_B.unsqueeze(1)
            x_BS = (x_BS - mean_B1) * valid_BS
            variance_B1 = x_BS.square().sum(dim=1, keepdim=True) / lengths_B.unsqueeze(1)
            x_BS = x_BS / (variance_B1 + config.waveform_eps).sqrt()
        frames_B = _frames(lengths_B, config)
        encoded = self.model.encoder(x_BS, Lengths(lengths_B, frames_B, None))
        outputs = (encoded.context_BTD, frames_B)
        if not self.objective.vocabulary:
            return outputs
        logits_NV = self.objective.logits(self.model, encoded.packed_hidden[-1])
        return (*outputs, encoded.packing.unpack(logits_NV))


def _frames(samples_B: Tensor, config: ModelConfig) -> Tensor:
    """`output_frames` of a tensor."""
    for _, kernel, stride in config.conv_layers:
        samples_B = (samples_B + 2 * conv_padding(kernel, config) - kernel).div(stride, rounding_mode="floor") + 1
    return samples_B


def write_onnx(folder: Path, state: Mapping[str, LazyTensor], config: Config, log: Callable[[str], None]) -> None:
    """Write `model.onnx`, and for a large model its weights in `model.onnx.data`. Needs memory for the whole model.

    If onnxruntime is installed, it computes noise with the file, and the result is compared with PyTorch.

    Raises UserError if onnxscript is not installed, or the results differ.
    """
    require_onnx()
    graph = _graph(state, config)
    names = output_names(graph.objective)
    example = _example(config.model)
    with _quiet(), kernels("plain"), torch.no_grad():
        expected = graph(*example)
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(config.model),
            input_names=["waveforms", "lengths"],
            output_names=list(names),
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        _name_sizes(program, names)
        size = sum(tensor.bytes for tensor in state.values())
        program.save(folder / GRAPH, external_data=size > ONE_FILE_BYTES)
    check(folder / GRAPH, example, dict(zip(names, expected, strict=True)), log)


def describe(config: Config) -> dict[str, Any]:
    """Return the contents of `model.json`: what the graph takes and gives, and all our settings."""
    model = config.model
    outputs = output_names(build_objective(config))
    return {
        "sampling_rate": model.sampling_rate,
        "samples_per_frame": hop(model),
        "shortest_samples": input_samples(1, model),
        "inputs": {"waveforms": ["float32", ["batch", "samples"]], "lengths": ["int64", ["batch"]]},
        "outputs": {name: ["int64" if name == "frames" else "float32", shape] for name, shape in outputs.items()}
        | {"hidden": ["float32", ["batch", "frames", model.dim]]},
        "w2vscale": own_settings(config),
    }


def output_names(objective: Objective) -> dict[str, list[str | int]]:
    """The outputs of the graph, in their order, with their sizes."""
    names: dict[str, list[str | int]] = {
        "hidden": ["batch", "frames", objective.model.dim],
        "frames": ["batch"],
    }
    if objective.vocabulary:
        names["logits"] = ["batch", "frames", len(objective.vocabulary)]
    return names


def check(
    path: Path, example: tuple[Tensor, Tensor], expected: Mapping[str, Tensor], log: Callable[[str], None]
) -> None:
    """Compare what onnxruntime computes with a file and what is expected. Raises UserError if it differs."""
    try:
        import onnxruntime
    except ImportError:
        log("the graph was not checked, because onnxruntime is not installed: pip install 'w2vscale[onnx]'")
        return
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = dict(zip(("waveforms", "lengths"), (tensor.numpy() for tensor in example), strict=True))
    largest = 0.0
    for (name, tensor), found in zip(expected.items(), session.run(None, inputs), strict=True):
        difference = float((torch.from_numpy(found) - tensor).abs().max() / tensor.abs().max().clamp(min=1.0))
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path.name}: onnxruntime {onnxruntime.__version__} differs from PyTorch in {name}, by "
                f"{difference:.1e} of the largest value; try other versions of onnxscript and onnxruntime"
            )
        largest = max(largest, difference)
    log(f"onnxruntime computes the same as PyTorch, within {largest:.1e} of the largest value")


def require_onnx() -> None:
    """Raise UserError if a package that exporting needs is not installed."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("onnxscript is not installed: pip install 'w2vscale[onnx]'") from None


def _graph(state: Mapping[str, LazyTensor], config: Config) -> Graph:
    objective = build_objective(config.model_copy(update={"precision": PrecisionConfig(compute="fp32")}))
    with empty_parameters():
        model = objective.build_model()
    allocate(model, "cpu")
    LazyReader(state).read_into({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    return Graph(model, objective, config.model).eval()


def _example(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Two waveforms of noise, one of them padded."""
    longest = input_samples(min(EXAMPLE_FRAMES, config.max_frames or EXAMPLE_FRAMES), config)
    noise = torch.randn(2, longest, generator=torch.Generator().manual_seed(0))
    return 0.1 * noise, torch.tensor([longest, (longest + input_samples(1, config)) // 2])


def _dynamic_shapes(config: ModelConfig) -> tuple[dict[int, Any], dict[int, Any]]:
    """Batch and samples are free. With 2 frames at least no size is traced as 1, whose rules differ."""
    batch = torch.export.Dim("batch")
    longest = None if config.max_frames is None else input_samples(config.max_frames + 1, config) - 1
    samples = torch.export.Dim("samples", min=input_samples(2, config), max=longest)
    return {0: batch, 1: samples}, {0: batch}


def _name_sizes(program: Any, outputs: Mapping[str, list[str | int]]) -> None:
    """Replace the formulas that PyTorch writes for the sizes of outputs by names."""
    from onnxscript import ir

    for value, sizes in zip(program.model.graph.outputs, outputs.values(), strict=True):
        value.shape = ir.Shape(sizes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages of PyTorch about its own exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
