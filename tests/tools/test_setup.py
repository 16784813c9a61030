"""tools/constraints.txt pins all packages with their hashes, and tools/setup.sh refuses a package with another hash."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.hash_constraints import CONSTRAINTS, TARGETS, environment

ROOT = Path(__file__).resolve().parents[2]
BUILT_WITH = ("setuptools", "hatchling", "editables")


def test_every_pin_has_hashes() -> None:
    for pin in re.split(r"\n(?=\w)", CONSTRAINTS.read_text())[1:]:
        assert re.fullmatch(r"[\w.-]+==\S+( ; \S+ \S+ \"\S+\")?( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", pin), pin


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"3.{target[0]}-{target[1]}")
def test_every_requirement_is_pinned(target: tuple[int, str]) -> None:
    """Except CUDA libraries, which only a CUDA build of torch requires."""
    markers = default_environment() | environment(*target)
    lines = [line.rstrip("\\ ") for line in CONSTRAINTS.read_text().splitlines() if re.match(r"\w", line)]
    pinned = {canonicalize_name(pin.name) for pin in map(Requirement, lines) if holds(pin, markers)}
    seen: set[tuple[str, str]] = set()
    remaining = [Requirement(name) for name in ("w2vscale[all]", *BUILT_WITH)]
    while remaining:
        requirement = remaining.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned or re.match("torch$|w2vscale$|nvidia|cuda|triton", name), f"{name} has no pin"
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                remaining += [one for one in required(name) if holds(one, markers | {"extra": extra})]
    assert len(seen) > 100


def required(name: str) -> list[Requirement]:
    """The requirements of a package; none if only another Python needs this package."""
    try:
        return [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return []


def holds(requirement: Requirement, markers: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(markers)


def wheel(folder: Path, name: str, text: str = "") -> str:
    """Make a wheel with one module; returns its pin."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return f"{name}==1.0 \\\n    --hash=sha256:{sha256(path.read_bytes()).hexdigest()}\n"


@pytest.mark.long
def test_setup_refuses_a_package_with_another_hash(tmp_path: Path) -> None:
    tools, wheels = tmp_path / "tools", tmp_path / "wheels"
    tools.mkdir()
    wheels.mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", tools)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tools / "constraints.txt").write_text(wheel(wheels, "setuptools") + wheel(wheels, "good") + wheel(wheels, "other"))

    def set_up() -> str:
        here = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        command, here["W2VSCALE_VENV"] = ["bash", str(tools / "setup.sh")], str(tmp_path / "venv")
        done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 1, done.stdout
        assert done.stderr.endswith("setup: the installation failed (see above); run this script again to retry\n")
        return done.stderr

    # The hashes are right, and the next thing to install is torch, which is not there.
    assert "No matching distribution found for torch" in set_up()
    wheel(wheels, "other", "print('changed')")
    refused = set_up()
    assert "DO NOT MATCH THE HASHES" in refused
    assert re.findall(r"^    (\S+) from", refused, re.MULTILINE) == ["other==1.0"]
    assert not list(tmp_path.glob("venv/lib/*/site-packages/other.py"))
