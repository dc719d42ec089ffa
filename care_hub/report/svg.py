"""A figure as inline SVG of a page: in the page's colors, light or dark, with ids of its own."""

import hashlib
import re
from pathlib import Path
from xml.etree import ElementTree

from ..errors import printable
from .figures import COLORS, GRID, INK, PAPER

# Defined by page.html. Of the runs' colors only the first is too dark for a dark page.
VARIABLES = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--paper)", COLORS[0]: "var(--blue)"}


def inline_svg(path: Path, label: str) -> str:
    """The SVG at `path`, written by `figures`, as an element that screen readers call `label`.

    Colors become the page's variables. Ids in use get a prefix that follows from `label`, which no
    other figure of the page may have; other ids go. Numbers have two decimals. Text is escaped.
    """
    label = printable(label)
    prefix = f"f{hashlib.sha256(label.encode()).hexdigest()[:8]}-"
    root = ElementTree.parse(path).getroot()
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)  # a style would hold for the whole page
    used = {name for element in root.iter() for name in re.findall(r"#([\w-]+)", str(element.attrib))}
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(key): _value(_local(key), value, prefix)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace, which HTML does not need."""
    return name.rpartition("}")[2]


def _value(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href":
        return value.replace("#", f"#{prefix}")
    if key in ("d", "x", "y", "transform"):
        return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", value)
    for color, variable in VARIABLES.items():
        value = value.replace(color, variable)
    return value.replace("url(#", f"url(#{prefix}")
