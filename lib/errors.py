"""The one exception that reports bad input: one line on stderr, exit code 2, no traceback."""

import click


class UserError(click.ClickException):
    """Something the user can mend; the message says what was given, what was expected and what to do."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
