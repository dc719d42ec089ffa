"""Labeled splits and parts of data sets; embeddings of whole data sets and of augmented views."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..augment import AugmentationConfig, center_crop, permutation
from ..config import EncoderConfig
from ..data.images import Images
from ..encoder import Encoder
from ..errors import CareHubError

Augmentation = Callable[[Tensor], Tensor]  # (N, 3, S, S) floats in [0, 1] -> the same
CHUNK = 500  # images that are embedded at once


_remembered: ContextVar[dict | None] = ContextVar("remembered", default=None)


@contextmanager
def remember_features() -> Iterator[None]:
    """For `with`: `embed_all` embeds each split once, however many evaluations ask for it."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def embed_all(
    encoder: Encoder,
    images: Images,
    accelerator: Accelerator,
    space: str,
    batch: int = CHUNK,
    view: Callable[[Tensor, Tensor], Tensor] | None = None,
    title: str = "",
) -> Tensor:
    """(N, d) embeddings of all images on every process, each process computing its share.

    `view`: (uint8 images, their indices) -> what the encoder sees; by default the central square.
    `title`: of a progress bar, which there is on terminals, and only if it has one.
    """
    known, key = _remembered.get(), (id(encoder), id(images), space)
    if known is not None and view is None and key in known:
        return known[key][-1]
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = -(-len(images) // processes)
    own = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    parts, model = [], encoder.evaluating()
    indices = own.split(batch)
    hidden = not title or rank > 0 or None  # None: only on a terminal
    with tqdm(total=len(own), desc=title, unit="image", leave=False, disable=hidden) as bar:
        for index, x in zip(indices, images.batches(indices), strict=True):
            seen = view(x, index) if view else center_crop(x, encoder.config.image_size)
            parts.append(model.embed(seen, space))
            bar.update(len(index))
    found = accelerator.gather(torch.cat(parts))[: len(images)]
    if known is not None and view is None:
        known[key] = encoder, images, found  # kept, so that nothing else gets their ids
    return found


def embed_view(encoder: Encoder, images: Tensor, *steps: Augmentation, space: str = "projection") -> Tensor:
    """(N, d) embeddings, on the CPU, of (N, 3, S, S) uint8 `images` after `steps`, first to last."""
    parts = []
    for x in images.split(CHUNK):
        x = x.to(encoder.device).float() / 255
        for step in steps:
            x = step(x)
        parts.append(encoder.embed(x, space).cpu())
    return torch.cat(parts)


def recorded_augmentation(config: EncoderConfig) -> AugmentationConfig:
    """The augmentation that an encoder was trained with, without normalization.

    That of the public code's CIFAR form where it is not recorded. Raises CareHubError for values
    that can't be.
    """
    size, options = config.image_size, config.training
    try:
        low, width = float(options["crop_scale"]), options["blur_kernel_size"]
        brightness, contrast, saturation, hue = map(float, options["jitter"])
        return AugmentationConfig(
            size,
            scale=(low, 1.0),
            flip=float(options.get("flip", 0.5)),  # which was no option in version 0.1.0
            jitter=(brightness, contrast, saturation, hue),
            jitter_p=float(options["jitter_p"]),
            grayscale=float(options["grayscale"]),
            blur=float(options["blur"]),
            blur_kernel_size=int(width),
        )
    except KeyError:
        return AugmentationConfig(size)
    except (TypeError, ValueError, CareHubError) as error:
        raise CareHubError(f"the augmentation recorded with this encoder makes no sense: {error}.") from error


@torch.no_grad()
def embed_spaces(encoder: Encoder, x: Tensor) -> dict[str, Tensor]:
    """Backbone features and, where there is a head, its projection, on the CPU, out of one forward pass.

    `x` as `Encoder.embed` takes it.
    """
    found = {"backbone": (h := encoder.embed(x, "backbone")).cpu()}
    if (head := encoder.evaluating().projection) is not None:
        found["projection"] = F.normalize(head(h), dim=1).cpu()
    return found


def random_subset(count: int, wanted: int, seed: int = 0) -> Tensor:
    """At most `wanted` indices of `count` images, in random order: many data sets are sorted by class.

    >>> random_subset(5, 2).tolist() == random_subset(5, 2).tolist()
    True
    """
    if wanted < 1:
        raise CareHubError(f"at least 1 image must be asked for, got {wanted}.")
    return permutation(count, seed, "images")[:wanted]


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Ascending indices of a random `fraction` of the images of each class, at least one of each.

    >>> label_subset(torch.tensor([0, 0, 0, 0, 1]), 0.5, seed=0).shape
    torch.Size([3])
    """
    order = permutation(len(labels), seed, "subset")
    parts = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([part[: max(1, round(fraction * len(part)))] for part in parts]).sort().values


@dataclass(frozen=True)
class LabeledImages:
    """Images of one split with their classes, all known."""

    images: Images
    labels: Tensor  # (N,) int64, from 0
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "LabeledImages":
        """The images `index`, decoded and in memory."""
        return LabeledImages(self.images.take(index), self.labels[index], self.class_names)


def labeled(dataset: str, train: Images, test: Images) -> tuple[LabeledImages, LabeledImages]:
    """Both splits without images of unknown label (-1). Raises CareHubError where none is known."""
    if train.labels is None or test.labels is None or not (train.labels >= 0).any():
        raise CareHubError(f"this needs labels in a training and a test split, which '{dataset}' lacks.")
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    names = train.class_names or [str(k) for k in range(classes)]
    return _known(LabeledImages(train, train.labels, names)), _known(LabeledImages(test, test.labels, names))


def _known(split: LabeledImages) -> LabeledImages:
    known = split.labels >= 0
    return split if known.all() else split.take(known.nonzero()[:, 0])
