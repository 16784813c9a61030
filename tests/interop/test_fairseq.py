"""Checkpoints of fairseq have the same features, quantized vectors and settings here."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.converted import from_fairseq, to_huggingface
from tests.helpers.fairseq import (
    BASE,
    LARGE,
    LARGE_LV60,
    NARROW,
    SMALL,
    Reference,
    Shape,
    all_settings,
    fairseq_state,
    fine_tuned_settings,
    fine_tuned_state,
    model_settings,
    save_new,
    save_old,
    save_omegaconf,
)
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import audio_batch
from w2vscale.errors import UserError
from w2vscale.interop.fairseq_file import FairseqCheckpoint, load_fairseq
from w2vscale.interop.huggingface import huggingface_config
from w2vscale.interop.importing import import_checkpoint
from w2vscale.objectives import build_objective


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def build(path: Path) -> tuple[Any, Config]:
    config, state = from_fairseq(load_fairseq(path))
    model = build_objective(config).build_model().eval()
    model.load_state_dict(state)
    return model, config


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL.keys())
def shape(request: pytest.FixtureRequest) -> Shape:
    torch.manual_seed(5)
    return request.param


@torch.no_grad()
def test_every_hidden_state_is_that_of_fairseq(shape: Shape, tmp_path: Path) -> None:
    state = fairseq_state(shape)
    model, config = build(save_new(tmp_path / "model.pt", state, all_settings(shape)))
    reference = Reference(state, shape, config.model.heads)
    for waveform in (torch.randn(3000), torch.randn(2345)):
        theirs = reference.encode(waveform)
        encoded = model.encoder(waveform.unsqueeze(0))
        assert_equal(encoded.normalised_BTC[0], reference.extract(waveform))
        assert len(theirs) == config.model.layers + 2
        for our_BTD, their_TD in zip([*encoded.hidden, encoded.context_BTD], theirs, strict=True):
            assert_equal(our_BTD[0], their_TD)


@torch.no_grad()
def test_utterances_of_a_padded_batch_are_each_as_fairseq_has_them_alone(shape: Shape, tmp_path: Path) -> None:
    state = fairseq_state(shape)
    model, config = build(save_new(tmp_path / "model.pt", state, all_settings(shape)))
    reference = Reference(state, shape, config.model.heads)
    waveforms = [torch.randn(3000), torch.randn(2100)]
    audio = audio_batch([waveform.numpy() for waveform in waveforms], config.model, width=0)
    encoded = model.encoder(audio.waveforms_BS, audio.lengths)
    for row, waveform in enumerate(waveforms):
        theirs = reference.encode(waveform)
        for our_BTD, their_TD in zip([*encoded.hidden, encoded.context_BTD], theirs, strict=True):
            assert_equal(our_BTD[row, : audio.frames[row]], their_TD)


@torch.no_grad()
def test_quantizer_and_projections_are_those_of_fairseq_also_in_transformers(shape: Shape, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = fairseq_state(shape)
    model, config = build(save_new(tmp_path / "model.pt", state, all_settings(shape)))
    other = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config))).eval()
    other.load_state_dict(to_huggingface(model.state_dict(), config))
    reference = Reference(state, shape, config.model.heads)
    waveform = torch.randn(3000)
    vectors_TD = reference.quantize(waveform)
    targets_TP = reference.affine("project_q", vectors_TD)
    context_TP = reference.affine("final_proj", reference.encode(waveform)[-1])

    encoded = model.encoder(waveform.unsqueeze(0))
    quantized = model.quantizer(encoded.normalised_BTC[0], None, 1.0)
    assert_equal(quantized.vectors_MD, vectors_TD)
    assert_equal(model.target_projection(quantized.vectors_MD), targets_TP)
    assert_equal(model.context_projection(encoded.context_BTD[0]), context_TP)
    theirs = other(waveform.unsqueeze(0))
    assert_equal(theirs.projected_quantized_states[0], targets_TP)
    assert_equal(theirs.projected_states[0], context_TP)
    assert torch.equal(model.encoder.mask_embedding, state["mask_emb"])


def test_names_of_the_newer_weight_norm_and_half_precision_are_understood(tmp_path: Path) -> None:
    shape = SMALL["base"]
    state = fairseq_state(shape)
    _, expected = from_fairseq(FairseqCheckpoint(tmp_path, state, model_settings(shape)))
    prefix = "encoder.pos_conv.0"
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"{prefix}.parametrizations.weight.{new}"] = state.pop(f"{prefix}.{old}")
    _, again = from_fairseq(FairseqCheckpoint(tmp_path, state, model_settings(shape)))
    half = {name: tensor.half() for name, tensor in state.items()}
    _, halved = from_fairseq(FairseqCheckpoint(tmp_path, half, model_settings(shape)))
    assert again.keys() == expected.keys() == halved.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor)
        assert halved[name].dtype == torch.float32
        assert torch.equal(halved[name], tensor.half().float())


def published(shape: Shape, **changes: Any) -> FairseqCheckpoint:
    """A model of full size, without memory."""
    with torch.device("meta"):
        state = fairseq_state(shape)
    cfg = all_settings(shape, **changes)
    return FairseqCheckpoint(Path("full.pt"), state, {**cfg["criterion"], **cfg["task"], **cfg["model"]})


NO_DROPOUT = {"attention_dropout": 0.0, "dropout_input": 0.0, "dropout_features": 0.0, "feature_grad_mult": 1.0}
PUBLISHED = {
    "base": (
        BASE,
        {"dropout": 0.1, "encoder_layerdrop": 0.05, "feature_grad_mult": 0.1, "latent_temp": "(2,0.5,0.999995)"},
    ),
    "large": (LARGE, {}),
    "large_lv60": (LARGE_LV60, NO_DROPOUT),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_settings_of_the_published_models_are_those_of_the_presets(preset: str) -> None:
    shape, changes = PUBLISHED[preset]
    checkpoint = published(shape, **changes)
    config, state = from_fairseq(checkpoint)
    expected = load_config(f"fairseq_{preset}")
    assert (config.model, config.regularization) == (expected.model, expected.regularization)
    assert build_objective(config).settings == build_objective(expected).settings
    bare, bare_state = from_fairseq(FairseqCheckpoint(checkpoint.path, checkpoint.state, {}))
    assert bare_state.keys() == state.keys()
    assert {"heads", "conv_layers", "normalize_waveform"} <= bare.model.model_fields_set
    assert all(getattr(bare.model, name) == getattr(config.model, name) for name in bare.model.model_fields_set)


def test_settings_of_training_are_taken_over(tmp_path: Path) -> None:
    changes = {"mask_prob": 0.5, "mask_length": 7, "num_negatives": 50, "logit_temp": 0.2, "activation_dropout": 0.3}
    path = save_new(tmp_path / "model.pt", fairseq_state(SMALL["large"]), all_settings(SMALL["large"], **changes))
    _, config = build(path)
    settings = config.objective
    assert (settings.mask_probability, settings.mask_length, settings.negatives) == (0.5, 7, 50)
    assert (settings.mask_trim, config.model.waveform_eps) == ("micro_batch", 1e-5)
    assert (settings.logit_temperature, config.regularization.activation_dropout) == (0.2, 0.3)
    assert (settings.gumbel_start, settings.gumbel_end, settings.gumbel_decay) == (2.0, 0.1, 0.999995)
    assert (settings.codebooks, settings.codebook_entries, settings.codevector_dim) == (3, 10, 36)
    assert config.model.conv_layers == NARROW
    assert (config.model.positional_kernel, config.model.positional_groups) == (16, 8)


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    """A dictionary of letters as fairseq writes it: without special symbols, with counts."""
    path = tmp_path / "dict.ltr.txt"
    path.write_text("| 94802\nE 51860\nT 38431\nA 33152\n")
    return path


@torch.no_grad()
@pytest.mark.parametrize("form", ["cfg", "omegaconf", "Namespace"])
def test_logits_of_fine_tuned_models_are_those_of_fairseq(
    shape: Shape, form: str, dictionary: Path, tmp_path: Path
) -> None:
    pretrained, cfg = fairseq_state(shape), fine_tuned_settings(shape)
    state = fine_tuned_state(pretrained, 8)
    path = tmp_path / "model.pt"
    if form == "Namespace":  # of 2020: both are flat
        given = cfg["model"].pop("w2v_args")
        cfg["model"]["w2v_args"] = Namespace(**{**given["criterion"], **given["task"], **given["model"]})
        save_old(path, state, cfg, zipped=True)
    else:
        (save_new if form == "cfg" else save_omegaconf)(path, state, cfg)
    model, config = build(path)
    reference, waveform = Reference(pretrained, shape, config.model.heads), torch.randn(3000)
    head = state["w2v_encoder.proj.weight"], state["w2v_encoder.proj.bias"]
    theirs = torch.nn.functional.linear(reference.encode(waveform)[-1], *head)
    model.compute_dtype = torch.float32
    assert_equal(model.logits(waveform.unsqueeze(0))[0], theirs)
    assert build_objective(config).vocabulary == ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A"]
    regularization = config.regularization
    assert (regularization.activation_dropout, regularization.layerdrop, regularization.dropout) == (0.1, 0.05, 0.0)
    assert (config.model.normalize_waveform, config.model.heads) == (shape.layer_norm, 4)
    assert import_checkpoint(path, tmp_path / "in", tokenizer=dictionary).parameters > 0


def test_fine_tuned_models_that_do_not_fit_are_refused(dictionary: Path, tmp_path: Path) -> None:
    shape = SMALL["base"]
    for symbols, changes, message in (
        (9, {}, "its output layer has 9 symbols, and .*dict.ltr.txt has 8 with the blank"),
        (8, {"w2v_args": None}, "its settings lack encoder_attention_heads"),
        (8, {"w2v_args": {"model": 3}}, "its settings lack encoder_attention_heads"),
        (8, {"w2v_args": model_settings(shape, layer_type="conformer")}, "layer_type=conformer"),
    ):
        state = fine_tuned_state(fairseq_state(shape), symbols)
        path = save_new(tmp_path / "model.pt", state, fine_tuned_settings(shape, **changes))
        with pytest.raises(UserError, match=rf"model\.pt: {message}"):
            from_fairseq(load_fairseq(path))
    dictionary.unlink()
    with pytest.raises(UserError, match=r"the file with its 8 symbols: put it beside the model \(as dict\*\.txt\)"):
        from_fairseq(load_fairseq(path))
