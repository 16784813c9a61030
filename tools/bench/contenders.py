"""A training step by several projects on the same work: same weights, same audio, same masks and negatives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from w2vscale.models.build import Wav2Vec2
from w2vscale.objectives.criterion import PretrainingCriterion

from tests.helpers.torchaudio import import_torchaudio
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import PretrainingInputs, to_device
from w2vscale.data.micro_batch import MicroBatch, make_inputs
from w2vscale.engine import build_engine
from w2vscale.errors import UserError
from w2vscale.interop.huggingface import huggingface_config, to_huggingface
from w2vscale.interop.torchaudio import to_torchaudio, torchaudio_arguments
from w2vscale.training.run import empty_model, initial_values

LR = 1e-5
MATRIX_SECONDS = 5.0


def _baddbmm_flops(_: Any, a_shape: Sequence[int], b_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(a_shape) * b_shape[2]


def _convolution_backward_flops(
    gradient_shape: Sequence[int], _: Any, weight_shape: Sequence[int], *others: Any, **__: Any
) -> int:
    wanted = others[-1]
    return 2 * math.prod(gradient_shape) * math.prod(weight_shape[1:]) * sum(wanted[:2])


MISCOUNTED = {
    torch.ops.aten.baddbmm_: _baddbmm_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
"""What PyTorch's counter leaves out, and what it counts as if a convolution had one group."""

Step = Callable[[MicroBatch], float]
"""Trains on one micro-batch; its loss per masked frame."""


@dataclass(frozen=True)
class Work:
    """A model, and the micro-batch that it is trained on."""

    config: Config
    utterances: int
    seconds: float
    lengths: Literal["equal", "bucket", "corpus"] = "equal"
    """bucket: within 3 % of the longest, as in a duration bucket. corpus: spread like LibriSpeech's, unsorted."""

    def batch(self, number: int = 0) -> MicroBatch:
        """Micro-batch `number`, the same in every process: noise."""
        draws = np.random.default_rng(number)
        longest = int(self.seconds * self.config.model.sampling_rate)
        shares = np.ones(self.utterances)
        if self.lengths == "bucket":
            shares -= 0.03 * draws.random(self.utterances)
        elif self.lengths == "corpus":
            shares -= draws.beta(1.0, 3.5, size=self.utterances)  # most are near 14 s of 16
        shares[0] = 1.0
        waveforms = [draws.standard_normal(int(share * longest), dtype=np.float32) for share in shares]
        inputs = make_inputs(waveforms, range(self.utterances), number=number, seed=0, config=self.config.model)
        return MicroBatch(update=0, number=number, inputs=inputs, audio_samples=sum(map(len, waveforms)))

    def in_fp32(self) -> Config:
        """The settings, with fp32 throughout."""
        return Config.model_validate(self.config.model_dump(mode="json") | {"precision": {"compute": "fp32"}})

    def flops(self) -> int:
        """Floating-point operations of forward and backward as the model is defined, by PyTorch's counter.

        On the meta device, where nothing is computed: what a device saves, by fast Fourier transforms, is not left out.
        Padding is computed, and counts.
        """
        meta = torch.device("meta")
        model = empty_model(self.in_fp32()).train()
        inputs = to_device(self.batch().inputs, meta)
        noise_MGV = torch.empty(
            sum(inputs.masked), self.config.objective.codebooks, self.config.objective.codebook_entries, device=meta
        )
        with FlopCounterMode(display=False, custom_mapping=MISCOUNTED) as counter:
            model(inputs, noise_MGV=noise_MGV).total.backward()
        return int(counter.get_total_flops())


def work_settings(preset: str, settings: Sequence[str]) -> Config:
    """The settings of a contest: of pretraining, in one process, with every layer.

    Raises:
        UserError: they are of something else.
    """
    config = load_config(preset, [*settings, "regularization.layerdrop=0"])
    if config.objective.vocabulary:
        raise UserError(
            f"{preset}: fine-tunes (objective.vocabulary={config.objective.vocabulary}); a step here is of pretraining"
        )
    if config.engine.name != "ddp":
        raise UserError(f"engine.name={config.engine.name}: a step here is of one process, that is ddp")
    return config


def filled_model(config: Config) -> Wav2Vec2:
    """Our model with its initial values, on the CPU."""
    model = empty_model(config).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, (_, value) in zip(model.parameters(), initial_values(config), strict=True):
            parameter.copy_(value)
    return model


def our_step(config: Config, device: torch.device, *, compiled: bool = False) -> Step:
    """As the training loop has the engine do it."""
    document = config.model_dump(mode="json")
    config = Config.model_validate(document | {"engine": document["engine"] | {"compile": compiled}})
    engine = build_engine(empty_model(config), PretrainingCriterion(config.model, seed=0), config, device)
    engine.import_parameters(initial_values(config))

    def step(batch: MicroBatch) -> float:
        sums = engine.run_window([batch], torch.tensor(float(batch.weight), device=device))
        engine.step(lr=LR, max_norm=config.optim.max_norm)
        return float(sums.total) / batch.weight

    return step


def transformers_model(config: Config) -> Any:
    """Transformers' model with our initial values, on the CPU."""
    try:
        import transformers
    except ImportError:
        raise UserError("Transformers is not installed: pip install transformers") from None

    with torch.device("meta"):
        model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config.model)))
    model.load_state_dict(to_huggingface(dict(initial_values(config)), config.model), assign=True)
    return model


def their_step(config: Config, device: torch.device, *, compiled: bool = False) -> Step:
    """Transformers' model in the plainest loop."""
    model = transformers_model(config)
    torch.nn.Module.to(model, device).train()
    if compiled:
        model.compile()
    update = _plain_update(model, config, device)
    negatives: dict[int, Tensor] = {}

    def step(batch: MicroBatch) -> float:
        inputs = to_device(batch.inputs, device)
        attend_BS = torch.arange(inputs.waveforms_BS.shape[1], device=device) < inputs.lengths_B.unsqueeze(1)
        if batch.number not in negatives:  # in the warm-up: translating ours is no part of their step
            negatives[batch.number] = flat_negatives(batch.inputs).to(device)
        negatives_BTK = negatives[batch.number]

        def loss() -> Tensor:
            found: Tensor = model(
                inputs.waveforms_BS,
                attention_mask=attend_BS.long() if inputs.padded else None,
                mask_time_indices=inputs.mask_BT,
                sampled_negative_indices=negatives_BTK,
            ).loss
            return found / batch.weight

        return update(loss)

    return step


def torchaudio_step(config: Config, device: torch.device) -> Step:
    """torchaudio's encoder in the plainest loop: without masks, quantizer and contrastive loss, which it lacks."""
    try:
        torchaudio = import_torchaudio()
    except ImportError:
        raise UserError("torchaudio is not installed: tools/setup.sh makes an environment with it") from None
    model = torchaudio.models.wav2vec2_model(**torchaudio_arguments(config.model, config.ctc))
    model.load_state_dict(to_torchaudio(dict(initial_values(config)), config.model, config.ctc))
    model.to(device).train()
    update = _plain_update(model, config, device)

    def step(batch: MicroBatch) -> float:
        inputs = to_device(batch.inputs, device)
        return update(
            lambda: model(inputs.waveforms_BS, inputs.lengths_B if inputs.padded else None)[0].float().square().mean()
        )

    return step


def _plain_update(model: nn.Module, config: Config, device: torch.device) -> Callable[[Callable[[], Tensor]], float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision.compute == "bf16")

    def update(loss: Callable[[], Tensor]) -> float:
        with bf16:
            found = loss()
        found.backward()
        nn.utils.clip_grad_norm_(parameters, config.optim.max_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return float(found.detach())

    return update


def flat_negatives(inputs: PretrainingInputs) -> Tensor:
    """Our negatives (numbers among an utterance's masked frames) as Transformers' (frames of the flattened batch)."""
    batch, frames = inputs.mask_BT.shape
    negatives = inputs.negatives_MK
    flat_BTK = torch.zeros(batch, frames, negatives.shape[1], dtype=torch.long, device=negatives.device)
    for row, mask_T in enumerate(inputs.mask_BT):
        frame_N = mask_T.nonzero().squeeze(1)
        flat_BTK[row, frame_N] = row * frames + frame_N[negatives[inputs.utterance_M == row].long()]
    return flat_BTK


def matrix_rate(compute: str, device: torch.device) -> float:
    """The best rate of a large matrix product here and now, FLOP/s."""
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, started = math.inf, time.perf_counter()
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        F.linear(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() - started > MATRIX_SECONDS:  # where bf16 is emulated
            break
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until `device` has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
