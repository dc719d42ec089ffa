"""Figures of results: what an encoder finds similar, how its embeddings rotate, how it was trained.

A figure's format follows its path: `.png` for model cards, `.svg` for the page of `care-hub report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..augment import center_crop
from ..config import TrainConfig
from ..data.images import InMemoryImages
from ..encoder import Encoder
from ..files import replacement
from ..hub.rotation_set import RotationSet
from ..metrics import METRICS, SAME_IMAGE_VIEWS
from .tables import Results, interval, title_with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: also color-blind readers can tell them apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GRID, PAPER, FAINT = "#1c1f24", "#dde1e6", "#ffffff", "#9aa1ab"
CURVES = ("loss", "infonce", "equivariance", "uniformity", "knn_top1", "weight", "lr", "images_per_second")
HOLLOW = {"same_image_hit_at_1": "same_image_hit_at_1_linear", "hit_at_1": "hit_at_1_unrotated"}
DASHED = {"same_image_hit_at_1": 100 / SAME_IMAGE_VIEWS, "rotation_invariance_ratio": 1}
PANELS = {  # metric -> how to read its panel
    "motion": "0: the encoder ignores it",
    "same_image_hit_at_1": "dashed: chance; hollow: a linear map",
    "rotation_invariance_ratio": "1: a rotation explains nothing",
    "gram_deviation": "change of inner products",
    "hit_at_1": "hollow: found by f(x) itself",
}
ROTATION_PANELS = {  # metric -> what is hollow beside it, and how to read the panel
    "same_image_hit_at_1": (
        "same_image_hit_at_1_linear",
        "line: needed to steer; hollow: a linear map",
    ),
    "cosine": ("cosine_unrotated", "with f(ax); hollow: of f(x)"),
    "motion": ("", "0: the encoder ignores it"),
}
Runs = dict[str, tuple[list[dict[str, Any]], TrainConfig]]  # name -> rows of metrics.jsonl, options

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "care_hub",  # the same ids in every run
    "text.color": INK,
    "text.parse_math": False,  # names are no formulas
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}


@contextmanager
def _figure(path: Path, width: float, height: float, dpi: int) -> Iterator[Figure]:
    """A figure of `width` x `height` inches that is written to `path` at once, at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
        yield figure
        with replacement(path) as new:
            figure.savefig(new, format=path.suffix[1:])


def run_colors(names: Iterable[str]) -> dict[str, str]:
    """The color of each run or encoder, in order.

    >>> run_colors(["care", "plain"])
    {'care': '#0072b2', 'plain': '#d55e00'}
    """
    return {name: COLORS[k % len(COLORS)] for k, name in enumerate(names)}


def _printable(name: str) -> str:
    """`name` without control characters, which SVG can't hold."""
    return "".join(c for c in name if c.isprintable())


def _legend(figure: Figure, colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, marker="o", ms=5) for color in colors.values()]
    labels = ["\u200b" + _printable(name) for name in colors]  # a leading underscore would hide it
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


def plot_neighbors(
    encoders: dict[str, Encoder], images: InMemoryImages, path: Path, queries: int = 8, found: int = 9
) -> None:
    """A sheet of query images and, for each of `encoders`, their nearest neighbors in `images`.

    Nearest by cosine, in projection space where there is one. Fewer than two images give no sheet.
    """
    size = next(iter(encoders.values())).config.image_size
    pixels = center_crop(images.pixels.cpu(), size)
    found = min(found, len(pixels) - 1)
    if found < 1:
        return
    asked = torch.linspace(0, len(pixels) - 1, min(queries, len(pixels))).long()
    gap = max(2, size // 16)
    columns = [asked[:, None], *(_nearest(encoder, pixels, asked, found) for encoder in encoders.values())]
    blocks = [_block(pixels, column, gap) for column in columns]
    titles = ["query", *(name or "nearest neighbors, nearest first" for name in encoders)]
    sheet = np.concatenate(blocks, axis=1)
    width, x = 2.2 + 6.8 * len(encoders), 0
    with _figure(path, width, width * sheet.shape[0] / sheet.shape[1] + 0.4, dpi=120) as figure:
        axes = figure.subplots()
        axes.imshow(sheet, interpolation="nearest" if size < 64 else "antialiased")
        axes.set_axis_off()
        for title, block in zip(titles, blocks, strict=True):
            axes.text(x, -2 * gap, _printable(title), fontsize=11, va="bottom")
            x += block.shape[1]


def _nearest(encoder: Encoder, pixels: Tensor, asked: Tensor, found: int) -> Tensor:
    """(Q, found) indices of the images nearest to those at `asked` (Q,), themselves left out."""
    space = "projection" if encoder.projection is not None else "backbone"
    z = torch.cat([F.normalize(encoder.embed(batch, space), dim=1).cpu() for batch in pixels.split(500)])
    similarity = z[asked] @ z.T
    similarity[torch.arange(len(asked)), asked] = -2
    return similarity.topk(found, dim=1).indices


def _block(pixels: Tensor, index: Tensor, gap: int) -> np.ndarray:
    """(H, W, 3) uint8: the images of `index` (rows, columns), white gaps, the last one wider."""
    framed = F.pad(pixels[index], (0, gap, 0, gap), value=255)  # (rows, columns, 3, S + gap, S + gap)
    block = framed.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return F.pad(block, (0, 0, 0, 3 * gap), value=255).numpy()


def plot_geometry(
    results: Results,
    path: Path,
    colors: dict[str, str] | None = None,
    metrics: Sequence[str] = tuple(PANELS),
    legend: bool = True,
) -> None:
    """A panel for each of `metrics` (of PANELS): mean and 95 % interval by augmentation family and encoder.

    `results`: name -> what `evaluate.commands.evaluate_equivariance` measured. `colors`: of the
    names (default: `run_colors`). There is no legend for one encoder, or if `legend` is false.
    """
    colors = colors or run_colors(results)
    families = list(next(iter(results.values()))["families"])
    height = 1.4 + 0.32 * len(families) + 0.1 * len(results)
    with _figure(path, 3.6 * len(metrics), height, dpi=120) as figure:
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for k, (name, result) in enumerate(results.items()):
                y, color = np.arange(len(families)) + 0.18 * (k - (len(results) - 1) / 2), colors[name]
                mean, low, high = _triples(result, families, metric)
                axes.hlines(y, low, high, color=color, lw=1.5)
                if metric in HOLLOW:
                    other, _, _ = _triples(result, families, HOLLOW[metric])
                    axes.plot(other, y, "o", ms=6.5, mfc=PAPER, color=color)
                axes.plot(mean, y, "o", ms=5, color=color)
            _explain_panel(axes, metric)
        panels[0].set_yticks(range(len(families)), list(map(_printable, families)))
        panels[0].invert_yaxis()
        if legend and len(results) > 1:
            _legend(figure, {name: colors[name] for name in results})


def _triples(result: dict[str, Any], families: list[str], metric: str) -> np.ndarray:
    """(3, families): means, lower and upper ends; NaN, which is not shown, where not measured."""
    return np.array([interval(result, family, metric) for family in families], dtype=float).T


def _explain_panel(axes: Axes, metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    better = METRICS[metric].better
    xlabel = f"{PANELS[metric]}; {better} is better" if better else PANELS[metric]
    axes.set(title=title_with_unit(metric), xlabel=xlabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    if metric in DASHED:
        axes.axvline(DASHED[metric], color=INK, lw=0.8, ls="--", alpha=0.6)


def plot_rotations(rotations: RotationSet, path: Path) -> None:
    """By transformation: whether R finds its strength, how near R leads to f(ax), how far f(ax) is.

    Points are means, with 95 % intervals, faint ones those of single strengths; what is not
    steerable is gray.
    """
    names = list(rotations)
    with _figure(path, 11, 1.4 + 0.34 * len(names), dpi=120) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (metric, (other, xlabel)) in zip(panels, ROTATION_PANELS.items(), strict=True):
            for y, found in enumerate(rotations.fitted.values()):
                color = COLORS[0] if found.steerable else FAINT
                each = [
                    x for measured in found.measured if (x := (measured.get(metric) or [None])[0]) is not None
                ]
                axes.plot(each, [y] * len(each), "o", ms=3, color=color, alpha=0.4, mec="none")
                for key, style in ((other, {"mfc": PAPER, "ms": 6.5}), (metric, {"ms": 5})):
                    mean, low, high = found.overall.get(key) or [None] * 3
                    if mean is not None:
                        axes.hlines(y, low, high, color=color, lw=1.5 if key == metric else 0)
                        axes.plot(mean, y, "o", color=color, **style)
            axes.set(title=title_with_unit(metric), xlabel=xlabel)
            axes.grid(axis="x")
        needed = [found.needed for found in rotations.fitted.values()]
        panels[0].plot(needed, range(len(names)), "|", ms=16, color=INK)
        panels[0].set_yticks(range(len(names)), list(map(_printable, names)))
        panels[0].set_ylim(len(names) - 0.5, -0.5)


def plot_curves(runs: Runs, path: Path, metrics: Sequence[str] = (), legend: bool = True) -> None:
    """A panel for each of `metrics` (default: all that were logged) over the images seen.

    Faint: the steps as they were; strong: their running mean over a fiftieth of the run. Nothing
    logged gives no figure.
    """
    metrics = metrics or logged_metrics(runs)
    if not metrics:
        return
    colors = run_colors(runs)
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    with _figure(path, 4 * columns, 0.6 + 2.5 * lines, dpi=110) as figure:
        for k, metric in enumerate(metrics, 1):
            axes = figure.add_subplot(lines, columns, k)
            series = {name: xy for name, run in runs.items() if (xy := curve(*run, metric)).size}
            for name, (x, y) in series.items():
                _plot_curve(axes, x, y, colors[name], markers=metric == "knn_top1")
            if metric == "images_per_second":  # slow first steps and outliers would squeeze the rest
                axes.set_ylim(0, 1.3 * max(np.quantile(y, 0.98) for _, y in series.values()))
            axes.set(title=title_with_unit(metric), xlabel="thousand images seen")
            axes.grid()
        if legend:
            _legend(figure, colors)


def logged_metrics(runs: Runs) -> list[str]:
    """Those of CURVES of which some run has values."""
    return [metric for metric in CURVES if any(curve(*run, metric).size for run in runs.values())]


def curve(rows: list[dict[str, Any]], config: TrainConfig, metric: str) -> np.ndarray:
    """(2, n): thousand images seen, and the values of `metric` there."""
    if metric == "equivariance" and not config.weight:  # there the logged 0 is no measurement
        return np.empty((2, 0))
    images = config.batch_size * config.gradient_accumulation / 1000
    known = [(row["step"] * images, row[metric]) for row in rows if metric in row]
    return np.array(known, dtype=float).reshape(-1, 2).T


def _plot_curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, markers: bool) -> None:
    """At most 500 points a line, whatever the length of the run."""
    if markers:
        axes.plot(x, y, "o-", ms=4, color=color)
        return
    stride, width = -(-len(x) // 500), max(1, len(y) // 50)
    axes.plot(x[::stride], y[::stride], color=color, lw=0.6, alpha=0.3)
    mean = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x[width - 1 :: stride], mean[::stride], color=color, lw=1.6)
