"""What embeddings keep: how well a linear map reads from them what augmentations change."""

import torch
from torch import Tensor

from .. import augment
from ..data.sources import Images, center
from ..encoder import SPACES, Encoder
from ..measures import r_squared, topk
from .equivariance import embed_view
from .linear import fit_best, validation

PENALTIES = tuple(10.0**k for k in range(-6, 2))  # of |w|^2 beside the mean squared error, over standardised features


def targets(images: Images, pictures: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({name: (N,) classes}, {name: (N, k) numbers}) of `pictures` (N, 3, S, S) uint8.

    `shapes`: shape and color; place, size, rotation of the shape and the grey behind it. Elsewhere: the label, and of the
    pixels the mean brightness, its spread (contrast), the mean saturation, and the mean hue as a point in the plane.
    """
    classes = {} if images.labels is None else {"label": images.labels}
    if "color" in images.columns:
        numbers = {k: images.columns[k].float()[:, None] for k in ("x", "y", "size", "rotation", "background")}
        return classes | {"color": images.columns["color"]}, numbers
    parts = [_pixel_statistics(x.float() / 255) for x in pictures.split(500)]
    return classes, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _pixel_statistics(x: Tensor) -> dict[str, Tensor]:
    red, green, blue = x.unbind(dim=1)
    grey, value = augment.luma(x).flatten(1), x.amax(dim=1)
    saturation = (value - x.amin(dim=1)) / value.clamp(min=1e-6)
    plane = torch.stack([red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)], dim=1)  # hue is its angle, chroma its length
    numbers = {"brightness": grey.mean(1), "contrast": grey.std(1), "saturation": saturation.flatten(1).mean(1)}
    return {k: v[:, None] for k, v in numbers.items()} | {"hue": plane.flatten(2).mean(2)}


def fit_ridge(features: Tensor, numbers: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(weight (k, d), bias (k,)) that minimise the mean squared error + penalty * |weight|^2 over standardised features (N, d).

    The normal equations, in float64.
    """
    x, y = features.double(), numbers.double()
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) / std
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)) / len(x)).T / std
    return weight, y.mean(dim=0) - weight @ mean


def read_numbers(train: Tensor, numbers: Tensor, test: Tensor, truth: Tensor, seed: int = 0) -> float:
    """R^2 on the test images of the ridge regression whose penalty does best on a fifth of the training images."""
    rest, held = validation(len(train), seed)

    def quality(penalty: float, fit=rest, x=train[held], y=numbers[held]) -> float:
        weight, bias = fit_ridge(train[fit], numbers[fit], penalty)
        return r_squared(x.double() @ weight.T + bias, y.double())

    return quality(max(PENALTIES, key=quality), slice(None), test, truth)


def read_classes(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, seed: int = 0) -> float:
    """Top-1 in per cent on the test images of a linear probe."""
    classes = int(max(labels.max(), truth.max())) + 1
    weight, bias, _ = fit_best(train, labels, classes, seed)
    return topk(test @ weight.T + bias, truth, 1)


def kept(encoder: Encoder, train: Images, test: Images, seed: int = 0) -> dict[str, dict[str, float]]:
    """space -> what is read -> R^2 (numbers) or per cent (label, color), from held pictures; labels of -1 are unknown."""
    pictures = [center(images.held.cpu(), encoder.care["image_size"]) for images in (train, test)]
    (classes, numbers), (true_classes, true_numbers) = (targets(i, p) for i, p in zip((train, test), pictures, strict=True))
    answer = {}
    for space in SPACES if encoder.projection is not None else ("backbone",):
        x, x_test = (embed_view(encoder, p, space=space) for p in pictures)
        answer[space] = {}
        for name, y in classes.items():
            known, asked = y >= 0, true_classes[name] >= 0
            if known.any() and asked.any():
                answer[space][name] = read_classes(x[known], y[known], x_test[asked], true_classes[name][asked], seed)
        answer[space] |= {name: read_numbers(x, y, x_test, true_numbers[name], seed) for name, y in numbers.items()}
    return answer
