"""Models of fairseq2 have the same features, logits and tensors here, and go back to it unchanged."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus
from tests.helpers.character_model import TEXTS, train_characters
from tests.helpers.exported import FAMILIES, random_model, save_model
from tests.helpers.fairseq import BASE, LARGE, LARGE_LV60, SMALL, Reference, Shape, fairseq_state
from tests.helpers.fairseq2 import fairseq2_ctc_state, fairseq2_state, our_settings, save_fairseq2
from tests.helpers.micro import MICRO_RUN
from tests.helpers.micro import SMALL as SMALL_PRESET
from tests.helpers.tiers import long_except
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.lock import locked
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.data.transcripts import Transcripts, labels_to_text
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.interop import exporting, importing
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.fairseq2 import from_fairseq2
from w2vscale.interop.fairseq_file import FairseqCheckpoint, load_fairseq
from w2vscale.interop.importing import import_checkpoint, read_model
from w2vscale.objectives import build_objective, resolve
from w2vscale.training.train import train

sentencepiece = pytest.importorskip("sentencepiece")

FULL_3B = Shape(BASE.convolutions, True, 60, 2048, 8192, 1024, 1024)
PUBLISHED = {
    "base": (BASE, "base"),
    "large": (LARGE, "large"),
    "large_lv60k": (LARGE_LV60, "large_lv60"),
    "1b": (Shape(BASE.convolutions, True, 48, 1280, 5120, 1024, 1024), "xlsr_1b"),
    "2b": (Shape(BASE.convolutions, True, 48, 1920, 7680, 1024, 1024), "xlsr_2b"),
    "3b": (FULL_3B, "omni_3b"),
    "5b": (Shape(BASE.convolutions, True, 96, 2048, 8192, 1024, 1024), "omni_7b"),
    "7b": (Shape(BASE.convolutions, True, 128, 2048, 8192, 1024, 1024), "omni_7b"),
}
"""Architectures in fairseq2's models/wav2vec2/config.py by their names, and our presets with all other settings."""


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def shape(request: pytest.FixtureRequest) -> Shape:
    torch.manual_seed(7)
    return request.param


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_characters(tmp_path_factory.mktemp("pieces") / "omniASR_tokenizer.model")


def pieces_of(tokenizer: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return model.id_to_piece(list(range(len(model))))


def model_of(folder: Path) -> Any:
    """The model of an import, in fp32."""
    return load(folder, device="cpu").model


def stored(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


# pretrained models ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_hidden_state_is_that_of_the_same_model_in_fairseq(shape: Shape, tmp_path: Path) -> None:
    fairseq = fairseq_state(shape)
    path = save_fairseq2(tmp_path / "m.pt", fairseq2_state(fairseq, shape), w2vscale=our_settings(shape))
    import_checkpoint(path, tmp_path / "in")
    model = model_of(tmp_path / "in")
    reference, waveform = Reference(fairseq, shape, 4), torch.randn(3000)
    encoded = model.encoder(waveform.unsqueeze(0))
    for our_BTD, their_TD in zip([*encoded.hidden, encoded.context_BTD], reference.encode(waveform), strict=True):
        assert_close(our_BTD[0], their_TD)
    quantized = model.quantizer(encoded.normalised_BTC[0], None, 1.0).vectors_MD
    vectors_TD = reference.quantize(waveform)
    assert_close(model.target_projection(quantized), reference.affine("project_q", vectors_TD))
    context_TP = reference.affine("final_proj", reference.encode(waveform)[-1])
    assert_close(model.context_projection(encoded.context_BTD[0]), context_TP)
    assert torch.equal(model.encoder.mask_embedding, fairseq["mask_emb"])


@pytest.mark.parametrize("name", long_except({"base", "large_lv60k", "1b"}, PUBLISHED))
def test_published_sizes_have_the_settings_of_their_presets(name: str, tokenizer: Path) -> None:
    published, preset = PUBLISHED[name]
    expected = load_config(preset)
    assert expected.model.layers == published.layers or name == "5b"
    with torch.device("meta"):
        fairseq = fairseq_state(published)
        state = fairseq2_state(fairseq, published)
        ctc = fairseq2_ctc_state(fairseq, published, len(pieces_of(tokenizer)))
    config, tensors = from_fairseq2(FairseqCheckpoint(Path("full.pt"), state, {}))
    assert config.model == expected.model.model_copy(update={"waveform_eps": 1e-5, "layers": published.layers})
    assert config.regularization == expected.regularization
    assert build_objective(config).settings == build_objective(expected).settings
    with torch.device("meta"):
        model = build_objective(config).build_model()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    config, _ = from_fairseq2(FairseqCheckpoint(Path("full.pt"), ctc, {}), tokenizer)
    assert (config.model.heads, config.objective.name) == (expected.model.heads, "ctc")


def test_names_of_wrappers_and_of_the_newer_weight_norm_and_bare_states_are_understood(tmp_path: Path) -> None:
    shape = SMALL["large_lv60"]
    state, settings = fairseq2_state(fairseq_state(shape), shape), our_settings(shape)
    _, expected = from_fairseq2(FairseqCheckpoint(tmp_path, state, {}, settings))
    conv = "encoder_frontend.pos_encoder.conv"
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"{conv}.parametrizations.weight.{new}"] = state.pop(f"{conv}.{old}")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    _, found = from_fairseq2(FairseqCheckpoint(tmp_path, wrapped, {}, settings))
    assert_same(whole(found), whole(expected))
    torch.save(state, tmp_path / "bare.pt")
    assert load_fairseq(tmp_path / "bare.pt").state.keys() == state.keys()


def test_any_rows_of_a_tensor_are_read_alone(shape: Shape, tmp_path: Path) -> None:
    """As a rank that holds a shard does."""
    path = save_fairseq2(tmp_path / "m.pt", fairseq2_state(fairseq_state(shape), shape), w2vscale=our_settings(shape))
    _, tensors = read_model(path, "fairseq2")
    for name, tensor in tensors.items():
        rows = tensor.whole()
        for first, last in ((0, 1), (1, tensor.count), (tensor.count // 3, 2 * tensor.count // 3), (0, 0)):
            assert torch.equal(tensor.read(first, last), rows[first:last]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": 64}, "layers=64 dim=2048"),  # fairseq2 has a model of this width with 32 heads
        ({"latent_dim": 1280, "final_dim": 1280}, "codevector_dim=1280 projection_dim=1280"),
        ({"ffn_dim": 12288}, "ffn_dim=12288"),
    ],
)
def test_heads_of_other_sizes_are_not_guessed(changes: dict[str, int], named: str) -> None:
    other = Shape(**{**FULL_3B.__dict__, **changes})
    with torch.device("meta"):
        state = fairseq2_state(fairseq_state(other), other)
    with pytest.raises(UserError, match=r"some\.pt: the number of attention heads is unknown") as error:
        from_fairseq2(FairseqCheckpoint(Path("some.pt"), state, {}))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_file_goes_through_our_checkpoint_and_transformers_and_back_unchanged(shape: Shape, tmp_path: Path) -> None:
    state = fairseq2_state(fairseq_state(shape), shape)
    path = save_fairseq2(tmp_path / "m.pt", state, w2vscale=our_settings(shape))
    import_checkpoint(path, tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "huggingface", form="huggingface")
    import_checkpoint(tmp_path / "huggingface", tmp_path / "again")
    for source in ("in", "again"):
        export_checkpoint(tmp_path / source, tmp_path / f"out_{source}", form="fairseq2")
        assert_same(stored(tmp_path / f"out_{source}"), {**state, "quantizer.num_updates": torch.tensor(0)})
    one, other = (json.loads(load_fairseq(tmp_path / f"out_{source}" / "model.pt").own) for source in ("in", "again"))
    assert one == other
    assert {**one["model"], **json.loads(our_settings(shape))["model"]} == one["model"]


# the file that is written --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A preset's small sibling: its settings, and the folder with its checkpoint, and its export in `out`."""
    folder = tmp_path_factory.mktemp(request.param)
    config, _ = resolve(load_config(request.param, SMALL_PRESET))
    save_model(folder, config, random_model(config, seed=5).state_dict(), TrainState(update=700))
    export_checkpoint(folder, folder / "out", form="fairseq2")
    return config, folder


def test_pytorch_opens_it_in_every_way_and_the_checksums_are_right(exported: tuple[Config, Path]) -> None:
    file = exported[1] / "out" / "model.pt"
    plain = torch.load(file, weights_only=True)
    assert plain.keys() == {"model", "w2vscale"}
    for options in ({"weights_only": True, "mmap": True}, {"weights_only": False}):
        found = torch.load(file, **options)
        assert_same(found["model"], plain["model"])
        places = [tensor.untyped_storage().data_ptr() for tensor in found["model"].values()]
        assert len({*places}) == len(places) and not any(place % 64 for place in places)
        for tensor in found["model"].values():
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    assert plain["model"]["quantizer.num_updates"] == 700
    assert {tensor.dtype for tensor in plain["model"].values()} == {torch.float32, torch.int64}


def test_the_card_has_the_sizes_of_the_tensors(exported: tuple[Config, Path]) -> None:
    config, folder = exported
    card, state = yaml.safe_load((folder / "out" / "card.yaml").read_text()), stored(folder / "out")
    assert (card["model_family"], card["checkpoint"]) == ("wav2vec2", "model.pt")
    settings, encoder = card["model_config"], card["model_config"]["encoder_config"]
    assert list(state["final_target_proj.weight"].shape) == [settings["final_dim"], settings["quantized_dim"]]
    entries = settings["num_codebooks"] * settings["num_codebook_entries"]
    assert state["quantizer.entries"].shape[1] == entries
    dim, width = encoder["model_dim"], encoder["feature_dim"]
    assert list(state["encoder_frontend.model_dim_proj.weight"].shape) == [dim, width]
    groups, kernel = encoder["num_pos_conv_groups"], encoder["pos_conv_kernel_size"]
    assert list(state["encoder_frontend.pos_encoder.conv.weight_v"].shape) == [dim, dim // groups, kernel]
    last = encoder["num_encoder_layers"] - 1
    assert list(state[f"encoder.layers.{last}.ffn.inner_proj.weight"].shape) == [encoder["ffn_inner_dim"], dim]
    assert f"encoder.layers.{last + 1}.ffn.inner_proj.weight" not in state
    convolutions = encoder["feature_extractor_layer_descs"]
    for index, (channels, kernel, _) in enumerate(convolutions):
        weight = state[f"encoder_frontend.feature_extractor.layers.{index}.conv.weight"]
        assert (weight.shape[0], weight.shape[2]) == (channels, kernel)
    assert [tuple(layer) for layer in convolutions] == list(config.model.conv_layers)
    pre = "encoder.layer_norm.weight" in state
    assert (encoder["norm_order"], encoder["layer_norm_features"]) == (("PRE", False) if pre else ("POST", True))
    first = "encoder_frontend.feature_extractor.layers.0"
    assert encoder["feature_extractor_layer_norm_convs"] == (f"{first}.layer_norm.weight" in state)
    assert encoder["feature_extractor_bias"] == (f"{first}.conv.bias" in state)
    assert encoder["num_encoder_attn_heads"] == config.model.heads


def test_it_comes_in_again_with_all_settings(exported: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = exported
    import_checkpoint(folder / "out" / "model.pt", tmp_path / "in")
    again = open_checkpoint(tmp_path / "in")
    assert_same(whole(again.model_tensors()), whole(open_checkpoint(folder).model_tensors()))
    assert (again.config.model, again.config.regularization) == (config.model, config.regularization)
    assert build_objective(again.config).settings == build_objective(config).settings


def test_models_that_fairseq2_does_not_have_are_refused(tmp_path: Path) -> None:
    for number, (preset, overrides, message) in enumerate(
        [
            ("base_prenorm", ("model.layers=1", "model.dim=64", "model.heads=4"), "model.conv_padding=true: fairseq2"),
            ("best_rq_tiny", (), "objective.name=best_rq: fairseq2 has no"),
            ("base", (*SMALL_PRESET, "model.dim=32"), "model.dim=32: fairseq2 has no projection"),
            ("base", (*SMALL_PRESET, "objective.quantizer_input=projected"), "objective.quantizer_input=projected"),
        ]
    ):
        config, _ = resolve(load_config(preset, overrides))
        folder = tmp_path / str(number)
        save_model(folder, config, random_model(config, seed=1).state_dict(), TrainState(update=1))
        with pytest.raises(UserError, match=message):
            export_checkpoint(folder, folder / "out", form="fairseq2")
        assert [path.name for path in folder.iterdir()] == ["checkpoints"]


# models with an output layer -----------------------------------------------------------------------------------------


@pytest.fixture
def ctc(shape: Shape, tokenizer: Path, tmp_path: Path) -> Path:
    """The folder of a CTC model of fairseq2, with its tokenizer."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    symbols = pieces_of(tokenizer)
    state = fairseq2_ctc_state(fairseq_state(shape), shape, len(symbols))
    settings = our_settings(shape, name="ctc", vocabulary=symbols)
    save_fairseq2(folder / "m.pt", state, w2vscale=settings)
    (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    return folder


@torch.no_grad()
def test_logits_and_text_are_transformers(ctc: Path, shape: Shape, tokenizer: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import_checkpoint(ctc / "m.pt", tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "out", form="huggingface")
    other, report = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = model_of(tmp_path / "in")
    waveform = torch.randn(1, 8000)
    theirs = other.eval()(waveform).logits
    assert_close(model.logits(waveform), theirs)
    state = torch.load(ctc / "m.pt", weights_only=True)["model"]
    head = torch.nn.functional.linear(
        other.wav2vec2(waveform).last_hidden_state, state["final_proj.weight"], state["final_proj.bias"]
    )
    assert_close(theirs, head)
    assert other.config.pad_token_id == 0 == theirs.shape[-1] - len(pieces_of(tokenizer))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor.tokenizer, transformers.Wav2Vec2CTCTokenizer)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for text in TEXTS:
        labels = pieces.encode(text)
        frames = [frame for label in labels for frame in (label, label, 0)]
        assert processor.tokenizer.decode(frames).strip() == pieces.decode(labels) == text


def test_the_tokenizer_comes_along_and_gives_the_same_labels(ctc: Path, tokenizer: Path, tmp_path: Path) -> None:
    import_checkpoint(ctc / "m.pt", tmp_path / "in")
    config = open_checkpoint(tmp_path / "in").config
    objective = build_objective(config)
    assert objective.settings.sentencepiece == tmp_path / "in" / "tokenizer.model"
    assert [path.name for path in sorted((tmp_path / "in").iterdir())] == ["checkpoints", "tokenizer.model"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for text in TEXTS:
        labels, unknown = Transcripts(objective.vocabulary, objective.settings.sentencepiece).labels(text)
        assert (labels, unknown) == (pieces.encode(text), "")
        assert labels_to_text(labels, objective.vocabulary) == pieces.decode(labels)
    export_checkpoint(tmp_path / "in", tmp_path / "out", form="fairseq2")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert_same(stored(tmp_path / "out"), torch.load(ctc / "m.pt", weights_only=True)["model"])
    model, other = yaml.safe_load_all((tmp_path / "out" / "card.yaml").read_text())
    assert (model["model_family"], model["tokenizer_ref"]) == ("wav2vec2_asr", other["name"])
    assert (other["tokenizer_family"], other["tokenizer"]) == ("char_tokenizer", "tokenizer.model")
    assert model["model_config"]["target_vocab_size"] == len(objective.vocabulary)
    assert str(tmp_path) not in load_fairseq(tmp_path / "out" / "model.pt").own
    import_checkpoint(tmp_path / "out" / "model.pt", tmp_path / "again")
    assert build_objective(open_checkpoint(tmp_path / "again").config).vocabulary == objective.vocabulary


def test_without_its_file_the_symbols_are_a_list_and_the_log_says_why(ctc: Path, tmp_path: Path) -> None:
    import_checkpoint(ctc / "m.pt", tmp_path / "in")
    symbols = build_objective(open_checkpoint(tmp_path / "in").config).vocabulary
    (tmp_path / "in" / "tokenizer.model").unlink()
    lines: list[str] = []
    export_checkpoint(tmp_path / "in", tmp_path / "out", form="fairseq2", log=lines.append)
    assert len(lines) == 1 and "tokenizer.model: cannot be read: No such file" in lines[0]
    assert (tmp_path / "out" / "vocabulary.txt").read_text().split("\n") == [*symbols, ""]
    assert "tokenizer" not in (tmp_path / "out" / "card.yaml").read_text()
    import_checkpoint(tmp_path / "out" / "model.pt", tmp_path / "again")
    assert build_objective(open_checkpoint(tmp_path / "again").config).vocabulary == symbols


def test_a_tokenizer_that_cannot_be_read_any_more_is_named(
    ctc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the folder that is written."""
    tokenizer = next(ctc.glob("*.model"))
    import_checkpoint(ctc / "m.pt", tmp_path / "in")
    copy = tmp_path / "in" / "tokenizer.model"

    def delete_first(*arguments: object) -> int:
        copy.unlink()
        return 0

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "label_of_first", delete_first)
        export_checkpoint(tmp_path / "in", tmp_path / "out", form="fairseq2", log=lines.append)
    assert len(lines) == 1 and str(copy) in lines[0]
    assert (tmp_path / "out" / "vocabulary.txt").exists()

    def vanish(*arguments: object, **named: object) -> Any:
        tokenizer.unlink()
        return locked(*arguments, **named)

    monkeypatch.setattr(importing, "locked", vanish)
    with pytest.raises(UserError, match=f"^{tokenizer}: cannot be read: No such file"):
        import_checkpoint(ctc / "m.pt", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_that_was_fine_tuned_without_masks_gets_a_zero_mask_embedding(tokenizer: Path, tmp_path: Path) -> None:
    shape, symbols = SMALL["large_lv60"], pieces_of(tokenizer)
    state = fairseq2_ctc_state(fairseq_state(shape), shape, len(symbols), masks=False)
    settings = our_settings(shape, name="ctc", vocabulary=symbols)
    path = save_fairseq2(tmp_path / "m.pt", state, w2vscale=settings)
    lines: list[str] = []
    import_checkpoint(path, tmp_path / "in", log=lines.append)
    assert f"{path}: no mask embedding, because it was fine-tuned without masks: it becomes zero" in lines
    assert not whole(open_checkpoint(tmp_path / "in").model_tensors())["encoder.mask_embedding"].any()


def test_the_symbols_of_a_ctc_model_must_be_known(tokenizer: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = fairseq2_ctc_state(fairseq_state(LARGE_LV60), LARGE_LV60, len(pieces_of(tokenizer)))
    checkpoint = FairseqCheckpoint(tmp_path / "m.pt", state, {})
    with pytest.raises(
        UserError,
        match=r"m.pt: a CTC model needs the file with its \d+ symbols: put it beside .*: w2vscale import MODEL DIR",
    ):
        from_fairseq2(checkpoint)
    config, _ = from_fairseq2(checkpoint, tokenizer)
    assert build_objective(config).vocabulary == pieces_of(tokenizer)
    (tmp_path / "my_tokenizer_1.model").write_bytes(tokenizer.read_bytes())
    assert build_objective(from_fairseq2(checkpoint)[0]).vocabulary == pieces_of(tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(
        UserError, match=r"\(my_tokenizer_1.model, tokenizer.model\): keep one of them there, or import"
    ):
        from_fairseq2(checkpoint)
    for name, message in (
        ("tokenizer.model", "not a SentencePiece model"),
        ("gone.model", "cannot be read: No such file"),
        ("gone.txt", "must be `letters` or a readable file of symbols"),
    ):
        with pytest.raises(UserError, match=f"m.pt: --tokenizer={tmp_path / name}: {message}"):
            from_fairseq2(checkpoint, tmp_path / name)
    other = train_characters(tmp_path / "other.model", size=20)
    with pytest.raises(UserError, match=r"its output layer has \d+ symbols, and .*other.model has 20 with the blank"):
        from_fairseq2(checkpoint, other)


def test_a_tokenizer_of_other_symbols_than_the_file_names_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    shape, symbols = SMALL["base"], pieces_of(tokenizer)
    changed = [*symbols[:-1], "ß"]
    state = fairseq2_ctc_state(fairseq_state(shape), shape, len(symbols))
    settings = our_settings(shape, name="ctc", vocabulary=changed)
    with pytest.raises(UserError, match=r"m.pt: .*: its symbols are not those that are in the file"):
        from_fairseq2(FairseqCheckpoint(tmp_path / "m.pt", state, {}, settings), tokenizer)


def test_a_folder_with_another_tokenizer_is_not_overwritten_and_a_failure_leaves_nothing(
    ctc: Path, tmp_path: Path
) -> None:
    output = tmp_path / "in"
    output.mkdir()
    (output / "tokenizer.model").write_text("mine")
    with pytest.raises(UserError, match="exists and is another file than"):
        import_checkpoint(ctc / "m.pt", output)
    assert (output / "tokenizer.model").read_text() == "mine" and len(list(output.iterdir())) == 1
    broken = torch.load(ctc / "m.pt", weights_only=True)
    broken["model"]["final_proj.bias"][0] = float("nan")
    torch.save(broken, ctc / "m.pt")
    with pytest.raises(UserError, match=r"head\.bias has no values, or values that are not finite"):
        import_checkpoint(ctc / "m.pt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# commands and runs ---------------------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def test_the_commands_recognise_the_format_and_take_a_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    shape = SMALL["large_lv60"]
    state = fairseq2_state(fairseq_state(shape), shape)
    path = save_fairseq2(tmp_path / "m.pt", state, w2vscale=our_settings(shape))
    assert "update_00000000" in run("import", path, tmp_path / "in")
    (tmp_path / "m.pth").write_bytes(path.read_bytes())
    assert "update_00000000" in run("import", tmp_path / "m.pth", tmp_path / "other_suffix")
    assert open_checkpoint(tmp_path / "in").state.data == "imported from m.pt (fairseq2)"
    assert "model.pt" in run("export", tmp_path / "in", tmp_path / "out", "--format", "fairseq2")
    run("export", tmp_path / "in", tmp_path / "hf")
    run("import", tmp_path / "hf", tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").state.data == "imported from hf (huggingface)"
    symbols = pieces_of(tokenizer)
    ctc = fairseq2_ctc_state(fairseq_state(shape), shape, len(symbols))
    settings = our_settings(shape, name="ctc", vocabulary=symbols)
    path = save_fairseq2(tmp_path / "c.pt", ctc, w2vscale=settings)
    run("import", path, tmp_path / "ctc", "--tokenizer", tokenizer)
    assert (tmp_path / "ctc" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    for source in (tmp_path / "hf", tmp_path / "m.pt"):
        with pytest.raises(UserError, match=rf"--tokenizer=.*: {source} is not a CTC model"):
            import_checkpoint(source, tmp_path / "x", tokenizer=tokenizer)


def test_a_run_starts_from_the_file_itself(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.updates=1", "schedule.warmup_updates=1"]
    source, _ = resolve(load_config("base", MICRO_RUN))
    save_model(tmp_path / "source", source, random_model(source, seed=2).state_dict(), TrainState())
    export_checkpoint(tmp_path / "source", tmp_path / "out", form="fairseq2")
    losses = []
    for number, place in enumerate((tmp_path / "source", tmp_path / "out" / "model.pt")):
        assert train(load_config("base", [*overrides, f"trainer.init_from={place}"]), tmp_path / str(number)) == 0
        record = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()[0]
        losses.append(json.loads(record)["loss"])
    assert losses[0] == losses[1]
    assert "model.pt (fairseq2)" in " ".join(capsys.readouterr().out.split())
