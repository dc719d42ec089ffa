"""One page of thumbnails: a query and what was found, without server and network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from ..data.decode import to_rgb
from ..errors import CareHubError, printable
from ..files import write_text

SIDE = 192  # pixels of a thumbnail's longer side, at most


def write_sheet(query: str, title: str, found: Sequence[tuple[str, str, float]], output: str | Path) -> None:
    """Write the page `output`: the image `query` and `found`, (file, name, similarity) each.

    A file that is not there any more is left blank. Raises CareHubError where the page can't be
    written.
    """
    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, autoescape=True, trim_blocks=True).get_template("sheet.html")
    rows = [(_thumbnail(file), printable(name), similarity) for file, name, similarity in found]
    page = template.render(title=printable(title), query=_thumbnail(query), found=rows)
    write_text(Path(output), page)


def _thumbnail(file: str) -> str:
    """A JPEG as base64; empty where there is no image."""
    try:
        image = to_rgb(file) if file else None
    except CareHubError:
        image = None
    if image is None:
        return ""
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return base64.b64encode(content.getvalue()).decode()
