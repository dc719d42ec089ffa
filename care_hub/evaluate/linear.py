"""Linear probes: multinomial logistic regression on features of a frozen encoder."""

import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from tqdm import tqdm

from .. import augment
from ..augment import permutation, seeded_generator
from ..config import EvalConfig
from ..data.images import Images
from ..data.sources import recorded_options
from ..encoder import Encoder
from ..errors import CareHubError
from ..hub.linear_head import LinearHead
from ..metrics import topk_accuracy
from .features import LabeledImages, embed_all, label_subset, recorded_augmentation

WeightAndBias = tuple[Tensor, Tensor]  # (C, d), (C,)

# Candidates for the weight of |W|^2 / 2 beside the mean cross-entropy, the strongest first.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FEW = 1000  # with fewer labels than this every fifth of them is held out in turn to choose the penalty
# (lr, weight decay, batch size) of the public code: adam for CIFAR and STL-10, sgd for ImageNet-100.
PUBLISHED = {"adam": (1e-3, 1e-6, 512), "sgd": (10.0, 0.0, 128)}
# sgd: a tenth of the rate from each of these fractions of the epochs on (the tenth is MoCo's).
LR_STEPS = (0.3, 0.4, 0.5, 0.6)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    steps: int = 100,
    start: WeightAndBias | None = None,
) -> WeightAndBias:
    """(weight (C, d), bias (C,)) that minimize mean cross-entropy + penalty * |W|^2 / 2.

    W acts on the standardized `features` (N, d); the standardization is folded into what is
    returned. Convex, solved by L-BFGS in at most `steps` steps from `start` (default: zeros).
    Raises CareHubError for features that are not finite.
    """
    if not features.isfinite().all():
        raise CareHubError("some features are not finite numbers; the encoder's weights may be damaged.")
    # The deviation of a single row is NaN.
    mean, std = features.mean(dim=0), features.std(dim=0).nan_to_num(1).clamp(min=1e-6)
    x = (features - mean) / std
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = (weight * std).requires_grad_(), (bias + weight @ mean).requires_grad_()
    optimizer = LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = (weight / std).detach()
    return weight, bias.detach() - weight @ mean


def validation_split(count: int, seed: int, fold: int = 0) -> tuple[Tensor, Tensor]:
    """Random indices of four fifths of `count` training images, and of the fifth number `fold`."""
    if count < 2:
        raise CareHubError(f"a linear probe needs at least 2 training images, got {count}.")
    order = permutation(count, seed, "validation")
    held_out = torch.arange(count) % 5 == fold
    return order[~held_out], order[held_out]


def choose_penalty(
    features: Tensor, labels: Tensor, classes: int, seed: int = 0, hidden: bool | None = True
) -> tuple[float, WeightAndBias]:
    """The penalty that does best on a held-out fifth of the training images, and a start for the fit.

    Where images are few, each fifth is held out in turn. The test split is never seen. `hidden`: of
    the progress bar, as tqdm's `disable`.
    """
    scores = dict.fromkeys(PENALTIES, 0.0)
    solutions: dict[float, WeightAndBias] = {}
    folds = range(min(5, len(features)) if len(features) < FEW else 1)
    bar = tqdm(total=len(folds) * len(PENALTIES), desc="penalties", leave=False, disable=hidden)
    for fold in folds:
        rest, held_out = (i.to(features.device) for i in validation_split(len(features), seed, fold))
        solution = None
        for penalty in PENALTIES:  # the solution of each is near that of the next
            weight, bias = solution = fit_linear(features[rest], labels[rest], classes, penalty, 40, solution)
            solutions[penalty] = solution
            scores[penalty] += topk_accuracy(features[held_out] @ weight.T + bias, labels[held_out], 1)
            bar.update()
    bar.close()
    best = max(PENALTIES, key=scores.__getitem__)
    return best, solutions[best]


def fit_best(
    features: Tensor, labels: Tensor, classes: int, seed: int = 0, hidden: bool | None = True
) -> tuple[Tensor, Tensor, float]:
    """(weight, bias, penalty): `fit_linear` with the penalty of `choose_penalty`."""
    penalty, start = choose_penalty(features, labels, classes, seed, hidden)
    return *fit_linear(features, labels, classes, penalty, start=start), penalty


def fit_sgd(
    copies: Tensor,
    labels: Tensor,
    classes: int,
    config: EvalConfig,
    seed: int = 0,
    hidden: bool | None = True,
) -> WeightAndBias:
    """(weight, bias) by the published schedule on raw features (K, N, d): epoch e sees copy e mod K."""
    lr, decay, batch_size = PUBLISHED[config.optimizer]
    lr, epochs = config.lr or lr, config.epochs or 1
    with torch.random.fork_rng(devices=[]):  # the global generator stays as it was
        torch.default_generator.manual_seed(seed)
        head = nn.Linear(copies.shape[2], classes).to(copies.device)
    if config.optimizer == "adam":
        optimizer: Adam | SGD = Adam(head.parameters(), lr, weight_decay=decay)
    else:
        optimizer = SGD(head.parameters(), lr, momentum=0.9, weight_decay=decay)
    for epoch in tqdm(range(epochs), "linear head", unit="epoch", leave=False, disable=hidden):
        if config.optimizer == "sgd":
            passed = sum(epoch >= fraction * epochs for fraction in LR_STEPS)
            optimizer.param_groups[0]["lr"] = lr * 0.1**passed
        order = permutation(len(labels), seed, "probe", epoch)
        for index in order.to(copies.device).split(batch_size):
            loss = F.cross_entropy(head(copies[epoch % len(copies), index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.weight.detach(), head.bias.detach()


def linear_probe(
    encoder: Encoder,
    train: LabeledImages,
    test: LabeledImages,
    accelerator: Accelerator,
    config: EvalConfig,
) -> list[LinearHead]:
    """A head for each seed, on features that all processes compute once, with the encoder in eval mode.

    Raises CareHubError if the encoder is not the same to the last bit afterwards.
    """
    began, before = time.perf_counter(), encoder.fingerprint
    hidden = accelerator.process_index > 0 or None  # None: only on a terminal
    seeds = range(config.seed, config.seed + config.seeds)
    subsets = [label_subset(train.labels, config.label_fraction, seed) for seed in seeds]
    if config.label_fraction < 1:  # the other images are not even embedded
        used = torch.cat(subsets).unique()
        train, subsets = train.take(used), [torch.searchsorted(used, subset) for subset in subsets]
    if config.augmented_copies:
        numbers = range(config.augmented_copies)
        copies = torch.stack([augmented_features(encoder, train.images, accelerator, k) for k in numbers])
    else:
        copies = embed_all(encoder, train.images, accelerator, "backbone", title="training images")[None]
    x_test = embed_all(encoder, test.images, accelerator, "backbone", title="test images")
    if encoder.fingerprint != before:
        raise CareHubError("the encoder changed while its features were computed; it must be frozen.")
    y, classes = train.labels.to(copies.device), len(train.class_names)
    features_seconds = round(time.perf_counter() - began, 1)

    heads = []
    for seed, subset in zip(seeds, subsets, strict=True):
        began, index = time.perf_counter(), subset.to(copies.device)
        metrics = config.settings | {"seed": seed}
        if config.protocol == "lbfgs":
            weight, bias, metrics["penalty"] = fit_best(copies[0, index], y[index], classes, seed, hidden)
        else:
            weight, bias = fit_sgd(copies[:, index], y[index], classes, config, seed, hidden)
        metrics |= top_accuracies(x_test @ weight.T + bias, test.labels)
        metrics |= {"n_train": len(subset), "n_test": len(test)} | recorded_options(config)
        metrics["features_seconds"] = features_seconds
        metrics["head_seconds"] = round(time.perf_counter() - began, 2)
        heads.append(LinearHead(config.data_label, weight.cpu(), bias.cpu(), train.class_names, metrics))
    return heads


def top_accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent, rounded as they are reported."""
    return {f"top{k}": round(topk_accuracy(logits, labels.to(logits.device), k), 2) for k in (1, 5)}


def augmented_features(encoder: Encoder, images: Images, accelerator: Accelerator, copy: int) -> Tensor:
    """(N, d): backbone features of every image under an augmentation of its own, number `copy`.

    The augmentation is the one that the encoder was trained with.
    """
    config = recorded_augmentation(encoder.config)
    generator = seeded_generator(0, "copies", copy)
    params = augment.sample(config, len(images), images.size, images.size, generator)

    def view(x: Tensor, index: Tensor) -> Tensor:
        return augment.apply(x, params.rows(index), config)

    return embed_all(encoder, images, accelerator, "backbone", view=view, title=f"copy {copy + 1}")
