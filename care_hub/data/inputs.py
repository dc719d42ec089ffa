"""What `Encoder.encode` accepts, decoded into batches of the encoder's image size."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import CareHubError
from .decode import center_offset, find_images, resized_shape, square_tensor, to_rgb


def as_items(images: Any) -> Tensor | Sequence[Any]:
    """Anything that `encode` accepts, as a tensor (N, 3, H, W) or as something with a length and slices.

    `images`: a path, a folder, a PIL image, a uint8 array (HWC or NHWC), a float tensor in [0, 1] (NCHW or
    CHW), or a sequence or iterable of any of these. Raises CareHubError for other tensors and empty folders.

    >>> as_items(np.zeros((8, 8, 3), np.uint8))[0].shape
    (8, 8, 3)
    """
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise CareHubError(f"image tensors must be (N, 3, H, W) or (3, H, W), got {tuple(images.shape)}.")
        if images.dtype != torch.uint8 and images.numel() and not 0 <= images.min() <= images.max() <= 1:
            raise CareHubError("a float image tensor must lie in [0, 1]; the encoder normalizes it itself.")
        return images if images.ndim == 4 else images[None]
    if isinstance(images, str | Path) and Path(images).is_dir():
        return find_images(images)
    one = isinstance(images, str | Path | Image.Image | bytes | dict)
    if one or (isinstance(images, np.ndarray) and images.ndim != 4):
        return [images]
    return images if hasattr(images, "__getitem__") and hasattr(images, "__len__") else list(images)


def decode_batches(
    items: Tensor | Sequence[Any],
    batch_size: int,
    size: int,
    crop_pct: float,
    on_broken: Callable[[CareHubError], None] | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """The images of `as_items`, batch by batch: (B, 3, `size`, `size`) and the places of broken images.

    Batches are uint8; of a tensor they are slices, or float in [0, 1] where these had to be resized. One
    batch is decoded ahead, in threads, while the consumer works on the last. `on_broken` is called with the
    error of an image that can't be decoded, and zeros take its place; without it the error is raised.
    """
    if isinstance(items, Tensor):
        yield from ((_resize_tensor(x, size, crop_pct), []) for x in items.split(batch_size) if len(x))
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = (
            [pool.submit(decode_item, item, size, crop_pct) for item in items[start : start + batch_size]]
            for start in range(0, len(items), batch_size)
        )
        ahead = next(futures, None)
        while ahead:
            batch, broken = torch.zeros(len(ahead), 3, size, size, dtype=torch.uint8), []
            for place, future in enumerate(ahead):
                try:
                    batch[place] = future.result()
                except CareHubError as error:
                    if on_broken is None:
                        raise
                    on_broken(error)
                    broken.append(place)
            ahead = next(futures, None)
            yield batch, broken


def decode_item(item: Any, size: int, crop_pct: float) -> Tensor:
    """One item as (3, `size`, `size`) uint8. Raises CareHubError if it can't be decoded."""
    if isinstance(item, Tensor):
        return (_resize_tensor(item[None], size, crop_pct)[0] * 255).round().byte()
    if isinstance(item, dict):  # an undecoded cell of `datasets`
        item = item.get("bytes") or item.get("path")
    return square_tensor(to_rgb(item), size, crop_pct)


def _resize_tensor(x: Tensor, size: int, crop_pct: float) -> Tensor:
    """(N, 3, H, W) to (N, 3, `size`, `size`), as `decode.resize_and_center_crop` does for images."""
    if x.shape[2:] == (size, size):
        return x
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    width, height = resized_shape(x.shape[3], x.shape[2], size, crop_pct)
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = center_offset(height, size), center_offset(width, size)
    return x[..., top : top + size, left : left + size]
