"""Reads an HTML page with Python's parser, and checks that its elements are nested as they should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from w2vscale.analysis.report.page import write_report

VOID = {"meta", "input", "img", "col", "br"}


@dataclass
class Element:
    """An element with its attributes and the text in it."""

    tag: str
    attributes: dict[str, str | None]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text, with single spaces."""
        return " ".join("".join(self.parts).split())


class Page(HTMLParser):
    """All elements of a page in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self._open, [one.tag for one in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        assert len(dict(attrs)) == len(attrs), attrs
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        """Called by the parser."""
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        """Called by the parser."""
        for element in self._open:
            element.parts.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The elements with a tag and these attributes; a class is one of several."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            one
            for one in self.elements
            if one.tag == tag
            and all(value in (one.attributes.get(name) or "").split(" ") for name, value in wanted.items())
        ]

    def one(self, tag: str, **attributes: str) -> Element:
        """The only element with a tag and these attributes."""
        (found,) = self.all(tag, **attributes)
        return found

    def rows(self, label: str) -> list[list[str]]:
        """The cells of the table that is labelled so, with its heading."""
        rows: list[list[str]] = []
        inside = False
        for one in self.elements:
            if one.tag == "div" and one.attributes.get("role") == "region":
                inside = one.attributes.get("aria-label") == label
            elif inside and one.tag == "tr":
                rows.append([])
            elif inside and one.tag in ("th", "td"):
                rows[-1].append(one.text)
        return rows


def report(tmp_path: Path, *exps: Path, published: bool = False) -> Page:
    """The page of a report."""
    output = tmp_path / "report.html"
    write_report(exps, output, published=published)
    return Page(output.read_text(encoding="utf-8"))
