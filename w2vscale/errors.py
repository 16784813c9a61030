"""The exception for all errors that a user can fix, and counts in messages.

The CLI prints the exception as a single line and exits with its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """A setting, a file or the environment is wrong.

    The message names the thing, its value, where it came from and what to do about it.
    """

    exit_code = 2


class TemporaryError(UserError):
    """Something from outside ended a run, such as a lost process. The same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 utterance", "24 utterances", "2 micro-batches"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('ch') else 's'}"


def refused_value(error: ValidationError) -> str:
    """The first value that pydantic refuses: where it is in a document, and what is wrong."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
