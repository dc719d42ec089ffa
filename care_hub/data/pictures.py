"""One picture, from wherever a person has it, to RGB of the size a network wants."""

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import CareHubError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def named(source: str | Path) -> tuple[list[str], list[str]]:
    """The pictures of a folder, or the one picture, and their names relative to it."""
    if not os.path.exists(source):
        raise CareHubError(f"there is no file or folder '{source}'.")
    if not os.path.isdir(source):
        return [str(source)], [os.path.basename(source)]
    found, above = files(source), len(os.path.join(source, ""))
    return found, [path[above:] for path in found]


def files(folder: str | Path) -> list[str]:
    """All pictures below `folder`, sorted by path."""
    walk = ((parent, name) for parent, _, names in os.walk(folder) for name in names)
    found = sorted(os.path.join(parent, name) for parent, name in walk if os.path.splitext(name)[1].lower() in SUFFIXES)
    if not found:
        raise CareHubError(f"there are no pictures in '{folder}' (looked for {', '.join(sorted(SUFFIXES))}).")
    return found


def rgb(picture, name: str = "") -> Image.Image:
    """A path, bytes, PIL image or uint8 array (HWC, HW) as an upright PIL RGB image.

    Greyscale (also 16 bit), palette, CMYK and RGBA are converted. Raises CareHubError with the picture's name when it
    can't be decoded, a file cut short included.
    """
    name = name or (str(picture) if isinstance(picture, str | Path) else "a picture")
    try:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(_array(picture))
        elif isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture))
        elif isinstance(picture, str | Path):
            picture = Image.open(picture)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
            values = np.asarray(picture, dtype=np.float64)
            picture = Image.fromarray((values / max(values.max(), 255) * 255).astype(np.uint8))
        return picture.convert("RGB")
    except FileNotFoundError:
        raise CareHubError(f"there is no picture '{name}'.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CareHubError(f"{name} can't be decoded ({error}).") from error


def _array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise CareHubError(f"an image array must be uint8 (HWC), got {array.dtype}; floats in [0, 1] go in as NCHW tensors.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise CareHubError(f"an image array must be HWC with 1, 3 or 4 channels, got the shape {array.shape}.")
    return array


def fit(picture: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """Resize the short side to `size / crop` (bicubic, antialiased) and cut out the central `size` x `size` square, to the
    pixel as timm's evaluation transform does."""
    (width, height), short = fitted_shape(*picture.size, size, crop), math.floor(size / crop)
    if min(picture.size) != short:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = central(width, size), central(height, size)
    return picture.crop((left, top, left + size, top + size)) if (width, height) != (size, size) else picture


def fitted_shape(width: int, height: int, size: int, crop: float) -> tuple[int, int]:
    """The size of a whole picture whose short side becomes `size / crop`."""
    short, smaller = math.floor(size / crop), min(width, height)
    return (short, int(short * height / width)) if width == smaller else (int(short * width / height), short)


def central(full: int, size: int) -> int:
    """Where a central window of `size` begins."""
    return round((full - size) / 2)


def cut(picture: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """The crop (top, left, height, width) resized to `size` x `size` (bilinear, antialiased)."""
    top, left, height, width = box
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def pixels(picture: Image.Image) -> np.ndarray:
    """(3, H, W) uint8."""
    return np.asarray(picture).transpose(2, 0, 1)
