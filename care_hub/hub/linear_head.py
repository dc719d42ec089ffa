"""Linear heads on frozen features: a file for each data set, beside the encoder they belong to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import CareHubError
from ..files import make_folder, own_file, read_header, read_tensors, write_tensors, write_text
from ..schema import check_type
from .evaluation_record import Metrics
from .export import READ_ERRORS, content_sum, folder_lock, read_config, sha256

PREFIX = "linear_head."
Features = TypeVar("Features", Tensor, np.ndarray)


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
    metrics: dict[str, Any]  # top1 and top5 in percent, n_train, n_test, and how it was trained
    encoder: str = ""  # sha256 of the backbone's model.safetensors

    def __call__(self, features: Features) -> Features:
        """(N, d) -> logits (N, C); tensor or array, as it came. Raises CareHubError for another d."""
        d, shape = self.weight.shape[1], tuple(np.shape(features))
        if shape[-1:] != (d,):
            raise CareHubError(f"this head takes {d} features, of `space='backbone'`, got the shape {shape}.")
        if isinstance(features, np.ndarray):
            return features @ self.weight.numpy().T + self.bias.numpy()
        return features @ self.weight.to(features).T + self.bias.to(features)

    def save(self, folder: str | Path) -> Path:
        """Write linear_head.<dataset>.safetensors into `folder`, with its sha256 in it."""
        path = make_folder(folder) / head_file_name(self.dataset)
        metadata = {"dataset": self.dataset, "encoder": self.encoder}
        metadata |= {"class_names": json.dumps(self.class_names), "metrics": json.dumps(self.metrics)}
        metadata["sha256"] = content_sum([self.weight, self.bias], metadata)
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        config = path.with_name("config.json")
        with folder_lock(path.parent):
            if config.is_file():
                values = read_config(path.parent)[1]
                if values["care"].get("sha256", {}).pop(path.name, None):  # version 0.1 kept it there
                    write_text(config, json.dumps(values, indent=2) + "\n")
            write_tensors(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "LinearHead":
        """Read one file.

        Raises CareHubError if it is not a head, is damaged or cut short, or belongs to other
        backbone weights than those beside it.
        """
        path = Path(path)
        header, about = read_header(path)
        try:
            shape, bias_shape = tuple(header["weight"].shape), tuple(header["bias"].shape)
            names, metrics = json.loads(about["class_names"]), json.loads(about["metrics"])
            check_type(names, list[str], "class_names")
            check_type(metrics, Metrics, "metrics")
            dataset = about["dataset"]
        except READ_ERRORS as error:
            raise CareHubError(f"'{path}' is not a linear head of care_hub ({error!r:.200}).") from error
        classes = len(names)
        if len(shape) != 2 or bias_shape != shape[:1] or classes != shape[0] or not classes:
            raise CareHubError(f"'{path}' contradicts itself: {shape}, {bias_shape}, {classes} classes.")
        own = {"weight": torch.empty(shape, device="meta"), "bias": torch.empty(bias_shape, device="meta")}
        tensors = {name: tensor.float() for name, tensor in read_tensors(path, own).items()}
        values = [tensors["weight"], tensors["bias"]]
        if "sha256" in about and about["sha256"] != content_sum(values, about):
            raise CareHubError(f"'{path}' is damaged: its sha256 is wrong; fetch it or train it again.")
        head = cls(dataset, **tensors, class_names=names, metrics=metrics, encoder=about.get("encoder", ""))
        backbone = path.parent / "model.safetensors"
        if head.encoder and own_file(backbone) and read_header(backbone) and sha256(backbone) != head.encoder:
            raise CareHubError(f"'{path}' was trained on other weights than '{backbone}'; train it again.")
        return head


def head_file_name(dataset: str) -> str:
    """Name of the file with the head for `dataset`.

    >>> head_file_name("org/pets")
    'linear_head.org--pets.safetensors'
    """
    return f"{PREFIX}{dataset.replace('/', '--')}.safetensors"


def head_files(folder: Path) -> list[Path]:
    """The files of all linear heads in an export folder, sorted."""
    return sorted(folder.glob(f"{PREFIX}*.safetensors"))


def read_heads(folder: Path) -> list[LinearHead]:
    """All linear heads in an export folder. Raises CareHubError for one that is damaged."""
    return [LinearHead.load(path) for path in head_files(folder)]


def find_head(folder: Path, dataset: str | None, source: str | Path) -> LinearHead:
    """The head for `dataset` in an export folder; without `dataset` the only one there.

    `source`: what the user calls the encoder. Raises CareHubError where there is no such head.
    """
    files = head_files(folder)
    found = [path for path in files if dataset is None or path.name == head_file_name(dataset)]
    if len(found) != 1:
        known = ", ".join(path.stem.removeprefix(PREFIX).replace("--", "/") for path in files)
        what = f"for '{dataset}'" if dataset else "without saying for which data set"
        raise CareHubError(f"'{source}' has no linear head {what}; it has: {known or 'none'}.")
    return LinearHead.load(found[0])
