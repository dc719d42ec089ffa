"""One image file to RGB, and to the size that a network expects."""

import ctypes
import io
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Lock
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from ..errors import CareHubError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# Formats that have suffixes in Pillow, which only saves them or only tells what they are; EPS, which it hands
# to a program; and those that contain an image of another format and of any size.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF", "EPS", "BLP", "ICNS", "ICO", "IPTC"}
_BYTES = {"AVIF": 16, "FITS": 32, "JPEG2000": 24, "WEBP": 20}  # per pixel while it is decoded; 8 of others
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_decoding = Condition()
_bytes_decoding = 0
# Of glibc, which else keeps gigabytes for the threads that have freed them.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
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
        except (OSError, ValueError):  # ValueError: a NUL byte in the name
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
    outside the range of their type, files that would take more than 6 bytes for each of Pillow's
    `Image.MAX_IMAGE_PIXELS` (537 MB, which is 67 megapixels, in some formats fewer) and whatever else.

    >>> to_rgb(Image.new("L", (30, 20))).mode
    'RGB'
    """
    return _use_rgb(image, name, lambda rgb: rgb)


def to_square(image: Any, name: str, size: int, crop_pct: float = 1.0) -> Tensor:
    """`square_tensor` of `to_rgb`. Threads that call it wait for each other's large images."""
    return _use_rgb(image, name, lambda rgb: square_tensor(rgb, size, crop_pct))


def _use_rgb(image: Any, name: str, use: Callable[[Image.Image], Result]) -> Result:
    path = image.get("path") if isinstance(image, dict) else image
    name = name or (str(path) if isinstance(path, str | Path) else "an image")
    try:
        return _decode_and(image, use)
    except FileNotFoundError:
        raise CareHubError(f"there is no image '{name}'.") from None
    except Exception as error:  # on damaged files Pillow's plug-ins raise whatever happens to go wrong
        reason = str(error) or type(error).__name__
    # Not `from error`, whose traceback would keep the image in memory.
    raise CareHubError(f"{name} can't be decoded ({reason}).")


def _decode_and(image: Any, use: Callable[[Image.Image], Result]) -> Result:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("it is null")
    if not isinstance(image, Image.Image):
        Image.init()
        formats = [name for name in Image.ID if name not in NOT_DECODED]
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=formats)
    with _counted(_bytes_of(image)):
        with _LOCKS[id(image) // 16 % len(_LOCKS)]:
            image.load()
            image = _upright(image)  # each step frees what the last one made
        if 0 in image.size:
            raise ValueError("it has no pixels")
        image = _eight_bits(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        result = use(image)
        del image  # whose memory counts until here
        return result


def _most_bytes() -> float:
    return 6 * (Image.MAX_IMAGE_PIXELS or math.inf)


def _bytes_of(image: Image.Image) -> int:
    """About the most that decoding takes, with conversions. Raises ValueError if a file takes too much."""
    width, height = image.size
    deep = image.mode in ("F", "I") or image.mode.startswith("I;16")
    each = max(_BYTES.get(image.format or "", 8), 14 if deep or "progressive" in image.info else 8)
    needed = width * height * each + 16 * max(width, height)  # Pillow points to each row
    if tags := getattr(image, "tag_v2", None):  # TIFF, of which a tile or strip is decoded at a time
        rows = min(tags.get(278, height), height)
        needed += tags.get(322, width) * tags.get(323, rows) * sum(tags.get(258, (1,))) // 8
    limit = _most_bytes()
    if needed > limit and isinstance(image, ImageFile.ImageFile):
        found = f"it has {width} x {height} pixels and would take {needed / 1e6:.0f} MB"
        raise ValueError(f"{found}; `PIL.Image.MAX_IMAGE_PIXELS` sets the limit, of {limit / 1e6:.0f} MB")
    return needed


@contextmanager
def _counted(size: int) -> Iterator[None]:
    """Waits until `size` bytes fit beside those of other threads, into four times what one image may take."""
    global _bytes_decoding
    with _decoding:
        _decoding.wait_for(lambda: not _bytes_decoding or _bytes_decoding + size <= 4 * _most_bytes())
        _bytes_decoding += size
    try:
        yield
    finally:
        if _trim and size > 2**27:
            _trim(0)
        with _decoding:
            _bytes_decoding -= size
            _decoding.notify_all()


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
    scaled = np.multiply(values, 255 / limit, dtype=np.float32)
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def resize_and_center_crop(image: Image.Image, size: int, crop_pct: float = 1.0) -> Image.Image:
    """Resize the short side to `size / crop_pct` (bicubic, antialiased) and take the central `size` x `size`.

    The result equals that of timm's evaluation transform, pixel by pixel; of strips, longer than 16 times
    their width, but for the rounding between the two passes of a resize.
    """
    width, height = resized_shape(*image.size, size, crop_pct)
    left, top = center_offset(width, size), center_offset(height, size)
    if max(image.size) > 16 * min(image.size):  # it would become of any length
        reach = 3 * min(image.size) + 3  # of the crop and the filter from the center
        x0, y0 = (max(0, full // 2 - reach) for full in image.size)
        part = image.crop((x0, y0, min(image.width, x0 + 2 * reach), min(image.height, y0 + 2 * reach)))
        x, y = image.width / width, image.height / height
        box = (left * x - x0, top * y - y0, (left + size) * x - x0, (top + size) * y - y0)
        return part.resize((size, size), Image.Resampling.BICUBIC, box)
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
