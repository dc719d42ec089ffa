"""How well one rotation explains what an augmentation does to all embeddings, family by family."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from .. import augment, measures
from ..encoder import Encoder
from ..errors import CareHubError
from ..rotation import Rotation, procrustes

STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "jitter": (0.0,) * 4, "jitter_p": 0.0, "greyscale": 0.0, "blur": 0.0}
FAMILIES = {
    "crop": {"scale": (0.4, 1.0), "ratio": (3 / 4, 4 / 3)},
    "flip": {"flip": 1.0},
    "jitter 0.2": {"jitter": (0.2, 0.2, 0.2, 0.0), "jitter_p": 1.0},
    "jitter 0.4": {"jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 1.0},
    "jitter 0.8": {"jitter": (0.8, 0.8, 0.8, 0.0), "jitter_p": 1.0},
    "hue": {"jitter": (0.0, 0.0, 0.0, 0.5), "jitter_p": 1.0},
    "greyscale": {"greyscale": 1.0},
    "blur": {"blur": 1.0},
    "rotation": {},  # of the picture, up to 30 degrees either way
    "full recipe": {},
}
ALWAYS_THE_SAME = {"flip", "greyscale"}  # one draw says it all
DEGREES = 30.0
RESAMPLES = 200
Augmentation = Callable[[Tensor], Tensor]


def recipe_of(encoder: Encoder) -> augment.Recipe:
    """The augmentation that `encoder` was trained with (that of the public code's CIFAR form, where it is not known), un-normalised."""
    size, known = encoder.care["image_size"], encoder.care.get("training") or {}
    names = ("crop_scale", "jitter", "jitter_p", "greyscale", "blur", "blur_taps")
    if not isinstance(known, dict) or not all(name in known for name in names):
        return augment.Recipe(size)
    try:
        low, jitter, *rest = (known[name] for name in names)
        low, jitter, jitter_p, grey, blur = float(low), tuple(map(float, jitter)), *map(float, rest[:3])
        if not 0 < low <= 1 or len(jitter) != 4 or rest[3] not in range(1, size, 2):
            raise ValueError(f"{low}, {jitter}, {rest[3]}")
    except (TypeError, ValueError) as error:
        raise CareHubError(f"the augmentation recorded with this encoder makes no sense ({error}).") from error
    return augment.Recipe(size, (low, 1.0), jitter=jitter, jitter_p=jitter_p, greyscale=grey, blur=blur, blur_taps=rest[3])


def augmentations(family: str, recipe: augment.Recipe, draws: int, seed: int = 0) -> list[Augmentation]:
    """`draws` augmentations of a family, each the same for all pictures, un-normalised. They depend on `seed` alone, so that
    encoders are compared on the same ones."""
    count = 1 if family in ALWAYS_THE_SAME else draws
    plain = replace(recipe, mean=(0.0,) * 3, std=(1.0,) * 3)
    if family == "rotation":
        angles = (torch.rand(count, generator=augment.generator(seed, "rotation")) * 2 - 1) * DEGREES
        return [partial(augment.rotate, degrees=angle) for angle in angles.tolist()]
    if family != "full recipe":
        plain = replace(plain, **{**STILL, **FAMILIES[family]})
        plain = replace(plain, blur_taps=max(3, recipe.size // 10 | 1)) if family == "blur" else plain
    return [partial(_apply, recipe=plain, generator=(seed, "equivariance", k)) for k in range(count)]


def _apply(pictures: Tensor, recipe: augment.Recipe, generator: tuple) -> Tensor:
    drawn = augment.draw(recipe, 1, *pictures.shape[2:], augment.generator(*generator))
    return augment.apply(pictures, drawn.repeat(len(pictures)), recipe)


def embed_view(encoder: Encoder, pictures: Tensor, *steps: Augmentation, space: str = "projection") -> Tensor:
    """(N, d) embeddings, on the CPU, of (N, 3, S, S) uint8 `pictures` after `steps`, first to last."""
    parts = []
    for x in pictures.split(500):
        x = x.to(encoder.device).float() / 255
        for step in steps:
            x = step(x)
        parts.append(encoder.embed(x, space).cpu())
    return torch.cat(parts)


def rotation_errors(z: Tensor, views: Iterable[Tensor]) -> dict[str, float]:
    """Rotation error, invariance error, their ratio and the Gram deviation, each a mean over `views`.

    `z` (N, d): embeddings of N images; each of `views` (N, d): the same images under one augmentation. The first half
    fits R in O(d) (Wahba's problem), the second half is measured. The ratio is taken per view, then averaged: 1 means
    that rotating helps nothing, NaN that nothing moved.
    """
    weights = torch.ones(1, len(z) - len(z) // 2, dtype=z.dtype)
    rows = [_of_view(z, view, fit(z, view), weights) for view in views]
    names = ("rotation_error", "invariance_error", "rotation_invariance_ratio", "gram_deviation")
    return {name: (sum(row[name] for row in rows) / len(rows)).item() for name in names}


def fit(z: Tensor, view: Tensor, special: bool = False) -> Tensor:
    """(d, d): the orthogonal map fitted on the first half of the images."""
    half = len(z) // 2
    return procrustes(z[:half], view[:half], special).to(z.dtype)


def _of_view(z: Tensor, view: Tensor, r: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Each measure under each row of `weights` (B, N - N // 2), on the second half; `r` from `fit`."""
    half = len(z) // 2
    held, moved = z[half:], view[half:]
    mean = partial(measures.average, weights=weights)
    found = {"invariance_error": mean(measures.invariance(held, moved))}
    proper = r if torch.linalg.det(r.double()) > 0 else fit(z, view, special=True)
    for name, fitted in (("rotation", r), ("special_rotation", proper)):
        found[f"{name}_error"] = mean(measures.residual(held, moved, fitted))
        found[f"{name}_invariance_ratio"] = measures.ratio(found[f"{name}_error"], found["invariance_error"])
    found["gamma"] = mean(measures.relative_equivariance(held, moved))
    found["gram_deviation"] = mean(measures.gram_deviation(held, moved))
    found["spread"] = mean(measures.spread(moved))
    return found


def _retrieval(z: Tensor, view: Tensor, r: Tensor, weights: Tensor, seed: int) -> dict[str, Tensor]:
    held, moved = z[len(z) // 2 :], view[len(z) // 2 :]
    mean, found = partial(measures.average, weights=weights), {}
    for name, queries in {"": held @ r.T, "_unrotated": held, "_random": Rotation.random(z.shape[1], seed)(held)}.items():
        ranks = measures.retrieval_ranks(queries, moved)
        found[f"mrr{name}"] = mean(1 / ranks)
        found |= {f"hit_at_{k}{name}": 100 * mean((ranks <= k).to(z.dtype)) for k in (1, 5)}
    return found


def _composition(z: Tensor, both: Tensor, r_a: Tensor, r_b: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """R_b R_a in place of R_ba, for the view b(a(x))."""
    held, moved = z[len(z) // 2 :], both[len(z) // 2 :]
    mean = partial(measures.average, weights=weights)
    composed = mean(measures.residual(held, moved, r_b @ r_a))
    return {
        "composition_error": torch.full((len(weights),), measures.composition_error(fit(z, both), r_b, r_a), dtype=z.dtype),
        "composition_residual": composed,
        "composition_invariance_ratio": measures.ratio(composed, mean(measures.invariance(held, moved))),
    }


def geometry(
    encoder: Encoder, pictures: Tensor, recipe: augment.Recipe, draws: int = 16, seed: int = 0, families: Iterable[str] = FAMILIES,
    progress: bool = False,
) -> dict[str, dict[str, tuple[float, float, float]]]:  # fmt: skip
    """family -> measure -> (mean over draws, lower, upper end of a 95 % bootstrap interval over images and draws).

    `pictures` (N, 3, S, S) uint8 of the encoder's size: rotations are fitted on the first half and held fixed, the second
    half is measured. Compositions b(a(x)) are those of a draw and the one before, for every fourth draw. A ratio to a motion of
    nothing (flipping twice) is NaN.
    """
    z = embed_view(encoder, pictures)
    held = len(z) - len(z) // 2
    weights = measures.resamples(held, RESAMPLES, augment.generator(seed, "bootstrap"))
    steps = {family: augmentations(family, recipe, draws, seed) for family in families}
    bar = tqdm(total=sum(len(s) for s in steps.values()), unit="view", desc="augmenting", disable=not progress, leave=False)
    answer = {}
    for family, drawn in steps.items():
        rows, fitted = defaultdict(list), []
        for k, step in enumerate(drawn):
            view = embed_view(encoder, pictures, step)
            fitted.append(fit(z, view))
            found = _of_view(z, view, fitted[k], weights) | _retrieval(z, view, fitted[k], weights, k)
            if k % 4 == 3 or k == len(drawn) - 1:
                both = embed_view(encoder, pictures, drawn[k - 1], step)
                found |= _composition(z, both, fitted[k - 1], fitted[k], weights)
            for name, row in found.items():
                rows[name].append(row)
            bar.update()
        answer[family] = {n: measures.interval(torch.stack(r), augment.generator(seed, "bootstrap", family)) for n, r in rows.items()}
    bar.close()
    return answer
