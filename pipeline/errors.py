"""Mistakes that a user can correct, and texts that are safe to print."""

import re

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # all but \t and \n


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""


def need(condition, message):
    if not condition:
        raise UserError(message)


def printable(text):
    """The text with its control characters spelt out, as \\x1b: raw, they could take over the reader's terminal."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)
