"""The one exception that reports bad input: one line on stderr, exit code 2, no traceback."""

import click

LONGEST = 390  # characters of a message


class UserError(click.ClickException):
    """Something the user can mend; the message says what was given, what was expected and what to do."""

    exit_code = 2

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        if len(line) > LONGEST:  # what to do stands at the end
            line = f"{line[:230]} ... {line[-150:]}"
        super().__init__(line)


def brief(error: BaseException, longest: int = 120) -> str:
    """The first line of an exception's text, cut where it is long; its class where it has none."""
    line = next((" ".join(line.split()) for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= longest else line[: longest - 3] + "..."
