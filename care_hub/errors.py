"""The one error that a user is meant to see."""

import difflib
from collections.abc import Iterable


class CareHubError(Exception):
    """A user error: the message says what is wrong and what to do, in one sentence.

    Options and arguments stand in it as Python writes them, in backticks; the command line makes them flags.
    """


def suggest(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` when something in `known` looks like `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
