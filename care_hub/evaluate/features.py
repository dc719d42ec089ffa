"""Embeddings of whole data sets and of augmented views."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..augment import center_crop, seeded_generator
from ..data.images import Images
from ..encoder import Encoder

Augmentation = Callable[[Tensor], Tensor]  # (N, 3, S, S) floats in [0, 1] -> the same
CHUNK = 500  # images that are embedded at once


def embed_all(
    encoder: Encoder,
    images: Images,
    accelerator: Accelerator,
    space: str,
    batch: int = CHUNK,
    view: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """(N, d) embeddings of all images on every process, each process computing its share.

    `view`: (uint8 images, their indices) -> what the encoder sees; by default the central square.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = -(-len(images) // processes)
    own = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    parts = []
    indices = own.split(batch)
    for index, x in zip(indices, images.batches(indices), strict=True):
        seen = view(x, index) if view else center_crop(x, encoder.config.image_size)
        parts.append(encoder.embed(seen, space))
    return accelerator.gather(torch.cat(parts))[: len(images)]


def embed_view(encoder: Encoder, images: Tensor, *steps: Augmentation, space: str = "projection") -> Tensor:
    """(N, d) embeddings, on the CPU, of (N, 3, S, S) uint8 `images` after `steps`, first to last."""
    parts = []
    for x in images.split(CHUNK):
        x = x.to(encoder.device).float() / 255
        for step in steps:
            x = step(x)
        parts.append(encoder.embed(x, space).cpu())
    return torch.cat(parts)


def random_subset(count: int, wanted: int, seed: int = 0) -> Tensor:
    """At most `wanted` indices of `count` images, in random order: data sets are often sorted by class.

    >>> random_subset(5, 2).tolist() == random_subset(5, 2).tolist()
    True
    """
    return torch.randperm(count, generator=seeded_generator(seed, "images"))[:wanted]
