"""The exception for all errors that a user can fix, and counts in messages.

The CLI prints the exception as a single line and exits with its code.
"""


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
