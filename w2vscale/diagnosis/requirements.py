"""The versions that w2vscale requires: those in pyproject.toml or, where there is none, in the installed package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

_CHECKOUT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*\])?\s*\(?(?P<range>[<>=!~][^;)]*)?")
_BOUND = re.compile(r"\s*(>=|==|<)\s*([\d.]+)")

Fit = Literal["fits", "too old", "too new", "another version"]


@dataclass(frozen=True)
class Requirements:
    """Ranges of versions, such as ">=2.11,<2.14": of Python, and by package. "" is any version."""

    python: str
    packages: dict[str, str]
    optional: dict[str, str]


@cache
def requirements() -> Requirements:
    """Those of the checkout that runs, which need not be the installed package; empty if there is neither."""
    if (project := _project_of_checkout()) is not None:
        extras: dict[str, list[str]] = project.get("optional-dependencies", {})
        optional = [requirement for extra in extras.values() for requirement in extra]
        return Requirements(project["requires-python"], _ranges(project["dependencies"]), _ranges(optional))
    try:
        installed = metadata.distribution("w2vscale")
    except metadata.PackageNotFoundError:
        return Requirements("", {}, {})
    lines = installed.requires or []
    needed = _ranges(line for line in lines if "extra ==" not in line)
    return Requirements(
        installed.metadata["Requires-Python"] or "", needed, _ranges(line for line in lines if "extra ==" in line)
    )


def fit(version: str, wanted: str) -> Fit:
    """Compare a version with a range of >=, < and == parts. Local parts of a version, such as +cpu, do not count."""
    for sign, bound in _BOUND.findall(wanted):
        place = _compared(version, bound)
        if sign == "==" and place != 0:
            return "another version"
        if sign == ">=" and place < 0:
            return "too old"
        if sign == "<" and place >= 0:
            return "too new"
    return "fits"


def installed_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _project_of_checkout() -> dict[str, Any] | None:
    try:
        project: dict[str, Any] = tomllib.loads(_CHECKOUT.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return project if project.get("name") == "w2vscale" else None


def _ranges(lines: Iterable[str]) -> dict[str, str]:
    matches = [_REQUIREMENT.match(line) for line in lines]
    return {found["name"]: (found["range"] or "").strip() for found in matches if found}


def _compared(version: str, bound: str) -> int:
    """-1, 0 or 1 if a version is below, equal to or above a bound. 2.11 equals 2.11.0."""
    numbers = [list(map(int, re.findall(r"\d+", re.split(r"[+a-zA-Z]", text)[0]))) for text in (version, bound)]
    for mine, other in zip_longest(*numbers, fillvalue=0):
        if mine != other:
            return -1 if mine < other else 1
    return 0
