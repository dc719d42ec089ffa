"""Attribute probes: how well a linear map reads from embeddings what augmentations change."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..augment import luma
from ..data.images import InMemoryImages
from ..encoder import SPACES, Encoder
from ..metrics import r_squared, topk_accuracy
from .features import embed_view
from .linear import fit_best, validation_split

# Weights of |w|^2 beside the mean squared error, over standardized features.
PENALTIES = tuple(10.0**k for k in range(-6, 2))
SHAPE_FACTORS = ("x", "y", "size", "rotation", "background")


def attribute_targets(images: InMemoryImages) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({name: (N,) classes}, {name: (N, k) numbers}) of images.

    `shapes`: label and color; position, size and rotation of the shape, the gray of the background.
    Other data: the label; of the pixels the mean brightness, its standard deviation (contrast), the
    mean saturation, and the mean hue as a point in the plane.
    """
    classes = {} if images.labels is None else {"label": images.labels}
    if "color" in images.columns:
        numbers = {name: images.columns[name].float()[:, None] for name in SHAPE_FACTORS}
        return classes | {"color": images.columns["color"]}, numbers
    parts = [_pixel_statistics(x.float() / 255) for x in images.pixels.split(500)]
    # Pixels may be on a GPU, where a run has put them; embeddings are not.
    return classes, {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _pixel_statistics(x: Tensor) -> dict[str, Tensor]:
    red, green, blue = x.unbind(dim=1)
    gray, value = luma(x).flatten(1), x.amax(dim=1)
    saturation = ((value - x.amin(dim=1)) / value.clamp(min=1e-6)).flatten(1)
    # A plane in which the angle is the hue and the length the chroma.
    plane = torch.stack([red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)], dim=1)
    return {
        "brightness": gray.mean(dim=1, keepdim=True),
        "contrast": gray.std(dim=1, keepdim=True),
        "saturation": saturation.mean(dim=1, keepdim=True),
        "hue": plane.flatten(2).mean(dim=2),
    }


def fit_ridge(features: Tensor, numbers: Tensor, penalties: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(weights (P, k, d), biases (P, k)) that minimize the mean squared error + penalty * |weight|^2.

    For each of P `penalties`, over standardized `features` (N, d), for `numbers` (N, k); by the
    normal equations, or where there are more features than images by those of its dual, in float64.
    """
    x, y = features.double(), numbers.double()
    mean, std = x.mean(dim=0), x.std(dim=0).nan_to_num(1).clamp(min=1e-6)
    x = (x - mean) / std
    wide, centered = x.shape[1] > len(x), (y - y.mean(dim=0)) / len(x)
    gram = (x @ x.T if wide else x.T @ x) / len(x)
    right, eye = centered if wide else x.T @ centered, torch.eye(len(gram)).to(gram)
    solution = torch.stack([torch.linalg.solve(gram + penalty * eye, right) for penalty in penalties])
    weight = (x.T @ solution if wide else solution).mT / std
    return weight, y.mean(dim=0) - weight @ mean


def predict_numbers(train: Tensor, numbers: Tensor, test: Tensor, seed: int = 0) -> Tensor:
    """(M, k) float64: what ridge regression from features (N, d) to numbers (N, k) says of `test` (M, d).

    Its penalty is the one that does best on a held-out fifth of the training images.
    """
    rest, held_out = validation_split(len(train), seed)

    def predicted(rows: Tensor, asked: Tensor, penalties: Sequence[float]) -> Tensor:
        weights, biases = fit_ridge(train[rows], numbers[rows], penalties)
        return asked.double() @ weights.mT + biases[:, None]

    guesses, truth = predicted(rest, train[held_out], PENALTIES), numbers[held_out].double()
    r2 = {penalty: r_squared(guess, truth) for penalty, guess in zip(PENALTIES, guesses, strict=True)}
    return predicted(torch.arange(len(train)), test, [max(r2, key=r2.__getitem__)])[0]


def probe_numbers(train: Tensor, numbers: Tensor, test: Tensor, truth: Tensor, seed: int = 0) -> float:
    """R^2 on the test images of `predict_numbers`."""
    return r_squared(predict_numbers(train, numbers, test, seed), truth.double())


def probe_classes(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, seed: int = 0) -> float:
    """Top-1 in percent on the test images of a linear probe from features (N, d) to labels (N,)."""
    classes = int(max(labels.max(), truth.max())) + 1
    weight, bias, _ = fit_best(train, labels, classes, seed)
    return topk_accuracy(test @ weight.T + bias, truth, 1)


def probe_attributes(
    encoder: Encoder, train: InMemoryImages, test: InMemoryImages, seed: int = 0
) -> dict[str, dict[str, float]]:
    """space -> attribute -> R^2 (numbers) or percent (label, color). Labels of -1 are unknown."""
    classes, numbers = attribute_targets(train)
    true_classes, true_numbers = attribute_targets(test)
    results: dict[str, dict[str, float]] = {}
    for space in SPACES if encoder.projection is not None else ("backbone",):
        x, x_test = (embed_view(encoder, images.pixels, space=space) for images in (train, test))
        found = results[space] = {}
        for name, labels in classes.items():
            truth = true_classes[name]
            known, tested = labels >= 0, truth >= 0
            if known.any() and tested.any():
                found[name] = probe_classes(x[known], labels[known], x_test[tested], truth[tested], seed)
        for name, y in numbers.items():
            found[name] = probe_numbers(x, y, x_test, true_numbers[name], seed)
    return results
