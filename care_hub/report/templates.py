"""Pages of HTML, each from the template of its name in this folder."""

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ..errors import CareHubError, printable
from ..files import write_text


def page_target(output: str | Path) -> Path:
    """Where a page is to be written. Raises CareHubError for a folder, and where there is none for it."""
    target = Path(output)
    if os.path.isdir(target):
        raise CareHubError(f"'{output}' is a folder; name a file for the page.")
    if not os.path.isdir(target.absolute().parent):
        raise CareHubError(f"the folder '{target.parent}' for the page does not exist.")
    return target


def write_template(template: str, target: Path, contents: dict[str, Any]) -> None:
    """Write the page `target`; text in `contents` is escaped. Raises CareHubError where it can't be."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, finalize=_on_one_line, trim_blocks=True)
    write_text(target, environment.get_template(template).render(contents))


def _on_one_line(value: Any) -> Any:
    """Text, which may be a stranger's, as `printable` shows it; markup as it is."""
    return printable(value) if type(value) is str else value
