"""The one exception that a user can cause; the CLI prints it as a single line and exits with code 2."""


class UserError(ValueError):
    """Something outside the program is wrong: a setting, a file, an environment.

    The message names the thing, its value, where it came from and what to do about it.
    """
