"""What objectives show of a few utterances: it is what the forward computes, and showing it changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.audio import noise
from tests.helpers.batches import inputs_of
from tests.helpers.engines import filled_model
from tests.helpers.micro import MICRO_ENCODER, MICRO_MODEL, MICRO_TRAINING
from w2vscale.config import Config, load_config
from w2vscale.loggers.drawing import draw
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.ctc import emissions

BEST_RQ = (*MICRO_ENCODER, "objective.name=best_rq", "objective.codebooks=3", "objective.codebook_entries=12")
CTC = (*MICRO_ENCODER, "objective.name=ctc", "objective.vocabulary=letters")
SECONDS = (1.1, 2.0, 0.7)


def setting(*overrides: str) -> tuple[Config, Any, Any, Any]:
    """Settings, objective, model in evaluation mode, and a batch of three utterances."""
    config = load_config("base", [*MICRO_TRAINING, *overrides])
    objective = build_objective(config)
    targets = [[5, 6, 7], [8, 9], [10]] if "objective.name=ctc" in overrides else None
    inputs = inputs_of(objective, [noise(seconds, seed=number) for number, seconds in enumerate(SECONDS)], targets)
    return config, objective, filled_model(config).eval(), inputs


@pytest.mark.parametrize("overrides", [MICRO_MODEL, BEST_RQ], ids=["wav2vec2", "best_rq"])
@torch.no_grad()
def test_masks_predictions_and_codes_are_those_of_the_validation(overrides: tuple[str, ...]) -> None:
    config, objective, model, inputs = setting(*overrides)
    sums = objective.forward(model, inputs, step=StepContext(0, 0, (0,)), training=False)
    details = objective.inspect(model, inputs, samples=3, blocks=[])
    assert len(details.samples) == 3 and not details.attention
    for number, sample in enumerate(details.samples):
        assert np.array_equal(sample.masked_T, inputs.audio.mask_BT[number, : inputs.audio.frames[number]].numpy())
        assert np.array_equal(np.isnan(sample.correct_T), ~sample.masked_T)
        assert np.array_equal(sample.waveform_S, noise(SECONDS[number], seed=number))
    correct = sum(float(np.nansum(sample.correct_T)) for sample in details.samples)
    assert correct == pytest.approx(float(sums.correct), rel=1e-6) and correct > 0
    entries = config.objective.model_dump()["codebook_entries"]
    counts = [np.bincount(codes_M, minlength=entries) for codes_M in details.codes_MG.T]
    assert np.array_equal(np.stack(counts), sums.code_counts_GV.numpy())
    images = draw(details, config.model).images
    assert set(images) == {"1_spectrogram", "2_spectrogram", "3_spectrogram", "codes_usage", "codes_cooccurrence"}
    assert all(png.startswith(b"\x89PNG") and len(png) < 100_000 for png in images.values())


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_attention_is_what_the_block_uses(padded: bool) -> None:
    """The weights times the values are the output of the attention kernel."""
    config, objective, model, inputs = setting(*MICRO_MODEL)
    if not padded:
        inputs = inputs_of(objective, [noise(1.0, seed=number) for number in range(2)])
    attention, outputs = model.encoder.transformer.blocks[1].attention, {}
    hooks = [
        attention.qkv.register_forward_hook(lambda *call: outputs.update(qkv=call[2])),
        attention.out.register_forward_pre_hook(lambda _, given: outputs.update(mixed=given[0])),
    ]
    details = objective.inspect(model, inputs, samples=1, blocks=[2])
    for hook in hooks:
        hook.remove()
    weights_HTT = torch.from_numpy(details.attention[2])
    frames = inputs.audio.frames[0]
    assert weights_HTT.shape == (4, frames, frames)
    values_HTE = outputs["qkv"][:frames].unflatten(1, (3, 4, 8))[:, 2].transpose(0, 1)
    mixed_TD = (weights_HTT @ values_HTE).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mixed_TD, outputs["mixed"][:frames], rtol=1e-4, atol=1e-6)
    assert not attention.qkv._forward_hooks
    assert set(draw(details, config.model).images) >= {"attention_block_02"}


@torch.no_grad()
def test_ctc_shows_symbols_with_their_times_and_both_texts() -> None:
    config, objective, model, inputs = setting(*CTC)
    details = objective.inspect(model, inputs, samples=2, blocks=[3])
    logits_BTV = model.logits(inputs.audio.waveforms_BS, inputs.audio.lengths)
    letters = objective.vocabulary
    for number, sample in enumerate(details.samples):
        best_T = logits_BTV[number, : inputs.audio.frames[number]].argmax(dim=1)
        assert all(letters[best_T[frame]] == symbol for frame, symbol in sample.symbols)
    assert details.samples[0].reference == "".join(letters[label] for label in (5, 6, 7))
    picture = draw(details, config.model)
    assert set(picture.images) == {"1_spectrogram", "2_spectrogram", "attention_block_03"}
    assert picture.texts["1_text"].startswith(f"reference:  {details.samples[0].reference}\nhypothesis: ")


def test_emissions_merge_repetitions_but_not_across_blanks() -> None:
    assert emissions([0, 3, 3, 0, 3, 4, 4, 0]) == [(1, 3), (4, 3), (5, 4)]
    assert emissions([5, 5]) == [(0, 5)] and emissions([]) == [] and emissions([0, 0]) == []


@torch.no_grad()
def test_a_compiled_block_shows_its_attention_and_stays_compiled() -> None:
    _, objective, model, inputs = setting(*MICRO_MODEL)
    block = model.encoder.transformer.blocks[0]
    calls: list[int] = []
    plain = block.forward

    def compiled(*arguments: Any) -> Any:
        calls.append(1)
        return plain(*arguments)

    block.forward = compiled
    assert set(objective.inspect(model, inputs, samples=1, blocks=[1]).attention) == {1} and not calls
    objective.inspect(model, inputs, samples=1, blocks=[])
    assert calls and block.forward is compiled
