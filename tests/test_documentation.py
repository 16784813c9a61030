"""The documentation is true: settings, presets, links and the README's commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tables_of_settings_are_current() -> None:
    pages = runpy.run_path(str(ROOT / "tools" / "document_settings.py"))["PAGES"]
    for name, page in pages.items():
        assert (ROOT / "docs" / name).read_text().endswith(page()), f"docs/{name}: run tools/document_settings.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    """Every `w2vscale COMMAND` that a page shows has a help page, and every script is there."""
    import typer

    from w2vscale.cli.app import app

    names = _commands(typer.main.get_command(app))
    for words in re.findall(r"^(?:`|)w2vscale ((?:[a-z_]+ ?)+)", page.read_text(), flags=re.MULTILINE):
        command = " ".join(words.split())
        assert any(f"{command} ".startswith(f"{name} ") for name in names), command
    for script in re.findall(r"(?:bash|python) ((?:recipes|tools)/[\w/.-]+)", page.read_text()):
        assert (ROOT / script.rstrip(".")).is_file(), script


def _commands(group, prefix: str = "") -> set[str]:
    found = set()
    for name, command in group.commands.items():
        path = f"{prefix}{name}"
        found |= _commands(command, f"{path} ") if hasattr(command, "commands") else {path}
    return found
