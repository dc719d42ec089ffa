"""From a name to an encoder, a classifier, a backbone, a list: what most people import.

A name is a folder (a run's or an export), a name in the registry, or the id of a repository on the Hub.
"""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

from .encoder import Encoder
from .errors import CareHubError
from .hub.client import find_repositories
from .hub.export import plain_config
from .hub.linear_head import LinearHead, find_head
from .hub.push import push_folder
from .hub.registry import entries, find_entry, locate
from .hub.rotation_set import RotationSet, find_rotations
from .models import Backbone, build_model, feature_width


def load_encoder(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Encoder:
    """`Encoder.from_pretrained`, on the GPU if there is one.

    >>> encoder = load_encoder("resnet10_w16_small.care_shapes")
    >>> encoder.encode(torch.zeros(1, 3, 32, 32)).shape
    (1, 128)
    """
    encoder = Encoder.from_pretrained(source, revision, token, cache_dir, local_files_only)
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def any_encoder(source: str | Path, **hub_options: Any) -> Encoder:
    """The encoder called `source`, or a pretrained network of timm's, which has no head; on the CPU.

    timm's: `architecture.tag`, or a folder or repository with its config.json and
    model.safetensors. `hub_options` as those of `load_encoder`. Raises CareHubError as it does.
    """
    name = str(source)
    if os.path.isdir(source) or find_entry(name) or not timm.is_model(name):
        return Encoder.from_folder(locate(source, **hub_options), plain=True)
    network = build_model(name, pretrained=True)
    seen = network.pretrained_cfg
    encoder = Encoder(plain_config({"architecture": seen["architecture"], "pretrained_cfg": seen}))
    encoder.backbone.load_state_dict(network.state_dict())
    return encoder.eval()


def load_linear_head(source: str | Path, dataset: str | None = None, **hub_options: Any) -> LinearHead:
    """The head for `dataset` beside an encoder; without `dataset` the only one there.

    `hub_options`: revision, token, cache_dir, local_files_only. Raises CareHubError if there is no
    such head.

    >>> load_linear_head("resnet10_w16_small.care_shapes").class_names[0]
    'circle'
    """
    return find_head(locate(source, **hub_options), dataset, source)


def load_rotations(source: str | Path, **hub_options: Any) -> RotationSet:
    """The named rotations beside an encoder, which `care-hub rotations` has fitted.

    `hub_options`: revision, token, cache_dir, local_files_only. Raises CareHubError if there are
    none, and if they are damaged or of other weights.
    """
    return find_rotations(locate(source, **hub_options), source)


class Prediction(NamedTuple):
    """What a classifier says of N images."""

    labels: list[str]  # the likeliest class of each
    probabilities: np.ndarray  # (N, C) float32, rows sum to 1


@dataclass
class Classifier:
    """An encoder with a linear head."""

    encoder: Encoder
    head: LinearHead

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the C classes, in the order of the probabilities."""
        return self.head.class_names

    def classify(self, images: Any, batch_size: int = 256, progress: bool = False) -> Prediction:
        """Classes of `images`, which may be whatever `Encoder.encode` takes."""
        features = self.encoder.encode(images, batch_size, space="backbone", progress=progress)
        probabilities = torch.from_numpy(self.head(features)).softmax(dim=1).numpy()
        return Prediction([self.class_names[k] for k in probabilities.argmax(axis=1)], probabilities)


def load_classifier(source: str | Path, dataset: str | None = None, **hub_options: Any) -> Classifier:
    """Encoder and head; `dataset` may be left out where there is one head.

    >>> classifier = load_classifier("resnet10_w16_small.care_shapes")
    >>> classifier.classify(torch.zeros(2, 3, 32, 32)).probabilities.shape
    (2, 10)
    """
    folder = locate(source, **hub_options)
    encoder, head = load_encoder(folder), load_linear_head(folder, dataset)
    features = feature_width(encoder.backbone, encoder.config.image_size)
    if head.weight.shape[1] != features:
        raise CareHubError(f"the head for '{head.dataset}' does not take this encoder's {features} features.")
    return Classifier(encoder, head)


def create_model(name: str, pretrained: bool = False, num_classes: int = 0, **kwargs: Any) -> Backbone:
    """A backbone by name, for fine-tuning: ours or any of timm's; `num_classes=0` for pooled features.

    `pretrained`: CARE weights where the registry has some for `name` (`architecture` or
    `architecture.tag`), else timm's. Raises CareHubError for an unknown name, with the nearest
    known one.

    >>> create_model("resnet18_cifar", num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """
    if num_classes < 0:
        raise CareHubError(f"`num_classes` can't be negative, got {num_classes}.")
    entry = find_entry(name) if pretrained else None
    if entry is None:
        return build_model(name, pretrained, num_classes, **kwargs)
    if kwargs:
        raise CareHubError(f"'{entry.name}' comes as it was trained; leave out {', '.join(kwargs)}.")
    backbone = Encoder.from_pretrained(entry.name).backbone.train()
    if num_classes:
        backbone.reset_classifier(num_classes)
    return backbone


def list_models(
    filter: str = "", pretrained: bool = False, hub: bool = False, author: str | None = None
) -> list[str]:
    """Names that match the wildcard `filter`.

    Architectures (timm's registry, ours included); with `pretrained` the encoders that
    `load_encoder` knows by name; with `hub` the ids of CARE repositories on the Hub (of `author`).

    >>> list_models("resnet18*cifar")
    ['resnet18_cifar', 'resnet18_w16_cifar']
    """
    if hub:
        return find_repositories(author, filter)
    if pretrained:
        return sorted(fnmatch.filter(entries(), filter or "*"))
    return timm.list_models(filter)


def push_export(source: str | Path, repo_id: str, **options: Any) -> str:
    """Upload an encoder with its model card; returns the address of the commit.

    `source`: an export folder, a run folder, or a registry name. What can't be loaded is not
    published. `options`: as those of `hub.push.push_folder`.
    """
    folder = locate(source)
    Encoder.from_folder(folder)
    return push_folder(folder, repo_id, **options)
