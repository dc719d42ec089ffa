"""CARE against its lambda = 0 twin: trains a grid from recipes, evaluates every run, writes results/<recipe>.json and README's tables.

    python benchmarks/paper_table.py                                                            # shapes, three seeds
    python benchmarks/paper_table.py --recipe cifar10_small --seed 0 --seed 1 --data-root CIFAR10
    python benchmarks/paper_table.py --recipe shapes_moco --weight 0.1 --weight 0.2      # any recipe, several lambdas

Goes on where it was stopped: a run with results.json is not trained again, an evaluation that is recorded is not repeated. The
arms of a recipe are the same command but for --weight 0 and, for as much time as CARE takes, more --epochs.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import click
import torch

from care_hub import trainer
from care_hub.cli import resolve
from care_hub.config import TrainConfig
from care_hub.evaluate import record

ROOT = Path(__file__).parents[1]
FEW = (0.01, 0.1)
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ROWS = {  # measure -> (title, digits, better: 1 larger, -1 smaller)
    "label_probe": ("linear probe, label, %", 1, 1),
    "label_probe_10": ("same with 10 % of the labels", 1, 1),
    "label_probe_1": ("same with 1 % of the labels", 1, 1),
    "label_knn": ("kNN, label, %", 1, 1),
    "label_projection": ("label, read linearly from the projection, %", 1, 1),
    "color_backbone": ("color, read linearly from the backbone, %", 1, 1),
    "color_projection": ("color, read linearly from the projection, %", 1, 1),
    "hue_projection": ("mean hue, read linearly from the projection, R²", 3, 1),
    "saturation_projection": ("mean saturation, the same", 3, 1),
    "brightness_projection": ("mean brightness, the same", 3, 1),
    "ratio": ("rotation error / invariance error", 3, -1),
    "gram": ("Gram deviation", 4, -1),
    "hit": ("augmented picture found by R f(x), %", 1, 1),
    "hit_unrotated": ("the same by f(x), %", 1, 0),
    "training_minutes": ("minutes of training", 1, 0),
    "images_per_second": ("images per second", 0, 0),
}


def arms_of(recipe: TrainConfig, weights: tuple[float, ...]) -> dict[str, tuple[str, list[str]]]:
    """title -> (name of its runs, flags): CARE, its twin, and the twin for as many passes of the encoder as CARE's epochs take."""
    more = 0 if recipe.views == "shared" else 1 / recipe.equivariance_stride
    longer, plain = math.ceil(recipe.epochs * (1 + more)), ["--weight", "0"]
    arms = {f"CARE, λ = {w:g}, {recipe.epochs} epochs": (f"care-{w:g}", ["--weight", str(w)]) for w in weights}
    arms = arms or {f"CARE, {recipe.epochs} epochs": ("care", [])}
    arms[f"λ = 0, {recipe.epochs} epochs"] = ("plain", plain)
    if longer > recipe.epochs:
        arms[f"λ = 0, {longer} epochs"] = ("longer", [*plain, "--epochs", str(longer)])
    return arms


def recipe_file(recipe: str) -> Path:
    return ROOT / "recipes" / f"{recipe}.yaml"


def command(*words) -> None:
    click.echo("+ " + " ".join(map(str, words)), err=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def prepare(recipe: str, run: Path, seed: int, flags: list[str], data: list[str]) -> None:
    """Train and evaluate what is not there yet."""
    file = recipe_file(recipe)
    if not (run / "results.json").is_file():
        resume = ["--resume"] if (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir()) else []
        place = ["--save-root", run.parent, "--run-name", run.name]
        command(ROOT / "train.py", "--config", file, "--seed", seed, *place, *flags, *resume, *data)
    dataset = resolve({}, str(file)).dataset_name
    on = ["--dataset-name", dataset, *data]
    known = record.read(run / "export")
    done = known.get("accuracy", {}).get(dataset, {})
    if "linear probe" not in done:
        command(ROOT / "eval_linear.py", "--encoder", run, *on)
    for fraction in FEW:
        if f"linear probe, {100 * fraction:g} % of the labels" not in done:
            command(ROOT / "eval_linear.py", "--encoder", run, *on, "--label-fraction", fraction, "--seeds", 3)
    if "kNN" not in done:
        command("-c", "from care_hub.cli import main; main()", "knn", run, *on)
    if dataset not in known.get("equivariance", {}):
        command("-c", "from care_hub.cli import main; main()", "equivariance", run, *on)


def measured(run: Path) -> dict[str, float]:
    """The figures of one run, by the names in ROWS, from its own files."""
    results, known = json.loads((run / "results.json").read_text()), record.read(run / "export")
    (dataset,) = known["equivariance"]
    accuracy, geometry = known["accuracy"][dataset], known["equivariance"][dataset]
    full, kept = geometry["families"]["full recipe"], geometry["kept"]
    values = {
        "label_probe": accuracy["linear probe"]["top1"], "label_knn": accuracy["kNN"]["top1"],
        "ratio": full["rotation_invariance_ratio"][0], "gram": full["gram_deviation"][0],
        "hit": full["hit_at_1"][0], "hit_unrotated": full["hit_at_1_unrotated"][0], "training_minutes": results["training_seconds"] / 60,
        "images_per_second": results["images_per_second"],
    }  # fmt: skip
    values |= {f"label_probe_{100 * f:g}": accuracy[f"linear probe, {100 * f:g} % of the labels"]["top1"] for f in FEW}
    return values | {f"{name}_{space}": value for space, read in kept.items() for name, value in read.items()}


def hardware() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = {line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")}
        model = ", ".join(sorted(names)) or model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return gpu or f"CPU ({model}), torch {torch.__version__}"


def text_of(value: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(value):.{digits}f}" if len(value) > 1 else ""
    return f"{statistics.mean(value):.{digits}f}{spread}"


def table(summary: dict) -> str:
    """Markdown of one recipe; the best mean is bold where it is ahead of the second by more than the larger standard deviation."""
    arms = summary["arms"]
    lines = [f"**{summary['recipe']}** ({summary['settings']}; {summary['seeds']} seed{'s' * (summary['seeds'] > 1)})", ""]
    lines += ["| | " + " | ".join(arms) + " |", "|---" * (1 + len(arms)) + "|"]
    for name, (title, digits, better) in ROWS.items():
        if not all(name in run for runs in arms.values() for run in runs):
            continue
        values = [[run[name] for run in runs] for runs in arms.values()]
        cells, means = [text_of(v, digits) for v in values], [statistics.mean(v) for v in values]
        spread = max(statistics.stdev(v) if len(v) > 1 else 0.0 for v in values)
        *_, second, best = sorted(range(len(means)), key=lambda k: better * means[k])
        if better and len(values[0]) > 1 and abs(means[best] - means[second]) > spread:
            cells[best] = f"**{cells[best]}**"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_readme() -> None:
    """All of results/*.json between the two markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    tables = [table(json.loads(path.read_text())) for path in sorted((ROOT / "results").glob("*.json"), reverse=True)]
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(text[:start] + "\n" + "\n\n".join(tables) + "\n" + text[stop:])


@click.command()
@click.option("--recipe", default="shapes", show_default=True, help="a file in recipes/, without .yaml")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--weight", "weights", multiple=True, type=float, help="lambdas to compare (default: the recipe's)")
@click.option("--root", default="runs/paper", show_default=True, help="where the runs are kept")
@click.option("--data-root")
def main(recipe: str, seeds: tuple[int, ...], weights: tuple[float, ...], root: str, data_root: str | None) -> None:
    data = ["--data-root", str(Path(data_root).absolute())] if data_root else []
    settings, arms = resolve({}, str(recipe_file(recipe))), {}
    for title, (name, flags) in arms_of(settings, weights).items():
        runs = [Path(root).absolute() / f"{recipe}-{name}-{seed}" for seed in seeds]
        for seed, run in zip(seeds, runs, strict=True):
            prepare(recipe, run, seed, flags, data)
        arms[title] = [measured(run) for run in runs]
    about = f"{settings.model}, batch {settings.batch_size}, {hardware()}, precision {trainer.precision('auto')}"
    summary = {"recipe": recipe, "settings": about, "seeds": len(seeds), "arms": arms}
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / f"{recipe}.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_readme()
    click.echo(table(summary))


if __name__ == "__main__":
    main()
