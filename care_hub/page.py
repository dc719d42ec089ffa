"""`care-hub report`: runs side by side on one self-contained HTML page."""

import base64
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from . import figures
from .card import accuracies
from .classifier import LinearHead, heads
from .config import TrainConfig, read_yaml
from .errors import CareHubError
from .evaluate import record
from .report import MEASURES

SMALLER = {"rotation_invariance_ratio", "gram_deviation"}  # better


@dataclass
class Run:
    """What a run folder holds; parts that are not there yet are empty."""

    name: str
    path: Path
    config: TrainConfig
    metrics: list[dict]
    results: dict
    care: dict
    accuracy: dict[tuple[str, str], tuple[float, str]]  # (data set, measure) -> (per cent, note)
    geometry: dict[str, dict]  # data set -> what `care-hub equivariance` measured

    @classmethod
    def read(cls, path: Path) -> "Run":
        if not (path / "config.yaml").is_file():
            raise CareHubError(f"'{path}' is not a run folder (no config.yaml there).")
        values = read_yaml(path / "config.yaml")
        results, care, rows, geometry = _json(path / "results.json"), {}, [], {}
        if (export := path / "export").is_dir() and (export / "config.json").is_file():
            care, measured = _json(export / "config.json").get("care", {}), record.read(export)
            rows = accuracies(care, [LinearHead.load(p) for p in heads(export)], measured)
            geometry = measured.get("equivariance", {})
        accuracy = {(row.dataset, row.title): (row.value, row.note) for row in rows}
        return cls(path.resolve().name, path, TrainConfig(**values), _metrics(path / "metrics.jsonl"), results, care, accuracy, geometry)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CareHubError(f"'{path}' is not valid JSON ({error}).") from error


def _metrics(path: Path) -> list[dict]:
    """Rows of metrics.jsonl; a last line that is being written, or was cut short, is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CareHubError(f"line {number} of '{path}' is not valid JSON.") from error
    return rows


@dataclass
class Cell:
    text: str
    note: str = ""
    best: bool = False


@dataclass
class Table:
    head: list[str]
    rows: list[list[Cell]]
    marks: dict[int, str] = field(default_factory=dict)  # column -> colour


def number(value, digits: int = 4) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def write(paths: list[str], output: str) -> Path:
    """Write the page that compares the run folders `paths`. Raises CareHubError for what is no run or can't be written."""
    target = Path(output)
    if target.is_dir():
        raise CareHubError(f"'{output}' is a folder; name a file for the page.")
    if not target.absolute().parent.is_dir():
        raise CareHubError(f"the folder '{target.parent}' for the page does not exist.")
    runs = [Run.read(Path(path)) for path in paths]
    named = Counter(run.name for run in runs)
    for run in runs:
        run.name = str(run.path) if named[run.name] > 1 else run.name
    if len({run.name for run in runs}) < len(runs):
        raise CareHubError("the same run is given twice.")
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    page = template.render(**contents(runs))
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CareHubError(f"'{output}' can't be written ({error.strerror}).") from error
    return target


def contents(runs: list[Run]) -> dict:
    """What the template shows."""
    names, many = [run.name for run in runs], len(runs) > 1
    sheets = [(run.name, path) for run in runs if (path := run.path / "export" / "neighbours.png").is_file()]
    datasets = list(dict.fromkeys(dataset for run in runs for dataset in run.geometry))
    with TemporaryDirectory() as folder:

        def drawn(draw: Callable, *arguments) -> str:
            draw(*arguments, Path(folder) / "figure.png")
            return _base64(Path(folder) / "figure.png")

        geometry = []
        for dataset in datasets:
            known = {run.name: run.geometry[dataset] for run in runs if dataset in run.geometry}
            colors = {run.name: color_of(k) for k, run in enumerate(runs)}
            part = {"dataset": dataset, "table": families(known), "kept": kept(known)}
            part["figure"] = drawn(lambda k, path, c=colors: figures.geometry(k, path, c), known)
            part["alike"] = len({(g["images"], g["draws"], g.get("seed")) for g in known.values()}) == 1
            geometry.append(part | {"candidates": f"{next(iter(known.values()))['images'] // 2:,}"})
        curves = drawn(figures.curves, {run.name: (run.metrics, run.config) for run in runs}) if any(run.metrics for run in runs) else ""
    return {
        "title": "Runs compared" if many else names[0],
        "lead": f"{len(runs)} runs of care_hub: {', '.join(f'{run.name} ({run.config.label})' for run in runs)}."
        if many else f"A run of care_hub: {runs[0].config.label} on {runs[0].config.dataset_name}.",
        "many": many, "about": about(runs), "results": results(runs), "differ": differ(runs), "missing": missing(runs),
        "curves": curves, "geometry": geometry, "sheets": [{"name": n, "picture": _base64(p)} for n, p in sheets],
    }  # fmt: skip


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def color_of(k: int) -> str:
    return figures.COLORS[k % len(figures.COLORS)]


def across(title: str, runs: list[Run], rows: list[list[Cell]]) -> Table:
    """A column for each run, marked with its colour in the figures."""
    return Table([title, *(run.name for run in runs)], rows, {k + 1: color_of(k) for k in range(len(runs))})


def about(runs: list[Run]) -> Table:
    facts = {
        "method": lambda r: r.config.label,
        "λ": lambda r: number(float(r.config.weight)),
        "data": lambda r: r.config.dataset_name,
        "model": lambda r: r.config.model,
        "epochs × batch": lambda r: f"{r.config.epochs} × {r.config.batch_size}",
        "seed": lambda r: str(r.config.seed),
        "training, minutes": lambda r: number(r.results["training_seconds"] / 60, 3) if "training_seconds" in r.results else "–",
        "images/s": lambda r: number(float(r.results["images_per_second"])) if "images_per_second" in r.results else "–",
        "versions": lambda r: ", ".join(f"{k} {v}" for k, v in r.care.get("versions", {}).items() if k in ("torch", "timm")) or "–",
    }
    return across("", runs, [[Cell(title), *(Cell(fact(run)) for run in runs)] for title, fact in facts.items()])


def results(runs: list[Run]) -> Table:
    """Accuracies, then the closing figures of the geometry."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.accuracy):
        found = [run.accuracy.get(key, (None, "")) for run in runs]
        cells = _compared([value for value, _ in found], larger=True, digits=4)
        for cell, (_, note) in zip(cells, found, strict=True):
            cell.note = note
        rows.append([Cell(key[1], key[0]), *cells])
    for key, title, explanation in MEASURES:
        if not key.startswith("knn") and any(key in run.results for run in runs):
            values = [run.results.get(key) for run in runs]
            rows.append([Cell(title, explanation), *_compared(values, larger=False if key in SMALLER else None)])
    return across("measure", runs, rows)


def _compared(values: list, larger: bool | None, digits: int = 4) -> list[Cell]:
    """Cells of one measure, the best marked if there is one. `larger`: whether that is better; None: neither is."""
    cells = [Cell(number(value, digits)) for value in values]
    known = [value for value in values if value is not None and value == value]
    if larger is not None and len(known) > 1 and min(known) != max(known):
        best = max(known) if larger else min(known)
        for cell, value in zip(cells, values, strict=True):
            cell.best = value == best
    return cells


def differ(runs: list[Run]) -> Table:
    own = {"run_name", "save_root", "resume"}
    names = [name for name in vars(runs[0].config) if name not in own and len({str(getattr(r.config, name)) for r in runs}) > 1]
    return across("option", runs, [[Cell(name), *(Cell(str(getattr(r.config, name))) for r in runs)] for name in names])


def missing(runs: list[Run]) -> list[str]:
    """What can be had, and by which command."""
    sentences = [f"{run.name} is not finished: there is no results.json yet." for run in runs if not run.results]
    bare = [run for run in runs if run.results and not run.geometry]
    if bare:
        words = f"{' '.join(str(run.path) for run in bare)} --dataset-name {bare[0].config.dataset_name}"
        sentences.append(f"Geometry by augmentation was not measured for {', '.join(r.name for r in bare)}: care-hub equivariance {words}")
    return sentences


def families(known: dict[str, dict]) -> Table:
    """A line for each augmentation family and run."""
    head = ["augmentation", "run", "ratio", "Gram deviation", "γ", "R_b R_a for R_ba", "found by R f(x), %", "by f(x)", "by chance R"]
    measures = ("rotation_invariance_ratio", "gram_deviation", "gamma", "composition_invariance_ratio", "hit_at_1")
    measures += ("hit_at_1_unrotated", "hit_at_1_random")
    rows = []
    for family in next(iter(known.values()))["families"]:
        columns = []
        for measure in measures:
            triples = [(result["families"].get(family, {}).get(measure) or (None,) * 3) for result in known.values()]
            larger = {"rotation_invariance_ratio": False, "gram_deviation": False, "hit_at_1": True}.get(measure)
            cells = _compared([mean for mean, _, _ in triples], larger, digits=3)
            for k, (cell, (mean, low, high)) in enumerate(zip(cells, triples, strict=True)):
                others = [other for other in (*triples[:k], *triples[k + 1 :]) if other[0] is not None]
                cell.note = "" if mean is None else f"{number(low, 3)} to {number(high, 3)}"
                cell.best = cell.best and all(other[1] > high or other[2] < low for other in others)
            columns.append(cells)
        for k, name in enumerate(known):
            rows.append([Cell(family if k == 0 else ""), Cell(name), *(column[k] for column in columns)])
    return Table(head, rows)


def kept(known: dict[str, dict]) -> Table:
    spaces = list(dict.fromkeys(space for result in known.values() for space in result["kept"]))
    columns = [(name, space) for space in spaces for name in known]
    things = list(dict.fromkeys(thing for result in known.values() for read in result["kept"].values() for thing in read))
    rows = []
    for thing in things:
        cells = [Cell(thing)]
        for space in spaces:
            cells += _compared([result["kept"].get(space, {}).get(thing) for result in known.values()], larger=True, digits=3)
        rows.append(cells)
    return Table(["", *(f"{name}, {space}" for name, space in columns)], rows)
