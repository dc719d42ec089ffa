"""Ways to turn a query to "this, brighter", by how often search then finds the right version of its image.

    python experiments/brighter.py path/to/cifar10

As `benchmarks/search.py` measures it, for four strengths of brightness: the version that was asked for on
top, and any version of the query. Tried: more images to fit R to, less of R, R about the means of both sets
of embeddings instead of the origin (which is no rotation of the sphere), and an unconstrained linear map.
Writes results/tried/brighter.json.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import care_hub
from care_hub.config import DataConfig
from care_hub.data.sources import load_split
from care_hub.evaluate.features import embed_view, random_subset
from care_hub.files import write_text
from care_hub.rotation import Rotation, least_squares
from care_hub.transformations import TRANSFORMATIONS

ENCODER, BRIGHTNESS = "resnet10_w16_small.care_cifar10_color", TRANSFORMATIONS["brightness"]
STRENGTHS = (0.5, 0.7, 1.4, 2.0)
IMAGES, QUERIES, FITTED = 2001, 500, (500, 1000, 2000, 4000)
Map = Callable[[Tensor], Tensor]


def rotation(z: Tensor, view: Tensor, count: int = 2000, power: float = 1.0) -> Map:
    return Rotation.fit(z[:count], view[:count], special=True).power(power)


def about_the_means(z: Tensor, view: Tensor) -> Map:
    before, after = z.mean(dim=0), view.mean(dim=0)
    r = Rotation.fit(z - before, view - after, special=True)
    return lambda query: r(query - before) + after


def linear(z: Tensor, view: Tensor) -> Map:
    weight = least_squares(z, view)
    return lambda query: (query.double() @ weight.T).float()


WAYS = {f"R, fitted to {count} images": partial(rotation, count=count) for count in FITTED}
WAYS |= {f"R to the power {power}": partial(rotation, power=power) for power in (0.8, 0.9)}
WAYS |= {"R about the means": about_the_means, "linear map": linear}


def found(query: Tensor, z: Tensor, own: Tensor, k: int) -> list[float]:
    """In percent: version `k` of `own` (Q, K, d) on top of all of them and of z (N, d), and any version."""
    query = F.normalize(query, dim=1)
    others = query @ z.T
    others.fill_diagonal_(-1)  # the query is one of its own versions
    best = (own @ query[:, :, None])[:, :, 0].max(dim=1)
    above = best.values > others.max(dim=1).values
    return [100 * hit.float().mean().item() for hit in (above & (best.indices == k), above)]


@click.command()
@click.argument("data_root", type=click.Path(exists=True))
def main(data_root: str) -> None:
    """Measure all WAYS on CIFAR-10's test images, with maps fitted to training images."""
    encoder, pixels = care_hub.load_encoder(ENCODER), []
    for name, count in (("train", max(FITTED)), ("test", IMAGES)):
        split = load_split(DataConfig("cifar10", data_root=data_root), name, encoder.config.image_size)
        pixels.append(split.take(random_subset(len(split), count)).pixels)
    changes = [partial(BRIGHTNESS, strength=strength) for strength in STRENGTHS]
    fit, z = (embed_view(encoder, x) for x in pixels)
    fit_views = [embed_view(encoder, pixels[0], change) for change in changes]
    queries = pixels[1][:QUERIES]
    own = torch.stack([z[:QUERIES], *(embed_view(encoder, queries, change) for change in changes)], dim=1)
    rows = {}
    for name, way in WAYS.items():
        maps = [way(fit, view) for view in fit_views]
        hits = [found(m(z[:QUERIES]), z, own, k) for k, m in enumerate(maps, 1)]
        rows[name] = {str(s): [round(x, 1) for x in pair] for s, pair in zip(STRENGTHS, hits, strict=True)}
        click.echo(f"{name:<28}" + "".join(f"{s:>6}: {a:.1f} / {b:.1f}" for s, (a, b) in rows[name].items()))
    target = Path(__file__).parents[1] / "results" / "tried" / "brighter.json"
    write_text(target, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
