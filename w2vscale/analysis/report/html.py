"""Markup in which every plain text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

from w2vscale.terminal import visible

VOID = frozenset({"col", "img", "input", "meta"})  # elements without a closing tag


class Html(str):
    """Markup. Every other string is text, which `element` and `join` escape."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Escape a text for elements and quoted attributes. Control characters and bytes that are not UTF-8 are written
    out, because HTML cannot hold them."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(visible(text.encode(errors="backslashreplace").decode())))


def join(parts: Iterable[str]) -> Html:
    """Concatenate texts and markup."""
    return Html("".join(map(escape, parts)))


def element(tag: str, /, *children: str, **attributes: str | float | bool | None) -> Html:
    """Make an element. `class_="x"` stands for class="x", `aria_label` for aria-label; True is an attribute without a
    value, and None or False is none."""
    text = "".join(map(_attribute, attributes.items()))
    return Html(f"<{tag}{text}>" if tag in VOID else f"<{tag}{text}>{join(children)}</{tag}>")


def _attribute(given: tuple[str, str | float | bool | None]) -> str:
    name, value = given[0].rstrip("_").replace("_", "-"), given[1]
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(value if isinstance(value, str) else f"{value:g}")}"'


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, label: str, numbers: bool = False) -> Html:
    """Make a table that scrolls in a box of its own where it is too wide. The first cell of a row is its heading.

    `numbers`: align the other cells to the right.
    """
    head = element("tr", *(element("th", name, scope="col") for name in columns))
    body = []
    for first, *others in rows:
        body.append(element("tr", element("th", first, scope="row"), *(element("td", one) for one in others)))
    return scroll_box(
        element("table", element("thead", head), element("tbody", *body), class_="numbers" if numbers else None),
        label=label,
    )


def scroll_box(content: Html, *, label: str) -> Html:
    """Make a box that scrolls to the side, also with the keyboard."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def section(title: str, *content: str, name: str) -> Html:
    """Make a section with a heading to which the menu can link."""
    return element("section", element("h2", title, id=name), *content, aria_labelledby=name)
