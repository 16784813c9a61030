"""Memory of the loss head: everything between the encoder and the loss, forward and backward.

    python tools/bench/loss_head.py                                `base`, 4 utterances of 10 s, fp32

The encoder of each model is replaced by tensors of the sizes that it would give; the rest is each project's own code:
quantizer, negatives, similarities, losses. Counted is what is allocated at once, at most, beside the parameters and
what the encoder gave, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from tests.helpers.continued import flat_negatives
from tools.bench.contenders import Work, transformers_model, work_settings
from tools.bench.running import filled_model
from tools.bench.script import run_script
from w2vscale.config import Config
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.kernels.packing import Packing
from w2vscale.models.wav2vec2 import EncoderOutput
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.contrastive import ContrastiveInputs
from w2vscale.planning.live_memory import LiveMemory


def main(
    preset: Annotated[str, typer.Option(help="Whose model.")] = "base",
    utterances: Annotated[int, typer.Option(min=1, help="Of a micro-batch.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of an utterance.")] = 10.0,
) -> None:
    """Compare the memory of the loss heads."""
    found = loss_head_memory(Work(work_settings(preset, []), utterances, seconds))
    print(
        f"loss head: w2vscale {found['w2vscale'] / 2**20:.1f} MiB, Transformers {found['transformers'] / 2**20:.1f} MiB"
    )
    print(json.dumps(found))


def loss_head_memory(work: Work) -> dict[str, float]:
    """The most that each head has allocated in fp32, in bytes, and the ratio of ours to theirs."""
    config, batch = work.in_fp32(), work.batch()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames = batch.inputs.audio.mask_BT.shape
    torch.manual_seed(0)
    features_BTC = torch.randn(*frames, config.model.conv_layers[-1][0], device=device)
    context_BTD = torch.randn(*frames, config.model.dim, device=device)
    ours = peak_memory(our_head(config, batch, device), features_BTC, context_BTD)
    theirs = peak_memory(their_head(config, _on(batch, device), device), features_BTC, context_BTD)
    return {"w2vscale": ours, "transformers": theirs, "ratio": ours / theirs}


def _on(batch: MicroBatch, device: torch.device) -> ContrastiveInputs:
    inputs = to_device(batch.inputs, device)
    assert isinstance(inputs, ContrastiveInputs)
    return inputs


Head = Callable[[Tensor, Tensor], Tensor]
"""From features [B, T, C] and context [B, T, D] to the loss."""


def our_head(config: Config, batch: MicroBatch, device: torch.device, *, compiled: bool = False) -> Head:
    """Without the encoder, as the engines run it. Noise is drawn outside of compiled code."""
    model = filled_model(config).to(device)
    objective, inputs = build_objective(config), to_device(batch.inputs, device)
    given = _Given()
    model.encoder = given
    model.train()
    forward = torch.compile(model) if compiled else model

    def loss(features_BTC: Tensor, context_BTD: Tensor) -> Tensor:
        packing = Packing.of(context_BTD, None)
        given.output = EncoderOutput(features_BTC, features_BTC, context_BTD, context_BTD, [], packing)
        draws = objective.draws(inputs, StepContext(0, 0, (batch.number,)))
        total: Tensor = forward(inputs, active=None, **draws).total
        return total

    return loss


def their_head(config: Config, inputs: ContrastiveInputs, device: torch.device) -> Head:
    """Without the encoder, as `Wav2Vec2ForPreTraining.forward` is."""
    model = nn.Module.to(transformers_model(config), device).train()
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2BaseModelOutput

    given = _Given()
    model.wav2vec2 = given
    negatives_BTK = flat_negatives(inputs)

    def loss(features_BTC: Tensor, context_BTD: Tensor) -> Tensor:
        given.output = Wav2Vec2BaseModelOutput(last_hidden_state=context_BTD, extract_features=features_BTC)
        found: Tensor = model(
            inputs.audio.waveforms_BS, mask_time_indices=inputs.audio.mask_BT, sampled_negative_indices=negatives_BTK
        ).loss
        return found

    return loss


class _Given(nn.Module):
    """Stands where an encoder would."""

    output: Any

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def peak_memory(head: Head, *given: Tensor) -> float:
    """Bytes that are allocated at once, at most, by a forward and backward."""
    leaves = [x.clone().requires_grad_() for x in given]
    with LiveMemory() as memory:
        head(*leaves).backward()
    return float(memory.peak)


if __name__ == "__main__":
    run_script(main)
