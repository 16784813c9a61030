"""What was changed for GPUs: the form before and the form in use, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.bench.contenders import Work, synchronize
from tools.bench.loss_head import our_head
from tools.bench.phases.measuring import Machine, Rows, attempt, forward_and_backward, median_ms
from w2vscale import runtime
from w2vscale.config import Config
from w2vscale.data.inputs import to_device
from w2vscale.kernels import folded_group_norm
from w2vscale.kernels.taps import taps_of
from w2vscale.models.layers import weights_cast_once
from w2vscale.models.lengths import output_frames
from w2vscale.models.wav2vec2 import FeatureEncoder
from w2vscale.objectives import build_objective
from w2vscale.objectives.base import empty_model
from w2vscale.objectives.quantizer import diversity_loss
from w2vscale.optim.adamw import allocate_state, clip_and_step, make_adamw, parameter_groups

MICRO_BATCHES = 8
"""Micro-batches of a forward."""


def changes(machine: Machine) -> Rows:
    """Milliseconds of each form, at the sizes of `base` and `large` and a forward of 20 utterances in bf16.

    What decides most comes first: the phase may run out of time.
    """
    runtime.prepare_process(compile=not machine.tiny)
    if not machine.tiny:  # compilation takes minutes on a CPU
        for name, part in (("base", "feature encoder"), ("base", "first layer"), ("base", "loss head"),
                           ("large_lv60", "feature encoder")):  # fmt: skip
            config = machine.config(name, "precision.compute=bf16")
            for form, compiled in (("eager", False), ("compiled", True)):
                measure = partial(COMPILED[part], machine, config, 20, config.data.max_seconds, compiled=compiled)
                yield f"{name}/{part}/{form}", attempt(measure)
    for name, seconds in (("base", 15.6), ("large", 20.0)):
        config = machine.config(name, "precision.compute=bf16")
        utterances, seconds = (2, 0.5) if machine.tiny else (20, seconds)
        for change, forms in CHANGES.items():
            for form, measured in forms.items():
                yield f"{name}/{change}/{form}", attempt(partial(measured, machine, config, utterances, seconds))


def _time(work: Callable[[], object], machine: Machine) -> float:
    return median_ms(work, machine.device, repeats=3 if machine.tiny else 20)


def _frames(config: Config, utterances: int, seconds: float) -> int:
    return utterances * output_frames(int(seconds * config.model.sampling_rate), config.model)


def _split_qkv(machine: Machine, config: Config, utterances: int, seconds: float, *, permuted: bool) -> float:
    """From the product [N, 3 D] to queries, keys and values, and their gradients to its gradient."""
    model, steps = config.model, _frames(config, 1, seconds)
    size = model.dim // model.heads
    qkv = torch.randn(utterances * steps, 3 * model.dim, device=machine.device, dtype=torch.bfloat16).requires_grad_()

    def parts() -> tuple[Tensor, ...]:
        if permuted:
            q, k, v = qkv.view(utterances, steps, 3, model.heads, size).permute(2, 0, 3, 1, 4)
            return q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
        return qkv.unflatten(1, (3, model.heads, -1)).unbind(1)

    gradients = [torch.ones(utterances * steps, model.heads, size, device=machine.device).bfloat16() for _ in range(3)]
    return _time(lambda: torch.autograd.grad(parts(), qkv, gradients), machine)


def _moments(machine: Machine, config: Config, utterances: int, seconds: float, *, in_parts: bool) -> float:
    """Mean products of the first layer's taps, in fp64."""
    _, kernel, stride = config.model.conv_layers[0]
    samples = int(seconds * config.model.sampling_rate)
    taps_BTJ = taps_of(torch.randn(utterances, samples, device=machine.device).bfloat16(), kernel, stride)

    def at_once() -> Tensor:
        exact_BTJ = taps_BTJ.double()
        return exact_BTJ.transpose(1, 2) @ exact_BTJ

    return _time(partial(folded_group_norm._products, taps_BTJ) if in_parts else at_once, machine)


def _sums(machine: Machine, config: Config, utterances: int, seconds: float, *, product: bool) -> float:
    """The diversity loss of `MICRO_BATCHES` micro-batches, forward and backward."""
    masked = max(_frames(config, utterances, seconds) // 2 // MICRO_BATCHES, 1)
    settings = build_objective(config).settings
    shape = (settings.codebooks, settings.codebook_entries)
    probabilities_MGV = torch.rand(MICRO_BATCHES * masked, *shape, device=machine.device).requires_grad_()
    owner_M = torch.arange(MICRO_BATCHES, device=machine.device).repeat_interleave(masked)

    def loss(probabilities_MGV: Tensor) -> Tensor:
        if not product:
            parts = probabilities_MGV.split(masked)
            return torch.stack([diversity_loss(part.mean(dim=0, keepdim=True)).sum() * masked for part in parts]).sum()
        membership_KM = (owner_M == torch.arange(MICRO_BATCHES, device=machine.device).unsqueeze(1)).float()
        sums_KGV = torch.einsum("km,mgv->kgv", membership_KM, probabilities_MGV)
        return diversity_loss(sums_KGV / masked).sum() * masked

    return _time(forward_and_backward(loss, probabilities_MGV), machine)


def _penalty(machine: Machine, config: Config, utterances: int, seconds: float, *, product: bool) -> float:
    """Mean square of the features of each micro-batch, forward and backward."""
    count = min(MICRO_BATCHES, utterances)
    frames, channels = _frames(config, 1, seconds), config.model.conv_layers[-1][0]
    features_BTC = torch.randn(utterances, frames, channels, device=machine.device).bfloat16().requires_grad_()
    parts_B = [len(part) for part in torch.arange(utterances).tensor_split(count)]
    owner_B = torch.arange(count).repeat_interleave(torch.tensor(parts_B)).to(machine.device)
    membership_KB = (owner_B == torch.arange(count, device=machine.device).unsqueeze(1)).float()

    def loss(features_BTC: Tensor) -> Tensor:
        if not product:
            return torch.stack([part.float().square().mean() for part in features_BTC.split(parts_B)]).sum()
        sums_B = features_BTC.float().square().mean(dim=2).sum(dim=1)
        return ((membership_KB @ sums_B) / (frames * membership_KB.sum(dim=1))).sum()

    return _time(forward_and_backward(loss, features_BTC), machine)


def _model(machine: Machine, config: Config) -> nn.Module:
    model = empty_model(build_objective(config)).to_empty(device=machine.device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    trained: nn.Module = model
    return trained


def _casts(machine: Machine, config: Config, utterances: int, seconds: float, *, together: bool) -> float:
    """The weights of Linear and LayerNorm to bf16, launches included."""
    model = _model(machine, config)

    def cast() -> None:
        with weights_cast_once(model, torch.bfloat16):
            pass

    cast_ones = [module for module in model.modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
    weights = [parameter for module in cast_ones for parameter in module.parameters()]
    return _time(cast if together else lambda: [x.bfloat16() for x in weights], machine)


def _step(machine: Machine, config: Config, utterances: int, seconds: float, *, waiting: bool, host: bool) -> float:
    """Clipping and AdamW, with a wait for the norm or without: until the host can go on, or all is done."""
    parameters = dict(_model(machine, config).named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    shapes = [(name, parameter.shape) for name, parameter in parameters.items()]
    optimizer: Any = make_adamw(parameters, parameter_groups(shapes, config.optim), config.optim)
    allocate_state(optimizer, parameters.values())
    ballast = torch.ones(*[256 if machine.tiny else 8192] * 2, device=machine.device)

    def step() -> None:
        if waiting:
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.optim.max_norm or math.inf, foreach=True)
            if math.isfinite(float(norm)):
                optimizer.found_inf = optimizer.grad_scale = None
                optimizer.step()
        else:
            clip_and_step(optimizer, nn.utils.get_total_norm(gradients, foreach=True), config.optim.max_norm)

    times = []
    for _ in range(3 if machine.tiny else 10):
        synchronize(machine.device)
        ballast @ ballast  # what is left of the backward
        began = time.perf_counter()
        step()
        if not host:
            synchronize(machine.device)
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def _feature_encoder(machine: Machine, config: Config, utterances: int, seconds: float, *, compiled: bool) -> float:
    encoder = FeatureEncoder(config.model).to(machine.device)
    samples = int(seconds * config.model.sampling_rate)
    waveforms_BS = torch.randn(utterances, samples, device=machine.device).bfloat16()
    lengths_B = torch.tensor([samples - 100 * number for number in range(utterances)], device=machine.device)
    forward = torch.compile(encoder.forward, dynamic=True, fullgraph=True) if compiled else encoder.forward
    work = forward_and_backward(lambda *_: forward(waveforms_BS, lengths_B), *encoder.parameters())
    return _time(work, machine)


def _first_layer(machine: Machine, config: Config, utterances: int, seconds: float, *, compiled: bool) -> float:
    """The first convolution, as one product for each utterance, and GELU; compiled as a sum over the taps.

    The compiler can compute such a sum and GELU in one kernel, and the sum again in the backward.
    """
    channels, kernel, stride = config.model.conv_layers[0]
    samples = int(seconds * config.model.sampling_rate)
    waveforms_BS = torch.randn(utterances, samples, device=machine.device).bfloat16()
    taps_BTJ = taps_of(waveforms_BS, kernel, stride)
    weight_BOJ = torch.randn(utterances, channels, taps_BTJ.shape[2], device=machine.device).requires_grad_()

    def product(weight_BOJ: Tensor) -> Tensor:
        return F.gelu(taps_BTJ @ weight_BOJ.bfloat16().transpose(1, 2))

    def taps(weight_BOJ: Tensor) -> Tensor:
        windows_BTK = waveforms_BS.unfold(1, kernel, stride).float()
        parts = (windows_BTK[:, :, tap, None] * weight_BOJ[:, None, :, tap] for tap in range(kernel))
        return F.gelu(sum(parts, weight_BOJ[:, None, :, kernel])).bfloat16()

    form = torch.compile(taps, dynamic=True) if compiled else product
    return _time(forward_and_backward(form, weight_BOJ), machine)


def _loss_head(machine: Machine, config: Config, utterances: int, seconds: float, *, compiled: bool) -> float:
    """Quantizer, similarities and losses, from features and context that are given."""
    batch = Work(config, utterances, seconds, "bucket").batch(0)
    head = our_head(config, batch, machine.device, compiled=compiled)
    inputs = to_device(batch.inputs, machine.device)
    frames = inputs.audio.mask_BT.shape[1]
    shapes = [(utterances, frames, config.model.conv_layers[-1][0]), (utterances, frames, config.model.dim)]
    leaves = [torch.randn(shape, device=machine.device).bfloat16().requires_grad_() for shape in shapes]
    return _time(forward_and_backward(head, *leaves), machine)


CHANGES: dict[str, dict[str, Callable[..., float]]] = {
    "q, k and v": {
        "permuted (before)": partial(_split_qkv, permuted=True),
        "one copy": partial(_split_qkv, permuted=False),
    },
    "moments": {"at once (before)": partial(_moments, in_parts=False), "in parts": partial(_moments, in_parts=True)},
    "diversity": {"loop (before)": partial(_sums, product=False), "product": partial(_sums, product=True)},
    "feature penalty": {"loop (before)": partial(_penalty, product=False), "product": partial(_penalty, product=True)},
    "weights to bf16": {"each (before)": partial(_casts, together=False), "together": partial(_casts, together=True)},
    "step, host": {
        "waiting (before)": partial(_step, waiting=True, host=True),
        "on the device": partial(_step, waiting=False, host=True),
    },
    "step, all": {
        "waiting (before)": partial(_step, waiting=True, host=False),
        "on the device": partial(_step, waiting=False, host=False),
    },
}
"""Forms of each change, by name; arguments: machine, config, utterances, seconds."""

COMPILED: dict[str, Callable[..., float]] = {
    "feature encoder": _feature_encoder,
    "first layer": _first_layer,
    "loss head": _loss_head,
}
"""What is measured eager and compiled."""
