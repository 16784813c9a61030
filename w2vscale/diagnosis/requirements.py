"""The versions that w2vscale requires: those in pyproject.toml or, where there is none, in the installed package."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

_CHECKOUT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@cache
def requirements(extra: str = "") -> dict[str, SpecifierSet]:
    """The range of versions of each package that `w2vscale[extra]` requires, and of "python".

    They are those of the checkout that runs, which may be newer than the installed package; empty if there is neither.
    """
    python, lines = _declared(extra)
    found = {"python": SpecifierSet(python)}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found[requirement.name] = requirement.specifier
    return found


def required(name: str, extra: str = "") -> str:
    """A package with its range of versions, for `pip install`."""
    return f"{name}{requirements(extra).get(name, '')}"


def reinstall(name: str, extra: str = "") -> str:
    """The command that repairs a package and installs what it lacks, but leaves other packages as they are."""
    return f"pip uninstall -y {name} && pip install '{required(name, extra)}'"


def fits(version: str, wanted: SpecifierSet) -> bool:
    """Whether a version is in a range. Builds such as 2.11.0a0+nv25 (in NVIDIA's containers) count as 2.11.0."""
    return wanted.contains(Version(version).base_version)


def installed_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _declared(extra: str) -> tuple[str, list[str]]:
    """The range of Python, and the required packages."""
    if _CHECKOUT.is_file():
        project = tomllib.loads(_CHECKOUT.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"] + project["optional-dependencies"].get(extra, [])
    if installed_version("w2vscale") is None:
        return "", []
    return metadata.metadata("w2vscale")["Requires-Python"], metadata.requires("w2vscale") or []
