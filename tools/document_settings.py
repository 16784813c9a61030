"""Writes the table of all settings into docs/configuration.md: python tools/document_settings.py."""

from pathlib import Path

from w2vscale.config.load import settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
MARK = "<!-- The rest is written by tools/document_settings.py. -->\n"


def table() -> str:
    """A Markdown table with a row for each setting."""
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    rows += [f"| `{key}` | {kind} | `{default}` | {meaning} |" for key, kind, default, meaning in settings()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n{table()}")
