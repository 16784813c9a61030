"""Values and changes of files that break programs, for hypothesis to draw from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

HALF_A_PAIR = "\ud800"  # not a character; Python also has such halves for bytes of arguments that are not UTF-8
ODD_NUMBERS = [0, -1, 1, 2, 7, 3.5, 1e-9, 1e9, 1e308, -1e308, math.nan, math.inf, -math.inf, 2**31, 2**64, 10**400]
ODD_TEXTS = ["", " ", "-", "\0", "a\nb", "$(touch marker)", "$\\frac$", "../x", "/", HALF_A_PAIR, "𝄞", "x" * 5000]
ODD_BYTES = [b"", b"\0", b"\xff", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 9999, b"{" * 9999, b'"\\ud800"']
BOMB = ", ".join(["a: &a0 [x, x]", *(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 40))])

odd_values = st.recursive(
    st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS, None, True, False]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ODD_TEXTS), inner, max_size=3),
    max_leaves=4,
)


def places_in(document: Any) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON document are."""
    pairs: Any = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *place) for place in places_in(value))


@st.composite
def documents_like(draw: st.DrawFn, document: Any) -> Any:
    """A JSON object with one to three values replaced, removed or wrapped into a list."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        *folders, last = draw(st.sampled_from([*places_in(document), ("new",)]))
        holder = document
        for key in folders:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap"])):
            case "remove" if last != "new":
                del holder[last]
            case "wrap" if last != "new":
                holder[last] = [holder[last]]
            case _:
                holder[last] = draw(odd_values)
    return document


@st.composite
def bytes_like(draw: st.DrawFn, content: bytes, header: int = 400) -> bytes:
    """A file with one to four changes, most of them in the first `header` bytes."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = len(found) if draw(st.integers(0, 3)) == 0 else min(header, len(found))
        at = draw(st.integers(0, max(end - 1, 0)))
        new = draw(st.sampled_from(ODD_BYTES) | st.binary(max_size=8))
        match draw(st.sampled_from(["replace", "replace", "replace", "insert", "remove", "cut", "repeat"])):
            case "replace":
                found[at : at + len(new)] = new
            case "insert":
                found[at:at] = new
            case "remove":
                del found[at : at + draw(st.integers(1, 32))]
            case "cut":
                del found[at:]
            case "repeat":
                found[at:at] = found[at : at + draw(st.integers(1, 64))]
    return bytes(found)


def as_lines(*documents: Any) -> bytes:
    """JSON objects, one per line."""
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)
