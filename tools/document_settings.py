"""Writes the tables of all settings into docs/configuration.md: python tools/document_settings.py."""

from pathlib import Path

from w2vscale.objectives import all_settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
MARK = "<!-- The rest is written by tools/document_settings.py. -->\n"


def tables() -> str:
    """A heading and a Markdown table with a row for each setting, for every section."""
    lines: list[str] = []
    for title, settings in all_settings().items():
        section, _, choice = title.partition(" with ")
        lines += [f"### {section}" + (f" with `{choice}`" if choice else ""), ""]
        lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{key}` | {kind} | `{default}` | {meaning} |" for key, kind, default, meaning in settings]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n{tables()}")
