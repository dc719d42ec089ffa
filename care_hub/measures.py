"""Every formula by which care_hub judges embeddings, as pure functions.

Shapes: `z` (N, d) embeddings f(x) of N images, `z_a` (N, d) those of the same images under one augmentation a, `r` (d, d)
the orthogonal matrix fitted for a on other images. A mean over images comes as its N terms (N,), a mean over pairs as
(N, N) with a diagonal that does not count; `average` takes the mean and `interval` says how sure it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-12
TIE = 1e-6  # cosines this near are equal but for rounding
STILL = 1e-8  # a mean squared motion of unit vectors below this is rounding


def invariance(z: Tensor, z_a: Tensor) -> Tensor:
    """(N,): |f(ax) - f(x)|^2. Its mean is the invariance error; 0 = the augmentation changes nothing."""
    return (z_a - z).square().sum(dim=1)


def residual(z: Tensor, z_a: Tensor, r: Tensor) -> Tensor:
    """(N,): |f(ax) - R f(x)|^2. Its mean, with R fitted on other images, is the rotation error (Gupta et al. 2024, section 4.2)."""
    return invariance(z @ r.T, z_a)


def ratio(error: Tensor, motion: Tensor) -> Tensor:
    """error / motion, NaN where nothing moves: an encoder that is invariant, or collapsed, does not rotate well."""
    return torch.where(motion > STILL, error / motion, torch.nan)


def gram_deviation(z: Tensor, z_a: Tensor) -> Tensor:
    """(N, N): (f(ax).f(ax') - f(x).f(x'))^2, the terms of the equivariance loss (Gupta et al. 2024, eq. 3)."""
    return (z_a @ z_a.T - z @ z.T).square()


def relative_equivariance(z: Tensor, z_a: Tensor) -> Tensor:
    """(N, N): the terms of gamma (Gupta et al. 2024, section 4.2), lower is better,
    (|f(ax') - f(ax)|^2 - |f(x') - f(x)|^2)^2 / (|f(ax') - f(x')|^2 + |f(ax) - f(x)|^2)^2.

    How much distances change, relative to how much the embeddings move. 0 where nothing moves.
    """
    moved = invariance(z, z_a)
    changed = (_squared_distances(z_a) - _squared_distances(z)).square()
    return changed / (moved[:, None] + moved[None, :]).square().clamp(min=TINY)


def _squared_distances(z: Tensor) -> Tensor:
    norms = z.square().sum(dim=1)
    return norms[:, None] + norms[None, :] - 2 * z @ z.T


def spread(z: Tensor) -> Tensor:
    """(N,): |f(x) - mean f|^2. For unit vectors the mean is 1 - |mean f|^2: 0 = collapsed to a point, 1 = centred on the origin."""
    return (z - z.mean(dim=0)).square().sum(dim=1)


def effective_rank(z: Tensor) -> float:
    """e^entropy of the normalised singular values of the centred embeddings, from 1 to d. Source: Roy & Vetterli 2007."""
    p = torch.linalg.svdvals(z.double() - z.double().mean(dim=0))
    p = p / p.sum().clamp(min=TINY)
    return torch.exp(-(p * p.clamp(min=TINY).log()).sum()).item()


def composition_error(r_ba: Tensor, r_b: Tensor, r_a: Tensor) -> float:
    """|R_ba - R_b R_a|_F^2 / 2d: 0 if the map of "a, then b" is the product of the maps, about 1 for unrelated rotations."""
    return ((r_ba - r_b @ r_a).square().sum() / (2 * len(r_a))).item()


def retrieval_ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """(N,): the place, from 1, of candidate i among all N by cosine similarity to query i; of equals, the middle place.

    With queries R f(x) and candidates f(ax): does the rotation find the augmented picture?
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T
    own = similarity.diagonal()[:, None]
    return 1 + (similarity > own + TIE).sum(dim=1) + (((similarity - own).abs() <= TIE).sum(dim=1) - 1) / 2


def average(values: Tensor, weights: Tensor) -> Tensor:
    """(B, N) weights -> (B,) weighted means of (N,) terms, or over pairs of different images of (N, N) terms."""
    total = weights.sum(dim=1)
    if values.ndim == 1:
        return weights @ values / total
    pairs = total.square() - weights.square().sum(dim=1)
    return ((weights @ values.clone().fill_diagonal_(0)) * weights).sum(dim=1) / pairs.clamp(min=TINY)


def resamples(count: int, times: int, generator: torch.Generator) -> Tensor:
    """(1 + times, count): how often each of `count` things is drawn with replacement; the first row is the sample itself."""
    drawn = torch.randint(0, count, (times, count), generator=generator)
    counts = torch.zeros(times, count).scatter_add_(1, drawn, torch.ones(times, count))
    return torch.cat([torch.ones(1, count), counts])


def interval(statistics: Tensor, generator: torch.Generator) -> tuple[float, float, float]:
    """(mean, lower and upper end of a 95 % interval) of (K, 1 + B): K draws of an augmentation, each under `resamples` of the images.

    Draws are resampled too, independently of the images. Source: Owen 2007, "The pigeonhole bootstrap"; percentiles.
    """
    draws = resamples(len(statistics), statistics.shape[1] - 1, generator).T.to(statistics)
    means = (statistics * draws).sum(dim=0) / len(statistics)
    ends = means[1:].quantile(torch.tensor([0.025, 0.975]).to(means)).tolist()
    return means[0].item(), *ends


def knn_scores(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 200, temperature: float = 0.5) -> Tensor:
    """Votes (M, classes): each query's k nearest by cosine similarity s vote for their label with e^{s / temperature}.

    `bank` (N, d) with `labels` (N,), `queries` (M, d); k is cut to N. Source: Wu et al. 2018; k = 200, t = 0.5 as in
    the public CARE code. Runs in chunks, so that memory stays bounded.
    """
    bank = F.normalize(bank.float(), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for start in range(0, len(queries), 1024):
        chunk = slice(start, start + 1024)
        similarity, index = (F.normalize(queries[chunk].float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes[chunk].scatter_add_(1, labels[index], (similarity / temperature).exp())
    return votes


def knn_top1(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.5) -> float:
    """Top-1 accuracy of `knn_scores` in per cent; `truth` (M,)."""
    classes = int(max(labels.max(), truth.max())) + 1
    return topk(knn_scores(bank, labels, queries, classes, k, temperature), truth, 1)


def topk(scores: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows of `scores` (N, C) whose label is among the k largest."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).float().mean().item()


def r_squared(prediction: Tensor, truth: Tensor) -> float:
    """1 - |prediction - truth|^2 / |truth - mean truth|^2 over (N,) or (N, k) numbers; 1 = exact, 0 = no better than the mean."""
    error, variance = (truth - prediction).square().sum(), (truth - truth.mean(dim=0)).square().sum()
    return (1 - error / variance.clamp(min=TINY)).item()
