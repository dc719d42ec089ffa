"""For the API page: doctests of docstrings become code blocks, and `<` in their text stays visible."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?)(?:^.+\n?)*", re.MULTILINE)
CODE = re.compile(r"(`[^`]+`|^ {4}.*$)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring in Markdown."""
    parts, end = [], 0
    for found in DOCTEST.finditer(text):
        parts += [_escaped(text[end : found.start()]), f"```pycon\n{found[0].rstrip()}\n```\n"]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    pieces = CODE.split(text)  # code at the odd places
    return "".join(p if k % 2 else p.replace("<", "&lt;") for k, p in enumerate(pieces))


class Docstrings(griffe.Extension):
    """Changes every docstring when it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
