"""One image file to RGB, and to the size that a network expects."""

import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ..errors import CareHubError

logger = logging.getLogger(__name__)

# Formats that have suffixes in Pillow, which only saves them or only tells what they are.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_LOCKS = [Lock() for _ in range(256)]  # threads may share an image that Pillow has opened and not yet read


def list_images(source: str | Path) -> tuple[list[str], list[str]]:
    """The images of a folder, or the one image: their paths, and their names relative to the folder.

    Raises CareHubError if there is nothing at `source`, or no image in the folder.
    """
    if not os.path.exists(source):
        raise CareHubError(f"there is no file or folder '{source}'.")
    if not os.path.isdir(source):
        return [str(source)], [os.path.basename(source)]
    paths, prefix = find_images(source), os.path.join(source, "")
    return paths, [path.removeprefix(prefix) for path in paths]


def find_images(folder: str | Path, below: Sequence[str] = ("",)) -> list[str]:
    """The paths of all images in `folder` (or only in its subfolders `below`, in their order), sorted.

    Images are the files with a suffix that the installed Pillow decodes. Links are followed, except to a
    folder above; hidden files and folders are left out. The log counts what is left out. Raises CareHubError
    if there is no image.
    """
    formats = Image.registered_extensions()  # with those of plug-ins that a user has registered
    suffixes = {suffix for suffix, name in formats.items() if name not in NOT_DECODED}
    found: list[str] = []
    left_out: Counter[str] = Counter()
    for part in below:
        found += sorted(_walk(os.path.join(folder, part), suffixes, left_out))
    several = [f"{count} {kind}" for kind, count in left_out.most_common(8)]
    if len(left_out) > len(several):
        several.append("others")
    if not found:
        beside = f" (only {', '.join(several)})" if several else ""
        raise CareHubError(f"there are no images in '{folder}'{beside}.")
    if several:
        say_once(f"left out of '{folder}': {', '.join(several)}")
    return found


def say_once(sentence: str) -> None:
    """Log a sentence about the data, but not again in each of many launched processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(sentence)


def _walk(top: str, suffixes: set[str], left_out: Counter[str]) -> Iterator[str]:
    """The images below `top`, unsorted; what is left out is counted by kind."""
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while folders:
        folder, above = folders.pop()
        try:
            status, entries = os.stat(folder), list(os.scandir(folder))
        except OSError:
            left_out["unreadable folders"] += 1
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:
            left_out["links to folders above"] += 1
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append((entry.path, above | {here}))
            elif suffix in suffixes:
                yield entry.path
            else:
                left_out[suffix if suffix[1:].isalnum() else "without a suffix"] += 1


def to_rgb(image: str | Path | bytes | dict[str, Any] | Image.Image | None, name: str = "") -> Image.Image:
    """A path, the bytes of a file, a PIL image or an undecoded cell of `datasets` as upright PIL RGB.

    Grayscale, palette, CMYK and RGBA (without its alpha) are converted. More than 8 bits are scaled by the
    range of their type, never by what an image shows: 16 bits / 257, floats * 255. Raises CareHubError with
    the image's `name` (by default its path) if it can't be decoded: truncated files, null images, pixels
    outside the range of their type and whatever else.

    >>> to_rgb(Image.new("L", (30, 20))).mode
    'RGB'
    """
    path = image.get("path") if isinstance(image, dict) else image
    name = name or (str(path) if isinstance(path, str | Path) else "an image")
    try:
        if isinstance(image, dict):
            image = image.get("bytes") or path
        if image is None:
            raise ValueError("it is null")
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        with _LOCKS[id(image) // 16 % len(_LOCKS)]:
            image.load()
            upright = _upright(image)
        if 0 in upright.size:
            raise ValueError("it has no pixels")
        return _eight_bits(upright).convert("RGB")
    except FileNotFoundError:
        raise CareHubError(f"there is no image '{name}'.") from None
    except Exception as error:  # on damaged files Pillow's plug-ins raise whatever happens to go wrong
        raise CareHubError(f"{name} can't be decoded ({error or type(error).__name__}).") from error


def _upright(image: Image.Image) -> Image.Image:
    """As the camera was held. `ImageOps.exif_transpose` writes all tags anew, and fails if any is odd."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # tags that can't be read say nothing; the pixels are good
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Modes F, I and I;16 as L. Raises ValueError for pixels outside [0, 1], or 16 bits."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    limit = 1 if image.mode == "F" else 65535  # Pillow's I, of 32 bits, is what it makes of 16 bits in PGM
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= limit):
        raise ValueError(f"its pixels go from {low:.6g} to {high:.6g}, not from 0 to {limit}")
    if image.mode == "I" and 0 < high <= 255:
        raise ValueError(f"its 32-bit pixels, at most {high:g}, may mean 8 or 16 bits")
    return Image.fromarray((values * (255 / limit)).round().astype(np.uint8))


def resize_and_center_crop(image: Image.Image, size: int, crop_pct: float = 1.0) -> Image.Image:
    """Resize the short side to `size / crop_pct` (bicubic, antialiased) and take the central `size` x `size`.

    The result equals that of timm's evaluation transform, pixel by pixel.
    """
    width, height = resized_shape(*image.size, size, crop_pct)
    left, top = center_offset(width, size), center_offset(height, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def resized_shape(width: int, height: int, size: int, crop_pct: float) -> tuple[int, int]:
    """(width, height) of a whole image whose short side becomes `size / crop_pct`.

    >>> resized_shape(500, 375, size=224, crop_pct=0.875)
    (341, 256)
    """
    short = math.floor(size / crop_pct)
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_offset(full: int, size: int) -> int:
    """Where a central window of `size` begins in `full`; rounds as timm does."""
    return round((full - size) / 2)


def crop_and_resize(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """The crop (top, left, height, width) resized to `size` x `size` (bilinear, antialiased)."""
    top, left, height, width = box
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def square_tensor(image: Image.Image, size: int, crop_pct: float = 1.0) -> Tensor:
    """`resize_and_center_crop` as (3, `size`, `size`) uint8."""
    return to_tensor(resize_and_center_crop(image, size, crop_pct))
