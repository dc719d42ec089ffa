"""Linear heads on frozen features: one file for each data set, beside the encoder they were trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CareHubError
from .evaluation_record import check_accuracy
from .export import folder_lock, sha256, write_tensors, write_text

PREFIX, SUFFIX = "linear_head.", ".safetensors"
READ_ERRORS = (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError)


@dataclass
class LinearHead:
    """logits = features @ weight.T + bias, on backbone features.

    >>> import torch
    >>> head = LinearHead("pets", torch.eye(2), torch.zeros(2), ["cat", "dog"], {"top1": 91.5})
    >>> head(torch.tensor([[3.0, 1.0]]))
    tensor([[3., 1.]])
    """

    dataset: str
    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)
    class_names: list[str]
    metrics: dict[str, Any]  # top1 and top5 in per cent, n_train, n_test, and how it was trained
    encoder: str = ""  # sha256 of the backbone's model.safetensors

    @overload
    def __call__(self, features: Tensor) -> Tensor: ...
    @overload
    def __call__(self, features: np.ndarray) -> np.ndarray: ...

    def __call__(self, features: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """(N, d) -> logits (N, C); tensor or array, as it came."""
        if isinstance(features, np.ndarray):
            return features @ self.weight.numpy().T + self.bias.numpy()
        return features @ self.weight.to(features).T + self.bias.to(features)

    def save(self, folder: str | Path) -> Path:
        """Write linear_head.<dataset>.safetensors into `folder`, and its sha256 into a config.json there."""
        path = Path(folder) / head_file_name(self.dataset)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"dataset": self.dataset, "encoder": self.encoder}
        metadata |= {"class_names": json.dumps(self.class_names), "metrics": json.dumps(self.metrics)}
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        with folder_lock(path.parent):
            write_tensors(path, tensors, metadata)
            _record_sum(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "LinearHead":
        """Read one file.

        Raises CareHubError if it is not a head, is cut short, or belongs to other backbone weights than
        those beside it.
        """
        path = Path(path)
        try:
            head = cls._read(path)
        except READ_ERRORS as error:
            raise CareHubError(f"'{path}' is not a linear head of care_hub ({error}).") from error
        head._check(path)
        return head

    @classmethod
    def _read(cls, path: Path) -> "LinearHead":
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weight, bias = file.get_tensor("weight").float(), file.get_tensor("bias").float()
        names, metrics = json.loads(about["class_names"]), json.loads(about["metrics"])
        if not isinstance(names, list):
            raise TypeError(f"class_names {names!r:.50}")
        check_accuracy(metrics)
        return cls(about["dataset"], weight, bias, names, metrics, about.get("encoder", ""))

    def _check(self, path: Path) -> None:
        """Raise CareHubError if what `path` contains does not fit together, or the backbone beside it."""
        weight, bias = tuple(self.weight.shape), tuple(self.bias.shape)
        if len(weight) != 2 or bias != weight[:1] or len(self.class_names) != weight[0]:
            raise CareHubError(
                f"'{path}' contradicts itself: {weight}, {bias}, {len(self.class_names)} classes."
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise CareHubError(f"'{path}' contains values that are not finite numbers.")
        backbone = path.parent / "model.safetensors"
        if self.encoder and backbone.is_file() and sha256(backbone) != self.encoder:
            raise CareHubError(
                f"'{path}' was trained on other weights than the model.safetensors beside it; train it again."
            )


def _record_sum(path: Path) -> None:
    """Put the sha256 of `path` into the config.json beside it, if there is one."""
    config = path.parent / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values["care"].setdefault("sha256", {})[path.name] = sha256(path)
        write_text(config, json.dumps(values, indent=2) + "\n")


def head_file_name(dataset: str) -> str:
    """Name of the file with the head for `dataset`.

    >>> head_file_name("org/pets")
    'linear_head.org--pets.safetensors'
    """
    return PREFIX + dataset.replace("/", "--") + SUFFIX


def head_files(folder: Path) -> list[Path]:
    """The files of all linear heads in an export folder, sorted."""
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))


def _dataset_of(path: Path) -> str:
    return path.name.removeprefix(PREFIX).removesuffix(SUFFIX).replace("--", "/")


def find_head(folder: Path, dataset: str | None, source: str | Path) -> LinearHead:
    """The head for `dataset` in an export folder; without `dataset` the only one there.

    `source`: what the user calls the encoder. Raises CareHubError where there is no such head.
    """
    files = {_dataset_of(path): path for path in head_files(folder)}
    if dataset is None and len(files) == 1:
        return LinearHead.load(*files.values())
    if dataset not in files:
        what = f"for '{dataset}'" if dataset else "without saying for which data set"
        known = ", ".join(files) or "none"
        raise CareHubError(f"'{source}' has no linear head {what}; it has: {known}.")
    return LinearHead.load(files[dataset])
