"""Places that settings and commands name: a path on this machine, or a URL such as s3://bucket/folder/cuts.jsonl."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import GetPydanticSchema, PlainSerializer
from pydantic_core import core_schema

from w2vscale.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")
_USER = re.compile(r"(?<=://)[^/@\s'\"]*@")
_QUERY = re.compile(r"(://[^?\s'\"]*)\?[^\s'\"]*")
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Environment variables whose values are never printed."""


class Url(str):
    """The URL of a file or folder. Unlike in a `Path`, its slashes stay as they are."""

    @property
    def scheme(self) -> str:
        """What comes before `://`, in lower case."""
        return scheme_of(self)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> Url:
        """A file or folder in the folder that this URL names."""
        return Url(f"{self.rstrip('/')}/{name}")


def scheme_of(text: str) -> str:
    """The scheme of a URL in lower case; "" for what is not a URL."""
    found = _SCHEME.match(text)
    return found[0].lower() if found else ""


def place(text: str | Path) -> Path | Url:
    """The URL or path that a text names. Raises UserError if a URL has a password or names nothing in a store."""
    if isinstance(text, Path) or not scheme_of(text):
        return Path(text)
    if _USER.search(text):
        raise UserError(f"{shown(text)}: a URL with a user or password would be written into logs; set environment "
                        "variables or a file of credentials in its place")  # fmt: skip
    try:
        bucket = urlsplit(text).netloc.strip()
    except ValueError:  # such as [ without ]
        bucket = ""
    if not bucket:
        raise UserError(f"{text}: a URL has the form s3://BUCKET/FOLDER/FILE")
    return Url(text)


def shown(text: str) -> str:
    """A text for messages, without users, passwords and queries (signatures) of URLs, and without `SECRETS`."""
    for name in SECRETS:
        if len(secret := os.environ.get(name, "")) > 3:
            text = text.replace(secret, "***")
    return _QUERY.sub(r"\1", _USER.sub("***@", text))


def _schema(kind: Any, handler: Any) -> core_schema.CoreSchema:
    def read(value: object) -> Path | Url:
        if isinstance(value, str | Path):
            return place(value)
        raise ValueError("is neither a path nor a URL")

    return core_schema.no_info_plain_validator_function(read)


Place = Annotated[Path | Url, GetPydanticSchema(_schema), PlainSerializer(str)]
"""A setting that is a path or a URL."""
