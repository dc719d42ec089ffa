"""One image file to RGB, and to the size that a network expects."""

import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import CareHubError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


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


def find_images(folder: str | Path) -> list[str]:
    """The paths of all images below `folder`, sorted. Raises CareHubError if there are none."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    found = sorted(path for path in paths if os.path.splitext(path)[1].lower() in SUFFIXES)
    if not found:
        raise CareHubError(f"there are no images in '{folder}' (looked for {', '.join(sorted(SUFFIXES))}).")
    return found


def to_rgb(image: str | Path | bytes | np.ndarray | Image.Image, name: str = "") -> Image.Image:
    """A path, the bytes of a file, a PIL image or a uint8 array (HWC, HW) as an upright PIL RGB image.

    Grayscale (also 16 bit), palette, CMYK and RGBA are converted. Raises CareHubError with the image's
    `name` (by default its path) if it can't be decoded, which includes a truncated file.

    >>> to_rgb(np.zeros((20, 30), np.uint8)).size
    (30, 20)
    """
    name = name or (str(image) if isinstance(image, str | Path) else "an image")
    try:
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        elif not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # More than 8 bits: 255, or the brightest pixel if it is brighter, becomes 255.
            values = np.asarray(image, dtype=np.float64)
            image = Image.fromarray((values / max(values.max(), 255) * 255).astype(np.uint8))
        return image.convert("RGB")
    except FileNotFoundError:
        raise CareHubError(f"there is no image '{name}'.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: of a PNG
        raise CareHubError(f"{name} can't be decoded ({error}).") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise CareHubError(f"an image array must be uint8, got {array.dtype}; floats go in as tensors.")
    if array.shape[2:] == (1,):
        array = array[..., 0]
    if array.ndim < 2 or array.shape[2:] not in ((), (3,), (4,)):
        raise CareHubError(f"an image array must be HWC with 1, 3 or 4 channels, got {array.shape}.")
    return Image.fromarray(array)


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
