"""The one error that a person is meant to see."""


class CareHubError(Exception):
    """Something a user can put right; the message says what is wrong and what to do, in one sentence."""


def suggest(word: str, known) -> str:
    """`", did you mean 'x'?"` when something in `known` looks like `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
