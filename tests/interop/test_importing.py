"""What `w2vscale import` takes, in every form that others write it, and what it refuses in one line."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.helpers.converted import from_fairseq, from_huggingface, to_huggingface
from tests.helpers.fairseq import SMALL as FAIRSEQ
from tests.helpers.fairseq import all_settings, fairseq_state, save_new
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.interop.fairseq_file import load_fairseq
from w2vscale.interop.huggingface import huggingface_config, preprocessor_config, pretraining_config
from w2vscale.interop.importing import import_checkpoint
from w2vscale.objectives import build_objective, resolve

transformers = pytest.importorskip("transformers")


def small(preset: str = "base", *overrides: str) -> Config:
    """A preset's small sibling, with every setting of its objective."""
    return resolve(load_config(preset, [*SMALL, *overrides]))[0]


def described(config: Config) -> tuple[Any, ...]:
    """What an import takes over."""
    return config.model, config.regularization, build_objective(config).settings


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of `small()`, by our names."""
    torch.manual_seed(4)
    model = build_objective(small()).build_model()
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture
def source(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A folder with that model for Transformers."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(to_huggingface(state, small()), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(small())))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(small().model)))
    return folder


def change(folder: Path, **settings: object) -> None:
    """Other settings, and none of ours."""
    document = json.loads((folder / "config.json").read_text()) | settings
    del document["w2vscale"]
    (folder / "config.json").write_text(json.dumps(document))


def take(folder: Path, output: Path, form: str = "huggingface") -> tuple[Config, dict[str, Tensor]]:
    checkpoint = import_checkpoint(folder, output, form=form).checkpoint
    return load_config(checkpoint / "config.yaml"), whole(open_checkpoint(checkpoint).model_tensors())


def refusal(source: Path, form: str = "huggingface") -> str:
    with pytest.raises(UserError) as error:
        import_checkpoint(source, source.parent / "in", form=form)
    message = str(error.value)
    assert message.startswith(str(source)) and "\n" not in message
    assert not (source.parent / "in").exists()
    return message


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# fairseq -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAIRSEQ)
def test_a_fairseq_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = save_new(tmp_path / "model.pt", fairseq_state(FAIRSEQ[name]), all_settings(FAIRSEQ[name]))
    config, weights = from_fairseq(load_fairseq(path))
    taken, stored = take(path, tmp_path / "in", form="fairseq")
    assert described(taken) == described(config)
    assert_same(stored, weights)


def test_the_command_takes_a_fairseq_checkpoint(tmp_path: Path) -> None:
    path = save_new(tmp_path / "model.pt", fairseq_state(FAIRSEQ["base"]), all_settings(FAIRSEQ["base"]))
    result = CliRunner().invoke(app, ["import", str(path), str(tmp_path / "in"), "--format", "fairseq"])
    assert result.exit_code == 0, result.output
    assert "update_00000000" in result.output and "parameters" in result.output
    assert open_checkpoint(tmp_path / "in").state.data == "imported from model.pt (fairseq)"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_fairseq_weights_that_are_not_finite_are_refused(number: float, tmp_path: Path) -> None:
    weights = fairseq_state(FAIRSEQ["base"])
    weights["encoder.layers.1.fc2.bias"][3] = number
    path = save_new(tmp_path / "model.pt", weights, all_settings(FAIRSEQ["base"]))
    assert "blocks.1.feed_forward.output.bias has no values, or values that are not finite" in refusal(path, "fairseq")
    weights["encoder.layers.1.fc2.bias"] = torch.empty(96 // 2, device="meta")
    save_new(path, weights, all_settings(FAIRSEQ["base"]))
    assert "blocks.1.feed_forward.output.bias has no values" in refusal(path, "fairseq")


# Transformers: what comes in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["base", "large", "large_lv60", "xlsr_300m"])
def test_our_own_export_has_all_settings(preset: str) -> None:
    changed = (
        "objective.mask_probability=0.5", "objective.mask_length=7", "objective.mask_min_spans=1",
        "objective.gumbel_start=3", "objective.gumbel_end=0.2", "objective.gumbel_decay=0.9",
        "regularization.feature_grad_mult=0.3", "objective.feature_penalty_weight=2",
        "model.normalize_waveform=true", "model.sampling_rate=8000",
    )  # fmt: skip
    for config in (load_config(preset), small(preset), small(preset, *changed)):
        document = json.loads(json.dumps(huggingface_config(config)))
        preprocessor = json.loads(json.dumps(preprocessor_config(config.model)))
        assert described(pretraining_config(document, preprocessor)) == described(config)
        assert described(pretraining_config(document, None)) == described(config)


def test_our_settings_do_not_count_where_they_are_of_another_architecture(source: Path) -> None:
    document = json.loads((source / "config.json").read_text())
    ours = document["w2vscale"]
    ours["objective"]["mask_probability"], ours["model"]["heads"] = 0.5, 2
    assert pretraining_config(document, None).objective.mask_probability == 0.65
    ours["model"]["heads"] = 4
    assert pretraining_config(document, None).objective.mask_probability == 0.5
    for section in ours:
        ours[section]["maks_length"] = 3
        with pytest.raises(UserError, match=rf"config\.json: w2vscale\.{section}\.maks_length=3: unknown setting"):
            pretraining_config(document, None)
        del ours[section]["maks_length"]


def test_settings_that_transformers_changed_count(source: Path) -> None:
    document = json.loads((source / "config.json").read_text()) | {"hidden_dropout": 0, "mask_time_prob": 0.05}
    document["w2vscale"]["objective"]["mask_length"] = 7
    config = pretraining_config(document, None)
    assert config.regularization.dropout == 0.0
    assert (config.objective.mask_probability, config.objective.mask_length) == (0.65, 7)


def test_transformers_takes_our_settings_along_without_a_word(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForPreTraining.from_pretrained(source)
        model.save_pretrained(source.parent / "again")
    assert not [record for record in caplog.records if "w2vscale" in record.getMessage()]
    assert config.w2vscale == json.loads(json.dumps(huggingface_config(small())))["w2vscale"]
    assert described(take(source.parent / "again", source.parent / "in")[0]) == described(small())


@pytest.mark.parametrize("normalised", [True, False])
def test_the_newer_file_of_a_feature_extractor_counts(normalised: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalised, sampling_rate=8000)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    (source / "preprocessor_config.json").unlink()
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(source)
    assert (source / "processor_config.json").is_file() and not (source / "preprocessor_config.json").exists()
    model = take(source, tmp_path / "in")[0].model
    assert (model.normalize_waveform, model.sampling_rate) == (normalised, 8000)


def test_the_older_file_counts_where_the_newer_does_not_say(source: Path, tmp_path: Path) -> None:
    (source / "processor_config.json").write_text('{"processor_class": "Wav2Vec2Processor"}')
    (source / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert take(source, tmp_path / "in")[0].model.normalize_waveform


@pytest.mark.parametrize(("preset", "normalised"), [("base", False), ("large_lv60", True)])
def test_without_either_file_normalisation_goes_with_the_norm_and_is_told(
    preset: str, normalised: bool, tmp_path: Path
) -> None:
    config = transformers.Wav2Vec2Config(**huggingface_config(small(preset)))
    del config.w2vscale
    folder = tmp_path / "theirs"
    transformers.Wav2Vec2ForPreTraining(config).save_pretrained(folder)
    result = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "in")])
    assert result.exit_code == 0, result.output
    said = f"no preprocessor_config.json or processor_config.json in it: using model.normalize_waveform={normalised}"
    assert said.lower() in result.output.lower()
    assert load_config(open_checkpoint(tmp_path / "in").path / "config.yaml").model.normalize_waveform == normalised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_that_transformers_saved(source: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformers.Wav2Vec2ForPreTraining.from_pretrained(source, dtype=dtype)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert model.project_q.weight.dtype == dtype
    _, found = take(tmp_path / "shards", tmp_path / "in")
    assert_same(found, from_huggingface(model.state_dict(), small()))


def test_shards_of_torch_save(source: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, name in enumerate(weights)}
    for file in set(files.values()):
        # Transposed and back: not contiguous, as checkpoints may have them.
        torch.save({name: weights[name].t().contiguous().t() if weights[name].dim() == 2 else weights[name]
                    for name in weights if files[name] == file}, source / file)  # fmt: skip
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    _, found = take(source, tmp_path / "in")
    assert_same(found, state)


def test_a_tensor_in_two_shards_is_refused(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    save_file(weights, source / "a.safetensors")
    save_file({"project_q.bias": torch.zeros(24)}, source / "b.safetensors")
    files = dict.fromkeys(weights, "a.safetensors") | {"project_q.bias": "b.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert refusal(source).endswith("b.safetensors: tensor project_q.bias is in another shard, too")


def test_both_spellings_of_weight_norm_are_refused(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    (older,) = [name for name in weights if name.endswith(("weight_g", "original0"))]
    other = older.replace("weight_g", "parametrizations.weight.original0")
    if other == older:
        other = older.replace("parametrizations.weight.original0", "weight_g")
    save_file(weights | {other: weights[older].clone()}, source / "model.safetensors")
    assert "parametrizations.weight.original0 is there twice, once as" in refusal(source)


def test_an_import_that_failed_can_be_repeated(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "in" / "checkpoints" / ".update_00000000.partial"
    partial.mkdir(parents=True)
    (partial / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"cut short")
    take(source, tmp_path / "in")
    assert not partial.exists()
    with pytest.raises(UserError, match="checkpoints: exists; choose another folder"):
        import_checkpoint(source, tmp_path / "in", form="huggingface")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    take(source, tmp_path / "empty")


# Transformers: what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"conv_kernel": [10, 3]}, "config.json: conv_kernel has 2 entries, conv_dim has 4"),
        ({"conv_dim": 512}, "config.json: conv_dim=512: not a list of numbers"),
        ({"conv_dim": []}, "config.json: conv_dim=[]: not a list of numbers"),
        ({"conv_stride": None}, "config.json: conv_stride=None: not a list of numbers"),
        ({"conv_stride": [5, "2", 2, 2]}, "config.json: conv_stride='2': Input should be a valid integer"),
        ({"conv_dim": [None, 32, 32, 32]}, "config.json: conv_dim=None: Input should be a valid integer"),
        ({"hidden_size": "48"}, "config.json: hidden_size='48': Input should be a valid integer"),
        ({"hidden_size": None}, "config.json: hidden_size=None: Input should be a valid integer"),
        ({"hidden_size": [48]}, "config.json: hidden_size=[48]: Input should be a valid integer"),
        ({"num_hidden_layers": 2.5}, "config.json: num_hidden_layers=2.5: Input should be a valid integer"),
        ({"do_stable_layer_norm": None}, "config.json: do_stable_layer_norm=None: Input should be a valid boolean"),
        ({"feat_extract_norm": "batch"}, "config.json: feat_extract_norm='batch': Input should be 'group' or 'layer'"),
        ({"layerdrop": float("nan")}, "config.json: layerdrop=nan: Input should be"),
        ({"hidden_dropout": True}, "config.json: hidden_dropout=True: True is neither a number nor text"),
        ({"num_attention_heads": 7}, "config.json: heads=7 does not divide dim=48"),
    ],
)
def test_settings_that_are_none_are_refused_by_name(settings: dict[str, Any], told: str, source: Path) -> None:
    change(source, **settings)
    assert told in refusal(source)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({}, "weight_map does not name a file for each tensor"),
        ({"weight_map": {}}, "weight_map does not name a file for each tensor"),
        ({"weight_map": ["a"]}, "weight_map does not name a file for each tensor"),
        ({"weight_map": {"a": 3}}, "weight_map: 'a': 3 is not a file name"),
        ({"weight_map": {"a": "../model.safetensors"}}, "weight_map: 'a': '../model.safetensors' is not a file name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors cannot be read: No such file"),
        ([], "model.safetensors.index.json is not a JSON object"),
    ],
)
def test_an_index_that_is_none_is_refused(index: object, told: str, source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert told in refusal(source)


def test_files_that_are_none_are_refused(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"cut short")
    assert "model.safetensors cannot be read: " in refusal(source)
    (source / "model.safetensors").unlink()
    assert "no model.safetensors and no pytorch_model.bin in it" in refusal(source)
    torch.save({3: torch.ones(1)}, source / "pytorch_model.bin")
    assert "pytorch_model.bin is not a dictionary of tensors" in refusal(source)
    torch.jit.script(torch.nn.ReLU()).save(source / "pytorch_model.bin")
    assert "pytorch_model.bin is refused: it is a TorchScript program" in refusal(source)
    (source / "preprocessor_config.json").write_text('{"do_normalize": 1}')
    assert "feature extractor: do_normalize=1: Input should be a valid boolean" in refusal(source)
    (source / "preprocessor_config.json").write_text("[" * 100_000)
    assert "preprocessor_config.json cannot be read" in refusal(source)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Wav2Vec2Model", "an encoder alone (Wav2Vec2Model)"),
        ("Wav2Vec2ForSequenceClassification", "an encoder with an output layer of another task"),
    ],
)
def test_other_kinds_of_model_are_refused_by_what_they_are(kind: str, told: str, source: Path) -> None:
    config = transformers.Wav2Vec2Config.from_pretrained(source)
    theirs = source.parent / "theirs"
    getattr(transformers, kind)(config).save_pretrained(theirs)
    message = f"{theirs}: {told}: only Wav2Vec2ForPreTraining and Wav2Vec2ForCTC can be imported"
    assert refusal(theirs) == message


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (
            torch.ones(24, dtype=torch.int32),
            "tensor project_q.bias is torch.int32, not floating point",
        ),
        (
            torch.ones(24).to(torch.float8_e4m3fn),
            "tensor project_q.bias is F8_E4M3, not floating point of 16, 32 or 64 bits",
        ),
        (torch.full((24,), float("nan")), "target_projection.bias has no values, or values that are not finite"),
        (
            torch.full((24,), 1e300, dtype=torch.float64),
            "target_projection.bias has no values, or values that are not fin",
        ),
        (torch.ones(25), "project_q.bias has shape [25], but the settings need [24]"),
    ],
)
def test_weights_that_are_none_are_refused_by_name(tensor: Tensor, told: str, source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "project_q.bias": tensor}, source / "model.safetensors")
    assert told in refusal(source)
