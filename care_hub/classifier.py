"""Linear heads on frozen features: one file for each data set, beside the encoder they were trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .encoder import Encoder, load_encoder
from .errors import CareHubError
from .export import sha256
from .registry import locate


@dataclass
class LinearHead:
    """logits = features @ weight.T + bias, on backbone features. `metrics`: top1, top5 in per cent, n_train, n_test, ..."""

    dataset: str
    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)
    class_names: list[str]
    metrics: dict[str, float]
    encoder: str = ""  # sha256 of the backbone's model.safetensors

    def __call__(self, features):
        """(N, d) -> logits (N, C); tensor or array, as it came."""
        if isinstance(features, np.ndarray):
            return features @ self.weight.numpy().T + self.bias.numpy()
        return features @ self.weight.to(features).T + self.bias.to(features)

    def save(self, folder: str | Path) -> Path:
        """Write linear_head.<dataset>.safetensors into `folder`, and its sha256 into config.json if there is one."""
        path = Path(folder) / file_name(self.dataset)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "dataset": self.dataset, "encoder": self.encoder}
        metadata |= {"class_names": json.dumps(self.class_names), "metrics": json.dumps(self.metrics)}
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, path, metadata=metadata)
        config = path.parent / "config.json"
        if config.is_file():
            values = json.loads(config.read_text())
            values["care"].setdefault("sha256", {})[path.name] = sha256(path)
            half = config.with_suffix(".writing")  # a crash leaves the old file or the new one
            half.write_text(json.dumps(values, indent=2) + "\n")
            half.replace(config)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "LinearHead":
        """Read one file. Raises CareHubError if it is not a head, is cut short, or belongs to other backbone weights than
        those beside it."""
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                meta, weight, bias = file.metadata() or {}, file.get_tensor("weight").float(), file.get_tensor("bias").float()
            head = cls(meta["dataset"], weight, bias, json.loads(meta["class_names"]), json.loads(meta["metrics"]), meta.get("encoder", ""))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CareHubError(f"'{path}' is not a linear head of care_hub ({error}).") from error
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(head.class_names) != len(weight):
            raise CareHubError(f"'{path}' contradicts itself: {tuple(weight.shape)}, {tuple(bias.shape)}, {len(head.class_names)} classes.")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise CareHubError(f"'{path}' holds values that are not finite numbers.")
        backbone = path.parent / "model.safetensors"
        if head.encoder and backbone.is_file() and sha256(backbone) != head.encoder:
            raise CareHubError(f"'{path}' was trained on other weights than the model.safetensors beside it; train it again.")
        return head


def file_name(dataset: str) -> str:
    return f"linear_head.{dataset.replace('/', '--')}.safetensors"


def heads(folder: Path) -> list[Path]:
    """The files of all linear heads in an export folder."""
    return sorted(folder.glob("linear_head.*.safetensors"))


def load_linear_head(source: str | Path, dataset: str | None = None, **hub_options) -> LinearHead:
    """The head for `dataset` beside an encoder (folder, registry name or Hub id); without `dataset` the only one there."""
    folder = locate(source, **hub_options)
    found = heads(folder)
    names = [p.name.removeprefix("linear_head.").removesuffix(".safetensors").replace("--", "/") for p in found]
    if dataset is None and len(found) == 1:
        return LinearHead.load(found[0])
    if dataset not in names:
        what = f"for '{dataset}'" if dataset else "without saying for which data set"
        raise CareHubError(f"'{source}' has no linear head {what}; it has: {', '.join(names) or 'none'}.")
    return LinearHead.load(found[names.index(dataset)])


class Prediction(NamedTuple):
    labels: list[str]  # the likeliest class of each picture
    probabilities: np.ndarray  # (N, C) float32, rows sum to 1


@dataclass
class Classifier:
    """An encoder with a linear head."""

    encoder: Encoder
    head: LinearHead

    @property
    def class_names(self) -> Sequence[str]:
        return self.head.class_names

    def classify(self, images, batch_size: int = 256, progress: bool = False) -> Prediction:
        """Classes of `images`, which may be whatever `Encoder.encode` takes."""
        features = self.encoder.encode(images, batch_size, space="backbone", progress=progress)
        probabilities = torch.from_numpy(self.head(features)).softmax(dim=1).numpy()
        return Prediction([self.class_names[k] for k in probabilities.argmax(axis=1)], probabilities)


def load_classifier(source: str | Path, dataset: str | None = None, **hub_options) -> Classifier:
    """Encoder and head from a folder, a registry name or a Hub id; `dataset` may be left out where there is one head."""
    folder = locate(source, **hub_options)
    encoder, head = load_encoder(folder), load_linear_head(folder, dataset)
    if head.weight.shape[1] != encoder.backbone.num_features:
        raise CareHubError(f"the head for '{head.dataset}' does not take the {encoder.backbone.num_features} features of this encoder.")
    return Classifier(encoder, head)
