"""Pictures of results: what an encoder finds alike, and how its embeddings turn."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .config import TrainConfig
from .data.sources import Images, center
from .encoder import Encoder

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito 2008: told apart by colour-blind people too
PANELS = (
    ("rotation_invariance_ratio", "rotation error / invariance error", "1: rotating helps nothing"),
    ("gram_deviation", "Gram deviation", "change of inner products"),
    ("hit_at_1", "augmented picture found by R f(x), %", "hollow: by f(x) itself"),
)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _label(name: str) -> str:
    """`name` as matplotlib shows it unchanged: no formulas between dollars, nothing hidden by an underscore."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def neighbours(encoders: dict[str, Encoder], images: Images, path: Path, queries: int = 8, found: int = 9) -> None:
    """A sheet of query pictures and, for each of `encoders`, their nearest neighbours (cosine, in projection space where there
    is one) among the other `images`, which are held."""
    size = next(iter(encoders.values())).care["image_size"]
    pixels = center(images.held.cpu(), size)
    found = min(found, len(pixels) - 1)
    if found < 1:
        return
    asked = torch.linspace(0, len(pixels) - 1, min(queries, len(pixels))).long()
    columns = [asked[:, None]]
    for encoder in encoders.values():
        space = "projection" if encoder.projection is not None else "backbone"
        z = torch.cat([F.normalize(encoder.embed(batch, space), dim=1).cpu() for batch in pixels.split(500)])
        similarity = z[asked] @ z.T
        similarity[torch.arange(len(asked)), asked] = -2
        columns.append(similarity.topk(found, dim=1).indices)
    gap = max(2, size // 16)
    blocks, marks, x = [], [], 0
    for column in columns:
        rows = [np.concatenate([_framed(pixels[i], gap) for i in row], axis=1) for row in column]
        blocks += [np.concatenate(rows), np.full((len(asked) * (size + gap), 3 * gap, 3), 255, np.uint8)]
        marks.append(x)
        x += blocks[-2].shape[1] + 3 * gap
    sheet = np.concatenate(blocks, axis=1)
    plt = pyplot()
    width = 2.2 + 6.8 * len(encoders)
    figure, axes = plt.subplots(figsize=(width, width * sheet.shape[0] / sheet.shape[1] + 0.6), dpi=120)
    axes.imshow(sheet, interpolation="nearest" if size < 64 else "antialiased")
    axes.set_axis_off()
    for mark, name in zip(marks, ("query", *(n or "nearest neighbours, nearest first" for n in encoders)), strict=True):
        axes.text(mark, -2 * gap, _label(name), fontsize=11, va="bottom")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _framed(picture: torch.Tensor, gap: int) -> np.ndarray:
    return np.pad(picture.permute(1, 2, 0).numpy(), ((0, gap), (0, gap), (0, 0)), constant_values=255)


def _triple(result: dict, family: str, measure: str) -> list:
    """Mean and interval; nothing to draw where they were not measured."""
    return result["families"].get(family, {}).get(measure) or [None] * 3


def geometry(results: dict[str, dict], path: Path, colors: dict[str, str] | None = None) -> None:
    """For each augmentation family and encoder: ratio, Gram deviation and retrieval with their intervals. `results`: name ->
    what `evaluate.commands.equivariance` measured; `colors`: of the names, where they are not to be in order."""
    plt = pyplot()
    colors = colors or {name: COLORS[k % len(COLORS)] for k, name in enumerate(results)}
    families = list(next(iter(results.values()))["families"])
    figure, panels = plt.subplots(1, 3, figsize=(12, 1.6 + 0.32 * len(families) + 0.1 * len(results)), sharey=True, dpi=120)
    for axes, (measure, title, note) in zip(panels, PANELS, strict=True):
        for k, (name, result) in enumerate(results.items()):
            y = np.arange(len(families)) + 0.18 * (k - (len(results) - 1) / 2)
            mean, low, high = np.array([_triple(result, f, measure) for f in families], dtype=float).T
            axes.errorbar(mean, y, xerr=[mean - low, high - mean], fmt="o", ms=5, lw=1.5, color=colors[name], label=_label(name))
            if measure == "hit_at_1":
                bare = [_triple(result, f, "hit_at_1_unrotated")[0] for f in families]
                axes.plot(bare, y, "o", ms=5, mfc="white", color=colors[name])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(note, fontsize=9)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(plt.MaxNLocator(5))
        axes.grid(axis="x", color="#dddddd", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axvline(1, color="#888888", lw=0.8, ls="--")
    panels[0].set_yticks(range(len(families)), families)
    panels[0].invert_yaxis()
    if len(results) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(3, len(results)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06 * (len(results) > 1), 1, 1))
    figure.savefig(path)
    plt.close(figure)


CURVES = (
    ("loss", "loss"),
    ("infonce", "InfoNCE"),
    ("equivariance", "equivariance loss"),
    ("knn_top1", "kNN top-1, %"),
    ("weight", "λ"),
    ("lr", "learning rate"),
    ("images_per_second", "images/s"),
)


def curves(runs: dict[str, tuple[list[dict], TrainConfig]], path: Path, points: int = 500) -> None:
    """Rows of metrics.jsonl over the images seen, as at most `points` means; fainter, the steps as they were."""
    plt = pyplot()
    shown = [(key, title) for key, title in CURVES if any(key in row for rows, _ in runs.values() for row in rows)]
    lines = -(-len(shown) // 3)
    figure, panels = plt.subplots(lines, 3, figsize=(12, 0.6 + 2.5 * lines), squeeze=False, dpi=110)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (key, title) in zip(panels.flat[: len(shown)], shown, strict=True):
        for k, (name, (rows, config)) in enumerate(runs.items()):
            known = [(row["step"] * config.batch_size * config.gradient_accumulation / 1000, row[key]) for row in rows if key in row]
            if not known or (key == "equivariance" and not config.weight):  # there the logged 0 is no measurement
                continue
            x, y = np.array(known, dtype=float).T
            color = COLORS[k % len(COLORS)]
            if key == "knn_top1":
                axes.plot(x, y, "o-", ms=4, color=color, label=_label(name))
                continue
            thin = slice(None, None, max(1, len(x) // points))
            axes.plot(x[thin], y[thin], color=color, lw=0.6, alpha=0.3)
            width = min(len(y), max(1, len(y) // 50))
            mean = np.convolve(y, np.ones(width) / width, mode="valid")
            axes.plot(x[width - 1 :][thin], mean[thin], color=color, lw=1.6, label=_label(name))
            if key == "images_per_second":
                axes.set_ylim(0, 1.3 * np.quantile(y, 0.98))
        axes.set_title(title, fontsize=10)
        axes.grid(color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in panels.flat[max(0, len(shown) - 3) : len(shown)]:
        axes.set_xlabel("thousand images seen", fontsize=9)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(runs)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / (0.6 + 2.5 * lines), 1, 1))
    figure.savefig(path)
    plt.close(figure)
