"""Load a `Config` from a preset or YAML file and overrides, and write it back as YAML."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, create_model

from w2vscale.config.section import Section
from w2vscale.config.sources import Layer, layers_of, merge, merged, nearest, on_top
from w2vscale.config.tree import Config, ObjectiveConfig
from w2vscale.config.yaml_1_2 import dump_yaml, load_yaml
from w2vscale.errors import UserError
from w2vscale.storage.urls import Url

S = TypeVar("S", bound=Section)

# For values in messages: an alias of YAML can repeat a value exponentially often.
VALUES = reprlib.Repr()
VALUES.maxlevel, VALUES.maxlist, VALUES.maxdict, VALUES.maxstring, VALUES.maxlong = 4, 40, 40, 200, 40


def load_config(
    source: str | Path, overrides: Sequence[str] = (), *, objectives: Mapping[str, type[Section]] | None = None
) -> Config:
    """Load a preset, a YAML file or a run, apply `section.key=value` overrides, and validate the result.

    The folder of a run or checkpoint stands for the config.yaml in it. A YAML file may start from a preset and from
    other files with the top-level lines `preset: NAME` and `extends: FILE`: see `layers_of`. A file or override that
    changes `objective.name` resets the section `objective` to the defaults of the new objective. This section is
    validated only with `objectives`, the settings class of each objective by name: see `w2vscale.objectives.load`.

    Raises UserError if the source does not exist, or a key or value is not valid. The message is one line.
    """
    _check_form(overrides)
    layers = layers_of(str(source))
    below = merged(layers)
    changes = _changes(overrides, below, Config)
    kind = Config
    if objectives is not None:
        kind = _config_class(on_top(below, changes), objectives)
        changes = _changes(overrides, below, kind)  # now that the types of the settings of the objective are known
    tree = on_top(below, changes)
    try:
        kind.model_validate(tree)  # checks more than `Config`, but adds the defaults of the objective
        return Config.model_validate(tree)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        replaced = [override.partition("=")[0].strip() for override in overrides]
        replaced += changes.keys() - Config.model_fields.keys()
        problem = first_problem(error, kind)
        where = "override" if any(_is_at_fault(path, key, problem) for path in replaced) else _origin(layers, key)
        raise UserError(f"{where}: {problem}") from None


def _origin(layers: Sequence[Layer], key: str) -> str:
    """Return the origin of the last layer that states `key`, or else that of the file itself."""
    for layer in reversed(layers):
        value: Any = layer.tree
        for part in key.split("."):
            if not (isinstance(value, Mapping) and part in value):
                break
            value = value[part]
        else:
            return layer.origin
    return layers[-1].origin


def _is_at_fault(path: str, key: str, problem: str) -> bool:
    """Whether the override of `path` may have caused a problem with `key`."""
    if f"{key}.".startswith(f"{path}."):
        return True
    # A check of several settings has the key of their section, or none, and names them in its message.
    setting = ".".join(path.split(".")[:2])
    name = re.escape(setting.removeprefix(f"{key}."))
    return path.startswith(f"{key}." if key else "") and re.search(rf"\b{name}\b", problem) is not None


def _config_class(tree: Mapping[str, Any], objectives: Mapping[str, type[Section]]) -> type[Config]:
    """Return a `Config` class that also validates the settings of the objective that `tree` names."""
    default = Config.model_fields["objective"].get_default().name
    name = _objective_in(tree)
    kind = objectives.get(name) if isinstance(name, str) else None
    if kind is None:
        names: Any = Literal.__getitem__(tuple(objectives))
        kind = create_model("ObjectiveConfig", __base__=ObjectiveConfig, name=(names, default))
    return create_model("Config", __base__=Config, objective=(kind, kind()))


def _objective_in(tree: Mapping[str, Any]) -> Any:
    section, default = tree.get("objective", {}), Config.model_fields["objective"].get_default().name
    return section.get("name", default) if isinstance(section, Mapping) else default


def objective_named(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Return `objective.name` of a source with overrides, as for `load_config`, before anything is validated."""
    _check_form(overrides)
    below = merged(layers_of(str(source)))
    return _objective_in(on_top(below, _changes(overrides, below, Config)))


def dump_config(config: BaseModel) -> str:
    """Return all settings as YAML, from which `load_config` gets the same `Config`."""
    return dump_yaml(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def _check_form(overrides: Sequence[str]) -> None:
    for override in overrides:
        path, separator, _ = override.partition("=")
        if not separator or not all(path.strip().split(".")):
            blanks = ", without blanks around =" if re.search(r"\s=|=\s", " ".join(overrides)) else ""
            raise UserError(f"{override}: an override has the form section.key=value{blanks}")
        if path.encode(errors="replace").decode() != path:
            raise UserError(f"override: {override!r}: the name of this setting is not UTF-8")


def _changes(overrides: Sequence[str], below: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return what the overrides of `below` change, with values as the types of the settings in `kind` demand."""
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = merge(changes, _parse_override(override, kind))
    # An override must not hide that a section of the file is not a section.
    return {name: change for name, change in changes.items() if isinstance(below.get(name, {}), Mapping)}


def _parse_override(override: str, kind: type[Config]) -> dict[str, Any]:
    path, _, text = override.partition("=")
    keys = path.strip().split(".")
    # A blank before `=` shows that the one after it is not part of a path.
    text = text if path == path.rstrip() else text.strip()
    try:
        value = _value(text, _type_of(keys, kind))
    except UserError as error:
        raise UserError(f"override: {'.'.join(keys)}: {error}") from None
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _type_of(keys: Sequence[str], kind: Any) -> Any:
    """Return the type of the setting that is called `keys` in a tree of pydantic models; None if there is none."""
    for key in keys:
        if key not in getattr(kind, "model_fields", {}):
            return None
        kind = kind.model_fields[key].annotation
    return kind


def _value(text: str, kind: Any) -> Any:
    """Read the value of an override: a path or free text literally, all else as YAML, or as text if it is not YAML.

    A list of paths or texts is YAML, unless a file has this name. `null` stands for no path or text.
    """
    if _is_text(kind):
        plain = text.strip()
        if not plain:
            raise UserError("has no value; is a variable of the shell not set?")
        takes_list = any(get_origin(each) is list for each in (kind, *get_args(kind)))
        is_list = takes_list and plain.startswith("[") and plain.endswith("]") and not os.path.lexists(text)
        if plain != "null" and not is_list:
            return text
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _is_text(kind: Any) -> bool:
    """Whether a setting of this type is a path or free text, a list of them, or null."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return all(_is_text(each) for each in arguments if each is not NoneType)
    if origin in (Annotated, list):
        return _is_text(arguments[0])
    return kind in (str, Path, Url)


def parse_section(kind: type[S], values: Mapping[str, Any], *, name: str) -> S:
    """Validate the settings of section `name` with the class `kind`. UserError if a key or value is not valid."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(first_problem(error, kind, name)) from None


def first_problem(error: ValidationError, kind: type[BaseModel], section: str = "") -> str:
    """Return the first problem that pydantic found in a `kind`, as one line: `section.key=value: what is wrong`.

    An unknown key comes with the nearest valid one, which pydantic does not name.
    """
    first = error.errors()[0]
    place = [*filter(None, [section]), *map(str, first["loc"])]
    key, message, value = ".".join(place), first["msg"].removeprefix("Value error, "), first["input"]
    whole = issubclass(kind, Config)
    if whole and len(place) == 1 and first["type"] == "model_type":
        return f"{key}: expected settings of the form {key}.key=value, got {VALUES.repr(value)}"
    if whole and len(place) == 1 and first["type"] == "extra_forbidden":
        return _unknown_section(key, value, kind)
    if first["type"] == "extra_forbidden":
        parent, valid = ".".join(place[:-1]), keys_beside(kind, first["loc"])
        others = _all_keys(kind) if whole else []
        hint = nearest(key, [f"{parent}.{name}" for name in valid], others) or f" ({parent} has: {', '.join(valid)})"
        return f"{key}: unknown setting{hint}"
    if first["type"] == "value_error" or not key:
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}={VALUES.repr(value)}: {message}"


def _unknown_section(name: str, value: object, kind: type[BaseModel]) -> str:
    if (section := name.partition(".")[0]) in Config.model_fields and section != name:
        key = name.partition(".")[2]
        return (
            f"{name}: in a file, a section has its settings below it: write {section}: and below it, indented, {key}:"
        )
    given = f"{name}.{next(iter(value))}" if isinstance(value, Mapping) and value else name
    bare = [key for key in _all_keys(kind) if given == name and key.endswith(f".{name}")]
    hint = f"; did you mean {bare[0]}?" if bare else nearest(name, Config.model_fields)
    return f"{given}: no section named {name}{hint} (sections: {', '.join(Config.model_fields)})"


def _all_keys(kind: type[BaseModel]) -> list[str]:
    return [f"{name}.{key}" for name in kind.model_fields for key in keys_beside(kind, (name, ""))]


def keys_beside(kind: Any, loc: Sequence[int | str]) -> list[str]:
    """Return the valid keys at the place `loc` in a tree of pydantic models."""
    for part in loc[:-1]:
        if isinstance(part, str):
            annotation = kind.model_fields[part].annotation
            kind = next(each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields"))
    return [name for field, info in kind.model_fields.items() for name in (info.alias, field) if name]


def settings_of(kind: type[Section], name: str) -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every setting in a section, for the documentation."""
    rows = []
    for (key, field), value in zip(kind.model_fields.items(), kind().model_dump(mode="json").values(), strict=True):
        rows.append((f"{name}.{key}", _type_name(field.annotation), in_yaml(value), field.description or ""))
    return rows


def in_yaml(value: object) -> str:
    """Return a plain value as one line of YAML."""
    return dump_yaml(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").rstrip("\n")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _type_name(part) for part in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    return "list" if origin in (list, tuple) else str(annotation.__name__)
