"""How well one rotation explains what an augmentation does to all embeddings."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .. import augment
from ..rotation import procrustes


def rotation_errors(z: Tensor, views: Iterable[Tensor]) -> dict[str, float]:
    """Rotation error, invariance error, their ratio and the Gram deviation, each a mean over `views`.

    `z` (N, d): embeddings of N images; each of `views` (N, d): the same images under one augmentation. The first half
    fits R in O(d) (Wahba's problem), the second half is measured:
    rotation_error = mean |f(ax) - R f(x)|^2, invariance_error = mean |f(ax) - f(x)|^2, gram_deviation = mean over pairs
    of (f(ax).f(ax') - f(x).f(x'))^2. The ratio is taken per view, then averaged: 1 means that rotating helps nothing.
    """
    half = len(z) // 2
    fit, held = z[:half], z[half:]
    rows = []
    for view in views:
        fitted = procrustes(fit, view[:half]).to(z.dtype)
        moved = view[half:]
        rotation = (moved - held @ fitted.T).square().sum(dim=1).mean()
        invariance = (moved - held).square().sum(dim=1).mean()
        gram = (moved @ moved.T - held @ held.T).square().mean()
        rows.append(torch.stack([rotation, invariance, rotation / invariance.clamp(min=1e-12), gram]))
    mean = torch.stack(rows).mean(dim=0).tolist()
    return dict(zip(("rotation_error", "invariance_error", "rotation_invariance_ratio", "gram_deviation"), mean, strict=True))


def augmented(embed, images: Tensor, recipe: augment.Recipe, draws: int = 16, seed: int = 0) -> Iterable[Tensor]:
    """Embeddings of `images` (N, 3, H, W) uint8 under `draws` fixed augmentations, one draw for all images.

    `embed` takes un-normalised (B, 3, S, S) pictures in [0, 1]. The draws depend on `seed` alone, so that encoders are
    compared on the same ones.
    """
    plain = replace(recipe, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for k in range(draws):
        drawn = augment.draw(plain, 1, *images.shape[2:], augment.generator(seed, "equivariance", k))
        parts = [embed(augment.apply(batch, drawn.repeat(len(batch)), plain)) for batch in images.split(500)]
        yield torch.cat(parts)
