"""Load a `Config` from a preset or YAML file and overrides, and write it back as YAML."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from w2vscale.config.tree import Config, ParameterGroupConfig, Section
from w2vscale.errors import UserError

PRESETS = resources.files("w2vscale.config") / "presets"

S = TypeVar("S", bound=Section)


def preset_names() -> list[str]:
    """Return the names of the presets in the package: pretraining by model size, then fine-tuning by hours."""
    order = ["tiny", "base", "base_prenorm", "large", "large_lv60", "xlsr_300m", "xlsr_1b", "xlsr_2b"]
    order += [f"ctc_{labels}" for labels in ("10min", "1h", "10h", "100h", "960h")]
    found = {entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml")}
    return [name for name in order if name in found] + sorted(found - set(order))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a preset or a YAML file, apply `section.key=value` overrides, and validate the result.

    A YAML file may start from a preset with a top-level line `preset: NAME`. A file or override that changes
    `objective.name` resets the section `objective` to the defaults of the new objective. The other settings of this
    section are validated by `w2vscale.objectives.build_objective`.

    Raises:
        UserError: the source does not exist, or a key or value is not valid. The message is one line.
    """
    tree = _read_source(str(source))
    _refuse_unknown_keys(tree, where=str(source))
    changes: dict[str, Any] = {}
    for override in overrides:
        change = _parse_override(override)
        _refuse_unknown_keys(change, where="override")
        changes = _merge(changes, change)
    tree = _on_top(tree, changes)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error, source=str(source), overrides=overrides)) from None


def dump_config(config: BaseModel) -> str:
    """Return all settings as YAML, from which `load_config` gets the same `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def _read_source(source: str) -> dict[str, Any]:
    if source in preset_names():
        return _parse_yaml((PRESETS / f"{source}.yaml").read_text(), where=f"preset {source}")
    path = Path(source)
    try:
        tree = _parse_yaml(path.read_text(), where=source)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        hint = _nearest(path.stem, preset_names())
        raise UserError(f"{source}: neither a file nor a preset{hint} (presets: {', '.join(preset_names())})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as a configuration: {error}") from None
    preset = tree.pop("preset", None)
    if preset is None:
        return tree
    if preset not in preset_names():
        raise UserError(f"{source}: preset: {preset}: unknown{_nearest(str(preset), preset_names())}")
    return _on_top(_read_source(preset), tree)


def _parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected sections with settings, got a {type(tree).__name__}")
    # YAML gives None for a section whose settings are all commented out.
    return {str(name): section for name, section in tree.items() if section is not None}


def _parse_override(override: str) -> dict[str, Any]:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"{override}: an override has the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    return dict(tree)


def _on_top(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `other` into `base`, dropping the objective settings of `base` if `other` names another objective."""
    below, above = base.get("objective"), other.get("objective")
    if isinstance(below, Mapping) and isinstance(above, Mapping) and "name" in above:
        default = Config.model_fields["objective"].get_default().name
        if above["name"] != below.get("name", default):
            base = {**base, "objective": {}}
    return _merge(base, other)


def _merge(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _refuse_unknown_keys(tree: Mapping[str, Any], *, where: str) -> None:
    """Raise UserError on an unknown section or setting, and suggest the nearest valid one (pydantic does not)."""
    sections = Config.model_fields
    valid = [f"{name}.{key}" for name in sections for key in _keys_of(name)]
    for name, section in tree.items():
        if name not in sections:
            given = f"{name}.{next(iter(section))}" if isinstance(section, Mapping) and section else name
            bare = [key for key in valid if given == name and key.endswith(f".{name}")]
            hint = f"; did you mean {bare[0]}?" if bare else _nearest(name, list(sections))
            raise UserError(f"{where}: {given}: no section named {name}{hint} (sections: {', '.join(sections)})")
        if not isinstance(section, Mapping):
            raise UserError(f"{where}: {name}: expected settings of the form {name}.key=value, got {section!r}")
        if _section_class(name).model_config.get("extra") == "allow":
            continue
        for key in section:
            if key not in _keys_of(name):
                hint = _nearest(f"{name}.{key}", [f"{name}.{other}" for other in _keys_of(name)], among=valid)
                hint = hint or f" ({name} has: {', '.join(_keys_of(name))})"
                raise UserError(f"{where}: {name}.{key}: unknown setting{hint}")


def parse_section(kind: type[S], values: Mapping[str, Any], *, name: str) -> S:
    """Validate the settings of section `name` with the class `kind`.

    Raises:
        UserError: a key or value is not valid. The message is one line.
    """
    valid = [f"{name}.{key}" for key in kind.model_fields]
    for key in values:
        if key not in kind.model_fields:
            hint = _nearest(f"{name}.{key}", valid) or f" ({name} has: {', '.join(kind.model_fields)})"
            raise UserError(f"{name}.{key}: unknown setting{hint}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        return _raise_first(error, name)


def _raise_first(error: ValidationError, section: str) -> NoReturn:
    first = error.errors()[0]
    key = ".".join([section, *map(str, first["loc"])])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        raise UserError(f"{key}: {message}")
    raise UserError(f"{key}={first['input']!r}: {message[0].lower() + message[1:]}")


def _section_class(section: str) -> type[Section]:
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation


def _keys_of(section: str) -> list[str]:
    return list(_section_class(section).model_fields)


def _nearest(name: str, candidates: Sequence[str], *, among: Sequence[str] = ()) -> str:
    """Return `; did you mean X?` for the closest candidate, or an empty string."""
    leaf = name.rsplit(".", 1)[-1]
    here = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
    anywhere = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed([*candidates, *among])}
    for by_leaf, cutoff in ((here, 0.75), (anywhere, 0.75), (here, 0.5)):
        if matches := difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=cutoff):
            return f"; did you mean {by_leaf[matches[0]]}?"
    return ""


def _one_line(error: ValidationError, *, source: str, overrides: Sequence[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    replaced = [override.partition("=")[0].strip() + "." for override in overrides]
    where = "override" if any(f"{key}.".startswith(path) for path in replaced) else source
    message = str(first["msg"]).removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    if first["type"] == "extra_forbidden":  # only parameter groups: keys of sections were checked before
        return f"{where}: {key}: unknown setting{_nearest(key, list(ParameterGroupConfig.model_fields))}"
    message = message[0].lower() + message[1:]
    return f"{where}: {key}={first['input']!r}: {message}"


def settings_of(kind: type[Section], name: str) -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every setting in a section, for the documentation."""
    default = kind()
    rows = []
    for key, field in kind.model_fields.items():
        value = getattr(default, key)
        shown = yaml.safe_dump(default.model_dump(mode="json")[key], default_flow_style=True, width=1000)
        rows.append(
            (
                f"{name}.{key}",
                _type_name(field.annotation),
                shown.removesuffix("...\n").strip() if value is not None else "null",
                field.description or "",
            )
        )
    return rows


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is None:
        return str(getattr(annotation, "__name__", annotation))
    if str(origin) == "typing.Literal":
        return " or ".join(str(value) for value in get_args(annotation))
    if origin in (types.UnionType,) or str(origin) == "typing.Union":
        return " or ".join(
            "null" if part is type(None) else _type_name(get_args(part)[0] if get_args(part) else part)
            for part in get_args(annotation)
        )
    if origin in (list, tuple):
        return "list"
    return _type_name(get_args(annotation)[0])
