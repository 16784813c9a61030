"""Check a cut before Lhotse sees it: its fields have the right types, and its audio is where the settings allow it.

Lhotse runs the `command` of a source in a shell and downloads a `url`, also where a source is nested in a transform, a
track or a custom field. A cut with such a source is an attack, or from a manifest of another kind: it is refused, not
left out. Only the sources of its recording may be URLs, of the schemes in `data.url_schemes`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from w2vscale.errors import UserError, refused_value
from w2vscale.storage.urls import place, scheme_of, shown

MAX_SECONDS = 1e8  # three years: a longer cut is taken to be damaged

FILES = ("file",)  # the default of data.url_schemes

Duration = Annotated[float, Field(gt=0.0, le=MAX_SECONDS)]


class NotACut(UserError):
    """A line of a manifest is not a cut. Commands that read many cuts count it and go on."""


class _Source(TypedDict):
    type: str
    channels: Annotated[list[int], Field(min_length=1)]
    source: str


class _Recording(TypedDict):
    id: str
    sources: Annotated[list[_Source], Field(min_length=1)]
    sampling_rate: Annotated[int, Field(gt=0, lt=2**31)]
    num_samples: Annotated[int, Field(ge=0, lt=2**63)]
    duration: Duration
    channel_ids: NotRequired[list[int] | None]


class _Supervision(TypedDict):
    start: NotRequired[Annotated[float, Field(ge=-MAX_SECONDS, le=MAX_SECONDS)]]
    duration: NotRequired[Annotated[float, Field(ge=-MAX_SECONDS, le=MAX_SECONDS)]]
    text: NotRequired[str | None]
    speaker: NotRequired[str | None]
    language: NotRequired[str | None]


class _Cut(TypedDict):
    id: str
    start: Annotated[float, Field(ge=-MAX_SECONDS, le=MAX_SECONDS)]
    duration: Duration
    recording: _Recording
    supervisions: NotRequired[list[_Supervision]]
    custom: NotRequired[dict[str, Any] | None]


class _MonoCut(_Cut):
    type: Literal["MonoCut", "Cut"]
    channel: int


class _MultiCut(_Cut):
    type: Literal["MultiCut"]
    channel: list[int]


_CUT = TypeAdapter[Any](Annotated[_MonoCut | _MultiCut, Field(discriminator="type")])
_RECORDING = TypeAdapter[Any](_Recording)


def read_cut(
    line: bytes, *, where: str, source_types: tuple[str, ...] = ("file",), schemes: Collection[str] = FILES
) -> dict[str, Any]:
    """Parse a line of a manifest, which `where` names, to what Lhotse can deserialise.

    Raises NotACut if it is not a cut of a recording, and UserError if it has a source of a type that is not in
    `source_types`, or whose scheme is not in `schemes` (`file` for files). Sources of its recording may be URLs.
    """
    return _checked(line, _CUT, where, source_types, schemes)


def read_recording(text: bytes, *, where: str, source_types: tuple[str, ...]) -> dict[str, Any]:
    """Parse the JSON of a recording. Raises like `read_cut`."""
    return _checked(text, _RECORDING, where, source_types, FILES)


def _checked(
    text: bytes, kind: TypeAdapter[Any], where: str, source_types: tuple[str, ...], schemes: Collection[str]
) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text.decode().removeprefix("\ufeff"))
        if b"\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # raises UnicodeEncodeError for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise not_a_cut(where, " ".join(str(error).split())[:200]) from None
    urls = _urls_of(found)
    for url in urls:
        _check_url(url["source"], where, schemes)
    for source in sources_in(found):
        if any(source is url for url in urls):
            continue
        if source["type"] == "file" and "file" not in schemes:
            raise UserError(
                f"{where}: has audio in a file, and data.url_schemes does not have file; it is: {', '.join(schemes)}"
            )
        if source["type"] not in source_types:
            raise UserError(
                f"{where}: has audio of type {str(source['type'])[:40]!r}, but only "
                f"{'files are' if 'file' in source_types else 'the audio in the archive is'} read, and nothing is run "
                "or downloaded; save the audio as files, and make a manifest with: w2vscale data prepare folder"
            )
    try:
        kind.validate_python(found, strict=True)
    except ValidationError as error:
        raise not_a_cut(where, refused_value(error)) from None
    return found


def _urls_of(cut: object) -> list[dict[str, Any]]:
    """The sources of the recording of a cut that are URLs."""
    recording = cut.get("recording") if isinstance(cut, dict) else None
    sources = recording.get("sources") if isinstance(recording, dict) else None
    found = sources if isinstance(sources, list) else []
    return [
        source
        for source in found
        if isinstance(source, dict) and source.get("type") == "url" and isinstance(source.get("source"), str)
    ]


def _check_url(url: str, where: str, schemes: Collection[str]) -> None:
    """Raise UserError unless a URL has a scheme that is allowed. `file` is not for URLs."""
    scheme = scheme_of(url)
    if not scheme or scheme == "file" or scheme not in schemes:
        raise UserError(
            f"{where}: has audio of type 'url' ({shown(url)[:100]}), which data.url_schemes={','.join(schemes)} does "
            "not allow; nothing is downloaded; if you trust the manifest, add the scheme there (or --url-scheme)"
        )
    try:
        place(url)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def not_a_cut(where: str, reason: object) -> NotACut:
    """The error for a line that `where` names."""
    return NotACut(f"{where} is not a Lhotse cut of a recording: {reason}")


def sources_in(document: object) -> Iterator[dict[str, Any]]:
    """Every object, however deep, that Lhotse could take for an audio source."""
    waiting = [document]
    for item in waiting:
        if isinstance(item, dict):
            if "source" in item and "type" in item and "channels" in item:
                yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
