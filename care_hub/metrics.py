"""Every formula by which care_hub judges embeddings, as pure functions, and the table of all metrics.

Shapes: `z` (N, d) embeddings f(x) of N images, `z_a` (N, d) those of the same images under one
augmentation a, `r` (d, d) the orthogonal matrix fitted for a on other images. A mean over images
comes as its N terms (N,), a mean over pairs as (N, N) with a diagonal that does not count:
`weighted_mean` takes the mean, `bootstrap_interval` says how certain it is. CareHubError where one set of
embeddings or labels is empty or does not fit the other.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CareHubError

TINY = 1e-12
TIE = 1e-6  # cosines this near are equal but for rounding
MOTIONLESS = 1e-8  # a mean squared motion of unit vectors below this is rounding
SAME_IMAGE_VIEWS = 50  # among which the one of an augmentation is to be found
KNN_CHUNK = 1024  # queries that are compared with the bank at a time


def invariance(z: Tensor, z_a: Tensor) -> Tensor:
    """(N,): |f(ax) - f(x)|^2. Its mean is the invariance error; 0 = the augmentation changes nothing.

    >>> invariance(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([2., 2.])
    """
    _check_alike(z, z_a)
    return (z_a - z).square().sum(dim=1)


def _check_alike(z: Tensor, z_a: Tensor) -> None:
    if z.shape != z_a.shape or not len(z):
        shapes = f"{tuple(z.shape)} and {tuple(z_a.shape)}"
        raise CareHubError(f"two values for each of the same images are compared, got shapes {shapes}.")


def residual(z: Tensor, z_a: Tensor, r: Tensor) -> Tensor:
    """(N,): |f(ax) - R f(x)|^2. Its mean, with R fitted on other images, is the rotation error.

    Source: Gupta et al. 2024, section 4.2 (Wahba's problem).

    >>> quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> residual(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), quarter_turn)
    tensor([0., 0.])
    """
    return invariance(z @ r.T, z_a)


def ratio(errors: Tensor, motions: Tensor, counts: Tensor | float = 1.0) -> Tensor:
    """(...): the sum of `errors` over the sum of `motions`, both (K, ...), of K random augmentations.

    Those that move nothing are left out: whatever is divided by rounding is noise. NaN where none
    moves: an invariant or collapsed encoder does not rotate well. `counts` (K, ...): how often each
    augmentation counts.

    >>> ratio(torch.tensor([[0.5, 0.0], [0.3, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    tensor([0.2500,    nan])
    """
    counts = counts * (motions > MOTIONLESS)
    return (errors * counts).sum(dim=0) / (motions * counts).sum(dim=0)


def gram_deviation(z: Tensor, z_a: Tensor) -> Tensor:
    """(N, N): (f(ax).f(ax') - f(x).f(x'))^2, the terms of the equivariance loss.

    Source: Gupta et al. 2024, eq. 3.

    >>> gram_deviation(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    return gram_change(z, z_a).square()


def gram_change(z: Tensor, z_a: Tensor) -> Tensor:
    """(N, N): f(ax).f(ax') - f(x).f(x').

    >>> gram_change(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    _check_alike(z, z_a)
    return z_a @ z_a.T - z @ z.T


def relative_equivariance(z: Tensor, z_a: Tensor, change: Tensor | None = None) -> Tensor:
    """(N, N): the terms of gamma, the relative rotational equivariance (lower is better),
    (|f(ax') - f(ax)|^2 - |f(x') - f(x)|^2)^2 / (|f(ax') - f(x')|^2 + |f(ax) - f(x)|^2)^2.

    It says how much distances change, relative to how much the embeddings move; 0 where nothing
    moves. `change`: their `gram_change`, where it is known. Source: Gupta et al. 2024, section 4.2.

    >>> relative_equivariance(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # a rotation
    tensor([[0., 0.],
            [0., 0.]])
    """
    moved, longer = invariance(z, z_a), z_a.square().sum(dim=1) - z.square().sum(dim=1)
    changed = longer[:, None] + longer - 2 * (gram_change(z, z_a) if change is None else change)
    return changed.square() / (moved[:, None] + moved).square().clamp(min=TINY)


def squared_distances(z: Tensor) -> Tensor:
    """(N, N): |f(x') - f(x)|^2; that of an image to itself is 0 but for rounding.

    >>> squared_distances(torch.eye(2))
    tensor([[0., 2.],
            [2., 0.]])
    """
    norms = z.square().sum(dim=1)
    return norms[:, None] + norms - 2 * z @ z.T


def variance(z: Tensor) -> Tensor:
    """(N,): |f(x) - mean f|^2. For unit vectors its mean is 1 - |mean f|^2: 0 = collapsed to a point,
    1 = centered on the origin.

    >>> variance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    tensor([1., 1.])
    """
    return (z - z.mean(dim=0)).square().sum(dim=1)


def effective_rank(z: Tensor) -> float:
    """e^entropy of the normalized singular values of the centered embeddings, from 1 to d.

    Source: Roy & Vetterli 2007.

    >>> round(effective_rank(torch.cat([torch.eye(3), -torch.eye(3)])), 4)
    3.0
    """
    if not len(z) or not z.isfinite().all():
        raise CareHubError("there are no embeddings, or some are not finite numbers.")
    p = torch.linalg.svdvals(z.double() - z.double().mean(dim=0))
    p = p / p.sum().clamp(min=TINY)
    return torch.exp(-(p * p.clamp(min=TINY).log()).sum()).item()


def composition_error(r_ba: Tensor, r_b: Tensor, r_a: Tensor) -> float:
    """|R_ba - R_b R_a|_F^2 / 2d for (d, d) matrices: 0 if the map of "a, then b" is the product of the
    maps, about 1 for unrelated rotations.

    >>> quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> composition_error(-torch.eye(2), quarter_turn, quarter_turn)
    0.0
    """
    return ((r_ba - r_b @ r_a).square().sum() / (2 * len(r_a))).item()


def retrieval(queries: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """mrr, hit_at_1 and hit_at_5 of each query (..., Q): is candidate i among the nearest to query i?

    `queries` (..., Q, d), `candidates` (..., C, d) with C >= Q, by cosine similarity. mrr is the
    reciprocal of the rank, hits are 1 or 0; candidates that are equally near stand in random order,
    of which these are the expected values, so that equal candidates give chance. With R f(x) and
    f(ax') of N images: does the rotation find the augmented image? With R_k f(x) and f(a_j x) of
    one image: does it know the augmentation?

    >>> retrieval(torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 1.0]]))["mrr"]
    tensor([1., 1.])
    >>> retrieval(torch.eye(2), torch.ones(2, 2))
    {'mrr': tensor([0.7500, 0.7500]), 'hit_at_1': tensor([0.5000, 0.5000]), 'hit_at_5': tensor([1., 1.])}
    """
    _check_alike(queries, candidates[..., : queries.shape[-2], :])
    similarity = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).mT
    own = similarity.diagonal(dim1=-2, dim2=-1)[..., None]
    nearer = (similarity > own + TIE).sum(dim=-1)
    equal = (similarity >= own - TIE).sum(dim=-1) - nearer  # with itself
    places = torch.arange(1, similarity.shape[-1] + 1, dtype=similarity.dtype, device=similarity.device)
    harmonic = F.pad((1 / places).cumsum(dim=0), (1, 0))
    found = {"mrr": (harmonic[nearer + equal] - harmonic[nearer]) / equal}
    for k in (1, 5):
        found[f"hit_at_{k}"] = ((k - nearer).clamp(min=0) / equal).clamp(max=1)
    return found


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """(B,): the mean of `values` under each row of `weights` (B, N).

    `values` are (N,) terms of images, or of the first of them, or (N, N) terms of pairs, of which
    those of different images count.

    >>> weighted_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]))
    tensor([3., 1.])
    """
    weights = weights[:, : len(values)]
    total = weights.sum(dim=1)
    if values.ndim == 1:
        return weights @ values / total
    pairs = total.square() - weights.square().sum(dim=1)
    off_diagonal = values.clone().fill_diagonal_(0)
    return ((weights @ off_diagonal) * weights).sum(dim=1) / pairs.clamp(min=TINY)


def bootstrap_weights(count: int, times: int, generator: torch.Generator) -> Tensor:
    """(1 + times, count): how often each of `count` things is sampled with replacement.

    The first row is all ones: the sample itself.

    >>> bootstrap_weights(4, 10, torch.Generator().manual_seed(0)).sum(dim=1).unique()
    tensor([4.])
    """
    if count < 1 or times < 0:
        raise CareHubError(f"{count} things can't be sampled {times} times.")
    sampled = torch.randint(0, count, (times, count), generator=generator)
    counts = torch.zeros(times, count).scatter_add_(1, sampled, torch.ones(times, count))
    return torch.cat([torch.ones(1, count), counts])


def bootstrap_interval(
    statistics: Tensor, generator: torch.Generator, motions: Tensor | None = None
) -> tuple[float, float, float]:
    """(mean, lower end, upper end) of a 95 % interval; of the `ratio` to `motions` where these are given.

    `statistics`, `motions` (K, 1 + B): K random augmentations, each under the 1 + B
    `bootstrap_weights` of the images. The augmentations are resampled too, independently of the
    images; the ends are percentiles. Source: Owen 2007, "The pigeonhole bootstrap".

    >>> bootstrap_interval(torch.full((3, 201), 0.5), torch.Generator().manual_seed(0))
    (0.5, 0.5, 0.5)
    """
    counts = bootstrap_weights(len(statistics), statistics.shape[1] - 1, generator).T.to(statistics)
    if motions is None:
        means = (statistics * counts).sum(dim=0) / len(statistics)
    else:
        means = ratio(statistics, motions, counts)
    if means[0].isnan():
        return (math.nan,) * 3
    low, high = means[1:].nanquantile(torch.tensor([0.025, 0.975]).to(means)).tolist()
    return means[0].item(), low, high


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 200, temperature: float = 0.5
) -> Tensor:
    """(M, classes) votes of the k nearest neighbors of each query.

    `bank` (N, d) with `labels` (N,), `queries` (M, d); k is cut to N. A neighbor of cosine
    similarity s votes for its label with e^{s / temperature}. Runs in chunks, so that memory stays
    bounded. Source: Wu et al. 2018; k = 200, temperature = 0.5 as in the public CARE code.

    >>> knn_scores(torch.eye(2), torch.tensor([1, 0]), torch.tensor([[1.0, 0.0]]), classes=2, k=1)
    tensor([[0.0000, 7.3891]])
    """
    _check_labels(bank, labels)
    if k < 1 or not 0 < temperature < math.inf:
        raise CareHubError(f"`k={k}` and `temperature={temperature}` must be positive and finite.")
    if bank.shape[1:] != queries.shape[1:] or not (bank.isfinite().all() and queries.isfinite().all()):
        raise CareHubError("these embeddings are of different encoders, or not finite numbers.")
    if labels.min() < 0 or labels.max() >= classes:
        raise CareHubError(f"labels go from 0 to {classes - 1}, these from {labels.min()} to {labels.max()}.")
    bank = F.normalize(bank.float(), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for chunk, rows in zip(queries.split(KNN_CHUNK), votes.split(KNN_CHUNK), strict=True):
        similarity = F.normalize(chunk.float(), dim=1) @ bank.T
        similarity, index = similarity.topk(min(k, len(bank)), dim=1)
        rows.scatter_add_(1, labels[index], (similarity / temperature).exp())
    return votes


def knn_top1(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.5
) -> float:
    """Top-1 accuracy of `knn_scores` in percent; `truth` (M,) are the labels of the queries.

    >>> knn_top1(torch.eye(2), torch.tensor([1, 0]), torch.eye(2), torch.tensor([1, 1]), k=1)
    50.0
    """
    _check_labels(bank, labels)
    _check_labels(queries, truth)
    classes = int(max(labels.max(), truth.max())) + 1
    return topk_accuracy(knn_scores(bank, labels, queries, classes, k, temperature), truth, 1)


def topk_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows of `scores` (N, C) whose label (N,) is among the k largest.

    >>> topk_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]), k=1)
    50.0
    """
    _check_labels(scores, labels)
    if k < 1:
        raise CareHubError(f"`k` must be positive, got {k}.")
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).float().mean().item()


def _check_labels(rows: Tensor, labels: Tensor) -> None:
    if labels.shape != (len(rows),) or not len(rows):
        raise CareHubError(f"{len(rows)} images can't have labels of shape {tuple(labels.shape)}.")


def r_squared(prediction: Tensor, truth: Tensor) -> float:
    """1 - |prediction - truth|^2 / |truth - mean truth|^2 over (N,) or (N, k) numbers.

    1 = exact, 0 = no better than the mean.

    >>> r_squared(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    """
    _check_alike(prediction, truth)
    error = (truth - prediction).square().sum()
    total = (truth - truth.mean(dim=0)).square().sum()
    return (1 - error / total.clamp(min=TINY)).item()


@dataclass(frozen=True)
class Metric:
    """What a recorded number is."""

    key: str  # its name in results.json, evaluation.json and metrics.jsonl
    title: str  # for column heads and figures
    meaning: str
    unit: str = ""  # "%", "R²", "s", "images/s" or ""
    better: str = ""  # "higher", "lower" or "" (neither)


_PROBES = {
    "x": "horizontal place of the shape",
    "y": "vertical place of the shape",
    "size": "size of the shape",
    "rotation": "angle of the shape",
    "background": "gray level of the background",
    "brightness": "mean brightness of the image",
    "contrast": "standard deviation of brightness",
    "saturation": "mean saturation of the image",
    "hue": "mean hue, as a point in the color plane",
}
_MAPS = {
    "": ("R f(x)", "R f(x)", "higher"),
    "_unrotated": ("f(x)", "f(x)", ""),
    "_linear": ("a linear map", "the best linear map of f(x)", ""),
    "_mlp": ("a network", "a linear map corrected by a small network", ""),
}
# fmt: off
_SAME = (
    ("hit_at_1", "found by", "how often {} is nearest to f(ax) of 50 views of that image; chance 2 %", "%"),
    ("hit_at_5", "top 5 by", "how often {} has f(ax) among the 5 nearest of those; chance 10 %", "%"),
    ("mrr", "MRR by", "mean reciprocal rank that {} gives f(ax) among those; chance 0.09", ""),
)
_TABLE = (
    # The end of training, and `care-hub equivariance`
    ("knn_top1", "kNN, label", "top-1 on held-out images, backbone features", "%", "higher"),
    ("knn_color_top1", "kNN, color", "top-1 for the color of held-out images", "%", "higher"),
    ("invariance_error", "invariance error",
     "how far an augmentation moves an embedding: mean |f(ax) - f(x)|^2"),
    ("rotation_error", "rotation error",
     "what is left after one fitted rotation for all images: mean |f(ax) - R f(x)|^2"),
    ("rotation_invariance_ratio", "rotation / invariance",
     "mean rotation error / mean invariance error; 1 = rotating helps nothing", "", "lower"),
    ("gram_deviation", "Gram deviation",
     "how much an augmentation changes inner products between images", "", "lower"),
    ("color_motion", "moved by color",
     "how far a change of color moves an embedding, relative to the distance of two images; 0 = not at all"),
    ("color_same_image_hit_at_1", "steered by color",
     "how often the rotation fitted to a change of color finds it among 50 of the same image; chance 2 %",
     "%", "higher"),
    ("motionless", "move nothing", "augmentations that move no embedding, which ratios leave out", "%"),
    ("motion", "motion",
     "how far an augmentation moves an embedding, relative to the distance of two images; 0 = it is ignored"),
    ("special_rotation_error", "rotation error, SO(d)",
     "rotation error of proper rotations only (det R = +1)"),
    ("special_rotation_invariance_ratio", "rotation / invariance, SO(d)",
     "rotation / invariance of proper rotations only (det R = +1)"),
    ("gamma", "γ", "how much distances change, relative to how much the embeddings move"),
    ("variance", "variance", "mean |f(x) - mean f|^2; 0 = all embeddings collapsed to a point"),
    ("composition_error", "composition error",
     "distance of R_b R_a from R_ba, fitted on a then b; about 1 for unrelated rotations"),
    ("composition_residual", "composed error", "rotation error with R_b R_a in place of R_ba"),
    ("composition_invariance_ratio", "composed / invariance",
     "rotation / invariance with R_b R_a in place of R_ba"),
    ("hit_at_1", "found by R f(x)", "augmented images nearest to R f(x)", "%", "higher"),
    ("hit_at_1_unrotated", "found by f(x)", "augmented images nearest to f(x)", "%"),
    ("hit_at_1_random", "found by random R", "augmented images nearest to R f(x), R random", "%"),
    ("hit_at_5", "top 5 by R f(x)", "augmented images among the 5 nearest to R f(x)", "%"),
    ("hit_at_5_unrotated", "top 5 by f(x)", "augmented images among the 5 nearest to f(x)", "%"),
    ("hit_at_5_random", "top 5 by random R", "augmented images among the 5 nearest to R f(x), R random", "%"),
    ("mrr", "MRR by R f(x)", "mean reciprocal rank of the augmented image for R f(x)"),
    ("mrr_unrotated", "MRR by f(x)", "mean reciprocal rank of the augmented image for f(x)"),
    ("mrr_random", "MRR by random R", "mean reciprocal rank of the augmented image for R f(x), R random"),
    *((f"same_image_{key}{suffix}", f"same image, {title} {short}", meaning.format(long), unit, better)
      for key, title, meaning, unit in _SAME for suffix, (short, long, better) in _MAPS.items()),
    *((f"cosine{suffix}", f"cosine, {short}", f"mean cosine of {long} with f(ax)", "", better)
      for suffix, (short, long, better) in _MAPS.items()),
    ("cosine_between", "cosine, between", "the same with an R between those of the next weaker and stronger"),
    *((f"parameters_from_{key}{suffix}", f"parameters from {title}{space}",
       f"what a linear map reads of a's parameters from {what}{space}; 0 = nothing", "R²", "higher")
      for key, title, what in (("pair", "both", "f(x) and f(ax)"), ("view", "f(ax)", "f(ax) alone"))
      for suffix, space in (("", ""), ("_backbone", ", backbone"))),
    ("effective_rank", "effective rank", "how many directions the embeddings use, from 1 to d"),
    # Accuracies
    ("top1", "top-1", "test images whose label is the first guess", "%", "higher"),
    ("top5", "top-5", "test images whose label is among the first five guesses", "%", "higher"),
    # Attribute probes: what a linear map predicts from the embeddings
    ("label", "label", "top-1 of a linear probe for the label", "%", "higher"),
    ("color", "color", "top-1 of a linear probe for the color", "%", "higher"),
    *((name, name, f"linear probe for the {what}", "R²", "higher") for name, what in _PROBES.items()),
    # Training
    ("loss", "loss", "InfoNCE + λ · equivariance loss, and of a steering head its uniformity"),
    ("infonce", "InfoNCE", "the contrastive loss"),
    ("equivariance", "equivariance loss", "change of the Gram matrices within a group"),
    ("uniformity", "uniformity loss", "how close the steering head's embeddings are to each other"),
    ("weight", "λ", "weight of the equivariance loss"),
    ("lr", "learning rate", "learning rate of the optimizer"),
    ("images_per_second", "speed", "source images, not views, per second of training", "images/s"),
    ("training_seconds", "training time", "wall time of all training steps", "s"),
)
# fmt: on
FINAL_GEOMETRY = (
    "invariance_error",
    "rotation_error",
    "rotation_invariance_ratio",
    "gram_deviation",
    "color_motion",
    "color_same_image_hit_at_1",
)
FINAL_METRICS = ("knn_top1", "knn_color_top1", *FINAL_GEOMETRY)
METRICS = {key: Metric(key, *rest) for key, *rest in _TABLE}
