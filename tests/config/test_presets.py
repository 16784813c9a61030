"""The presets: published numbers of models and of training, and their YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

import w2vscale.config
from w2vscale.config import Config, ModelConfig, RegularizationConfig, dump_config, load_config, preset_names
from w2vscale.data.plan import length_of_series
from w2vscale.objectives import OBJECTIVES, resolve

PRESETS = (
    "tiny", "base", "fairseq_base", "base_prenorm", "large", "fairseq_large", "large_lv60", "fairseq_large_lv60",
    "xlsr_300m", "xlsr_1b", "xlsr_2b", "omni_3b", "omni_7b", "ctc_10min", "ctc_1h", "ctc_10h", "ctc_100h", "ctc_960h",
    "ctc_large_10min", "ctc_large_1h", "ctc_large_10h", "ctc_large_100h", "ctc_large_960h", "ctc_xlsr",
    "best_rq_base", "best_rq_tiny",
)  # fmt: skip
PUBLISHED = ("base", "large", "large_lv60", "xlsr_300m", "xlsr_1b", "xlsr_2b", "omni_3b", "omni_7b")
CONV_LAYERS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))

# fairseq's examples/wav2vec/config/pretraining, XLS-R (Babu et al. 2021) and, for Omnilingual, config.py of wav2vec2 in
# fairseq2: one column per name in PUBLISHED.
MODEL_NUMBERS = {
    "layers": (12, 24, 24, 24, 48, 48, 60, 128),
    "dim": (768, 1024, 1024, 1024, 1280, 1920, 2048, 2048),
    "ffn_dim": (3072, 4096, 4096, 4096, 5120, 7680, 8192, 8192),
    "heads": (12, 16, 16, 16, 16, 16, 16, 16),
    "conv_norm": ("group", "group", "layer", "layer", "layer", "layer", "layer", "layer"),
    "conv_bias": (False, False, True, True, True, True, True, True),
    "norm_first": (False, False, True, True, True, True, True, True),
    "normalize_waveform": (False, False, True, True, True, True, True, True),
    "codevector_dim": (256, 768, 768, 768, 1024, 1024, 1024, 1024),
    "projection_dim": (256, 768, 768, 768, 1024, 1024, 1024, 1024),
    "gumbel_start": (2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0),
    "gumbel_end": (0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
    "gumbel_decay": (0.999995,) * 8,
    "dropout": (0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "attention_dropout": (0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "input_dropout": (0.1, 0.1, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1),
    "feature_dropout": (0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "activation_dropout": (0.0,) * 8,
    "layerdrop": (0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "feature_grad_mult": (0.1, 0.03, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "diversity_weight": (0.1,) * 8,
    "feature_penalty_weight": (10.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "sampling_rate": (16_000,) * 8,
    "conv_layers": (CONV_LAYERS,) * 8,
    "conv_norm_groups": (512,) * 8,
    "conv_padding": (False,) * 8,
    "mask_trim": ("none",) * 8,
    "waveform_eps": (1e-7,) * 8,
    "positional_kernel": (128,) * 8,
    "positional_groups": (16,) * 8,
    "max_frames": (None,) * 8,
    "codebooks": (2,) * 8,
    "codebook_entries": (320,) * 8,
    "quantizer_input": ("features",) * 8,
    "target_projection": (True,) * 8,
    "negatives": (100,) * 8,
    "logit_temperature": (0.1,) * 8,
    "mask_probability": (0.65,) * 8,
    "mask_length": (10,) * 8,
    "mask_min_spans": (2,) * 8,
}

# fairseq's examples/wav2vec/config/finetuning/{base,vox}_*.yaml and xlsr/config/finetune.yaml: peak learning rate,
# updates, updates with a frozen encoder, share of masked frames and channels, LayerDrop, samples per GPU, GPUs times
# update_freq.
FINE_TUNING_NUMBERS = {
    "ctc_10min": (5e-5, 13_000, 10_000, 0.65, 0.25, 0.1, 3_200_000, 2 * 4),
    "ctc_1h": (5e-5, 13_000, 10_000, 0.65, 0.25, 0.1, 3_200_000, 2 * 4),
    "ctc_10h": (5e-5, 20_000, 10_000, 0.65, 0.5, 0.05, 3_200_000, 2 * 4),
    "ctc_100h": (3e-5, 80_000, 0, 0.65, 0.5, 0.1, 3_200_000, 2 * 4),
    "ctc_960h": (1e-4, 320_000, 0, 0.5, 0.1, 0.1, 3_200_000, 8),
    "ctc_large_10min": (1e-4, 13_000, 10_000, 0.65, 0.25, 0.1, 1_280_000, 4 * 5),
    "ctc_large_1h": (3e-4, 13_000, 10_000, 0.75, 0.25, 0.1, 1_280_000, 4 * 5),
    "ctc_large_10h": (1e-4, 20_000, 10_000, 0.75, 0.25, 0.1, 1_280_000, 4 * 5),
    "ctc_large_100h": (3e-5, 80_000, 10_000, 0.5, 0.5, 0.1, 1_280_000, 4 * 5),
    "ctc_large_960h": (3e-5, 320_000, 10_000, 0.5, 0.25, 0.1, 1_280_000, 24),
    "ctc_xlsr": (3e-4, 13_000, 10_000, 0.75, 0.25, 0.1, 1_280_000, 4 * 5),
}

# Peak learning rate, updates, samples of a crop, samples per GPU, GPUs.
TRAINING_NUMBERS = {
    "base": (5e-4, 400_000, 250_000, 1_400_000, 64),
    "large": (3e-4, 600_000, 320_000, 1_200_000, 128),
    "large_lv60": (1e-3, 1_000_000, 320_000, 1_200_000, 128),
}

# Our own BASE, where it differs from the published one.
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


def settings_of(name: str) -> dict[str, Any]:
    """Model, regularisation and objective of a preset."""
    config, objective = resolve(load_config(name))
    return dict(config.model) | dict(config.regularization) | dict(objective.settings)


PRESET_FILES = Path(w2vscale.config.__file__).parent / "presets"
ALL_OURS = "All numbers are ours."
SOURCE = re.compile(r"(ours|[\w.]+\.(?:yaml|py|md|json|pt)|[A-Z]\w+ et al\. \d{4})\b")


def comments_of(text: str) -> str:
    """The comment lines at the beginning of a file."""
    return "\n".join(
        line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())
    )


def lines_with_numbers(text: str) -> list[str]:
    """The lines of YAML on which a number is set, or on which a list of numbers ends."""
    found = set()
    for node in walk(yaml.compose(text)):
        if isinstance(node, yaml.ScalarNode) and not isinstance(as_number(node.value), str):
            found.add(node.end_mark.line)
    lines = text.splitlines()
    return [lines[number] for number in sorted(found)]


def as_number(value: str) -> float | str:
    """The number that YAML or Python reads, or the text."""
    for read in (yaml.safe_load, float):
        with suppress(ValueError, yaml.YAMLError):
            found = read(value)
            if isinstance(found, int | float) and not isinstance(found, bool):
                return float(found)
    return value


def walk(node: Any) -> Iterator[Any]:
    yield node
    for child in getattr(node, "value", ()) if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            yield from walk(part)


def test_a_number_without_a_source_is_found() -> None:
    text = "# A file.\noptim: {lr: 1.0, kind: a} # ours\nbatch:\n  sizes: [1,\n    2]\n  eps: 1e-7\n  name: b2\n"
    text += "  a: 0x7d\n  b: .inf\n"
    numbers = ["  sizes: [1,", "    2]", "  eps: 1e-7", "  a: 0x7d", "  b: .inf"]
    assert lines_with_numbers(text) == ["optim: {lr: 1.0, kind: a} # ours", *numbers]


class TestPresets:
    def test_all_are_listed_in_order(self) -> None:
        assert preset_names() == list(PRESETS)

    @pytest.mark.parametrize("column", range(len(PUBLISHED)), ids=PUBLISHED)
    def test_models_have_the_published_numbers(self, column: int) -> None:
        found = settings_of(PUBLISHED[column])
        expected = {key: values[column] for key, values in MODEL_NUMBERS.items()}
        assert {key: found[key] for key in expected} == expected

    @pytest.mark.parametrize("name", FINE_TUNING_NUMBERS)
    def test_fine_tuning_has_the_published_numbers(self, name: str) -> None:
        config, objective = resolve(load_config(name))
        settings, schedule, regularization = objective.settings, config.schedule, config.regularization
        masks = (settings.mask_probability, settings.channel_mask_probability)
        updates = (config.trainer.updates, settings.freeze_encoder_updates)
        batch = (config.batch.max_seconds * config.model.sampling_rate, config.batch.micro_batches)
        found = (config.optim.lr, *updates, *masks, regularization.layerdrop, *batch)
        assert found == FINE_TUNING_NUMBERS[name]
        assert (schedule.kind, schedule.stages, schedule.initial_ratio, schedule.end) == (
            "tri_stage", (0.1, 0.4, 0.5), 0.01, 0.05,
        )  # fmt: skip
        assert (settings.mask_length, settings.mask_min_spans, settings.channel_mask_length) == (10, 2, 64)
        assert (config.optim.betas, config.optim.eps, config.optim.max_norm) == ((0.9, 0.98), 1e-8, None)
        assert regularization.feature_grad_mult == config.optim.weight_decay == settings.final_dropout == 0
        assert regularization.dropout == regularization.attention_dropout == regularization.input_dropout == 0
        assert regularization.activation_dropout == 0.1
        assert (config.trainer.best_metric, settings.mask_trim, settings.head_init) == ("wer", "none", "xavier")

    def test_base_is_the_default_of_all_settings(self) -> None:
        assert resolve(load_config("base"))[0] == resolve(Config())[0]

    @pytest.mark.parametrize("name", ["base", "large", "large_lv60"])
    def test_as_published_differs_from_ours_in_optimisation_and_masks_only(self, name: str) -> None:
        ours, theirs = (resolve(load_config(each))[0].model_dump() for each in (name, f"fairseq_{name}"))
        found = {
            f"{section}.{key}": theirs[section][key]
            for section in ours for key in ours[section] if ours[section][key] != theirs[section][key]
        }  # fmt: skip
        assert found == {
            "model.waveform_eps": 1e-5,
            "objective.mask_trim": "micro_batch",
            "optim.decay_vectors": True,
            "optim.max_norm": None,
            "schedule.kind": "linear",
            "schedule.first_step": 0,
        }

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_number_has_a_source(self, name: str) -> None:
        """A comment on its line starts with a file, a paper or `ours`; or the first lines say that all are ours."""
        text = (PRESET_FILES / f"{name}.yaml").read_text()
        sources = [SOURCE.match(line.partition(" # ")[2]) for line in lines_with_numbers(text)]
        if ALL_OURS in comments_of(text):
            assert not any(sources)
            return
        assert all(sources), [line for line, found in zip(lines_with_numbers(text), sources, strict=True) if not found]
        files = {found[1] for found in sources if found and found[1] != "ours"}
        assert all(re.search(rf"\b{re.escape(file)}", comments_of(text)) for file in files)  # the first lines say where

    @pytest.mark.parametrize("name", [one for one in PRESETS if not re.match("fairseq|ctc", one)])
    def test_the_first_lines_say_what_is_ours(self, name: str) -> None:
        comments = " ".join(comments_of((PRESET_FILES / f"{name}.yaml").read_text()).split())
        for part in ("cosine to 10 % of", "clipp", "at 1.0", "matrices", "masks", "BF16"):
            assert part in comments, part

    def test_every_setting_of_the_model_is_in_the_table(self) -> None:
        sections = (ModelConfig, RegularizationConfig, OBJECTIVES["wav2vec2"].Settings)
        settings = {key for section in sections for key in section.model_fields}
        assert settings - set(MODEL_NUMBERS) == {"embedding_norm", "name"}

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

    @pytest.mark.parametrize("name", PRESETS)
    def test_forwards_on_a_gpu_are_long(self, name: str) -> None:
        """A series lasts at least 300 seconds, as far as a micro-batch is filled (to 85 %)."""
        batch = load_config(name).batch
        assert batch.concat == "auto"
        length = length_of_series(batch)
        assert length == 1 if "tiny" in name else 0.85 * batch.max_seconds * length >= 300

    def test_base_prenorm_has_every_number_of_its_description(self) -> None:
        found = settings_of("base_prenorm")
        assert {key: found[key] for key in BASE_PRENORM_NUMBERS} == BASE_PRENORM_NUMBERS

    @pytest.mark.parametrize("name", [one for one in PRESETS if not re.match("fairseq|ctc|.*tiny", one)])
    def test_optimisation_is_adamw_with_cosine_clipping_and_bf16(self, name: str) -> None:
        config = load_config(name)
        assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)
        assert (config.schedule.kind, config.schedule.warmup_updates) == ("cosine", 32_000)
        assert (config.schedule.end, config.optim.max_norm) == (0.1, 1.0)
        assert config.precision.compute == "bf16"

    @pytest.mark.parametrize("name", PRESETS)
    def test_dumping_and_loading_changes_nothing(self, name: str, tmp_path: Path) -> None:
        given = load_config(name, ["data.train=[a b.jsonl, 'c: d.jsonl', 'ü#1.jsonl']", "optim.eps=1e-9"])
        config, _ = resolve(given)
        dumped = dump_config(config)
        path = tmp_path / "run.yaml"
        path.write_text(dumped, encoding="utf-8")
        again, _ = resolve(load_config(path))
        assert again == config
        assert dump_config(again) == dumped
