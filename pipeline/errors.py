"""Mistakes that a user can correct, and texts that are safe to print."""

import os
import re
import sys

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # all but \t and \n
BOLD, YELLOW = "1", "33"  # codes of a terminal


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message):
        super().__init__(re.sub(r"\s*\n\s*", " ", message.strip()))  # messages of others may have several lines


def need(condition, message):
    if not condition:
        raise UserError(message)


def printable(text):
    """The text with its control characters spelt out, as \\x1b: raw, they could take over the reader's terminal."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def styled(text, code):
    """The text in bold or in a colour where stdout is a terminal that shows it and NO_COLOR is not set."""
    terminal = sys.stdout is not None and sys.stdout.isatty() and (os.name != "nt" or "WT_SESSION" in os.environ)
    return f"\x1b[{code}m{text}\x1b[0m" if code and terminal and not os.environ.get("NO_COLOR") else text
