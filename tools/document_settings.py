"""Writes the tables in docs/configuration.md and docs/hyperparameters.md: python tools/document_settings.py."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from w2vscale.config import in_yaml, preset_names
from w2vscale.objectives import all_settings, effective, load

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- The rest is written by tools/document_settings.py. -->\n"
OTHERS = ROOT / "tools" / "other_recipes.yaml"

# Sections and settings that decide what is learned. The others say how it is computed.
RECIPE = ("model", "regularization", "objective", "optim", "schedule", "precision")
RECIPE_SETTINGS = (
    "data.max_seconds", "data.min_seconds", "batch.max_seconds", "batch.micro_batches", "trainer.updates",
)  # fmt: skip
SIZES = ("large", "large_lv60", "xlsr_300m", "xlsr_1b", "xlsr_2b", "omni_3b", "omni_7b")
NO_RECIPE = (
    "model.max_frames", "objective.name", "objective.vocabulary", "objective.split", "objective.sentencepiece",
    "objective.max_unknown_fraction", "optim.groups", "optim.ema_decay", "precision.reduce",
)  # fmt: skip
ONE_KIND = {  # settings of the schedule that only these kinds have
    ("tri_stage",): ("schedule.initial_ratio", "schedule.stages"),
    ("cosine", "linear"): ("schedule.warmup_updates", "schedule.first_step"),
}


def settings_page() -> str:
    """A heading and a table with a row for each setting, for every section."""
    lines: list[str] = []
    for title, settings in all_settings().items():
        section, _, choice = title.partition(" with ")
        lines += [f"### {section}" + (f" with `{choice}`" if choice else ""), ""]
        rows = ((f"`{key}`", kind, f"`{default}`", meaning) for key, kind, default, meaning in settings)
        lines += [*table(("setting", "type", "default", "meaning"), rows), ""]
    return "\n".join(lines)


def hyperparameters_page() -> str:
    """Tables of three recipes in four toolkits, of our other sizes, and of the presets for fine-tuning."""
    bold = "Bold: differs from our preset."
    base = (
        f"{bold} model: that of patrickvonplaten/wav2vec2-base-v2. NVIDIA shortens the middle layers by 4 (Hourglass)."
    )
    large = f"{bold} model: that of the model that the user brings."
    other = f"{bold} absent: no such setting. Transformers trains another model: XLSR-53, on Turkish Common Voice."
    sections = (
        ("Pretraining BASE", base, four_toolkits("base", "fairseq_base")),
        ("Pretraining LARGE", large, four_toolkits("large_lv60", "fairseq_large_lv60")),
        ("Fine-tuning BASE with 100 hours", other, four_toolkits("ctc_100h", "ctc_100h", without=("model.",))),
        ("Pretraining other sizes", "What differs from `base`.", other_sizes()),
        ("Fine-tuning", "The presets. Their other settings are those of `ctc_100h`.", fine_tuning()),
    )
    return "\n".join(line for title, about, rows in sections for line in (f"## {title}", "", about, "", *rows, ""))


def four_toolkits(name: str, as_published: str, *, without: tuple[str, ...] = ()) -> list[str]:
    """The table of a recipe here and in three other toolkits. Each of them has a value for every setting."""
    ours = {key: value for key, value in recipe(name).items() if not key.startswith(without)}
    others = yaml.safe_load(OTHERS.read_text())[name]
    others = {name: {key: in_yaml(value) for key, value in found.items()} for name, found in others.items()}
    columns = [ours, recipe(as_published) | others["fairseq"], others["transformers"], others["nvidia"]]
    rows = [
        (f"`{key}`", *(text if text in (value, "model", "absent") else f"**{text}**" for text in texts))
        for key, value in ours.items()
        if (texts := [column[key] for column in columns])
    ]
    assert not (unknown := set().union(*others.values()) - set(ours)), f"{OTHERS}: unknown settings {unknown}"
    fairseq = "fairseq" if name == as_published else f"fairseq (`{as_published}`)"
    return table(("setting", f"ours (`{name}`)", fairseq, "Transformers", "NVIDIA"), rows)


def other_sizes() -> list[str]:
    """The settings in which the presets for pretraining other sizes differ from `base`."""
    ours, sizes = recipe("base"), {name: recipe(name) for name in SIZES}
    rows = []
    for key, value in ours.items():
        texts = [size[key] for size in sizes.values()]
        if set(texts) != {value}:
            rows.append((f"`{key}`", value, *texts))
    return table(("setting", "`base`", *(f"`{name}`" for name in sizes)), rows)


def fine_tuning() -> list[str]:
    """The table of the presets for fine-tuning."""
    rows = []
    for name in preset_names():
        config, objective = load(name)
        settings: Any = objective.settings
        if objective.vocabulary:
            masks = (settings.mask_probability, settings.channel_mask_probability, config.regularization.layerdrop)
            updates = (config.trainer.updates, settings.freeze_encoder_updates)
            update = f"{config.batch.micro_batches} × {config.batch.max_seconds:g} s"
            numbers = (f"{config.optim.lr:g}", *(f"{one:,}" for one in updates), *(f"{one:g}" for one in masks))
            rows.append((f"`{name}`", *numbers, update))
    heads = ("preset", "peak lr", "updates", "frozen", "frames masked", "channels masked", "LayerDrop", "an update")
    return table(heads, rows)


def recipe(preset: str) -> dict[str, str]:
    """The hyper-parameters of a preset, as YAML by their keys."""
    found, config = {}, load(preset)[0]
    unused = {name for kinds, names in ONE_KIND.items() if config.schedule.kind not in kinds for name in names}
    for section, values in effective(config).items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if (section in RECIPE and name not in NO_RECIPE and name not in unused) or name in RECIPE_SETTINGS:
                found[name] = in_yaml(value)
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


PAGES = {"configuration.md": settings_page, "hyperparameters.md": hyperparameters_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        path = ROOT / "docs" / name
        head = path.read_text().partition(MARK)[0]
        path.write_text(f"{head}{MARK}\n{page()}")
