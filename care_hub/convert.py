"""Checkpoints of the public CARE code become export folders."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ProjectionConfig
from .data.sources import dataset_spec
from .encoder import Encoder
from .errors import CareHubError
from .hub.export import fill, projection_of

EXPECTED = (
    "expected a checkpoint of the public CARE code: a dict with a 'state_dict' whose keys begin with "
    "module.f. and module.g. (CIFAR, STL-10) or module.encoder_q. (ImageNet-100)"
)
# (has bottlenecks, number of residual blocks) -> architecture
RESNETS = {(False, 8): "resnet18", (False, 16): "resnet34", (True, 16): "resnet50"}
# CIFAR: f is the backbone, a Sequential, and g the head; an unknown layer keeps its number and is refused.
CIFAR = {
    "f.0.": "backbone.conv1.",
    "f.1.": "backbone.bn1.",
    "f.3.": "backbone.layer1.",
    "f.4.": "backbone.layer2.",
    "f.5.": "backbone.layer3.",
    "f.6.": "backbone.layer4.",
    "f.": "backbone.",
    "g.": "projection.",
}
IMAGENET = {"encoder_q.fc.": "projection.", "encoder_q.": "backbone."}  # a ResNet whose fc is the head


def convert_checkpoint(path: str | Path, out: str | Path, dataset_name: str | None = None) -> Path:
    """Write the export folder `out` from the .pth.tar file `path`.

    Only tensors, plain containers and the argparse.Namespace that CIFAR checkpoints hold are
    unpickled. `dataset_name` sets the normalization of CIFAR and STL-10 encoders, where the
    checkpoint does not say it. Raises CareHubError for any other file.
    """
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise CareHubError(f"'{out}' exists and is not an empty folder.")
    checkpoint = _read_checkpoint(path)
    public = {str(key).removeprefix("module."): value for key, value in checkpoint["state_dict"].items()}
    is_cifar = "f.0.weight" in public
    if not is_cifar and "encoder_q.conv1.weight" not in public:
        found = ", ".join(list(public)[:3]) or "none"
        raise CareHubError(f"'{path}' can't be converted: {EXPECTED}; found keys like {found}.")
    weights = _rename(public, CIFAR if is_cifar else IMAGENET)
    resnet, head = _architecture(weights, is_cifar, path)
    name = dataset_name or getattr(checkpoint.get("args"), "dataset_name", None)
    if name is None and is_cifar:
        raise CareHubError(
            f"'{path}' does not say what it was trained on; pass `dataset_name`: cifar10, cifar100 or stl10."
        )
    name = name or "imagenet100"
    spec = dataset_spec(name)
    encoder = Encoder.new(
        f"{resnet}_cifar" if is_cifar else resnet,
        spec.size,
        *spec.statistics,
        head.hidden,
        head.outputs,
        head.norm,
        crop_pct=1.0 if is_cifar else 0.875,
    )
    extra = {"converted_from": Path(path).name, "epoch": checkpoint.get("epoch")}
    encoder.config = replace(encoder.config, dataset=name, extra=extra)
    fill(encoder, weights, Path(path))
    return encoder.save_pretrained(out)


def _read_checkpoint(path: str | Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CareHubError(f"there is no checkpoint '{path}'.") from None
    except Exception as error:  # on damaged files unpickling raises whatever happens to go wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CareHubError(f"'{path}' can't be read safely: {reason}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CareHubError(f"'{path}' can't be converted: {EXPECTED}; found {type(checkpoint).__name__}.")
    return checkpoint


def _rename(public: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """The weights under one of `prefixes` (the first that fits), by the names of an Encoder."""
    weights = {}
    for key, value in public.items():
        if before := next(filter(key.startswith, prefixes), None):
            weights[prefixes[before] + key.removeprefix(before)] = value
    return weights


def _architecture(weights: dict[str, Tensor], norm: bool, path: str | Path) -> tuple[str, ProjectionConfig]:
    """Name of the ResNet, and shape of the projection head."""
    blocks = sum(key.startswith("backbone.layer") and key.endswith(".conv1.weight") for key in weights)
    resnet = RESNETS.get(("backbone.layer1.0.conv3.weight" in weights, blocks))
    head = projection_of(_rename(weights, {"projection.": ""}))
    if resnet is None or head is None or head.norm != norm:
        wanted = f"{EXPECTED}, of a ResNet-18, -34 or -50"
        raise CareHubError(f"'{path}' can't be converted: {wanted}; found {blocks} residual blocks.")
    return resnet, head
