"""Fine-tuned models out to Transformers and torchaudio, and in again: equal logits, loss and text."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.audio import write_audio
from tests.helpers.batches import inputs_of
from tests.helpers.exported import FAMILIES, load_model, random_model, save_model
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import Config, load_config
from w2vscale.data.transcripts import Transcripts, labels_to_text
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.inference.transcription import Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.importing import import_checkpoint
from w2vscale.objectives import build_objective, resolve
from w2vscale.training.warm_start import fine_tuning_config, open_source

transformers = pytest.importorskip("transformers")


ENCODER = tuple(setting for setting in SMALL if setting.startswith("model."))
CTC = ("objective.name=ctc", "precision.compute=fp32")
FROZEN = ("regularization.feature_grad_mult=0", "objective.freeze_encoder_updates=5", "optim.weight_decay=0")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    """A preset's small sibling with random weights: its settings, its checkpoint, and its export to Transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    config, _ = resolve(
        load_config(
            request.param, [*ENCODER, *FROZEN, *CTC, "objective.vocabulary=letters", "trainer.init_from=exp/base"]
        )
    )
    checkpoint = save_model(folder, config, random_model(config, seed=3).state_dict(), TrainState(update=7))
    export_checkpoint(checkpoint, folder / "export", form="huggingface")
    return config, checkpoint, folder / "export"


def speech(sizes: tuple[int, ...], *, normalised: bool) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    audio = [np.random.default_rng(size).standard_normal(size).astype(np.float32) for size in sizes]
    return [(one - one.mean()) / np.sqrt(one.var() + 1e-7) for one in audio] if normalised else audio


def test_logits_and_loss_are_transformers(family: tuple[Config, Path, Path]) -> None:
    config, checkpoint, export = family
    other, report = transformers.Wav2Vec2ForCTC.from_pretrained(export, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # Transformers' GroupNorm counts padding; ours does not.
    sizes = (8000, 8000) if config.model.conv_norm == "group" else (8000, 6100)
    audio, labels = speech(sizes, normalised=config.model.normalize_waveform), [[5, 6, 6, 4, 7], [8, 9]]
    inputs = inputs_of(build_objective(config), audio, labels)
    attention = (torch.arange(8000) < inputs.audio.lengths_B.unsqueeze(1)).long() if inputs.audio.padded else None
    padded_labels = torch.tensor([labels[0], [*labels[1], -100, -100, -100]])
    with torch.no_grad():
        theirs = other.eval()(inputs.audio.waveforms_BS, attention_mask=attention, labels=padded_labels)
        model = load_model(config, checkpoint)
        logits, sums = model.logits(inputs.audio.waveforms_BS, inputs.audio.lengths), model(inputs)
    valid_BT = torch.arange(logits.shape[1]) < inputs.audio.frames_B.unsqueeze(1)
    difference = (logits - theirs.logits)[valid_BT].abs().max()
    assert difference <= 1e-5 * theirs.logits[valid_BT].abs().max()
    assert float(sums.total) == pytest.approx(float(theirs.loss), rel=1e-5)


def test_the_processor_loads_and_writes_the_same_text(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    config, checkpoint, export = family
    (audio,) = speech((16_000,), normalised=False)
    path = write_audio(tmp_path / "speech.wav", 0.1 * audio, subtype="FLOAT")
    processor = transformers.AutoProcessor.from_pretrained(export)
    other = transformers.Wav2Vec2ForCTC.from_pretrained(export).eval()
    inputs = processor(0.1 * audio, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        labels = other(inputs.input_values).logits.argmax(dim=-1)
    (found,) = transcribe(load(checkpoint), find_utterances([path]))
    assert isinstance(found, Transcript) and len(found.text) > 5
    theirs = processor.batch_decode(labels)[0]
    assert found.text == theirs.strip()
    assert processor.tokenizer("IT'S").input_ids == [config.objective.vocabulary.index(letter) for letter in "IT'S"]


def test_transcribe_and_the_pipeline_of_transformers_agree_on_special_symbols(tmp_path: Path) -> None:
    config, _ = resolve(load_config("base", [*ENCODER, *CTC, "objective.vocabulary=letters"]))
    state = random_model(config, seed=3).state_dict()
    letters = [config.objective.vocabulary.index(symbol) for symbol in ("<s>", "</s>", "<unk>", "|", "E", "T")]
    state["head.weight"] *= 20.0
    state["head.bias"].fill_(-1000.0)
    state["head.bias"][letters] = 0.0
    checkpoint = save_model(tmp_path, config, state, TrainState(update=1))
    export_checkpoint(checkpoint, tmp_path / "out", form="huggingface")
    (audio,) = speech((16_000,), normalised=False)
    path = write_audio(tmp_path / "speech.wav", 0.1 * audio, subtype="FLOAT")
    (found,) = transcribe(load(checkpoint), find_utterances([path]))
    pipeline = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path / "out"), device="cpu")
    theirs = pipeline(0.1 * audio)["text"]
    assert isinstance(found, Transcript) and found.text == " ".join(theirs.split())
    assert "<s>" in theirs and "</s>" in theirs and "<unk>" in theirs


def test_sentence_pieces_are_written_with_spaces_and_come_in_again(tmp_path: Path) -> None:
    symbols = ["<pad>", "<unk>", "<s>", "</s>", "▁", "▁THE", "▁C", "AT", "A", "'"]
    config = load_config("base", [*ENCODER, *CTC, f"objective.vocabulary={json.dumps(symbols)}"])
    checkpoint = save_model(tmp_path, config, random_model(config, seed=3).state_dict(), TrainState(update=1))
    export_checkpoint(checkpoint, tmp_path / "out", form="huggingface")
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    labels = [5, 6, 7, 4, 9, 8, 8, 5, 1]
    frames = [frame for label in labels for frame in (label, label, 0)]
    assert tokenizer.decode(frames) == labels_to_text(labels, symbols) == "THE CAT 'AA THE<unk>"
    assert "but not text to labels" in (tmp_path / "out" / "README.md").read_text()
    imported = import_checkpoint(tmp_path / "out", tmp_path / "in", form="huggingface")
    assert load_config(imported.checkpoint / "config.yaml").objective.vocabulary == symbols


def exported(folder: Path, symbols: list[str], **settings: str) -> Path:
    overrides = [f"objective.vocabulary={json.dumps(symbols)}", *(f"objective.{k}={v}" for k, v in settings.items())]
    config, _ = resolve(load_config("base", [*ENCODER, *CTC, *overrides]))
    checkpoint = save_model(folder, config, random_model(config, seed=3).state_dict(), TrainState(update=1))
    export_checkpoint(checkpoint, folder / "out", form="huggingface")
    return folder / "out"


def in_again(export: Path, folder: Path) -> tuple[list[str], str]:
    """The vocabulary, and how texts are split, of an imported export."""
    settings = load_config(import_checkpoint(export, folder, form="huggingface").checkpoint / "config.yaml").objective
    return settings.vocabulary, settings.split


def test_the_names_of_blank_and_unknown_symbol_are_the_tokenizers(tmp_path: Path) -> None:
    symbols = ["[PAD]", "[UNK]", "|", *"abc"]
    export = exported(tmp_path, symbols)
    tokenizer = transformers.AutoProcessor.from_pretrained(export).tokenizer
    assert (tokenizer.pad_token, tokenizer.unk_token, len(tokenizer)) == ("[PAD]", "[UNK]", 6)
    labels, unknown = Transcripts(symbols).labels("ab ca!")
    assert tokenizer("ab ca!").input_ids == labels and unknown == "!"
    assert tokenizer.decode(labels) == labels_to_text(labels, symbols) == "ab ca[UNK]"
    assert in_again(export, tmp_path / "in") == (symbols, "longest")


def test_phones_have_the_tokenizer_of_phonemes(tmp_path: Path) -> None:
    symbols = ["<pad>", "<unk>", "hh", "ah", "l"]
    export = exported(tmp_path, symbols)
    tokenizer = transformers.AutoProcessor.from_pretrained(export).tokenizer
    labels, _ = Transcripts(symbols).labels("hh ah l l zh")
    assert tokenizer("hh ah l l zh").input_ids == labels == [2, 3, 4, 4, 1]
    frames = [frame for label in labels for frame in (label, label, 0)]
    assert tokenizer.decode(frames) == labels_to_text(labels, symbols, spaced=True) == "hh ah l l <unk>"
    assert "not text to labels" not in (export / "README.md").read_text()
    assert in_again(export, tmp_path / "in") == (symbols, "spaces")
    (audio,) = speech((16_000,), normalised=False)
    (found,) = transcribe(
        load(tmp_path), find_utterances([write_audio(tmp_path / "a.wav", 0.1 * audio, subtype="FLOAT")])
    )
    pipeline = transformers.pipeline("automatic-speech-recognition", model=str(export), device="cpu")
    assert isinstance(found, Transcript) and found.text == pipeline(0.1 * audio)["text"]


def test_symbols_of_several_letters_are_decoded_and_the_card_says_that_they_are_not_encoded(tmp_path: Path) -> None:
    symbols = ["<pad>", "<unk>", "|", *"schai", "sch", "ɔ̃"]
    export = exported(tmp_path, symbols)
    tokenizer = transformers.AutoProcessor.from_pretrained(export).tokenizer
    text = "ich schɔ̃ sach"
    labels, _ = Transcripts(symbols).labels(text)
    frames = [frame for label in labels for frame in (label, 0)]
    assert tokenizer.decode(frames) == labels_to_text(labels, symbols) == text
    assert "but not text to labels. In text, it would lose the spaces" in (export / "README.md").read_text()
    assert in_again(export, tmp_path / "in") == (symbols, "longest")


def test_a_split_that_the_symbols_do_not_show_comes_in_again(tmp_path: Path) -> None:
    for split in ("longest", "spaces"):
        symbols = ["<pad>", "<unk>", "|", "a", "b", "ab"] if split == "spaces" else ["<pad>", "<unk>", "|", "sil", "a"]
        export = exported(tmp_path / split, symbols, split=split)
        assert in_again(export, tmp_path / split / "in") == (symbols, split)


def test_in_again_is_bit_identical(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    config, checkpoint, export = family
    imported = import_checkpoint(export, tmp_path / "in", form="huggingface")
    before, after = (whole(open_checkpoint(path).model_tensors()) for path in (checkpoint, imported.checkpoint))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = load_config(imported.checkpoint / "config.yaml")
    assert (again.model, again.regularization) == (config.model, config.regularization)
    settings = build_objective(config).settings
    assert build_objective(again).settings == settings.model_copy(update={"freeze_encoder_updates": 0})


def test_a_run_starts_from_the_folder_as_from_the_checkpoint(family: tuple[Config, Path, Path]) -> None:
    config, checkpoint, export = family
    one, other = open_source(checkpoint), open_source(export)
    assert one.config.model == other.config.model == config.model
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor.whole(), other.tensors[name].whole()) for name, tensor in one.tensors.items())
    settings = load_config("ctc_1h", [f"trainer.init_from={export}"])
    assert fine_tuning_config(settings).model.conv_layers == config.model.conv_layers


def test_a_model_that_transformers_saved_comes_in(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    _, _, export = family
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config.from_pretrained(export))
    model.save_pretrained(tmp_path / "theirs")
    transformers.AutoProcessor.from_pretrained(export).save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "in", form="huggingface")
    export_checkpoint(tmp_path / "in", tmp_path / "out", form="huggingface")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_torchaudios_logits_are_equal(
    family: tuple[Config, Path, Path], torchaudio: ModuleType, tmp_path: Path
) -> None:
    config, checkpoint, _ = family
    export_checkpoint(checkpoint, tmp_path, form="torchaudio")
    model = torchaudio.models.wav2vec2_model(**json.loads((tmp_path / "model.json").read_text())).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    (audio,) = speech((9000,), normalised=config.model.normalize_waveform)
    waveform_1S = torch.from_numpy(audio).unsqueeze(0)
    with torch.no_grad():
        theirs, _ = model(waveform_1S)
        mine = load_model(config, checkpoint).logits(waveform_1S)
    assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_the_card_says_how_to_write_with_it(family: tuple[Config, Path, Path]) -> None:
    _, _, export = family
    card = (export / "README.md").read_text()
    assert "# wav2vec 2.0, fine-tuned with w2vscale" in card and "Wav2Vec2ForCTC.from_pretrained" in card
    assert "no output layer" not in card and "but not text to labels" not in card
    assert "connectionist temporal classification" in card and "contrastive" not in card
    assert "| objective | ctc |" in card and "| started from | exp/base |" in card


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"<pad>": 0, "a": 1}, "vocab.json: does not name the 32 symbols"),
        ({f"{n}": n + 1 for n in range(32)}, "vocab.json: does not name the 32 symbols"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_named(
    family: tuple[Config, Path, Path], tmp_path: Path, vocabulary: dict[str, int], message: str
) -> None:
    _, _, export = family
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path, tmp_path / "in", form="huggingface")
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"no vocab\.json in it"):
        import_checkpoint(tmp_path, tmp_path / "in", form="huggingface")
