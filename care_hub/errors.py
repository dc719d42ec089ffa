"""The one error that a user is meant to see, and names as they may be shown."""

import difflib
import re
from collections.abc import Iterable

# Control characters, line ends, what turns the direction of writing, and bytes that are no UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` on one line that drives no terminal and is UTF-8: escape sequences for other characters.

    >>> printable("two\nlines"), printable("caf\udce9"), printable("café")
    ('two\\nlines', 'caf\\udce9', 'café')
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class CareHubError(Exception):
    """A user error: the message says what is wrong and what to do, in one sentence and on one line.

    Options and arguments stand in it as Python writes them, in backticks; the command line makes
    them flags, and ends with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(printable(message))


def suggest(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` when something in `known` looks like `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
