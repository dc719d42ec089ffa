"""The image at the top of README: one rotation of the embeddings finds the augmented version of an image.

    python docs/draw_claim.py                                # docs/images/claim.png
    python docs/draw_claim.py --saturation 0.4 -o other.png  # another augmentation

All images of `shapes` are augmented alike: brightness, contrast and saturation are multiplied by fixed
factors, in this order. R is fitted on the training images. Then, for each test image x, the nearest neighbors
of R f(x) and of f(x) are looked up among all augmented test images. Shown are queries at equal distances
in the data set, from the first on; the rates are those of all test images.
"""

from pathlib import Path

import click
import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import care_hub
from care_hub.augment import jitter
from care_hub.data import shapes
from care_hub.encoder import Encoder

ENCODER = "resnet10_w16_small.care_shapes"
QUERIES = 4
NAMES = ("brightness", "contrast", "saturation")
HIT, MISS, INK = "#009e73", "#d55e00", "#1c1f24"


def images_of(split: str) -> Tensor:
    """(N, 3, S, S) floats in [0, 1]: all images of a split of `shapes`."""
    rendered = torch.from_numpy(shapes.render(shapes.split_factors(split)))
    return rendered.permute(0, 3, 1, 2).float() / 255


def augmented(images: Tensor, factors: tuple[float, ...]) -> Tensor:
    """The same change of every image; `factors` as NAMES, 1 changes nothing."""
    same = torch.tensor([[*factors, 0.0]]).expand(len(images), 4)
    return jitter(images, same, torch.arange(4).expand(len(images), 4))


def nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    """(N,): for each query the index of the candidate of the highest cosine similarity."""
    return (queries @ candidates.T).argmax(dim=1)


def found_images(encoder: Encoder, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(test images, the same augmented, indices found by R f(x), indices found by f(x))."""
    train, test = images_of("train"), images_of("test")
    changed = augmented(test, factors)
    rotation = care_hub.Rotation.fit(encoder.encode(train), encoder.encode(augmented(train, factors)))
    z, z_changed = (torch.from_numpy(encoder.encode(images)) for images in (test, changed))
    return test, changed, nearest(rotation(z), z_changed), nearest(z, z_changed)


def show(axes: Axes, image: Tensor, is_hit: bool | None = None) -> None:
    """One image; framed and marked where it was found, rightly or not."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    color = {None: "white", True: HIT, False: MISS}[is_hit]
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=5)
    if is_hit is not None:
        box = {"boxstyle": "square,pad=0.25", "facecolor": color, "edgecolor": color}
        mark = axes.text(0.99, 0.01, "✓" if is_hit else "✗", transform=axes.transAxes, bbox=box)
        mark.set(color="white", fontsize=11, ha="right", va="bottom")


def draw(
    path: Path, images: Tensor, changed: Tensor, by_rotation: Tensor, by_itself: Tensor, what: str
) -> str:
    """Write the figure; returns its title, which says how many of all images were found."""
    everything = torch.arange(len(images))
    rates = [f"{100 * (found == everything).float().mean():.0f} %" for found in (by_rotation, by_itself)]
    title = (
        f"Find image x among {len(images):,} augmented images:\n"
        f"its rotated embedding R f(x) finds {rates[0]}, f(x) itself {rates[1]}"
    )
    heads = ["image\nx", f"augmented, a(x)\n{what}", "nearest to\nR f(x)", "nearest to\nf(x)"]
    with matplotlib.rc_context({"text.color": INK, "axes.titlecolor": INK, "font.size": 11}):
        figure = Figure(figsize=(5.8, 6.9), dpi=140, layout="constrained")
        figure.suptitle(title, fontsize=12.5)
        rows = figure.subplots(QUERIES, len(heads))
        for axes, head in zip(rows[0], heads, strict=True):
            axes.set_title(head, fontsize=11)
        for row, query in zip(rows, everything[:: len(images) // QUERIES].tolist(), strict=False):
            show(row[0], images[query])
            show(row[1], changed[query])
            for axes, found in zip(row[2:], (by_rotation, by_itself), strict=True):
                show(axes, changed[found[query]], bool(found[query] == query))
        figure.savefig(path, metadata={"Software": None})
    return title


@click.command()
@click.option("--brightness", default=0.7, show_default=True)
@click.option("--contrast", default=1.0, show_default=True)
@click.option("--saturation", default=1.0, show_default=True)
@click.option("-o", "--output", default="docs/images/claim.png", show_default=True, type=click.Path())
def main(output: str, **factors: float) -> None:
    values = tuple(factors[name] for name in NAMES)
    what = ", ".join(f"{name} × {factors[name]:g}" for name in NAMES if factors[name] != 1)
    encoder = care_hub.load_encoder(ENCODER)
    click.echo(draw(Path(output), *found_images(encoder, values), what))


if __name__ == "__main__":
    main()
