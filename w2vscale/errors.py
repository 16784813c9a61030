"""The exception for all errors that a user can fix. The CLI prints it as a single line and exits with code 2."""


class UserError(ValueError):
    """A setting, a file or the environment is wrong.

    The message names the thing, its value, where it came from and what to do about it.
    """
