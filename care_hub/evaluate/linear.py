"""Linear probe: multinomial logistic regression on frozen backbone features."""

import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .. import augment, card, hub
from ..classifier import LinearHead
from ..data import sources
from ..data.sources import Images
from ..distributed import use_all_cores
from ..encoder import Encoder
from ..errors import CareHubError
from ..export import sha256
from ..registry import locate
from .monitor import embed_all

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # candidates for the weight of |W|^2 / 2 beside the mean cross-entropy


def fit_linear(features: Tensor, labels: Tensor, classes: int, penalty: float, steps: int = 100) -> tuple[Tensor, Tensor]:
    """(weight (C, d), bias (C,)) that minimise mean cross-entropy + penalty * |W|^2 / 2 over standardised features (N, d).

    Convex, solved by L-BFGS; the standardisation is folded into what is returned.
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = (weight / std).detach()
    return weight, bias.detach() - weight @ mean


def choose_penalty(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> float:
    """The candidate that does best on a fifth of the training images, drawn by `seed`; the test split is never seen."""
    order = torch.randperm(len(features), generator=augment.generator(seed, "validation")).to(features.device)
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def accuracy(penalty: float) -> float:
        weight, bias = fit_linear(features[rest], labels[rest], classes, penalty)
        return topk(features[held] @ weight.T + bias, labels[held], 1)

    return max(PENALTIES, key=accuracy)


def topk(logits: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).float().mean().item()


def linear_probe(encoder: Encoder, dataset: str, train: Images, test: Images | None, accelerator: Accelerator, seed: int = 0) -> LinearHead:
    """Features once, by all processes; then the head. Raises CareHubError where labels or a test split are missing."""
    if test is None or train.labels is None or test.labels is None:
        raise CareHubError(f"a linear probe needs labels in a training and a test split, which '{dataset}' does not have.")
    began = time.perf_counter()
    known = (train.labels >= 0).nonzero().squeeze(1)
    train = train if len(known) == len(train) else train.take(known)
    x, x_test = (embed_all(encoder, images, accelerator, "backbone").float() for images in (train, test))
    y, y_test = train.labels.to(x.device), test.labels.to(x.device)
    names = train.class_names or [str(k) for k in range(int(y.max()) + 1)]
    features_seconds = time.perf_counter() - began
    penalty = choose_penalty(x, y, len(names), seed)
    weight, bias = fit_linear(x, y, len(names), penalty)
    logits = x_test @ weight.T + bias
    metrics = {f"top{k}": round(topk(logits, y_test, k), 2) for k in (1, 5)} | {"n_train": len(x), "n_test": len(x_test)}
    metrics |= {"penalty": penalty, "seed": seed, "features_seconds": round(features_seconds, 1)}
    metrics["head_seconds"] = round(time.perf_counter() - began - features_seconds, 1)
    return LinearHead(dataset, weight.cpu(), bias.cpu(), names, metrics)


def evaluate(
    source: str, dataset: str, data_root: str | None = None, output_dir: str | None = None, push_to_hub: str | None = None, seed: int = 0,
    num_workers: int = 2, **columns,
) -> dict:  # fmt: skip
    """`eval_linear.py`: probe the encoder `source` on `dataset`, save the head and the card, maybe push; returns the result
    (on the main process, else nothing)."""
    if push_to_hub:
        hub.check_push(push_to_hub)
    folder = locate(source)
    if output_dir is None and not Path(source).is_dir():
        raise CareHubError(f"'{source}' is not a folder of yours; say by --output-dir where encoder and head shall be saved.")
    target = Path(output_dir or folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CareHubError(f"the folder '{target}' can't be written ({error.strerror}).") from error
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    use_all_cores(accelerator.device)
    encoder = Encoder.from_folder(folder).to(accelerator.device)
    size = encoder.care["image_size"]
    options = {"workers": num_workers, "progress": accelerator.is_main_process, **columns}
    train, test = (sources.load(dataset, split, data_root, size, **options) for split in ("train", "test"))
    head = linear_probe(encoder, dataset, train, test, accelerator, seed)
    head.encoder = sha256(folder / "model.safetensors")
    if not accelerator.is_main_process:
        return {}
    if target.absolute() != folder.absolute():
        for path in (p for p in folder.iterdir() if p.is_file()):
            shutil.copy(path, target / path.name)
    head.save(target)
    card.write(target)
    if push_to_hub:
        print(hub.push(target, push_to_hub), file=sys.stderr)
    return {"encoder": source, "dataset": dataset} | head.metrics
