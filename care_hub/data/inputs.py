"""What `Encoder.encode` accepts, decoded into batches of the encoder's image size."""

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..augment import normalize
from ..cores import cores
from ..errors import CareHubError
from .decode import find_images, square_tensor, to_square

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA


def to_pixels(x: Tensor | np.ndarray, name: str = "an image") -> Tensor:
    """An image, or a batch of them, as (3, H, W) or (N, 3, H, W), uint8 or float32 in [0, 1].

    Tensors and arrays are treated alike, wherever they come from, by shape and dtype alone:

    | shape                                  | is                                            |
    |----------------------------------------|-----------------------------------------------|
    | (H, W)                                 | one grayscale image                           |
    | (C, H, W), C = 1, 3 or 4               | one image, channels first                     |
    | (H, W, C)                              | one image, channels last                      |
    | (N, C, H, W), (N, H, W, C)             | N images                                      |
    | first and last could both be channels  | ambiguous: refused                            |

    C = 1 is gray, 3 RGB, 4 RGBA, whose alpha is left out. uint8 goes from 0 to 255, floats of any precision
    from 0 to 1. Raises CareHubError with `name` for all else: other dtypes (bool), floats outside [0, 1]
    (NaN, 0..255, normalized), other shapes, no pixels.

    >>> to_pixels(np.zeros((20, 30, 4), np.uint8)).shape
    torch.Size([3, 20, 30])
    """
    if isinstance(x, np.ndarray) and (x.dtype == np.uint8 or x.dtype.kind == "f"):
        # A copy: torch takes no array that is read-only, mirrored or of foreign byte order.
        x = torch.from_numpy(x.astype(np.uint8 if x.dtype == np.uint8 else np.float32, order="C"))
    if not isinstance(x, Tensor) or (x.dtype != torch.uint8 and not x.is_floating_point()):
        found = getattr(x, "dtype", type(x).__name__)
        raise CareHubError(f"{name} must be uint8, or float in [0, 1], got {found}.")
    shape = tuple(x.shape)
    if x.ndim == 2:
        x = x[None]
    else:
        first, last = (x.ndim in (3, 4) and shape[axis] in CHANNELS for axis in (-3, -1))
        if first and last:
            both = "could have its channels first or last"
            raise CareHubError(f"{name} of shape {shape} {both}; give PIL images instead.")
        if not first and not last:
            shapes = "(H, W), (C, H, W) or (H, W, C) with C = 1, 3 or 4, or a batch of the latter"
            raise CareHubError(f"{name} must be {shapes}, got {shape}.")
        x = x.movedim(-1, -3) if last else x
    if 0 in x.shape[-2:]:
        raise CareHubError(f"{name} of shape {shape} has no pixels.")
    if x.dtype != torch.uint8:
        x = x.detach().float()
        low, high = (value.item() for value in x.aminmax()) if x.numel() else (0, 1)
        if not (low >= 0 and high <= 1):
            found = f"floats must lie in [0, 1], these go from {low:.9g} to {high:.9g}"
            raise CareHubError(f"{name}: {found}; 0 to 255 goes in as uint8, the encoder itself normalizes.")
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:]) if x.shape[-3] == 1 else x[..., :3, :, :]


def as_items(images: Any) -> Tensor | np.ndarray | Collection[Any]:
    """Anything that `encode` accepts, as a batch, or as items of known number.

    `images`: a path, a folder, a PIL image, a tensor or array as in `to_pixels`, or a sequence or iterable of
    any of these but batches. Raises CareHubError for empty folders and for what can't be images.

    >>> as_items(np.zeros((8, 8, 3), np.uint8))[0].shape
    (8, 8, 3)
    """
    if hasattr(images, "column_names") or isinstance(images, Dataset | DataLoader):
        advice = "give its images alone, of `datasets` the column: `data['image']`"
        raise CareHubError(f"a {type(images).__name__} has rows of more than an image; {advice}.")
    if isinstance(images, np.ndarray) and images.dtype.kind in "OSU":  # of paths, say
        images = images.tolist()
    if isinstance(images, Tensor | np.ndarray):
        return images if images.ndim == 4 else [images]
    if isinstance(images, str | Path) and os.path.isdir(images):  # false for an impossible name
        return find_images(images)
    if images is None or isinstance(images, str | Path | Image.Image | bytes | dict):
        return [images]
    try:
        return images if hasattr(images, "__len__") and hasattr(images, "__iter__") else list(images)
    except TypeError as error:
        raise CareHubError(f"{images!r} holds no images.") from error


def decode_batches(
    items: Tensor | np.ndarray | Collection[Any],
    batch_size: int,
    size: int,
    crop_pct: float,
    on_broken: Callable[[CareHubError], None] | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """The images of `as_items`, batch by batch: (B, 3, `size`, `size`) and the places of broken images.

    Batches are uint8, or float in [0, 1] if an image was given so and needs no resizing. One batch is
    decoded ahead, in threads, while the consumer works on the last. `on_broken` is called with the error of
    an image that can't be decoded, and zeros take its place; without it the error is raised.
    """
    starts = range(0, len(items), batch_size)
    if isinstance(items, Tensor | np.ndarray) and _is_prepared(items, size, crop_pct):
        yield from ((to_pixels(items[k : k + batch_size], "the batch"), []) for k in starts)
        return
    numbered = enumerate(items)
    with ThreadPoolExecutor(cores()) as pool:
        futures = (
            [
                pool.submit(decode_item, item, size, crop_pct, f"image {number}")
                for number, item in islice(numbered, batch_size)
            ]
            for _ in starts
        )
        ahead = next(futures, None)
        while ahead:
            decoded, broken = [], []
            for place, future in enumerate(ahead):
                try:
                    decoded.append(future.result())
                except CareHubError as error:
                    if on_broken is None:
                        raise
                    on_broken(error)
                    broken.append(place)
                    decoded.append(torch.zeros(3, size, size, dtype=torch.uint8))
            ahead = next(futures, None)
            if any(x.dtype != torch.uint8 for x in decoded):
                decoded = [_to_float(x) for x in decoded]
            yield torch.stack(decoded), broken


def decode_item(item: Any, size: int, crop_pct: float, name: str = "an image") -> Tensor:
    """One item as (3, `size`, `size`), uint8 or float32 in [0, 1], on the CPU.

    Raises CareHubError, with the item's path or else `name`, if it can't be decoded.
    """
    if isinstance(item, Tensor | np.ndarray):
        if item.ndim == 4:
            shape = tuple(item.shape)
            raise CareHubError(f"{name} is a batch, of shape {shape}; give a batch alone, or each image.")
        return _resize_pixels(to_pixels(item, name).cpu(), size, crop_pct)
    if not isinstance(item, str | Path | bytes | dict | Image.Image | None):
        raise CareHubError(f"{name} is a {type(item).__name__}, which is no image.")
    if isinstance(item, dict) and not item.keys() & {"bytes", "path"}:
        raise CareHubError(f"{name} is a row, of {', '.join(map(str, item))}; give the images alone.")
    has_path = isinstance(item, str | Path) or (isinstance(item, dict) and item.get("path"))
    return to_square(item, "" if has_path else name, size, crop_pct)


def _is_prepared(batch: Tensor | np.ndarray, size: int, crop_pct: float) -> bool:
    """Whether a batch needs no resizing."""
    return crop_pct == 1 and len(batch) > 0 and to_pixels(batch[:1], "the batch").shape[2:] == (size, size)


def _resize_pixels(x: Tensor, size: int, crop_pct: float) -> Tensor:
    """(3, H, W) to (3, `size`, `size`) by the very code for files, for which floats are rounded to 8 bits."""
    if crop_pct == 1 and x.shape[1:] == (size, size):
        return x
    x = x if x.dtype == torch.uint8 else (x * 255).round().byte()
    return square_tensor(Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()), size, crop_pct)


def _to_float(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


@dataclass(frozen=True)
class Transform:
    """One image, as `encode` takes them in lists, to the (3, `size`, `size`) normalized floats of a network.

    >>> Transform(32, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(Image.new("L", (40, 50))).unique()
    tensor([-1.])
    """

    size: int
    crop_pct: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Any) -> Tensor:
        """Raises CareHubError if it can't be decoded."""
        return normalize(_to_float(decode_item(image, self.size, self.crop_pct)), self.mean, self.std)
