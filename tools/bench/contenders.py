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

from tests.helpers.batches import inputs_of
from tests.helpers.continued import flat_negatives
from tests.helpers.torchaudio import import_torchaudio
from tools.bench.running import build
from w2vscale.checkpoint.lazy import lazy, whole
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.errors import UserError
from w2vscale.interop.huggingface import huggingface_config, to_huggingface
from w2vscale.interop.torchaudio import to_torchaudio, torchaudio_arguments
from w2vscale.objectives import build_objective
from w2vscale.objectives.base import empty_model, initial_state
from w2vscale.objectives.contrastive import Contrastive
from w2vscale.planning.operations import MISCOUNTED

LR = 1e-5
MATRIX_SECONDS = 5.0


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
        inputs = inputs_of(build_objective(self.config), waveforms, number=number)
        return MicroBatch(number, inputs, sum(map(len, waveforms)))

    def in_fp32(self) -> Config:
        """The settings, with fp32 throughout."""
        return Config.model_validate(self.config.model_dump(mode="json") | {"precision": {"compute": "fp32"}})

    def flops(self) -> int:
        """Floating-point operations of forward and backward as the model is defined, by PyTorch's counter.

        On the meta device, where nothing is computed: what a device saves, by fast Fourier transforms, is not left out.
        Padding is computed, and counts.
        """
        return int(self.counted_flops().get_total_flops())

    def counted_flops(self) -> FlopCounterMode:
        """What `flops` counts, with the figures of each module."""
        meta = torch.device("meta")
        objective = build_objective(self.in_fp32())
        model = empty_model(objective).train()
        inputs: Any = to_device(self.batch().inputs, meta)
        codes = (objective.settings.codebooks, objective.settings.codebook_entries)
        noise_MGV = torch.empty((sum(inputs.masked), *codes), device=meta)
        with FlopCounterMode(display=False, custom_mapping=MISCOUNTED) as counter:
            model(inputs, noise_MGV=noise_MGV).total.backward()
        return counter


def work_settings(preset: str, settings: Sequence[str]) -> Config:
    """The settings of a contest: of pretraining, in one process, with every layer.

    Raises:
        UserError: they are of something else.
    """
    config = load_config(preset, [*settings, "regularization.layerdrop=0"])
    if not isinstance(build_objective(config), Contrastive):
        raise UserError(f"{preset}: objective.name={config.objective.name}; a step here is of pretraining (wav2vec2)")
    if config.engine.name != "ddp":
        raise UserError(f"engine.name={config.engine.name}: a step here is of one process, that is ddp")
    return config


def initial_weights(config: Config) -> dict[str, Tensor]:
    """The initial values of our model, by our names."""
    return dict(initial_state(build_objective(config), config.trainer.seed))


def our_step(config: Config, device: torch.device, *, compiled: bool = False) -> Step:
    """As the training loop has the engine do it."""
    document = config.model_dump(mode="json")
    config = Config.model_validate(document | {"engine": document["engine"] | {"compile": compiled}})
    setup = build(config, device)

    def step(batch: MicroBatch) -> float:
        sums = setup.window([batch], float(batch.weight))
        setup.step(LR, config.optim.max_norm)
        return float(sums.total) / batch.weight

    return step


def transformers_model(config: Config) -> Any:
    """Transformers' model with our initial values, on the CPU."""
    try:
        import transformers
    except ImportError:
        raise UserError("Transformers is not installed: pip install transformers") from None

    with torch.device("meta"):
        model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config)))
    model.load_state_dict(whole(to_huggingface(lazy(initial_weights(config)), config)), assign=True)
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
        audio = to_device(batch.inputs.audio, device)
        attend_BS = torch.arange(audio.waveforms_BS.shape[1], device=device) < audio.lengths_B.unsqueeze(1)
        if batch.number not in negatives:  # in the warm-up: translating ours is no part of their step
            negatives[batch.number] = flat_negatives(batch.inputs).to(device)
        negatives_BTK = negatives[batch.number]

        def loss() -> Tensor:
            found: Tensor = model(
                audio.waveforms_BS,
                attention_mask=attend_BS.long() if audio.padded else None,
                mask_time_indices=audio.mask_BT,
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
    model = torchaudio.models.wav2vec2_model(**torchaudio_arguments(config))
    model.load_state_dict(whole(to_torchaudio(lazy(initial_weights(config)), config)))
    model.to(device).train()
    update = _plain_update(model, config, device)

    def step(batch: MicroBatch) -> float:
        audio = to_device(batch.inputs.audio, device)
        return update(
            lambda: model(audio.waveforms_BS, audio.lengths_B if audio.padded else None)[0].float().square().mean()
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
