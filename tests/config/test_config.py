"""Settings: presets, YAML and overrides in, one tree out; every mistake is one line that names the nearest setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from w2vscale.config import Config, ModelConfig, OptimConfig, dump_config, load_config, preset_names
from w2vscale.config.load import settings
from w2vscale.errors import UserError

PRESETS = (
    "tiny", "base", "base_prenorm", "large", "large_lv60", "xlsr_300m", "xlsr_1b", "xlsr_2b",
    "ctc_10min", "ctc_1h", "ctc_10h", "ctc_100h", "ctc_960h",
)  # fmt: skip
PUBLISHED = ("base", "large", "large_lv60", "xlsr_300m", "xlsr_1b", "xlsr_2b")
CONV_LAYERS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))

# fairseq's examples/wav2vec/config/pretraining and XLS-R (Babu et al. 2021), one column per name in PUBLISHED.
MODEL_NUMBERS = {
    "layers": (12, 24, 24, 24, 48, 48),
    "dim": (768, 1024, 1024, 1024, 1280, 1920),
    "ffn_dim": (3072, 4096, 4096, 4096, 5120, 7680),
    "heads": (12, 16, 16, 16, 16, 16),
    "conv_norm": ("group", "group", "layer", "layer", "layer", "layer"),
    "conv_bias": (False, False, True, True, True, True),
    "norm_first": (False, False, True, True, True, True),
    "normalize_waveform": (False, False, True, True, True, True),
    "codevector_dim": (256, 768, 768, 768, 1024, 1024),
    "projection_dim": (256, 768, 768, 768, 1024, 1024),
    "gumbel_start": (2.0, 2.0, 2.0, 2.0, 2.0, 2.0),
    "gumbel_end": (0.5, 0.1, 0.1, 0.1, 0.1, 0.1),
    "gumbel_decay": (0.999995,) * 6,
    "dropout": (0.1, 0.0, 0.0, 0.0, 0.0, 0.0),
    "attention_dropout": (0.1, 0.1, 0.0, 0.0, 0.0, 0.0),
    "input_dropout": (0.1, 0.1, 0.0, 0.0, 0.1, 0.1),
    "feature_dropout": (0.1, 0.1, 0.0, 0.0, 0.0, 0.0),
    "activation_dropout": (0.0,) * 6,
    "layerdrop": (0.05, 0.0, 0.0, 0.0, 0.0, 0.0),
    "feature_grad_mult": (0.1, 0.03, 1.0, 1.0, 1.0, 1.0),
    "diversity_weight": (0.1,) * 6,
    "feature_penalty_weight": (10.0, 10.0, 0.0, 0.0, 0.0, 0.0),
    "sampling_rate": (16_000,) * 6,
    "conv_layers": (CONV_LAYERS,) * 6,
    "conv_norm_groups": (512,) * 6,
    "conv_padding": (False,) * 6,
    "positional_kernel": (128,) * 6,
    "positional_groups": (16,) * 6,
    "max_frames": (None,) * 6,
    "codebooks": (2,) * 6,
    "codebook_entries": (320,) * 6,
    "quantizer_input": ("features",) * 6,
    "target_projection": (True,) * 6,
    "negatives": (100,) * 6,
    "logit_temperature": (0.1,) * 6,
    "mask_probability": (0.65,) * 6,
    "mask_length": (10,) * 6,
    "mask_min_spans": (2,) * 6,
}

# Peak learning rate, updates, of which the encoder is frozen; frames and channels masked; LayerDrop.
FINE_TUNING_NUMBERS = {
    "ctc_10min": (5e-5, 13_000, 10_000, 0.65, 0.25, 0.1),
    "ctc_1h": (5e-5, 13_000, 10_000, 0.65, 0.25, 0.1),
    "ctc_10h": (5e-5, 20_000, 10_000, 0.65, 0.5, 0.05),
    "ctc_100h": (3e-5, 80_000, 0, 0.65, 0.5, 0.1),
    "ctc_960h": (1e-4, 320_000, 0, 0.5, 0.1, 0.1),
}

# Peak learning rate, updates, samples of a crop, samples per GPU, GPUs.
TRAINING_NUMBERS = {
    "base": (5e-4, 400_000, 250_000, 1_400_000, 64),
    "large": (3e-4, 600_000, 320_000, 1_200_000, 128),
    "large_lv60": (1e-3, 1_000_000, 320_000, 1_200_000, 128),
}

# This project's own BASE, where it differs from the published one.
BASE_PRENORM_NUMBERS = {
    "layers": 12,
    "dim": 768,
    "ffn_dim": 3072,
    "heads": 8,
    "norm_first": True,
    "embedding_norm": True,
    "conv_norm": "group",
    "conv_norm_groups": 32,
    "conv_bias": False,
    "conv_padding": True,
    "positional_kernel": 128,
    "positional_groups": 16,
    "dropout": 0.1,
    "quantizer_input": "projected",
    "codebooks": 2,
    "codebook_entries": 320,
    "codevector_dim": 2 * 384,
    "target_projection": False,
    "projection_dim": 768,
    "max_frames": 1024,
}


def error_of(source: str | Path, *overrides: str) -> str:
    """The message of the mistake, which is one line."""
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestPresets:
    def test_all_are_listed_smallest_first(self) -> None:
        assert preset_names() == list(PRESETS)

    @pytest.mark.parametrize("column", range(len(PUBLISHED)), ids=PUBLISHED)
    def test_models_have_the_published_numbers(self, column: int) -> None:
        model = load_config(PUBLISHED[column]).model
        expected = {key: values[column] for key, values in MODEL_NUMBERS.items()}
        assert {key: getattr(model, key) for key in expected} == expected

    @pytest.mark.parametrize("name", FINE_TUNING_NUMBERS)
    def test_fine_tuning_has_the_published_numbers(self, name: str) -> None:
        config = load_config(name)
        masks = (config.objective.mask_probability, config.objective.channel_mask_probability)
        updates = (config.trainer.updates, config.objective.freeze_encoder_updates)
        assert (config.optim.lr, *updates, *masks, config.regularization.layerdrop) == FINE_TUNING_NUMBERS[name]
        assert (config.schedule.kind, config.schedule.stages) == ("tri_stage", (0.1, 0.4, 0.5))
        assert (config.objective.mask_length, config.objective.channel_mask_length) == (10, 64)
        assert config.batch.max_seconds * config.batch.micro_batches == 1600
        assert config.regularization.feature_grad_mult == config.optim.weight_decay == 0

    def test_every_setting_of_the_model_is_in_the_table(self) -> None:
        assert set(ModelConfig.model_fields) - set(MODEL_NUMBERS) == {"embedding_norm"}

    def test_layernorm_follows_the_positional_convolution_in_post_ln_models_only(self) -> None:
        assert all(load_config(name).model.embedding_norm != load_config(name).model.norm_first for name in PUBLISHED)

    @pytest.mark.parametrize("name", TRAINING_NUMBERS)
    def test_training_has_the_published_numbers(self, name: str) -> None:
        config = load_config(name)
        rate = config.model.sampling_rate
        assert (
            config.optim.lr,
            config.trainer.updates,
            config.data.max_seconds * rate,
            config.batch.max_seconds * rate,
            config.batch.micro_batches,
        ) == TRAINING_NUMBERS[name]

    def test_base_prenorm_has_every_number_of_its_description(self) -> None:
        model = load_config("base_prenorm").model
        assert {key: getattr(model, key) for key in BASE_PRENORM_NUMBERS} == BASE_PRENORM_NUMBERS

    @pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny" and name not in FINE_TUNING_NUMBERS])
    def test_optimisation_is_adamw_with_cosine_clipping_and_bf16(self, name: str) -> None:
        config = load_config(name)
        assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)
        assert (config.schedule.kind, config.schedule.warmup_updates) == ("cosine", 32_000)
        assert (config.schedule.final_ratio, config.optim.max_norm) == (0.1, 1.0)
        assert config.precision.compute == "bf16"

    @pytest.mark.parametrize("name", PRESETS)
    def test_dumping_and_loading_changes_nothing(self, name: str, tmp_path: Path) -> None:
        config = load_config(name, ["data.train=[a b.jsonl, 'c: d.jsonl', 'ü#1.jsonl']", "optim.eps=1e-9"])
        dumped = dump_config(config)
        again = load_config(yaml_file(tmp_path, dumped))
        assert again == config
        assert dump_config(again) == dumped


class TestYaml:
    def test_an_empty_file_gives_the_defaults(self, tmp_path: Path) -> None:
        assert load_config(yaml_file(tmp_path, "")) == Config()
        assert load_config(yaml_file(tmp_path, "# only a comment\n")) == Config()

    def test_a_section_whose_settings_are_all_commented_out_keeps_the_presets(self, tmp_path: Path) -> None:
        assert load_config(yaml_file(tmp_path, "preset: tiny\noptim:\n#  lr: 1\n")) == load_config("tiny")

    def test_a_file_may_start_from_a_preset(self, tmp_path: Path) -> None:
        config = load_config(yaml_file(tmp_path, "preset: tiny\nmodel: {layers: 2}\noptim: {lr: 1.0e-3}\n"))
        tiny = load_config("tiny")
        assert (config.model.layers, config.optim.lr) == (2, 1e-3)
        assert config.model.dim == tiny.model.dim
        assert config.batch == tiny.batch

    def test_overrides_go_before_the_file_and_later_ones_before_earlier(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "optim: {lr: 1.0e-3, eps: 1.0e-7}\n")
        config = load_config(path, ["optim.lr=3e-4", "optim.lr=2e-4"])
        assert (config.optim.lr, config.optim.eps) == (2e-4, 1e-7)

    def test_a_list_replaces_the_files_list(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "data: {train: [a.jsonl, b.jsonl]}\n")
        assert load_config(path, ["data.train=c.jsonl"]).data.train == [Path("c.jsonl")]


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "section", "key", "value"),
        [
            ("optim.lr=2e-3", "optim", "lr", 0.002),
            ("optim.lr = 1", "optim", "lr", 1.0),
            ("trainer.updates=32_000", "trainer", "updates", 32_000),
            ("optim.max_norm=null", "optim", "max_norm", None),
            ("model.conv_bias=yes", "model", "conv_bias", True),
            ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
            ("data.train=a=b.jsonl", "data", "train", [Path("a=b.jsonl")]),
            ("data.train=[a.jsonl, b.jsonl]", "data", "train", [Path("a.jsonl"), Path("b.jsonl")]),
            ("data.validation=[]", "data", "validation", []),
            ("schedule.kind=linear", "schedule", "kind", "linear"),
            ("optim={lr: 1.0e-5}", "optim", "lr", 1e-5),
        ],
    )
    def test_values_take_the_settings_type(self, override: str, section: str, key: str, value: object) -> None:
        found = getattr(getattr(load_config("base", [override]), section), key)
        assert found == value and type(found) is type(value)

    @pytest.mark.parametrize(
        ("override", "nearest"),
        [
            ("optim.lrr=1", "optim.lr"),
            ("batch.max_second=3", "batch.max_seconds"),
            ("data.trian=x", "data.train"),
            ("model.layer=3", "model.layers"),
            ("schedule.warmup=10", "schedule.warmup_updates"),
            ("trainer.warmup_updates=3", "schedule.warmup_updates"),
            ("trainer.lr=3", "optim.lr"),
            ("optim.learning_rate=3", "lr"),
            ("optm.lr=3", "optim"),
            ("lr=3", "optim.lr"),
            ("train=x.jsonl", "data.train"),
            ("optim.groups=[{pattern: x, lrscale: 2}]", "lr_scale"),
        ],
    )
    def test_an_unknown_setting_names_the_nearest(self, override: str, nearest: str) -> None:
        message = error_of("base", override)
        assert override.partition("=")[0].partition("[")[0] in message
        assert nearest in message.partition(": unknown")[2] + message.partition(": no section")[2]

    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("optim.lr=fast", "optim.lr='fast'"),
            ("optim.lr=", "optim.lr=None"),
            ("optim.lr=[", "optim.lr='['"),
            ("optim.lr=yes", "optim.lr: True"),
            ("optim.lr=.nan", "optim.lr=nan"),
            ("optim.lr=.inf", "optim.lr=inf"),
            ("optim.lr=-1", "optim.lr=-1"),
            ("optim.lr.peak=3", "optim.lr={'peak': 3}"),
            ("trainer.updates=on", "trainer.updates: True"),
            ("trainer.updates=1e3x", "trainer.updates='1e3x'"),
            ("model.layers=12.5", "model.layers=12.5"),
            ("model.layers=0", "model.layers=0"),
            ("model.conv_bias=maybe", "model.conv_bias='maybe'"),
            ("model.conv_layers=3", "model.conv_layers=3"),
            ("model.conv_layers=[[512, 10]]", "model.conv_layers.0"),
            ("schedule.kind=cosin", "schedule.kind='cosin'"),
            ("data.train=null", "data.train=None"),
            ("data.workers=-1", "data.workers=-1"),
            ("optim.betas=[0.9]", "optim.betas"),
            ("optim.groups=[{lr_scale: 2}]", "optim.groups.0.pattern"),
            ("optim.groups=[{pattern: '('}]", "optim.groups.0.pattern"),
            ("trainer.seed=-1", "trainer.seed=-1"),
            ("engine.name=zero", "engine.name='zero'"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_setting(self, override: str, named: str) -> None:
        assert named in error_of("base", override)

    @pytest.mark.parametrize("override", ["optim.lr", "=3", ".lr=3", "optim.=3", "optim..lr=3", ""])
    def test_an_override_without_its_form_is_refused(self, override: str) -> None:
        assert error_of("base", override) == f"{override}: an override has the form section.key=value"

    def test_a_section_set_to_a_number_is_refused(self) -> None:
        assert "optim.key=value" in error_of("base", "optim=3")

    def test_the_message_says_whether_file_or_override_is_wrong(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "optim: {lr: fast}\n")
        assert error_of(path) == error_of(path, "optim.eps=1e-8")
        assert error_of(path).startswith(f"{path}: optim.lr='fast'")
        assert error_of("base", "optim.lr=fast").startswith("override: optim.lr='fast'")
        assert load_config(path, ["optim.lr=1"]).optim.lr == 1.0


class TestSettingsThatContradictEachOther:
    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (["model.heads=7"], "heads=7 does not divide dim=768"),
            (["model.positional_groups=7"], "positional_groups=7"),
            (["model.conv_norm_groups=100"], "conv_norm_groups=100"),
            (["objective.codebooks=3"], "codebooks=3"),
            (["objective.target_projection=false", "objective.projection_dim=128"], "projection_dim=128"),
            (["objective.gumbel_end=3"], "gumbel_end=3"),
            (["data.min_seconds=20"], "min_seconds=20"),
            (["batch.max_seconds=10"], "data.max_seconds=15.625"),
            (["batch.concat=65"], "batch.concat=65"),
            (["batch.concat=many"], "batch.concat: many is neither auto nor a whole number from 1 on"),
            (["batch.concat=0"], "batch.concat: 0 is neither auto nor"),
            (["batch.max_seconds=2e5"], "batch.max_seconds=200000: a micro-batch has at most 2^31 - 1 samples"),
            (["trainer.updates=100"], "schedule.warmup_updates=32000 is above trainer.updates=100"),
            (["schedule.stages=[0.1, 0.2, 0.3]"], "stages=(0.1, 0.2, 0.3)"),
            (["schedule.kind=tri_stage", "schedule.final_ratio=0"], "final_ratio=0"),
        ],
    )
    def test_both_are_named(self, overrides: list[str], named: str) -> None:
        assert named in error_of("base", *overrides)


class TestSources:
    @pytest.mark.parametrize(
        ("name", "nearest"), [("bsae", "base"), ("base.yaml", "base"), ("conf/large-lv60.yaml", "large_lv60")]
    )
    def test_a_name_that_is_neither_file_nor_preset_names_the_nearest_preset(self, name: str, nearest: str) -> None:
        message = error_of(name)
        assert message.startswith(f"{name}: neither a file nor a preset; did you mean {nearest}?")
        assert all(preset in message for preset in PRESETS)

    def test_a_missing_file_and_a_folder_are_named(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "none.yaml" / "deeper.yaml"):
            assert error_of(path).startswith(f"{path}: neither a file nor a preset")

    def test_a_file_below_a_file_is_named(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "") / "deeper.yaml"
        assert error_of(path).startswith(f"{path}: neither a file nor a preset")

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"RIFF\x24\x00\x00\x00WAVE", bytes(range(256))])
    def test_a_binary_file_is_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        assert error_of(path).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        "text",
        [
            "- a\n- b\n",
            "just text",
            "optim: [\n",
            "optim:\n\tlr: 1\n",
            "optim: 3\n",
            "optim: {1: 2}\n",
            "1: 2\n",
            "true: {lr: 3}\n",
            "null: 3\n",
            "? [a, b]\n: 3\n",
            "optim: {lr: *a}\n",
            "preset: tinny\n",
            "preset: [tiny]\n",
            "presets: tiny\n",
            "!!python/object/apply:os.system [true]\n",
        ],
    )
    def test_yaml_that_holds_no_settings_is_refused_with_the_files_name(self, text: str, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, text)
        assert error_of(path).startswith(f"{path}: ")

    def test_an_unknown_preset_in_a_file_names_the_nearest(self, tmp_path: Path) -> None:
        assert "did you mean tiny?" in error_of(yaml_file(tmp_path, "preset: tinny\n"))


class TestTree:
    def test_settings_lists_every_key_with_type_and_default(self) -> None:
        rows = {key: (kind, default) for key, kind, default, _ in settings()}
        sections = {name: getattr(Config(), name) for name in Config.model_fields}
        assert list(rows) == [
            f"{name}.{key}" for name, section in sections.items() for key in type(section).model_fields
        ]
        assert all(kind for kind, _ in rows.values())
        for key, (_, default) in rows.items():
            assert load_config("base", [f"{key}={default}"]) == Config()

    def test_settings_types_are_words_that_a_user_knows(self) -> None:
        kinds = {key: kind for key, kind, _, _ in settings()}
        assert {
            "optim.lr": "float",
            "optim.max_norm": "float or null",
            "model.layers": "int",
            "model.max_frames": "int or null",
            "model.conv_bias": "bool",
            "schedule.kind": "cosine or linear or tri_stage",
            "data.train": "list",
            "optim.betas": "list",
        }.items() <= kinds.items()

    def test_it_cannot_be_changed_after_it_was_checked(self) -> None:
        with pytest.raises(ValidationError):
            Config().optim.lr = 0.0  # type: ignore[misc]

    def test_defaults_are_checked_too(self) -> None:
        def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
            found = [field.annotation for field in model.model_fields.values()]
            return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]

        assert all(section() == section.model_validate({}) for section in sections(Config))

    def test_the_dump_is_plain_yaml_without_tags(self) -> None:
        dumped = dump_config(load_config("base", ["data.train=a.jsonl"]))
        assert "!!" not in dumped
        assert list(yaml.safe_load(dumped)) == list(Config.model_fields)
        assert dump_config(OptimConfig()).startswith("lr: 0.0005")
