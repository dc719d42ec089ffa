"""How well one rotation explains what an augmentation does to all embeddings, family by family."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import augment, metrics
from ..augment import AugmentationConfig, seeded_generator
from ..config import EncoderConfig
from ..encoder import Encoder
from ..errors import CareHubError
from ..rotation import Rotation, procrustes
from .features import Augmentation, embed_view

Mean = Callable[[Tensor], Tensor]  # terms of images or pairs -> (B,), under B weightings of the images

# Leaves an image as it is.
NOTHING = AugmentationConfig(scale=(1, 1), ratio=(1, 1), flip=0, jitter_p=0, grayscale=0, blur=0)
FAMILIES: dict[str, dict[str, Any]] = {
    "crop": {"scale": (0.4, 1.0), "ratio": (3 / 4, 4 / 3)},
    "flip": {"flip": 1.0},
    "jitter 0.2": {"jitter": (0.2, 0.2, 0.2, 0.0), "jitter_p": 1.0},
    "jitter 0.4": {"jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 1.0},
    "jitter 0.8": {"jitter": (0.8, 0.8, 0.8, 0.0), "jitter_p": 1.0},
    "hue": {"jitter": (0.0, 0.0, 0.0, 0.5), "jitter_p": 1.0},
    "grayscale": {"grayscale": 1.0},
    "blur": {"blur": 1.0},
    "rotation": {},  # of the image, up to MAX_DEGREES either way
    "full recipe": {},  # the augmentation of training
}
NOT_RANDOM = {"flip", "grayscale"}  # one of them says it all
MAX_DEGREES = 30.0
RESAMPLES = 200


def recorded_augmentation(config: EncoderConfig) -> AugmentationConfig:
    """The augmentation that an encoder was trained with, without normalization.

    That of the public code's CIFAR form where it is not recorded. Raises CareHubError for values
    that can't be.
    """
    size, options = config.image_size, config.training
    try:
        low, width = float(options["crop_scale"]), options["blur_kernel_size"]
        brightness, contrast, saturation, hue = map(float, options["jitter"])
        return AugmentationConfig(
            size,
            scale=(low, 1.0),
            jitter=(brightness, contrast, saturation, hue),
            jitter_p=float(options["jitter_p"]),
            grayscale=float(options["grayscale"]),
            blur=float(options["blur"]),
            blur_kernel_size=int(width),
        )
    except KeyError:
        return AugmentationConfig(size)
    except (TypeError, ValueError, CareHubError) as error:
        raise CareHubError(f"the augmentation recorded with this encoder makes no sense: {error}.") from error


def augmentations(family: str, config: AugmentationConfig, draws: int, seed: int = 0) -> list[Augmentation]:
    """`draws` random augmentations of a family, each the same for all images, without normalization.

    They depend on `seed` alone, so that encoders are compared on the same ones. Raises
    CareHubError for an unknown family.
    """
    if family not in FAMILIES or draws < 1:
        known = ", ".join(FAMILIES)
        raise CareHubError(f"there are no {draws} augmentations '{family}'; families are {known}.")
    count = 1 if family in NOT_RANDOM else draws
    if family == "rotation":
        turns = torch.rand(count, generator=seeded_generator(seed, "rotation")) * 2 - 1
        return [partial(augment.rotate, degrees=d) for d in (turns * MAX_DEGREES).tolist()]
    if family == "full recipe":
        config = replace(config, mean=NOTHING.mean, std=NOTHING.std)
    else:
        kernel_size = max(3, config.size // 10 | 1)
        config = replace(NOTHING, size=config.size, blur_kernel_size=kernel_size, **FAMILIES[family])
    return [partial(_augment_alike, config, seed, k) for k in range(count)]


def _augment_alike(config: AugmentationConfig, seed: int, k: int, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    params = augment.sample(config, 1, height, width, seeded_generator(seed, "equivariance", k))
    return augment.apply(images, params.repeat(len(images)), config)


def rotation_errors(z: Tensor, views: Iterable[Tensor]) -> dict[str, float]:
    """Rotation error, invariance error, their ratio and the Gram deviation, each a mean over `views`.

    `z` (N, d): embeddings of N images; each of `views` (N, d): the same images under one
    augmentation. The first half fits R in O(d) (Wahba's problem), the second half is measured. The
    ratio is taken per view, then averaged: 1 means that rotating helps nothing, NaN that nothing
    moved.
    """
    weights = torch.ones(1, (len(z) + 1) // 2, dtype=z.dtype)
    mean = partial(metrics.weighted_mean, weights=weights)
    rows = [_view_metrics(z, view, fit_rotation(z, view), mean) for view in views]
    if not rows:
        raise CareHubError("there is no view to fit a rotation to.")
    names = ("rotation_error", "invariance_error", "rotation_invariance_ratio", "gram_deviation")
    return {name: float(sum(row[name] for row in rows) / len(rows)) for name in names}


def fit_rotation(z: Tensor, view: Tensor, special: bool = False) -> Tensor:
    """(d, d): the orthogonal map of `z` to `view` fitted on the first half of the images.

    `special`: of determinant +1.
    """
    half = len(z) // 2
    return procrustes(z[:half], view[:half], special).to(z.dtype)


def _second_half(*embeddings: Tensor) -> list[Tensor]:
    return [z[len(z) // 2 :] for z in embeddings]


def _view_metrics(z: Tensor, view: Tensor, r: Tensor, mean: Mean) -> dict[str, Tensor]:
    """Each metric on the second half; `r`: the fitted map."""
    before, after = _second_half(z, view)
    found = {"invariance_error": mean(metrics.invariance(before, after))}
    proper = r if torch.linalg.det(r.double()) > 0 else fit_rotation(z, view, special=True)
    for name, fitted in (("rotation", r), ("special_rotation", proper)):
        error = found[f"{name}_error"] = mean(metrics.residual(before, after, fitted))
        found[f"{name}_invariance_ratio"] = metrics.ratio(error, found["invariance_error"])
    found["gamma"] = mean(metrics.relative_equivariance(before, after))
    found["gram_deviation"] = mean(metrics.gram_deviation(before, after))
    found["variance"] = mean(metrics.variance(after))
    return found


def _retrieval_metrics(z: Tensor, view: Tensor, r: Tensor, mean: Mean, seed: int) -> dict[str, Tensor]:
    """How often R f(x) finds f(ax) among all views, and how often f(x) or a random rotation of it does."""
    before, after = _second_half(z, view)
    random = Rotation.random(z.shape[1], seed)
    found = {}
    for suffix, queries in {"": before @ r.T, "_unrotated": before, "_random": random(before)}.items():
        ranks = metrics.retrieval_ranks(queries, after)
        found[f"mrr{suffix}"] = mean(1 / ranks)
        for k in (1, 5):
            found[f"hit_at_{k}{suffix}"] = 100 * mean((ranks <= k).to(z.dtype))
    return found


def _composition_metrics(z: Tensor, both: Tensor, r_a: Tensor, r_b: Tensor, mean: Mean) -> dict[str, Tensor]:
    """R_b R_a in place of R_ba, for the view b(a(x))."""
    before, after = _second_half(z, both)
    error = metrics.composition_error(fit_rotation(z, both), r_b, r_a)
    composed = mean(metrics.residual(before, after, r_b @ r_a))
    return {
        "composition_error": torch.full_like(composed, error),
        "composition_residual": composed,
        "composition_invariance_ratio": metrics.ratio(composed, mean(metrics.invariance(before, after))),
    }


def measure_equivariance(
    encoder: Encoder,
    images: Tensor,
    augmentation: AugmentationConfig,
    draws: int = 16,
    seed: int = 0,
    families: Iterable[str] = FAMILIES,
    progress: bool = False,
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """family -> metric -> (mean, lower, upper end of a 95 % bootstrap interval over images and draws).

    `images` (N, 3, S, S) uint8 of the encoder's size: rotations are fitted on the first half and
    stay as they are, the second half is measured. Compositions b(a(x)) are those of an
    augmentation and the one before it, for every fourth one. A ratio to a motion of nothing
    (flipping twice) is NaN.
    """
    z = embed_view(encoder, images)
    weights = metrics.bootstrap_weights((len(z) + 1) // 2, RESAMPLES, seeded_generator(seed, "bootstrap"))
    mean = partial(metrics.weighted_mean, weights=weights)
    sampled = {family: augmentations(family, augmentation, draws, seed) for family in families}
    total = sum(map(len, sampled.values()))
    bar = tqdm(total=total, unit="view", desc="augmenting", disable=not progress or None, leave=False)
    results = {}
    for family, steps in sampled.items():
        rows, fitted = [], []
        for k, step in enumerate(steps):
            view = embed_view(encoder, images, step)
            fitted.append(fit_rotation(z, view))
            row = _view_metrics(z, view, fitted[k], mean)
            row |= _retrieval_metrics(z, view, fitted[k], mean, seed=k)
            if k % 4 == 3 or k == len(steps) - 1:  # a single one is composed with itself
                both = embed_view(encoder, images, steps[k - 1], step)
                row |= _composition_metrics(z, both, fitted[k - 1], fitted[k], mean)
            rows.append(row)
            bar.update()
        stacks = {name: torch.stack([row[name] for row in rows if name in row]) for name in rows[-1]}
        results[family] = {
            name: metrics.bootstrap_interval(stack, seeded_generator(seed, "bootstrap", family))
            for name, stack in stacks.items()
        }
    bar.close()
    return results
