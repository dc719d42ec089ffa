"""`care-hub report`: runs side by side on one self-contained HTML page."""

import base64
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import data_options
from ..files import own_file
from ..hub.card import Row
from ..metrics import FINAL_GEOMETRY, METRICS
from .figures import PANELS, logged_metrics, plot_curves, plot_geometry, run_colors
from .runs import Run, read_runs
from .svg import VARIABLES, inline_svg
from .tables import HITS, Results, interval, number, title_with_unit
from .templates import page_target, write_template

COLUMNS = (
    "motion",
    "same_image_hit_at_1",
    "same_image_hit_at_1_linear",
    "rotation_invariance_ratio",
    "gram_deviation",
    "gamma",
    "composition_invariance_ratio",
    *HITS,
)
SHEET_BYTES = 16 << 20  # of an image in the page, at most
SHEETS = ("neighbors.png", "neighbours.png")  # the latter in exports of earlier versions
OWN_OPTIONS = {"run_name", "save_root", "resume"}  # differ between runs of one configuration


@dataclass
class Cell:
    """Of a table. A row of one cell is a heading."""

    text: str
    note: str = ""  # small, below
    best: bool = False
    color: str = ""  # of the run that is named


Rows = list[list[Cell]]


def write_page(paths: Sequence[str], output: str) -> Path:
    """Write the page that compares the run folders `paths`.

    Raises CareHubError for what is no run and for a page that can't be written.
    """
    target = page_target(output)
    write_template("page.html", target, contents(read_runs(paths)))
    return target


def contents(runs: list[Run]) -> dict[str, Any]:
    """What the template shows."""
    colors = run_colors(run.name for run in runs)
    logged = {run.name: (run.metrics, run.config) for run in runs}
    datasets = dict.fromkeys(dataset for run in runs for dataset in run.geometry)
    bare = [run for run in runs if run.results and not run.geometry]
    return {
        "variables": VARIABLES,
        "runs": runs,
        "heads": [Cell(name, color=color) for name, color in colors.items()],
        "about": about_rows(runs),
        "results": result_rows(runs),
        "differing": option_rows(runs),
        "bare": bare,
        "measure_bare": _measure_command(bare),
        "curves": _panels(partial(plot_curves, logged), logged_metrics(logged), "over the images seen"),
        "geometry": [_geometry_part(dataset, runs, colors) for dataset in datasets],
        "sheets": [(run.name, sheet) for run in runs if (sheet := _sheet(run))],
    }


def _measure_command(runs: list[Run]) -> str:
    """What measures the geometry of `runs`, on the data of the first."""
    if not runs:
        return ""
    return f"care-hub equivariance {shlex.join(str(run.path) for run in runs)} {data_options(runs[0].config)}"


def _panels(plot: Callable[..., None], metrics: Iterable[str], about: str) -> list[str]:
    """A figure for each of `metrics`, as inline SVG."""
    panels = []
    with TemporaryDirectory() as folder:
        for metric in metrics:
            path = Path(folder) / f"{metric}.svg"
            plot(path, metrics=[metric], legend=False)
            panels.append(inline_svg(path, f"{title_with_unit(metric)}, {about}"))
    return panels


def _geometry_part(dataset: str, runs: list[Run], colors: dict[str, str]) -> dict[str, Any]:
    """The section on one data set."""
    known = {run.name: run.geometry[dataset] for run in runs if dataset in run.geometry}
    plot = partial(plot_geometry, known, colors=colors)
    spaces = list(dict.fromkeys(space for result in known.values() for space in result["attributes"]))
    return {
        "dataset": dataset,
        "panels": _panels(plot, PANELS, f"by augmentation of {dataset}"),
        "candidates": next(iter(known.values()))["images"] // 2,
        "alike": len({(found["images"], found["draws"], found.get("seed")) for found in known.values()}) == 1,
        "measures": [Cell(title_with_unit(key)) for key in COLUMNS],
        "families": family_rows(known, colors),
        "spaces": [Cell(name, space, color=colors[name]) for space in spaces for name in known],
        "attributes": attribute_rows(known, spaces),
    }


def _sheet(run: Run) -> str:
    """The run's sheet of nearest neighbors as base64, empty if there is none."""
    paths = [run.path / "export" / name for name in SHEETS]
    found = [path for path in paths if own_file(path) and path.stat().st_size <= SHEET_BYTES]
    return base64.b64encode(found[0].read_bytes()).decode() if found else ""


def about_rows(runs: list[Run]) -> Rows:
    """What each run is."""
    facts = [_facts(run) for run in runs]
    return [[Cell(title), *(Cell(fact[title]) for fact in facts)] for title in facts[0]]


def _facts(run: Run) -> dict[str, str]:
    config, minutes = run.config, run.results.get("training_seconds", math.nan) / 60
    versions = [f"{name} {run.versions[name]}" for name in ("torch", "timm") if name in run.versions]
    return {
        "method": config.method_name,
        title_with_unit("weight"): number(config.weight),
        "data": config.data_label,
        "model": config.model,
        "epochs × batch": f"{config.epochs} × {config.batch_size}",
        "seed": str(config.seed),
        f"{METRICS['training_seconds'].title}, minutes": number(minutes, digits=3),
        title_with_unit("images_per_second"): number(run.results.get("images_per_second")),
        "versions": ", ".join(versions) or "–",
    }


def result_rows(runs: list[Run]) -> Rows:
    """Accuracies, then the geometry at the end of training."""
    rows = []
    for dataset, title in dict.fromkeys(key for run in runs for key in run.accuracy):
        found = [run.accuracy.get((dataset, title), Row(dataset, title, math.nan)) for run in runs]
        cells = _compared([row.value for row in found], "higher")
        for cell, row in zip(cells, found, strict=True):
            cell.note = row.note
        rows.append([Cell(f"{title}, %", dataset), *cells])
    for key in FINAL_GEOMETRY:
        if any(key in run.results for run in runs):
            cells = _compared([run.results.get(key) for run in runs], METRICS[key].better)
            rows.append([Cell(title_with_unit(key), METRICS[key].meaning), *cells])
    return rows


def _compared(values: Sequence[float | None], better: str, digits: int = 4) -> list[Cell]:
    """Cells of one measure, the best marked if there is one. `better`: as in `metrics.Metric`."""
    known = {value for value in values if value is not None and not math.isnan(value)}
    best = math.nan  # equals no value
    if better and len(known) > 1:
        best = max(known) if better == "higher" else min(known)
    return [Cell(number(value, digits), best=value == best) for value in values]


def option_rows(runs: list[Run]) -> Rows:
    """Options in which the runs differ."""
    rows = []
    for name in vars(runs[0].config):
        values = [str(getattr(run.config, name)) for run in runs]
        if name not in OWN_OPTIONS and len(set(values)) > 1:
            rows.append([Cell(name), *map(Cell, values)])
    return rows


def family_rows(known: Results, colors: dict[str, str]) -> Rows:
    """A row for each augmentation family and run; several runs stand below the family's name."""
    rows: Rows = []
    for family in next(iter(known.values()))["families"]:
        names = [Cell(family)]
        if len(known) > 1:
            rows.append(names)
            names = [Cell(name, color=colors[name]) for name in known]
        columns = [_with_intervals(known, family, key) for key in COLUMNS]
        rows += map(list, zip(names, *columns, strict=True))
    return rows


def _with_intervals(known: Results, family: str, metric: str) -> list[Cell]:
    """Means of each run with their intervals; the best is marked if its interval overlaps no other."""
    triples = [interval(result, family, metric) for result in known.values()]
    cells = _compared([mean for mean, _, _ in triples], METRICS[metric].better, digits=3)
    intervals = [(low, high) for _, low, high in triples if low is not None]
    for cell, (_, low, high) in zip(cells, triples, strict=True):
        if low is not None:
            cell.note = f"{number(low, 3)}\u00a0to\u00a0{number(high, 3)}"
            cell.best = cell.best and sum(a <= high and low <= b for a, b in intervals) == 1  # its own
    return cells


def attribute_rows(known: Results, spaces: Iterable[str]) -> Rows:
    """A row for each attribute that a linear map predicts, a column for each space and run."""
    probes = [result["attributes"] for result in known.values()]
    rows: Rows = []
    for attribute in dict.fromkeys(name for probe in probes for space in probe.values() for name in space):
        rows.append([Cell(title_with_unit(attribute))])
        for space in spaces:
            values = [probe.get(space, {}).get(attribute) for probe in probes]
            rows[-1] += _compared(values, "higher", digits=3)
    return rows
