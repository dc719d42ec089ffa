"""A template of Markdown filled in: what a stranger wrote stays on its line, and is text and no markup."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup

from ..errors import printable


def render(template: str, **values: Any) -> str:
    """The template of that name in this folder.

    Every string that it shows is text, as `in_text` writes it, or goes through one of the filters:
    `code`, `python`, `yaml`, `url`.
    """
    return re.sub(r"\n{3,}", "\n\n", _compiled(template).render(values)).strip()


@cache
def _compiled(template: str) -> Template:  # which takes longer than to fill it in
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, finalize=in_text, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": in_code, "python": in_python, "yaml": in_yaml, "url": in_url}
    return environment.get_template(template)


def in_text(value: Any) -> Any:
    r"""A string without code, table cells, links or HTML of its own; other values as they are.

    >>> print(in_text("a|b [c](d) <e>"))
    a\|b \[c\](d) &lt;e>
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(re.sub(r"[\\`\[\]|]", r"\\\g<0>", printable(value)).replace("<", "&lt;"))


def in_code(value: str) -> Markup:
    """A name as code within text; as text if it has characters that names do not have."""
    return Markup(f"`{value}`") if re.fullmatch(r"[\w ./:+=,-]+", value) else in_text(value)


def in_python(value: Any) -> Markup:
    r"""A string of Python.

    >>> print(in_python('a"b'))
    "a\"b"
    """
    return Markup(printable(json.dumps(str(value), ensure_ascii=False)).replace("<", r"\x3c"))


def in_yaml(values: dict[str, Any]) -> Markup:
    """Lines of YAML, in which no string has lines of its own."""
    text = yaml.dump(values, Dumper=_OneLineDumper, sort_keys=False, width=10**6)
    return Markup(text.strip().replace("<", r"\x3c"))


class _OneLineDumper(yaml.SafeDumper):
    pass


_OneLineDumper.add_representer(str, lambda dumper, text: dumper.represent_str(printable(text)))


def in_url(value: str) -> Markup:
    """A file name as an address beside the card."""
    return Markup(quote(os.fsencode(value)))
