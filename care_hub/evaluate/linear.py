"""Linear probes: multinomial logistic regression on features of a frozen encoder."""

import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .. import augment
from ..classifier import LinearHead
from ..config import EvalConfig
from ..data.sources import Images
from ..encoder import Encoder
from ..errors import CareHubError
from ..measures import topk
from .equivariance import recipe_of
from .monitor import embed_all

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # candidates for the weight of |W|^2 / 2 beside the mean cross-entropy
FEW = 1000  # fewer labels than this are all used to choose the penalty, a fifth at a time
# Of the public code: (learning rate, weight decay, batch) for CIFAR and STL-10, for ImageNet-100.
PUBLISHED = {"adam": (1e-3, 1e-6, 512), "sgd": (10.0, 0.0, 128)}
STEPS = (0.3, 0.4, 0.5, 0.6)  # of ImageNet-100: a tenth of the rate from each of these parts of the epochs on (the tenth: MoCo's)


def fit_linear(
    features: Tensor, labels: Tensor, classes: int, penalty: float, steps: int = 100, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(weight (C, d), bias (C,)) that minimise mean cross-entropy + penalty * |W|^2 / 2 over standardised features (N, d).

    Convex, solved by L-BFGS, at most `steps` steps from `start` (a weight and a bias; default 0); the standardisation is folded
    into what is returned.
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = (weight * std).requires_grad_(), (bias + weight @ mean).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = (weight / std).detach()
    return weight, bias.detach() - weight @ mean


def validation(count: int, seed: int, fold: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of four fifths of `count` training images and of the remaining one, drawn by `seed`."""
    order = torch.randperm(count, generator=augment.generator(seed, "validation"))
    held = torch.arange(count) % 5 == fold
    return order[~held], order[held]


def choose_penalty(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> tuple[float, tuple[Tensor, Tensor]]:
    """The candidate that does best on a held-out fifth of the training images (on each fifth in turn where they are few), and a
    good start for fitting with it; the test split is never seen."""
    scores, solutions = dict.fromkeys(PENALTIES, 0.0), {}
    for fold in range(5 if len(features) < FEW else 1):
        rest, held = (i.to(features.device) for i in validation(len(features), seed, fold))
        solution = None
        for penalty in PENALTIES:  # strongest first: the solution of each is near that of the next
            solution = solutions[penalty] = fit_linear(features[rest], labels[rest], classes, penalty, 40, solution)
            scores[penalty] += topk(features[held] @ solution[0].T + solution[1], labels[held], 1)
    best = max(PENALTIES, key=scores.get)
    return best, solutions[best]


def fit_best(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """(weight, bias, penalty): `fit_linear` with the penalty of `choose_penalty`."""
    penalty, start = choose_penalty(features, labels, classes, seed)
    return *fit_linear(features, labels, classes, penalty, start=start), penalty


def fit_sgd(copies: Tensor, labels: Tensor, classes: int, config: EvalConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight, bias) by the published schedule, on raw features (K, N, d): epoch e sees copy e mod K, in an order drawn by `seed`."""
    lr, decay, batch = PUBLISHED[config.optimizer]
    lr = config.lr or lr
    torch.manual_seed(seed)
    head = torch.nn.Linear(copies.shape[2], classes).to(copies.device)
    kinds = {"adam": torch.optim.Adam, "sgd": lambda p, **kw: torch.optim.SGD(p, momentum=0.9, **kw)}
    optimizer = kinds[config.optimizer](head.parameters(), lr=lr, weight_decay=decay)
    for epoch in range(config.epochs):
        if config.optimizer == "sgd":
            optimizer.param_groups[0]["lr"] = lr * 0.1 ** sum(epoch >= s * config.epochs for s in STEPS)
        order = torch.randperm(len(labels), generator=augment.generator(seed, "probe", epoch)).to(copies.device)
        for index in order.split(batch):
            loss = F.cross_entropy(head(copies[epoch % len(copies), index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.weight.detach(), head.bias.detach()


def subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of the images of each class, at least one of each, drawn by `seed`."""
    if fraction == 1:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=augment.generator(seed, "subset"))
    parts = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([part[: max(1, round(fraction * len(part)))] for part in parts]).sort().values


def probe(encoder: Encoder, train: Images, test: Images, accelerator: Accelerator, config: EvalConfig) -> list[LinearHead]:
    """A head for each seed. Features are computed once, by all processes, with the encoder in eval mode throughout.

    Raises CareHubError if the encoder is not the same to the last bit afterwards.
    """
    began, before = time.perf_counter(), encoder.fingerprint
    chosen = [subset(train.labels, config.label_fraction, seed) for seed in range(config.seed, config.seed + config.seeds)]
    if config.label_fraction < 1:  # the other pictures are not even looked at
        seen = torch.cat(chosen).unique()
        train, chosen = train.take(seen), [torch.searchsorted(seen, some) for some in chosen]
    x, x_test = (embed_all(encoder, images, accelerator, "backbone").float() for images in (train, test))
    copies = x[None]
    if config.augmented_copies:
        copies = torch.stack([augmented_features(encoder, train, accelerator, k) for k in range(config.augmented_copies)])
    if encoder.fingerprint != before:
        raise CareHubError("the encoder changed while its features were computed; a frozen encoder must not.")
    y, y_test = train.labels.to(x.device), test.labels.to(x.device)
    features_seconds, heads = time.perf_counter() - began, []
    for seed, some in enumerate((some.to(x.device) for some in chosen), config.seed):
        began, metrics = time.perf_counter(), {"protocol": config.protocol, "seed": seed}
        if config.protocol == "lbfgs":
            weight, bias, metrics["penalty"] = fit_best(x[some], y[some], len(train.class_names), seed)
        else:
            weight, bias = fit_sgd(copies[:, some], y[some], len(train.class_names), config, seed)
        logits = x_test @ weight.T + bias
        metrics |= {f"top{k}": round(topk(logits, y_test, k), 2) for k in (1, 5)} | {"n_train": len(some), "n_test": len(x_test)}
        metrics |= {"features_seconds": round(features_seconds, 1), "head_seconds": round(time.perf_counter() - began, 2)}
        heads.append(LinearHead(config.dataset_name, weight.cpu(), bias.cpu(), train.class_names, metrics))
    return heads


def augmented_features(encoder: Encoder, images: Images, accelerator: Accelerator, copy: int) -> Tensor:
    """(N, d): backbone features of every image under an augmentation of its own, number `copy`, of the encoder's recipe."""
    recipe, drawn = recipe_of(encoder), None

    def view(x: Tensor, index: Tensor) -> Tensor:
        nonlocal drawn
        if drawn is None:
            drawn = augment.draw(recipe, len(images), *x.shape[2:], augment.generator(0, "copies", copy))
        return augment.apply(x, drawn.rows(index), recipe)

    return embed_all(encoder, images, accelerator, "backbone", view=view).float()
