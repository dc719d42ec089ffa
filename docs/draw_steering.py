"""The figure of docs/steering.md: how well each arm of a table recognizes labels, and steers by color.

    python docs/draw_steering.py                             # docs/images/steering.png
    python docs/draw_steering.py results/shapes.json -o other.png

A point is the mean over the seeds in a file of benchmarks/paper_table.py, a bar the standard deviation.
"""

import json
import statistics
from pathlib import Path

import click
import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from care_hub.metrics import SAME_IMAGE_VIEWS
from care_hub.report.figures import COLORS, GRID, INK, STYLE

RECOGNITION, STEERING = "label_probe", "color_same_image_hit_at_1"
BESIDE = [(x, y) for y in (1, 0, -1) for x in (1, -1, 0) if x or y]  # where the name of a point may stand
POINTS = 7  # from there to the name


def mean_and_deviation(runs: list[dict[str, float]], name: str) -> tuple[float, float]:
    values = [run[name] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_name(axes: Axes, name: str, x: float, y: float, color: str, taken: list[Bbox]) -> None:
    """Beside the point, at the first place that is inside the axes and not `taken`; it is then."""
    for right, up in BESIDE:
        place = {"ha": ("center", "left", "right")[right], "va": ("center", "bottom", "top")[up]}
        text = axes.annotate(name, (x, y), (right * POINTS, up * POINTS), textcoords="offset points", **place)
        text.set(color=color, fontsize=9, fontweight="bold")
        box = text.get_window_extent()
        whole = Bbox.intersection(box, axes.get_window_extent())
        if whole is not None and whole.size.tolist() == box.size.tolist() and not box.count_overlaps(taken):
            break
        if (right, up) != BESIDE[-1]:
            text.remove()
    taken.append(box)


@click.command()
@click.argument("results", default="results/cifar10_small.json", type=click.Path(exists=True))
@click.option("-o", "--output", default="docs/images/steering.png", show_default=True, type=click.Path())
def main(results: str, output: str) -> None:
    arms = json.loads(Path(results).read_text(encoding="utf-8"))["arms"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), dpi=140)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.13, 0.12, 0.85, 0.86))
        points = {}
        for (title, runs), color in zip(arms.items(), COLORS, strict=False):
            (x, dx), (y, dy) = (mean_and_deviation(runs, name) for name in (RECOGNITION, STEERING))
            axes.errorbar(x, y, dy, dx, fmt="o", ms=7, color=color, capsize=3)
            points[title] = x, y, color
        chance = 100 / SAME_IMAGE_VIEWS
        line = axes.axhline(chance, color=INK, lw=0.8, ls="--", alpha=0.6)
        axes.margins(0.3, 0.12)
        axes.set_ylim(bottom=0)
        axes.grid(color=GRID)
        axes.set(xlabel="recognition: linear probe for the label, top-1 in %")
        axes.set(ylabel="steering: change of color found among 50\nof the same image by R f(x), %")
        word = axes.annotate(
            "chance", (1, chance), (-4, 3), ("axes fraction", "data"), "offset points", ha="right"
        )
        ends = axes.transData.transform([(x, y) for x, y, _ in points.values()])
        taken = [Bbox.from_extents(*(end - POINTS), *(end + POINTS)) for end in ends]
        taken += [line.get_window_extent().padded(2), word.get_window_extent()]
        for title, point in points.items():
            arm, comma, epochs = title.rpartition(", ")
            write_name(axes, f"{arm}{comma[:1]}\n{epochs}", *point, taken)
        figure.savefig(output, metadata={"Software": None})


if __name__ == "__main__":
    main()
