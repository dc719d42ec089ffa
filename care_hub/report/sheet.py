"""One page of thumbnails: a query and what was found, without server and network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data.decode import to_rgb
from ..errors import CareHubError
from .templates import write_template

SIDE = 192  # pixels of a thumbnail's longer side, at most


def write_sheet(query: str, title: str, found: Sequence[tuple[str, str, float]], output: str | Path) -> None:
    """Write the page `output`: the image `query` and `found`, (file, name, similarity) each.

    A file that is not there any more is left blank. Raises CareHubError where the page can't be
    written.
    """
    rows = [(_thumbnail(file), name, similarity) for file, name, similarity in found]
    values = {"title": title, "query": _thumbnail(query), "found": rows}
    write_template("sheet.html", Path(output), values)


def _thumbnail(file: str) -> str:
    """`jpeg` of a file; empty where there is no image."""
    try:
        return jpeg(to_rgb(file), SIDE, 85) if file else ""
    except CareHubError:
        return ""


def jpeg(image: Image.Image, side: int, quality: int) -> str:
    """An RGB image, of at most `side` x `side` pixels, as a JPEG in base64."""
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(content.getvalue()).decode()
