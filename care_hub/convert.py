"""Checkpoints of the public CARE code become export folders."""

import argparse
import pickle
from pathlib import Path

import torch
from torch import Tensor

from .data import sources
from .encoder import Encoder
from .errors import CareHubError
from .export import fill

EXPECTED = (
    "expected a checkpoint of the public CARE code: a dict with a 'state_dict' whose keys begin with module.f. and module.g. "
    "(CIFAR, STL-10) or module.encoder_q. (ImageNet-100)"
)


def convert(path: str | Path, out: str | Path, dataset_name: str | None = None) -> Path:
    """Write the export folder `out` from the .pth.tar file `path`.

    Only tensors, plain containers and the argparse.Namespace that CIFAR checkpoints hold are unpickled. `dataset_name`
    (for the normalisation of CIFAR and STL-10 encoders) is needed where the checkpoint does not tell. Raises CareHubError
    for any other file.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise CareHubError(f"'{out}' exists and is not an empty folder.")
    checkpoint = _read(path)
    state = {k.removeprefix("module."): v for k, v in checkpoint["state_dict"].items()}
    found = f"found keys like {', '.join(list(state)[:3]) or 'none'}"
    small = "f.0.weight" in state
    if not small and "encoder_q.conv1.weight" not in state:
        raise CareHubError(f"'{path}' can't be converted: {EXPECTED}; {found}.")
    backbone, projection = _cifar(state) if small else _imagenet(state)
    blocks = sum(k.endswith(".conv1.weight") for k in backbone if k.startswith("layer"))
    depth = {(False, 8): "resnet18", (False, 16): "resnet34", (True, 16): "resnet50"}.get(("layer1.0.conv3.weight" in backbone, blocks))
    last = "3" if small else "2"
    if depth is None or f"{last}.weight" not in projection:
        raise CareHubError(f"'{path}' can't be converted: {EXPECTED}, of a ResNet-18, -34 or -50; found {blocks} residual blocks.")
    name = dataset_name or getattr(checkpoint.get("args"), "dataset_name", None) or (None if small else "imagenet100")
    if name is None:
        raise CareHubError(f"'{path}' does not say what it was trained on; give --dataset-name cifar10, cifar100 or stl10.")
    about = sources.spec(name)
    encoder = Encoder.new(
        f"{depth}_cifar" if small else depth, about.size, *about.statistics, hidden=len(projection["0.weight"]),
        outputs=len(projection[f"{last}.weight"]), norm=small, crop_pct=1.0 if small else 0.875,
    )  # fmt: skip
    encoder.care |= {"dataset": name, "converted_from": Path(path).name, "epoch": checkpoint.get("epoch")}
    fill(encoder.backbone, backbone, Path(path))
    fill(encoder.projection, projection, Path(path))
    return encoder.save_pretrained(out)


def _read(path: str | Path) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CareHubError(f"there is no checkpoint '{path}'.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CareHubError(f"'{path}' can't be read safely: {str(error).strip().splitlines()[0] or type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CareHubError(f"'{path}' can't be converted: {EXPECTED}; found {type(checkpoint).__name__}.")
    return checkpoint


def _cifar(state: dict[str, Tensor]) -> tuple[dict, dict]:
    """There the backbone is a Sequential: 0 = conv1, 1 = bn1, 3 to 6 = layer1 to layer4."""
    names = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}
    backbone = {}
    for key, value in state.items():
        if key.startswith("f."):
            place, rest = key[2:].split(".", 1)
            backbone[f"{names.get(place, place)}.{rest}"] = value
    return backbone, {k[2:]: v for k, v in state.items() if k.startswith("g.")}


def _imagenet(state: dict[str, Tensor]) -> tuple[dict, dict]:
    query = {k.removeprefix("encoder_q."): v for k, v in state.items() if k.startswith("encoder_q.")}
    head = {k[3:]: v for k, v in query.items() if k.startswith("fc.")}
    return {k: v for k, v in query.items() if not k.startswith("fc.")}, head
