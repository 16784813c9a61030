"""Writes the hashes in tools/constraints.txt: edit the versions there, then run python tools/hash_constraints.py.

The hashes are those of the package index that pip is configured with, which needs PyPI's JSON API (PEP 691).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

CONSTRAINTS = Path(__file__).resolve().parents[1] / "tools" / "constraints.txt"
JSON = "application/vnd.pypi.simple.v1+json"
TARGETS = [(minor, machine) for minor in (11, 12, 13, 14) for machine in ("x86_64", "aarch64")]
"""CPython 3.x on Linux, as in tools/setup.sh."""


def with_hashes(text: str, index: str) -> str:
    """A constraints file with the hashes of this index in place of its own."""
    lines = [line.rstrip("\\ ") for line in text.splitlines() if not line.startswith("    --hash=")]
    with ThreadPoolExecutor(8) as pool:
        return "".join(pool.map(lambda line: renewed(line, index), lines))


def renewed(line: str, index: str) -> str:
    """A comment as it is, or a pin with its hashes."""
    if not line or line.startswith("#"):
        return f"{line}\n"
    pin = Requirement(line)
    return " \\\n    --hash=sha256:".join([line, *hashes(pin, files(pin, index))]) + "\n"


def index_url() -> str:
    """The package index that pip is configured with."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    )
    return os.environ.get("PIP_INDEX_URL") or asked.stdout.strip() or "https://pypi.org/simple"


def files(pin: Requirement, index: str) -> list[dict[str, Any]]:
    """The files of all versions of a package, as the index lists them."""
    url = f"{index.rstrip('/')}/{canonicalize_name(pin.name)}/"
    try:
        with urlopen(Request(url, headers={"Accept": JSON}), timeout=60) as answer:
            return json.load(answer)["files"]
    except (OSError, ValueError) as error:
        sys.exit(f"{pin}: {url}: {error}")


def hashes(pin: Requirement, files: list[dict[str, Any]]) -> list[str]:
    """The hashes of all wheels that a target can install, and of the source distribution if a target has no wheel."""
    candidates, wanted = list(of_version(pin, files)), set()
    for target in TARGETS:
        if pin.marker is None or pin.marker.evaluate(environment(*target)):
            wheels = {sha256 for sha256, tags in candidates if any(installs(tag, *target) for tag in tags)}
            usable = wheels or {sha256 for sha256, tags in candidates if not tags}
            if not usable:
                sys.exit(f"{pin}: the index has no file for Python 3.{target[0]} on {target[1]}")
            wanted |= usable
    return sorted(wanted)


def of_version(pin: Requirement, files: list[dict[str, Any]]) -> Iterator[tuple[str, frozenset[Tag]]]:
    """The SHA-256 and the tags of each file of the pinned version; a source distribution has no tags."""
    for file in files:
        name, tags = file["filename"], frozenset[Tag]()
        try:
            if name.endswith(".whl"):
                _, version, _, tags = parse_wheel_filename(name)
            else:
                _, version = parse_sdist_filename(name)
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue  # old files, which pip does not install either
        if pin.specifier.contains(version, prereleases=True):
            yield file["hashes"]["sha256"], tags


def environment(minor: int, machine: str) -> dict[str, str]:
    """The values for environment markers that differ between targets."""
    version = f"3.{minor}"
    return {"python_version": version, "python_full_version": f"{version}.0", "platform_machine": machine}


def installs(tag: Tag, minor: int, machine: str) -> bool:
    """Whether wheels with this tag can be installed on a target."""
    on_platform = re.fullmatch(rf"any|(many)?linux.*_{machine}", tag.platform)
    return on_platform is not None and (tag.interpreter, tag.abi) in interpreters(minor)


@cache
def interpreters(minor: int) -> set[tuple[str, str]]:
    """The interpreter and ABI tags of the wheels that CPython 3.minor can install."""
    name, version = f"cp3{minor}", (3, minor)
    tags = chain(cpython_tags(version, [name], ["any"]), compatible_tags(version, name, ["any"]))
    return {(tag.interpreter, tag.abi) for tag in tags}


if __name__ == "__main__":
    CONSTRAINTS.write_text(with_hashes(CONSTRAINTS.read_text(), index_url()))
