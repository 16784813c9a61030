"""Completion in the shell: presets, files of settings, runs, checkpoints, and settings with their values.

Everything is found without importing torch, since a shell waits for it at every press of Tab.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

RUNS = Path("exp")  # the default folder of `train`
IN_BASH = "complete_bash"
VARIABLE = "_W2VSCALE_COMPLETE"  # how the shell asks for a completion; see Typer


def sources(incomplete: str) -> list[str]:
    """Complete CONFIG: presets, YAML files and the folders of runs."""
    from w2vscale.config import preset_names

    return [*_starting(preset_names(), incomplete), *_paths(incomplete, settings=True)]


def checkpoints(incomplete: str) -> list[str]:
    """Complete CHECKPOINT: runs and their checkpoints."""
    return list(_paths(incomplete, settings=False))


def settings(context: typer.Context, incomplete: str) -> list[str]:
    """Complete SECTION.KEY=VALUE. Nothing for a path, so that the shell completes it."""
    bash = os.environ.get(VARIABLE) == IN_BASH
    if bash and (key := _key_before_sign()) is not None:  # bash takes `=` for a word of its own
        value = "" if incomplete == "=" else incomplete
        return _starting(values(key), value)
    key, sign, value = incomplete.partition("=")
    if sign:
        return [f"{key}={each}" for each in _starting(values(key), value)]
    if "." not in incomplete:
        found = _starting([f"{section}." for section in dict.fromkeys(name.partition(".")[0] for name in names())], key)
        return found if len(found) != 1 else _starting([f"{name}=" for name in names()], key)
    found = _starting([f"{name}=" for name in names()], key)
    # A second candidate, which is only shown: bash adds a blank to one that is alone.
    return [*found, f"{found[0]}VALUE"] if bash and len(found) == 1 else found


def names() -> list[str]:
    """Return all settings by name, those of every objective too."""
    from w2vscale.config import Config

    found = []
    for section, field in Config.model_fields.items():
        keys = objective_settings() if section == "objective" else getattr(field.annotation, "model_fields", ())
        found += [f"{section}.{key}" for key in keys]
    return found


@cache
def objective_settings() -> list[str]:
    """Return the names of the settings of all objectives, from their source: importing it takes torch."""
    package = find_spec("w2vscale")
    assert package is not None and package.submodule_search_locations
    found: dict[str, None] = {}
    for path in sorted(Path(package.submodule_search_locations[0], "objectives").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
                fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
                found |= {field.id: None for field in fields if isinstance(field, ast.Name)}
    return list(found)


def values(name: str) -> list[str]:
    """Return the values of a setting that has few; none of those of an objective."""
    from w2vscale.config import Config

    kind: Any = Config
    for key in name.split("."):
        if key not in getattr(kind, "model_fields", {}):
            return []
        kind = kind.model_fields[key].annotation
    return _choices(kind)


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if kind is NoneType:
        return ["null"]
    if get_origin(kind) is Literal:
        return [str(each) for each in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        found = [each for part in get_args(kind) for each in _choices(part)]
        return found if found != ["null"] else []
    return []


def _key_before_sign() -> str | None:
    """Return the setting whose value the cursor is in, in the words that bash made of the line; None if in none."""
    words = os.environ.get("COMP_WORDS", "").split()
    place = int(os.environ.get("COMP_CWORD", "0"))
    for sign in (place, place - 1):
        if 1 < sign < len(words) and words[sign] == "=":
            return words[sign - 1]
    return None


def _starting(candidates: list[str], incomplete: str) -> list[str]:
    return [each for each in candidates if each.startswith(incomplete)]


def _paths(incomplete: str, *, settings: bool) -> Iterator[str]:
    """Yield runs and checkpoints, or with `settings` YAML files and runs, whose path begins so."""
    folder = incomplete.rpartition("/")[0]
    places = [Path(folder or ("/" if incomplete.startswith("/") else "."))]
    if not folder and RUNS.name.startswith(incomplete):
        places.append(RUNS)
    for place in places:
        try:
            entries = sorted(place.iterdir())
        except OSError:
            continue
        for path in entries:
            wanted = (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()
            if settings:
                wanted |= path.suffix in (".yaml", ".yml")
            text = str(path)
            if (wanted or path.name == "checkpoints") and text.startswith(incomplete):
                yield f"{text}/" if path.name == "checkpoints" else text
