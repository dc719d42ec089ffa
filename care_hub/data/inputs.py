"""What `Encoder.encode` accepts, decoded into batches of the encoder's image size."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import CareHubError
from .decode import center_offset, find_images, resize_and_center_crop, resized_shape, to_rgb, to_tensor


def as_items(images: Any) -> Tensor | Sequence[Any]:
    """Anything that `encode` accepts, as a tensor (N, 3, H, W) or as something with a length and slices.

    `images`: a path, a folder, a PIL image, a uint8 array (HWC or NHWC), a float tensor in [0, 1] (NCHW or
    CHW), or a sequence or iterable of any of these. Raises CareHubError for other tensors and empty folders.

    >>> as_items(np.zeros((8, 8, 3), np.uint8))[0].shape
    (8, 8, 3)
    """
    if isinstance(images, Tensor):
        _check_tensor(images)
        return images if images.ndim == 4 else images[None]
    if isinstance(images, str | Path) and Path(images).is_dir():
        return find_images(images)
    if isinstance(images, str | Path | Image.Image | bytes | dict):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim != 4:
        return [images]
    return images if hasattr(images, "__getitem__") and hasattr(images, "__len__") else list(images)


def _check_tensor(images: Tensor) -> None:
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise CareHubError(f"an image tensor must be (N, 3, H, W) or (3, H, W), got {tuple(images.shape)}.")
    if images.dtype == torch.uint8 or not images.numel():
        return
    if not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise CareHubError(
            "a float image tensor must lie in [0, 1]; normalization is the encoder's own business."
        )


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
    if len(items) == 0:
        return
    if isinstance(items, Tensor):
        for x in items.split(batch_size):
            yield _resize_tensor(x, size, crop_pct), []
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def submit(start: int) -> list[Future[Tensor]]:
            batch = items[start : start + batch_size]
            return [pool.submit(decode_item, item, size, crop_pct) for item in batch]

        ahead = submit(0)
        for start in range(batch_size, len(items), batch_size):
            decoded = [_result(future, on_broken) for future in ahead]
            ahead = submit(start)
            yield _stack(decoded, size)
        yield _stack([_result(future, on_broken) for future in ahead], size)


def decode_item(item: Any, size: int, crop_pct: float) -> Tensor:
    """One item as (3, `size`, `size`) uint8. Raises CareHubError if it can't be decoded."""
    if isinstance(item, Tensor):
        return (_resize_tensor(item[None], size, crop_pct)[0] * 255).round().byte()
    if isinstance(item, dict):  # an undecoded cell of `datasets`
        item = item.get("bytes") or item.get("path")
    return to_tensor(resize_and_center_crop(to_rgb(item), size, crop_pct))


def _result(future: Future[Tensor], on_broken: Callable[[CareHubError], None] | None) -> Tensor | None:
    try:
        return future.result()
    except CareHubError as error:
        if on_broken is None:
            raise
        on_broken(error)
        return None


def _stack(decoded: list[Tensor | None], size: int) -> tuple[Tensor, list[int]]:
    """The batch, and the places of broken images (None), which become zeros."""
    broken = [place for place, x in enumerate(decoded) if x is None]
    empty = torch.zeros(3, size, size, dtype=torch.uint8)
    return torch.stack([empty if x is None else x for x in decoded]), broken


def _resize_tensor(x: Tensor, size: int, crop_pct: float) -> Tensor:
    """(N, 3, H, W) to (N, 3, `size`, `size`), as `decode.resize_and_center_crop` does for images."""
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    width, height = resized_shape(width, height, size, crop_pct)
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = center_offset(height, size), center_offset(width, size)
    return x[..., top : top + size, left : left + size]
