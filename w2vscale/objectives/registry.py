"""`OBJECTIVES` lists the training objectives; building the one that the settings select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from w2vscale.config import Config, in_yaml, load_config, parse_section, settings_of
from w2vscale.errors import UserError
from w2vscale.models.layers import compute_dtype
from w2vscale.objectives.base import Objective
from w2vscale.objectives.best_rq import BestRq
from w2vscale.objectives.contrastive import Contrastive
from w2vscale.objectives.ctc import Ctc
from w2vscale.objectives.settings import effective, with_settings

OBJECTIVES: dict[str, type[Objective]] = {
    "wav2vec2": Contrastive,
    "ctc": Ctc,
    "best_rq": BestRq,
}


def load(source: str | Path, overrides: Sequence[str] = (), *, new: bool = True) -> tuple[Config, Objective]:
    """Load settings with `config.load_config`, validate those of the objective too, and `resolve` them.

    Unless they are those of a checkpoint (`new=False`), also check that a model can be trained with them.
    Raises UserError if the source does not exist, a key or value is not valid, or a file that the objective needs
    cannot be read. The message is one line.
    """
    kinds = {name: kind.Settings for name, kind in OBJECTIVES.items()}
    config, objective = resolve(load_config(source, overrides, objectives=kinds))
    if new:
        objective.settings.check_new()
    return config, objective


def build_objective(config: Config) -> Objective:
    """Build the objective that `objective.name` selects. Reads the files that its settings name.

    Raises UserError if there is no such objective or one of its settings is not valid. The message is one line.
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        raise UserError(f"objective.name={name}: unknown objective (objectives: {', '.join(OBJECTIVES)})")
    kind = OBJECTIVES[name]
    settings = parse_section(kind.Settings, config.objective.model_dump(), name="objective")
    return kind(settings, config.model, config.regularization, compute_dtype(config.precision))


def resolve(config: Config) -> tuple[Config, Objective]:
    """Build the objective, and complete the settings with its defaults and the contents of the files they name."""
    objective = build_objective(config)
    return with_settings(config, objective.settings), objective


@dataclass(frozen=True)
class Difference:
    """A setting in which several sources differ, with its value in each of them as YAML; "" where it does not exist."""

    key: str
    values: tuple[str, ...]
    description: str


def differing(configs: Sequence[Config]) -> list[Difference]:
    """Return every setting in which resolved settings differ. All defaults count."""
    everything = [effective(config) for config in configs]
    rows = []
    for section, default in Config():
        theirs = [settings[section] for settings in everything]
        fields = dict(type(default).model_fields)
        if section == "objective":
            for config in configs:
                fields = {**OBJECTIVES[config.objective.name].Settings.model_fields, **fields}
        for key in dict.fromkeys(key for values in theirs for key in values):
            shown = tuple(in_yaml(values[key]) if key in values else "" for values in theirs)
            if len(set(shown)) > 1:
                rows.append(Difference(f"{section}.{key}", shown, fields[key].description or ""))
    return rows


def differences(one: str | Path, other: str | Path) -> list[tuple[str, str, str, str]]:
    """Return (key, value of `one`, value of `other`, description) of every setting in which two sources differ.

    The sources are presets, files or folders of runs, as for `load`, and all defaults count. A setting that only one of
    two objectives has is empty for the other. UserError as for `load`.
    """
    found = differing([load(source, new=False)[0] for source in (one, other)])
    return [(row.key, row.values[0], row.values[1], row.description) for row in found]


def all_settings() -> dict[str, list[tuple[str, str, str, str]]]:
    """Return (key, type, default, description) of every setting, by section title, for the documentation."""
    tables = {}
    for section, default in Config():
        if section == "objective":
            for name, kind in OBJECTIVES.items():
                tables[f"{section} with objective.name={name}"] = settings_of(kind.Settings, section)
        else:
            tables[section] = settings_of(type(default), section)
    return tables
