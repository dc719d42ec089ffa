"""Splits whose every image has a known label, and parts of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..augment import seeded_generator
from ..data.images import Images
from ..errors import CareHubError


@dataclass(frozen=True)
class ClassificationSplit:
    """Images of one split with their classes."""

    images: Images
    labels: Tensor  # (N,) int64, from 0
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> "ClassificationSplit":
        """The images `index`, decoded and in memory."""
        return ClassificationSplit(self.images.take(index), self.labels[index], self.class_names)


def labelled(dataset: str, train: Images, test: Images) -> tuple[ClassificationSplit, ClassificationSplit]:
    """Both splits without the images of unknown label (-1). Raises CareHubError where none is known."""
    if train.labels is None or test.labels is None or not (train.labels >= 0).any():
        raise CareHubError(
            f"this needs labels in a training and a test split, which '{dataset}' does not have."
        )
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    names = train.class_names or [str(k) for k in range(classes)]
    return _known(train, train.labels, names), _known(test, test.labels, names)


def _known(images: Images, labels: Tensor, names: list[str]) -> ClassificationSplit:
    split, known = ClassificationSplit(images, labels, names), labels >= 0
    return split if known.all() else split.take(known.nonzero().squeeze(1))


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of a random `fraction` of the images of each class, at least one of each, in ascending order.

    >>> label_subset(torch.tensor([0, 0, 0, 0, 1]), 0.5, seed=0).shape
    torch.Size([3])
    """
    if fraction == 1:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=seeded_generator(seed, "subset"))
    parts = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([part[: max(1, round(fraction * len(part)))] for part in parts]).sort().values
