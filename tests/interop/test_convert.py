"""Models out to Transformers and torchaudio, and in again: every tensor, every hidden state, and the loss."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.batches import inputs_of
from tests.helpers.continued import flat_negatives
from tests.helpers.exported import load_model, save_model, waveforms
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.importing import import_checkpoint
from w2vscale.objectives import build_objective

transformers = pytest.importorskip("transformers")


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def encode(model: Any, inputs: Any) -> Any:
    seen: dict[str, Any] = {}
    handle = model.encoder.register_forward_hook(lambda module, args, output: seen.update(encoded=output))
    with torch.no_grad():
        seen["sums"] = model(inputs)
    handle.remove()
    return seen


class TestTransformers:
    def test_no_key_is_missing_or_unexpected(self, family: tuple[Config, Path, Path]) -> None:
        _, _, export = family
        for kind in ("Wav2Vec2ForPreTraining", "Wav2Vec2Model"):
            _, report = getattr(transformers, kind).from_pretrained(export, output_loading_info=True)
            assert not report["missing_keys"] and not report["mismatched_keys"], kind
            # The encoder alone has no place for the quantizer and the projections.
            assert bool(report["unexpected_keys"]) == (kind == "Wav2Vec2Model")
        _, report = transformers.Wav2Vec2ForCTC.from_pretrained(export, vocab_size=12, output_loading_info=True)
        assert set(report["missing_keys"]) == {"lm_head.weight", "lm_head.bias"}

    def test_hidden_states_codes_and_loss_are_equal(self, family: tuple[Config, Path, Path]) -> None:
        config, checkpoint, export = family
        # Transformers' GroupNorm counts padding; ours does not.
        sizes = (5000, 5000) if config.model.conv_norm == "group" else (5000, 3777)
        inputs = inputs_of(build_objective(config), waveforms(config, sizes), seed=1)
        seen = encode(load_model(config, checkpoint), inputs)
        other = transformers.Wav2Vec2ForPreTraining.from_pretrained(export).eval()
        attention_mask = (torch.arange(inputs.audio.waveforms_BS.shape[1]) < inputs.audio.lengths_B.unsqueeze(1)).long()
        with torch.no_grad():
            theirs = other(
                inputs.audio.waveforms_BS,
                attention_mask=attention_mask if inputs.audio.padded else None,
                mask_time_indices=inputs.audio.mask_BT,
                sampled_negative_indices=flat_negatives(inputs),
                output_hidden_states=True,
            )
        valid_BT = torch.arange(inputs.audio.mask_BT.shape[1]) < inputs.audio.frames_B.unsqueeze(1)
        for mine, hidden in zip(seen["encoded"].hidden, theirs.hidden_states, strict=True):
            assert_equal(mine[valid_BT], hidden[valid_BT])
        assert_equal(seen["sums"].contrastive, theirs.contrastive_loss)
        # Ours adds the diversity of the mean softmax, theirs of the mean choice.
        assert seen["sums"].masked == inputs.audio.mask_BT.sum()

    def test_a_processor_loads_and_treats_audio_as_training_did(self, family: tuple[Config, Path, Path]) -> None:
        config, _, export = family
        audio = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 3 + 1
        for kind in (transformers.AutoProcessor, transformers.AutoFeatureExtractor):
            processor = kind.from_pretrained(export)
            (found,) = processor(audio, sampling_rate=16_000, return_tensors="np")["input_values"]
            wanted = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7) if config.model.normalize_waveform else audio
            assert found == pytest.approx(wanted, abs=1e-5)

    def test_the_card_says_what_the_run_was(self, family: tuple[Config, Path, Path]) -> None:
        _, _, export = family
        card = (export / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        for row in ("| updates | 700 |", "| hours seen | 25.0 |", "| training data | cuts_train.jsonl (960.0 hours) |"):
            assert row in card
        assert "| started from | random weights |" in card
        assert "# wav2vec 2.0, pretrained with w2vscale" in card and "contrastive prediction of masked speech" in card
        assert "(`quantizer`, `project_hid`, `project_q`), use `Wav2Vec2ForPreTraining`" in card

    def test_the_card_has_the_last_validation_before_the_checkpoint(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        config, checkpoint, _ = family
        named = config.model_copy(update={"data": config.data.model_copy(update={"train": [Path("a|b.jsonl")]})})
        run = tmp_path / "run"
        original = open_checkpoint(checkpoint)
        save_model(run, named, whole(original.model_tensors()), original.state)
        codes = ("used_entries", "code_perplexity")
        metrics = dict.fromkeys(("contrastive", "contrastive_bits", "diversity", "masked_frames"), 5.0)
        metrics |= {f"{key}_{one}": 7.0 for key in codes for one in range(2)}
        lines = [
            json.dumps({"split": "validation", "update": update, "accuracy": update / 1000, **metrics})
            for update in (600, 700, 800)
        ]
        (run / "metrics.jsonl").write_text("\n".join([*lines, '{"update": 900, "spl']))
        export_checkpoint(run, tmp_path / "out", form="huggingface")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| validation contrastive accuracy | 0.7000 |" in card
        assert "| validation contrastive loss | 5.0000 nats = 5.0000 bits |" in card
        assert "| training data | a&#124;b.jsonl (960.0 hours) |" in card

    def test_the_card_leaves_out_a_validation_with_missing_metrics(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        config, checkpoint, _ = family
        original = open_checkpoint(checkpoint)
        save_model(tmp_path, config, whole(original.model_tensors()), original.state)
        line = {"split": "validation", "update": 700, "accuracy": 0.7, "contrastive": None}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        export_checkpoint(tmp_path, tmp_path / "out", form="huggingface")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| updates | 700 |" in card and "validation" not in card

    def test_an_imported_models_card_claims_no_training(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        _, _, export = family
        import_checkpoint(export, tmp_path / "in", form="huggingface")
        export_checkpoint(tmp_path / "in", tmp_path / "out", form="huggingface")
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"| origin | imported from {export.name} (huggingface) |" in card
        assert "converted with w2vscale" in card
        assert "updates" not in card and "learning rate" not in card

    def test_a_full_disk_is_one_line_and_leaves_nothing(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        _, checkpoint, _ = family
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            with pytest.raises(UserError, match=r"out: cannot be written: ") as caught:
                export_checkpoint(checkpoint, tmp_path / "out", form="huggingface")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_in_again_and_out_again_is_bit_identical(self, family: tuple[Config, Path, Path], tmp_path: Path) -> None:
        config, checkpoint, export = family
        imported = import_checkpoint(export, tmp_path / "in", form="huggingface")
        before, after = (whole(open_checkpoint(path).model_tensors()) for path in (checkpoint, imported.checkpoint))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        again = load_config(imported.checkpoint / "config.yaml")
        assert (again.model, again.regularization) == (config.model, config.regularization)
        assert build_objective(again).settings == build_objective(config).settings
        export_checkpoint(tmp_path / "in", tmp_path / "out", form="huggingface")
        one, other = (load_file(folder / "model.safetensors") for folder in (export, tmp_path / "out"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    def test_what_transformers_saved_comes_in_and_goes_out_bit_identical(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        _, _, export = family
        torch.manual_seed(3)
        model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config.from_pretrained(export))
        model.save_pretrained(tmp_path / "theirs")
        import_checkpoint(tmp_path / "theirs", tmp_path / "in", form="huggingface")
        export_checkpoint(tmp_path / "in", tmp_path / "out", form="huggingface")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())

    def test_files_of_torch_save_and_names_of_the_older_weight_norm_come_in(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        _, checkpoint, export = family
        state = load_file(export / "model.safetensors")
        prefix = "wav2vec2.encoder.pos_conv_embed.conv"
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            state[f"{prefix}.{old}"] = state.pop(f"{prefix}.parametrizations.weight.{new}")
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text((export / "config.json").read_text())
        imported = import_checkpoint(tmp_path, tmp_path / "in", form="huggingface")
        before, after = (whole(open_checkpoint(path).model_tensors()) for path in (checkpoint, imported.checkpoint))
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_torchaudios_features_are_equal_with_lengths(
    family: tuple[Config, Path, Path], torchaudio: ModuleType, tmp_path: Path
) -> None:
    config, checkpoint, _ = family
    export_checkpoint(checkpoint, tmp_path, form="torchaudio")
    arguments = json.loads((tmp_path / "model.json").read_text())
    model = torchaudio.models.wav2vec2_model(**arguments).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    sizes = (5000, 5000) if config.model.conv_norm == "group" else (5000, 3777)
    inputs = inputs_of(build_objective(config), waveforms(config, sizes), seed=1)
    with torch.no_grad():
        mine = load_model(config, checkpoint).encoder(inputs.audio.waveforms_BS, inputs.audio.lengths)
        theirs, lengths = model.extract_features(inputs.audio.waveforms_BS, inputs.audio.lengths_B)
    assert lengths.tolist() == inputs.audio.frames_B.tolist()
    valid_BT = torch.arange(inputs.audio.mask_BT.shape[1]) < inputs.audio.frames_B.unsqueeze(1)
    assert len(theirs) == config.model.layers
    for number, hidden in enumerate(theirs, start=1):
        assert_equal(mine.hidden[number][valid_BT], hidden[valid_BT])


def test_the_command_line(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    _, checkpoint, _ = family
    run = CliRunner()
    for arguments in (
        ["export", str(checkpoint), str(tmp_path / "hf")],
        ["import", str(tmp_path / "hf"), str(tmp_path / "in"), "--format", "huggingface"],
        ["export", str(tmp_path / "in"), str(tmp_path / "ta"), "--format", "torchaudio"],
    ):
        result = run.invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert "update_00000000" in run.invoke(app, ["checkpoint", "show", str(tmp_path / "in")]).output
