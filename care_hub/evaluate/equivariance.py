"""How well one rotation explains what an augmentation does to all embeddings, family by family."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import augment, metrics
from ..augment import AugmentationConfig, AugmentationParams, permutation, seeded_generator
from ..encoder import SPACES, Encoder
from ..errors import CareHubError
from ..rotation import Rotation, least_squares, procrustes
from ..transformations import FAMILIES, MAX_DEGREES, NOT_RANDOM
from .attributes import predict_numbers
from .features import Augmentation, embed_spaces, embed_view

Mean = Callable[[Tensor], Tensor]  # terms of images or pairs -> (B,), under B weightings of the images
Row = dict[str, Any]  # metric -> (B,), or two of them: an error and the motion that it is a part of

# Leaves an image as it is.
NOTHING = AugmentationConfig(scale=(1, 1), ratio=(1, 1), flip=0, jitter_p=0, grayscale=0, blur=0)
RESAMPLES = 200
CHUNK = 250  # views that are embedded at once: they fit into a processor's cache
CANDIDATE_IMAGES = 200  # so many have all the views among which that of an augmentation is to be found
COMPOSED = 16  # every sixteenth augmentation is composed with the one before it
HIDDEN, EPOCHS, RATE = 256, 2, 2e-3  # of the MLP that a rotation is compared with


@dataclass(frozen=True)
class Samples:
    """Random augmentations of one family, without normalization."""

    config: AugmentationConfig
    params: AugmentationParams
    degrees: Tensor  # (n,): rotation of the image; 0 but in the family of that name

    def __len__(self) -> int:
        return len(self.degrees)

    def rows(self, index: Tensor) -> "Samples":
        """Those at `index`."""
        return Samples(self.config, self.params.rows(index), self.degrees[index])

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 3, S, S) images, or any number of them under a single augmentation."""
        mine = self if len(self) == len(x) else self.rows(torch.zeros(len(x), dtype=torch.long))
        if mine.degrees.any():
            return augment.rotate(x, mine.degrees)
        return augment.apply(x, mine.params, mine.config)

    def parameters(self) -> Tensor:
        """(n, p): what varies of them, standardized; the hue as a point of the circle."""
        params, jittered = self.params, self.params.order[:, :1] >= 0
        factors = torch.where(jittered, params.factors[:, :3], 1)
        hue = 2 * math.pi * torch.where(jittered, params.factors[:, 3:], 0)
        others = (params.flip, params.gray, params.sigma, self.degrees)
        values = torch.cat([params.box, factors, hue.cos(), hue.sin(), torch.stack(others, dim=1)], dim=1)
        values = values[:, (values != values[:1]).any(dim=0)]
        values = values - values.mean(dim=0)
        return values / values.square().mean(dim=0).sqrt()


def sample(family: str, config: AugmentationConfig, draws: int, seed: int = 0, own: bool = False) -> Samples:
    """`draws` random augmentations of a family (one where they are not random), of `seed` alone.

    The first ones are the same, however many there are. `own`: others, one for each of so many
    images. Raises CareHubError for an unknown family.
    """
    if family not in FAMILIES or draws < 1:
        known = ", ".join(FAMILIES)
        raise CareHubError(f"there are no {draws} augmentations '{family}'; families are {known}.")
    count = 1 if family in NOT_RANDOM else draws
    if family == "full recipe":
        config = replace(config, mean=NOTHING.mean, std=NOTHING.std)
    else:
        kernel_size = max(3, config.size // 10 | 1)
        config = replace(NOTHING, size=config.size, blur_kernel_size=kernel_size, **FAMILIES[family])
    paths = [("own", family)] if own else [("equivariance", k) for k in range(count)]
    each, side = count // len(paths), config.size
    parts = [augment.sample(config, each, side, side, seeded_generator(seed, *path)) for path in paths]
    turns = torch.rand(count, generator=seeded_generator(seed, "rotation", *["own"] * own)) * 2 - 1
    return Samples(config, AugmentationParams.cat(parts), turns * (family == "rotation") * MAX_DEGREES)


def augmentations(family: str, config: AugmentationConfig, draws: int, seed: int = 0) -> list[Augmentation]:
    """`draws` random augmentations of a family, each the same for all images, without normalization.

    They depend on `seed` alone, so that encoders are compared on the same ones. Raises
    CareHubError for an unknown family.
    """
    samples = sample(family, config, draws, seed)
    return [samples.rows(k) for k in torch.arange(len(samples)).split(1)]


def rotation_errors(z: Tensor, views: Iterable[Tensor]) -> dict[str, float]:
    """Rotation error, invariance error, their ratio and the Gram deviation over all `views`.

    `z` (N, d): embeddings of N images; each of `views` (N, d): the same images under one
    augmentation. The first half fits R in O(d) (Wahba's problem), the second half is measured.
    Errors are means over the views, the ratio is that of the means: 1 means that rotating helps
    nothing, NaN that nothing moved. Views that move nothing are left out of it, and counted.
    """
    weights = torch.ones(1, (len(z) + 1) // 2, dtype=z.dtype)
    mean = partial(metrics.weighted_mean, weights=weights)
    rows = [_view_metrics(z, view, fit_rotation(z, view), mean) for view in views]
    if not rows:
        raise CareHubError("there is no view to fit a rotation to.")
    ratio, others = "rotation_invariance_ratio", ("gram_deviation", "motionless")
    found = {name: _stacked(rows, name) for name in ("rotation_error", "invariance_error", ratio, *others)}
    return {name: float(metrics.ratio(*x) if len(x) == 2 else x[0].mean()) for name, x in found.items()}


def fit_rotation(z: Tensor, view: Tensor, special: bool = False) -> Tensor:
    """(d, d): the orthogonal map of `z` to `view` fitted on the first half of the images.

    `special`: of determinant +1.
    """
    half = len(z) // 2
    return procrustes(z[:half], view[:half], special).to(z.dtype)


def _second_half(*embeddings: Tensor) -> list[Tensor]:
    return [z[len(z) // 2 :] for z in embeddings]


def _view_metrics(z: Tensor, view: Tensor, r: Tensor, mean: Mean) -> Row:
    """Each metric on the second half; `r`: the fitted map."""
    before, after = _second_half(z, view)
    found: Row = {"invariance_error": (moved := mean(metrics.invariance(before, after)))}
    found["motionless"] = 100 * (moved <= metrics.MOTIONLESS).to(z.dtype)
    proper = r if torch.linalg.det(r.double()) > 0 else fit_rotation(z, view, special=True)
    for name, fitted in (("rotation", r), ("special_rotation", proper)):
        error = found[f"{name}_error"] = mean(metrics.residual(before, after, fitted))
        found[f"{name}_invariance_ratio"] = error, moved
    change = metrics.gram_change(before, after)
    found["gamma"] = mean(metrics.relative_equivariance(before, after, change))
    found["gram_deviation"] = mean(change.square())
    found["variance"] = mean(metrics.variance(after))
    return found


def _named(found: dict[str, Tensor], mean: Mean, name: str) -> Row:
    """Means of what `metrics.retrieval` finds; hits in percent."""
    return {name.format(key): mean(x) * (100 if key.startswith("hit") else 1) for key, x in found.items()}


def _retrieval_metrics(z: Tensor, view: Tensor, r: Tensor, unrelated: Rotation, mean: Mean) -> Row:
    """How often R f(x) finds f(ax) among those of all images; and f(x), or an unrelated rotation of it."""
    before, after = _second_half(z, view)
    queries = {"": before @ r.T, "_unrotated": before, "_random": unrelated(before)}
    found = {suffix: metrics.retrieval(query, after) for suffix, query in queries.items()}
    return {k: v for suffix, x in found.items() for k, v in _named(x, mean, f"{{}}{suffix}").items()}


def _composition_metrics(z: Tensor, both: Tensor, r_a: Tensor, r_b: Tensor, mean: Mean) -> Row:
    """R_b R_a in place of R_ba, for the view b(a(x))."""
    before, after = _second_half(z, both)
    error = metrics.composition_error(fit_rotation(z, both), r_b, r_a)
    composed = mean(metrics.residual(before, after, r_b @ r_a))
    return {
        "composition_error": torch.full_like(composed, error),
        "composition_residual": composed,
        "composition_invariance_ratio": (composed, mean(metrics.invariance(before, after))),
    }


def composed_cosines(
    encoder: Encoder, pixels: Tensor, config: AugmentationConfig, pairs: int = 8
) -> dict[str, float]:
    """Mean cosine of f(b(a(x))), a and b changes of color, with R_b R_a f(x) and with R_ba f(x).

    The rotations are fitted on the first half of `pixels`, (N, 3, S, S) uint8; the cosines are those
    of the other half, means over `pairs` of changes: `color_composed` and `color_fitted`.
    """
    half, changes = len(pixels) // 2, augmentations("color", config, pairs + 1)
    z, *views = (embed_view(encoder, pixels, *steps) for steps in [(), *((a,) for a in changes)])
    rotations = [Rotation.fit(z[:half], view[:half]) for view in views]
    cosines: dict[str, list[float]] = {"color_composed": [], "color_fitted": []}
    for k in range(pairs):
        both = embed_view(encoder, pixels, changes[k], changes[k + 1])
        maps = (rotations[k + 1] @ rotations[k], Rotation.fit(z[:half], both[:half]))
        for found, r in zip(cosines.values(), maps, strict=True):
            found.append(F.cosine_similarity(r(z[half:]), both[half:]).mean().item())
    return {name: statistics.mean(values) for name, values in cosines.items()}


def fit_mlp(z: Tensor, views: Tensor, parameters: Tensor, seed: int = 0) -> nn.Module:
    """A network of one hidden layer, g, with f(a_k x) ≈ W_k f(x) + g(W_k f(x), parameters of a_k).

    One for all K augmentations of a family, since each alone has few images: `z` (K, N, d) are
    W_k f(x), W_k linear, `views` (K, N, d) are f(a_k x), `parameters` (K, p). g is nothing at first;
    what it learns is what no linear map can do.
    """
    with torch.random.fork_rng(devices=[]):  # the global generator stays as it was
        torch.default_generator.manual_seed(seed)
        width = z.shape[2] + parameters.shape[1]
        g = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, z.shape[2]))
        nn.init.zeros_(g.get_parameter("2.weight"))
    x, inputs, target = z.flatten(0, 1), _beside(z, parameters), views.flatten(0, 1)
    optimizer = torch.optim.Adam(g.parameters(), RATE)
    with torch.enable_grad():
        for epoch in range(EPOCHS):
            for index in permutation(len(x), seed, "mlp", epoch).split(CHUNK):
                loss = -F.cosine_similarity(x[index] + g(inputs[index]), target[index]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return g


def _beside(z: Tensor, parameters: Tensor) -> Tensor:
    """(K N, d + p): embeddings (K, N, d) with the parameters (K, p) of their augmentations."""
    return torch.cat([z, parameters[:, None].expand(-1, z.shape[1], -1)], dim=2).flatten(0, 1)


def _map_metrics(
    z: Tensor, views: Tensor, r: Tensor, parameters: Tensor, candidates: Tensor, mean: Mean, seed: int
) -> list[Row]:
    """For each of K augmentations, R beside no map, a linear one and the MLP.

    `views` (K, N, d), `r` (K, d, d), `parameters` (K, p). The cosine of f(ax) with what each makes
    of f(x); and whether that finds f(ax) among the `candidates` (C, M, d): C views of each of the
    first M images of the second half, in the order of the augmentations.
    """
    half = len(z) // 2
    linear = z @ least_squares(z[:half], views[:, :half]).to(z).mT
    g = fit_mlp(linear[:, :half], views[:, :half], parameters, seed)
    linear, after, before = linear[:, half:], views[:, half:], z[half:]
    maps = {"": before @ r.mT, "_unrotated": before.expand_as(after), "_linear": linear}
    maps["_mlp"] = linear + g(_beside(linear, parameters)).view_as(linear)
    rows: list[Row] = [{} for _ in views]
    for suffix, queries in maps.items():
        for row, cosine in zip(rows, F.cosine_similarity(queries, after, dim=2), strict=True):
            row[f"cosine{suffix}"] = mean(cosine)
        if len(candidates) > 1:
            same = queries[: len(candidates), : candidates.shape[1]].transpose(0, 1)
            found = metrics.retrieval(same, candidates.transpose(0, 1))
            for k, row in enumerate(rows[: len(candidates)]):
                row |= _named({name: x[:, k] for name, x in found.items()}, mean, f"same_image_{{}}{suffix}")
    return rows


def _parameter_metrics(
    before: Tensor, after: Tensor, parameters: Tensor, mean: Mean, suffix: str, seed: int
) -> Row:
    """R^2 of `parameters` (N, p), of an augmentation for each image, read from both embeddings or one."""
    found, half, (truth,) = {}, len(before) // 2, _second_half(parameters)
    for name, x in (("pair", torch.cat([before, after], dim=1)), ("view", after)):
        told = predict_numbers(x[:half], parameters[:half], x[half:], seed).to(truth)
        error, total = metrics.invariance(told, truth), metrics.variance(truth)
        found[f"parameters_from_{name}{suffix}"] = 1 - mean(error) / mean(total)
    return found


@dataclass(frozen=True)
class _Images:
    """Images (N, 3, S, S), uint8, as an encoder sees them, on the unit sphere in `space`."""

    encoder: Encoder
    pixels: Tensor
    space: str

    def embed(self, index: Tensor, *steps: Samples, spaces: Iterable[str] = SPACES) -> dict[str, Tensor]:
        """space -> (P, d) of the images at `index` (P,) after `steps` of P rows each, first to last.

        Of those of `spaces` that there are.
        """
        parts = []
        for rows in torch.arange(len(index)).split(CHUNK):
            x = self.pixels[index[rows]].to(self.encoder.device).float().div_(255)
            for step in steps:
                x = step.rows(rows)(x)
            seen = embed_spaces(self.encoder, x)
            parts.append({name: seen[name] for name in spaces if name in seen})
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found[self.space] = F.normalize(found[self.space], dim=1)
        return found

    def views(self, index: Tensor, *steps: Samples) -> Tensor:
        """(K, P, d): the images at `index` (P,), each after each of the K rows of `steps`."""
        rows = torch.arange(len(steps[0])).repeat_interleave(len(index))
        each = [step.rows(rows) for step in steps]
        found = self.embed(index.repeat(len(steps[0])), *each, spaces=[self.space])
        return found[self.space].unflatten(0, (len(steps[0]), len(index)))


@torch.no_grad()
def measure_equivariance(
    encoder: Encoder,
    images: Tensor,
    augmentation: AugmentationConfig,
    draws: int = 16,
    seed: int = 0,
    families: Iterable[str] = FAMILIES,
    progress: bool = False,
    space: str | None = None,
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """family -> metric -> (mean, lower, upper end of a 95 % bootstrap interval over images and draws).

    `images` (N, 3, S, S) uint8 of the encoder's size: maps are fitted on the first half and stay as
    they are, the second half is measured. `space`: whose unit sphere rotates, by default
    "projection" where there is a head. Compositions b(a(x)) are those of an augmentation and the
    one before it, for every sixteenth one. Ratios are those of the means over all draws; a ratio to
    a motion of nothing (flipping twice) is NaN.
    """
    # A large block that glibc has freed makes it keep others: else each pass asks the system for its memory.
    torch.empty(7 << 20)
    shown = _Images(encoder, images, space or ("backbone" if encoder.projection is None else "projection"))
    everything = torch.arange(len(images))
    asked = everything[len(images) // 2 :][:CANDIDATE_IMAGES]
    plain = shown.embed(everything)
    z = plain[shown.space]
    (before,) = _second_half(z)
    weights = metrics.bootstrap_weights(len(before), RESAMPLES, seeded_generator(seed, "bootstrap"))
    mean = partial(metrics.weighted_mean, weights=weights)
    distance = mean(metrics.squared_distances(before))
    unrelated = Rotation.random(z.shape[1], seed)
    results: dict[str, dict[str, tuple[float, float, float]]] = {}
    for family in tqdm(list(families), unit="family", disable=not progress or None, leave=False):
        samples = sample(family, augmentation, max(draws, metrics.SAME_IMAGE_VIEWS), seed)
        fitted, others = (samples.rows(part) for part in torch.arange(len(samples)).tensor_split([draws]))
        views = shown.views(everything, fitted)
        r = torch.stack([fit_rotation(z, view) for view in views])
        candidates = views[: metrics.SAME_IMAGE_VIEWS, asked]
        if len(others):
            candidates = torch.cat([candidates, shown.views(asked, others)])
        rows = _map_metrics(z, views, r, fitted.parameters(), candidates, mean, seed)
        for row, view, r_k in zip(rows, views, r, strict=True):
            row |= _view_metrics(z, view, r_k, mean) | _retrieval_metrics(z, view, r_k, unrelated, mean)
            row["motion"] = row["invariance_error"], distance
        for k in {*range(COMPOSED - 1, len(rows), COMPOSED), len(rows) - 1}:
            steps = (fitted.rows(torch.tensor([j])) for j in (k - 1, k))  # a single one with itself
            rows[k] |= _composition_metrics(z, shown.views(everything, *steps)[0], r[k - 1], r[k], mean)
        if len(samples) > 1 and len(images) >= 4:  # two to fit, of which one to choose the penalty
            own = sample(family, augmentation, len(images), seed, own=True)
            for name, after in shown.embed(everything, own).items():
                suffix = "" if name == shown.space else f"_{name}"
                rows[0] |= _parameter_metrics(plain[name], after, own.parameters(), mean, suffix, seed)
        results[family] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            statistics, *motions = _stacked(rows, name)
            generator = seeded_generator(seed, "bootstrap", family)
            results[family][name] = metrics.bootstrap_interval(statistics, generator, *motions)
    return results


def _stacked(rows: list[Row], name: str) -> list[Tensor]:
    """[(K, B)] of the K rows that have it; of a ratio the errors, and the motions that they are a part of."""
    values = [row[name] for row in rows if name in row]
    parts = zip(*values, strict=True) if isinstance(values[0], tuple) else [values]
    return [torch.stack(list(part)) for part in parts]
