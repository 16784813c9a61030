"""Where settings come from: presets, YAML files and the files that they extend, and the folders of runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from w2vscale.config.tree import Config
from w2vscale.config.yaml_1_2 import load_yaml
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_text

PRESETS = Path(__file__).parent / "presets"
MOST_FILES = 100  # that one file extends, directly or through others


@dataclass(frozen=True)
class Layer:
    """The settings that one file states itself."""

    origin: str
    """The file or preset, after those that led to it: `run.yaml: extends common.yaml`."""
    tree: Mapping[str, Any]


def preset_names() -> list[str]:
    """Return the names of the presets: wav2vec 2.0 by model size, fine-tuning by hours, then other objectives."""
    order = ["tiny", "base", "fairseq_base", "base_prenorm", "large", "fairseq_large"]
    order += ["large_lv60", "fairseq_large_lv60", "xlsr_300m", "xlsr_1b", "xlsr_2b", "omni_3b", "omni_7b"]
    order += [f"ctc_{size}{labels}" for size in ("", "large_") for labels in ("10min", "1h", "10h", "100h", "960h")]
    order += ["ctc_xlsr"]
    found = {path.stem for path in PRESETS.glob("*.yaml")}
    return [name for name in order if name in found] + sorted(found - set(order))


def layers_of(source: str) -> list[Layer]:
    """Return what a preset, a YAML file or the folder of a run consists of. Later layers replace earlier ones.

    A file with `preset: NAME` starts from the preset. On top of it come the files of `extends`, in order, each with all
    that it starts from, and then its own settings. Raises UserError if one of them does not exist or is not valid, or a
    file extends itself. The message is one line that names the files that led to it.
    """
    layers: list[Layer] = []
    _collect(source, source, (), layers)
    return layers


def merged(layers: Iterable[Layer]) -> dict[str, Any]:
    """Return the settings of layers on top of each other."""
    return reduce(on_top, (layer.tree for layer in layers), {})


def _collect(named: str, origin: str, above: tuple[Path, ...], layers: list[Layer]) -> None:
    """Append the layers of a source. `above` are the files that extend it."""
    path = PRESETS / f"{named}.yaml" if named in preset_names() else Path(named)
    stored = path.is_dir()
    if stored:
        path = _in_folder(path, origin)
    if max(len(layers), len(above)) >= MOST_FILES:
        raise UserError(f"{origin}: extends more than {MOST_FILES} files")
    try:
        if (file := path.resolve()) in above:
            raise UserError(f"{origin}: extends itself")
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{origin}: neither a file nor a preset{_nearest_source(named)} (presets: {', '.join(preset_names())})"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the last one: a loop of links
        raise UserError(f"{origin}: cannot be read as a configuration: {error}") from None
    tree = _parse_yaml(text, where=origin)
    if not tree:
        raise UserError(f"{origin}: has no settings; to start from a preset, write for example: preset: base")
    preset, extended = tree.pop("preset", None), tree.pop("extends", [])
    if preset is not None:
        if preset not in preset_names():
            raise UserError(f"{origin}: preset: {preset}: unknown{nearest(str(preset), preset_names())}")
        _collect(preset, f"{origin}: preset {preset}", (*above, file), layers)
    if extended and (stored or path.with_name("train_state.json").is_file()):
        raise UserError(f"{origin}: extends: no run writes this; its config.yaml has all settings")
    for name in _names(extended, origin):
        base = name if name in preset_names() else str(path.parent / name)
        _collect(base, f"{origin}: extends {name}", (*above, file), layers)
    layers.append(Layer(origin, tree))


def _names(extended: object, origin: str) -> Sequence[str]:
    names = [extended] if isinstance(extended, str) else extended
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{origin}: extends: {extended!r:.100}: expected a YAML file, a preset, or a list of them")
    return names


def _nearest_source(source: str) -> str:
    """Return `; did you mean X?` for the path or preset that is closest to a source; "" if none is."""
    path, preset = nearest_path(source), nearest(Path(source).stem, preset_names())
    return path or preset if "/" in source or source.endswith((".yaml", ".yml")) else preset or path


def _in_folder(folder: Path, origin: str) -> Path:
    """Return the settings of a run or checkpoint. A run without a config.yaml has those of its newest checkpoint."""
    for place in ("", "checkpoints/latest", "latest"):
        if (file := folder / place / "config.yaml").is_file():
            return file
    raise UserError(
        f"{origin}: has no config.yaml; give the folder of a run or checkpoint, a YAML file, or a preset"
        f"{nearest_path(folder / 'config.yaml')}"
    )


def _parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_problem(error)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{where}: expected sections with settings, got a {type(tree).__name__}")
    # YAML gives None for a section whose settings are all commented out.
    return {name: section for name, section in (tree or {}).items() if section is not None}


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong with a file, in one line, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        tab = "a tab; indent with spaces" if "'\\t'" in error.problem else None
        return f"{place}: {tab or ' '.join(filter(None, (error.context, error.problem)))}"
    return " ".join(str(error).split())


def on_top(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `other` into `base`, dropping the objective settings of `base` if `other` names another objective."""
    below, above = base.get("objective"), other.get("objective")
    if isinstance(below, Mapping) and isinstance(above, Mapping) and "name" in above:
        default = Config.model_fields["objective"].get_default().name
        if above["name"] != below.get("name", default):
            base = {**base, "objective": {}}
    return merge(base, other)


def merge(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the settings of `other`, which replace those of the same name."""
    both = dict(base)
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(both.get(key), Mapping):
            both[key] = merge(both[key], value)
        else:
            both[key] = value
    return both


def nearest(name: str, candidates: Iterable[str], others: Iterable[str] = ()) -> str:
    """Return `; did you mean X?` for the candidate, or else the other, with the closest last part; "" if none is."""
    here = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    anywhere = {other.rpartition(".")[2]: other for other in reversed([*others])} | here
    for by_leaf, cutoff in ((here, 0.75), (anywhere, 0.75), (here, 0.5)):
        if matches := difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=cutoff):
            return f"; did you mean {by_leaf[matches[0]]}?"
    return ""
