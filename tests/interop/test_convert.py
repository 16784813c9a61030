"""Models out to Transformers and torchaudio, and in again: every tensor, every hidden state, and the loss."""

from __future__ import annotations

import json
import pickle
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

from tests.helpers.audio import SmallCorpus
from tests.helpers.continued import flat_negatives, transformers_loss
from tests.helpers.micro import MICRO_RUN, SMALL
from w2vscale.analysis.report import read_metrics
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.cli.app import app
from w2vscale.config import Config, dump_config, load_config
from w2vscale.data.micro_batch import make_inputs
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.importing import import_checkpoint
from w2vscale.models.wav2vec2 import Wav2Vec2ForPretraining
from w2vscale.optim.canonical import specs_of
from w2vscale.training.loop import train
from w2vscale.training.run import open_training_set

transformers = pytest.importorskip("transformers")

FAMILIES = ("base", "large", "large_lv60", "xlsr_300m")


def saved(folder: Path, config: Config, state: dict[str, Tensor]) -> Path:
    """A checkpoint of these weights."""
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    store = CheckpointStore(folder / "checkpoints", Ranks(), expected=specs_of(tensors))
    return store.save(tensors, TrainState(update=700, audio_seconds=90_000.0, data="960.0 hours"), dump_config(config))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    """A preset's small sibling with random weights: its settings, its checkpoint, and its export to Transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    config = load_config(request.param, [*SMALL, "data.train=cuts_train.jsonl"])
    torch.manual_seed(11)
    model = Wav2Vec2ForPretraining(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no bias zero, no scale one: each has to arrive in its place
                parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint = saved(folder, config, model.state_dict())
    export_checkpoint(checkpoint, folder / "export", form="huggingface")
    return config, checkpoint, folder / "export"


def waveforms(config: Config, sizes: tuple[int, ...]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    draws = np.random.default_rng(5)
    audio = [draws.standard_normal(size, dtype=np.float32) for size in sizes]
    if config.model.normalize_waveform:
        audio = [(one - one.mean()) / np.sqrt(one.var() + 1e-7) for one in audio]
    return audio


def ours(config: Config, checkpoint: Path) -> Wav2Vec2ForPretraining:
    model = Wav2Vec2ForPretraining(config.model, torch.float32)
    model.load_state_dict(open_checkpoint(checkpoint).model_tensors())
    return model.eval()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def encode(model: Wav2Vec2ForPretraining, inputs: Any) -> Any:
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
        inputs = make_inputs(waveforms(config, sizes), range(2), number=0, seed=1, config=config.model)
        seen = encode(ours(config, checkpoint), inputs)
        other = transformers.Wav2Vec2ForPreTraining.from_pretrained(export).eval()
        attention_mask = (torch.arange(inputs.waveforms_BS.shape[1]) < inputs.lengths_B.unsqueeze(1)).long()
        with torch.no_grad():
            theirs = other(
                inputs.waveforms_BS,
                attention_mask=attention_mask if inputs.padded else None,
                mask_time_indices=inputs.mask_BT,
                sampled_negative_indices=flat_negatives(inputs),
                output_hidden_states=True,
            )
        valid_BT = torch.arange(inputs.mask_BT.shape[1]) < inputs.frames_B.unsqueeze(1)
        for mine, hidden in zip(seen["encoded"].hidden, theirs.hidden_states, strict=True):
            assert_equal(mine[valid_BT], hidden[valid_BT])
        assert_equal(seen["sums"].contrastive, theirs.contrastive_loss)
        # Ours adds the diversity of the mean softmax, theirs of the mean choice.
        assert seen["sums"].masked == inputs.mask_BT.sum()

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

    def test_the_card_has_the_last_validation_before_the_checkpoint(
        self, family: tuple[Config, Path, Path], tmp_path: Path
    ) -> None:
        config, checkpoint, _ = family
        named = config.model_copy(update={"data": config.data.model_copy(update={"train": [Path("a|b.jsonl")]})})
        run = tmp_path / "run"
        saved(run, named, open_checkpoint(checkpoint).model_tensors())
        lines = [
            json.dumps({"split": "validation", "update": update, "accuracy": update / 1000, "contrastive_bits": 5.0})
            for update in (600, 700, 800)
        ]
        (run / "metrics.jsonl").write_text("\n".join([*lines, '{"update": 900, "spl']))
        export_checkpoint(run, tmp_path / "out", form="huggingface")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| validation accuracy | 0.7 |" in card and "| validation contrastive bits | 5 |" in card
        assert "| training data | a&#124;b.jsonl (960.0 hours) |" in card

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
        assert not list((tmp_path / "out").iterdir())

    def test_in_again_and_out_again_is_bit_identical(self, family: tuple[Config, Path, Path], tmp_path: Path) -> None:
        config, checkpoint, export = family
        imported = import_checkpoint(export, tmp_path / "in", form="huggingface")
        before, after = (open_checkpoint(path).model_tensors() for path in (checkpoint, imported.checkpoint))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        model = load_config(imported.checkpoint / "config.yaml").model
        for key in ("conv_layers", "norm_first", "heads", "normalize_waveform", "codebook_entries", "layerdrop"):
            assert getattr(model, key) == getattr(config.model, key), key
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
        before, after = (open_checkpoint(path).model_tensors() for path in (checkpoint, imported.checkpoint))
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
    inputs = make_inputs(waveforms(config, sizes), range(2), number=0, seed=1, config=config.model)
    lengths = (inputs.lengths_B, inputs.frames_B) if inputs.padded else (None, None)
    with torch.no_grad():
        mine = ours(config, checkpoint).encoder(inputs.waveforms_BS, *lengths)
        theirs, lengths = model.extract_features(inputs.waveforms_BS, inputs.lengths_B)
    assert lengths.tolist() == inputs.frames_B.tolist()
    valid_BT = torch.arange(inputs.mask_BT.shape[1]) < inputs.frames_B.unsqueeze(1)
    assert len(theirs) == config.model.layers
    for number, hidden in enumerate(theirs, start=1):
        assert_equal(mine.hidden[number][valid_BT], hidden[valid_BT])


class TestRefused:
    def source(self, family: tuple[Config, Path, Path], folder: Path, **changes: object) -> Path:
        _, _, export = family
        folder.mkdir()
        document = {**json.loads((export / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(document))
        (folder / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes())
        return folder

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "hubert"}, r"model_type='hubert': only wav2vec2 can be imported"),
            ({"hidden_act": "relu"}, r"hidden_act='relu': w2vscale supports only 'gelu'"),
            ({"add_adapter": True}, r"add_adapter=true: w2vscale has no adapters"),
            ({"num_codevectors_per_group": 21}, r"model\.codebook_entries=21"),
            ({"num_hidden_layers": 4}, r"layers\.3\.\S+ is missing"),
            ({"num_attention_heads": 7}, r"heads=7 does not divide dim=48"),
        ],
    )
    def test_what_w2vscale_does_not_have(
        self, family: tuple[Config, Path, Path], tmp_path: Path, change: dict[str, object], message: str
    ) -> None:
        with pytest.raises(UserError, match=message) as caught:
            import_checkpoint(self.source(family, tmp_path / "s", **change), tmp_path / "in", form="huggingface")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "in").exists()

    def test_a_malicious_pickle_does_not_run(self, family: tuple[Config, Path, Path], tmp_path: Path) -> None:
        source = self.source(family, tmp_path / "s")
        (source / "model.safetensors").unlink()
        marker = tmp_path / "ran"
        with (source / "pytorch_model.bin").open("wb") as file:
            pickle.dump(_Touch(str(marker)), file)
        with pytest.raises(UserError, match="is refused") as caught:
            import_checkpoint(source, tmp_path / "in", form="huggingface")
        assert "\n" not in str(caught.value)
        torch.save({"weight": _Touch(str(marker))}, source / "pytorch_model.bin")
        with pytest.raises(UserError, match="is refused"):
            import_checkpoint(source, tmp_path / "in", form="huggingface")
        assert not marker.exists()

    def test_missing_and_existing_files(self, family: tuple[Config, Path, Path], tmp_path: Path) -> None:
        _, checkpoint, export = family
        with pytest.raises(UserError, match="no such folder"):
            import_checkpoint(tmp_path / "none", tmp_path / "in", form="huggingface")
        with pytest.raises(UserError, match=r"no config\.json in it"):
            import_checkpoint(tmp_path, tmp_path / "in", form="huggingface")
        with pytest.raises(UserError, match=r"model\.safetensors: exists; choose another folder"):
            export_checkpoint(checkpoint, export, form="huggingface")
        with pytest.raises(UserError, match="--format onnx: choose one of huggingface, torchaudio"):
            export_checkpoint(checkpoint, tmp_path / "x", form="onnx")
        with pytest.raises(UserError, match="--format espnet: choose one of huggingface, fairseq"):
            import_checkpoint(export, tmp_path / "x", form="espnet")


class _Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


class TestStartingFromACheckpoint:
    """Continued pretraining: trainer.init_from."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("source")
        config = load_config("base", MICRO_RUN)
        torch.manual_seed(2)
        saved(folder, config, Wav2Vec2ForPretraining(config.model).state_dict())
        return folder

    def settings(self, corpus: SmallCorpus, source: Path, *overrides: str) -> Config:
        return load_config(
            "base", [*MICRO_RUN, f"data.train={corpus.train}", f"trainer.init_from={source}", *overrides]
        )

    @pytest.mark.parametrize("engine", ["engine.name=ddp", "engine={name: deepspeed, deepspeed_config: zero2}"])
    def test_the_first_loss_is_transformers_loss_of_the_same_batch(
        self, small_corpus: SmallCorpus, source: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if "deepspeed" in engine:
            pytest.importorskip("deepspeed")
        config = self.settings(
            small_corpus, source, "trainer.updates=1", "schedule.warmup_updates=1", "regularization.layerdrop=0",
            "regularization.dropout=0", "regularization.attention_dropout=0", "regularization.input_dropout=0", "objective.feature_dropout=0",
            "data.min_seconds=2.0", engine,
        )  # fmt: skip
        assert train(config, tmp_path / "exp") == 0
        (record,) = read_metrics(tmp_path / "exp" / "metrics.jsonl", "train")
        export_checkpoint(source, tmp_path / "hf", form="huggingface")
        (window,) = open_training_set(config).windows(range(1), rank=0, world_size=1)
        theirs = transformers_loss(tmp_path / "hf", window, config)
        mine = record["contrastive"] + config.objective.diversity_weight * record["diversity"]
        assert mine == pytest.approx(theirs, rel=1e-5)
        said = " ".join(capsys.readouterr().out.split())
        assert "tensors of taken missing other shape not used" in said
        assert "encoder.feature_encoder 9 0 0 0" in said and "quantizer 3 0 0 0" in said

    def test_other_shapes_and_settings_are_errors_unless_named(
        self, small_corpus: SmallCorpus, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for override, name in (
            ("model.ffn_dim=32", "model.ffn_dim is 64 there and 32 here"),
            ("model.heads=2", "model.heads is 4 there and 2 here"),
            ("model.normalize_waveform=true", "model.normalize_waveform is False there and True here"),
        ):
            with pytest.raises(UserError, match=f"{name};.* if that is meant, name it in trainer.init_allow"):
                train(self.settings(small_corpus, source, override), tmp_path / "no")
        allowed = self.settings(
            small_corpus, source, "objective.codebook_entries=12", "trainer.updates=1", "schedule.warmup_updates=1",
            "trainer.init_allow=[codebook_entries,quantizer,nosuch]",
        )  # fmt: skip
        capsys.readouterr()
        assert train(allowed, tmp_path / "exp") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "quantizer 0 0 3 0" in said
        assert "warning: trainer.init_allow: nosuch matches nothing" in said
        assert "drawn anew: quantizer.codevectors is [2, 16, 8] there and [2, 12, 8] here" in said
        with pytest.raises(UserError, match=r"quantizer\.\S+ is \[.*\] there and \[.*\] here"):
            train(
                self.settings(
                    small_corpus, source, "objective.codebook_entries=12", "trainer.init_allow=[codebook_entries]"
                ),
                tmp_path / "other",
            )

    def test_a_run_that_was_begun_continues_instead(
        self, small_corpus: SmallCorpus, source: Path, tmp_path: Path
    ) -> None:
        first = ("trainer.updates=2", "schedule.warmup_updates=1")
        train(self.settings(small_corpus, source, *first), tmp_path)
        before = open_checkpoint(tmp_path).model_tensors()
        train(self.settings(small_corpus, tmp_path / "gone", *first), tmp_path)
        assert all(torch.equal(before[n], t) for n, t in open_checkpoint(tmp_path).model_tensors().items())

    def test_an_import_is_no_run_to_continue(self, small_corpus: SmallCorpus, source: Path) -> None:
        config = load_config("base", [*MICRO_RUN, f"data.train={small_corpus.train}"])
        with pytest.raises(
            UserError, match=r"from its 1 checkpoint; start one .* trainer\.init_from=.*, in another --exp"
        ):
            train(config, source)


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
