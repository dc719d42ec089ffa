"""CARE against its λ = 0 twin, as tables in docs/results.md and numbers in results/<recipe>.json.

    python benchmarks/paper_table.py                                         # shapes, three seeds
    python benchmarks/paper_table.py --recipe cifar10_small --seed 0 --seed 1 --data-root CIFAR10
    python benchmarks/paper_table.py --recipe shapes_moco --weight 0.1 --weight 0.2

Trains and evaluates every run of a grid; resumes where it was interrupted, since nothing that is recorded
is done again. The arms of a recipe are the same command but for `--weight 0` and, for as much time as CARE
takes, more `--epochs`.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from care_hub.config import TrainConfig, read_yaml
from care_hub.hub.evaluation_record import read_record
from care_hub.metrics import METRICS
from care_hub.training import trainer

ROOT = Path(__file__).parents[1]
LABEL_FRACTIONS = (0.01, 0.1)
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str  # in results/<recipe>.json
    metric: str  # in METRICS: which values are better
    digits: int
    title: str = ""  # where that of the metric does not say enough

    @property
    def heading(self) -> str:
        metric = METRICS[self.metric]
        return self.title or f"{metric.title}, {metric.unit}".removesuffix(", ")

    @property
    def sign(self) -> int:
        """1 where higher values are better, -1 where lower ones are, 0 where neither is."""
        return {"higher": 1, "lower": -1, "": 0}[METRICS[self.metric].better]


ROWS = (
    Row("label_probe", "top1", 1, "linear probe, label, %"),
    Row("label_probe_10", "top1", 1, "same with 10 % of the labels"),
    Row("label_probe_1", "top1", 1, "same with 1 % of the labels"),
    Row("label_knn", "knn_top1", 1),
    Row("label_projection", "label", 1, "label, attribute probe of the projection, %"),
    Row("color_backbone", "color", 1, "color, attribute probe of the backbone, %"),
    Row("color_projection", "color", 1, "color, attribute probe of the projection, %"),
    Row("hue_projection", "hue", 3, "mean hue, attribute probe of the projection, R²"),
    Row("saturation_projection", "saturation", 3, "mean saturation, the same"),
    Row("brightness_projection", "brightness", 3, "mean brightness, the same"),
    Row("ratio", "rotation_invariance_ratio", 3),
    Row("gram", "gram_deviation", 4),
    Row("hit", "hit_at_1", 1),
    Row("hit_unrotated", "hit_at_1_unrotated", 1),
    Row("color_same_image_hit_at_1", "same_image_hit_at_1", 1, "color, same image, found by R f(x), %"),
    Row("color_same_image_mrr", "same_image_mrr", 3, "the same, mean reciprocal rank"),
    Row("color_same_image_hit_at_1_linear", "same_image_hit_at_1_linear", 1, "found by a linear map, %"),
    Row("color_motion", "motion", 3, "color, motion"),
    Row("training_minutes", "training_seconds", 1, "minutes of training"),
    Row("images_per_second", "images_per_second", 0),
)


@dataclass(frozen=True)
class Arm:
    """One column of the table."""

    title: str
    name: str  # in those of its runs
    flags: tuple[str, ...]


def arms_of(recipe: TrainConfig, weights: tuple[float, ...]) -> list[Arm]:
    """CARE, its twin, and the twin for as many passes of the encoder as CARE's epochs take."""
    epochs = f"{recipe.epochs} epochs"
    arms = [Arm(f"CARE, λ = {w:g}, {epochs}", f"care-{w:g}", ("--weight", str(w))) for w in weights]
    arms = arms or [Arm(f"CARE, {epochs}", "care", ())]
    arms.append(Arm(f"λ = 0, {epochs}", "plain", ("--weight", "0")))
    more = 0 if recipe.views == "shared" else 1 / recipe.equivariance_stride
    longer = math.ceil(recipe.epochs * (1 + more))
    if longer > recipe.epochs:
        flags = ("--weight", "0", "--epochs", str(longer))
        arms.append(Arm(f"λ = 0, {longer} epochs", "longer", flags))
    return arms


def run_command(*words: object) -> None:
    click.echo("+ " + " ".join(map(str, words)), err=True)
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(recipe_file: Path, run: Path, seed: int, flags: tuple[str, ...], data: list[str]) -> None:
    """Train `run`, or resume it, unless it is finished."""
    if (run / "results.json").is_file():
        return
    begun = (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())
    place = ["--save-root", run.parent, "--run-name", run.name, *(["--resume"] if begun else [])]
    run_command(ROOT / "train.py", "--config", recipe_file, "--seed", seed, *place, *flags, *data)


def evaluate(dataset: str, run: Path, data: list[str]) -> None:
    """Make those evaluations of `run` that are not recorded."""
    on = ["--dataset-name", dataset, *data]
    record = read_record(run / "export")
    done = record.get("accuracy", {}).get(dataset, {})
    probe = [ROOT / "eval_linear.py", "--encoder", run, *on]
    if "linear probe" not in done:
        run_command(*probe)
    for fraction in LABEL_FRACTIONS:
        if few_labels(fraction) not in done:
            run_command(*probe, "--label-fraction", fraction, "--seeds", 3)
    if "kNN" not in done:
        run_command("-m", "care_hub", "knn", run, *on)
    if dataset not in record.get("equivariance", {}):
        run_command("-m", "care_hub", "equivariance", run, *on)


def few_labels(fraction: float) -> str:
    """The name under which a linear probe on `fraction` of the labels is recorded."""
    return f"linear probe, {100 * fraction:g} % of the labels"


def measured(run: Path) -> dict[str, float]:
    """The figures of one run, by the names in ROWS, from its own files."""
    results = json.loads((run / "results.json").read_text())
    record = read_record(run / "export")
    (dataset,) = record["equivariance"]
    accuracy, equivariance = record["accuracy"][dataset], record["equivariance"][dataset]
    recipe = equivariance["families"]["full recipe"]
    values = {
        "label_probe": accuracy["linear probe"]["top1"],
        "label_knn": accuracy["kNN"]["top1"],
        "ratio": recipe["rotation_invariance_ratio"][0],
        "gram": recipe["gram_deviation"][0],
        "hit": recipe["hit_at_1"][0],
        "hit_unrotated": recipe["hit_at_1_unrotated"][0],
        "training_minutes": results["training_seconds"] / 60,
        "images_per_second": results["images_per_second"],
    }
    for fraction in LABEL_FRACTIONS:
        values[f"label_probe_{100 * fraction:g}"] = accuracy[few_labels(fraction)]["top1"]
    color = equivariance["families"].get("color", {})
    values |= {f"color_{name}": mean for name, (mean, _, _) in color.items() if mean is not None}
    for space, attributes in equivariance["attributes"].items():
        values |= {f"{name}_{space}": value for name, value in attributes.items()}
    return values


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = ", ".join(sorted({line.split(":")[1].strip() for line in lines})) or model
    return f"CPU ({model}), torch {torch.__version__}"


def table(summary: dict[str, Any]) -> str:
    """Markdown of one recipe: means and standard deviations over the seeds."""
    arms, seeds = summary["arms"], summary["seeds"]
    about = f"{summary['settings']}; {seeds} seed{'s' if seeds > 1 else ''}"
    lines = [f"**{summary['recipe']}** ({about})", ""]
    lines += ["| | " + " | ".join(arms) + " |", "|---" * (1 + len(arms)) + "|"]
    for row in ROWS:
        if all(row.name in run for runs in arms.values() for run in runs):
            values = [[run[row.name] for run in runs] for runs in arms.values()]
            lines.append(f"| {row.heading} | " + " | ".join(cells(row, values)) + " |")
    return "\n".join(lines)


def cells(row: Row, values: list[list[float]]) -> list[str]:
    """For each arm; the best is bold where it leads the second by more than the larger standard deviation."""
    means = [statistics.mean(v) for v in values]
    deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    texts = [f"{mean:.{row.digits}f}" for mean in means]
    if len(values[0]) == 1:
        return texts
    texts = [f"{t} ± {deviation:.{row.digits}f}" for t, deviation in zip(texts, deviations, strict=True)]
    *_, second, best = sorted(range(len(means)), key=lambda k: row.sign * means[k])
    if row.sign and abs(means[best] - means[second]) > max(deviations):
        texts[best] = f"**{texts[best]}**"
    return texts


def write_tables() -> None:
    """Put the tables of all results/*.json between the two markers of docs/results.md."""
    page, files = ROOT / "docs" / "results.md", sorted((ROOT / "results").glob("*.json"), reverse=True)
    tables = "\n\n".join(table(json.loads(file.read_text())) for file in files)
    text = page.read_text()
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:start]}\n{tables}\n{text[stop:]}")


@click.command()
@click.option("--recipe", default="shapes", show_default=True, help="a file in recipes/, without .yaml")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--weight", "weights", multiple=True, type=float, help="λ to compare (default: the recipe's)")
@click.option("--root", default="runs/paper", show_default=True, help="where the runs are saved")
@click.option("--data-root")
def main(
    recipe: str, seeds: tuple[int, ...], weights: tuple[float, ...], root: str, data_root: str | None
) -> None:
    data = ["--data-root", str(Path(data_root).absolute())] if data_root else []
    recipe_file = ROOT / "recipes" / f"{recipe}.yaml"
    config, arms = TrainConfig(**read_yaml(recipe_file)), {}
    for arm in arms_of(config, weights):
        runs = [Path(root).absolute() / f"{recipe}-{arm.name}-{seed}" for seed in seeds]
        for seed, run in zip(seeds, runs, strict=True):
            train(recipe_file, run, seed, arm.flags, data)
            evaluate(config.dataset_name, run, data)
        arms[arm.title] = [measured(run) for run in runs]
    precision = trainer.precision("auto")
    settings = f"{config.model}, batch {config.batch_size}, {hardware()}, precision {precision}"
    summary = {"recipe": recipe, "settings": settings, "seeds": len(seeds), "arms": arms}
    output = ROOT / "results" / f"{recipe}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_tables()
    click.echo(table(summary))


if __name__ == "__main__":
    main()
