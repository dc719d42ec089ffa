"""What rotations of stored embeddings are good for, beside other maps, nothing, and embedding anew.

    python benchmarks/uses.py --data-root CIFAR10 \\
        --encoder resnet10_w32_small.care_cifar10 --twin resnet10_w32_small.simclr_cifar10
    python benchmarks/uses.py --data-root CIFAR10 --twin resnet10_w32_small.simclr_cifar10 \\
        --new runs/zoo/color-1

On images that neither was trained on, for the encoder and for its twin without the equivariance
loss (λ = 0):

- heads on 1, 5 and 10 labeled images of each class, whose stored embeddings are augmented by 32
  changes of color; tested on other images, as they are and in other colors;
- test-time augmentation by the same 32: the mean of what a head says of an image and of its
  views, the head being trained on more labeled images, augmented in the same way;
- another light, which a map from 200 pairs takes back: a linear head, kNN, and search for the
  same image among 1,000;
- with --new (of the twin: --twin-new) another encoder: what maps from 1,000 pairs carry over to
  it, against its own embeddings, among 1,000 others; from those that are stored, and from the
  backbone's.

Each seed divides the images anew into those that fit maps, labeled ones, and those that are
tested. A share is that of what embedding anew wins; there is none where that is less than a
point. Changes of color are random, of brightness, contrast, saturation (by up to 40 %) and hue
(a tenth of the circle), each the same for all images. Writes results/uses_<data set>_<encoder>.json
and the tables in docs/results.md.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from result_tables import Arms, hardware, write_results
from torch import Tensor

from care_hub import augment
from care_hub.augment import AugmentationConfig, permutation, seeded_generator
from care_hub.config import DataConfig, source_name
from care_hub.data.images import InMemoryImages
from care_hub.data.sources import load_split
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.features import embed_view, random_subset
from care_hub.evaluate.linear import fit_linear
from care_hub.factory import load_encoder
from care_hub.metrics import knn_top1, retrieval, topk_accuracy
from care_hub.rotation import least_squares, procrustes
from care_hub.steering import upgrade
from care_hub.transformations import parse

COLORS = AugmentationConfig(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)
LIGHT = "gamma=1.2+brightness=0.8+white_balance=0.25"
VIEWS, SHOTS, DRAWS = 32, (1, 5, 10), 4  # draws of the few labeled images, for each seed
LIGHT_PAIRS, UPGRADE_PAIRS, SEARCHED = 200, 1000, 1000
PENALTY, STEPS = 1e-2, 30  # of all heads
NEIGHBORS = 20  # that vote
STORED, ANEW = "as stored", "embedded anew"
MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear map": least_squares,
    "rotation": lambda z, views: procrustes(z.expand_as(views), views, special=True),
}
METHODS = (STORED, *MAPS, ANEW)
LIT = ("light_head", "light_knn", "light_search")
SHARED = (*(f"shots_{n}{more}" for more in ("", "_changed") for n in SHOTS), "tta", *LIT)
LEAST_WON = 1.0  # percent; of less no share is given
MORE = 3000  # test images, beside those in many colors
Figures = dict[str, dict[str, Any]]  # method -> row -> value


class Embedded(NamedTuple):
    """Embeddings of M images in random order, the first N of them also in VIEWS other colors."""

    labels: Tensor  # (M,)
    z: Tensor  # (M, d)
    views: Tensor  # (VIEWS, N, d)
    changed: Tensor  # (M, d): each image in other colors of its own
    lit: Tensor  # (M, d): under another light
    seconds: float  # of a processor, to change the colors of one image and embed it


class Parts(NamedTuple):
    """Rows of images that fit maps, that are labeled, that are tested, and of all others."""

    fit: Tensor
    labeled: Tensor
    test: Tensor
    others: Tensor


def embed(encoder: Encoder, images: InMemoryImages, count: int) -> Embedded:
    """All that is measured on, but for the upgrade; `count` images in many colors."""
    pixels, light = images.pixels, parse(LIGHT)[0]
    params = augment.sample(COLORS, VIEWS + len(pixels), 32, 32, seeded_generator(0, "colors"))
    factors, order = (x[VIEWS:] for x in (params.factors, params.order))
    changed = (255 * augment.jitter(pixels.float() / 255, factors, order)).round().byte()
    began = time.process_time()
    views = []
    for k in range(VIEWS):
        color = partial(one_color, factors=params.factors[k], order=params.order[k])
        views.append(embed_view(encoder, pixels[:count], color))
    seconds = (time.process_time() - began) / (VIEWS * len(views[0]))
    lit = embed_view(encoder, pixels, partial(light, strength=1.0))
    z = embed_view(encoder, pixels)
    assert images.labels is not None
    return Embedded(images.labels, z, torch.stack(views), embed_view(encoder, changed), lit, seconds)


def one_color(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """(B, 3, S, S) images, all changed in the same way."""
    return augment.jitter(x, factors.expand(len(x), -1), order.expand(len(x), -1))


def divide(found: Embedded, seed: int) -> Parts:
    """Of the images in many colors one half fits, a quarter is labeled, a quarter is tested."""
    images, count = len(found.z), found.views.shape[1]
    rows = permutation(count, seed, "uses")
    quarter = count // 4
    return Parts(*rows.split([count - 2 * quarter, quarter, quarter]), torch.arange(count, images))


def mapped(z: Tensor, maps: Tensor) -> Tensor:
    """(..., n, d) unit vectors: `z` (n, d) after each of `maps` (..., d, d)."""
    return F.normalize(z @ maps.to(z).mT, dim=-1)


class Views:
    """The views of images that a method makes of what is stored, which comes first."""

    def __init__(self, method: str, found: Embedded, parts: Parts):
        self.method, self.found, fit = method, found, parts.fit
        if method in MAPS:
            self.maps = MAPS[method](found.z[fit], found.views[:, fit])

    def __call__(self, rows: Tensor) -> Tensor:
        """(1 + V, n, d)"""
        z, views = self.found.z[rows], self.found.views
        others = {STORED: lambda: views[:0, rows], ANEW: lambda: views[:, rows]}
        return torch.cat([z[None], others.get(self.method, lambda: mapped(z, self.maps))()])

    def seconds(self, rows: Tensor) -> float:
        """Of a processor, to make those of 1,000 images."""
        began = time.process_time()
        if self.method in MAPS:
            self(rows)
        known = {STORED: 0.0, ANEW: VIEWS * self.found.seconds}
        return 1000 * known.get(self.method, (time.process_time() - began) / len(rows))


def train(views: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A head on (V, n, d) views of n labeled images."""
    return fit_linear(views.flatten(0, 1), labels.repeat(len(views)), classes, PENALTY, STEPS)


def top1(head: tuple[Tensor, Tensor], views: Tensor, labels: Tensor) -> float:
    """Percent, by the mean of the probabilities of (V, n, d) views of n images."""
    weight, bias = head
    return topk_accuracy((views @ weight.T + bias).softmax(dim=-1).mean(dim=0), labels, 1)


def color_figures(method: str, found: Embedded, parts: Parts, seed: int) -> dict[str, float]:
    """Few-shot heads and test-time augmentation, and what 32 views of 1,000 images cost."""
    labels, classes = found.labels, int(found.labels.max()) + 1
    views, others = Views(method, found, parts), parts.others
    figures: dict[str, Any] = {"views_seconds": views.seconds(parts.fit)}
    for shots in SHOTS:
        draws = [few(parts.labeled, labels, shots, seed, draw) for draw in range(DRAWS)]
        heads = [train(views(rows), labels[rows], classes) for rows in draws]
        for more, z in {"": found.z, "_changed": found.changed}.items():
            hits = [top1(head, z[None, others], labels[others]) for head in heads]
            figures[f"shots_{shots}{more}"] = statistics.mean(hits)
    head = train(views(parts.labeled), labels[parts.labeled], classes)
    return figures | {"tta": top1(head, views(parts.test), labels[parts.test])}


def few(rows: Tensor, labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """`shots` random ones of each class among `rows`."""
    rows = rows[permutation(len(rows), seed, "shots", draw)]
    return torch.cat([rows[labels[rows] == c][:shots] for c in labels.unique()])


def light_figures(method: str, found: Embedded, parts: Parts) -> dict[str, float]:
    """What is recognized and found under another light, after a map back from it or without."""
    labels, classes = found.labels, int(found.labels.max()) + 1
    pairs, test, bank = parts.fit[:LIGHT_PAIRS], parts.others, parts.labeled
    z = found.z[test] if method == ANEW else found.lit[test]
    if method in MAPS:
        z = mapped(z, MAPS[method](found.lit[pairs], found.z[pairs]))
    return {
        "light_head": top1(train(found.z[None, bank], labels[bank], classes), z[None], labels[test]),
        "light_knn": knn_top1(found.z[bank], labels[bank], z, labels[test], NEIGHBORS),
        "light_search": 100 * retrieval(z[:SEARCHED], found.z[test[:SEARCHED]])["hit_at_1"].mean().item(),
    }


def upgraded_recall(method: str, old: Tensor, new: Tensor, seed: int) -> float | None:
    """recall@10 in percent, among images not among the pairs; None where dimensions differ."""
    if method == ANEW:
        return 100.0
    order = permutation(len(old), seed, "upgrade")
    pairs, rest = order[:UPGRADE_PAIRS], order[UPGRADE_PAIRS:][:SEARCHED]
    z = F.normalize(old, dim=1)
    if method in MAPS:
        kind = {"linear map": "linear", "rotation": "orthogonal"}[method]
        z = mapped(z, upgrade.MAPS[kind](z[pairs], new[pairs]))
    return 100 * upgrade.neighbor_recall(new[rest], z[rest]).mean().item() if z.shape == new.shape else None


def add_shares(runs: Arms) -> None:
    """To the rows of `runs` (method -> seeds): the share of what embedding anew wins over `STORED`.

    In percent of the mean over seeds, so that the mean of the shares is the ratio of the means.
    """
    for key in SHARED:
        stored, anew = ([row[key] for row in runs[method]] for method in (STORED, ANEW))
        won = statistics.mean(anew) - statistics.mean(stored)
        for method, rows in runs.items():
            for row, start in zip(rows, stored, strict=True):
                known = method in MAPS and won >= LEAST_WON
                row[f"{key}_share"] = 100 * (row[key] - start) / won if known else None


def measure(found: Embedded, carried: dict[str, Tensor], new: Tensor | None, seeds: int) -> Arms:
    """method -> the rows of each seed.

    `carried`: row -> (N, d) embeddings to be carried over to `new` (N, d), of the same images.
    """
    runs: Arms = {method: [] for method in METHODS}
    for seed in range(seeds):
        parts = divide(found, seed)
        for method, rows in runs.items():
            figures = color_figures(method, found, parts, seed) | light_figures(method, found, parts)
            for name, old in carried.items():
                figures[name] = None if new is None else upgraded_recall(method, old, new, seed)
            rows.append(figures)
    add_shares(runs)
    return runs


@click.command()
@click.option("--encoder", default="resnet10_w16_small.care_cifar10_color", show_default=True)
@click.option("--new", help="another encoder, to which embeddings are carried over")
@click.option("--twin", help="an encoder trained as the first one, but for λ = 0")
@click.option("--twin-new", help="another one of that kind")
@click.option("--dataset-name", default="cifar10", show_default=True)
@click.option("--data-root")
@click.option("--images", default=2000, show_default=True, help="in 32 colors; all else has 3,000 more")
@click.option("--seeds", default=20, show_default=True)
def main(
    encoder: str,
    new: str | None,
    twin: str | None,
    twin_new: str | None,
    dataset_name: str,
    data_root: str | None,
    images: int,
    seeds: int,
) -> None:
    data = DataConfig(dataset_name=dataset_name, data_root=data_root)
    arms: Arms = {}
    measured = []
    for title, source, later in (("CARE", encoder, new), ("λ = 0", twin, twin_new)):
        if source is None:
            continue
        loaded = load_encoder(source)
        split = load_split(data, "test", loaded.config.image_size)
        if split is None or split.labels is None:
            raise CareHubError(f"'{data.dataset_name}' has no labeled test split.")
        chosen = split.take(random_subset(len(split), images + MORE))
        found = embed(loaded, chosen, images)
        backbone = embed_view(loaded, chosen.pixels, space="backbone")
        carried = {"upgrade": found.z, "upgrade_backbone": backbone}
        new_z = embed_view(load_encoder(later), chosen.pixels) if later else None
        for method, rows in measure(found, carried, new_z, seeds).items():
            arms[f"{title}, {method}"] = [rounded(row) for row in rows]
        to = f", carried over to {source_name(later)}" if later else ""
        measured.append(f"{title}: {source_name(source)}{to}")
    settings = f"{'; '.join(measured)}; {len(chosen):,} test images, {images:,} in 32 colors, {hardware()}"
    name = f"uses_{data.data_label}_{source_name(encoder)}".replace("/", "--")
    click.echo(write_results(name, f"uses of rotations, {data.data_label}", settings, arms))


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value if value is None else float(f"{value:.5g}") for key, value in row.items()}


if __name__ == "__main__":
    main()
