"""Figures of runs: kept in results/*.json, shown as tables in docs/results.md.

A file of results has `recipe` (the heading), `settings` (words), and `arms`: title -> [{name of a row: value}
for each seed]. A value may be missing, or None where an arm has none by its nature: a dash in the table. Arms
are columns of the table; with `arms_are_lines` its lines.
"""

import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from care_hub.files import write_text
from care_hub.metrics import METRICS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Arms = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str  # in results/<recipe>.json
    metric: str  # in METRICS: which values are better; empty where no column is to be marked
    digits: int
    title: str = ""  # where that of the metric does not say enough

    @property
    def heading(self) -> str:
        return self.title or ", ".join(filter(None, (METRICS[self.metric].title, METRICS[self.metric].unit)))

    @property
    def sign(self) -> int:
        """1 where higher values are better, -1 where lower ones are, 0 where neither is."""
        better = METRICS[self.metric].better if self.metric else ""
        return {"higher": 1, "lower": -1, "": 0}[better]


ROWS = (
    Row("label_probe", "top1", 1, "linear probe, label, %"),
    Row("label_probe_10", "top1", 1, "same with 10 % of the labels"),
    Row("label_probe_1", "top1", 1, "same with 1 % of the labels"),
    Row("label_knn", "knn_top1", 1),
    Row("label_finetuned", "top1", 1, "fine-tuned, label, %"),
    Row("label_projection", "label", 1, "label, attribute probe of the projection, %"),
    Row("color_backbone", "color", 1, "color, attribute probe of the backbone, %"),
    Row("color_projection", "color", 1, "color, attribute probe of the projection, %"),
    Row("hue_backbone", "hue", 3, "mean hue, attribute probe of the backbone, R²"),
    Row("saturation_backbone", "saturation", 3, "mean saturation, the same"),
    Row("brightness_backbone", "brightness", 3, "mean brightness, the same"),
    Row("hue_projection", "hue", 3, "mean hue, attribute probe of the projection, R²"),
    Row("saturation_projection", "saturation", 3, "mean saturation, the same"),
    Row("brightness_projection", "brightness", 3, "mean brightness, the same"),
    Row("ratio", "rotation_invariance_ratio", 3),
    Row("gram", "gram_deviation", 4),
    Row("recipe_motion", "motion", 3),
    Row("hit", "hit_at_1", 1),
    Row("hit_unrotated", "hit_at_1_unrotated", 1),
    Row("color_rotation_invariance_ratio", "rotation_invariance_ratio", 3, "color, rotation / invariance"),
    Row("color_motion", "motion", 3, "color, motion"),
    Row("color_hit_at_1", "hit_at_1", 1, "color, other images, found by R f(x), %"),
    Row("color_hit_at_1_unrotated", "hit_at_1_unrotated", 1, "color, other images, found by f(x), %"),
    Row("color_same_image_hit_at_1", "same_image_hit_at_1", 1, "color, same image, found by R f(x), %"),
    Row("color_same_image_mrr", "same_image_mrr", 3, "the same, mean reciprocal rank"),
    Row("color_same_image_hit_at_1_linear", "same_image_hit_at_1_linear", 1, "found by a linear map, %"),
    Row("hue_same_image_hit_at_1", "same_image_hit_at_1", 1, "hue, same image, found by R f(x), %"),
    Row("hue_same_image_mrr", "same_image_mrr", 3, "the same, mean reciprocal rank"),
    Row("hue_motion", "motion", 3, "hue, motion"),
    # Invariance would do best at both: only how near they are says something.
    Row(
        "color_composed",
        "cosine_unrotated",
        3,
        "two changes of color, cosine of R_b R_a f(x) with f(b(a(x)))",
    ),
    Row("color_fitted", "cosine_unrotated", 3, "the same of the fitted R_ba f(x)"),
    Row("crop_rotation_invariance_ratio", "rotation_invariance_ratio", 3, "crop, rotation / invariance"),
    Row("crop_hit_at_1", "hit_at_1", 1, "crop, other images, found by R f(x), %"),
    Row("crop_same_image_hit_at_1", "same_image_hit_at_1", 1, "crop, same image, found by R f(x), %"),
    # benchmarks/uses.py: no column is marked, for one of them is what the others are compared with.
    Row("shots_1", "", 1, "head on 1 image per class, top-1, %"),
    Row("shots_1_share", "", 0, "the same, share of what embedding anew wins, %"),
    Row("shots_1_changed", "", 1, "the same head on images in other colors"),
    Row("shots_1_changed_share", "", 0, "the same, share, %"),
    Row("shots_5", "", 1, "head on 5 images per class"),
    Row("shots_5_share", "", 0, "the same, share, %"),
    Row("shots_5_changed", "", 1, "in other colors"),
    Row("shots_5_changed_share", "", 0, "the same, share, %"),
    Row("shots_10", "", 1, "head on 10 images per class"),
    Row("shots_10_share", "", 0, "the same, share, %"),
    Row("shots_10_changed", "", 1, "in other colors"),
    Row("shots_10_changed_share", "", 0, "the same, share, %"),
    Row("tta", "", 1, "test-time augmentation, top-1, %"),
    Row("tta_share", "", 0, "the same, share, %"),
    Row("views_seconds", "", 3, "processor, seconds for 32 views of 1,000 images"),
    Row("light_head", "", 1, "another light, linear head, top-1, %"),
    Row("light_head_share", "", 0, "the same, share of the loss won back, %"),
    Row("light_knn", "", 1, "another light, kNN, top-1, %"),
    Row("light_knn_share", "", 0, "the same, share, %"),
    Row("light_search", "", 1, "another light, the same image found, %"),
    Row("light_search_share", "", 0, "the same, share, %"),
    Row("upgrade", "", 1, "another encoder, recall@10, %"),
    Row("upgrade_backbone", "", 1, "the same, carried over from the backbone's embeddings"),
    # benchmarks/search.py: columns are transformations.
    Row("motion", "", 3, "motion"),
    Row("same_image_hit_at_1", "", 1, "same image, found by R f(x), %"),
    Row("same_image_hit_at_1_linear", "", 1, "found by a linear map, %"),
    Row("cosine", "", 3, "cosine of R f(x) with f(ax)"),
    Row("cosine_unrotated", "", 3, "cosine of f(x) with f(ax)"),
    Row("search_exact", "", 1, '"this, brighter": the right version on top, %'),
    Row("search_exact_unsteered", "", 1, "the same, not turned"),
    Row("search_version", "", 1, "any version of the query on top, %"),
    Row("search_version_unsteered", "", 1, "the same, not turned"),
    Row("directions", "", 0, "directions that it moves"),
    Row("found", "", 1, "changed image found, %"),
    Row("found_ignored", "", 1, "the same, ignored"),
    Row("found_control", "", 1, "the same, as many other directions left out"),
    Row("agreement", "", 3, "neighbors agree in what it changes, R²"),
    Row("agreement_matched", "", 3, "the same, matched"),
    Row("distance", "", 3, "distance of neighbors in it, of any two images 1"),
    Row("distance_matched", "", 3, "the same, matched"),
    Row("knn", "", 1, "kNN, label, %"),
    Row("knn_ignored", "", 1, "the same, ignored"),
    Row("knn_matched", "", 1, "the same, matched"),
    # benchmarks/between.py
    Row("of_itself", "", 3, "cosine with f(ax) of f(x)"),
    Row("of_fitted", "", 3, "of R f(x), fitted there"),
    Row("of_combined", "", 3, "of the geodesic or product"),
    Row("of_lost", "", 4, "lost"),
    Row("price", "training_seconds", 0, "price, steps of λ = 0"),
    Row("training_minutes", "training_seconds", 1, "minutes of training"),
    Row("images_per_second", "images_per_second", 0),
)


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = ", ".join(sorted({line.split(":")[1].strip() for line in lines})) or model
    return f"CPU ({model}), torch {torch.__version__}"


def table(summary: dict[str, Any]) -> str:
    """Markdown of one file of results: means and standard deviations over the seeds."""
    arms: Arms = summary["arms"]
    few, many = min(map(len, arms.values())), max(map(len, arms.values()))
    seeds = f"{few} to {many} seeds" if few < many else f"{many} seed{'s' if many > 1 else ''}"
    lines = [f"**{summary['recipe']}** ({summary['settings']}; {seeds})", ""]
    grid = [["", *arms]]
    for row in ROWS:
        values = [[run.get(row.name) for run in runs] for runs in arms.values()]
        if any(None not in arm for arm in values):
            grid.append([row.heading, *cells(row, values)])
    if summary.get("arms_are_lines"):
        grid = [list(line) for line in zip(*grid, strict=True)]
    head, *body = ("| " + " | ".join(line).lstrip() + " |" for line in grid)
    return "\n".join([*lines, head, "|---" * len(grid[0]) + "|", *body])


def cells(row: Row, values: list[list[float | None]]) -> list[str]:
    """For each arm; the best is bold where it leads the second by more than the larger standard deviation."""
    known = {k: v for k, v in enumerate(values) if None not in v}
    means = {k: statistics.mean(v) for k, v in known.items()}
    deviations = {k: statistics.stdev(v) for k, v in known.items() if len(v) > 1}
    texts = ["–"] * len(values)
    for k, mean in means.items():
        deviation = f" ± {deviations[k]:.{row.digits}f}" if k in deviations else ""
        texts[k] = f"{round(mean, row.digits) + 0.0:.{row.digits}f}{deviation}"  # + 0.0: no "-0.000"
    if row.sign and len(deviations) == len(values) > 1:
        *_, second, best = sorted(means, key=lambda k: row.sign * means[k])
        if abs(means[best] - means[second]) > max(deviations.values()):
            texts[best] = f"**{texts[best]}**"
    return texts


def recorded(name: str, settings: str) -> Arms:
    """The arms in results/<name>.json if they were measured under the same settings, else none."""
    file = ROOT / "results" / f"{name}.json"
    summary = json.loads(file.read_text()) if file.is_file() else {}
    return summary["arms"] if summary.get("settings") == settings else {}


def write_results(name: str, heading: str, settings: str, arms: Arms, arms_are_lines: bool = False) -> str:
    """Write results/<name>.json and all tables between the markers of docs/results.md; returns its table."""
    summary: dict[str, Any] = {"recipe": heading, "settings": settings, "arms": arms}
    if arms_are_lines:
        summary["arms_are_lines"] = True
    folder = ROOT / "results"
    write_text(folder / f"{name}.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    files = sorted(folder.glob("*.json"), reverse=True)
    files.sort(key=lambda file: file.name.startswith(("between", "frozen", "search", "transfer", "uses")))
    found = [json.loads(file.read_text()) for file in files]
    tables = [table(other) for other in found if "arms" in other]  # peers.json has none
    write_section(ROOT / "docs" / "results.md", "\n\n".join(tables))
    return table(summary)


def write_section(page: Path, text: str) -> None:
    """Put `text` between the markers of `page`."""
    whole = page.read_text()
    start, stop = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    write_text(page, f"{whole[:start]}\n{text}\n{whole[stop:]}")
